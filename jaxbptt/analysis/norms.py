r"""Euclidean norms that neither overflow nor underflow on the way: a gradient of 1e-30 squared is 0 in float32."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def norm(array: Array, axes: Sequence[int] | None = None) -> Array:
    """√Σ|aᵢ|² over the given axes (all by default), computed as m √Σ|aᵢ/m|² with m = max|aᵢ|."""
    magnitude = jnp.abs(array)
    largest = jnp.max(magnitude, axis=axes, keepdims=True, initial=0)
    scale = jnp.where(largest > 0, largest, 1)
    return jnp.squeeze(scale, axes) * jnp.sqrt(jnp.sum((magnitude / scale) ** 2, axis=axes))


def norm_over_time(tree: Any) -> Array:
    """The norm of all leaves `[time, ...]` together, at each time step: `[time]`."""
    leaves = [norm(leaf, range(1, leaf.ndim)) for leaf in jax.tree.leaves(tree)]
    return norm(jnp.stack(leaves), (0,))
