"""Reading and writing pytrees along their first axis, at positions known only when the program runs.

Positions are never negative: told so, JAX leaves out the operations that count them from the end.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

_index = partial(jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
_slice = partial(jax.lax.dynamic_slice_in_dim, allow_negative_indices=False)
_update = partial(jax.lax.dynamic_update_slice_in_dim, axis=0, allow_negative_indices=False)


def at(tree: Any, t: Any) -> Any:
    """The entry at t."""
    return jax.tree.map(lambda leaf: _index(leaf, t), tree)


def window(tree: Any, start: Any, length: int) -> Any:
    """`length` entries from `start` on."""
    return jax.tree.map(lambda leaf: _slice(leaf, start, length), tree)


def put(tree: Any, entry: Any, t: Any) -> Any:
    """`tree` with the entry at t replaced."""
    return put_window(tree, jax.tree.map(lambda leaf: leaf[None], entry), t)


def put_window(tree: Any, entries: Any, start: Any) -> Any:
    """`tree` with its entries from `start` on replaced."""
    return jax.tree.map(lambda leaf, new: _update(leaf, new, start), tree, entries)


def room(tree: Any, length: int) -> Any:
    """Arrays (or random keys) to write `length` entries like `tree` into."""
    return jax.tree.map(lambda leaf: jnp.zeros((length, *leaf.shape), leaf.dtype), tree)
