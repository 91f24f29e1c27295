r"""The minimal LSTM, whose two gates read the input alone and add up to 1; with its hand-written backward pass."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.arrays import check_key, is_number
from jaxbptt.cells import dense, initializers
from jaxbptt.cells.cell import Adjoint, Cell


class MinLSTMParams(NamedTuple):
    """Weights of a minimal LSTM, f, i and the candidate stacked on the first axis: `W_xh [3·hidden, input]`, `b [3·hidden]`."""

    W_xh: Float[Array, "gates_hidden input"]
    b: Float[Array, " gates_hidden"]


def min_lstm(
    input_size: int,
    hidden_size: int,
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    input_init: dense.Initializer = dense.fan_in_normal,
    forget_bias: float = 0.0,
    chrono_length: float | None = None,
) -> Cell:
    r"""A minimal LSTM: what is kept and what is written are normalised to add up to 1, and neither reads the state.

    fₜ = σ(W_f xₜ + b_f),  iₜ = σ(W_i xₜ + b_i)
    hₜ = (fₜ ⊙ hₜ₋₁ + iₜ ⊙ (W_h xₜ + b_h)) / (fₜ + iₜ),  yₜ = hₜ

    The gates are computed as f/(f + i) = σ(log f − log i), which is right where both are tiny. The recurrence is affine in
    hₜ₋₁ and each unit has its own, so layers mix units only through the inputs of the next one. Time O(3 n · input) a step;
    the backward pass keeps hₜ₋₁, the candidate, both gates, and what is kept.

    Args:
        input_size: features of x.
        hidden_size: n, the size of the state.
        dtype: of the parameters and the carry.
        compute_dtype: what the factors of matrix products are rounded to, in both passes, such as `jnp.bfloat16`; sums,
            carry and the gradients of the cell's own adjoint stay in `dtype`. Where JAX differentiates a product, as in
            `scan`, it rounds that product's gradient too. `None` rounds nothing.
        input_init: jax initializer of each block of `W_xh`; normal with variance 1/input_size by default.
        forget_bias: b_f at the start. With 0, as in the paper, half of the state is replaced at each step; a positive one
            keeps the state, and its gradient, for longer.
        chrono_length: time steps of the longest dependency to expect: in place of `forget_bias`, b_f is spread so that the
            units keep their state for about that long, and b_i = −b_f (`initializers.chrono`).

    Returns:
        A `Cell` with `MinLSTMParams`; its carry is the array h `[*batch, hidden]`.

    Raises:
        ValueError: a size below 1, a dtype that is not floating-point, a `forget_bias` that is not finite, a
            `chrono_length` of 2 or less; at a step, params, a carry or an x that do not fit the sizes or each other.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell = bptt.min_lstm(input_size=3, hidden_size=5)
        >>> h, y = cell.step(cell.init(jax.random.key(0)), cell.initial_carry((2,)), jax.numpy.ones((2, 3)))
        >>> h.shape
        (2, 5)

    References:
        Feng et al., Were RNNs all we needed?, 2024, arXiv:2410.01201. `chrono_length`: Tallec and Ollivier, Can recurrent
        neural networks warp time?, 2018, arXiv:1804.11188.
    """
    dense.check_sizes(input_size=input_size, hidden_size=hidden_size)
    dense.check_options(dtype, input_init=input_init)
    if not is_number(forget_bias, -math.inf):
        raise ValueError(f"forget_bias is {forget_bias!r}, but it is a bias to start with: pass a finite number.")
    shapes = {"W_xh": (3 * hidden_size, input_size), "b": (3 * hidden_size,)}
    products = dense.products(compute_dtype)
    chrono = None if chrono_length is None else initializers.chrono(chrono_length)

    def init(key: Array) -> MinLSTMParams:
        check_key(key)
        key_xh, key_f = jax.random.split(key)
        b_i, b_f = jnp.zeros(hidden_size, dtype), jnp.full(hidden_size, forget_bias, dtype)
        if chrono is not None:
            b_f = chrono(key_f, (hidden_size,), dtype)
            b_i = -b_f
        W_xh = dense.gate_blocks(input_init, key_xh, 3, (hidden_size, input_size), dtype)
        return MinLSTMParams(W_xh, jnp.concatenate([b_f, b_i, jnp.zeros(hidden_size, dtype)]))

    def initial_carry(batch_shape: tuple[int, ...] = ()) -> Array:
        return dense.zeros(batch_shape, hidden_size, dtype)

    def arguments(params, h, x):
        x = dense.check_step("min_lstm", params, shapes, (input_size, hidden_size), x, h=h)
        return jnp.split(dense.add_bias(products.linear(params.W_xh, x), params.b), 3, axis=-1)

    def kept(a_f, a_i):
        """F / (f + i), as a sigmoid of log f − log i: where both gates are tiny, f + i may be 0."""
        return jax.nn.sigmoid(jax.nn.log_sigmoid(a_f) - jax.nn.log_sigmoid(a_i))

    def step(params, h, x):
        a_f, a_i, n = arguments(params, h, x)
        # i / (f + i) is not 1 − f / (f + i), which loses a small one.
        h = kept(a_f, a_i) * h + kept(a_i, a_f) * n
        return h, h

    def forward(params, h_prev, x):
        a_f, a_i, n = arguments(params, h_prev, x)
        keep, write = kept(a_f, a_i), kept(a_i, a_f)
        h = keep * h_prev + write * n
        return (h, h), (h_prev, n, keep, write, a_f, a_i)

    def backward(params, residuals, x, h_bar, y_bar):
        h_prev, n, keep, write, a_f, a_i = residuals
        h_bar = h_bar + y_bar
        kept_bar, written_bar = h_bar * keep, h_bar * write
        delta = kept_bar * write * (h_prev - n)
        return kept_bar, (delta * jax.nn.sigmoid(-a_f), -delta * jax.nn.sigmoid(-a_i), written_bar)

    def contract(params, residuals, xs, ys_bar, deltas):
        params_bar = MinLSTMParams(
            W_xh=jnp.concatenate([products.weight_gradient(delta, xs) for delta in deltas]),
            b=jnp.concatenate([dense.sum_rows(delta) for delta in deltas]),
        )
        from_f, from_i, from_n = map(products.back, deltas, jnp.split(params.W_xh, 3))
        return params_bar, from_f + from_i + from_n

    step = dense.with_sizes(step, input_size, hidden_size)
    return Cell(init, initial_carry, step, Adjoint(forward, backward, contract))
