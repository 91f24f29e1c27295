r"""The diagonal of a Jacobian without the Jacobian, read off the equations of a tangent map.

A cell has at most one product between its element-wise operations: ḣ ↦ a ⊙ (W (b ⊙ ḣ)), whose diagonal is a ⊙ diag W ⊙ b. So a
tangent is followed through the equations as a sum of terms, each element-wise, a ⊙ ḣ, or with one such product. Where an
equation leads out of this form, as a second product or a sum over entries does, it takes a tangent for each entry.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt.array_types import sharded_like, zeros
from jaxbptt.programs.evaluate import bind, read
from jaxbptt.programs.program import program


class _Term(NamedTuple):
    """A part of a tangent v that is linear in ḣ along the last axis: after ⊙ ḣ, or after ⊙ (W (before ⊙ ḣ)).

    Attributes:
        after: like v.
        W: `[entries of v, entries of h]`, or `None` where there is no product.
        before: like h.
        start: without a product, the entry of ḣ that the first one of v is a multiple of.
    """

    after: Any
    W: Any = None
    before: Any = None
    start: int = 0


class _Sum(NamedTuple):
    """A tangent: the sum of its terms."""

    terms: list[_Term]

    def mapped(self, function: Callable[[Any], Any]) -> "_Sum":
        """With a function of `after`."""
        return _Sum([term._replace(after=function(term.after)) for term in self.terms])


def diagonals(tangent: Callable[..., Any], leaves: list[Any], batch: int) -> list[Any]:
    """For each leaf the derivative of each entry with respect to itself.

    `tangent` is a linear map of tangents of the leaves to tangents of leaves like them, which keeps `batch` leading axes.
    """
    found = [_read_off(tangent, leaves, j) for j in range(len(leaves))]
    return [_by_entries(tangent, leaves, j, batch) if d is None else d for j, d in enumerate(found)]


def _by_entries(tangent: Callable[..., Any], leaves: list[Any], j: int, batch: int) -> Any:
    """That of leaf j for any map: one tangent for each entry of a row, one after the other."""
    shape = leaves[j].shape
    rest = shape[batch:]
    if not leaves[j].size:
        return leaves[j]

    def entry(k):
        one = (jnp.arange(math.prod(rest)) == k).astype(leaves[j].dtype).reshape(rest)
        tangents = list(map(jnp.zeros_like, leaves))
        tangents[j] = sharded_like(jnp.broadcast_to(one, shape), leaves[j])
        moved = tangent(tangents)[j].reshape(*shape[:batch], -1)
        return jax.lax.dynamic_index_in_dim(moved, k, -1, keepdims=False)

    entries = jax.lax.map(entry, jnp.arange(math.prod(rest)))
    return jnp.moveaxis(entries, 0, -1).reshape(shape)


def _read_off(tangent: Callable[..., Any], leaves: list[Any], j: int) -> Any:
    """That of leaf j, or `None` where it can't be read off."""
    traced = program(tangent, leaves)
    env = dict(traced.consts)
    for var, leaf in zip(traced.inputs, leaves, strict=True):
        env[var] = jnp.zeros_like(leaf)
    if not leaves[j].ndim:
        return None
    env[traced.inputs[j]] = _Sum([_Term(jnp.ones_like(leaves[j]))])
    for eqn in traced.eqns:
        values = read(env, eqn.invars)
        if any(isinstance(value, _Sum) for value in values):
            rule = _RULES.get(eqn.primitive.name)
            found = None if rule is None else rule(eqn, *values)
            if found is None:
                return None
        else:
            found = bind(eqn, values)
        env |= zip(eqn.outvars, found, strict=True)
    (result,) = read(env, [traced.results[j]])
    found = jnp.zeros_like(leaves[j])
    for term in result.terms if isinstance(result, _Sum) else []:
        if term.W is not None:
            factors = term.after, jnp.diagonal(term.W), term.before
            found += math.prod(factor.astype(found.dtype) for factor in factors)
        elif term.start == 0:
            found += term.after
    return found


def _same_entries(eqn: Any, value: Any, *_: Any) -> list[Any] | None:
    """The equation applied to `after`, where it acts on each entry alone or keeps all axes."""
    if eqn.invars[0].aval.shape != eqn.outvars[0].aval.shape:
        return None
    return [value.mapped(lambda after: bind(eqn, [after])[0])]


def _mul(eqn: Any, a: Any, b: Any) -> list[Any]:
    tangent, known = (a, b) if isinstance(a, _Sum) else (b, a)
    return [tangent.mapped(lambda after: after * known)]


def _div(eqn: Any, a: Any, b: Any) -> list[Any]:
    return [a.mapped(lambda after: after / b)]


def _add(eqn: Any, *values: Any) -> list[Any]:
    """Of tangents and zeros."""
    return [_Sum([term for value in values if isinstance(value, _Sum) for term in value.terms])]


def _sub(eqn: Any, a: Any, b: Any) -> list[Any]:
    return _add(eqn, a, b.mapped(jnp.negative) if isinstance(b, _Sum) else b)


def _select(eqn: Any, which: Any, *cases: Any) -> list[Any] | None:
    if isinstance(which, _Sum):
        return None
    nothing, found = zeros(eqn.outvars[0].aval), []
    for i, case in enumerate(cases):
        if isinstance(case, _Sum):

            def chosen(after, i=i):
                return jax.lax.select_n(which, *(after if k == i else nothing for k in range(len(cases))))

            found += case.mapped(chosen).terms
    return [_Sum(found)]


def _product(eqn: Any, a: Any, b: Any) -> list[Any] | None:
    """One product with a matrix, along the last axis of what has had none."""
    (of_a, of_b), batch = eqn.params["dimension_numbers"]
    tangent, W, axes, of_W = (a, b, of_a, of_b) if isinstance(a, _Sum) else (b, a, of_b, of_a)
    shape = eqn.invars[0 if tangent is a else 1].aval.shape
    moved = tangent is b and len(shape) > 1  # the entries of the result then come first
    if batch != ((), ()) or isinstance(W, _Sum) or W.ndim != 2 or tuple(axes) != (len(shape) - 1,) or moved:
        return None
    W = W.T if tuple(of_W) == (0,) else W
    if any(term.W is not None or term.start != 0 or len(W[0]) != shape[-1] for term in tangent.terms):
        return None
    ones = 1 + zeros(eqn.outvars[0].aval)
    return [_Sum([_Term(ones, W, term.after) for term in tangent.terms])]


def _piece(value: _Sum, start: int, size: int) -> _Sum:
    """`size` entries from `start` on."""

    def cut(term):
        after = jax.lax.slice_in_dim(term.after, start, start + size, axis=-1)
        W = None if term.W is None else term.W[start : start + size]
        return term._replace(after=after, W=W, start=term.start + start)

    return _Sum(list(map(cut, value.terms)))


def _split(eqn: Any, value: Any) -> list[Any] | None:
    if eqn.params["axis"] != eqn.invars[0].aval.ndim - 1:
        return None
    found, start = [], 0
    for size in eqn.params["sizes"]:
        found.append(_piece(value, start, size))
        start += size
    return found


def _slice(eqn: Any, value: Any) -> list[Any] | None:
    old, new = eqn.invars[0].aval.shape, eqn.outvars[0].aval.shape
    if old[:-1] != new[:-1] or any(step != 1 for step in eqn.params["strides"] or ()):
        return None
    return [_piece(value, eqn.params["start_indices"][-1], new[-1])]


_RULES: dict[str, Callable[..., list[Any] | None]] = {
    "mul": _mul,
    "div": _div,
    "add": _add,
    "add_any": _add,
    "sub": _sub,
    "select_n": _select,
    "dot_general": _product,
    "split": _split,
    "slice": _slice,
    **dict.fromkeys(["neg", "convert_element_type", "copy", "reduce_precision"], _same_entries),
}
