r"""Euclidean norms whose squares neither overflow nor underflow: a gradient of 1e-30 squared is 0 in float32.

Norms of numbers in half precision are computed and returned in float32.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxbptt.arrays import at_least_float32


def norm(array: Array, axes: Sequence[int] | None = None) -> Array:
    """√Σ|aᵢ|² over the given axes (all by default), computed as m √Σ|aᵢ/m|² with m = max|aᵢ|.

    Its derivative at 0 counts as 0.
    """
    magnitude = jnp.abs(_wide(array))
    largest = jax.lax.stop_gradient(jnp.max(magnitude, axis=axes, keepdims=True, initial=0))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    squares = jnp.sum((magnitude / scale) ** 2, axis=axes)
    root = jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))
    return jnp.squeeze(scale, axes) * root


def norm_over_time(tree: Any) -> Array:
    """The norm of all leaves `[time, ...]` together, at each time step: `[time]`."""
    return norm(_stack([norm(leaf, range(1, leaf.ndim)) for leaf in jax.tree.leaves(tree)]), (0,))


def tree_norm(tree: Any) -> Array:
    """The norm of all leaves together."""
    return norm(_stack([norm(leaf) for leaf in jax.tree.leaves(tree)]))


def cosine(a: Any, b: Any) -> Array:
    """The cosine of the angle between two trees as vectors; nan where one of them is 0."""
    a_norm, b_norm = tree_norm(a), tree_norm(b)

    def product(x, y):
        x, y = _wide(x), _wide(y)
        return jnp.vdot(x / a_norm.astype(x.dtype), y / b_norm.astype(y.dtype)).real

    return jnp.sum(_stack(jax.tree.leaves(jax.tree.map(product, a, b))))


def _wide(array: Array) -> Array:
    return array.astype(at_least_float32(array.dtype))


def _stack(leaves: list[Array]) -> Array:
    """Stacked, in the widest of their dtypes."""
    dtype = max((leaf.dtype for leaf in leaves), key=lambda dtype: dtype.itemsize)
    return jnp.stack([leaf.astype(dtype) for leaf in leaves])
