r"""The gated recurrent unit, in the form cuDNN and torch compute, and its hand-written backward pass."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.arrays import check_key, is_number
from jaxbptt.cells import dense, initializers
from jaxbptt.cells.cell import Adjoint, Cell


class GRUParams(NamedTuple):
    """Weights of a GRU, gates r, z, n stacked on the first axis: `W_xh [3·hidden, input]`, `W_hh [3·hidden, hidden]`,
    `b [3·hidden]`, and `b_hn [hidden]`, the bias inside the reset product."""  # noqa: D205, D209

    W_xh: Float[Array, "gates_hidden input"]
    W_hh: Float[Array, "gates_hidden hidden"]
    b: Float[Array, " gates_hidden"]
    b_hn: Float[Array, " hidden"]


def gru(
    input_size: int,
    hidden_size: int,
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    recurrent_init: dense.Initializer = dense.orthogonal,
    input_init: dense.Initializer = dense.fan_in_normal,
    update_bias: float = 1.0,
    chrono_length: float | None = None,
) -> Cell:
    r"""A gated recurrent unit: the state moves only as far as the update gate lets it.

    rₜ = σ(W_hr hₜ₋₁ + W_xr xₜ + b_r)
    zₜ = σ(W_hz hₜ₋₁ + W_xz xₜ + b_z)
    nₜ = tanh(W_xn xₜ + b_n + rₜ ⊙ (W_hn hₜ₋₁ + b_hn))
    hₜ = (1 − zₜ) ⊙ nₜ + zₜ ⊙ hₜ₋₁,  yₜ = hₜ

    Time O(3 n²) a step; the backward pass keeps hₜ₋₁, the three gates and the reset product's argument.

    Args:
        input_size: features of x.
        hidden_size: n, the size of the state.
        dtype: of the parameters and the carry.
        compute_dtype: what the factors of matrix products are rounded to, in both passes, such as `jnp.bfloat16`; sums,
            carry and the gradients of the cell's own adjoint stay in `dtype`. Where JAX differentiates a product, as in
            `scan`, it rounds that product's gradient too. `None` rounds nothing.
        recurrent_init: jax initializer of each gate's `[hidden, hidden]` block of `W_hh`; orthogonal by default.
        input_init: jax initializer of each gate's block of `W_xh`; normal with variance 1/input_size by default.
        update_bias: b_z at the start; a positive one keeps the state, and its gradient, for longer. With 0, as in most other
            libraries, half of the state is replaced at each step; 1 keeps about 73 %, as the default of `lstm` does.
        chrono_length: time steps of the longest dependency to expect: in place of `update_bias`, b_z is spread so that the
            units keep their state for up to that long (`initializers.chrono`).

    Returns:
        A `Cell` with `GRUParams`; its carry is the array h `[*batch, hidden]`.

    Raises:
        ValueError: a size below 1, a dtype that is not floating-point, an `update_bias` that is not finite, a
            `chrono_length` of 2 or less; at a step, params, a carry or an x that do not fit the sizes or each other.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell = bptt.gru(input_size=3, hidden_size=5)
        >>> h, y = cell.step(cell.init(jax.random.key(0)), cell.initial_carry((2,)), jax.numpy.ones((2, 3)))
        >>> h.shape
        (2, 5)

    References:
        Cho et al., Learning phrase representations using RNN encoder-decoder, 2014, arXiv:1406.1078; the order of the
        reset product is that of version 1 of the paper, and of cuDNN. `chrono_length`: Tallec and Ollivier, Can recurrent
        neural networks warp time?, 2018, arXiv:1804.11188.
    """
    dense.check_sizes(input_size=input_size, hidden_size=hidden_size)
    dense.check_options(dtype, recurrent_init=recurrent_init, input_init=input_init)
    if not is_number(update_bias, -math.inf):
        raise ValueError(f"update_bias is {update_bias!r}, but it is a bias to start with: pass a finite number.")
    gates = 3 * hidden_size
    shapes = {"W_xh": (gates, input_size), "W_hh": (gates, hidden_size), "b": (gates,), "b_hn": (hidden_size,)}
    products = dense.products(compute_dtype)
    chrono = None if chrono_length is None else initializers.chrono(chrono_length)

    def init(key: Array) -> GRUParams:
        check_key(key)
        key_xh, key_hh = jax.random.split(key)
        b_z = jnp.full(hidden_size, update_bias, dtype)
        if chrono is not None:
            b_z = chrono(jax.random.fold_in(key, 2), (hidden_size,), dtype)
        zeros = jnp.zeros(hidden_size, dtype)
        return GRUParams(
            W_xh=dense.gate_blocks(input_init, key_xh, 3, (hidden_size, input_size), dtype),
            W_hh=dense.gate_blocks(recurrent_init, key_hh, 3, (hidden_size, hidden_size), dtype),
            b=jnp.concatenate([zeros, b_z, zeros]),
            b_hn=jnp.zeros(hidden_size, dtype),
        )

    def initial_carry(batch_shape: tuple[int, ...] = ()) -> Array:
        return dense.zeros(batch_shape, hidden_size, dtype)

    def activations(params, h, x, drop=dense.nothing_dropped):
        x = dense.check_step("gru", params, shapes, (input_size, hidden_size), x, h=h)
        x_r, x_z, x_n = jnp.split(dense.add_bias(products.linear(params.W_xh, x), params.b), 3, axis=-1)
        h_r, h_z, h_n = jnp.split(products.linear(params.W_hh, drop(h)), 3, axis=-1)
        r = jax.nn.sigmoid(h_r + x_r)
        z = jax.nn.sigmoid(h_z + x_z)
        m = dense.add_bias(h_n, params.b_hn)
        return r, z, jnp.tanh(x_n + r * m), m

    def step(params, h, x, drop=dense.nothing_dropped):
        _, z, n, _ = activations(params, h, x, drop)
        h = (1 - z) * n + z * h
        return h, h

    def forward(params, h_prev, x):
        r, z, n, m = activations(params, h_prev, x)
        h = (1 - z) * n + z * h_prev
        return (h, h), (h_prev, r, z, n, m)

    def backward(params, residuals, x, h_bar, y_bar):
        h_prev, r, z, n, m = residuals
        h_bar = h_bar + y_bar
        delta_n = h_bar * (1 - z) * ((1 - n) * (1 + n))
        delta_r = delta_n * m * r * (1 - r)
        delta_z = h_bar * (h_prev - n) * z * (1 - z)
        # W_hh reaches the candidate only through the reset gate.
        recurrent_deltas = jnp.concatenate([delta_r, delta_z, delta_n * r], axis=-1)
        return h_bar * z + products.back(recurrent_deltas, params.W_hh), (delta_r, delta_z, delta_n)

    def contract(params, residuals, xs, ys_bar, deltas):
        hs_prev, r = residuals[:2]
        recurrent_deltas = (*deltas[:2], deltas[2] * r)
        # One product per gate: to concatenate the deltas first would copy them.
        params_bar = GRUParams(
            W_xh=jnp.concatenate([products.weight_gradient(delta, xs) for delta in deltas]),
            W_hh=jnp.concatenate([products.weight_gradient(delta, hs_prev) for delta in recurrent_deltas]),
            b=jnp.concatenate([dense.sum_rows(delta) for delta in deltas]),
            b_hn=dense.sum_rows(recurrent_deltas[2]),
        )
        from_r, from_z, from_n = map(products.back, deltas, jnp.split(params.W_xh, 3))
        return params_bar, from_r + from_z + from_n

    step = dense.with_sizes(step, input_size, hidden_size)
    return Cell(init, initial_carry, step, Adjoint(forward, backward, contract))
