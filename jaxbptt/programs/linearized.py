r"""The adjoint of any step, from its linearisation: the recurrent part transposed in a loop, the parallel part after it.

Nothing of the step is computed twice but cheap equations, which are rematerialised from residuals.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt.array_types import as_type, assumed_size
from jaxbptt.programs.evaluate import evaluate, read
from jaxbptt.programs.perturbed import Perturbed, PerturbedAdjoint, every_leaf
from jaxbptt.programs.program import by_dependence, variables_read
from jaxbptt.programs.sorted_step import SortedStep, env_of, sort_step
from jaxbptt.programs.trace import TracedStep
from jaxbptt.trees import select

# Numbers in the deltas of a step for each number that its linearisation reads, at most. The cells have below 1.
_MAX_DELTA_RATIO = 3


def linearized(traced: TracedStep, perturbed: Perturbed) -> PerturbedAdjoint | None:
    """The adjoint of a traced step for the leaves that are perturbed, those of the carry at any step included.

    If the differentiated path contains a loop, a branch or a custom_vjp, it is `None`: there we fall back to `jax.vjp` and
    recompute the step. So it is where sorting would not pay: where the tangent of something as large as a table of params
    enters the recursion itself, and δₜ would be as large, for every time step.
    """
    whole = sort_step(traced, perturbed)
    if whole is None or not _pays(whole):
        return None
    forward = build_forward(whole)

    def for_outputs(carry_used, ys_used):
        """The adjoint of the leaves of the carry and of the outputs that are flagged."""
        step = whole.for_outputs(carry_used, ys_used)
        adjoint = PerturbedAdjoint(forward, build_backward(step), build_contract(step), step.perturbed)
        return adjoint._replace(for_outputs=for_outputs)

    return for_outputs(perturbed.carry, every_leaf(jax.tree.map(lambda var: var.aval, whole.outputs[1])))


def build_forward(step: SortedStep) -> Callable[..., Any]:
    """`(params, carry, x) -> ((carry, y), residuals)`."""

    def forward(params, carry, x):
        env = evaluate(step.forward_eqns, step.program.consts | env_of(step.input_vars, (params, carry, x)))
        new_carry, y = step.program.out_tree.children()[0].unflatten(read(env, step.output_vars))
        return (new_carry, y), read(env, step.residual_vars)

    return forward


def build_backward(step: SortedStep) -> Callable[..., Any]:
    """`(params, residuals, x, carry_bar, y_bar) -> (carry_bar before the step, deltas)`: the recurrent part, transposed."""
    _, carry_vars, _ = step.tangent_vars
    tangent_types = [as_type(var.aval) for var in step.delta_vars], jax.tree.map(lambda v: as_type(v.aval), carry_vars)

    def backward(params, residuals, x, carry_bar, y_bar):
        env = step.env(params, residuals, x)

        def recurrent(delta_tangents, carry_tangent):
            tangents = dict(zip(step.delta_vars, delta_tangents, strict=True)) | env_of(carry_vars, carry_tangent)
            return read(evaluate(step.recurrent_eqns, env | tangents), (var for _, var in step.tangent_ends))

        bars = jax.tree.leaves((carry_bar, y_bar))
        transposed = jax.linear_transpose(recurrent, *tangent_types)
        deltas, previous_bar = transposed([bars[i] for i, _ in step.tangent_ends])
        return previous_bar, deltas

    return backward


def build_contract(step: SortedStep) -> Callable[..., Any]:
    """`(params, residuals, xs, ys_bar, deltas) -> (params_bar, xs_bar)`: the parallel part of all time steps, transposed."""
    flags = step.perturbed
    params_vars, _, x_vars = step.tangent_vars

    def contract(params, residuals, xs, ys_bar, deltas):
        if not step.delta_vars:
            return jax.tree.map(jnp.zeros_like, (select(params, flags.params), select(xs, flags.x)))

        def parallel(params_tangent, xs_tangent):
            def at_t(residuals, x, x_tangent):
                env = step.env(params, residuals, x) | env_of((params_vars, x_vars), (params_tangent, x_tangent))
                return read(evaluate(step.parallel_eqns, env), step.delta_vars)

            return jax.vmap(at_t, axis_size=deltas[0].shape[0])(residuals, xs, xs_tangent)

        params_types = jax.tree.map(lambda var: as_type(var.aval), params_vars)
        xs_types = jax.tree.map(lambda leaf: as_type(jax.typeof(leaf)), select(xs, flags.x))
        return jax.linear_transpose(parallel, params_types, xs_types)(deltas)

    return contract


def _pays(step: SortedStep) -> bool:
    """Whether the deltas are not much larger than what the linearisation reads of a step."""
    _, _, of_params = by_dependence(step.forward_eqns, step.constants)
    tangent_eqns = [*step.parallel_eqns, *step.recurrent_eqns]
    known = {*jax.tree.leaves(step.input_vars), *(var for eqn in step.forward_eqns for var in eqn.outvars)}
    at_a_step = {var for var in variables_read(tangent_eqns) if var in known and var not in of_params}
    return _numbers(step.delta_vars) <= _MAX_DELTA_RATIO * (_numbers(at_a_step) + _numbers(step.output_vars))


def _numbers(variables: Iterable[Any]) -> int:
    return sum(math.prod(map(assumed_size, var.aval.shape)) for var in variables)
