r"""What the built-in cells share: weight layout, input checks, and the weight gradient as one matrix product.

Gates are stacked on the first axis of a weight, so `W [gates · hidden, features]`, and a layer reads `W x`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxbptt.arrays import as_array, check_callable, check_count, is_floating

Initializer = Callable[..., Any]

# Normal with variance 1 / input_size: features are on the last axis, unlike the [in, out] layout jax assumes.
fan_in_normal = jax.nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=-1, out_axis=-2)
orthogonal = jax.nn.initializers.orthogonal()


def gate_blocks(initializer: Initializer, key: Array, gates: int, shape: tuple[int, int], dtype: Any) -> Array:
    """One draw of `initializer` for each gate, stacked on the first axis: `[gates · shape[0], shape[1]]`.

    Drawn in float32 at least, since a QR factorisation has no half precision.
    """
    drawn = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32
    blocks = [initializer(k, shape, drawn) for k in jax.random.split(key, gates)]
    for block in blocks:
        if jnp.shape(block) != shape:
            raise ValueError(f"An initializer returned shape {jnp.shape(block)}, but it was asked for {shape}.")
    return jnp.concatenate(blocks).astype(dtype)


class Products(NamedTuple):
    """The matrix products of a layer and of its backward.

    Attributes:
        linear: `(W, v)`, W v.
        back: `(deltas, W)`, Wᵀ δ.
        weight_gradient: `(deltas, inputs)`, Σ δ vᵀ.
    """

    linear: Callable[[Any, Any], Array]
    back: Callable[[Any, Any], Array]
    weight_gradient: Callable[[Any, Any], Array]


def products(compute_dtype: Any) -> Products:
    """The products in the dtype of their factors, or of factors rounded to `compute_dtype`, summed in that of the first.

    Only the factors are rounded: weights, carry, sums and what is computed from them keep their dtype.
    """
    if compute_dtype is None:
        return Products(linear, lambda deltas, W: deltas @ W, weight_gradient)
    if not is_floating(compute_dtype):
        raise ValueError(
            f"compute_dtype is {compute_dtype!r}: pass a floating-point dtype, such as jnp.bfloat16, or None."
        )

    def rounded(product):
        def of_rounded(a, b):
            return product(a.astype(compute_dtype), b.astype(compute_dtype), preferred_element_type=a.dtype)

        return of_rounded

    return Products(rounded(linear), rounded(jnp.matmul), rounded(weight_gradient))


def linear(
    W: Float[Array, "out in"], v: Shaped[Array, "*batch in"], preferred_element_type: Any = None
) -> Float[Array, "*batch out"]:
    """W v for any number of batch axes.

    Without any it is W v as written: v Wᵀ was measured to take twice the time on CPU.
    """
    factors = (W, v) if v.ndim == 1 else (v, W.T)
    return jnp.matmul(*factors, preferred_element_type=preferred_element_type)


def merged(products: Products, W_hh: Any, W_xh: Any, h: Any, x: Any) -> Array:
    """W_hh h + W_xh x as one product of concatenated weights, for a forward pass that concatenates them only once.

    With 8 rows an LSTM took 0.87 of the time on jax 0.10 and 0.95 on 0.12, with 32 rows 0.96 and 0.94; with a single row
    1.13 and 1.05, so a single row takes two products.
    """
    if math.prod(h.shape[:-1]) == 1 or x.dtype != h.dtype:
        return products.linear(W_hh, h) + products.linear(W_xh, x)
    return products.linear(jnp.concatenate([W_hh, W_xh], axis=1), jnp.concatenate([h, x], axis=-1))


def weight_gradient(
    deltas: Float[Array, "*rows out"], inputs: Shaped[Array, "*rows in"], preferred_element_type: Any = None
) -> Float[Array, "out in"]:
    """Σ δ vᵀ over time and batch, as one product of two matrices with time · batch rows each.

    Written with a reshape because the `einsum` over two leading axes was measured up to 1.5 times slower on CPU; and as
    (Σ v δᵀ)ᵀ, since summed over segments of 1,024 rows that product takes 0.66 to 0.85 of the time of Σ δ vᵀ.
    """
    rows = math.prod(deltas.shape[:-1])
    factors = inputs.reshape(rows, inputs.shape[-1]).T, deltas.reshape(rows, deltas.shape[-1])
    return jnp.matmul(*factors, preferred_element_type=preferred_element_type).T


def add_bias(a: Float[Array, "*batch out"], b: Float[Array, " out"]) -> Float[Array, "*batch out"]:
    """A + b for any number of batch axes, also where JAX is told not to add axes by itself."""
    return a + jnp.expand_dims(b, range(a.ndim - 1))


def sum_rows(deltas: Float[Array, "*rows out"]) -> Float[Array, " out"]:
    """Σ δ over time and batch: the gradient of a bias."""
    return deltas.sum(axis=range(deltas.ndim - 1))


def check_sizes(**sizes: int) -> None:
    """Raise unless every size is a positive whole number."""
    for name, size in sizes.items():
        check_count(name, size, "it counts features")


def lstm_deltas(gates: tuple[Array, Array, Array, Array], c: Array, tanh_c: Array, h_bar: Array, c_bar: Array) -> Array:
    """δ of an LSTM's four gates, from the cotangents of its new state; c is the memory before the step."""
    i, f, g, o = gates
    return jnp.concatenate(
        [
            c_bar * g * i * (1 - i),
            c_bar * c * f * (1 - f),
            c_bar * i * ((1 - g) * (1 + g)),
            h_bar * tanh_c * o * (1 - o),
        ],
        axis=-1,
    )


def nothing_dropped(h: Array) -> Array:
    """What `W_hh` reads where there is no dropout: the state as it is."""
    return h


def with_sizes(step: Callable[..., Any], input_size: int, output_size: int) -> Callable[..., Any]:
    """The step with the sizes of x and y attached, for `stack`; a cell whose step is replaced has none."""
    step.__dict__["sizes"] = input_size, output_size
    return step


def with_lstm_layers(step: Callable[..., Any], layers: tuple[tuple[int, int], ...]) -> Callable[..., Any]:
    """The step of an `lstm` that rounds nothing, or of a stack of them, with the sizes of each layer attached."""
    step.__dict__["lstm_layers"] = step, layers
    return step


def lstm_layers(step: Callable[..., Any]) -> tuple[tuple[int, int], ...] | None:
    """(input_size, hidden_size) of each layer, lowest first, where a step is that of an `lstm` or of a stack of them."""
    # functools.wraps copies what is attached to another function.
    owner, layers = getattr(step, "lstm_layers", (None, None))
    return layers if owner is step else None


def check_dtype(dtype: Any) -> None:
    """Raise unless the dtype is one of floating-point numbers."""
    if not is_floating(dtype, jnp.inexact):
        raise ValueError(
            f"dtype is {dtype!r}, but params and carry are floating-point numbers: pass jnp.float32, or another."
        )


def check_options(dtype: Any, **initializers: Any) -> None:
    """Raise unless the dtype is one of floating-point numbers, and the initializers are functions."""
    check_dtype(dtype)
    for name, initializer in initializers.items():
        check_callable(name, initializer, "a jax initializer, (key, shape, dtype) -> array")


def check_batch_shape(batch_shape: Any) -> None:
    """Raise unless the axes of the batch are whole numbers."""
    if not isinstance(batch_shape, tuple | list):
        raise ValueError(
            f"batch_shape is {batch_shape!r}, but it is a tuple of the sizes of the batch axes: pass "
            "(rows,), or () for no batch."
        )
    for axis in batch_shape:
        if not jax.export.is_symbolic_dim(axis):
            check_count("An axis of batch_shape", axis, "it counts rows", least=0)


def zeros(batch_shape: Any, size: int, dtype: Any) -> Array:
    """A state of zeros, `[*batch, size]`."""
    check_batch_shape(batch_shape)
    return jnp.zeros((*batch_shape, size), dtype)


def check_step(
    kind: str, params: Any, shapes: dict[str, tuple[int, ...]], sizes: tuple[int, int], x: Any, **carry: Any
) -> Array:
    """`x` as an array, where it is `[*batch, input]`, the carry `[*batch, hidden]`, and params have their shapes."""
    input_size, hidden_size = sizes
    for name, shape in shapes.items():
        if not hasattr(params, name):
            raise TypeError(
                f"{kind}: params are a {type(params).__name__} without {name}: pass what cell.init(key) made."
            )
        found = getattr(getattr(params, name), "shape", None)
        if found != shape:
            raise ValueError(
                f"{kind}: {name} has shape {found}, but {shape} is expected: pass the params that this "
                "cell's init(key) made."
            )
    states = {
        name: as_array(f"{kind}: {name}", state, f"[*batch, {hidden_size}]").shape for name, state in carry.items()
    }
    batch = next(iter(states.values()))[:-1]
    for name, shape in states.items():
        if shape != (*batch, hidden_size):
            expected = f"[*batch, {hidden_size}]" if len(states) == 1 or not shape else f"{(*batch, hidden_size)}"
            raise ValueError(
                f"{kind}: {name} has shape {shape} at one time step, but {expected} is expected: the batch axes, then "
                f"hidden_size={hidden_size}. Make the carry with cell.initial_carry(batch_shape)."
            )
    x = as_array(f"{kind}: x", x, f"[*batch, {input_size}]")
    expected = (*batch, input_size)
    if x.shape != expected:
        raise ValueError(
            f"{kind}: x has shape {x.shape} at one time step, but {expected} is expected: the batch axes of the carry, "
            f"{batch}, then input_size={input_size}. Make the carry with cell.initial_carry(batch_shape), and keep "
            "time as the first axis of xs."
        )
    return x
