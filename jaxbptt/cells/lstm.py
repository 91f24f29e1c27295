r"""Long short-term memory, and its hand-written backward pass."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.arrays import check_key, is_number
from jaxbptt.cells import dense, initializers
from jaxbptt.cells import layer_norm as normalised
from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.cells.layer_norm import LayerNormLSTMParams


class LSTMParams(NamedTuple):
    """Weights of an LSTM, gates i, f, g, o stacked on the first axis: `W_xh [4·hidden, input]`,
    `W_hh [4·hidden, hidden]`, `b [4·hidden]`."""  # noqa: D205, D209

    W_xh: Float[Array, "gates_hidden input"]
    W_hh: Float[Array, "gates_hidden hidden"]
    b: Float[Array, " gates_hidden"]


class LSTMState(NamedTuple):
    """The carry of an LSTM: output `h [*batch, hidden]` and memory `c [*batch, hidden]`."""

    h: Float[Array, "*batch hidden"]
    c: Float[Array, "*batch hidden"]


def lstm(
    input_size: int,
    hidden_size: int,
    *,
    dtype: Any = jnp.float32,
    compute_dtype: Any = None,
    recurrent_init: dense.Initializer = dense.orthogonal,
    input_init: dense.Initializer = dense.fan_in_normal,
    forget_bias: float = 1.0,
    chrono_length: float | None = None,
    layer_norm: bool = False,
) -> Cell:
    r"""A long short-term memory cell: the memory c is added to, and kept where the forget gate is open.

    iₜ, fₜ, oₜ = σ(W_h· hₜ₋₁ + W_x· xₜ + b·),  gₜ = tanh(W_hg hₜ₋₁ + W_xg xₜ + b_g)
    cₜ = fₜ ⊙ cₜ₋₁ + iₜ ⊙ gₜ
    hₜ = oₜ ⊙ tanh(cₜ),  yₜ = hₜ

    Time O(4 n²) a step; the backward pass keeps hₜ₋₁, cₜ₋₁ and the four gates.

    With `layer_norm`, the two products and the memory that is read are normalised, each over all its entries, to mean 0 and
    variance 1, and scaled by a gain that is learned:

    LN(a; γ) = γ ⊙ (a − mean a) / √(var a + 1e-5)
    the gates read  LN(W_h hₜ₋₁; γ_h) + LN(W_x xₜ; γ_x) + b,  and  hₜ = oₜ ⊙ tanh(LN(cₜ; γ_c) + b_c)

    The backward pass keeps both standardised arrays as well, of 5 n numbers.

    Args:
        input_size: features of x.
        hidden_size: n; the state (h, c) has 2n numbers.
        dtype: of the parameters and the carry.
        compute_dtype: what the factors of matrix products are rounded to, in both passes, such as `jnp.bfloat16`; sums,
            carry and the gradients of the cell's own adjoint stay in `dtype`. Where JAX differentiates a product, as in
            `scan`, it rounds that product's gradient too. `None` rounds nothing.
        recurrent_init: jax initializer of each gate's `[hidden, hidden]` block of `W_hh`; orthogonal by default.
        input_init: jax initializer of each gate's block of `W_xh`; normal with variance 1/input_size by default.
        forget_bias: b_f at the start; 1 keeps the memory, and its gradient, open (Jozefowicz et al. 2015).
        chrono_length: time steps of the longest dependency to expect: in place of `forget_bias`, b_f is spread so that the
            units keep their memory for up to that long, and b_i = −b_f (`initializers.chrono`).
        layer_norm: whether to normalise, as above. The gains start at 1.

    Returns:
        A `Cell` with `LSTMParams`, or with `LayerNormLSTMParams` where it normalises; its carry is an `LSTMState(h, c)`.

    Raises:
        ValueError: a size below 1, a dtype that is not floating-point, a `chrono_length` of 2 or less; at a step, params, a
            carry or an x that do not fit the sizes or each other.
        TypeError: a `layer_norm` that is neither True nor False.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell = bptt.lstm(input_size=3, hidden_size=5)
        >>> state, y = cell.step(cell.init(jax.random.key(0)), cell.initial_carry(), jax.numpy.ones(3))
        >>> state.c.shape, bool((state.h == y).all())
        ((5,), True)

    References:
        Hochreiter and Schmidhuber, Long short-term memory, 1997, doi:10.1162/neco.1997.9.8.1735; the forget gate is of
        Gers, Schmidhuber and Cummins, Learning to forget, 2000, doi:10.1162/089976600300015015; its bias of Jozefowicz,
        Zaremba and Sutskever, An empirical exploration of recurrent network architectures, ICML 2015; `chrono_length` of
        Tallec and Ollivier, Can recurrent neural networks warp time?, 2018, arXiv:1804.11188; `layer_norm` of Ba, Kiros and
        Hinton, Layer normalization, 2016, arXiv:1607.06450 (supplementary material).
    """
    dense.check_sizes(input_size=input_size, hidden_size=hidden_size)
    dense.check_options(dtype, recurrent_init=recurrent_init, input_init=input_init)
    if not is_number(forget_bias, -math.inf):
        raise ValueError(f"forget_bias is {forget_bias!r}, but it is a bias to start with: pass a finite number.")
    if not isinstance(layer_norm, bool):
        raise TypeError(f"layer_norm is {layer_norm!r}, but it says whether to normalise: pass True or False.")
    rows = 4 * hidden_size
    shapes = {"W_xh": (rows, input_size), "W_hh": (rows, hidden_size), "b": (rows,)}
    if layer_norm:
        shapes |= normalised.shapes_of(rows, hidden_size)
    products = dense.products(compute_dtype)
    chrono = None if chrono_length is None else initializers.chrono(chrono_length)

    def init(key: Array) -> LSTMParams | LayerNormLSTMParams:
        check_key(key)
        key_xh, key_hh = jax.random.split(key)
        b_i, b_f = jnp.zeros(hidden_size, dtype), jnp.full(hidden_size, forget_bias, dtype)
        if chrono is not None:
            b_f = chrono(jax.random.fold_in(key, 2), (hidden_size,), dtype)
            b_i = -b_f
        params = LSTMParams(
            W_xh=dense.gate_blocks(input_init, key_xh, 4, (hidden_size, input_size), dtype),
            W_hh=dense.gate_blocks(recurrent_init, key_hh, 4, (hidden_size, hidden_size), dtype),
            b=jnp.concatenate([b_i, b_f, jnp.zeros(2 * hidden_size, dtype)]),
        )
        return normalised.with_gains(params, dtype) if layer_norm else params

    def initial_carry(batch_shape: tuple[int, ...] = ()) -> LSTMState:
        # Two arrays: a donated carry can't contain the same buffer twice.
        h, c = (dense.zeros(batch_shape, hidden_size, dtype) for _ in range(2))
        return LSTMState(h, c)

    def checked(params, state, x):
        if not (hasattr(state, "h") and hasattr(state, "c")):
            found = f"an array {state.shape}" if hasattr(state, "shape") else type(state).__name__
            raise TypeError(
                f"lstm: the carry is {found}, but an LSTMState(h, c) is expected: make it with "
                "cell.initial_carry(batch_shape)."
            )
        return dense.check_step(
            "lstm", params, shapes, (input_size, hidden_size), x, **{"carry.h": state.h, "carry.c": state.c}
        )

    def gates(params, h, x):
        return squashed(dense.add_bias(products.linear(params.W_hh, h) + products.linear(params.W_xh, x), params.b))

    def squashed(a):
        a_i, a_f, a_g, a_o = jnp.split(a, 4, axis=-1)
        return jax.nn.sigmoid(a_i), jax.nn.sigmoid(a_f), jnp.tanh(a_g), jax.nn.sigmoid(a_o)

    def step(params, state, x, drop=dense.nothing_dropped):
        x = checked(params, state, x)
        i, f, g, o = gates(params, drop(state.h), x)
        c = f * state.c + i * g
        h = o * jnp.tanh(c)
        return LSTMState(h, c), h

    def forward(params, state, x):
        x = checked(params, state, x)
        i, f, g, o = squashed(dense.add_bias(dense.merged(products, params.W_hh, params.W_xh, state.h, x), params.b))
        c = f * state.c + i * g
        h = o * jnp.tanh(c)
        # The gates are saved as four arrays: to split one array in the backward loop costs what saving it gains.
        return (LSTMState(h, c), h), (state, i, f, g, o)

    def backward(params, residuals, x, state_bar, y_bar):
        state, i, f, g, o = residuals
        tanh_c = jnp.tanh(f * state.c + i * g)
        h_bar = state_bar.h + y_bar
        c_bar = state_bar.c + h_bar * o * ((1 - tanh_c) * (1 + tanh_c))
        delta = dense.lstm_deltas((i, f, g, o), state.c, tanh_c, h_bar, c_bar)
        return LSTMState(h=products.back(delta, params.W_hh), c=c_bar * f), delta

    def contract(params, residuals, xs, ys_bar, deltas):
        hs_prev = residuals[0].h
        params_bar = LSTMParams(
            W_xh=products.weight_gradient(deltas, xs),
            W_hh=products.weight_gradient(deltas, hs_prev),
            b=dense.sum_rows(deltas),
        )
        return params_bar, products.back(deltas, params.W_xh)

    adjoint = Adjoint(forward, backward, contract)
    if layer_norm:
        step, adjoint = normalised.lstm_step_and_adjoint(checked, squashed, products, LSTMState)
    elif compute_dtype is None:
        step = dense.with_lstm_layers(step, ((input_size, hidden_size),))
    return Cell(init, initial_carry, dense.with_sizes(step, input_size, hidden_size), adjoint)
