r"""A user's step as data: traced once into JAX's intermediate form, with everything it closes over made an argument.

A custom derivative sees only what is passed to it. A step such as `lambda _, h, x: jnp.tanh(W @ h + x)` hides `W` from
it; `trace` finds `W` in the trace and hands it over, so that gradients reach it and no step is traced twice.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.core import eval_jaxpr
from jax.extend.core import Literal

from jaxbptt.along_time import at_one_step
from jaxbptt.array_types import as_type
from jaxbptt.trees import combine, is_array, is_ref, partition

# Calls that only wrap a function: their inside can be evaluated in place.
_WRAPPERS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2"}
# Under a map, branches become selects, there is no writing to one mutable array from many places, and JAX mistakes the gradients
# of a custom_vjp with symbolic zeros for each other where some of its inputs are not perturbed.
_ONE_AT_A_TIME = {"cond", "get", "swap", "addupdate", "new_ref", "symbolic_zeros"}


class ClosedParams(NamedTuple):
    """All that a traced step reads beside carry and x: array leaves of the params, and arrays it had closed over."""

    leaves: list[Any]
    closed_over: list[Any]


class TracedStep(NamedTuple):
    """A step traced once.

    Attributes:
        jaxpr: the trace; its constants are `params.closed_over`, its inputs the leaves of (params.leaves, carry, x).
        step: `(params, carry, x) -> (carry, y)`, which evaluates the trace and closes over nothing.
        primitives: names of all operations in it.
        in_turn: whether it has to run one step at a time, and not mapped over time: where it branches (`lax.cond`),
            writes to a mutable array or has a `jax.custom_vjp` with symbolic zeros.
        refs: the mutable arrays that it had closed over or found among the params, by the number of their constant in
            the trace. They can't be passed through a custom derivative, so `step` closes over them.
        params: the `ClosedParams` to call it with. Leaves of the user's params that are not arrays (activation
            functions, flags, sizes, strings) stay in the trace.
        shapes: those of (params, carry, x) at one time step.
        out_tree: structure of (carry, y).
        like_params: puts a `ClosedParams` back into the structure of the user's params, `None` where a leaf is no array.
    """

    jaxpr: Any
    step: Callable[..., Any]
    primitives: set[str]
    in_turn: bool
    refs: dict[int, Any]
    params: ClosedParams
    shapes: Any
    out_tree: Any
    like_params: Callable[[ClosedParams], Any]


def map_over_time(fn: Callable[..., Any], *, in_turn: bool) -> Callable[..., Any]:
    """`fn(params, *at_t)` for all time steps: `(params, *stacked)`.

    All at once, or `in_turn` for a step that branches: under a map branches become selects, which compute, and
    differentiate, the branch not taken, so that nan would leak.
    """
    if in_turn:
        return lambda params, *stacked: jax.lax.map(lambda at_t: fn(params, *at_t), stacked)
    return lambda params, *stacked: jax.vmap(partial(fn, params))(*stacked)


def trace(recurrence: Any) -> TracedStep:
    """Trace the step of a prepared recurrence, once."""
    arrays, others = partition(recurrence.params, is_array)
    leaves, treedef = jax.tree.flatten(arrays)

    def from_arrays(leaves, carry, x):
        return recurrence.step(combine(treedef.unflatten(leaves), others), carry, x)

    closed, shapes = jax.make_jaxpr(from_arrays, return_shape=True)(leaves, recurrence.init, at_one_step(recurrence.xs))
    out_tree = jax.tree.structure(shapes)
    jaxpr, refs = closed.jaxpr, {i: const for i, const in enumerate(closed.consts) if is_ref(const)}
    params = ClosedParams(leaves, [const for i, const in enumerate(closed.consts) if i not in refs])
    arrays = [var for i, var in enumerate(jaxpr.constvars) if i not in refs]
    avals = [var.aval for var in (*jaxpr.invars[: len(leaves)], *arrays)]
    avals += [var.aval for var in jaxpr.invars[len(leaves) :]]
    in_tree = jax.tree.structure((params, recurrence.init, recurrence.xs))
    primitives = set(_primitives(jaxpr))

    def step(params, carry, x):
        flat, arrays = jax.tree.leaves((params.leaves, carry, x)), iter(params.closed_over)
        consts = [refs[i] if i in refs else next(arrays) for i in range(len(jaxpr.constvars))]
        return out_tree.unflatten(eval_jaxpr(jaxpr, consts, *flat))

    return TracedStep(
        jaxpr=jaxpr,
        step=step,
        primitives=primitives,
        in_turn=not _ONE_AT_A_TIME.isdisjoint(primitives),
        refs=refs,
        params=params,
        shapes=in_tree.unflatten(map(as_type, avals)),
        out_tree=out_tree,
        like_params=lambda params: treedef.unflatten(params.leaves),
    )


def subjaxprs(eqn: Any) -> Iterator[tuple[Any, list[Any]]]:
    """The traced functions inside one operation (a loop's body, a branch, a called function), with their constants."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield getattr(item, "jaxpr", item), list(getattr(item, "consts", ()))


def wrapped(eqn: Any) -> tuple[Any, list[Any]] | None:
    """The traced function, with its constants, of an operation that only wraps one; `None` for any other operation."""
    return next(subjaxprs(eqn), None) if eqn.primitive.name in _WRAPPERS else None


def bind(eqn: Any, values: list[Any]) -> list[Any]:
    """The results of one operation of a trace."""
    with eqn.ctx.manager:  # the mesh, or another setting, that the operation was traced under
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return results if eqn.primitive.multiple_results else [results]


def read(env: dict[Any, Any], variables: Iterable[Any]) -> list[Any]:
    """The values of some variables; a literal is its own."""
    return [var.val if isinstance(var, Literal) else env[var] for var in variables]


def evaluate_inlined(
    jaxpr: Any, consts: list[Any], inputs: list[Any], run: Callable[[Any, list[Any]], list[Any]] = bind
) -> list[Any]:
    """Evaluate a trace, wrappers opened; `run(eqn, values)` gives the results of each operation."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
    for eqn in jaxpr.eqns:
        values, inside = read(env, eqn.invars), wrapped(eqn)
        results = run(eqn, values) if inside is None else evaluate_inlined(*inside, values, run)
        env |= zip(eqn.outvars, results, strict=True)
    return read(env, jaxpr.outvars)


def _primitives(jaxpr: Any) -> Iterator[str]:
    """Names of all operations in a traced function, those inside loops, branches and calls included.

    And "symbolic_zeros" where there is a `jax.custom_vjp` that is told which of its inputs are perturbed.
    """
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.params.get("symbolic_zeros"):
            yield "symbolic_zeros"
        for inner, _ in subjaxprs(eqn):
            yield from _primitives(inner)
