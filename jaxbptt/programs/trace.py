r"""A user's step as data: traced once into a jaxpr, with everything it closes over made an argument.

A custom derivative sees only what is passed to it. A step such as `lambda _, h, x: jnp.tanh(W @ h + x)` hides `W` from
it; `trace` finds `W` in the trace and makes it a param, so that gradients reach it and no step is traced twice.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxbptt.along_time import at_one_step
from jaxbptt.array_types import as_type
from jaxbptt.programs.evaluate import evaluate_jaxpr, subjaxprs
from jaxbptt.trees import combine, is_array, is_ref, partition

# Under a map, branches become selects, many steps can't write to one mutable array, and JAX confuses the gradients of a
# custom_vjp with symbolic zeros where some of its inputs are not perturbed.
_NOT_UNDER_A_MAP = {"cond", "get", "swap", "addupdate", "new_ref", "symbolic_zeros"}


class ClosedParams(NamedTuple):
    """All that a traced step reads beside carry and x: array leaves of the params, and arrays it had closed over."""

    leaves: list[Any]
    closed_over: list[Any]


class Equations(NamedTuple):
    """A jaxpr without its constants, which jax 0.12 keeps in it: a step outlives the tracers that it was traced with."""

    constvars: list[Any]
    invars: list[Any]
    outvars: list[Any]
    eqns: list[Any]


class TracedStep(NamedTuple):
    """A step traced once.

    Attributes:
        jaxpr: the trace, as `Equations`; its constants are `params.closed_over`, its inputs the leaves of
            (params.leaves, carry, x).
        step: `(params, carry, x) -> (carry, y)`, which evaluates the trace and closes over nothing.
        primitives: names of all equations in it.
        one_at_a_time: whether it has to run one step at a time, and not mapped over time: where it branches (`lax.cond`),
            writes to a mutable array or has a `jax.custom_vjp` with symbolic zeros.
        refs: the mutable arrays that it had closed over or found among the params, by the number of their constant in
            the trace. They can't be passed through a custom derivative, so `step` closes over them.
        params: the `ClosedParams` to call it with. Leaves of the user's params that are not arrays (activation
            functions, flags, sizes, strings) stay in the trace.
        shapes: those of (params, carry, x) at one time step.
        out_tree: structure of (carry, y).
        like_params: puts a `ClosedParams` back into the structure of the user's params, `None` where a leaf is no array.
    """

    jaxpr: Equations
    step: Callable[..., Any]
    primitives: set[str]
    one_at_a_time: bool
    refs: dict[int, Any]
    params: ClosedParams
    shapes: Any
    out_tree: Any
    like_params: Callable[[ClosedParams], Any]


def trace(step: Callable[..., Any], params: Any, init: Any, xs: Any) -> TracedStep:
    """Trace a step, once."""
    arrays, static = partition(params, is_array)
    leaves, treedef = jax.tree.flatten(arrays)

    def from_arrays(leaves, carry, x):
        return step(combine(treedef.unflatten(leaves), static), carry, x)

    closed, shapes = jax.make_jaxpr(from_arrays, return_shape=True)(leaves, init, at_one_step(xs))
    out_tree = jax.tree.structure(shapes)
    jaxpr = Equations(*(list(getattr(closed.jaxpr, field)) for field in Equations._fields))
    refs = {i: const for i, const in enumerate(closed.consts) if is_ref(const)}
    params = ClosedParams(leaves, [const for i, const in enumerate(closed.consts) if i not in refs])
    arrays = [var for i, var in enumerate(jaxpr.constvars) if i not in refs]
    avals = [var.aval for var in (*jaxpr.invars[: len(leaves)], *arrays)]
    avals += [var.aval for var in jaxpr.invars[len(leaves) :]]
    in_tree = jax.tree.structure((params, init, xs))
    primitives = set(primitive_names(jaxpr))

    def traced_step(params, carry, x):
        flat, arrays = jax.tree.leaves((params.leaves, carry, x)), iter(params.closed_over)
        consts = [refs[i] if i in refs else next(arrays) for i in range(len(jaxpr.constvars))]
        return out_tree.unflatten(evaluate_jaxpr(jaxpr, consts, flat))

    return TracedStep(
        jaxpr=jaxpr,
        step=traced_step,
        primitives=primitives,
        one_at_a_time=not _NOT_UNDER_A_MAP.isdisjoint(primitives),
        refs=refs,
        params=params,
        shapes=in_tree.unflatten(map(as_type, avals)),
        out_tree=out_tree,
        like_params=lambda params: treedef.unflatten(params.leaves),
    )


def map_over_time(fn: Callable[..., Any], *, one_at_a_time: bool) -> Callable[..., Any]:
    """`fn(params, *at_t)` for all time steps: `(params, *stacked)`.

    All at once, or `one_at_a_time` for a step that branches: under a map branches become selects, which compute, and
    differentiate, the branch not taken, so that nan would leak.
    """
    if one_at_a_time:
        return lambda params, *stacked: jax.lax.map(lambda at_t: fn(params, *at_t), stacked)
    return lambda params, *stacked: jax.vmap(partial(fn, params))(*stacked)


def primitive_names(jaxpr: Any) -> Iterator[str]:
    """Names of all equations in a traced function, those inside loops, branches and calls included.

    And "symbolic_zeros" where there is a `jax.custom_vjp` that is told which of its inputs are perturbed.
    """
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.params.get("symbolic_zeros"):
            yield "symbolic_zeros"
        for inner, _ in subjaxprs(eqn):
            yield from primitive_names(inner)
