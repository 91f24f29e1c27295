r"""The backward of any step, taken apart by what depends on the carry.

The step's linearisation is traced, and its operations are sorted. What the tangent of the carry goes through must run in
sequence; transposed, it is the recursion, and the adjoint of each place where another tangent flows into it is a δₜ. What
the tangents of params and inputs alone go through is transposed afterwards, for all time steps at once: there the weight
gradients become single products. Nothing of the step is computed twice but cheap operations on values that are kept.
"""

import math
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxbptt.array_types import as_type, assumed_size
from jaxbptt.programs.parts import evaluate, fixed_by, program, used
from jaxbptt.programs.perturbed import Perturbed, PerturbedAdjoint, every_leaf
from jaxbptt.programs.trace import TracedStep, read, subjaxprs
from jaxbptt.trees import combine, differentiable, partition, select

# Computed again on the way back from what is kept, in place of being kept.
_ARITHMETIC = {"add", "sub", "mul", "neg", "add_any", "max", "min", "square", "integer_pow", "one_minus_square"}
_CHOICE = {"sign", "abs", "select_n", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"}
_SHAPE = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "slice", "transpose", "iota"}
# Numbers in the places where tangents enter the recursion, for each one that the linearisation reads at a step. Cells: below 1.
_MOST = 3
_CHEAP = _ARITHMETIC | _CHOICE | _SHAPE | {"convert_element_type", "stop_gradient", "copy"}


def linearized(traced: TracedStep, perturbed: Perturbed) -> PerturbedAdjoint | None:
    """The adjoint of a traced step for the leaves that are perturbed, those of the carry at any step included.

    `None` where the trace can't be sorted: where tangents go through loops, branches or a custom reverse-mode derivative.
    And where it would not pay: where the tangent of something as large as a table of params enters the recursion itself,
    and δₜ would be as large, for every time step.
    """
    primals = traced.shapes
    diff = select(primals, tuple(perturbed))
    params_t, carry_t, _ = diff

    def both(primals, tangents):
        diff, nondiff = partition(primals, flags=tuple(perturbed))

        def step(*diff):
            new_carry, y = traced.step(*combine(diff, nondiff))
            return (select(new_carry, perturbed.carry), differentiable(y)), (new_carry, y)

        _, tangents, outputs = jax.jvp(step, diff, tangents, has_aux=True)
        return outputs, tangents

    whole = program(both, primals, diff)
    count = len(jax.tree.leaves(primals))
    places = jax.tree.unflatten(jax.tree.structure(diff), whole.inputs[count:])
    outputs = whole.results[: whole.out_tree.children()[0].num_leaves]
    tangents = whole.results[len(outputs) :]

    inputs = jax.tree.unflatten(jax.tree.structure(primals), whole.inputs[:count])
    primal = [*whole.consts, *whole.inputs[:count]]
    forward_eqns, tangent_eqns, settled = fixed_by(whole.eqns, primal, with_effects=True)
    if not _all_in(outputs, settled) or any(map(_is_opaque, tangent_eqns)):
        return None
    beside = jax.tree.leaves((places[0], places[2]))
    outside_eqns, loop_eqns, outside = fixed_by(tangent_eqns, {*settled, *beside})
    outside -= settled
    # Pieces of one array that all enter the recursion enter it as that array: its δₜ is one.
    read_inside, read_outside = (_reads(eqns) for eqns in (loop_eqns, outside_eqns))
    whole_ones = [
        eqn
        for eqn in outside_eqns
        if eqn.primitive.name == "split"
        and read_inside.issuperset(eqn.outvars)
        and read_outside.isdisjoint(eqn.outvars)
    ]
    pieces = {var for eqn in whole_ones for var in eqn.outvars}
    outside_eqns = [eqn for eqn in outside_eqns if pieces.isdisjoint(eqn.outvars)]
    loop_eqns = [*whole_ones, *loop_eqns]
    outside -= pieces
    # Where tangents of params and inputs flow into the recursion, in order and each once.
    flow = [var for eqn in loop_eqns for var in eqn.invars] + tangents
    entries = list(dict.fromkeys(var for var in flow if not isinstance(var, Literal) and var in outside))
    leaving = [(i, var) for i, var in enumerate(tangents) if not _all_in([var], settled)]

    wanted = [var for eqn in tangent_eqns for var in eqn.invars if not isinstance(var, Literal) and var in settled]
    fixed = [*whole.consts, *jax.tree.leaves(inputs[0])]
    _, y = whole.out_tree.children()[0].unflatten(outputs)
    differentiable_ys = every_leaf(jax.tree.map(lambda var: var.aval, y))
    kept, again = _kept(forward_eqns, fixed, jax.tree.leaves(inputs[2]), jax.tree.leaves(y), dict.fromkeys(wanted))

    _, _, constant = fixed_by(forward_eqns, fixed)
    at_a_step = {var for var in wanted if var not in constant}
    if _numbers(entries) > _MOST * (_numbers(at_a_step) + _numbers(outputs)):
        return None

    def values(params, residuals, x):
        env = whole.consts | _env((inputs[0], inputs[2]), (params, x)) | dict(zip(kept, residuals, strict=True))
        return evaluate(again, env)

    def forward(params, carry, x):
        env = evaluate(forward_eqns, whole.consts | _env(inputs, (params, carry, x)))
        new_carry, y = whole.out_tree.children()[0].unflatten(read(env, outputs))
        return (new_carry, y), read(env, kept)

    def for_outputs(carry_used, ys_used):
        """The adjoint of the leaves of the carry and of the outputs that are flagged."""
        flags = perturbed._replace(carry=carry_used)
        carry_tangents, carry_types = select(places[1], carry_used), select(carry_t, carry_used)
        flagged = _flat(carry_used, perturbed.carry) + _flat(ys_used, differentiable_ys)
        bar_of = {i: number for number, i in enumerate(i for i, flag in enumerate(flagged) if flag)}
        ends = [(bar_of[i], var) for i, var in leaving if flagged[i]]
        eqns = used(loop_eqns, [var for _, var in ends])
        read_here = _reads(eqns) | {var for _, var in ends}
        entering = [var for var in entries if var in read_here]

        def backward(params, residuals, x, carry_bar, y_bar):
            env = values(params, residuals, x)

            def recursion(tangents, carry_tangent):
                inside = env | dict(zip(entering, tangents, strict=True)) | _env(carry_tangents, carry_tangent)
                return read(evaluate(eqns, inside), (var for _, var in ends))

            bars = jax.tree.leaves((carry_bar, y_bar))
            transposed = jax.linear_transpose(recursion, [as_type(var.aval) for var in entering], carry_types)
            deltas, previous_bar = transposed([bars[i] for i, _ in ends])
            return previous_bar, deltas

        def contract(params, residuals, xs, ys_bar, deltas):
            steps = jax.tree.map(lambda leaf: as_type(jax.typeof(leaf)), select(xs, flags.x))
            if not entering:
                return jax.tree.map(jnp.zeros_like, (select(params, flags.params), select(xs, flags.x)))

            def tangents(params_tangent, xs_tangent):
                def at_t(residuals, x, x_tangent):
                    env = values(params, residuals, x) | _env((places[0], places[2]), (params_tangent, x_tangent))
                    return read(evaluate(outside_eqns, env), entering)

                return jax.vmap(at_t, axis_size=deltas[0].shape[0])(residuals, xs, xs_tangent)

            return jax.linear_transpose(tangents, params_t, steps)(deltas)

        return PerturbedAdjoint(forward, backward, contract, flags, for_outputs=for_outputs)

    return for_outputs(perturbed.carry, differentiable_ys)


def _flat(flags: Any, among: Any) -> list[bool]:
    """Flags of the leaves that are flagged in `among`, in order."""
    both = zip(jax.tree.leaves(flags), jax.tree.leaves(among), strict=True)
    return [flag for flag, counts in both if counts]


def _kept(
    eqns: list[Any], fixed: list[Any], x: list[Any], ys: list[Any], wanted: dict[Any, None]
) -> tuple[list[Any], list[Any]]:
    """Which variables to keep, so that all `wanted` ones can be had again cheaply, and the operations that do so.

    What depends on params alone is had again, since a loop computes it once, and outputs are kept anyway; results of
    products and transcendental functions are kept, and sums and the like only where something they are made of is not.
    """
    _, _, free = fixed_by(eqns, fixed)
    free.update(x)
    outputs = {var for var in ys if not isinstance(var, Literal)} - free

    cheap = {var for eqn in eqns if eqn.primitive.name in _CHEAP for var in eqn.outvars} - outputs - free
    kept = dict.fromkeys(var for var in wanted if var not in free and var not in cheap)
    at_hand = {*free, *outputs, *kept}
    for eqn in eqns:
        if all(isinstance(var, Literal) or var in at_hand for var in eqn.invars):
            at_hand.update(cheap.intersection(eqn.outvars))
        else:
            missing = [var for var in eqn.outvars if var in cheap and var in wanted]
            kept |= dict.fromkeys(missing)
            at_hand.update(missing)
    needed, again = {var for var in wanted if var not in kept}, []
    for eqn in reversed(eqns):
        if needed & set(eqn.outvars):
            again.append(eqn)
            sources = [var for var in eqn.invars if not isinstance(var, Literal)]
            kept |= dict.fromkeys(var for var in sources if var in outputs)
            needed.update(var for var in sources if var not in kept)
    return list(kept), again[::-1]


def _is_opaque(eqn: Any) -> bool:
    """Whether an operation holds a program of its own; that of a scatter only says how two numbers are combined."""
    kind = eqn.primitive.name
    return kind == "custom_lin" or (not kind.startswith("scatter") and any(True for _ in subjaxprs(eqn)))


def _reads(eqns: Iterable[Any]) -> set[Any]:
    return {var for eqn in eqns for var in eqn.invars if not isinstance(var, Literal)}


def _numbers(variables: Iterable[Any]) -> int:
    return sum(math.prod(map(assumed_size, var.aval.shape)) for var in variables)


def _all_in(variables: list[Any], assumed_size: set[Any]) -> bool:
    return all(isinstance(var, Literal) or var in assumed_size for var in variables)


def _env(variables: Any, values: Any) -> dict[Any, Any]:
    """Values by variable, for two trees of the same structure."""
    return dict(zip(jax.tree.leaves(variables), jax.tree.leaves(values), strict=True))
