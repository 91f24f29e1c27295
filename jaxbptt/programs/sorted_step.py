r"""A step and its linearisation as equations, sorted by what depends on the carry.

A step h, x ↦ tanh(W h + U x) has the tangent map ḣ, ẋ, Ẇ, U̇ ↦ D (W ḣ + Ẇ h + U ẋ + U̇ x) with D = diag(1 − tanh²).
`sort_step` traces both and sorts the equations:

    forward     a = W h + U x;  y = tanh a       known before any tangent: run forward; D and h are residuals
    parallel    ṗ = Ẇ h + U ẋ + U̇ x              tangents of params and inputs alone: transposed for all t at once
    recurrent   q̇ = W ḣ;  ẏ = D (q̇ + ṗ)          what the carry's tangent goes through: transposed, it is the recursion
    delta       ṗ                                 where parallel tangents enter the recurrent part: its cotangent is δₜ

`linearized` transposes the recurrent part, δ = D ȳ and h̄ = Wᵀ δ, in the loop, and the parallel part at δ once for all time
steps: W̄ = Σ δ hᵀ, Ū = Σ δ xᵀ, x̄ = Uᵀ δ.
"""

from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from jaxbptt.programs.evaluate import evaluate, subjaxprs
from jaxbptt.programs.perturbed import Perturbed, every_leaf
from jaxbptt.programs.program import Program, all_in, by_dependence, program, used, variables_read
from jaxbptt.programs.trace import TracedStep
from jaxbptt.trees import combine, differentiable, partition, select

# Rematerialised in the backward pass from residuals, and not stored.
_ARITHMETIC = {"add", "sub", "mul", "neg", "add_any", "max", "min", "square", "integer_pow", "one_minus_square"}
_CHOICE = {"sign", "abs", "select_n", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not"}
_SHAPE = {"broadcast_in_dim", "reshape", "squeeze", "expand_dims", "slice", "transpose", "iota"}
_CHEAP = _ARITHMETIC | _CHOICE | _SHAPE | {"convert_element_type", "stop_gradient", "copy"}


class SortedStep(NamedTuple):
    """A step and its linearisation as equations, sorted. All `…_vars` are variables of `program`.

    The step is affine in the carry where the recurrent equations read neither the carry nor anything that the forward
    equations compute from it.

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

    @property
    def constants(self) -> list[Any]:
        """The variables that are the same at every step: of params and of constants."""
        return _constants(self.program, self.input_vars)

    def env(self, params: Any, residuals: list[Any], x: Any) -> dict[Any, Any]:
        """The values that the linearisation at a step reads."""
        env = self.program.consts | env_of((self.input_vars[0], self.input_vars[2]), (params, x))
        return evaluate(self.cheap_eqns, env | dict(zip(self.residual_vars, residuals, strict=True)))

    def for_outputs(self, carry_used: Any, ys_used: Any) -> "SortedStep":
        """Only what leads to the leaves of (carry, y) that are flagged; of the carry, those alone have a tangent."""
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


def sort_step(traced: TracedStep, perturbed: Perturbed) -> SortedStep | None:
    """Linearise a traced step and sort its equations; `None` if a tangent goes through a loop, a branch or a custom_vjp."""
    whole = _with_tangents(traced, perturbed)
    primals, tangents = whole.arguments
    input_vars = jax.tree.unflatten(jax.tree.structure(traced.shapes), primals)
    shapes = select(traced.shapes, tuple(perturbed))
    tangent_vars = jax.tree.unflatten(jax.tree.structure(shapes), tangents)
    outputs = whole.results[: whole.out_tree.children()[0].num_leaves]
    tangents = whole.results[len(outputs) :]

    forward = by_dependence(whole.eqns, [*whole.consts, *primals], with_effects=True)
    known, tangent_eqns = forward.variables, forward.unknown
    if not all_in(outputs, known) or any(map(_is_opaque, tangent_eqns)):
        return None
    beside_carry = jax.tree.leaves((tangent_vars[0], tangent_vars[2]))
    parallel = by_dependence(tangent_eqns, {*known, *beside_carry})
    parallel_eqns, recurrent_eqns, parallel_vars = _splits_inside(parallel.known, parallel.unknown, parallel.variables)
    parallel_vars = parallel_vars - known  # known variables that the recursion reads are residuals, not deltas
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
    """The same, with each `split` whose results only recurrent equations read moved to them: the unsplit array is one δₜ."""
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


def _residuals(
    whole: Program, forward_eqns: list[Any], input_vars: Any, output_vars: list[Any], wanted: dict[Any, None]
) -> tuple[list[Any], list[Any]]:
    """Which variables to save, so that all `wanted` ones are cheap to rematerialise, and the equations that do so.

    What depends on params alone is not saved, since a loop computes it once, and outputs are stored anyway; results of
    products and transcendental functions are saved, and sums and the like only where one of their operands is not at hand.
    """
    _, _, free = by_dependence(forward_eqns, _constants(whole, input_vars))
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


def _constants(whole: Program, input_vars: Any) -> list[Any]:
    return [*whole.consts, *jax.tree.leaves(input_vars[0])]


def _is_opaque(eqn: Any) -> bool:
    """Whether an equation holds a program of its own; that of a scatter only says how two numbers are combined."""
    kind = eqn.primitive.name
    return kind == "custom_lin" or (not kind.startswith("scatter") and any(True for _ in subjaxprs(eqn)))


def _flat(flags: Any, among: Any) -> list[bool]:
    """Flags of the leaves that are flagged in `among`, in order."""
    return [flag for flag, counts in zip(jax.tree.leaves(flags), jax.tree.leaves(among), strict=True) if counts]


def env_of(variables: Any, values: Any) -> dict[Any, Any]:
    """Values by variable, for two trees of the same structure."""
    return dict(zip(jax.tree.leaves(variables), jax.tree.leaves(values), strict=True))
