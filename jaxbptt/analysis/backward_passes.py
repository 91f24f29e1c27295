r"""Backward passes taken many times over one forward pass: for all lags at once, for many cuts, for many losses.

The residuals of the forward pass are kept, as the strategies in `scans` keep them, and `Adjoint.backward` goes over them
again and again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt.arrays import scalar_loss
from jaxbptt.cells.cell import Cell
from jaxbptt.programs.perturbed import PerturbedAdjoint, everything
from jaxbptt.scans.backward import StepWithAdjoint, at_last_step, back_one_lag, step_with_adjoint, unroll_forward
from jaxbptt.scans.contraction import add_up, fit, totals
from jaxbptt.scans.recurrence import prepare
from jaxbptt.trees import combine, differentiable, partition

# Backward passes that run side by side where many are asked for: more take more memory, and little less time.
_SIDE_BY_SIDE = 16


class Unrolled(NamedTuple):
    """A forward pass and the gradients of the loss with respect to its results: where every backward pass starts."""

    step: StepWithAdjoint
    adjoint: PerturbedAdjoint
    xs: Any
    length: int
    residuals: Any
    outputs: Any
    nondiff: Any
    bars: Any

    def map(self, fn: Callable[[Any], Any], items: Any) -> Any:
        """`fn` for each item, several side by side: but not for a step that branches, where both sides would be computed."""
        return jax.lax.map(fn, items, batch_size=None if self.step.in_turn else _SIDE_BY_SIDE)


def unroll(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any,
    loss: Callable[..., Any] | None,
    length: int | None,
) -> Unrolled:
    """Go forward once; without a loss the `bars` are for the caller to put in."""
    loss = None if loss is None else scalar_loss(loss)
    r = prepare(step, params, init, xs, length)
    if r.length == 0:
        raise ValueError("A sequence without time steps has no lags: pass at least one step.")
    if loss is not None and not jax.tree.leaves(differentiable(params)):
        raise ValueError("params has no leaf with a derivative: pass what the step learns as params, not in a closure.")
    with_adjoint = step_with_adjoint(step, None, r)
    adjoint = with_adjoint.adjoint(everything(with_adjoint.params, r.init, r.xs))
    results, residuals = unroll_forward(adjoint, with_adjoint.params, r.init, r.xs, length=r.length, unroll=1)
    outputs, nondiff = partition(results)
    bars = None if loss is None else jax.grad(lambda outputs: loss(*combine(outputs, nondiff)))(outputs)
    return Unrolled(with_adjoint, adjoint, r.xs, r.length, residuals.stacked(), outputs, nondiff, bars)


def map_over_lags(u: Unrolled, lags: int, measure: Callable[[Any, Any], Any]) -> Any:
    """`measure(G⁽ˡ⁾, Σₖ G⁽ᵏ⁾ with k ≤ l)` for the lags l below `lags`, stacked."""
    adjoint, params = u.adjoint, u.step.params
    last_bar, ys_bar = u.bars

    def body(state, ys_bar):
        bars, together = state
        bars, _, deltas = back_one_lag(adjoint, params, u.residuals, u.xs, bars, ys_bar, in_turn=u.step.in_turn)
        params_bar, _ = adjoint.contract(params, u.residuals, u.xs, ys_bar, deltas)
        more = u.step.like_params(fit(params_bar, params, adjoint.perturbed.params, "params"))
        together = add_up(together, more)
        return (bars, together), measure(more, together)

    # Outputs are looked at once, at lag 0; after that all comes through the carry.
    state, first = body((at_last_step(last_bar, u.length), u.step.like_params(totals(differentiable(params)))), ys_bar)
    no_bar = jax.tree.map(jnp.zeros_like, ys_bar)
    _, others = jax.lax.scan(lambda state, _: body(state, no_bar), state, None, length=lags - 1)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, others)


def gradients(u: Unrolled, K: Any) -> tuple[Any, Any]:
    """The backward pass, cut every K steps: gradients of params and xs. K may be traced."""
    adjoint, params = u.adjoint, u.step.params
    last_bar, ys_bar = u.bars

    def body(carry_bar, at_t):
        t, residuals, x, y_bar = at_t
        carry_bar, delta = adjoint.backward(params, residuals, x, carry_bar, y_bar)
        return jax.tree.map(lambda leaf: jnp.where(t % K == 0, jnp.zeros_like(leaf), leaf), carry_bar), delta

    _, deltas = jax.lax.scan(body, last_bar, (jnp.arange(u.length), u.residuals, u.xs, ys_bar), reverse=True)
    params_bar, xs_bar = adjoint.contract(params, u.residuals, u.xs, ys_bar, deltas)
    return u.step.like_params(fit(params_bar, params, adjoint.perturbed.params, "params")), fit(
        xs_bar, u.xs, adjoint.perturbed.x, "xs"
    )
