r"""The one evaluator of traced programs. A hook, `run`, says what becomes of each equation; by default it is computed.

Whatever rewrites a program is such a hook: opening calls that only wrap a function, reading a weight in another layout,
substituting another value for a variable.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

from jax.extend import source_info_util
from jax.extend.core import Literal

Run = Callable[[Any, list[Any]], list[Any]]

# Calls that only wrap a function: their inside can be evaluated in place.
_WRAPPERS = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2"}


def bind(eqn: Any, values: list[Any], **changed: Any) -> list[Any]:
    """The results of one equation, as JAX computes them: on its mesh, and under the user's name scope and line.

    With other parameters where any are given.
    """
    with _user_scope(eqn), eqn.ctx.manager:
        results = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params | changed))
    return results if eqn.primitive.multiple_results else [results]


def read(env: dict[Any, Any], variables: Iterable[Any]) -> list[Any]:
    """The values of some variables; a literal is its own."""
    return [var.val if isinstance(var, Literal) else env[var] for var in variables]


def evaluate(eqns: Iterable[Any], env: dict[Any, Any], run: Run = bind) -> dict[Any, Any]:
    """The values of variables after these equations, those of `env` included."""
    env = dict(env)
    for eqn in eqns:
        env |= zip(eqn.outvars, run(eqn, read(env, eqn.invars)), strict=True)
    return env


def evaluate_jaxpr(jaxpr: Any, consts: list[Any], inputs: list[Any], run: Run = bind) -> list[Any]:
    """The results of a traced function."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
    return read(evaluate(jaxpr.eqns, env, run), jaxpr.outvars)


def opening_wrappers(run: Run) -> Run:
    """The hook that evaluates the inside of wrappers in place, by `run`."""

    def opened(eqn, values):
        inside = wrapped(eqn)
        if inside is None:
            return run(eqn, values)
        with _user_scope(eqn):
            return evaluate_jaxpr(*inside, values, opened)

    return opened


def _user_scope(eqn: Any) -> AbstractContextManager[Any]:
    """The name scope and the line of the user's code that an equation comes from."""
    source = eqn.source_info
    scope = source_info_util.current_name_stack() + source.name_stack
    return source_info_util.user_context(source.traceback, name_stack=scope)


def subjaxprs(eqn: Any) -> Iterator[tuple[Any, list[Any]]]:
    """The traced functions inside one equation (a loop's body, a branch, a called function), with their constants."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield getattr(item, "jaxpr", item), list(getattr(item, "consts", ()))


def wrapped(eqn: Any) -> tuple[Any, list[Any]] | None:
    """The traced function, with its constants, of an equation that only wraps one; `None` for any other equation."""
    return next(subjaxprs(eqn), None) if eqn.primitive.name in _WRAPPERS else None
