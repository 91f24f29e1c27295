r"""What the built-in cells share: weight layout, input checks, and the weight gradient as one matrix product.

Gates are stacked on the first axis of a weight, so `W [gates · hidden, features]`, and a layer reads `W x`.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

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
    """The products in the dtype of what goes in, or with factors rounded to `compute_dtype` and sums in the first one's.

    Everything but the factors keeps its dtype: weights, carry, sums and what is computed from them.
    """
    if compute_dtype is None:
        return Products(linear, lambda deltas, W: deltas @ W, weight_gradient)
    if not jnp.issubdtype(compute_dtype, jnp.floating):
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

    Without any it is written as it reads: the other form was measured to take twice the time on CPU.
    """
    factors = (W, v) if v.ndim == 1 else (v, W.T)
    return jnp.matmul(*factors, preferred_element_type=preferred_element_type)


def merged(products: Products, W_hh: Any, W_xh: Any, h: Any, x: Any) -> Array:
    """W_hh h + W_xh x as one product, with the weights side by side: for a forward that puts them so once, not at each step.

    With 8 rows an LSTM took 0.87 of the time on jax 0.10 and 0.95 on 0.12, with 32 rows 0.96 and 0.94; with a single row
    1.13 and 1.05, so there it stays two products.
    """
    if math.prod(h.shape[:-1]) == 1 or x.dtype != h.dtype:
        return products.linear(W_hh, h) + products.linear(W_xh, x)
    return products.linear(jnp.concatenate([W_hh, W_xh], axis=1), jnp.concatenate([h, x], axis=-1))


def weight_gradient(
    deltas: Float[Array, "*rows out"], inputs: Shaped[Array, "*rows in"], preferred_element_type: Any = None
) -> Float[Array, "out in"]:
    """Σ δ vᵀ over time and batch, as one product of two matrices with time · batch rows each.

    Written with a reshape because the `einsum` over two leading axes was measured up to 1.5 times slower on CPU; and as
    (Σ v δᵀ)ᵀ, since that sum of products over segments of 1,024 rows takes 0.66 to 0.85 of the time of the other.
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
        if not hasattr(size, "__index__") or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name} is {size!r}, but it counts features: pass a whole number of at least 1.")


def check_input(kind: str, x: Any, h: Any, input_size: int) -> None:
    """Raise unless `x` is `[*batch, input_size]` with the batch axes of the state `h`."""
    expected = (*h.shape[:-1], input_size)
    if jnp.shape(x) != expected:
        raise ValueError(
            f"{kind}: x has shape {jnp.shape(x)} at one time step, but {expected} is expected: the batch axes of the carry, "
            f"{h.shape[:-1]}, then input_size={input_size}. Make the carry with cell.initial_carry(batch_shape), and keep "
            "time as the first axis of xs."
        )
