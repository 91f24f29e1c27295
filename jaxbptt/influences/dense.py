r"""Influences that keep every entry: a leaf `[n, *leaf]` for each leaf of the params, n numbers of the carry of a row."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxbptt.influences.state import flat, size, vector


def init(params: Any, carry: Any) -> Any:
    """Zeros."""
    n, dtype = size(carry), vector(carry).dtype
    return jax.tree.map(lambda leaf: jnp.zeros((n, *leaf.shape), dtype), params)


def advance(M: Any, J: Array, F: Any) -> Any:
    """J M + F."""
    return jax.tree.map(lambda leaf, new: (J @ flat(leaf)).reshape(leaf.shape) + new, M, F)


def pull(M: Any, carry_bar: Any) -> Any:
    """The cotangent of the carry times M."""
    bar = vector(carry_bar)
    return jax.tree.map(lambda leaf: (bar.astype(leaf.dtype) @ flat(leaf)).reshape(leaf.shape[1:]), M)
