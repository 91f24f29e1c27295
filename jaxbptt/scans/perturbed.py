r"""Which leaves a derivative is taken with respect to, as JAX's automatic differentiation decides it.

`lax.scan` differentiates what carries a tangent, and nothing else of a step needs to have a derivative: a loop of unknown
length over x, a callback, an eigenvector. The strategies ask the same question here before they derive anything.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxbptt.scans.recurrence import is_differentiable, merge


class Perturbed(NamedTuple):
    """A flag for each leaf of what a step reads: whether a derivative is taken with respect to it."""

    params: Any
    carry: Any
    x: Any


class PerturbedAdjoint(NamedTuple):
    """An `Adjoint`, and the leaves that it has gradients for.

    Its results may have more gradients than that. The flags of the carry are those of what goes in and comes out of
    `backward`: of an `Adjoint` by hand all leaves that can have a derivative. `mutates` says that a step makes mutable
    arrays of its own, for which JAX has no program inside of a `jax.custom_jvp`.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    contract: Callable[..., Any]
    perturbed: Perturbed
    mutates: bool = False


def every_leaf(tree: Any) -> Any:
    """Flags for all leaves that can have a derivative."""
    return jax.tree.map(is_differentiable, tree)


def everything(params: Any, carry: Any, x: Any) -> Perturbed:
    """Flags for all leaves that can have a derivative, of all that a step reads."""
    return Perturbed(every_leaf(params), every_leaf(carry), every_leaf(x))


def select(tree: Any, flags: Any) -> Any:
    """The leaves that are flagged, and `None` in the place of the others."""
    return jax.tree.map(lambda flag, leaf: leaf if flag else None, flags, tree)


def part(tree: Any, flags: Any) -> tuple[Any, Any]:
    """The leaves that are flagged and those that are not, each with `None` in the other's place."""
    return select(tree, flags), jax.tree.map(lambda flag, leaf: None if flag else leaf, flags, tree)


def spread(step: Callable[..., Any], perturbed: Perturbed, primals: Any) -> Perturbed:
    """The same, with the leaves of the carry that tangents reach at some step, first perturbed or not.

    `primals` are the shapes of (params, carry, x) at one step.
    """
    found = perturbed.carry
    while True:
        perturbed = perturbed._replace(carry=found)
        reached = _reached(step, perturbed, primals)
        found = jax.tree.map(lambda before, after: before or after, perturbed.carry, reached)
        if found == perturbed.carry:
            return perturbed


def _reached(step: Callable[..., Any], perturbed: Perturbed, primals: Any) -> Any:
    """The leaves of the carry that have a tangent after a step."""
    moving, still = part(primals, tuple(perturbed))
    reached = set()

    def watched(i, leaf):
        @jax.custom_jvp
        def identity(leaf):
            return leaf

        @identity.defjvp
        def jvp(primals, tangents):
            reached.add(i)  # JAX asks for this derivative only where the tangent is not known to be 0
            return primals[0], tangents[0]

        return identity(leaf)

    def tangents(moving, still, tangents):
        def leaves(moving):
            carry, _ = step(*merge(moving, still))
            return [watched(i, leaf) for i, leaf in enumerate(jax.tree.leaves(carry)) if is_differentiable(leaf)]

        return jax.jvp(leaves, (moving,), (tangents,))[1]

    jax.eval_shape(tangents, moving, still, moving)
    treedef = jax.tree.structure(perturbed.carry)
    return treedef.unflatten([i in reached for i in range(treedef.num_leaves)])
