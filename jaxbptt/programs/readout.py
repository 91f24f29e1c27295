r"""The output of a step as a function of its new carry.

hₜ reaches the loss through the next step and through this step's own output. A step returns the two together, and its
output may be the state itself, or a read-out computed from it. Here the step's trace is evaluated a second time with the
new carry replaced by an argument, so that the output can be differentiated with respect to it, whatever the step computes.
"""

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import DropVar, Literal
from jax.interpreters.partial_eval import dce_jaxpr

from jaxbptt.programs.evaluate import bind, evaluate, read, subjaxprs, wrapped
from jaxbptt.programs.trace import TracedStep
from jaxbptt.trees import combine, partition


def readout(traced: TracedStep) -> Callable[..., Any]:
    """The output of a step as a function of the carry it arrives at.

    Returns:
        `(params, carry, x, new_carry) -> y`, equal to the step's own y where `new_carry` is the step's own. What y takes
        from elsewhere (x, the carry before) stays as it is.
    """

    def output(params, carry, x, new_carry):
        new = jax.tree.leaves(new_carry)
        variables = traced.jaxpr.outvars[: len(new)]
        replaced = {var: value for var, value in zip(variables, new, strict=True) if not isinstance(var, Literal)}
        inputs = jax.tree.leaves((params.leaves, carry, x))
        _, y = traced.out_tree.unflatten(_substituted(traced.jaxpr, params.closed_over, inputs, replaced))
        return y

    return output


class Reads(NamedTuple):
    """What outputs read directly, and not only through what stands before it here."""

    new_carry: bool
    old_carry: bool
    params: bool


class Readout(NamedTuple):
    """Where the outputs that a loss uses come from.

    Attributes:
        traced: the step.
        wanted: for each leaf of the params whether its cotangent is asked for.
        kept: the same for the carry, before and after the step.
        used: like the outputs, `None` in the place of those that the loss does not use.
    """

    traced: TracedStep
    wanted: Any
    kept: Any
    used: Any

    def pull(self, params: Any, carry: Any, x: Any, new_carry: Any, y_bar: Any) -> tuple[Any, Any, Any]:
        """Cotangents of the params, of the carry, and of the new carry."""
        diff, nondiff = partition((params, carry, new_carry), flags=(self.wanted, self.kept, self.kept))

        def outputs(diff):
            params, carry, new_carry = combine(diff, nondiff)
            return self._outputs(params, carry, x, new_carry)

        _, vjp = jax.vjp(outputs, diff)
        return vjp(jax.tree.leaves(y_bar))[0]

    def reads(self, params: Any, carry: Any, x: Any) -> Reads:
        """What can have a cotangent at all."""
        args = params, carry, x, carry
        closed = jax.make_jaxpr(self._outputs)(*args)
        _, used = dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
        of_params, of_carry, _, of_new = jax.tree.unflatten(jax.tree.structure(args), used)
        wanted = jax.tree.map(lambda a, b: a and b, of_params, self.wanted)
        return Reads(*(any(jax.tree.leaves(flags)) for flags in (of_new, of_carry, wanted)))

    def _outputs(self, *args: Any) -> list[Any]:
        leaves, treedef = jax.tree.flatten(readout(self.traced)(*args))
        return [leaf for leaf, bar in zip(leaves, treedef.flatten_up_to(self.used), strict=True) if bar is not None]


def _substituted(jaxpr: Any, consts: list[Any], inputs: list[Any], replaced: dict[Any, Any]) -> list[Any]:
    """The results of a trace, where a variable in `replaced` takes the value given there as soon as it is computed."""
    replaced = dict(replaced)

    def run(eqn, values):
        inside = wrapped(eqn)
        if inside is None:
            results = bind(eqn, values)
            replaced.update(_copies(eqn, replaced))
        else:  # opened, to find the carry where it is computed
            inner, inner_consts = inside
            pairs = zip(inner.outvars, eqn.outvars, strict=True)
            inner_replaced = {i: replaced[o] for i, o in pairs if o in replaced and not isinstance(i, Literal)}
            results = _substituted(inner, inner_consts, values, inner_replaced)
        return [replaced.get(var, value) for var, value in zip(eqn.outvars, results, strict=True)]

    env = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *inputs), strict=True))
    # Once more at the end, for a carry that is an input and not computed.
    return read(evaluate(jaxpr.eqns, env, run) | replaced, jaxpr.outvars)


def _copies(eqn: Any, replaced: dict[Any, Any]) -> dict[Any, Any]:
    """A branch, loop or custom derivative may return the new carry as an output as well: that is replaced too."""
    inside = [jaxpr for jaxpr, _ in subjaxprs(eqn) if len(jaxpr.outvars) == len(eqn.outvars)]
    carries = [i for i, var in enumerate(eqn.outvars) if var in replaced]
    if not inside or not carries or len(eqn.outvars) == len(carries):
        return {}
    copied = {}
    for j, var in enumerate(eqn.outvars):
        if var in replaced or isinstance(var, DropVar):
            continue
        copies = [i for i in carries if all(jaxpr.outvars[i] is jaxpr.outvars[j] for jaxpr in inside)]
        if copies:
            copied[var] = replaced[eqn.outvars[copies[0]]]
        else:
            warnings.warn(
                f"The new carry and another result come out of one `{eqn.primitive.name}`: what the output reads of the new "
                "carry in there is not seen, and the immediate part of the adjoints leaves it out. Gradients are not "
                "affected. Read the output off the carry outside of it.",
                stacklevel=2,
            )
    return copied
