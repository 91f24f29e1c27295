"""Reading and writing pytrees along their first axis, at positions known only when the program runs."""

from typing import Any

import jax
import jax.numpy as jnp


def at(tree: Any, t: Any) -> Any:
    """The entry at t."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, t, keepdims=False), tree)


def window(tree: Any, start: Any, length: int) -> Any:
    """`length` entries from `start` on."""
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, length), tree)


def put(tree: Any, entry: Any, t: Any) -> Any:
    """`tree` with the entry at t replaced."""
    return put_window(tree, jax.tree.map(lambda leaf: leaf[None], entry), t)


def put_window(tree: Any, entries: Any, start: Any) -> Any:
    """`tree` with its entries from `start` on replaced."""
    return jax.tree.map(lambda leaf, new: jax.lax.dynamic_update_slice_in_dim(leaf, new, start, 0), tree, entries)


def room(tree: Any, length: int) -> Any:
    """Arrays (or random keys) to write `length` entries like `tree` into."""
    return jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), tree)
