r"""A function taken apart by what its operations depend on: what can run once before a loop, in it, and once after it.

The compiler moves little across the border of a loop: a transpose of a weight is folded into the product that reads it,
and is then paid for at every step; a sum over segments of transposed products is transposed in every segment. Here the
function is traced, and its operations are sorted.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxbptt.array_types import assumed_size
from jaxbptt.programs.trace import bind, evaluate_inlined, read
from jaxbptt.trees import combine, is_array, partition

# A constant that these make is larger than what they make it of: cheaper made again at each step than read.
_ENLARGE = {"broadcast_in_dim", "iota"}
# These move entries about, or add them up over devices, so a sum may be taken before them.
_MOVE = {"transpose", "concatenate", "reshape", "split", "psum_invariant"}
# Channels in times channels out of a convolution from which on it is laid out anew on CPU.
_MANY_CHANNELS = 32


class Program(NamedTuple):
    """A traced function without wrappers: its operations in order, constants, inputs, results, and their structure."""

    eqns: list[Any]
    consts: dict[Any, Any]
    inputs: list[Any]
    results: list[Any]
    out_tree: Any


def program(fn: Callable[..., Any], *args: Any) -> Program:
    """Trace `fn` for arguments of these shapes; leaves that are no arrays (flags, sizes) stay Python, and are no inputs."""
    arrays, others = partition(args, is_array)
    closed, shapes = jax.make_jaxpr(lambda arrays: fn(*combine(arrays, others)), return_shape=True)(arrays)

    def inlined(inputs):
        moved: dict[Any, Any] = {}  # keeps the values that are moved, so that no other gets their id

        def run(eqn, values):
            """The results of one operation; the same entries, moved in the same way twice, are one array."""
            if eqn.primitive.name not in _MOVE:
                return _laid_out(eqn, values)
            key = eqn.primitive.name, str(eqn.params), *map(id, values)
            if key not in moved:
                moved[key] = values, bind(eqn, values)
            return moved[key][1]

        return evaluate_inlined(closed.jaxpr, closed.consts, inputs, run)

    flat = jax.make_jaxpr(inlined)(jax.tree.leaves(arrays))
    consts = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
    results = flat.jaxpr.outvars
    return Program(used(flat.jaxpr.eqns, results), consts, flat.jaxpr.invars, results, jax.tree.structure(shapes))


def _laid_out(eqn: Any, values: list[Any]) -> list[Any]:
    """The results of one operation; on CPU a convolution is one of [batch, *space, channels] with [*space, in, out].

    XLA brings convolutions into this form, which has fast code, outside of loops only. In a loop the gradient of a
    3 × 3 × 8 × 8 kernel over 40 images of 16 × 16 took 15 ms as JAX derives it, and 0.4 ms so; that of 4 images 0.19
    and 0.04 ms. With few channels that code is slow: of 20 sizes, in one and two dimensions, it took 1.3 to 45 times as long
    where channels in times channels out were 16 at most, and 0.14 to 0.85 of the time from 32 on.
    """
    if eqn.primitive.name != "conv_general_dilated" or jax.default_backend() != "cpu":
        return bind(eqn, values)
    images, kernel, results = eqn.params["dimension_numbers"]
    if values[1].shape[kernel[0]] * values[1].shape[kernel[1]] < _MANY_CHANNELS:
        return bind(eqn, values)
    rank = len(images)
    last = (0, rank - 1, *range(1, rank - 1))
    numbers = type(eqn.params["dimension_numbers"])(last, (rank - 1, rank - 2, *range(rank - 2)), last)
    with eqn.ctx.manager:
        operands = (
            jax.lax.transpose(values[0], (images[0], *images[2:], images[1])),
            jax.lax.transpose(values[1], (*kernel[2:], kernel[1], kernel[0])),
        )
        found = eqn.primitive.bind(*operands, **eqn.params | {"dimension_numbers": numbers})
        order = (results[0], *results[2:], results[1])
        return [jax.lax.transpose(found, [order.index(axis) for axis in range(rank)])]


def arrays_of(tree: Any) -> list[Any]:
    """The leaves that are arrays or real numbers."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def used(eqns: list[Any], results: list[Any]) -> list[Any]:
    """The operations that results depend on, and those with effects."""
    needed = {var for var in results if not isinstance(var, Literal)}
    found = []
    for eqn in reversed(eqns):
        if has_effects(eqn) or needed.intersection(eqn.outvars):
            found.append(eqn)
            needed.update(var for var in eqn.invars if not isinstance(var, Literal))
    return found[::-1]


def has_effects(eqn: Any) -> bool:
    """Whether an operation does more than give its results; that one of several devices names their axis is no more."""
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def evaluate(eqns: Iterable[Any], env: dict[Any, Any]) -> dict[Any, Any]:
    """The values after these operations, those before them included."""
    env = dict(env)
    for eqn in eqns:
        env |= zip(eqn.outvars, bind(eqn, read(env, eqn.invars)), strict=True)
    return env


def fixed_by(
    eqns: Iterable[Any], variables: Iterable[Any], *, with_effects: bool = False
) -> tuple[list[Any], list[Any], set[Any]]:
    """The operations that depend on these variables alone, the others, and all variables that the first ones settle.

    What has effects, such as a print, counts to the others unless asked for.
    """
    fixed, first, others = set(variables), [], []
    for eqn in eqns:
        if (has_effects(eqn) and not with_effects) or not all(
            isinstance(var, Literal) or var in fixed for var in eqn.invars
        ):
            others.append(eqn)
        else:
            first.append(eqn)
            fixed.update(eqn.outvars)
    return first, others, fixed


class InLoop(NamedTuple):
    """The part of a function that a loop has to run.

    Attributes:
        program: the whole function.
        call: `(*args)`, without params, to the values of `program.results`.
    """

    program: Program
    call: Callable[..., list[Any]]

    def __call__(self, *args: Any) -> Any:
        """`fn(params, *args)`."""
        return self.program.out_tree.unflatten(self.call(*args))


def in_loop(fn: Callable[..., Any], params: Any, *args: Any) -> InLoop:
    """`fn(params, ·)` for arguments of these shapes, with all that depends on params alone computed here, once.

    A constant right factor of a product is laid out as the product reads it, summed index first: on CPU a product of 32
    rows with a 512 × 128 weight took 47 µs so, and 53 µs the other way; with 8 rows and 256 × 64, 3.1 against 4.7.
    """
    traced = program(fn, params, *args)
    leaves = arrays_of(params)
    assumed_size = traced.consts | dict(zip(traced.inputs, leaves, strict=False))
    before, during, fixed = fixed_by(traced.eqns, assumed_size)
    assumed_size = evaluate(before, assumed_size)
    again = [eqn for eqn in before if eqn.primitive.name in _ENLARGE]
    turned = {id(eqn): jnp.swapaxes(assumed_size[eqn.invars[1]], 0, 1) for eqn in during if _reads_across(eqn, fixed)}
    inputs = traced.inputs[len(leaves) :]

    def call(*args):
        env = evaluate(again, assumed_size) | dict(zip(inputs, jax.tree.leaves(args), strict=True))
        for eqn in during:
            values = read(env, eqn.invars)
            if id(eqn) in turned:
                (left, _), batch = eqn.params["dimension_numbers"]
                numbers = (left, (0,)), batch
                results = [
                    eqn.primitive.bind(values[0], turned[id(eqn)], **eqn.params | {"dimension_numbers": numbers})
                ]
            else:
                results = bind(eqn, values)
            env |= zip(eqn.outvars, results, strict=True)
        return read(env, traced.results)

    return InLoop(traced, call)


def _reads_across(eqn: Any, fixed: set[Any]) -> bool:
    """Whether an operation is a product with a constant right factor whose summed index is the last one."""
    if eqn.primitive.name != "dot_general" or any(isinstance(var, Literal) for var in eqn.invars):
        return False
    if eqn.invars[1] not in fixed or eqn.invars[0] in fixed:
        return False
    (left, right), (batch, _) = eqn.params["dimension_numbers"]
    # A single row is multiplied as fast either way.
    sizes = list(map(assumed_size, eqn.invars[0].aval.shape))
    rows = math.prod(sizes) // max(1, sizes[left[0]] if left else 1)
    return right == (1,) and not batch and eqn.invars[1].aval.ndim == 2 and rows > 1


class Moves(NamedTuple):
    """The last operations of a function, those that only move entries about: `(values of parts)`, its results.

    Attributes:
        parts: the variables that the results are put together of.
        eqns: the operations.
        results: the variables that they end in.
    """

    parts: list[Any]
    eqns: list[Any]
    results: list[Any]

    def __call__(self, values: list[Any]) -> list[Any]:
        """The results, from the values of the parts."""
        return read(evaluate(self.eqns, dict(zip(self.parts, values, strict=True))), self.results)

    @property
    def form(self) -> Any:
        """Equal for moves that do the same to parts of the same shapes."""
        variables = [*self.parts, *(var for eqn in self.eqns for var in eqn.outvars)]
        number = {var: i for i, var in enumerate(variables)}

        def names(variables):
            return [str(var) if isinstance(var, Literal) else number[var] for var in variables]

        moves = [(eqn.primitive.name, str(eqn.params), names(eqn.invars)) for eqn in self.eqns]
        return [str(var.aval) for var in self.parts], moves, names(self.results)


def before_moves(traced: Program, count: int) -> Moves:
    """What the first `count` results are put together of by moving entries, and how."""
    wanted = traced.results[:count]
    moves = used([eqn for eqn in traced.eqns if eqn.primitive.name in _MOVE], wanted)
    moves = [eqn for eqn in moves if not has_effects(eqn)]
    made = {var for eqn in moves for var in eqn.outvars}
    read_by_moves = [var for eqn in moves for var in eqn.invars]
    parts = dict.fromkeys(var for var in (*read_by_moves, *wanted) if not isinstance(var, Literal) and var not in made)
    return Moves(list(parts), moves, wanted)
