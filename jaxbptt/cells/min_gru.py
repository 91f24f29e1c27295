r"""The minimal gated unit whose gate reads the input alone, so that the state enters linearly; with its backward pass."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.arrays import check_key, is_number
from jaxbptt.cells import dense, initializers
from jaxbptt.cells.cell import Adjoint, Cell


class MinGRUParams(NamedTuple):
    """Weights of a minimal GRU, z and the candidate stacked on the first axis: `W_xh [2·hidden, input]`, `b [2·hidden]`."""

    W_xh: Float[Array, "gates_hidden input"]
    b: Float[Array, " gates_hidden"]


def min_gru(
    input_size: int,
    hidden_size: int,
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    input_init: dense.Initializer = dense.fan_in_normal,
    update_bias: float = 0.0,
    chrono_length: float | None = None,
) -> Cell:
    r"""A minimal GRU: each unit moves to its candidate as far as its gate lets it, and neither reads the state.

    zₜ = σ(W_z xₜ + b_z)
    hₜ = (1 − zₜ) ⊙ hₜ₋₁ + zₜ ⊙ (W_h xₜ + b_h),  yₜ = hₜ

    The recurrence is affine in hₜ₋₁ and each unit has its own, so layers mix units only through the inputs of the next one.
    Time O(2 n · input) a step; the backward pass keeps hₜ₋₁, the gate and the candidate. Here z is how much of the state is
    replaced; the z of `gru` is how much is kept.

    Args:
        input_size: features of x.
        hidden_size: n, the size of the state.
        dtype: of the parameters and the carry.
        compute_dtype: what the factors of matrix products are rounded to, in both passes, such as `jnp.bfloat16`; sums,
            carry and the gradients of the cell's own adjoint stay in `dtype`. Where JAX differentiates a product, as in
            `scan`, it rounds that product's gradient too. `None` rounds nothing.
        input_init: jax initializer of each block of `W_xh`; normal with variance 1/input_size by default.
        update_bias: b_z at the start. With 0, as in the paper, half of the state is replaced at each step; a negative one
            keeps the state, and its gradient, for longer.
        chrono_length: time steps of the longest dependency to expect: in place of `update_bias`, b_z is spread so that the
            units keep their state for up to that long (`initializers.chrono`).

    Returns:
        A `Cell` with `MinGRUParams`; its carry is the array h `[*batch, hidden]`.

    Raises:
        ValueError: a size below 1, a dtype that is not floating-point, an `update_bias` that is not finite, a
            `chrono_length` of 2 or less; at a step, params, a carry or an x that do not fit the sizes or each other.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell = bptt.min_gru(input_size=3, hidden_size=5)
        >>> h, y = cell.step(cell.init(jax.random.key(0)), cell.initial_carry((2,)), jax.numpy.ones((2, 3)))
        >>> h.shape
        (2, 5)

    References:
        Feng et al., Were RNNs all we needed?, 2024, arXiv:2410.01201. `chrono_length`: Tallec and Ollivier, Can recurrent
        neural networks warp time?, 2018, arXiv:1804.11188.
    """
    dense.check_sizes(input_size=input_size, hidden_size=hidden_size)
    dense.check_options(dtype, input_init=input_init)
    if not is_number(update_bias, -math.inf):
        raise ValueError(f"update_bias is {update_bias!r}, but it is a bias to start with: pass a finite number.")
    shapes = {"W_xh": (2 * hidden_size, input_size), "b": (2 * hidden_size,)}
    products = dense.products(compute_dtype)
    chrono = None if chrono_length is None else initializers.chrono(chrono_length)

    def init(key: Array) -> MinGRUParams:
        check_key(key)
        key_xh, key_z = jax.random.split(key)
        b_z = jnp.full(hidden_size, update_bias, dtype)
        if chrono is not None:
            b_z = -chrono(key_z, (hidden_size,), dtype)
        W_xh = dense.gate_blocks(input_init, key_xh, 2, (hidden_size, input_size), dtype)
        return MinGRUParams(W_xh, jnp.concatenate([b_z, jnp.zeros(hidden_size, dtype)]))

    def initial_carry(batch_shape: tuple[int, ...] = ()) -> Array:
        return dense.zeros(batch_shape, hidden_size, dtype)

    def gate_and_candidate(params, h, x):
        x = dense.check_step("min_gru", params, shapes, (input_size, hidden_size), x, h=h)
        a_z, n = jnp.split(dense.add_bias(products.linear(params.W_xh, x), params.b), 2, axis=-1)
        return jax.nn.sigmoid(a_z), n

    def step(params, h, x):
        z, n = gate_and_candidate(params, h, x)
        h = (1 - z) * h + z * n
        return h, h

    def forward(params, h_prev, x):
        z, n = gate_and_candidate(params, h_prev, x)
        h = (1 - z) * h_prev + z * n
        return (h, h), (h_prev, z, n)

    def backward(params, residuals, x, h_bar, y_bar):
        h_prev, z, n = residuals
        h_bar = h_bar + y_bar
        kept = h_bar * (1 - z)
        return kept, (kept * z * (n - h_prev), h_bar * z)

    def contract(params, residuals, xs, ys_bar, deltas):
        params_bar = MinGRUParams(
            W_xh=jnp.concatenate([products.weight_gradient(delta, xs) for delta in deltas]),
            b=jnp.concatenate([dense.sum_rows(delta) for delta in deltas]),
        )
        from_z, from_n = map(products.back, deltas, jnp.split(params.W_xh, 2))
        return params_bar, from_z + from_n

    step = dense.with_sizes(step, input_size, hidden_size)
    return Cell(init, initial_carry, step, Adjoint(forward, backward, contract))
