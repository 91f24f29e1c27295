r"""The real-gated linear recurrent unit of Griffin: a decay that the input gates; with its hand-written backward pass."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.arrays import at_least_float32, check_key, is_number
from jaxbptt.cells import dense
from jaxbptt.cells.cell import Adjoint, Cell


class RGLRUParams(NamedTuple):
    """Weights of an RG-LRU, r, i and the input's own weight stacked on the first axis: `W_xh [3·hidden, input]`; `b
    [2·hidden]` of r and i, and `decay [hidden]`, the Λ of the paper."""  # noqa: D205, D209

    W_xh: Float[Array, "gates_hidden input"]
    b: Float[Array, " gates_hidden"]
    decay: Float[Array, " hidden"]


def rg_lru(
    input_size: int,
    hidden_size: int,
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    input_init: dense.Initializer = dense.fan_in_normal,
    c: float = 8.0,
    a_min: float = 0.9,
    a_max: float = 0.999,
) -> Cell:
    r"""A real-gated linear recurrent unit: each unit decays at its own rate, and a gate that reads the input slows that down.

    rₜ = σ(W_r xₜ + b_r),  iₜ = σ(W_i xₜ + b_i)
    aₜ = exp(−c softplus(Λ) ⊙ rₜ)
    hₜ = aₜ ⊙ hₜ₋₁ + √(1 − aₜ²) ⊙ iₜ ⊙ (W_x xₜ),  yₜ = hₜ

    The root keeps the size of h, whatever a is; it is computed by expm1, since 1 − a² of an a near 1 has few digits. The
    recurrence is affine in hₜ₋₁ and each unit has its own, so layers mix units only through the inputs of the next one. In the
    paper x has the size of h and is not multiplied by W_x, the linear layer before it is: an identity in that block is the
    paper's cell. Time O(3 n · input) a step; the backward pass keeps hₜ₋₁, the two gates and W_x xₜ.

    Args:
        input_size: features of x.
        hidden_size: n, the size of the state.
        dtype: of the parameters and the carry.
        compute_dtype: what the factors of matrix products are rounded to, in both passes, such as `jnp.bfloat16`; sums,
            carry and the gradients of the cell's own adjoint stay in `dtype`. Where JAX differentiates a product, as in
            `scan`, it rounds that product's gradient too. `None` rounds nothing.
        input_init: jax initializer of each block of `W_xh`; normal with variance 1/input_size by default.
        c: how much the gate r scales the decay.
        a_min: of the decay a at an open gate, rₜ = 1, which is drawn uniformly between `a_min` and `a_max`.
        a_max: as `a_min`; a unit of decay a forgets over 1/(1 − a) time steps.

    Returns:
        A `Cell` with `RGLRUParams`; its carry is the array h `[*batch, hidden]`.

    Raises:
        ValueError: a size below 1, a dtype that is not floating-point, a `c` that is not above 0, an `a_min` or `a_max` that is
            not between 0 and 1, or `a_min` above `a_max`; at a step, params, a carry or an x that do not fit the sizes or each
            other.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell = bptt.rg_lru(input_size=3, hidden_size=5)
        >>> h, y = cell.step(cell.init(jax.random.key(0)), cell.initial_carry((2,)), jax.numpy.ones((2, 3)))
        >>> h.shape
        (2, 5)

    References:
        De et al., Griffin: mixing gated linear recurrences with local attention for efficient language models, 2024,
        arXiv:2402.19427, section 2.4.
    """
    dense.check_sizes(input_size=input_size, hidden_size=hidden_size)
    dense.check_options(dtype, input_init=input_init)
    if not is_number(c, 0):
        raise ValueError(f"c is {c!r}, but it scales the decay: pass a number above 0.")
    if not (is_number(a_min, 0) and is_number(a_max, 0) and a_min <= a_max < 1):
        raise ValueError(
            f"a_min is {a_min!r} and a_max {a_max!r}, but a decay is drawn between them: pass 0 < a_min ≤ a_max < 1."
        )
    shapes = {"W_xh": (3 * hidden_size, input_size), "b": (2 * hidden_size,), "decay": (hidden_size,)}
    products = dense.products(compute_dtype)

    def init(key: Array) -> RGLRUParams:
        check_key(key)
        key_xh, key_a = jax.random.split(key)
        drawn = at_least_float32(dtype)
        a = jax.random.uniform(key_a, (hidden_size,), drawn, a_min, a_max)
        # The inverse of a = exp(−c softplus(Λ)).
        decay = jnp.log(jnp.expm1(-jnp.log(a) / c)).astype(dtype)
        W_xh = dense.gate_blocks(input_init, key_xh, 3, (hidden_size, input_size), dtype)
        return RGLRUParams(W_xh, jnp.zeros(2 * hidden_size, dtype), decay)

    def initial_carry(batch_shape: tuple[int, ...] = ()) -> Array:
        return dense.zeros(batch_shape, hidden_size, dtype)

    def gates(params, h, x):
        x = dense.check_step("rg_lru", params, shapes, (input_size, hidden_size), x, h=h)
        a_r, a_i, u = jnp.split(products.linear(params.W_xh, x), 3, axis=-1)
        b_r, b_i = jnp.split(params.b, 2)
        return jax.nn.sigmoid(dense.add_bias(a_r, b_r)), jax.nn.sigmoid(dense.add_bias(a_i, b_i)), u

    def factors(rate, r):
        """A and √(1 − a²), for rate = c softplus(Λ)."""
        log_a = -jnp.expand_dims(rate, range(r.ndim - 1)) * r
        # At 0, for a gate that is shut tight, the root has no derivative.
        square = jnp.maximum(-jnp.expm1(2 * log_a), jnp.finfo(log_a.dtype).tiny)
        return jnp.exp(log_a), jnp.sqrt(square)

    def step(params, h, x):
        r, i, u = gates(params, h, x)
        a, root = factors(c * jax.nn.softplus(params.decay), r)
        h = a * h + root * (i * u)
        return h, h

    def forward(params, h_prev, x):
        r, i, u = gates(params, h_prev, x)
        a, root = factors(c * jax.nn.softplus(params.decay), r)
        h = a * h_prev + root * (i * u)
        return (h, h), (h_prev, r, i, u, a, root)

    def backward(params, residuals, x, h_bar, y_bar):
        h_prev, r, i, u, a, root = residuals
        h_bar = h_bar + y_bar
        previous_bar, from_root = h_bar * a, h_bar * root
        # ∂√(1 − a²)/∂ log a = −a²/√(1 − a²)
        log_a_bar = previous_bar * (h_prev - a * (i * u) / root)
        return previous_bar, (log_a_bar * r, from_root * u * i * (1 - i), from_root * i)

    def contract(params, residuals, xs, ys_bar, deltas):
        r = residuals[1]
        # of the decay: log a = −rate ⊙ r
        rate_bar = -dense.sum_rows(deltas[0])
        rate = jnp.expand_dims(c * jax.nn.softplus(params.decay), range(r.ndim - 1))
        deltas = -rate * deltas[0] * (1 - r), *deltas[1:]
        params_bar = RGLRUParams(
            W_xh=jnp.concatenate([products.weight_gradient(delta, xs) for delta in deltas]),
            b=jnp.concatenate([dense.sum_rows(delta) for delta in deltas[:2]]),
            decay=c * jax.nn.sigmoid(params.decay) * rate_bar,
        )
        from_r, from_i, from_u = map(products.back, deltas, jnp.split(params.W_xh, 3))
        return params_bar, from_r + from_i + from_u

    step = dense.with_sizes(step, input_size, hidden_size)
    return Cell(init, initial_carry, step, Adjoint(forward, backward, contract))
