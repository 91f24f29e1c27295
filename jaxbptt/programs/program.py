r"""A traced function without wrappers, as a list of equations to choose from and evaluate."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Literal

from jaxbptt.programs.evaluate import bind, evaluate_jaxpr, opening_wrappers
from jaxbptt.trees import combine, is_array, partition

# These move entries about, or add them up over devices, so a sum may be taken before them.
MOVES = {"transpose", "concatenate", "reshape", "split", "psum_invariant"}
# Channels in times channels out of a convolution from which on it is transposed to the fast layout.
_MANY_CHANNELS = 32


class Program(NamedTuple):
    """A traced function without wrappers.

    Attributes:
        eqns: its equations, in order.
        consts: values by variable.
        arguments: the variables of each argument.
        results: the variables of what it returns.
        out_tree: their structure.
    """

    eqns: list[Any]
    consts: dict[Any, Any]
    arguments: list[list[Any]]
    results: list[Any]
    out_tree: Any

    @property
    def inputs(self) -> list[Any]:
        """The variables of all arguments."""
        return [var for argument in self.arguments for var in argument]

    @property
    def outputs(self) -> Any:
        """`results` in the structure of what the function returns."""
        return self.out_tree.unflatten(self.results)


def program(fn: Callable[..., Any], *args: Any) -> Program:
    """Trace `fn` for arguments of these shapes; leaves that are not arrays (flags, sizes) stay Python values."""
    arrays, static = partition(args, is_array)
    closed, shapes = jax.make_jaxpr(lambda arrays: fn(*combine(arrays, static)), return_shape=True)(arrays)

    def inlined(inputs):
        moved: dict[Any, Any] = {}  # the operands are stored as well, so that no other array gets their id

        def run(eqn, values):
            """The results of one equation; the same entries, moved in the same way twice, are one array."""
            if eqn.primitive.name not in MOVES:
                return _in_fast_layout(eqn, values)
            key = eqn.primitive.name, str(eqn.params), *map(id, values)
            if key not in moved:
                moved[key] = values, bind(eqn, values)
            return moved[key][1]

        return evaluate_jaxpr(closed.jaxpr, closed.consts, inputs, opening_wrappers(run))

    # Traced a second time, with wrappers opened and equal moves shared.
    flat = jax.make_jaxpr(inlined)(jax.tree.leaves(arrays))
    consts = dict(zip(flat.jaxpr.constvars, flat.consts, strict=True))
    invars, results = iter(flat.jaxpr.invars), flat.jaxpr.outvars
    arguments = [[next(invars) for _ in jax.tree.leaves(argument)] for argument in arrays]
    return Program(used(flat.jaxpr.eqns, results), consts, arguments, results, jax.tree.structure(shapes))


def arrays_of(tree: Any) -> list[Any]:
    """The leaves that are arrays or real numbers: the inputs of a `Program` for arguments like `tree`."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def used(eqns: list[Any], results: list[Any]) -> list[Any]:
    """The equations that results depend on, and those with effects."""
    needed = {var for var in results if not isinstance(var, Literal)}
    found = []
    for eqn in reversed(eqns):
        if has_effects(eqn) or needed.intersection(eqn.outvars):
            found.append(eqn)
            needed.update(var for var in eqn.invars if not isinstance(var, Literal))
    return found[::-1]


def has_effects(eqn: Any) -> bool:
    """Whether an equation does more than give its results; the effect of a sum over devices only names their axis."""
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


class ByDependence(NamedTuple):
    """Equations sorted by what they depend on.

    Attributes:
        known: the equations that depend on known variables alone.
        unknown: the others.
        variables: all variables that are known, and those computed from them.
    """

    known: list[Any]
    unknown: list[Any]
    variables: set[Any]


def by_dependence(eqns: Iterable[Any], variables: Iterable[Any], *, with_effects: bool = False) -> ByDependence:
    """Sort equations by whether they depend on these variables alone; those with effects, such as a print, only if asked."""
    known, unknown, variables = [], [], set(variables)
    for eqn in eqns:
        if (with_effects or not has_effects(eqn)) and all_in(eqn.invars, variables):
            known.append(eqn)
            variables.update(eqn.outvars)
        else:
            unknown.append(eqn)
    return ByDependence(known, unknown, variables)


def all_in(variables: Iterable[Any], known: set[Any]) -> bool:
    """Whether all of these are known; literals always are."""
    return all(isinstance(var, Literal) or var in known for var in variables)


def variables_read(eqns: Iterable[Any]) -> set[Any]:
    """The variables that equations read."""
    return {var for eqn in eqns for var in eqn.invars if not isinstance(var, Literal)}


def _in_fast_layout(eqn: Any, values: list[Any]) -> list[Any]:
    """The results of one equation; a convolution is one of [batch, *space, channels] with [*space, in, out].

    On CPU XLA brings convolutions into this form, which has fast code, outside of loops only. In a loop the gradient of a
    3 × 3 × 8 × 8 kernel over 40 images of 16 × 16 took 15 ms as JAX derives it, and 0.4 ms so; that of 4 images 0.19
    and 0.04 ms. With few channels that code is slow: of 20 sizes, in one and two dimensions, it took 1.3 to 45 times as long
    where channels in times channels out were 16 at most, and 0.14 to 0.85 of the time from 32 on. For a GPU XLA chooses the
    layouts itself: compiled for an H100, a convolutional RNN is the same program in either form.
    """
    if eqn.primitive.name != "conv_general_dilated":
        return bind(eqn, values)
    images, kernel, results = eqn.params["dimension_numbers"]
    if math.prod(values[1].shape[axis] for axis in kernel[:2]) < _MANY_CHANNELS:
        return bind(eqn, values)
    rank = len(images)
    last = (0, rank - 1, *range(1, rank - 1))
    numbers = type(eqn.params["dimension_numbers"])(last, (rank - 1, rank - 2, *range(rank - 2)), last)
    with eqn.ctx.manager:
        operands = [
            jax.lax.transpose(values[0], (images[0], *images[2:], images[1])),
            jax.lax.transpose(values[1], (*kernel[2:], kernel[1], kernel[0])),
        ]
        (found,) = bind(eqn, operands, dimension_numbers=numbers)
        order = (results[0], *results[2:], results[1])
        return [jax.lax.transpose(found, [order.index(axis) for axis in range(rank)])]
