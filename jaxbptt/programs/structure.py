r"""How one time step's carry depends on the carry before it: on which leaves, along which axes, and whether linearly.

Read off the traced step, equation by equation. An equation that reads the carry counts as linear if JAX can transpose it.
An axis is *kept* where each entry of the result depends on the entry at the same place alone: a batch axis always is, and
for an element-wise recurrence all axes are.

The leaves that depend on each other form a `Group`. Groups are ordered so that each depends on itself and on those before it,
as the layers of a stack do: what a gate of the second layer reads of the first is known when the second is solved.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from jaxbptt.array_types import as_type
from jaxbptt.programs.evaluate import bind, subjaxprs, wrapped
from jaxbptt.programs.program import program
from jaxbptt.programs.trace import primitive_names

Axes = tuple[int | None, ...]  # for each axis of a leaf, the axis of a variable that it is kept on

_UNARY = """neg sign floor ceil round exp exp2 log log1p expm1 sin cos tan asin acos atan sinh cosh tanh asinh acosh atanh
logistic sqrt rsqrt cbrt square abs integer_pow not is_finite erf erfc erf_inv lgamma digamma real imag conj
convert_element_type bitcast_convert_type reduce_precision copy copy_p stop_gradient"""
_N_ARY = """add sub mul div rem max min pow atan2 add_any and or xor eq ne lt le gt ge select_n clamp nextafter complex mul_add
shift_left shift_right_logical shift_right_arithmetic"""
_ELEMENTWISE = {*_UNARY.split(), *_N_ARY.split()}
# Over a mapped axis: what they read of the carry is that of other rows as well.
_OVER_ROWS = """psum psum2 psum_invariant pmax pmin ppermute pgather all_gather all_gather_invariant all_gather_reduced all_to_all
ragged_all_to_all reduce_scatter psum_scatter unreduced_psum"""
_COLLECTIVE = {*_OVER_ROWS.split()}
_CUMULATIVE = {"cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"}


class Group(NamedTuple):
    """Leaves of the carry that depend on each other.

    Attributes:
        leaves: their numbers.
        before: the numbers of all leaves of earlier groups that they depend on.
        elementwise: whether all have one shape and every axis of it is kept.
        batch: leading axes that are kept, where not all are.
        clashes: pairs (i, k) of its leaves for which the coefficient of leaf i depends on leaf k; none where it is affine.
    """

    leaves: tuple[int, ...]
    before: tuple[int, ...]
    elementwise: bool
    batch: int
    clashes: tuple[tuple[int, int], ...]


class _Dependence(NamedTuple):
    """What a variable depends on: the leaves, with the axes they are kept on, and the pairs that clash."""

    axes: dict[int, Axes]
    clashes: frozenset[tuple[int, int]]


_NOTHING = _Dependence({}, frozenset())


def groups_of(fn: Callable[..., Any], carry: list[Any], *args: Any, look_for_clashes: bool = True) -> list[Group]:
    """The groups of `fn(carry, *args) -> carry` for arrays of these types, in the order in which they can be solved.

    Whether they are affine is found only with `look_for_clashes`; where rows of a mapped axis are added up, always.
    """
    traced = program(fn, carry, *args)
    shapes = [var.aval.shape for var in traced.arguments[0]]
    found = {
        var: _Dependence({i: tuple(range(len(shape)))}, frozenset())
        for i, (var, shape) in enumerate(zip(traced.arguments[0], shapes, strict=True))
    }
    for eqn in traced.eqns:
        operands = [_NOTHING if isinstance(var, Literal) else found.get(var, _NOTHING) for var in eqn.invars]
        if any(operand.axes for operand in operands):
            look = look_for_clashes or not _kinds(eqn).isdisjoint(_COLLECTIVE)
            clashes = _clashes(eqn, operands) if look else _clashes_of(operands)
            for number, var in enumerate(eqn.outvars):
                found[var] = _Dependence(_joined(eqn, number, operands), clashes)
    new = [_NOTHING if isinstance(var, Literal) else found.get(var, _NOTHING) for var in traced.results]
    reads = [set(dependence.axes) for dependence in new]
    return [_group(component, new, shapes, reads) for component in _components(reads)]


def kept_axes(fn: Callable[..., Any], *args: Any) -> list[dict[int, Axes]]:
    """For each leaf of the first result of `fn(*args)` the leaves of `args` that it depends on, by number, with the axes kept."""
    traced = program(lambda *args: jax.tree.leaves(fn(*args)[0]), *args)
    env = {var: {i: tuple(range(len(var.aval.shape)))} for i, var in enumerate(traced.inputs)}
    return _kept(traced.eqns, env, traced.results)


def _kept(eqns: list[Any], env: dict[Any, Any], results: list[Any]) -> list[dict[int, Axes]]:
    """The same for variables, from those that are known; functions with a derivative of their own are opened."""
    env = dict(env)

    def of(var):
        return {} if isinstance(var, Literal) else env.get(var, {})

    for eqn in eqns:
        operands = [of(var) for var in eqn.invars]
        opened = eqn.primitive.name.startswith("custom_") or wrapped(eqn) is not None
        inside = next((jaxpr for jaxpr, _ in subjaxprs(eqn) if len(jaxpr.invars) == len(eqn.invars)), None)
        if opened and inside is not None:
            inner = dict(zip(inside.invars, operands, strict=True))
            env |= zip(eqn.outvars, _kept(inside.eqns, inner, inside.outvars), strict=True)
        elif any(operands):
            found = [_Dependence(axes, frozenset()) for axes in operands]
            env |= {var: _joined(eqn, number, found) for number, var in enumerate(eqn.outvars)}
    return [of(var) for var in results]


def has_forward_mode(fn: Callable[..., Any], carry: list[Any], *args: Any) -> bool:
    """Whether no `jax.custom_vjp` reads the carry in `fn(carry, *args)`: its derivative in forward mode is not known."""
    traced = program(fn, carry, *args)
    found = set(traced.arguments[0])
    for eqn in traced.eqns:
        if not found.isdisjoint(var for var in eqn.invars if not isinstance(var, Literal)):
            if any(kind.startswith("custom_vjp_call") for kind in _kinds(eqn)):
                return False
            found.update(eqn.outvars)
    return True


def _group(component: list[int], new: list[_Dependence], shapes: list[Any], reads: list[set[int]]) -> Group:
    inside = set(component)
    pairs = [(j, i, new[j].axes[i]) for j in component for i in component if i in new[j].axes]
    clashes = {pair for j in component for pair in new[j].clashes if inside.issuperset(pair)}
    same_shape = len({shapes[i] for i in component}) == 1

    def is_kept(i, axes, axis):
        return shapes[i][axis] == 1 or axes[axis] == axis

    elementwise = same_shape and all(is_kept(i, axes, a) for _, i, axes in pairs for a in range(len(shapes[i])))
    batch = 0
    if not elementwise:
        least = min(len(shapes[i]) for i in component)
        while (
            batch < least
            and len({shapes[i][batch] for i in component}) == 1
            and all(is_kept(i, axes, batch) for _, i, axes in pairs)
        ):
            batch += 1
    before = {i for j in component for i in reads[j]} - inside
    return Group(tuple(component), tuple(sorted(before)), elementwise, batch, tuple(sorted(clashes)))


def _components(reads: list[set[int]]) -> Iterator[list[int]]:
    """The strongly connected components of the graph, each after all that it reads (Tarjan's algorithm)."""
    number: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    found: list[list[int]] = []

    def visit(j):
        number[j] = low[j] = len(number)
        stack.append(j)
        for i in sorted(reads[j]):
            if i not in number:
                visit(i)
                low[j] = min(low[j], low[i])
            elif i in stack:
                low[j] = min(low[j], number[i])
        if low[j] == number[j]:
            start = stack.index(j)
            found.append(sorted(stack[start:]))
            del stack[start:]

    for j in range(len(reads)):
        if j not in number:
            visit(j)
    yield from found


def _clashes(eqn: Any, operands: list[_Dependence]) -> frozenset[tuple[int, int]]:
    """The pairs of leaves (i, k) for which the coefficient of i in the results depends on k."""
    found = set(_clashes_of(operands))
    reading = [n for n, operand in enumerate(operands) if operand.axes]
    if not _is_linear(eqn, reading):
        linear = [n for n in reading if _is_linear(eqn, [n])]
        others = [n for n in reading if n not in linear]
        jointly = _is_linear(eqn, linear) if others else False
        for n in reading:
            if n not in linear:
                clash_with = reading
            elif jointly:
                clash_with = others
            else:
                clash_with = [k for k in reading if k != n]
            found |= {(i, k) for i in operands[n].axes for m in clash_with for k in operands[m].axes}
    return frozenset(found)


def _clashes_of(operands: list[_Dependence]) -> frozenset[tuple[int, int]]:
    return frozenset[tuple[int, int]]().union(*(operand.clashes for operand in operands))


def _kinds(eqn: Any) -> set[str]:
    """The names of an equation and of all those inside it."""
    return {eqn.primitive.name, *(kind for inner, _ in subjaxprs(eqn) for kind in primitive_names(inner))}


def _is_linear(eqn: Any, numbers: list[int]) -> bool:
    """Whether the results of an equation are linear in these operands, all others fixed: whether JAX can transpose it."""
    # A derivative given by the user need not be that of the function, and JAX transposes the function.
    kinds = _kinds(eqn)
    if any(kind.startswith(("custom_jvp_call", "custom_vjp_call", "stop_gradient")) for kind in kinds):
        return False
    if not kinds.isdisjoint(_COLLECTIVE):  # linear, but no row has a coefficient of its own
        return False
    types = [as_type(var.aval) for var in eqn.invars]
    moving = [types[n] for n in numbers]
    if not all(jnp.issubdtype(t.dtype, jnp.inexact) for t in (*moving, *(var.aval for var in eqn.outvars))):
        return False
    fixed = [t for n, t in enumerate(types) if n not in numbers]

    def transposed(fixed, bars):
        def of_moving(*moving):
            moving, rest = iter(moving), iter(fixed)
            return bind(eqn, [next(moving) if n in numbers else next(rest) for n in range(len(types))])

        return jax.linear_transpose(of_moving, *moving)(bars)

    try:
        jax.eval_shape(transposed, fixed, [as_type(var.aval) for var in eqn.outvars])
    except Exception:  # each primitive says in its own way that it has no transpose
        return False
    return True


def _joined(eqn: Any, number: int, operands: list[_Dependence]) -> dict[int, Axes]:
    """The leaves that a result depends on, each with the axes it is kept on: those that all operands agree on."""
    found: dict[int, Axes] = {}
    for n, operand in enumerate(operands):
        moved = _moved(eqn, number, n) if operand.axes else {}
        for i, axes in operand.axes.items():
            here = tuple(None if axis is None else moved.get(axis) for axis in axes)
            if i in found:
                here = tuple(a if a == b else None for a, b in zip(found[i], here, strict=True))
            found[i] = here
    return found


def _moved(eqn: Any, number: int, operand: int) -> dict[int, int]:
    """For the axes of an operand that are kept, the axis of the result; nothing for an equation that is not known."""
    kind, params = eqn.primitive.name, eqn.params
    shape, result = eqn.invars[operand].aval.shape, eqn.outvars[number].aval.shape
    here = range(len(shape))
    if kind in _ELEMENTWISE:
        return {a: a for a in here if shape[a] == result[a]} if len(shape) == len(result) else {}
    if kind == "random_bits":  # of an array of keys
        return {a: a for a in here}
    if kind == "optimization_barrier":
        return {a: a for a in here} if operand == number else {}
    if kind in _CUMULATIVE:
        return {a: a for a in here if a != params["axis"]}
    if kind == "rev":
        return {a: a for a in here if a not in params["dimensions"]}
    if kind == "transpose":
        return {a: b for b, a in enumerate(params["permutation"])}
    if kind == "broadcast_in_dim":
        return {a: b for a, b in enumerate(params["broadcast_dimensions"]) if shape[a] == result[b]}
    if kind in ("reshape", "squeeze", "expand_dims"):
        return _reshaped(shape, result)
    if kind.startswith(("reduce_", "arg")) and "axes" in params:
        left = [a for a in here if a not in params["axes"]]
        return {a: b for b, a in enumerate(left)}
    if kind == "dot_general":
        return _of_product(params["dimension_numbers"], operand, [len(var.aval.shape) for var in eqn.invars])
    if kind == "gather":
        return _of_gather(params["dimension_numbers"], params["slice_sizes"], operand, shape, len(result))
    if kind in ("concatenate", "split"):
        return {a: a for a in here if a != params.get("dimension", params.get("axis"))}
    if kind in ("slice", "dynamic_slice", "pad") and operand == 0:
        # A slice of all entries is none; what is padded, even with nothing on balance, is moved.
        untouched = params.get("padding_config", ((0, 0, 0),) * len(shape))
        return {a: a for a in here if shape[a] == result[a] and tuple(untouched[a]) == (0, 0, 0)}
    return {}


def _reshaped(shape: tuple[Any, ...], result: tuple[Any, ...]) -> dict[int, int]:
    """Axes before and after which there are as many entries in both shapes."""
    kept, sizes = {}, [(0, 1)]
    for b, size in enumerate(result):
        sizes.append((b + 1, sizes[-1][1] * size))
    before = 1
    for a, size in enumerate(shape):
        match = [b for b, entries in sizes[:-1] if entries == before and result[b] == size]
        if match and size != 1:
            kept[a] = match[-1]
        before = before * size
    return kept


def _of_product(numbers: Any, operand: int, ranks: list[int]) -> dict[int, int]:
    """The axes of one factor of a `dot_general` that are not contracted."""
    contracting, batch = numbers
    shared = len(batch[0])
    free = [
        [a for a in range(rank) if a not in contracting[k] and a not in batch[k]] for k, rank in enumerate(ranks[:2])
    ]
    first = shared if operand == 0 else shared + len(free[0])
    return {a: b for b, a in enumerate(batch[operand])} | {a: first + k for k, a in enumerate(free[operand])}


def _of_gather(numbers: Any, sizes: Any, operand: int, shape: tuple[int, ...], rank: int) -> dict[int, int]:
    """The axes of an array that are read whole, or those of the indices: for each index its own entries."""
    by_index = [a for a in range(rank) if a not in numbers.offset_dims]
    if operand == 1:
        return dict(enumerate(by_index))
    mapped = list(numbers.operand_batching_dims)
    found = {a: by_index[b] for a, b in zip(mapped, numbers.start_indices_batching_dims, strict=True)}
    sliced = [a for a in range(len(shape)) if a not in numbers.collapsed_slice_dims and a not in mapped]
    pairs = zip(sliced, numbers.offset_dims, strict=True)
    return found | {a: b for a, b in pairs if sizes[a] == shape[a]}
