r"""Euclidean norms that neither overflow nor underflow on the way: a gradient of 1e-30 squared is 0 in float32."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def norm(array: Array, axes: Sequence[int] | None = None) -> Array:
    """√Σ|aᵢ|² over the given axes (all by default), computed as m √Σ|aᵢ/m|² with m = max|aᵢ|.

    Its derivative at 0 counts as 0.
    """
    magnitude = jnp.abs(array)
    largest = jax.lax.stop_gradient(jnp.max(magnitude, axis=axes, keepdims=True, initial=0))
    scale = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    squares = jnp.sum((magnitude / scale) ** 2, axis=axes)
    root = jnp.where(squares == 0, 0, jnp.sqrt(jnp.where(squares == 0, 1, squares)))
    return jnp.squeeze(scale, axes) * root


def norm_over_time(tree: Any) -> Array:
    """The norm of all leaves `[time, ...]` together, at each time step: `[time]`."""
    leaves = [norm(leaf, range(1, leaf.ndim)) for leaf in jax.tree.leaves(tree)]
    return norm(jnp.stack(leaves), (0,))


def tree_norm(tree: Any) -> Array:
    """The norm of all leaves together."""
    leaves = jax.tree.leaves(tree)
    dtype = functools.reduce(jnp.promote_types, [leaf.dtype for leaf in leaves])
    return norm(jnp.stack([norm(leaf).astype(dtype) for leaf in leaves]))


def cosine(a: Any, b: Any) -> Array:
    """Of the angle between two trees as vectors; nan where one of them is 0."""
    a_norm, b_norm = tree_norm(a), tree_norm(b)
    parts = jax.tree.map(lambda x, y: jnp.vdot(x / a_norm.astype(x.dtype), y / b_norm.astype(y.dtype)), a, b)
    return jnp.sum(jnp.stack(jax.tree.leaves(parts)))
