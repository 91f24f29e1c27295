r"""Terms to add to a loss so that gradients neither vanish nor explode: pure functions that can be jitted."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.analysis.flow import flow_and_trajectory
from jaxbptt.analysis.lyapunov import lyapunov_exponents
from jaxbptt.analysis.norms import norm_over_time
from jaxbptt.cells.cell import Cell
from jaxbptt.programs.trace import map_over_time, trace
from jaxbptt.scans.recurrence import prepare
from jaxbptt.trees import pull


def pascanu(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any,
    loss: Callable[..., Any],
    *,
    length: int | None = None,
) -> Float[Array, ""]:
    r"""Pascanu's Ω: penalises every step that changes the size of the gradient going back through it.

    Ω = Σₜ (‖dₜ₊₁ᵀ Jₜ₊₁‖ / ‖dₜ₊₁‖ − 1)²,  dₜ = ∂L/∂hₜ

    Unlike a penalty on the weights, it looks only at the direction of the gradient. Steps that no gradient reaches count
    as 0. Time of about three gradients, memory O(T n). Its own gradient is taken in full, through the states and through d;
    the original leaves those out.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`.
        params: θ, any pytree.
        init: c₀, any pytree of arrays; with batch axes, norms are taken over the batch too.
        xs: inputs, leaves `[time, *batch, features]`, or `None` with `length`.
        loss: `loss(carry, ys) -> scalar`, of the last carry and all outputs.
        length: T, needed where `xs` is `None`.

    Returns:
        Ω, to be added to the loss with a weight of its own, in its dtype.

    Raises:
        ValueError, TypeError: as for `scan`.

    Example:
        >>> import jaxbptt as bptt
        >>> power = lambda w, h, x: (w * h, None)
        >>> print(bptt.regularizers.pascanu(power, 0.5, 1.0, None, lambda h, ys: h, length=4))  # 4 times (0.5 − 1)²
        1.0

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, 2013, arXiv:1211.5063, eq. 9.
    """
    r = prepare(step, params, init, xs, length)
    flow, trajectory = flow_and_trajectory(r, loss)
    r = trajectory.recurrence
    traced = trace(r.step, r.params, r.init, r.xs)

    def to_state(params, carry, x):
        return traced.step(params, carry, x)[0]

    over_time = map_over_time(to_state, one_at_a_time=traced.one_at_a_time)
    (passed_on,) = pull(lambda carries: over_time(traced.params, carries, r.xs), (trajectory.carries,), flow.adjoints)
    before, after = norm_over_time(passed_on), norm_over_time(flow.adjoints)
    # The inner where keeps the division, and with it the gradient, finite where no gradient arrives.
    ratio = jnp.where(after > 0, before / jnp.where(after > 0, after, 1), 1)
    return jnp.sum((ratio - 1) ** 2).astype(flow.loss.dtype)


def gradient_flossing(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    num_exponents: int,
    length: int | None = None,
    burn_in: int = 0,
    qr_every: int = 1,
) -> Float[Array, ""]:
    r"""Gradient flossing: keeps the k largest Lyapunov exponents near 0; along k directions gradients then last.

    1/k Σ_{i≤k} λᵢ²

    It needs no loss and no targets: minimise it alone for a few steps, before training or now and then during it. Its
    gradient goes through the states and the QR factorisations. It costs as much as `lyapunov_exponents`, and about three
    times that with its gradient.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`, differentiable in forward mode.
        params: θ, any pytree.
        init: c₀ without batch axis; for a batch, use `jax.vmap` and take the mean.
        xs: inputs, leaves `[time, features]`, or `None` with `length`.
        num_exponents: k, from 1 to n.
        length: T, needed where `xs` is `None`.
        burn_in: time steps at the start that are left out of the average.
        qr_every: time steps between two QR factorisations.

    Returns:
        The mean square, in (nats per step)².

    Raises:
        ValueError: as for `lyapunov_exponents`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> linear = lambda w, h, x: (w * h, None)
        >>> floss = lambda w: bptt.regularizers.gradient_flossing(linear, w, jnp.ones(1), num_exponents=1, length=10)
        >>> print(f"{floss(0.5):.4f} {jax.grad(floss)(0.5):.4f}")  # (log w)², and its derivative 2 log(w)/w
        0.4805 -2.7726

    References:
        Engelken, Gradient flossing: improving gradient descent through dynamic control of Jacobians, NeurIPS 2023,
        arXiv:2312.17306.
    """
    spectrum = lyapunov_exponents(
        step, params, init, xs, length=length, num_exponents=num_exponents, burn_in=burn_in, qr_every=qr_every
    )
    return jnp.mean(spectrum.exponents**2)
