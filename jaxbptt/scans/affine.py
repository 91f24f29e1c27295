r"""Affine recurrences over all time steps at once: cₜ = Aₜ cₜ₋₁ + bₜ as an associative scan over pairs (A, b).

(A′, b′) ∘ (A, b) = (A′A, A′b + b′): applying it to two neighbours, then to pairs of pairs, gives all prefixes in 2 log₂ T
rounds. The coefficients come from one linearisation of a function of the carry, for all t at once: its Jacobian times
ones where a group of leaves is element-wise, times a basis where it is dense. The groups are solved one after the other, so
what a later one reads of an earlier one is known.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt.array_types import sharded_like
from jaxbptt.arrays import at_least_float32
from jaxbptt.programs.structure import Group
from jaxbptt.programs.trace import primitive_names
from jaxbptt.trees import is_differentiable

Solution = tuple[list[Any], list[Any]]  # the leaves before each step, stacked, and those after the last


class Affine(NamedTuple):
    """The coefficients of a group at all time steps, with m leaves, in single precision at least.

    Attributes:
        A: element-wise a list of lists, `A[j][i]` with the shape of a leaf; dense one array `[time, *batch, N, N]`.
        b: element-wise a list of m arrays like the leaves; dense one array `[time, *batch, N]`.
    """

    A: Any
    b: Any


def solve(
    fn: Callable[..., Any],
    groups: list[Group],
    init: list[Any],
    stacked: Any,
    length: int,
    *,
    chunk_length: int | None = None,
    one_at_a_time: bool = False,
    reverse: bool = False,
) -> Solution:
    """The leaves of the recurrence cₜ = fn(cₜ₋₁, stacked at t), which is affine in each group.

    With `reverse` from the last time step to the first, and then "before a step" is after it in time. With `chunk_length`
    the coefficients of so many steps exist at a time, chunk after chunk.
    """

    def of_steps(init, stacked, length):
        before: list[Any] = [jnp.broadcast_to(leaf, (length, *leaf.shape)) for leaf in init]
        last = list(init)
        for group in groups:
            mine = [init[i] for i in group.leaves]
            if any(not is_differentiable(leaf) for leaf in mine):
                found, ends = leaves_in_sequence(fn, group, mine, before, stacked, reverse=reverse)
            else:
                affine = linearised(fn, group, before, stacked, length, one_at_a_time=one_at_a_time)
                found, ends = solve_group(group, affine, mine, reverse=reverse)
            for i, leaves, end in zip(group.leaves, found, ends, strict=True):
                before[i], last[i] = leaves, end
        return before, last

    if chunk_length is None or chunk_length >= length:
        return of_steps(init, stacked, length)
    return in_chunks(of_steps, init, stacked, length, chunk_length, reverse=reverse)


def in_chunks(
    of_steps: Callable[..., Any], init: Any, stacked: Any, length: int, chunk_length: int, *, reverse: bool
) -> Any:
    """`of_steps(init, stacked, length) -> (stacked results, last carry)`, chunk after chunk."""
    chunks, left_over = divmod(length, chunk_length)
    whole = chunks * chunk_length

    def split(leaf):
        leaf = leaf[left_over:] if reverse else leaf[:whole]
        return leaf.reshape(chunks, chunk_length, *leaf.shape[1:])

    def body(carry, chunk):
        found, carry = of_steps(carry, chunk, chunk_length)
        return carry, found

    carry, found = jax.lax.scan(body, init, jax.tree.map(split, stacked), length=chunks, reverse=reverse)
    found = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), found)
    if left_over:
        rest = jax.tree.map(lambda leaf: leaf[:left_over] if reverse else leaf[whole:], stacked)
        of_rest, carry = of_steps(carry, rest, left_over)
        pairs = (of_rest, found) if reverse else (found, of_rest)
        found = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *pairs)
    return found, carry


def linearised(
    fn: Callable[..., Any],
    group: Group,
    before: list[Any],
    stacked: Any,
    length: int,
    *,
    one_at_a_time: bool = False,
) -> Affine:
    """The affine map that `fn` is of a group, at the leaves `before` each step: bₜ = fn(0), Aₜ = ∂fn/∂c."""

    def at_t(before, at_t):
        zeros = [jnp.zeros_like(before[i]) for i in group.leaves]
        value, A = value_and_jacobian(of_group(fn, group, before, at_t), zeros, group)
        return Affine(A, value if group.elementwise else flattened(value, group.batch))

    return at_all_steps(at_t, length, one_at_a_time=one_at_a_time)(before, stacked)


def of_group(fn: Callable[..., Any], group: Group, leaves: list[Any], at_t: Any) -> Callable[..., Any]:
    """A group's leaves after a step as a function of those before it, all other leaves being given."""

    def new(mine):
        together = list(leaves)
        for i, leaf in zip(group.leaves, mine, strict=True):
            together[i] = leaf
        after = fn(together, at_t)
        return [after[i] for i in group.leaves]

    return new


def value_and_jacobian(fn: Callable[..., Any], here: list[Any], group: Group) -> tuple[list[Any], Any]:
    """`fn(here)` and its Jacobian, as `A` of an `Affine`, in single precision at least."""
    value, tangent = linearize(fn, here)
    A = _diagonals(tangent, here) if group.elementwise else _matrix(tangent, here, group.batch)
    return widened(value), A


def linearize(fn: Callable[..., Any], here: list[Any]) -> tuple[list[Any], Callable[[list[Any]], list[Any]]]:
    """`jax.linearize`, for a function with a `jax.custom_vjp` too: the tangent is then the transpose of its cotangent."""
    value, tangent = jax.linearize(fn, here)
    if "custom_lin" not in primitive_names(jax.make_jaxpr(tangent)(here)):
        return value, tangent
    value, pull = jax.vjp(fn, here)
    transposed = jax.linear_transpose(lambda bars: pull(bars)[0], value)
    return value, lambda tangents: transposed(tangents)[0]


def leaves_in_sequence(
    fn: Callable[..., Any], group: Group, init: list[Any], before: list[Any], stacked: Any, *, reverse: bool = False
) -> Solution:
    """Of leaves that have no derivative, such as counters and random keys."""

    def body(mine, at_t):
        leaves, at_t = at_t
        return of_group(fn, group, leaves, at_t)(mine), mine

    ends, found = jax.lax.scan(body, init, (before, stacked), reverse=reverse)
    return found, ends


def at_all_steps(fn: Callable[..., Any], length: int, *, one_at_a_time: bool = False) -> Callable[..., Any]:
    """`fn` of what stands at a time step, for all time steps: mapped, or one after the other for a step that branches."""
    if one_at_a_time:
        return lambda *stacked: jax.lax.scan(lambda _, at_t: (None, fn(*at_t)), None, stacked, length=length)[1]
    return jax.vmap(fn, axis_size=length)


def solve_group(group: Group, affine: Affine, init: list[Any], *, reverse: bool = False) -> Solution:
    """The leaves of a group before each step and after the last, from its coefficients at all time steps."""
    A, b = affine
    first, wide = -1 if reverse else 0, widened(init)
    # c₀ enters the first step, whose coefficient is not used after that.
    if group.elementwise:
        b = [
            bs.at[first].add(sum(a[first] * c for a, c in zip(row, wide, strict=True)))
            for bs, row in zip(b, A, strict=True)
        ]
        _, after = jax.lax.associative_scan(_then_elementwise, (A, b), reverse=reverse)
    else:
        b = b.at[first].add(apply(A[first], flattened(wide, group.batch)))
        _, flat = jax.lax.associative_scan(_then_dense, (A, b), reverse=reverse)
        after = split_up(flat, [leaf.shape for leaf in init], group.batch)
    after = [leaf.astype(c.dtype) for leaf, c in zip(after, init, strict=True)]
    before = [shifted(leaf, c, reverse=reverse) for leaf, c in zip(after, init, strict=True)]
    return before, [leaf[0 if reverse else -1] for leaf in after]


def shifted(after: Any, init: Any, *, reverse: bool = False) -> Any:
    """What stands before each step, from what stands after it."""
    if reverse:
        return jnp.concatenate([after[1:], init[None]])
    return jnp.concatenate([init[None], after[:-1]])


def widened(leaves: list[Any]) -> list[Any]:
    """Leaves in one dtype, the widest of theirs, in single precision at least."""
    dtypes = [at_least_float32(leaf.dtype) for leaf in leaves]
    widest = max(dtypes, key=lambda dtype: jnp.finfo(dtype).bits)
    # Not `astype`: a constant in a traced program is a number without methods.
    return [jax.lax.convert_element_type(leaf, widest) for leaf in leaves]


def flattened(leaves: list[Any], batch: int) -> Any:
    """Leaves `[*batch, ...]` as one array `[*batch, N]`."""
    # Not −1, which has no value where a batch is empty.
    return jnp.concatenate(
        [leaf.reshape(*leaf.shape[:batch], math.prod(leaf.shape[batch:])) for leaf in leaves], axis=-1
    )


def split_up(flat: Any, shapes: list[Any], batch: int) -> list[Any]:
    """Leaves `[time, *shape]` from one array `[time, *batch, N]`."""
    return [part.reshape(len(flat), *shape) for part, shape in zip(_parts(flat, shapes, batch), shapes, strict=True)]


def _parts(flat: Any, shapes: list[Any], batch: int) -> list[Any]:
    """One array `[..., N]` cut where the entries of each leaf end."""
    sizes = [math.prod(shape[batch:]) for shape in shapes]
    return jnp.split(flat, list(itertools.accumulate(sizes))[:-1], axis=-1)


def _diagonals(tangent: Callable[..., Any], here: list[Any]) -> list[list[Any]]:
    """`A[j][i]`, the derivative of each entry of leaf j with respect to the entry of leaf i at the same place."""
    columns = []
    for i in range(len(here)):
        ones = [jnp.ones_like(leaf) if k == i else jnp.zeros_like(leaf) for k, leaf in enumerate(here)]
        columns.append(widened(tangent(ones)))
    return [[column[j] for column in columns] for j in range(len(here))]


def _matrix(tangent: Callable[..., Any], here: list[Any], batch: int) -> Any:
    """`[*batch, N, N]`: the Jacobian, whose columns are the tangents of a basis, the same for every row."""
    shapes = [leaf.shape for leaf in here]
    size = sum(math.prod(shape[batch:]) for shape in shapes)

    def column(one):
        ones = [
            sharded_like(jnp.broadcast_to(part.reshape(shape[batch:]), shape).astype(leaf.dtype), leaf)
            for part, shape, leaf in zip(_parts(one, shapes, batch), shapes, here, strict=True)
        ]
        return flattened(widened(tangent(ones)), batch)

    return jax.vmap(column, out_axes=-1)(jnp.eye(size, dtype=here[0].dtype))


# The product of many coefficients may overflow where no state does. At a reset, where A is 0, and before anything has entered,
# where c is, 0 times inf must not be nan.


def _times(A: Any, c: Any) -> Any:
    return jnp.where((A == 0) | (c == 0), 0, A * c)


def apply(A: Any, c: Any) -> Any:
    """Matrices times vectors, not rounded to TF32."""
    product = jnp.einsum("...ij,...j->...i", A, c, precision=jax.lax.Precision.HIGHEST)
    return jnp.where((A == 0).all(-1) | (c == 0).all(-1, keepdims=True), 0, product)


def _then_elementwise(first: Any, then: Any) -> Any:
    (A, b), (A_next, b_next) = first, then
    each = range(len(b))
    A_both = [[sum(_times(A_next[j][k], A[k][i]) for k in each) for i in each] for j in each]
    return A_both, [sum(_times(A_next[j][k], b[k]) for k in each) + b_next[j] for j in each]


def _then_dense(first: Any, then: Any) -> Any:
    (A, b), (A_next, b_next) = first, then
    # Rounded to TF32, or bfloat16, the products of many Jacobians would lose all digits.
    A_both = jnp.matmul(A_next, A, precision=jax.lax.Precision.HIGHEST)
    nothing = (A_next == 0).all(-1, keepdims=True) | (A == 0).all(-2, keepdims=True)
    return jnp.where(nothing, 0, A_both), apply(A_next, b) + b_next
