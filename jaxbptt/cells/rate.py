r"""The leaky rate network of neuroscience."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from jaxbptt.arrays import as_numpy, check_callable, check_key, is_number
from jaxbptt.cells import dense
from jaxbptt.cells.cell import Cell


class RateParams(NamedTuple):
    """Weights of a rate network: `W_xh [hidden, input]`, `W_hh [hidden, hidden]`, `b [hidden]`."""

    W_xh: Float[Array, "hidden input"]
    W_hh: Float[Array, "hidden hidden"]
    b: Float[Array, " hidden"]


def rate(
    input_size: int,
    hidden_size: int,
    *,
    tau: Any,
    dt: float,
    noise: float = 0.0,
    nonlinearity: Callable[[Array], Array] = jnp.tanh,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    recurrent_init: dense.Initializer = dense.orthogonal,
    input_init: dense.Initializer = dense.fan_in_normal,
) -> Cell:
    r"""A leaky rate network: currents h that decay with the time constant τ, and rates φ(h) that the network reads.

    τ dh/dt = −h + W_hh φ(h) + W_xh x + b + √(2τ) σ ξ(t),  in Euler steps with α = dt/τ:

    hₜ = (1 − α) hₜ₋₁ + α (W_hh φ(hₜ₋₁) + W_xh xₜ + b) + √(2α) σ ξₜ,  yₜ = φ(hₜ),  ξₜ ~ N(0, I)

    Without weights and for small α the standard deviation of h is σ, whatever τ and dt. The state Jacobian is
    (1 − α) I + α W_hh diag(φ'(hₜ₋₁)). Time O(n²) a step; the backward pass keeps two arrays like h. (In the other form in
    use, hₜ = (1 − α) hₜ₋₁ + α φ(W_hh hₜ₋₁ + …), h is a rate itself.)

    With noise, an input is a pair of x and a random key: `xs = (xs, jax.random.split(key, len(xs)))`. The key belongs to the
    time step and not to the carry, so the carry is h alone, which `is_first` may reset and whose Jacobians can be taken, the
    noise is the same under every strategy, and `tbptt` hands the loss a new key for each chunk. To evaluate without noise,
    take a cell without noise and the same params. In a `stack` only the lowest layer can have noise, since the others read
    what the layer below gives.

    Args:
        input_size: features of x.
        hidden_size: n, the size of the state.
        tau: time constant, in the unit of `dt` and at least `dt`: a number, or an array `[hidden]` with one for each unit.
            To learn it, make the cell inside the loss: there `tau` is traced and gets its gradient.
        dt: time that one step takes.
        noise: σ.
        nonlinearity: φ, such as `jnp.tanh`, `jax.nn.relu` or `jax.nn.softplus`.
        dtype: of the parameters and the carry.
        compute_dtype: what the factors of matrix products are rounded to, such as `jnp.bfloat16`; sums and carry stay in
            `dtype`, and each product's gradient is rounded too. `None` rounds nothing.
        recurrent_init: jax initializer of `W_hh`; orthogonal by default.
        input_init: jax initializer of `W_xh`; normal with variance 1/input_size by default.

    Returns:
        A `Cell` with `RateParams`; its carry is the array h `[*batch, hidden]`.

    Raises:
        ValueError: a size below 1, a dtype that is not floating-point, a `dt` of 0 or less, a `tau` below `dt` or of another
            shape, negative `noise`; at a step, params, a carry or an x that do not fit the sizes or each other.
        TypeError: at a step with noise, an input that is no pair of x and a key.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell = bptt.rate(input_size=3, hidden_size=5, tau=100.0, dt=20.0, noise=0.15, nonlinearity=jax.nn.relu)
        >>> params, keys = cell.init(jax.random.key(0)), jax.random.split(jax.random.key(1), 50)
        >>> h, rates = bptt.adjoint_scan(cell, params, cell.initial_carry((2,)), (jax.numpy.ones((50, 2, 3)), keys))
        >>> h.shape, rates.shape, bool((rates >= 0).all())
        ((2, 5), (50, 2, 5), True)

    References:
        Song, Yang and Wang, Training excitatory-inhibitory recurrent neural networks for cognitive tasks, 2016,
        doi:10.1371/journal.pcbi.1004792, whose steps and noise these are, and those of PsychRNN: Ehrlich et al., 2021,
        doi:10.1523/ENEURO.0427-20.2020. Sompolinsky, Crisanti and Sommers, Chaos in random neural networks, 1988,
        doi:10.1103/PhysRevLett.61.259.
    """
    dense.check_sizes(input_size=input_size, hidden_size=hidden_size)
    dense.check_options(dtype, recurrent_init=recurrent_init, input_init=input_init)
    check_callable("nonlinearity", nonlinearity, "a function of h, such as jnp.tanh or jax.nn.relu")
    if not is_number(noise, -math.inf) or noise < 0:
        raise ValueError(f"noise is {noise!r}, but it is a standard deviation: pass a number of at least 0.")
    noise = float(noise)
    alpha = _alpha(tau, dt, hidden_size)
    shapes = {"W_xh": (hidden_size, input_size), "W_hh": (hidden_size, hidden_size), "b": (hidden_size,)}
    products = dense.products(compute_dtype)

    def init(key: Array) -> RateParams:
        check_key(key)
        key_xh, key_hh = jax.random.split(key)
        return RateParams(
            W_xh=dense.gate_blocks(input_init, key_xh, 1, (hidden_size, input_size), dtype),
            W_hh=dense.gate_blocks(recurrent_init, key_hh, 1, (hidden_size, hidden_size), dtype),
            b=jnp.zeros(hidden_size, dtype),
        )

    def initial_carry(batch_shape: tuple[int, ...] = ()) -> Array:
        return dense.zeros(batch_shape, hidden_size, dtype)

    def checked(params, h, x):
        key = None
        if noise:
            if not isinstance(x, tuple) or len(x) != 2:
                raise TypeError(
                    f"rate: noise is {noise}, but an input is a {type(x).__name__} and no pair of x and a random key: pass "
                    "xs = (xs, jax.random.split(key, len(xs))), or take a cell without noise."
                )
            x, key = x
            check_key(key)
        return dense.check_step("rate", params, shapes, (input_size, hidden_size), x, h=h), key

    def rates(h):
        y = nonlinearity(h)
        if jnp.shape(y) != h.shape:
            raise ValueError(
                f"rate: nonlinearity returned shape {jnp.shape(y)} for h of shape {h.shape}, but it acts on each unit."
            )
        return y

    def step(params, h, x, drop=dense.nothing_dropped):
        x, key = checked(params, h, x)
        current = products.linear(params.W_hh, drop(rates(h))) + products.linear(params.W_xh, x)
        a = _along_units(alpha, h)
        h = (1 - a) * h + a * dense.add_bias(current, params.b)
        if key is not None:
            h = h + _along_units((2 * alpha) ** 0.5 * noise, h) * jax.random.normal(key, h.shape, h.dtype)
        return h, rates(h)

    # No adjoint by hand, which would have to keep hₜ₋₁ beside hₜ: what is derived was as fast or faster, and took 0.85 to
    # 0.88 of the temporary bytes.
    return Cell(init, initial_carry, dense.with_sizes(step, input_size, hidden_size))


def _alpha(tau: Any, dt: Any, hidden_size: int) -> Any:
    """dt/τ: a number, or one for each unit."""
    if not is_number(dt, 0):
        raise ValueError(f"dt is {dt!r}, but it is the time that one step takes: pass a number above 0.")
    if not isinstance(tau, Tracer):
        tau = as_numpy(tau)
        real = jnp.issubdtype(tau.dtype, jnp.floating) or jnp.issubdtype(tau.dtype, jnp.integer)
        if not real or not np.all((tau >= dt) & np.isfinite(tau)):
            raise ValueError(
                f"tau is {tau}, but it is a time constant, in the unit of dt={dt}: pass a number of at least dt, "
                "or one for each unit."
            )
    if tau.shape not in ((), (hidden_size,)):
        raise ValueError(
            f"tau has shape {tau.shape}, but it is one time constant for all units, or one for each: pass a number, or an "
            f"array of shape ({hidden_size},)."
        )
    return dt / tau if tau.shape or isinstance(tau, Tracer) else float(dt / tau)


def _along_units(value: Any, h: Any) -> Any:
    """A number as it is, or one for each unit in the dtype and with the axes of h."""
    if isinstance(value, float):
        return value
    return jnp.asarray(value).astype(h.dtype).reshape((1,) * (h.ndim - 1) + (-1,))
