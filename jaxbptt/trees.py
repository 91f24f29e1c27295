"""Pytrees: what their leaves are, taken apart and put together again, and differentiated.

Two halves of a tree have the structure of the whole, with `None` in each other's place, as in Equinox's `partition`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.tree_util import keystr


def name(root: str, path: Any) -> str:
    """A leaf as a user would write it: `carry[0].h`."""
    return root + keystr(path)


def is_ref(leaf: Any) -> bool:
    """Whether a leaf is a mutable array, as `jax.new_ref` makes it."""
    return isinstance(leaf, jax.Ref)


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array or a real number, not a function, a flag or a size that a model keeps among its params."""
    return (hasattr(leaf, "dtype") and not is_ref(leaf)) or isinstance(leaf, float | complex)


def is_differentiable(leaf: Any) -> bool:
    """Whether a leaf has a derivative: a real or complex floating-point array or number."""
    return is_array(leaf) and jnp.issubdtype(getattr(leaf, "dtype", type(leaf)), jnp.inexact)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is a typed random key, which has no zero."""
    return hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def same_keys(tree: Any) -> Any:
    """Clones of random keys, where a step is recomputed: `jax.debug_key_reuse` would call the same key a reuse."""
    return jax.tree.map(lambda leaf: jax.random.clone(leaf) if is_key(leaf) else leaf, tree)


def select(tree: Any, flags: Any) -> Any:
    """The leaves whose flag is set, and `None` in the place of the others."""
    return jax.tree.map(lambda flag, leaf: leaf if flag else None, flags, tree)


def partition(tree: Any, by: Callable[[Any], bool] = is_differentiable, *, flags: Any = None) -> tuple[Any, Any]:
    """The leaves for which `by` is true, or whose flag is set, and the others."""
    flags = jax.tree.map(by, tree) if flags is None else flags
    return select(tree, flags), jax.tree.map(lambda flag, leaf: None if flag else leaf, flags, tree)


def combine(first: Any, second: Any) -> Any:
    """Undo `partition`."""
    return jax.tree.map(lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None)


def differentiable(tree: Any) -> Any:
    """The leaves that have a derivative, and `None` in the place of the others."""
    return partition(tree)[0]


def pull(fn: Callable[..., Any], primals: tuple[Any, ...], cotangents: Any) -> tuple[Any, ...]:
    """Cotangents of `primals` from those of `fn(*primals)`; both have `None` where a leaf has no derivative."""
    diff, nondiff = partition(primals)
    _, vjp = jax.vjp(lambda *diff: differentiable(fn(*combine(diff, nondiff))), *diff)
    return vjp(cotangents)


def differentiated_as(plain: Callable[..., Any], fast: Callable[..., Any]) -> Callable[..., Any]:
    """`fast`, with the derivative of `plain`, which is the same function."""

    def run(*args):
        # Flat: JAX's symbolic zeros must not get into the user's containers.
        leaves, treedef = jax.tree.flatten(args)

        @jax.custom_jvp
        def flat(*leaves):
            return fast(*treedef.unflatten(leaves))

        def jvp(primals, tangents):
            perturbed = [not isinstance(tangent, SymbolicZero) for tangent in tangents]
            diff, nondiff = partition(list(primals), flags=perturbed)

            def of_diff(diff):
                return plain(*treedef.unflatten(combine(diff, nondiff)))

            return jax.jvp(of_diff, (diff,), (select(list(tangents), perturbed),))

        flat.defjvp(jvp, symbolic_zeros=True)
        return flat(*leaves)

    return run
