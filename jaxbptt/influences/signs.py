r"""Random signs, and sums of products of two factors drawn with them: what every random influence is made of.

Of a sum of products Σᵢ aᵢ ⊗ bᵢ, one product (Σᵢ νᵢ aᵢ) ⊗ (Σᵢ νᵢ bᵢ) with independent signs νᵢ has the right mean: νᵢ νⱼ is 0 on
average where i ≠ j, and 1 where i = j.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array


def signs(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
    """Independent signs, -1 or 1, each as likely as the other."""
    return jax.random.rademacher(key, shape, dtype)


def check_drawn(key: Any, name: str) -> None:
    """Raise where a random influence has no key to draw with."""
    if key is None:
        raise ValueError(
            f"{name} draws random signs, and there is no key to draw them with: pass key=jax.random.key(0), or any other key, to "
            "forward_scan."
        )


def balanced(left: Any, right: Any) -> tuple[Any, Any]:
    """Two factors of a product, scaled so that they have the same norm: what random signs add to it then varies least.

    Where one of them is zero, so is the product: both become zero then.
    """
    a, b = norm(left), norm(right)
    some = (a > 0) & (b > 0)
    a, b = (jnp.where(some, size, 1) for size in (a, b))
    zero = jnp.zeros_like(a)
    of_left, of_right = (jnp.where(some, jnp.sqrt(ratio), zero) for ratio in (b / a, a / b))
    return scaled(left, of_left), scaled(right, of_right)


def norm(tree: Any) -> Array:
    """The Euclidean norm of all numbers of a tree."""
    return jnp.sqrt(sum(jnp.sum(leaf * leaf) for leaf in jax.tree.leaves(tree)))


def scaled(tree: Any, factor: Any) -> Any:
    """Each leaf times a number."""
    return jax.tree.map(lambda leaf: factor * leaf, tree)


def added(one: Any, other: Any) -> Any:
    """The sum of two trees."""
    return jax.tree.map(jnp.add, one, other)
