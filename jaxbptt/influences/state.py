r"""One row's carry as a vector, and the two Jacobians of a step that every influence is made of: J and F."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from jaxbptt.arrays import at_least_float32


def vector(tree: Any) -> Array:
    """The leaves of a tree end to end, in single precision at least."""
    wide = jax.tree.map(lambda leaf: leaf.astype(at_least_float32(leaf.dtype)), tree)
    return ravel_pytree(wide)[0]


def unravelled(v: Array, like: Any) -> Any:
    """The tree whose vector is v."""
    parts, start = [], 0
    for leaf in jax.tree.leaves(like):
        parts.append(v[start : start + leaf.size].reshape(leaf.shape).astype(leaf.dtype))
        start += leaf.size
    return jax.tree.unflatten(jax.tree.structure(like), parts)


def size(tree: Any) -> int:
    """The length of that vector."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def as_function(step: Callable[..., Any], params: Any, carry: Any, x: Any) -> tuple[Callable[..., Any], Any, Array]:
    """A step as `fn(params, v) -> v`, with the vector of the carry, and where it is taken: (fn, params, v)."""
    v = vector(carry)

    def fn(params, v):
        return vector(step(params, unravelled(v, carry), x)[0]).astype(v.dtype)

    return fn, params, v


def jacobians(step: Callable[..., Any], params: Any, carry: Any, x: Any) -> tuple[Array, Any]:
    """(J `[n, n]`, F with leaves `[n, *leaf]`), by n cotangents at once."""
    fn, params, v = as_function(step, params, carry, x)
    _, vjp = jax.vjp(fn, params, v)
    F, J = jax.vmap(vjp)(jnp.eye(v.size, dtype=v.dtype))
    return J, jax.tree.map(lambda leaf: leaf.astype(v.dtype), F)


def state_jacobian(step: Callable[..., Any], params: Any, carry: Any, x: Any) -> Array:
    """J alone; in reverse mode too, which a `jax.custom_vjp` has and forward mode may not."""
    fn, params, v = as_function(step, params, carry, x)
    _, vjp = jax.vjp(lambda v: fn(params, v), v)
    return jax.vmap(vjp)(jnp.eye(v.size, dtype=v.dtype))[0]


def flat(leaf: Array) -> Array:
    """A leaf `[n, ...]` of an influence as a matrix `[n, p]`."""
    return leaf.reshape(len(leaf), math.prod(leaf.shape[1:]))
