r"""The layer-normalised form of an LSTM's step, and its hand-written backward pass."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.arrays import at_least_float32
from jaxbptt.cells import dense
from jaxbptt.cells.cell import Adjoint


class LayerNormLSTMParams(NamedTuple):
    """Weights of an LSTM with `layer_norm`: those of `LSTMParams`, the gains `gain_xh` and `gain_hh [4·hidden]` and
    `gain_c [hidden]`, and `b_c [hidden]`, the bias of the normalised memory."""  # noqa: D205, D209

    W_xh: Float[Array, "gates_hidden input"]
    W_hh: Float[Array, "gates_hidden hidden"]
    b: Float[Array, " gates_hidden"]
    gain_xh: Float[Array, " gates_hidden"]
    gain_hh: Float[Array, " gates_hidden"]
    gain_c: Float[Array, " hidden"]
    b_c: Float[Array, " hidden"]


def shapes_of(rows: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of what the normalised form has beside `LSTMParams`."""
    return {"gain_xh": (rows,), "gain_hh": (rows,), "gain_c": (hidden_size,), "b_c": (hidden_size,)}


def with_gains(params: Any, dtype: Any) -> LayerNormLSTMParams:
    """`LSTMParams` with gains of 1."""
    rows, hidden_size = params.W_hh.shape
    new = {name: jnp.ones(shape, dtype) for name, shape in shapes_of(rows, hidden_size).items()}
    return LayerNormLSTMParams(*params, **new | {"b_c": jnp.zeros(hidden_size, dtype)})


def lstm_step_and_adjoint(
    checked: Callable[..., Any], squashed: Callable[..., Any], products: dense.Products, make_state: Any
) -> tuple[Callable[..., Any], Adjoint]:
    """From the parts of an `lstm`: the check of a step's arguments, the four gates, the products, and `LSTMState`."""

    def parts(params, state, x, drop):
        """The gates, and what was standardised, with its scale: the recurrent product, and the new memory."""
        x = checked(params, state, x)
        from_h, from_x = standardised(products.linear(params.W_hh, drop(state.h))), projected(params, x)
        a = along(params.gain_hh, x) * from_h[0] + along(params.gain_xh, x) * from_x[0]
        i, f, g, o = squashed(dense.add_bias(a, params.b))
        c = f * state.c + i * g
        return (i, f, g, o), from_h, standardised(c), c

    def projected(params, x):
        return standardised(products.linear(params.W_xh, x))

    def along(gain, x):
        return jnp.expand_dims(gain, range(x.ndim - 1))

    def read(params, memory):
        return jnp.tanh(dense.add_bias(along(params.gain_c, memory) * memory, params.b_c))

    def step(params, state, x, drop=dense.nothing_dropped):
        (_, _, _, o), _, (memory, _), c = parts(params, state, x, drop)
        h = o * read(params, memory)
        return make_state(h, c), h

    def forward(params, state, x):
        gates, from_h, (memory, scale), c = parts(params, state, x, dense.nothing_dropped)
        h = gates[3] * read(params, memory)
        return (make_state(h, c), h), (state, gates, from_h, (memory, scale))

    def backward(params, residuals, x, state_bar, y_bar):
        state, (i, f, g, o), (from_h, scale_h), (memory, scale_c) = residuals
        tanh_c = read(params, memory)
        h_bar = state_bar.h + y_bar
        delta_c = h_bar * o * ((1 - tanh_c) * (1 + tanh_c))
        c_bar = state_bar.c + standardised_back(memory, scale_c, along(params.gain_c, h_bar) * delta_c)
        delta = dense.lstm_deltas((i, f, g, o), state.c, tanh_c, h_bar, c_bar)
        delta_h = standardised_back(from_h, scale_h, along(params.gain_hh, h_bar) * delta)
        return make_state(products.back(delta_h, params.W_hh), c_bar * f), (delta, delta_h, delta_c)

    def contract(params, residuals, xs, ys_bar, deltas):
        state, _, (from_h, _), (memory, _) = residuals
        delta, delta_h, delta_c = deltas
        from_x, scale = projected(params, xs)
        delta_x = standardised_back(from_x, scale, along(params.gain_xh, xs) * delta)
        params_bar = LayerNormLSTMParams(
            W_xh=products.weight_gradient(delta_x, xs),
            W_hh=products.weight_gradient(delta_h, state.h),
            b=dense.sum_rows(delta),
            gain_xh=dense.sum_rows(delta * from_x),
            gain_hh=dense.sum_rows(delta * from_h),
            gain_c=dense.sum_rows(delta_c * memory),
            b_c=dense.sum_rows(delta_c),
        )
        return params_bar, products.back(delta_x, params.W_xh)

    return step, Adjoint(forward, backward, contract)


def standardised(a: Any) -> tuple[Array, Array]:
    """(a − mean a) s and s = 1 / √(var a + 1e-5), over the last axis; the statistics in float32 at least."""
    wide = a.astype(at_least_float32(a.dtype))
    centred = wide - wide.mean(axis=-1, keepdims=True)
    # Not centred**2: of its Jacobians at 128 time steps the compiler of jax 0.10 makes wrong ones on the CPU.
    scale = jax.lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + 1e-5)
    return (centred * scale).astype(a.dtype), scale.astype(a.dtype)


def standardised_back(a: Any, scale: Any, a_bar: Any) -> Array:
    """The cotangent of what was standardised to `a`: s (ā − mean ā − a mean(a ā))."""
    return scale * (a_bar - a_bar.mean(axis=-1, keepdims=True) - a * jnp.mean(a * a_bar, axis=-1, keepdims=True))
