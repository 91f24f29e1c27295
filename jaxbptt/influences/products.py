r"""How a step uses its weights, read off its equations: as factors of products with what the recurrence brings along.

A layer reads W v, with a weight W and an input v, the carry or x. What W does to the new carry at once is then given by D, the
derivative of the carry with respect to the product, and v: two things of the size of the layer, and together a form that is
linear in both. So influences can be stored as pairs of that kind, and two of them mixed by random signs.

The derivative of the carry with respect to W is the sum over all uses of W of what that use does alone, whatever v depends on.
Weights with one axis, biases and gains, need no such form: their influence has n times as many numbers, no more than D.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jaxtyping import Array

from jaxbptt.programs.evaluate import bind, evaluate, evaluate_jaxpr, read
from jaxbptt.programs.program import Program, program, used
from jaxbptt.trees import name

_PRODUCTS = {"dot_general", "conv_general_dilated"}
_MOVES = {"transpose", "reshape", "squeeze", "expand_dims", "broadcast_in_dim", "slice", "split", "rev", "copy", "neg"}
_MOVES |= {"convert_element_type"}
_SUMS = {"concatenate", "add", "add_any", "sub"}  # linear in each operand, whatever the others are
_SCALES = {"mul", "div"}  # by a number


class Form:
    """A map of (the leaves of the params, input) to a result, linear in both: W v, with the W that a step makes of its leaves.

    Two of them are equal if they have the same equations: a pytree that has one among its static data is compared by it.
    """

    def __init__(self, fn: Callable[..., Any], *types: Any) -> None:
        self._jaxpr: Any = jax.make_jaxpr(fn)(*types)
        self._text = str(self._jaxpr)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Form) and self._text == other._text

    def __hash__(self) -> int:
        return hash(self._text)

    def pull(self, leaves: list[Array], v: Array, bar: Array) -> list[Array]:
        """The cotangents of leaves like these, from that of the result."""

        def of_leaves(leaves):
            return evaluate_jaxpr(self._jaxpr.jaxpr, [], [*leaves, v])[0]

        return jax.vjp(of_leaves, leaves)[1](bar)[0]


class Group(NamedTuple):
    """Products that are added up before anything else is done with them, so that the carry depends on them by one D.

    Attributes:
        shape: that of the sum.
        inputs: the shape of the input of each product.
        forms: each product as a map of the leaves and its input.
    """

    shape: tuple[int, ...]
    inputs: tuple[tuple[int, ...], ...]
    forms: tuple[Form, ...]


class Products(NamedTuple):
    """All that a step does with its params.

    Attributes:
        treedef: the structure of the params.
        shapes: those of their leaves.
        groups: the products, in order.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    groups: tuple[Group, ...]

    @property
    def in_full(self) -> list[int]:
        """The numbers of the leaves with one axis at most, whose influence is kept in full."""
        return [i for i, shape in enumerate(self.shapes) if not _is_matrix(shape)]

    def pull(self, bars: list[Array], inputs: list[list[Array]], dtype: Any) -> list[Array]:
        """The cotangents of the leaves, from those of the sums and the inputs of the products, of several terms each."""
        leaves = found = [jnp.zeros(shape, dtype) for shape in self.shapes]
        for group, bar, vs in zip(self.groups, bars, inputs, strict=True):
            for form, v in zip(group.forms, vs, strict=True):
                terms = jax.vmap(form.pull, (None, 0, 0))(leaves, v, bar)
                found = [total + leaf.sum(0) for total, leaf in zip(found, terms, strict=True)]
        return found


class Linearized(NamedTuple):
    """The derivatives of one row's step, for a carry of n numbers.

    Attributes:
        J: of the carry, `[n, n]`.
        D: of the sum of each group, `[n, *shape]`.
        inputs: of the products in each group.
        F: of the leaves whose influence is kept in full, `[n, *leaf]`.
    """

    J: Array
    D: list[Array]
    inputs: list[list[Array]]
    F: list[Array]


class Uses(NamedTuple):
    """`Products` of a step, found in its trace.

    Attributes:
        products: what they are.
        traced: the trace.
        sums: for each group the variable that is its sum.
        inputs: for each group the variables that are the inputs.
    """

    products: Products
    traced: Program
    sums: list[Any]
    inputs: list[list[Any]]

    def linearized(self, params: Any, c: Array) -> Linearized:
        """At these params and this carry, by n cotangents at once."""
        leaves, in_full = jax.tree.leaves(params), self.products.in_full
        number = {var: i for i, var in enumerate(self.sums)}

        def outputs(added, some, c):
            known = [*leaves]
            for i, leaf in zip(in_full, some, strict=True):
                known[i] = leaf

            def run(eqn, values):
                pairs = zip(eqn.outvars, bind(eqn, values), strict=True)
                return [found + added[number[var]] if var in number else found for var, found in pairs]

            env = self.traced.consts | dict(zip(self.traced.inputs, [*known, c], strict=True))
            env = evaluate(self.traced.eqns, env, run)
            return read(env, self.traced.results)[0], [read(env, variables) for variables in self.inputs]

        added = [jnp.zeros(var.aval.shape, var.aval.dtype) for var in self.sums]
        _, vjp, inputs = jax.vjp(outputs, added, [leaves[i] for i in in_full], c, has_aux=True)
        found = jax.vmap(vjp)(jnp.eye(c.size, dtype=c.dtype))
        (D, F, J), inputs = jax.tree.map(lambda leaf: leaf.astype(c.dtype), (found, inputs))
        return Linearized(J, D, inputs, F)


def uses_of(fn: Callable[..., Any], params: Any, c: Array, influence: str) -> Uses:
    """Those of `fn(params, c) -> c`, for an influence of this name."""
    traced = program(fn, params, c)
    paths, treedef = jax.tree.flatten_with_path(params)
    shapes = tuple(leaf.shape for _, leaf in paths)
    names = {
        var: f"{name('params', path)}, of shape {leaf.shape},"
        for (path, leaf), var in zip(paths, traced.arguments[0], strict=True)
        if _is_matrix(leaf.shape)
    }
    moves, products = [], []
    for eqn in traced.eqns:
        weights = [var for var in _variables(eqn) if var in names]
        if not weights:
            continue
        if _is_linear(eqn):
            names |= dict.fromkeys(eqn.outvars, names[weights[0]])
            moves.append(eqn)
        elif eqn.primitive.name in _PRODUCTS and len(weights) == 1 and len(_variables(eqn)) == 2:
            products.append((eqn, weights[0]))
        else:
            raise ValueError(
                f"{influence} keeps what a weight does as a product with its input, but in the step {names[weights[0]]} goes "
                f"into {eqn.primitive.name}: multiply vectors by it, W @ v, after no more than transposing, splitting or "
                "reshaping it; or take uoro(), or snap(1)."
            )
    groups: dict[Any, list[tuple[Any, Form]]] = {}
    for eqn, weight in products:
        (v,) = (var for var in eqn.invars if var != weight)
        form = _form(traced.arguments[0], used([*moves, eqn], eqn.outvars), v, c.dtype)
        groups.setdefault(_sum_of(traced, eqn.outvars[0]), []).append((v, form))
    inputs = [[v for v, _ in members] for members in groups.values()]
    found = [
        Group(total.aval.shape, tuple(v.aval.shape for v, _ in members), tuple(form for _, form in members))
        for total, members in groups.items()
    ]
    return Uses(Products(treedef, shapes, tuple(found)), traced, list(groups), inputs)


def _is_matrix(shape: tuple[int, ...]) -> bool:
    """Whether a leaf has more than one axis, not counting those of length 1."""
    return math.prod(shape) > max(shape, default=1)


def _variables(eqn: Any) -> list[Any]:
    return [var for var in eqn.invars if not isinstance(var, Literal)]


def _is_linear(eqn: Any) -> bool:
    """Whether the result is linear in each operand that is not a number."""
    kind = eqn.primitive.name
    by_number = len(_variables(eqn)) == 1 and not isinstance(eqn.invars[0] if kind == "div" else None, Literal)
    return kind in _MOVES or kind in _SUMS or (kind in _SCALES and by_number)


def _sum_of(traced: Program, var: Any) -> Any:
    """The sum that a variable goes into, and nothing else."""
    while True:
        readers = [eqn for eqn in traced.eqns for other in eqn.invars if other is var]
        if len(readers) != 1 or readers[0].primitive.name not in ("add", "add_any"):
            return var
        (total,) = readers[0].outvars
        if total.aval.shape != var.aval.shape:
            return var
        var = total


def _form(weights: list[Any], eqns: list[Any], v: Any, dtype: Any) -> Form:
    """What equations make of the leaves and an input, in one dtype; whatever else they read is left out."""

    def run(eqn, values):
        values = [jnp.asarray(value).astype(dtype) for value in values]
        if eqn.primitive.name == "convert_element_type":
            return values
        changed = {"preferred_element_type": None} if eqn.primitive.name in _PRODUCTS else {}
        return bind(eqn, values, **changed)

    def product(*values):
        others = {var: jnp.zeros(var.aval.shape, dtype) for eqn in eqns for var in _variables(eqn)}
        env = evaluate(eqns, others | dict(zip([*weights, v], values, strict=True)), run)
        return [env[var] for var in eqns[-1].outvars]

    return Form(product, *(jax.ShapeDtypeStruct(var.aval.shape, dtype) for var in [*weights, v]))
