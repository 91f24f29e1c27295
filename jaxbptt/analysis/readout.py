r"""A step taken apart into "the new carry" and "what is read off it".

∂L/∂hₜ counts both ways out of hₜ: the next step, and this step's own output. A step returns the two together, and its
output may be the state itself, or a read-out computed from it. Here the step's trace is evaluated a second time with the
new carry put in from outside, so that the output's dependence on it can be differentiated, whatever the step computes.
"""

import warnings
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import DropVar, Literal

from jaxbptt.programs.trace import TracedStep, bind, subjaxprs, wrapped


def readout(traced: TracedStep) -> Callable[..., Any]:
    """The output of a step as a function of the carry it arrives at.

    Returns:
        `(params, carry, x, new_carry) -> y`, equal to the step's own y where `new_carry` is the step's own. What y takes
        from elsewhere (x, the carry before) stays as it is.
    """

    def read(params, carry, x, new_carry):
        new = jax.tree.leaves(new_carry)
        replaced = {
            var: value
            for var, value in zip(traced.jaxpr.outvars[: len(new)], new, strict=True)
            if not isinstance(var, Literal)
        }
        inputs = jax.tree.leaves((params.leaves, carry, x))
        flat = _evaluate(traced.jaxpr, params.closed_over, inputs, replaced)
        _, y = traced.out_tree.unflatten(flat)
        return y

    return read


def _evaluate(jaxpr: Any, consts: list[Any], inputs: list[Any], replaced: dict[Any, Any]) -> list[Any]:
    """Evaluate a trace; a variable in `replaced` takes the value given there once it would have been computed."""
    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))

    def get(var):
        return var.val if isinstance(var, Literal) else env[var]

    for eqn in jaxpr.eqns:
        values = [get(var) for var in eqn.invars]
        inside = wrapped(eqn)
        if inside is not None:  # evaluated in place, to find the carry where it is computed
            inner, inner_consts = inside
            pairs = zip(inner.outvars, eqn.outvars, strict=True)
            inner_replaced = {i: replaced[o] for i, o in pairs if o in replaced and not isinstance(i, Literal)}
            results = _evaluate(inner, inner_consts, values, inner_replaced)
        else:
            results = bind(eqn, values)
            replaced = _with_copies(eqn, replaced)
        env |= {var: replaced.get(var, value) for var, value in zip(eqn.outvars, results, strict=True)}
    return [var.val if isinstance(var, Literal) else replaced.get(var, env[var]) for var in jaxpr.outvars]


def _with_copies(eqn: Any, replaced: dict[Any, Any]) -> dict[Any, Any]:
    """A branch, loop or custom derivative may return the new carry twice, as carry and as output: both are replaced."""
    inside = [jaxpr for jaxpr, _ in subjaxprs(eqn) if len(jaxpr.outvars) == len(eqn.outvars)]
    carries = [i for i, var in enumerate(eqn.outvars) if var in replaced]
    if not inside or not carries or len(eqn.outvars) == len(carries):
        return replaced
    replaced = dict(replaced)
    for j, var in enumerate(eqn.outvars):
        if var in replaced or isinstance(var, DropVar):
            continue
        copies = [i for i in carries if all(jaxpr.outvars[i] is jaxpr.outvars[j] for jaxpr in inside)]
        if copies:
            replaced[var] = replaced[eqn.outvars[copies[0]]]
        else:
            warnings.warn(
                f"The new carry and another result come out of one `{eqn.primitive.name}`: what the output reads of the new "
                "carry in there is not seen, and the immediate part of the adjoints leaves it out. Gradients are not "
                "affected. Read the output off the carry outside of it.",
                stacklevel=2,
            )
    return replaced
