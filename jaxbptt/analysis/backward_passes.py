r"""Backward passes taken many times over one forward pass: for all lags at once, for many cuts, for many losses.

The residuals of the forward pass are saved, as the strategies in `scans` save them, and every backward pass reads them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt.along_time import at_last_step
from jaxbptt.arrays import scalar_loss
from jaxbptt.cells.cell import Cell
from jaxbptt.programs.perturbed import everything, fit
from jaxbptt.scans.contraction import add_up, totals
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.passes import Pass, one_pass
from jaxbptt.scans.recurrence import prepare
from jaxbptt.trees import combine, differentiable, partition

# Backward passes that run side by side where many are asked for: more take more memory, and little less time.
_SIDE_BY_SIDE = 16


class Unrolled(NamedTuple):
    """A forward pass and the gradients of the loss with respect to its results: where every backward pass starts.

    Attributes:
        over_time: the pass.
        params: to call it with.
        xs: the inputs.
        length: T.
        residuals: of all steps, stacked.
        outputs: the leaves of (c_T, ys) that have a derivative.
        nondiff: the others.
        bars: ∂L/∂outputs, or `None` where no loss was given.
    """

    over_time: Pass
    params: Any
    xs: Any
    length: int
    residuals: Any
    outputs: Any
    nondiff: Any
    bars: Any

    def map(self, fn: Callable[[Any], Any], items: Any) -> Any:
        """`fn` for each item, several side by side: but not for a step that branches, where both branches would run."""
        return jax.lax.map(fn, items, batch_size=None if self.over_time.step.one_at_a_time else _SIDE_BY_SIDE)

    def params_gradient(self, params_bar: Any) -> Any:
        """What `contract` returned for params, checked, like the user's."""
        params_bar = fit(params_bar, self.params, self.over_time.adjoint.perturbed.params, "params")
        return self.over_time.step.like_params(params_bar)


def unroll(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any,
    loss: Callable[..., Any] | None,
    length: int | None,
    flags: Flags,
) -> Unrolled:
    """Run the forward pass once; without a loss the `bars` are for the caller to put in."""
    loss = None if loss is None else scalar_loss(loss)
    r = prepare(step, params, init, xs, length, flags.is_first, flags.valid)
    if r.length == 0:
        raise ValueError("A sequence without time steps has no lags: pass at least one step.")
    if loss is not None and not jax.tree.leaves(differentiable(params)):
        raise ValueError("params has no differentiable leaf: pass what the step learns as params, not in a closure.")
    over_time, r = one_pass(step, None, r, flags, unroll=1)
    perturbed = everything(r.params, r.init, r.xs)
    if flags.given:  # what flags add to the params gets no gradient
        own, *added = perturbed.params
        perturbed = perturbed._replace(params=(own, *jax.tree.map(lambda _: False, added)))
    over_time = over_time.differentiated(perturbed)
    results, residuals = over_time.forward(r.params, r.init, r.xs, r.length)
    outputs, nondiff = partition(results)
    bars = None if loss is None else jax.grad(lambda outputs: loss(*combine(outputs, nondiff)))(outputs)
    return Unrolled(over_time, r.params, r.xs, r.length, residuals.stacked(), outputs, nondiff, bars)


def map_over_lags(u: Unrolled, lags: int, measure: Callable[[Any, Any], Any]) -> Any:
    """`measure(G⁽ˡ⁾, Σₖ G⁽ᵏ⁾ with k ≤ l)` for the lags l below `lags`, stacked."""
    last_bar, ys_bar = u.bars

    def body(state, ys_bar):
        bars, total = state
        bars, _, deltas = u.over_time.back_one_lag(u.params, u.residuals, u.xs, bars, ys_bar)
        params_bar, _ = u.over_time.adjoint.contract(u.params, u.residuals, u.xs, ys_bar, deltas)
        contribution = u.params_gradient(params_bar)
        total = add_up(total, contribution)
        return (bars, total), measure(contribution, total)

    zero_total = u.over_time.step.like_params(totals(differentiable(u.params)))
    state, first = body((at_last_step(last_bar, u.length), zero_total), ys_bar)
    # ȳₜ enters once, at lag 0; after that everything comes through the carry.
    no_bar = jax.tree.map(jnp.zeros_like, ys_bar)
    _, later = jax.lax.scan(lambda state, _: body(state, no_bar), state, None, length=lags - 1)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)


def gradients(u: Unrolled, K: Any) -> tuple[Any, Any]:
    """The backward pass, cut every K steps: gradients of params and xs. K may be traced."""
    adjoint = u.over_time.adjoint
    last_bar, ys_bar = u.bars

    def body(carry_bar, at_t):
        t, residuals, x, y_bar = at_t
        carry_bar, deltas = adjoint.backward(u.params, residuals, x, carry_bar, y_bar)
        return jax.tree.map(lambda leaf: jnp.where(t % K == 0, jnp.zeros_like(leaf), leaf), carry_bar), deltas

    _, deltas = jax.lax.scan(body, last_bar, (jnp.arange(u.length), u.residuals, u.xs, ys_bar), reverse=True)
    params_bar, xs_bar = adjoint.contract(u.params, u.residuals, u.xs, ys_bar, deltas)
    return u.params_gradient(params_bar), fit(xs_bar, u.xs, adjoint.perturbed.x, "xs")
