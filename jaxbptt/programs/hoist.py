r"""What need not run inside a loop: equations of the params alone are hoisted above it, moves of entries are sunk below it.

XLA moves little across the border of a loop. A transposed weight is folded into the product that reads it, which then pays
for it at every step; a sum over segments of transposed products is transposed in every segment.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxbptt.array_types import assumed_size
from jaxbptt.programs.evaluate import bind, evaluate, read
from jaxbptt.programs.program import MOVES, Program, arrays_of, by_dependence, has_effects, program, used

# A constant that these make is larger than what they make it of: cheaper made at each step than read.
_ENLARGE = {"broadcast_in_dim", "iota"}


class Hoisted(NamedTuple):
    """What is left of a function for a loop to run.

    Attributes:
        program: the whole function.
        call: `(*args)`, without params, to `fn(params, *args)`.
    """

    program: Program
    call: Callable[..., Any]


def hoisted(fn: Callable[..., Any], params: Any, *args: Any) -> Hoisted:
    """`fn(params, ·)` for arguments of these shapes, with all that depends on params alone computed here, once.

    A constant right factor of a product is laid out as the product reads it, summed index first: on CPU a product of 32
    rows with a 512 × 128 weight took 47 µs so, and 53 µs with the summed index last; with 8 rows and 256 × 64, 3.1 and
    4.7 µs.
    """
    whole = program(fn, params, *args)
    of_params, *others = whole.arguments
    consts = whole.consts | dict(zip(of_params, arrays_of(params), strict=True))
    above, inside, constant = by_dependence(whole.eqns, consts)
    consts = evaluate(above, consts)
    # Computed above, and again in each iteration: their results need not be read from memory.
    enlarging = [eqn for eqn in above if eqn.primitive.name in _ENLARGE]
    transposed = {id(eqn): jnp.swapaxes(consts[eqn.invars[1]], 0, 1) for eqn in inside if _reads_across(eqn, constant)}
    inputs = [var for argument in others for var in argument]

    def run(eqn, values):
        if id(eqn) not in transposed:
            return bind(eqn, values)
        (left, _), batch = eqn.params["dimension_numbers"]
        return bind(eqn, [values[0], transposed[id(eqn)]], dimension_numbers=((left, (0,)), batch))

    def call(*args):
        env = evaluate(enlarging, consts) | dict(zip(inputs, jax.tree.leaves(args), strict=True))
        return whole.out_tree.unflatten(read(evaluate(inside, env, run), whole.results))

    return Hoisted(whole, call)


def _reads_across(eqn: Any, constant: set[Any]) -> bool:
    """Whether an equation is a product with a constant right factor whose summed index is the last one."""
    if eqn.primitive.name != "dot_general" or any(isinstance(var, Literal) for var in eqn.invars):
        return False
    if eqn.invars[1] not in constant or eqn.invars[0] in constant:
        return False
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    # A single row is multiplied as fast either way.
    sizes = list(map(assumed_size, eqn.invars[0].aval.shape))
    rows = math.prod(sizes) // max(1, sizes[left[0]] if left else 1)
    return right == (1,) and not batch and eqn.invars[1].aval.ndim == 2 and rows > 1


class Moves(NamedTuple):
    """The last equations of a function, those that only move entries about: `(operand values)`, its results.

    Attributes:
        operands: the variables that entries are moved from.
        eqns: the moves.
        results: the variables that they end in.
    """

    operands: list[Any]
    eqns: list[Any]
    results: list[Any]

    def __call__(self, values: list[Any]) -> list[Any]:
        """The results, from the values of the operands."""
        return read(evaluate(self.eqns, dict(zip(self.operands, values, strict=True))), self.results)

    @property
    def form(self) -> Any:
        """Equal for moves that do the same to operands of the same shapes."""
        variables = [*self.operands, *(var for eqn in self.eqns for var in eqn.outvars)]
        number = {var: i for i, var in enumerate(variables)}

        def names(variables):
            return [str(var) if isinstance(var, Literal) else number[var] for var in variables]

        moves = [(eqn.primitive.name, str(eqn.params), names(eqn.invars)) for eqn in self.eqns]
        return [str(var.aval) for var in self.operands], moves, names(self.results)


def last_moves(whole: Program, count: int) -> Moves:
    """The moves that the first `count` results end with."""
    results = whole.results[:count]
    moves = used([eqn for eqn in whole.eqns if eqn.primitive.name in MOVES], results)
    moves = [eqn for eqn in moves if not has_effects(eqn)]
    made = {var for eqn in moves for var in eqn.outvars}
    read_by_moves = [var for eqn in moves for var in eqn.invars]
    candidates = (*read_by_moves, *results)
    operands = dict.fromkeys(var for var in candidates if not isinstance(var, Literal) and var not in made)
    return Moves(list(operands), moves, results)
