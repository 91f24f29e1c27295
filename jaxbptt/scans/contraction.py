r"""What is summed over time: the gradient of params, added up segment by segment, and checked.

Transposes, concatenations and the like at the end of the gradient are done once, after the last segment.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt.along_time import at_one_step, filled
from jaxbptt.array_types import as_type, type_over_time, zeros
from jaxbptt.programs.evaluate import evaluate, read
from jaxbptt.programs.hoist import Moves, last_moves
from jaxbptt.programs.perturbed import PerturbedAdjoint, fit
from jaxbptt.programs.program import Program, arrays_of, program, used
from jaxbptt.trees import is_array, select

# For many time steps at once, faster than one step after the other; and loops.
_PRODUCTS = {"dot_general", "conv_general_dilated", "scan", "while", "cond"}


class Contraction(NamedTuple):
    """The contraction over a segment as a program: `(params, residuals, xs, ys_bar, deltas)` to gradients of params and xs.

    Attributes:
        whole: the program.
        moves: the moves that the gradient of params ends with.
    """

    whole: Program
    moves: Moves

    def __call__(self, params: Any, residuals: Any, xs: Any, ys_bar: Any, deltas: Any) -> tuple[list[Any], Any]:
        """The operands of the moves, and the gradient of xs."""
        _, xs_tree = self.whole.out_tree.children()
        xs_results = self.whole.results[len(self.whole.results) - xs_tree.num_leaves :]
        inputs = zip(self.whole.inputs, arrays_of((params, residuals, xs, ys_bar, deltas)), strict=True)
        env = evaluate(used(self.whole.eqns, [*self.moves.operands, *xs_results]), self.whole.consts | dict(inputs))
        return read(env, self.moves.operands), xs_tree.unflatten(read(env, xs_results))

    def moved(self, operands: list[Any]) -> Any:
        """The gradient of params, from the operands of the moves."""
        return self.whole.out_tree.children()[0].unflatten(self.moves(operands))


class WeightGradient:
    """The gradient of params as it is added up over segments of time.

    Built once for a backward pass, from shapes, and traced once for each length of a segment.
    """

    def __init__(
        self,
        adjoint: PerturbedAdjoint,
        params: Any,
        types: "StepTypes",
        lengths: Iterable[int],
        *,
        move_each: bool = False,
    ) -> None:
        """For segments of these lengths; checks what the adjoint returns.

        With `move_each` the moves are made in every segment: slower, but without a second array like the params. This is
        also done where segments of different lengths end in different moves.
        """
        self._adjoint, self._types = adjoint, types
        # JAX keeps this object alive with the derivative of `Pass.back`: so it has the types of params, and not the arrays.
        self._params_types = _types_of_arrays(params)
        self._contractions = {length: self._contraction(params, length) for length in sorted(lengths)}
        self._first, *rest = self._contractions.values()
        self._move_each = move_each or any(other.moves.form != self._first.moves.form for other in rest)

    def zeros(self) -> Any:
        """The sums to start with, in single precision at least."""
        flagged = select(self._params_types, self._adjoint.perturbed.params)
        return totals(flagged if self._move_each else _types(self._first.moves.operands))

    @property
    def sums_nothing(self) -> bool:
        """Whether no param has a gradient, and that of an input is a product of numbers."""
        opaque = self._adjoint.by_vjp or any(eqn.primitive.name in _PRODUCTS for eqn in self._first.whole.eqns)
        return not opaque and not self._first.moves.operands

    def input_bar(self, params: Any, residuals: Any, x: Any, y_bar: Any, deltas: Any) -> Any:
        """The gradient of x at one step, where nothing is summed."""
        at_t = jax.tree.map(lambda leaf: leaf[None], (residuals, x, y_bar, deltas))
        _, xs_bar = self._adjoint.contract(params, *at_t)
        x_bar = jax.tree.map(lambda leaf: leaf[0], xs_bar)
        return fit(x_bar, x, self._adjoint.perturbed.x, "xs")

    def add(
        self, params: Any, sums: Any, residuals: Any, xs: Any, ys_bar: Any, deltas: Any, length: int
    ) -> tuple[Any, Any]:
        """The sums with a segment of so many steps added, and the gradient of xs there."""
        contraction = self._contractions[length]
        terms, xs_bar = contraction(params, residuals, xs, ys_bar, deltas)
        return add_up(sums, self._fit(contraction.moved(terms)) if self._move_each else terms), xs_bar

    def finish(self, sums: Any) -> Any:
        """The gradient of params."""
        return self._fit(sums if self._move_each else self._first.moved(sums))

    def _fit(self, params_bar: Any) -> Any:
        return fit(params_bar, self._params_types, self._adjoint.perturbed.params, "params")

    def _contraction(self, params: Any, length: int) -> Contraction:
        flags = self._adjoint.perturbed

        def contract(params, residuals, xs, ys_bar, deltas):
            params_bar, xs_bar = self._adjoint.contract(params, residuals, xs, filled(ys_bar, length), deltas)
            params_bar = fit(params_bar, self._params_types, flags.params, "params", cast=False)
            return params_bar, fit(xs_bar, xs, flags.x, "xs")

        stacked = jax.tree.map(lambda leaf: type_over_time(leaf, length), tuple(self._types))
        whole = program(contract, params, *stacked)
        found = Contraction(whole, last_moves(whole, whole.out_tree.children()[0].num_leaves))
        jax.eval_shape(lambda operands: self._fit(found.moved(operands)), _types(found.moves.operands))
        return found


class StepTypes(NamedTuple):
    """The types of what a contraction reads of one step."""

    residuals: Any
    x: Any
    y_bar: Any
    deltas: Any


def step_types(adjoint: PerturbedAdjoint, params: Any, carry: Any, xs: Any, bars: tuple[Any, Any]) -> StepTypes:
    """Of an adjoint, for arguments of these shapes; `bars` are those of the last carry and of ys."""

    def step(params, carry, x, carry_bar, y_bar):
        _, residuals = adjoint.forward(params, carry, x)
        previous_bar, deltas = adjoint.backward(params, residuals, x, carry_bar, filled(y_bar))
        return residuals, deltas, fit(previous_bar, carry, adjoint.perturbed.carry, "init")

    x, y_bar = at_one_step((xs, bars[1]))
    traced = program(step, params, carry, x, bars[0], y_bar)
    residuals, deltas, _ = traced.out_tree.unflatten(_types(traced.results))
    return StepTypes(residuals, x, y_bar, deltas)


def totals(tree: Any) -> Any:
    """Zeros to add up gradients of these shapes in, in single precision at least."""

    def total(leaf):
        aval = jax.typeof(leaf)
        return zeros(as_type(aval if jnp.finfo(aval.dtype).bits >= 32 else aval.update(dtype=jnp.dtype(jnp.float32))))

    return jax.tree.map(total, tree)


def add_up(totals: Any, terms: Any) -> Any:
    """`totals` with one more term added to each."""
    return jax.tree.map(lambda total, term: total + term.astype(total.dtype), totals, terms)


def _types(variables: list[Any]) -> list[Any]:
    return [as_type(var.aval) for var in variables]


def _types_of_arrays(tree: Any) -> Any:
    """The types of arrays; what is no array, such as a flag among params, stays."""
    return jax.tree.map(lambda leaf: as_type(jax.typeof(leaf)) if is_array(leaf) else leaf, tree)
