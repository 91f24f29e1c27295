r"""The backward pass over a stretch of time, as every strategy with a derivative of its own runs it.

Forward, keeping what the backward of each step will need; then the recursion d̄ₜ ↦ d̄ₜ₋₁ alone in a loop; then one
contraction over the stretch. `adjoint_scan` takes the whole sequence as one stretch, the others cut it into several.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.scans.along_time import window
from jaxbptt.scans.recurrence import Recurrence, differentiable, merge, name, pull, split
from jaxbptt.scans.tracing import TracedStep, map_over_time, trace


class StepWithAdjoint(NamedTuple):
    """A step and its backward.

    Attributes:
        step: `(params, carry, x) -> (carry, y)`.
        params: to call both with.
        adjoint: the `Adjoint` given, or the `Cell`'s own, or else one derived from the step.
        branches: whether the step has a `lax.cond`, which must not be mapped over time.
        like_params: puts a gradient of `params` into the structure of the user's.
    """

    step: Callable[..., Any]
    params: Any
    adjoint: Adjoint
    branches: bool
    like_params: Callable[[Any], Any] = lambda params: params


def step_with_adjoint(step: Callable[..., Any] | Cell, adjoint: Adjoint | None, r: Recurrence) -> StepWithAdjoint:
    """Settle which backward a step gets; `r` is the same step, prepared."""
    if adjoint is None and isinstance(step, Cell):
        adjoint = step.adjoint
    if adjoint is not None:
        return StepWithAdjoint(r.step, r.params, adjoint, branches=False)
    traced = trace(r)
    return StepWithAdjoint(traced.step, traced.params, _derived(traced), traced.branches, traced.like_params)


def unroll_forward(
    adjoint: Adjoint, params: Any, init: Any, xs: Any, *, length: int, unroll: int | bool
) -> tuple[tuple[Any, Any], Any]:
    """`lax.scan` that keeps residuals: ((c_T, ys), residuals stacked over time)."""
    restorers = []

    def body(carry, x):
        (carry, y), residuals = adjoint.forward(params, carry, x)
        kept, restore = without(residuals, y)
        restorers.append(restore)
        return carry, (y, kept)

    carry, (ys, kept) = jax.lax.scan(body, init, xs, length=length, unroll=unroll)
    return (carry, ys), restorers[-1](kept, ys)


def unroll_backward(
    adjoint: Adjoint,
    params: Any,
    init: Any,
    residuals: Any,
    xs: Any,
    carry_bar: Any,
    ys_bar: Any,
    *,
    length: int,
    unroll: int | bool,
) -> tuple[Any, Any, Any]:
    """Gradients of params, init and xs, from those of c_T and ys; `init` only says what its gradient has to look like."""

    def body(carry_bar, inputs):
        return adjoint.backward(params, *inputs[:2], carry_bar, inputs[2])

    init_bar, deltas = jax.lax.scan(
        body, carry_bar, (residuals, xs, ys_bar), length=length, reverse=True, unroll=unroll
    )
    params_bar, xs_bar = adjoint.contract(params, residuals, xs, ys_bar, deltas)
    return fit(params_bar, params, "params"), fit(init_bar, init, "init"), fit(xs_bar, xs, "xs")


def back_over(
    adjoint: Adjoint,
    params: Any,
    carry: Any,
    xs: Any,
    carry_bar: Any,
    ys_bar: Any,
    *,
    start: Any,
    length: int,
    unroll: int | bool,
) -> tuple[Any, tuple[Any, Any, Any]]:
    """Forward over `length` steps of xs from the `carry` before step `start`, and back: (the carry after them, gradients)."""
    inputs = window(xs, start, length)
    (after, _), residuals = unroll_forward(adjoint, params, carry, inputs, length=length, unroll=unroll)
    outputs_bar = window(ys_bar, start, length)
    bars = unroll_backward(
        adjoint, params, carry, residuals, inputs, carry_bar, outputs_bar, length=length, unroll=unroll
    )
    return after, bars


def back_one_lag(
    adjoint: Adjoint, params: Any, residuals: Any, xs: Any, bars: Any, ys_bar: Any, *, in_turn: bool
) -> tuple[Any, Any, Any]:
    """All time steps one step back at once: the gradients of the carries after each step, moved to those before it.

    Returns them as gradients of the carries after each step again, so one place earlier, that of init, and the deltas.
    """
    before, deltas = map_over_time(adjoint.backward, in_turn=in_turn)(params, residuals, xs, bars, ys_bar)
    after = jax.tree.map(lambda leaf: jnp.concatenate([leaf[1:], jnp.zeros_like(leaf[:1])]), before)
    return after, jax.tree.map(lambda leaf: leaf[0], before), deltas


def at_last_step(bar: Any, length: int) -> Any:
    """The gradient of the last carry as one of the carries after every step."""
    return jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype).at[-1].set(leaf), bar)


def _derived(traced: TracedStep) -> Adjoint:
    """The three parts by `jax.vjp`: keep the carries, and give the contraction every carry adjoint."""

    def forward(params, carry, x):
        return traced.step(params, carry, x), carry

    def backward(params, carry, x, carry_bar, y_bar):
        (previous_bar,) = pull(lambda carry: traced.step(params, carry, x), (carry,), (carry_bar, y_bar))
        return previous_bar, carry_bar

    over_time = map_over_time(traced.step, in_turn=traced.branches)

    def contract(params, carries, xs, ys_bar, carry_bars):
        return pull(lambda params, xs: over_time(params, carries, xs), (params, xs), (carry_bars, ys_bar))

    return Adjoint(forward, backward, contract)


def without(residuals: Any, outputs: Any) -> tuple[list[Any], Callable[..., Any]]:
    """The residuals that are not outputs as well, and how to put them all together: what is returned is kept once."""
    leaves, treedef = jax.tree.flatten(residuals)
    ids = [id(leaf) for leaf in jax.tree.leaves(outputs)]
    places = [ids.index(id(leaf)) if id(leaf) in ids else None for leaf in leaves]

    def restore(kept: list[Any], outputs: Any) -> Any:
        rest, returned = iter(kept), jax.tree.leaves(outputs)
        return treedef.unflatten([next(rest) if place is None else returned[place] for place in places])

    return [leaf for leaf, place in zip(leaves, places, strict=True) if place is None], restore


def fit(bar: Any, primal: Any, root: str) -> Any:
    """Check a result of an `Adjoint` against what it is the derivative of, and give it that dtype."""
    primal, other = split(primal)

    def cast(path, leaf, leaf_bar):
        aval = jax.typeof(leaf)
        if leaf_bar.shape != aval.shape:
            raise ValueError(
                f"The adjoint's gradient of {name(root, path)} has shape {leaf_bar.shape}, but {name(root, path)} has "
                f"{aval.shape}: sum over time and batch what it does not have, and check the order of its axes."
            )
        return leaf_bar.astype(aval.dtype)

    if jax.tree.structure(bar) == jax.tree.structure(merge(primal, other)):
        # A gradient of what has none, such as integer inputs of a cell, is left out.
        bar = jax.tree.map(lambda leaf, leaf_bar: None if leaf is None else leaf_bar, primal, bar, is_leaf=_is_none)
    bar = differentiable(bar)
    if jax.tree.structure(bar) != jax.tree.structure(primal):
        raise ValueError(
            f"The adjoint's gradient of {root} has structure {jax.tree.structure(bar)}, but {root} has "
            f"{jax.tree.structure(primal)}: return one gradient for each leaf, None for those without a derivative."
        )
    return jax.tree_util.tree_map_with_path(cast, primal, bar)


def _is_none(leaf: Any) -> bool:
    return leaf is None


def totals(params: Any) -> Any:
    """Zeros to add up the gradient of params in, in single precision at least."""

    def zeros(leaf):
        aval = jax.typeof(leaf)
        return jnp.zeros(aval.shape, aval.dtype if jnp.finfo(aval.dtype).bits >= 32 else jnp.float32)

    return jax.tree.map(zeros, differentiable(params))


def add_up(totals: Any, more: Any) -> Any:
    """`totals` and what one more stretch adds to them."""
    return jax.tree.map(lambda total, leaf: total + leaf.astype(total.dtype), totals, more)


def as_params(totals: Any, params: Any) -> Any:
    """`totals` in the dtypes of params."""
    return jax.tree.map(lambda total, leaf: total.astype(jax.typeof(leaf).dtype), totals, differentiable(params))
