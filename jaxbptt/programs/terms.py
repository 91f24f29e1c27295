r"""A step's tangent map as sums of terms: element-wise, a ⊙ ḣ, or with one product with a matrix, a ⊙ (W (b ⊙ ḣ)).

Of such a sum the derivative of one entry with respect to another, ∂c[i]/∂h[j], is read off for all i at once, without a
Jacobian: a[i] W[i, j] b[j]. The element-wise terms alone are what does not pass through a product with a matrix. Entries that
are moved, as by a split, a permutation or a concatenation, are followed by their numbers.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from jaxbptt.array_types import as_type, zeros
from jaxbptt.programs.evaluate import bind
from jaxbptt.programs.program import by_dependence, has_effects, program
from jaxbptt.programs.structure import has_forward_mode


class Term(NamedTuple):
    """A part of a tangent v: v[i] = after[i] ḣ[source[i]], or v[i] = after[i] Σⱼ W[row[i], j] before[j] ḣ[source[j]].

    Attributes:
        leaf: the number of the leaf h.
        after: like v.
        source: integers like v, or like `before`: an entry of ḣ, flat; -1 for none.
        W: a matrix, or `None` where there is no product.
        before: `[columns of W]`.
        row: integers like v; -1 for none.
    """

    leaf: int
    after: Any
    source: np.ndarray
    W: Any = None
    before: Any = None
    row: Any = None


class Sum(NamedTuple):
    """A tangent: the sum of its terms, and of something else that depends on the leaves in `lost`."""

    terms: list[Term]
    lost: frozenset[int] = frozenset()

    def mapped(self, after: Callable[[Any], Any], moved: Callable[[Any], Any] | None = None) -> "Sum":
        """With a function of `after`, and one of the numbers of entries where they are moved."""

        def mapped(term):
            term = term._replace(after=after(term.after))
            if moved is None:
                return term
            return term._replace(source=moved(term.source)) if term.W is None else term._replace(row=moved(term.row))

        return Sum(list(map(mapped, self.terms)), self.lost)

    def entries(self, leaf: int, at: np.ndarray) -> Any:
        """The derivative of each entry i, flat, with respect to entry `at[i]` of a leaf; `None` if it can't be read off."""
        if leaf in self.lost:
            return None
        found = []
        for term in self.terms:
            if term.leaf == leaf:
                part = _elementwise(term, at) if term.W is None else _of_product(term, at)
                if part is None:
                    return None
                found.append(part)
        return sum(found) if found else 0.0

    @property
    def elementwise(self) -> "Sum":
        """The element-wise terms alone."""
        return Sum([term for term in self.terms if term.W is None])


def terms_of(fn: Callable[[list[Any]], list[Any]], leaves: list[Any]) -> list[Sum]:
    """The tangents of `fn(leaves) -> leaves` at these leaves, one for each result."""
    if not has_forward_mode(fn, leaves):
        return [Sum([], frozenset(range(len(leaves)))) for _ in leaves]

    def with_tangents(leaves, tangents):
        return jax.jvp(fn, (leaves,), (tangents,))[1]

    traced = program(with_tangents, leaves, leaves)
    constants = {var for var, value in traced.consts.items() if not isinstance(value, Tracer)}
    constants = by_dependence(traced.eqns, constants).variables
    env = dict(traced.consts) | dict(zip(traced.arguments[0], leaves, strict=True))
    for j, (var, leaf) in enumerate(zip(traced.arguments[1], leaves, strict=True)):
        env[var] = Sum([Term(j, jnp.ones_like(leaf), np.arange(leaf.size).reshape(leaf.shape))])

    def value_of(var):
        return np.asarray(var.val, as_type(var.aval).dtype) if isinstance(var, Literal) else env[var]

    for eqn in traced.eqns:
        values = list(map(value_of, eqn.invars))
        if any(isinstance(value, Sum) for value in values):
            rule = _RULES.get(eqn.primitive.name)
            found = None if rule is None else rule(eqn, *values)
            if found is None:
                lost = frozenset(leaf for value in values if isinstance(value, Sum) for leaf in _leaves(value))
                found = [Sum([], lost) for _ in eqn.outvars]
        elif has_effects(eqn):  # a print has been made by the step itself
            found = [zeros(var.aval) for var in eqn.outvars]
        elif constants.issuperset(eqn.outvars) and not eqn.effects:
            with jax.ensure_compile_time_eval():  # the places of entries have to be known here
                found = bind(eqn, values)
        else:
            found = bind(eqn, values)
        env |= zip(eqn.outvars, found, strict=True)
    results = map(value_of, traced.results)
    return [result if isinstance(result, Sum) else Sum([]) for result in results]


def _leaves(value: Sum) -> set[int]:
    return {*value.lost, *(term.leaf for term in value.terms)}


def _elementwise(term: Term, at: np.ndarray) -> Any:
    here = (term.source.reshape(-1) == at) & (at >= 0)
    after = term.after.reshape(-1)
    return after if here.all() else jnp.where(here, after, 0) if here.any() else 0.0


def _of_product(term: Term, at: np.ndarray) -> Any:
    """Entry (i, at[i]) of after ⊙ (W (before ⊙ ḣ))."""
    reads = term.source[term.source >= 0]
    if len(set(reads.tolist())) < len(reads):  # an entry in two columns
        return None
    columns = np.full(1 + max(at.max(initial=-1), reads.max(initial=-1)), -1)
    columns[reads] = np.flatnonzero(term.source >= 0)
    row, column = term.row.reshape(-1), np.where(at < 0, -1, columns[at])
    here = (row >= 0) & (column >= 0)
    row, column = np.where(here, row, 0), np.where(here, column, 0)
    dtype = term.after.dtype
    found = term.after.reshape(-1) * _taken(term.before, column).astype(dtype) * term.W[row, column].astype(dtype)
    return found if here.all() else jnp.where(here, found, 0)


def _taken(values: Any, at: np.ndarray) -> Any:
    return values if np.array_equal(at, np.arange(len(values))) else values[at]


def _entrywise(eqn: Any, value: Any) -> list[Any]:
    return [value.mapped(lambda after: bind(eqn, [after])[0])]


def _part(eqn: Any, value: Any) -> list[Any] | None:
    """Real or imaginary: not of a product of complex numbers."""
    return None if value.lost or any(term.W is not None for term in value.terms) else _entrywise(eqn, value)


def _complex(eqn: Any, re: Any, im: Any) -> list[Any]:
    return _add(
        eqn,
        *(
            part.mapped(lambda after, unit=unit: unit * after.astype(eqn.outvars[0].aval.dtype))
            if isinstance(part, Sum)
            else part
            for part, unit in ((re, 1), (im, 1j))
        ),
    )


def _moved(eqn: Any, value: Any, *known: Any) -> list[Any] | None:
    """Entries at other places; where to, does not depend on numbers that are not known."""
    if not isinstance(value, Sum) or any(isinstance(other, Sum | Tracer) for other in known):
        return None
    found = []
    for i in range(len(eqn.outvars)):

        def numbers(at, i=i):
            with jax.ensure_compile_time_eval():
                return np.asarray(bind(eqn, [jnp.asarray(at), *known])[i])

        found.append(value.mapped(lambda after, i=i: bind(eqn, [after, *known])[i], numbers))
    return found


def _joined(eqn: Any, *values: Any) -> list[Any]:
    """Of tangents and zeros."""
    found, lost = [], frozenset()
    for i, value in enumerate(values):
        if not isinstance(value, Sum):
            continue

        def whole(part, nothing, i=i):
            parts = [jnp.full(var.aval.shape, nothing, part.dtype) for var in eqn.invars]
            return bind(eqn, [*parts[:i], jnp.asarray(part), *parts[i + 1 :]])[0]

        def numbers(at, whole=whole):
            with jax.ensure_compile_time_eval():
                return np.asarray(whole(at, -1))

        moved = value.mapped(lambda after, whole=whole: whole(after, 0), numbers)
        found += moved.terms
        lost |= moved.lost
    return [Sum(found, lost)]


def _pad(eqn: Any, value: Any, padding: Any) -> list[Any] | None:
    if isinstance(padding, Sum):
        return None

    def numbers(at):
        with jax.ensure_compile_time_eval():
            return np.asarray(jax.lax.pad(jnp.asarray(at), jnp.asarray(-1, at.dtype), eqn.params["padding_config"]))

    return [value.mapped(lambda after: bind(eqn, [after, jnp.zeros_like(padding)])[0], numbers)]


def _mul(eqn: Any, a: Any, b: Any) -> list[Any]:
    tangent, known = (a, b) if isinstance(a, Sum) else (b, a)
    return [tangent.mapped(lambda after: after * known)]


def _div(eqn: Any, a: Any, b: Any) -> list[Any]:
    return [a.mapped(lambda after: after / b)]


def _add(eqn: Any, *values: Any) -> list[Any]:
    """Of tangents and zeros."""
    sums = [value for value in values if isinstance(value, Sum)]
    return [Sum([term for value in sums for term in value.terms], frozenset().union(*(value.lost for value in sums)))]


def _sub(eqn: Any, a: Any, b: Any) -> list[Any]:
    return _add(eqn, a, b.mapped(jnp.negative) if isinstance(b, Sum) else b)


def _select(eqn: Any, which: Any, *cases: Any) -> list[Any]:
    nothing = zeros(eqn.outvars[0].aval)

    def chosen(i):
        return lambda after: jax.lax.select_n(which, *(after if k == i else nothing for k in range(len(cases))))

    return _add(eqn, *(case.mapped(chosen(i)) if isinstance(case, Sum) else case for i, case in enumerate(cases)))


def _product(eqn: Any, a: Any, b: Any) -> list[Any] | None:
    """A product with a matrix of a vector that has had none."""
    (of_a, of_b), batch = eqn.params["dimension_numbers"]
    tangent, W, axes, of_W = (a, b, of_a, of_b) if isinstance(a, Sum) else (b, a, of_b, of_a)
    shape = eqn.invars[0 if tangent is a else 1].aval.shape
    if batch != ((), ()) or W.ndim != 2 or len(axes) != 1 or shape[axes[0]] != np.prod(shape, dtype=int):
        return None
    if any(term.W is not None for term in tangent.terms):
        return None
    out = eqn.outvars[0].aval
    W = W.T if tuple(of_W) == (0,) else W
    row = np.arange(len(W)).reshape(out.shape)
    ones = 1 + zeros(out)
    terms = [Term(t.leaf, ones, t.source.reshape(-1), W, t.after.reshape(-1), row) for t in tangent.terms]
    return [Sum(terms, tangent.lost)]


_MOVES = "reshape squeeze expand_dims broadcast_in_dim transpose slice split unstack rev gather dynamic_slice"
_RULES: dict[str, Callable[..., list[Any] | None]] = {
    "mul": _mul,
    "div": _div,
    "add": _add,
    "add_any": _add,
    "sub": _sub,
    "select_n": _select,
    "dot_general": _product,
    "concatenate": _joined,
    "stack": _joined,
    "pad": _pad,
    "complex": _complex,
    "real": _part,
    "imag": _part,
    **dict.fromkeys(["neg", "convert_element_type", "copy", "copy_p", "reduce_precision"], _entrywise),
    **dict.fromkeys(_MOVES.split(), _moved),
}
