r"""Credit by time step: how much gradient reaches each state, and what each step adds to the gradient of the weights."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.analysis.norms import norm, norm_over_time
from jaxbptt.analysis.trajectory import Trajectory
from jaxbptt.arrays import scalar_loss
from jaxbptt.cells.cell import Cell
from jaxbptt.html_table import fields_table
from jaxbptt.programs.flagged import with_flagged_readout
from jaxbptt.programs.readout import readout
from jaxbptt.programs.trace import trace
from jaxbptt.scans.flags import NO_FLAGS, Flags, beside_input
from jaxbptt.scans.recurrence import Recurrence, prepare
from jaxbptt.trees import combine, differentiable, partition, pull


class GradientFlow(NamedTuple):
    """The gradient at every time step. Entry `[t]` belongs to the state hₜ after that step.

    Attributes:
        loss: L.
        adjoints: dₜ = ∂L/∂hₜ in full, like the carry with leaves `[time, *leaf]`.
        immediate: aₜ, the term of it through yₜ alone (at the last step also through the final carry).
        norms: ‖dₜ‖ over all of the state, `[time]`.
        immediate_norms: ‖aₜ‖, `[time]`.
        contribution_norms: like the params with leaves `[time]`: the norm of what step t adds to that leaf's gradient.
        param_gradients: ∂L/∂params.
        init_gradients: ∂L/∂h₀.
        input_gradients: ∂L/∂xₜ, like `xs`.
    """

    loss: Float[Array, ""]
    adjoints: Any
    immediate: Any
    norms: Float[Array, " time"]
    immediate_norms: Float[Array, " time"]
    contribution_norms: Any
    param_gradients: Any
    init_gradients: Any
    input_gradients: Any

    _repr_html_ = fields_table


def gradient_flow(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any,
    loss: Callable[..., Any],
    *,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
) -> GradientFlow:
    r"""Follow the gradient back through time, for any step and any loss.

    dₜ = aₜ + Jₜ₊₁ᵀ dₜ₊₁,  aₜ = ∂L/∂hₜ through yₜ alone,  d_T = a_T

    What step t adds to the weight gradient is (∂⁺hₜ/∂θ)ᵀ dₜ. Time O(T) steps, about four times that of one gradient;
    memory O(T n + p): the weight gradient of a step is formed, measured and dropped, never kept T times.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`. The output may be the state or computed from it; where
            it is computed inside one `lax.cond` or loop together with the new carry, a warning says that aₜ lacks it.
        params: θ, any pytree.
        init: h₀, any pytree of arrays; with batch axes, norms are taken over the batch too.
        xs: inputs, leaves `[time, *batch, features]`, or `None` with `length`.
        loss: `loss(carry, ys) -> scalar`, of the last carry and all outputs.
        length: T, needed where `xs` is `None`.
        is_first: booleans `[time, *batch]`, as for `scan`: where a new sequence begins, no credit passes to what is before.
        valid: booleans `[time, *batch]`, as for `scan`: a padded step passes dₜ on as it is, and contributes 0.
        reset_carry: what `is_first` resets to, as for `scan`.

    Returns:
        A `GradientFlow`; non-differentiable leaves are `None`.

    Raises:
        ValueError, TypeError: as for `scan`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.elman(3, 8)
        >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (100, 3))
        >>> flow = bptt.gradient_flow(cell, params, cell.initial_carry(), xs, lambda h, ys: jnp.sum(ys[-1]))
        >>> flow.norms.shape, bool(flow.norms[0] < flow.norms[-1])
        ((100,), True)

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, 2013, arXiv:1211.5063.
    """
    flags = Flags(is_first, valid, reset_carry)
    return flow_and_trajectory(prepare(step, params, init, xs, length, is_first, valid), loss, flags)[0]


def flow_and_trajectory(
    r: Recurrence, loss: Callable[..., Any], flags: Flags = NO_FLAGS
) -> tuple[GradientFlow, Trajectory]:
    """The gradient flow, and the states of its one forward pass."""
    loss = scalar_loss(loss)
    if not jax.tree.leaves(differentiable(r.init)):
        raise ValueError(
            "init has no differentiable leaf, so no gradient can reach the states: start from floating-point numbers."
        )
    traced = trace(r.step, r.params, r.init, r.xs)
    read = with_flagged_readout(traced.step, readout(traced))
    r = beside_input(r._replace(step=traced.step, params=traced.params), flags)
    own_params, *rest = r.params
    own_xs, *flags_over_time = r.xs
    # Two zeros are added to the state after each step, one for the output only and one for the next step only: the
    # gradients with respect to them are the two terms of ∂L/∂hₜ.
    zeros = jax.tree.map(lambda leaf: jnp.zeros((r.length, *leaf.shape), leaf.dtype), differentiable(r.init))

    def probed_step(params, carry, inputs):
        x, to_output, to_next = inputs
        new_carry, _ = r.step(params, carry, x)
        y = read(params, carry, x, _add(new_carry, to_output))
        return _add(new_carry, to_next), (carry, y)

    diff, nondiff = partition((own_params, r.init, own_xs))

    def unrolled_loss(diff, to_output, to_next):
        params, init, xs = combine(diff, nondiff)
        inputs = (xs, *flags_over_time), to_output, to_next
        carry, (carries, ys) = jax.lax.scan(
            lambda carry, inputs: probed_step((params, *rest), carry, inputs), init, inputs, length=r.length
        )
        return loss(carry, ys), (carry, carries, ys)

    (value, (carry, carries, ys)), (gradients, through_output, through_next) = jax.value_and_grad(
        unrolled_loss, argnums=(0, 1, 2), has_aux=True
    )(diff, zeros, zeros)
    params_bar, init_bar, xs_bar = gradients

    diff_ys, nondiff_ys = partition(ys)
    ys_bar = jax.grad(lambda ys: loss(carry, combine(ys, nondiff_ys)))(diff_ys)

    def contribution(at_t):
        carry, x, carry_bar, y_bar = at_t
        (params_bar,) = pull(lambda params: r.step((params, *rest), carry, x), (own_params,), (carry_bar, y_bar))
        return jax.tree.map(norm, traced.like_params(params_bar))

    immediate = jax.tree.map(
        lambda output_bar, next_bar: output_bar.at[-1:].add(next_bar[-1:]), through_output, through_next
    )
    adjoints = jax.tree.map(jnp.add, through_output, through_next)
    new_carries = jax.tree.map(lambda before, last: jnp.concatenate([before, last[None]])[1:], carries, carry)
    flow = GradientFlow(
        loss=value,
        adjoints=adjoints,
        immediate=immediate,
        norms=norm_over_time(adjoints),
        immediate_norms=norm_over_time(immediate),
        contribution_norms=jax.lax.map(contribution, (carries, r.xs, through_next, ys_bar)),
        param_gradients=traced.like_params(params_bar),
        init_gradients=init_bar,
        input_gradients=xs_bar,
    )
    return flow, Trajectory(r, carries, new_carries, ys)


def _add(carry: Any, probe: Any) -> Any:
    """`None` in the probe where the carry has a non-differentiable leaf."""
    return jax.tree.map(
        lambda leaf, p: leaf if p is None else leaf + p, carry, probe, is_leaf=lambda leaf: leaf is None
    )
