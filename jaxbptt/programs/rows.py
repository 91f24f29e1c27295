r"""The rows of a batch taken apart: the step of one row, where a step does the same to each row and nothing between them.

An influence is kept for each row, and dc_t/dθ of a row needs a step in which the gradient of the params is not summed over all
rows. So the step is traced once more for one row. Where rows are found, and of which inputs each has its own, is read off the
step of the whole batch; a step whose rows can't be told apart counts as one row.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from jaxbptt.along_time import at_one_step
from jaxbptt.programs.evaluate import subjaxprs
from jaxbptt.programs.program import has_effects, program
from jaxbptt.programs.structure import Axes, kept_axes
from jaxbptt.programs.trace import ClosedParams, TracedStep, trace

# What these make has no operand to read rows off: each row may get other numbers.
_DRAWS = {"iota", "random_bits", "rng_bit_generator", "rng_uniform"}


class Rows(NamedTuple):
    """A step of one row.

    Attributes:
        step: `(params, carry, x) -> (carry, y)` for one row; params are the `ClosedParams` of the whole batch.
        batch: sizes of the leading axes of the carry that are rows; () where all of it is one row.
        x: for each leaf of x whether each row has its own.
    """

    step: Callable[..., Any]
    batch: tuple[int, ...]
    x: Any

    def map(self, fn: Callable[..., Any], *in_axes: Any) -> Callable[..., Any]:
        """`fn` for all rows; `in_axes` has 0 for each argument with rows, and `None` for the others."""
        for _ in self.batch:
            fn = jax.vmap(fn, in_axes)
        return fn

    def check_flags(self, is_first: Any, valid: Any) -> None:
        """Raise where flags are given for rows that the step does not keep apart."""
        for word, flag in (("is_first", is_first), ("valid", valid)):
            if flag is not None and jnp.ndim(flag) - 1 > len(self.batch):
                raise ValueError(
                    f"{word} has shape {jnp.shape(flag)}, but the rows of the carry can't be told apart, so the influence of one of "
                    "them can't be reset or held: let no row read another, draw random numbers with a key for each row, or take "
                    "another strategy."
                )

    @property
    def x_axes(self) -> Any:
        """`in_axes` of x."""
        return jax.tree.map(lambda flag: 0 if flag else None, self.x)


def rows_of(step: Callable[..., Any], traced: TracedStep, init: Any, xs: Any) -> Rows:
    """The rows of a step; `traced` is its trace for `init` and `xs`, whose leading axes may be those of a batch."""
    x = at_one_step(xs)
    most = _most_axes(traced, init)
    if most:
        eqns, kept = program(traced.step, traced.params, init, x).eqns, kept_axes(traced.step, traced.params, init, x)
        for axes in range(most, 0, -1):
            found = _with_batch(step, traced, init, xs, axes, eqns, kept)
            if found is not None:
                return found
    return Rows(_with_constants(traced), (), jax.tree.map(lambda _: False, x))


def _with_constants(traced: TracedStep) -> Callable[..., Any]:
    """The step, in which constants stay constants: a derivative passes them on as arguments, and influences read their zeros."""
    consts = [None if isinstance(const, Tracer) else const for const in traced.params.closed_over]

    def step(params, carry, x):
        closed_over = [b if a is None else a for a, b in zip(consts, params.closed_over, strict=True)]
        return traced.step(ClosedParams(params.leaves, closed_over), carry, x)

    return step


def _most_axes(traced: TracedStep, init: Any) -> int:
    """Leading axes that all leaves of the carry have, with one size, where the step does nothing that hides them."""
    if traced.refs or traced.one_at_a_time:
        return 0
    shapes = [leaf.shape for leaf in jax.tree.leaves(init)]
    axes = 0
    while shapes and all(len(shape) > axes for shape in shapes) and len({shape[axes] for shape in shapes}) == 1:
        axes += 1
    return axes


def _with_batch(
    step: Callable[..., Any],
    traced: TracedStep,
    init: Any,
    xs: Any,
    axes: int,
    eqns: list[Any],
    kept: list[dict[int, Axes]],
) -> Rows | None:
    """The rows on so many leading axes, or `None` if the step does not keep them apart, by its equations and the axes they keep."""
    batch = jax.tree.leaves(init)[0].shape[:axes]
    x = at_one_step(xs)
    if _draws_by_row(eqns, batch):
        return None
    carries = len(jax.tree.leaves(init))
    own = [leaf.shape[:axes] == batch for leaf in jax.tree.leaves(x)]
    known = len(jax.tree.leaves(traced.params))
    flags = [False] * known + [True] * carries + own
    rows = tuple(range(axes))
    for result in kept[:carries]:
        for i, found in result.items():
            if found[:axes] != rows if flags[i] else any(axis in rows for axis in found):
                return None
    has_own = jax.tree.unflatten(jax.tree.structure(x), own)
    return _of_one_row(step, traced, init, xs, batch, has_own)


def _draws_by_row(eqns: list[Any], batch: tuple[int, ...]) -> bool:
    """Whether an equation makes numbers, or has effects, that may differ between rows without reading them."""
    sizes = {size for size in batch if size != 1}
    for eqn in eqns:
        if has_effects(eqn):
            return True
        shape = eqn.params.get("shape", ()) if eqn.primitive.name in _DRAWS else ()
        if sizes.intersection(shape):
            return True
    return False


def _of_one_row(
    step: Callable[..., Any], traced: TracedStep, init: Any, xs: Any, batch: tuple[int, ...], own: Any
) -> Rows | None:
    axes = tuple(range(len(batch)))

    def of_row(params, carry, x):
        carry = jax.tree.map(lambda leaf: jnp.expand_dims(leaf, axes), carry)
        x = jax.tree.map(lambda flag, leaf: jnp.expand_dims(leaf, axes) if flag else leaf, own, x)
        new_carry, _ = step(params, carry, x)
        return jax.tree.map(lambda leaf: jnp.squeeze(leaf, axes), new_carry), ()

    row, rows_over_time = _types_of_row(init, xs, own, len(axes))
    try:
        one = trace(of_row, traced.like_params(traced.params), row, rows_over_time)
    except Exception:  # a step that takes only batches of this size says so in its own way
        return None
    carry, _ = one.out_tree.unflatten([var.aval for var in one.jaxpr.outvars])
    if jax.tree.map(jnp.shape, carry) != jax.tree.map(lambda leaf: leaf.shape[len(axes) :], init):
        return None
    # What the step closes over is found in both traces. Constants stay what they are: influences read their zeros. The rest is
    # passed on, to get its gradient.
    whole = {id(const): i for i, const in enumerate(traced.params.closed_over)}
    where = [whole.get(id(const)) for const in one.params.closed_over]
    consts = [None if isinstance(const, Tracer) else const for const in one.params.closed_over]
    if any(
        i is None and not _is_among(const, traced.params.closed_over) for i, const in zip(where, consts, strict=True)
    ):
        return None
    one_params = ClosedParams(traced.params.leaves, one.params.closed_over)
    if not _numbers(one.step, one_params, row, at_one_step(rows_over_time)) <= _numbers(
        traced.step, traced.params, init, at_one_step(xs)
    ):
        return None

    def step_of_row(params, carry, x):
        closed_over = [
            params.closed_over[i] if const is None else const for i, const in zip(where, consts, strict=True)
        ]
        return one.step(ClosedParams(params.leaves, closed_over), carry, x)

    return Rows(step_of_row, batch, own)


def _is_among(const: Any, others: list[Any]) -> bool:
    """Whether what a step makes for one row it makes for all: the same array of numbers."""
    known = [other for other in others if not isinstance(other, Tracer)]
    return const is not None and any(np.array_equal(const, other) for other in known)


def _numbers(step: Callable[..., Any], params: Any, carry: Any, x: Any) -> Counter[str]:
    """The numbers written in the equations that the new carry takes; the size of the batch may be one of them."""

    def of(eqns):
        found = Counter(str(var.val) for eqn in eqns for var in eqn.invars if isinstance(var, Literal))
        for eqn in eqns:
            for inner, _ in subjaxprs(eqn):
                found += of(inner.eqns)
        return found

    return of(program(lambda *args: step(*args)[0], params, carry, x).eqns)


def _types_of_row(init: Any, xs: Any, own: Any, axes: int) -> tuple[Any, Any]:
    """The types of one row of the carry, and of its inputs over time."""

    def without(leaf, first):
        shape = (*leaf.shape[:first], *leaf.shape[first + axes :])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    carry = jax.tree.map(lambda leaf: without(leaf, 0), init)
    return carry, jax.tree.map(lambda flag, leaf: without(leaf, 1) if flag else leaf, own, xs)
