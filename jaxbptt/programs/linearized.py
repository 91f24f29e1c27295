r"""The adjoint of any step, from its linearisation sorted by what depends on the carry.

A step h, x ↦ tanh(W h + U x) has the tangent map ḣ, ẋ, Ẇ, U̇ ↦ D (W ḣ + Ẇ h + U ẋ + U̇ x) with D = diag(1 − tanh²).
`sort_step` traces both and sorts the equations:

    forward     a = W h + U x;  y = tanh a       known before any tangent: run forward; D and h are residuals
    parallel    ṗ = Ẇ h + U ẋ + U̇ x              tangents of params and inputs alone: transposed for all t at once
    recurrent   q̇ = W ḣ;  ẏ = D (q̇ + ṗ)          what the carry's tangent goes through: transposed, it is the recursion
    delta       ṗ                                 where parallel tangents enter the recurrent part: its cotangent is δₜ

So the backward of a step is δ = D ȳ, h̄ = Wᵀ δ, and afterwards the contraction is the transpose of the parallel part at δ:
W̄ = Σ δ hᵀ, Ū = Σ δ xᵀ, x̄ = Uᵀ δ, single products over all time steps. Nothing of the step is computed twice but cheap
equations, which are rematerialised from residuals.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxbptt.array_types import as_type, assumed_size
from jaxbptt.programs.evaluate import evaluate, read, subjaxprs
from jaxbptt.programs.perturbed import Perturbed, PerturbedAdjoint, every_leaf
from jaxbptt.programs.program import Program, all_in, by_dependence, program, used, variables_read
from jaxbptt.programs.trace import TracedStep
from jaxbptt.trees import combine, differentiable, partition, select

# Rematerialised in the backward pass from residuals, and not stored.
_ARITHMETIC = {"add", "sub", "mul", "neg", "add_any", "max", "min", "square", "integer_pow", "one_minus_square"}
_CHOICE = {"sign", "abs", "select_n", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"}
_SHAPE = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "slice", "transpose", "iota"}
_CHEAP = _ARITHMETIC | _CHOICE | _SHAPE | {"convert_element_type", "stop_gradient", "copy"}
# Numbers in the deltas of a step for each number that its linearisation reads, at most. The cells have below 1.
_MAX_DELTA_RATIO = 3


class SortedStep(NamedTuple):
    """A step and its linearisation as equations, sorted. All `…_vars` are variables of `program`.

    The step is affine in the carry where the recurrent equations read nothing that the forward equations compute from it.

    Attributes:
        program: the step and its tangents as one traced function.
        perturbed: the leaves of (params, carry, x) that have a tangent.
        forward_eqns: those of the step itself, in order.
        parallel_eqns: those that tangents of params and inputs alone go through.
        recurrent_eqns: those that the tangent of the carry goes through.
        delta_vars: the parallel tangents that recurrent equations read; their cotangents are δₜ.
        residual_vars: what the forward pass saves.
        cheap_eqns: those of the forward equations that are rematerialised from residuals.
        input_vars: of (params, carry, x).
        output_vars: of the leaves of (carry, y).
        tangent_vars: of the tangents of (params, carry, x), `None` where a leaf has none.
        tangent_ends: (number, variable) of each tangent of (carry, y) that is not 0, numbered among those that have one.
    """

    program: Program
    perturbed: Perturbed
    forward_eqns: list[Any]
    parallel_eqns: list[Any]
    recurrent_eqns: list[Any]
    delta_vars: list[Any]
    residual_vars: list[Any]
    cheap_eqns: list[Any]
    input_vars: Any
    output_vars: list[Any]
    tangent_vars: Any
    tangent_ends: list[tuple[int, Any]]

    @property
    def outputs(self) -> tuple[Any, Any]:
        """The variables of (carry, y), in the structure of the two."""
        return self.program.out_tree.children()[0].unflatten(self.output_vars)

    def env(self, params: Any, residuals: list[Any], x: Any) -> dict[Any, Any]:
        """The values that the linearisation at a step reads."""
        env = self.program.consts | _env((self.input_vars[0], self.input_vars[2]), (params, x))
        return evaluate(self.cheap_eqns, env | dict(zip(self.residual_vars, residuals, strict=True)))

    def for_outputs(self, carry_used: Any, ys_used: Any) -> "SortedStep":
        """What of it leads to the leaves of (carry, y) that are flagged; of the carry's leaves, those alone have a tangent."""
        _, y = self.outputs
        has_tangent = every_leaf(jax.tree.map(lambda var: var.aval, y))
        flagged = _flat(carry_used, self.perturbed.carry) + _flat(ys_used, has_tangent)
        number = {i: k for k, i in enumerate(i for i, flag in enumerate(flagged) if flag)}
        ends = [(number[i], var) for i, var in self.tangent_ends if flagged[i]]
        eqns = used(self.recurrent_eqns, [var for _, var in ends])
        read_here = variables_read(eqns) | {var for _, var in ends}
        params, carry, x = self.tangent_vars
        return self._replace(
            perturbed=self.perturbed._replace(carry=carry_used),
            recurrent_eqns=eqns,
            delta_vars=[var for var in self.delta_vars if var in read_here],
            tangent_vars=(params, select(carry, carry_used), x),
            tangent_ends=ends,
        )


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


def sort_step(traced: TracedStep, perturbed: Perturbed) -> SortedStep | None:
    """Linearise a traced step and sort its equations; `None` where a tangent goes through a loop, a branch or a custom_vjp."""
    whole = _with_tangents(traced, perturbed)
    count = len(jax.tree.leaves(traced.shapes))
    input_vars = jax.tree.unflatten(jax.tree.structure(traced.shapes), whole.inputs[:count])
    shapes = select(traced.shapes, tuple(perturbed))
    tangent_vars = jax.tree.unflatten(jax.tree.structure(shapes), whole.inputs[count:])
    outputs = whole.results[: whole.out_tree.children()[0].num_leaves]
    tangents = whole.results[len(outputs) :]

    forward = by_dependence(whole.eqns, [*whole.consts, *whole.inputs[:count]], with_effects=True)
    known, tangent_eqns = forward.variables, forward.unknown
    if not all_in(outputs, known) or any(map(_is_opaque, tangent_eqns)):
        return None
    beside_carry = jax.tree.leaves((tangent_vars[0], tangent_vars[2]))
    parallel = by_dependence(tangent_eqns, {*known, *beside_carry})
    parallel_eqns, recurrent_eqns, parallel_vars = _splits_inside(parallel.known, parallel.unknown, parallel.variables)
    parallel_vars = parallel_vars - known
    # Where tangents of params and inputs enter the recursion, in order and each once.
    entering = [var for eqn in recurrent_eqns for var in eqn.invars] + tangents
    deltas = dict.fromkeys(var for var in entering if not isinstance(var, Literal) and var in parallel_vars)

    read_by_tangents = [
        var for eqn in tangent_eqns for var in eqn.invars if not isinstance(var, Literal) and var in known
    ]
    residuals, cheap = _residuals(whole, forward.known, input_vars, outputs, dict.fromkeys(read_by_tangents))
    return SortedStep(
        program=whole,
        perturbed=perturbed,
        forward_eqns=forward.known,
        parallel_eqns=parallel_eqns,
        recurrent_eqns=recurrent_eqns,
        delta_vars=list(deltas),
        residual_vars=residuals,
        cheap_eqns=cheap,
        input_vars=input_vars,
        output_vars=outputs,
        tangent_vars=tangent_vars,
        tangent_ends=[(i, var) for i, var in enumerate(tangents) if not all_in([var], known)],
    )


def build_forward(step: SortedStep) -> Callable[..., Any]:
    """`(params, carry, x) -> ((carry, y), residuals)`."""

    def forward(params, carry, x):
        env = evaluate(step.forward_eqns, step.program.consts | _env(step.input_vars, (params, carry, x)))
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
            tangents = dict(zip(step.delta_vars, delta_tangents, strict=True)) | _env(carry_vars, carry_tangent)
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
                env = step.env(params, residuals, x) | _env((params_vars, x_vars), (params_tangent, x_tangent))
                return read(evaluate(step.parallel_eqns, env), step.delta_vars)

            return jax.vmap(at_t, axis_size=deltas[0].shape[0])(residuals, xs, xs_tangent)

        params_types = jax.tree.map(lambda var: as_type(var.aval), params_vars)
        xs_types = jax.tree.map(lambda leaf: as_type(jax.typeof(leaf)), select(xs, flags.x))
        return jax.linear_transpose(parallel, params_types, xs_types)(deltas)

    return contract


def _with_tangents(traced: TracedStep, perturbed: Perturbed) -> Program:
    """The step and its tangents as one program: `(primals, tangents) -> (outputs, tangents)`."""

    def with_tangents(primals, tangents):
        diff, nondiff = partition(primals, flags=tuple(perturbed))

        def step(*diff):
            new_carry, y = traced.step(*combine(diff, nondiff))
            return (select(new_carry, perturbed.carry), differentiable(y)), (new_carry, y)

        _, tangents, outputs = jax.jvp(step, diff, tangents, has_aux=True)
        return outputs, tangents

    return program(with_tangents, traced.shapes, select(traced.shapes, tuple(perturbed)))


def _splits_inside(
    parallel_eqns: list[Any], recurrent_eqns: list[Any], parallel_vars: set[Any]
) -> tuple[list[Any], list[Any], set[Any]]:
    """The same, with `split`s of a tangent that is only read in the recursion moved there: the whole is one δₜ."""
    read_by_recurrent, read_by_parallel = variables_read(recurrent_eqns), variables_read(parallel_eqns)
    splits = [
        eqn
        for eqn in parallel_eqns
        if eqn.primitive.name == "split"
        and read_by_recurrent.issuperset(eqn.outvars)
        and read_by_parallel.isdisjoint(eqn.outvars)
    ]
    results = {var for eqn in splits for var in eqn.outvars}
    left = [eqn for eqn in parallel_eqns if results.isdisjoint(eqn.outvars)]
    return left, [*splits, *recurrent_eqns], parallel_vars - results


def _pays(step: SortedStep) -> bool:
    """Whether the deltas are not much larger than what the linearisation reads of a step."""
    _, _, of_params = by_dependence(step.forward_eqns, _of_params(step.program, step.input_vars))
    tangent_eqns = [*step.parallel_eqns, *step.recurrent_eqns]
    known = {*jax.tree.leaves(step.input_vars), *(var for eqn in step.forward_eqns for var in eqn.outvars)}
    at_a_step = {var for var in variables_read(tangent_eqns) if var in known and var not in of_params}
    return _numbers(step.delta_vars) <= _MAX_DELTA_RATIO * (_numbers(at_a_step) + _numbers(step.output_vars))


def _residuals(
    whole: Program, forward_eqns: list[Any], input_vars: Any, output_vars: list[Any], wanted: dict[Any, None]
) -> tuple[list[Any], list[Any]]:
    """Which variables to save, so that all `wanted` ones are cheap to rematerialise, and the equations that do so.

    What depends on params alone is not saved, since a loop computes it once, and outputs are stored anyway; results of
    products and transcendental functions are saved, and sums and the like only where one of their operands is not at hand.
    """
    _, _, free = by_dependence(forward_eqns, _of_params(whole, input_vars))
    free.update(jax.tree.leaves(input_vars[2]))
    _, y = whole.out_tree.children()[0].unflatten(output_vars)
    outputs = {var for var in jax.tree.leaves(y) if not isinstance(var, Literal)} - free

    cheap = {var for eqn in forward_eqns if eqn.primitive.name in _CHEAP for var in eqn.outvars} - outputs - free
    saved = dict.fromkeys(var for var in wanted if var not in free and var not in cheap)
    at_hand = {*free, *outputs, *saved}
    for eqn in forward_eqns:
        if all_in(eqn.invars, at_hand):
            at_hand.update(cheap.intersection(eqn.outvars))
        else:
            missing = [var for var in eqn.outvars if var in cheap and var in wanted]
            saved |= dict.fromkeys(missing)
            at_hand.update(missing)
    # Backwards from what is wanted: the equations that lead to it, and the outputs that these read.
    needed, rematerialised = {var for var in wanted if var not in saved}, []
    for eqn in reversed(forward_eqns):
        if needed & set(eqn.outvars):
            rematerialised.append(eqn)
            operands = [var for var in eqn.invars if not isinstance(var, Literal)]
            saved |= dict.fromkeys(var for var in operands if var in outputs)
            needed.update(var for var in operands if var not in saved)
    return list(saved), rematerialised[::-1]


def _of_params(whole: Program, input_vars: Any) -> list[Any]:
    return [*whole.consts, *jax.tree.leaves(input_vars[0])]


def _is_opaque(eqn: Any) -> bool:
    """Whether an equation holds a program of its own; that of a scatter only says how two numbers are combined."""
    kind = eqn.primitive.name
    return kind == "custom_lin" or (not kind.startswith("scatter") and any(True for _ in subjaxprs(eqn)))


def _flat(flags: Any, among: Any) -> list[bool]:
    """Flags of the leaves that are flagged in `among`, in order."""
    return [flag for flag, counts in zip(jax.tree.leaves(flags), jax.tree.leaves(among), strict=True) if counts]


def _numbers(variables: Iterable[Any]) -> int:
    return sum(math.prod(map(assumed_size, var.aval.shape)) for var in variables)


def _env(variables: Any, values: Any) -> dict[Any, Any]:
    """Values by variable, for two trees of the same structure."""
    return dict(zip(jax.tree.leaves(variables), jax.tree.leaves(values), strict=True))
