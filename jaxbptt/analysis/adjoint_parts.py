r"""Which part of a hand-written `Adjoint` is wrong: forward, backward or contract, each against `jax.vjp` of the step.

A part is given what the parts before it returned: the residuals of `forward`, the deltas of `backward`. So the first part
that does not agree is the one to look at; where it is `contract`, the deltas may be what is wrong.
"""

from collections.abc import Callable
from html import escape
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.analysis.compare import GradientComparison, comparison
from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.programs.perturbed import everything, fit
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.passes import one_pass
from jaxbptt.scans.recurrence import Recurrence
from jaxbptt.trees import combine, differentiable, is_array, is_differentiable, partition, pull

_NAMES = "forward", "backward", "contract", "contract in two segments"


class AdjointPart(NamedTuple):
    """One part of an `Adjoint`, checked.

    Attributes:
        name: "forward", "backward", "contract", or "contract in two segments", summed as the strategies sum them.
        agrees: whether all that it returns does.
        comparison: leaf by leaf, with the likely cause of a difference.
    """

    name: str
    agrees: bool
    comparison: GradientComparison

    def __str__(self) -> str:
        wrong = [f"{leaf.leaf}: {leaf.cause}" for leaf in self.comparison.leaves if not leaf.agrees]
        return f"{self.name}: {'; '.join(wrong) or 'agrees'}"

    def _repr_html_(self) -> str:
        return f"<div><strong>{escape(self.name)}</strong></div>{self.comparison._repr_html_()}"


def check_parts(
    step: Callable[..., Any] | Cell, adjoint: Adjoint, r: Recurrence, flags: Flags
) -> tuple[AdjointPart, ...]:
    """The parts of an adjoint at all steps of a recurrence, under random cotangents of every new carry and output."""
    arrays, static = partition((r.params, r.init, r.xs, flags), by=is_array)

    def compute(arrays):
        params, init, xs, flags = combine(arrays, static)
        return _parts(step, adjoint, r._replace(params=params, init=init, xs=xs), flags)

    found = []
    for name, (mine, reference) in zip(_NAMES, jax.tree.map(np.asarray, jax.jit(compute)(arrays)), strict=True):
        # A difference of low rank says something of a sum over time, and nothing of what is stacked over time.
        compared = comparison(mine, reference, low_rank=name.startswith("contract"))
        found.append(AdjointPart(name, compared.agrees, compared))
    *parts, in_segments = found
    # Told apart only where they differ.
    return tuple(parts) if in_segments.agrees or not parts[-1].agrees else (*parts, in_segments)


def _parts(step: Any, adjoint: Adjoint, r: Recurrence, flags: Flags) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What each part returns and what it should, in the order of `_NAMES`."""
    over_time, r = one_pass(step, adjoint, r, flags, unroll=1)
    mine = over_time.step.adjoint(everything(r.params, r.init, r.xs))
    params, like_params = r.params, over_time.step.like_params
    like_xs = (lambda xs_bar: xs_bar[0]) if flags.given else (lambda xs_bar: xs_bar)

    def body(carry, x):
        new_carry, y = over_time.step.step(params, carry, x)
        return new_carry, (carry, new_carry, y)

    _, (carries, new_carries, ys) = jax.lax.scan(body, r.init, r.xs, length=r.length)
    bars = _random_like((new_carries, ys))

    def every_step(params, carries, xs):
        return jax.lax.map(lambda at_t: over_time.step.step(params, *at_t), (carries, xs))

    params_bar, before_bar, xs_bar = pull(every_step, (params, carries, r.xs), bars)

    def back(at_t):
        residuals, x, (carry_bar, y_bar), carry = at_t
        before_bar, delta = mine.backward(params, residuals, x, carry_bar, y_bar)
        return fit(before_bar, carry, mine.perturbed.carry, "init"), delta

    def contract(*stacked):
        params_bar, xs_bar = mine.contract(params, *stacked)
        xs = stacked[1]
        return fit(params_bar, params, mine.perturbed.params, "params"), fit(xs_bar, xs, mine.perturbed.x, "xs")

    (my_new_carries, my_ys), residuals = jax.lax.map(lambda at_t: mine.forward(params, *at_t), (carries, r.xs))
    my_before_bar, deltas = jax.lax.map(back, (residuals, r.xs, bars, carries))
    stacked = residuals, r.xs, bars[1], deltas
    half = r.length // 2
    segments = (slice(half), slice(half, None)) if half else (slice(None),)
    each = [contract(*jax.tree.map(lambda leaf, s=s: leaf[s], stacked)) for s in segments]
    params_bars, xs_bars = zip(*each, strict=True)
    summed = jax.tree.map(lambda *leaves: sum(leaves[1:], leaves[0]), *params_bars)
    in_order = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *xs_bars)

    def values(new_carries, ys):
        return differentiable({"carry": new_carries, "y": ys})

    def gradients(params_bar, xs_bar):
        return {"params": like_params(params_bar), "xs": like_xs(xs_bar)}

    reference = gradients(params_bar, xs_bar)
    return [
        (values(my_new_carries, my_ys), values(new_carries, ys)),
        ({"carry": my_before_bar}, {"carry": before_bar}),
        (gradients(*contract(*stacked)), reference),
        (gradients(summed, in_order), reference),
    ]


def _random_like(tree: Any) -> Any:
    """Normal numbers for each leaf with a derivative: a cotangent of 0 would hide a mistake."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(0), max(len(leaves), 1))
    return treedef.unflatten(
        [
            jax.random.normal(key, leaf.shape, leaf.dtype) if is_differentiable(leaf) else None
            for key, leaf in zip(keys, leaves, strict=False)
        ]
    )
