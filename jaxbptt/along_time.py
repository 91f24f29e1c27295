"""Reading and writing pytrees along their first axis, at positions known only when the program runs.

Positions are never negative: told so, JAX leaves out the operations that handle negative ones.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt.array_types import type_at_one_step, type_over_time, zeros
from jaxbptt.trees import same_keys

_index = partial(jax.lax.dynamic_index_in_dim, keepdims=False, allow_negative_indices=False)
_slice = partial(jax.lax.dynamic_slice_in_dim, allow_negative_indices=False)
_update = partial(jax.lax.dynamic_update_slice_in_dim, axis=0, allow_negative_indices=False)


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("type",))
@dataclass(frozen=True)
class Zeros:
    """Stands for an array of zeros of a type at every time step: it is no leaf of a pytree, so no loop carries it."""

    type: Any


def at_one_step(xs: Any) -> Any:
    """The shapes and dtypes of `xs` at a single time step."""
    return jax.tree.map(type_at_one_step, xs)


def filled(tree: Any, *lengths: Any) -> Any:
    """`tree` with arrays in place of its `Zeros`: of one step, or stacked on leading axes of these lengths."""

    def fill(leaf):
        return zeros(type_over_time(leaf.type, *lengths)) if isinstance(leaf, Zeros) else leaf

    return jax.tree.map(fill, tree, is_leaf=lambda leaf: isinstance(leaf, Zeros))


def at(tree: Any, t: Any) -> Any:
    """The entry at t."""
    return jax.tree.map(lambda leaf: _index(leaf, t), same_keys(tree))


def window(tree: Any, start: Any, length: int) -> Any:
    """`length` entries from `start` on."""
    return jax.tree.map(lambda leaf: _slice(leaf, start, length), same_keys(tree))


def put(tree: Any, entry: Any, t: Any) -> Any:
    """`tree` with the entry at t replaced."""
    return put_window(tree, jax.tree.map(lambda leaf: leaf[None], entry), t)


def put_window(tree: Any, entries: Any, start: Any) -> Any:
    """`tree` with its entries from `start` on replaced."""
    return jax.tree.map(lambda leaf, new: _update(leaf, new, start), tree, same_keys(entries))


def room(tree: Any, length: int) -> Any:
    """Arrays (or random keys) to write `length` entries like `tree` into."""
    return jax.tree.map(lambda leaf: zeros(type_over_time(leaf, length)), tree)


def flipped(tree: Any) -> Any:
    """The entries from the last to the first."""
    return jax.tree.map(lambda leaf: jax.lax.rev(leaf, (0,)), tree)


def at_last_step(bar: Any, length: Any) -> Any:
    """The gradient of the last carry as one of the carries after every step."""
    before = room(bar, length - 1)
    return jax.tree.map(lambda zeros, leaf: jnp.concatenate([zeros, leaf[None]]), before, bar)
