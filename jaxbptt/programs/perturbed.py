r"""Which leaves a derivative is taken with respect to, as JAX's automatic differentiation decides it.

`lax.scan` differentiates what carries a tangent, and nothing else of a step needs to have a derivative: a loop of unknown
length over x, a callback, an eigenvector. The strategies ask the same question here before they derive anything.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxbptt.trees import combine, is_differentiable, name, partition


class Perturbed(NamedTuple):
    """A flag for each leaf of what a step reads: whether a derivative is taken with respect to it."""

    params: Any
    carry: Any
    x: Any


class PerturbedAdjoint(NamedTuple):
    """An `Adjoint`, and the leaves that it has gradients for.

    Attributes:
        forward: as in `Adjoint`; so are `backward` and `contract`. They may return more gradients than `perturbed` asks for.
        backward: takes and returns cotangents of the carry's leaves that are flagged in `perturbed`.
        contract: after the recursion, for all time steps at once.
        perturbed: of an `Adjoint` by hand, all leaves of the carry that can have a derivative are flagged.
        mutates: whether a step makes mutable arrays of its own, for which JAX has no program inside of a `jax.custom_jvp`.
        by_vjp: whether the delta of `backward` is the cotangent of the carry after the step, and nothing else.
        for_outputs: `(carry_flags, ys_flags)`, the adjoint of the leaves of carry and outputs that a loss uses, or `None`
            for an `Adjoint` by hand. What leads to none of them is not computed: its derivative may be infinite, and
            times the cotangent 0 that would be nan.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    contract: Callable[..., Any]
    perturbed: Perturbed
    mutates: bool = False
    by_vjp: bool = False
    for_outputs: Callable[[Any, Any], Any] | None = None


def wrapping_for_outputs(
    adjoint: PerturbedAdjoint, inner: PerturbedAdjoint, wrap: Callable[[PerturbedAdjoint], PerturbedAdjoint]
) -> PerturbedAdjoint:
    """`adjoint = wrap(inner)`, with a `for_outputs` that wraps that of `inner`, if it has one."""
    if inner.for_outputs is None:
        return adjoint
    narrowed = inner.for_outputs
    return adjoint._replace(for_outputs=lambda carry, ys: wrap(narrowed(carry, ys)))


def fit(bar: Any, primal: Any, flags: Any, root: str, *, cast: bool = True) -> Any:
    """Check a result of an `Adjoint` against what it is the derivative of, and give it that dtype.

    Gradients of leaves that are not flagged are left out.
    """

    def leaf(path, flag, primal, bar):
        if not flag:
            return None
        aval = jax.typeof(primal)
        if bar is None:
            raise ValueError(
                f"The adjoint has no gradient of {name(root, path)}: return one for each leaf, None for those without a "
                "derivative."
            )
        bar = jnp.asarray(bar)
        if bar.shape != aval.shape:
            raise ValueError(
                f"The adjoint's gradient of {name(root, path)} has shape {bar.shape}, but {name(root, path)} has "
                f"{aval.shape}: sum over time and batch what it does not have, and check the order of its axes."
            )
        return bar.astype(aval.dtype) if cast else bar

    treedef = jax.tree.structure(flags)
    try:
        bars = treedef.flatten_up_to(bar)
    except ValueError:
        raise ValueError(
            f"The adjoint's gradient of {root} has structure {jax.tree.structure(bar)}, but {root} has "
            f"{jax.tree.structure(primal)}: return one gradient for each leaf, None for those without a derivative."
        ) from None
    return jax.tree_util.tree_map_with_path(leaf, flags, primal, treedef.unflatten(bars))


def every_leaf(tree: Any) -> Any:
    """Flags for all leaves that can have a derivative."""
    return jax.tree.map(is_differentiable, tree)


def everything(params: Any, carry: Any, x: Any) -> Perturbed:
    """Flags for all leaves that can have a derivative, of all that a step reads."""
    return Perturbed(every_leaf(params), every_leaf(carry), every_leaf(x))


def spread(step: Callable[..., Any], perturbed: Perturbed, primals: Any) -> Perturbed:
    """`perturbed`, with all leaves of the carry that have a tangent at any step, at the first or later.

    `primals` are the shapes of (params, carry, x) at one step.
    """
    found = perturbed.carry
    while True:
        perturbed = perturbed._replace(carry=found)
        reached = _reached(step, perturbed, primals)
        leaves, treedef = jax.tree.flatten(perturbed.carry)
        found = treedef.unflatten([flag or i in reached for i, flag in enumerate(leaves)])
        if found == perturbed.carry:
            return perturbed


def led_to(step: Callable[..., Any], wanted: Any, primals: Any) -> Any:
    """Flags for the leaves of the carry that have a tangent at any step where those params have one that are wanted."""
    _, carry, x = jax.tree.map(lambda _: False, primals)
    return spread(step, Perturbed(wanted, carry, x), primals).carry


def leading_to(step: Callable[..., Any], perturbed: Perturbed, primals: Any, carry_used: Any, ys_used: Any) -> Any:
    """Flags for the leaves of the carry whose tangents reach what a loss uses: the last carry, or outputs at any step."""
    nothing = jax.tree.map(lambda _: False, perturbed)
    treedef = jax.tree.structure(perturbed.carry)

    def reached(i):
        one = treedef.unflatten([i == k for k in range(treedef.num_leaves)])
        return _reached(step, nothing._replace(carry=one), primals)

    return _leading(reached, perturbed.carry, carry_used, ys_used)


def leading_by_trace(jaxpr: Any, first: int, perturbed_carry: Any, carry_used: Any, ys_used: Any) -> Any:
    """The same by data dependence in the trace of a step, without differentiating it: this may flag more leaves.

    The carry's leaves are inputs of the trace from number `first` on.
    """

    def reached(i):
        found = {jaxpr.invars[first + i]}
        for eqn in jaxpr.eqns:
            if any(not isinstance(var, Literal) and var in found for var in eqn.invars):
                found.update(eqn.outvars)
        return {k for k, var in enumerate(jaxpr.outvars) if not isinstance(var, Literal) and var in found}

    return _leading(reached, perturbed_carry, carry_used, ys_used)


def _leading(reached: Callable[[int], set[int]], perturbed_carry: Any, carry_used: Any, ys_used: Any) -> Any:
    """Flags for the leaves of the carry that lead to what is used; `reached(i)` is what leaf i reaches in one step."""
    candidates, treedef = jax.tree.flatten(perturbed_carry)
    count = len(candidates)
    used = [a and b for a, b in zip(candidates, jax.tree.leaves(carry_used), strict=True)]
    ends = {count + i for i, flag in enumerate(jax.tree.leaves(ys_used)) if flag}
    reaches = {i: reached(i) for i in range(count) if candidates[i] and not used[i]}
    # A leaf is used if in one step it reaches an output that is, or a leaf of the carry that is: until nothing changes.
    while True:
        ends.update(i for i in range(count) if used[i])
        found = [used[i] or bool(ends.intersection(reaches.get(i, ()))) for i in range(count)]
        if found == used:
            return treedef.unflatten(used)
        used = found


def _reached(step: Callable[..., Any], perturbed: Perturbed, primals: Any) -> set[int]:
    """The leaves of (carry, y) that have a tangent after a step, by number."""
    diff, nondiff = partition(primals, flags=tuple(perturbed))
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

    def tangents(diff, nondiff, tangents):
        def outputs(diff):
            leaves = jax.tree.leaves(step(*combine(diff, nondiff)))
            return [watched(i, leaf) for i, leaf in enumerate(leaves) if is_differentiable(leaf)]

        return jax.jvp(outputs, (diff,), (tangents,))[1]

    jax.eval_shape(tangents, diff, nondiff, diff)
    return reached
