r"""The Elman network: one tanh layer fed by its own past. The cell of the textbook, and its hand-written backward pass."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxbptt.arrays import as_array, check_key
from jaxbptt.cells import dense
from jaxbptt.cells.cell import Adjoint, Cell


class ElmanParams(NamedTuple):
    """Weights of an Elman cell: `W_xh [hidden, input]`, `W_hh [hidden, hidden]`, `b [hidden]`."""

    W_xh: Float[Array, "hidden input"]
    W_hh: Float[Array, "hidden hidden"]
    b: Float[Array, " hidden"]


def elman(
    input_size: int,
    hidden_size: int,
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    recurrent_init: dense.Initializer = dense.orthogonal,
    input_init: dense.Initializer = dense.fan_in_normal,
) -> Cell:
    r"""An Elman cell: a tanh layer whose output is its next state.

    hₜ = tanh(W_hh hₜ₋₁ + W_xh xₜ + b),  yₜ = hₜ

    Its state Jacobian is ∂hₜ/∂hₜ₋₁ = diag(1 − hₜ²) W_hh (`elman_state_jacobians`). Time O(n²) a step; the backward pass
    keeps hₜ₋₁ and hₜ.

    Args:
        input_size: features of x.
        hidden_size: n, the size of the state.
        dtype: of the parameters and the carry.
        compute_dtype: what the factors of matrix products are rounded to, in both passes, such as `jnp.bfloat16`; sums,
            carry and the gradients of the cell's own adjoint stay in `dtype`. Where JAX differentiates a product, as in
            `scan`, it rounds that product's gradient too. `None` rounds nothing.
        recurrent_init: jax initializer of `W_hh`; orthogonal by default, so that only tanh shrinks any direction.
        input_init: jax initializer of `W_xh`; normal with variance 1/input_size by default.

    Returns:
        A `Cell` with `ElmanParams`; its carry is the array h `[*batch, hidden]`.

    Raises:
        ValueError: a size below 1, a dtype that is not floating-point; at a step, params, a carry or an x that do not fit
            the sizes or each other.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell = bptt.elman(input_size=3, hidden_size=5)
        >>> params = cell.init(jax.random.key(0))
        >>> h, y = cell.step(params, cell.initial_carry(), jax.numpy.ones(3))
        >>> h.shape, bool((h == y).all())
        ((5,), True)

    References:
        Elman, Finding structure in time, 1990, doi:10.1207/s15516709cog1402_1.
    """
    dense.check_sizes(input_size=input_size, hidden_size=hidden_size)
    dense.check_options(dtype, recurrent_init=recurrent_init, input_init=input_init)
    shapes = {"W_xh": (hidden_size, input_size), "W_hh": (hidden_size, hidden_size), "b": (hidden_size,)}
    products = dense.products(compute_dtype)

    def init(key: Array) -> ElmanParams:
        check_key(key)
        key_xh, key_hh = jax.random.split(key)
        return ElmanParams(
            W_xh=dense.gate_blocks(input_init, key_xh, 1, (hidden_size, input_size), dtype),
            W_hh=dense.gate_blocks(recurrent_init, key_hh, 1, (hidden_size, hidden_size), dtype),
            b=jnp.zeros(hidden_size, dtype),
        )

    def initial_carry(batch_shape: tuple[int, ...] = ()) -> Array:
        return dense.zeros(batch_shape, hidden_size, dtype)

    def step(params, h, x, drop=dense.nothing_dropped):
        x = dense.check_step("elman", params, shapes, (input_size, hidden_size), x, h=h)
        current = products.linear(params.W_hh, drop(h)) + products.linear(params.W_xh, x)
        h = jnp.tanh(dense.add_bias(current, params.b))
        return h, h

    def forward(params, h_prev, x):
        x = dense.check_step("elman", params, shapes, (input_size, hidden_size), x, h=h_prev)
        h = jnp.tanh(dense.add_bias(dense.merged(products, params.W_hh, params.W_xh, h_prev, x), params.b))
        return (h, h), (h_prev, h)

    def backward(params, residuals, x, h_bar, y_bar):
        _, h = residuals
        # (1 − h)(1 + h) is 1 − h² without the cancellation as |h| → 1.
        delta = (h_bar + y_bar) * ((1 - h) * (1 + h))
        return products.back(delta, params.W_hh), delta

    def contract(params, residuals, xs, ys_bar, deltas):
        hs_prev, _ = residuals
        params_bar = ElmanParams(
            W_xh=products.weight_gradient(deltas, xs),
            W_hh=products.weight_gradient(deltas, hs_prev),
            b=dense.sum_rows(deltas),
        )
        return params_bar, products.back(deltas, params.W_xh)

    step = dense.with_sizes(step, input_size, hidden_size)
    return Cell(init, initial_carry, step, Adjoint(forward, backward, contract))


def elman_state_jacobians(
    params: ElmanParams, hs: Float[ArrayLike, "*time hidden"]
) -> Float[Array, "*time hidden hidden"]:
    r"""The closed form of the Elman cell's state Jacobian.

    Jₜ = ∂hₜ/∂hₜ₋₁ = diag(1 − hₜ²) W_hh

    Costs O(T n²) time and memory. Where |hₜ| has rounded to 1 the true factor is lost and the row is 0.

    Args:
        params: the cell's weights.
        hs: states hₜ, `[..., hidden]`, as `state_jacobians` or a scan returns them.

    Returns:
        J, `[..., hidden, hidden]`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> params = bptt.ElmanParams(W_xh=jnp.eye(1), W_hh=jnp.array([[0.5]]), b=jnp.zeros(1))
        >>> print(bptt.elman_state_jacobians(params, jnp.array([0.0])))
        [[0.5]]
    """
    hs = as_array("hs", hs, "[*time, hidden]")
    hidden = hs.shape[-1:] * 2
    if not isinstance(params, ElmanParams) or jnp.shape(params.W_hh) != hidden or not hidden:
        raise ValueError(
            f"hs have shape {hs.shape}, which asks for ElmanParams with a W_hh of shape {hidden}: pass the params of the "
            "cell that made the states, and hs [*time, hidden]."
        )
    return ((1 - hs) * (1 + hs))[..., :, None] * jnp.expand_dims(params.W_hh, range(hs.ndim - 1))
