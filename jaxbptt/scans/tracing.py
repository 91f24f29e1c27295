r"""A user's step as data: traced once into JAX's intermediate form, with everything it closes over made an argument.

A custom derivative sees only what is passed to it. A step such as `lambda _, h, x: jnp.tanh(W @ h + x)` hides `W` from
it; `close` finds `W` in the trace and hands it over, so that gradients reach it and no step is traced twice.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax

from jaxbptt.scans.recurrence import Recurrence, at_one_step


class ClosedParams(NamedTuple):
    """All a traced step depends on beside carry and x: array leaves of the params, and arrays it had closed over."""

    leaves: list[Any]
    closed_over: list[Any]


def close(recurrence: Recurrence) -> tuple[Any, Callable[..., Any], ClosedParams]:
    """Trace the step once.

    Returns:
        The traced jaxpr (with its constants as inputs), a step that evaluates it and closes over nothing, and the params
        to call it with. Leaves of the params that are not arrays (activation functions, strings) stay in the trace.
    """
    leaves, treedef = jax.tree.flatten(recurrence.params)
    dynamic = [_is_array(leaf) for leaf in leaves]

    def step(arrays, carry, x):
        arrays = iter(arrays)
        params = treedef.unflatten(
            [next(arrays) if d else leaf for d, leaf in zip(dynamic, leaves, strict=True)]
        )
        return recurrence.step(params, carry, x)

    arrays = [leaf for d, leaf in zip(dynamic, leaves, strict=True) if d]
    closed, shapes = jax.make_jaxpr(step, return_shape=True)(arrays, recurrence.init, at_one_step(recurrence.xs))
    out_tree = jax.tree.structure(shapes)

    def traced_step(params, carry, x):
        flat = jax.tree.leaves((params.leaves, carry, x))
        return out_tree.unflatten(jax.core.eval_jaxpr(closed.jaxpr, params.closed_over, *flat))

    return closed.jaxpr, traced_step, ClosedParams(arrays, list(closed.consts))


def primitives(jaxpr: Any) -> Iterator[str]:
    """Names of all operations in a traced function, those inside loops, branches and calls included."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for inner in subjaxprs(eqn):
            yield from primitives(inner)


def subjaxprs(eqn: Any) -> Iterator[Any]:
    """The traced functions inside one operation: a loop's body, a branch, a called function."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield getattr(item, "jaxpr", item)


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") or isinstance(leaf, bool | int | float | complex)
