r"""What a hand-written loop computes on its way, compared with what it should be, step by step.

The order is that of the computation: hs and ys from the first step on, then dy, dh, dh_raw from the last step back. So the
first that differs is the one to look at, and all before it is right.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.analysis.causes import tolerance
from jaxbptt.analysis.mistakes.elman import Equations
from jaxbptt.analysis.mistakes.given import Prepared, arrays_of, problem_of
from jaxbptt.cells.cell import step_of
from jaxbptt.trees import combine
from jaxbptt.words import counted

FORWARD = "hs", "ys"
BACKWARD = "dy", "dh", "dh_raw"
_TINY = 1e-30


def first_difference(p: Prepared, mine: Any) -> str:
    """The first quantity and time step that differ, in words; "" where all agree."""
    given = mine if isinstance(mine, Mapping) else {name: getattr(mine, name, None) for name in (*FORWARD, *BACKWARD)}
    given = {name: value for name, value in given.items() if value is not None}
    unknown = [name for name in given if name not in (*FORWARD, *BACKWARD)]
    if unknown or not given:
        raise ValueError(
            f"intermediates have {', '.join(map(repr, unknown)) or 'none of them'}, but what is compared is hs, ys, dy, dh "
            "and dh_raw: pass a mapping of these names to arrays [time, ...], or what bptt(...) returned."
        )
    right = _right(p)
    missing = [name for name in given if name not in right]
    if missing:
        raise ValueError(
            f"{missing[0]} is known of an Elman network alone, and the step is none: leave it out; hs, ys and dy can be "
            "compared where the carry and the output are arrays."
        )
    wrong = {name: _wrong_steps(name, value, right[name]) for name, value in given.items()}
    for t in range(p.steps):
        for name in FORWARD:
            if t in wrong.get(name, ()):
                return f"{name} at time step {t} (counted from 0) is the first that differs: the forward pass"
    for t in reversed(range(p.steps)):
        for name in BACKWARD:
            if t in wrong.get(name, ()):
                before = [other for other in BACKWARD[: BACKWARD.index(name)] if other in given]
                agree = f"; {' and '.join(before)} {'agree' if len(before) > 1 else 'agrees'} there" if before else ""
                later = counted(p.steps - 1 - t, "step")
                return (
                    f"{name} at time step {t} (counted from 0) is the first that differs on the way back, after {later} "
                    f"that agree{agree}"
                )
    return ""


def _right(p: Prepared) -> dict[str, np.ndarray]:
    """Each quantity as it should be, as far as the step has it."""
    arrays, static = arrays_of(p.given)

    @jax.jit
    def compute(arrays):
        problem = problem_of(p, *combine(arrays, static))
        step = step_of(p.given.step)

        dy = jax.tree.map(lambda leaf: leaf[: p.steps], problem.losses)
        hs = jax.tree.map(lambda leaf: leaf[1:-1], problem.states)
        found = {"hs": hs, "dy": dy}
        if p.roles is not None:
            params, init, xs, _ = combine(arrays, static)
            _, found["ys"] = jax.lax.scan(lambda h, x: step(params, h, x), init, xs)

            def body(carry_bar, t):
                residuals, x, y_bar = jax.tree.map(lambda leaf: leaf[t], (problem.residuals, problem.xs, dy))
                equations = Equations(*map(jnp.asarray, Equations()))
                carry_bar, (dh_raw, dh) = problem.backward(equations, problem.params, residuals, x, carry_bar, y_bar)
                return carry_bar, (dh, dh_raw)

            _, (dh, dh_raw) = jax.lax.scan(body, problem.last_bar, jnp.arange(p.steps)[::-1])
            found |= {"dh": dh[::-1], "dh_raw": dh_raw[::-1]}
        return found

    found = {name: jax.tree.leaves(value) for name, value in compute(arrays).items()}
    return {name: np.asarray(leaves[0]) for name, leaves in found.items() if len(leaves) == 1}


def _wrong_steps(name: str, mine: Any, right: np.ndarray) -> set[int]:
    mine = np.asarray(mine)
    if mine.shape != right.shape:
        raise ValueError(
            f"{name} has shape {mine.shape}, but {right.shape} is expected, time first: stack what the loop computes in "
            "the order of time, not in that of the backward loop."
        )
    bound = 2 * tolerance(mine, right)
    axes = tuple(range(1, right.ndim))
    error, size = np.abs(mine - right).max(axes, initial=0), np.abs(right).max(axes, initial=0)
    floor = float(jnp.finfo(right.dtype).eps) * size.max(initial=0)
    return set(np.flatnonzero(~(error <= np.maximum(bound * size, floor) + _TINY)).tolist())
