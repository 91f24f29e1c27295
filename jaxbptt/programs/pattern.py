r"""Which entries of the carry each weight, and each entry of the carry, can reach in one step: the pattern of F and of J.

A pattern is a property of the program, not of the numbers it runs on. So the step is traced with its derivative in reverse mode,
and what it computes from params, carry and x is replaced by random numbers: an entry is reached where the result is not zero.
Constants of the trace, such as masks and permutations, keep their values, and a product with a zero of theirs stays zero. Of a
choice that is not constant all cases are taken, and an equation that is not known reaches everything.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

from jaxbptt.array_types import as_type
from jaxbptt.programs.evaluate import bind, evaluate_jaxpr
from jaxbptt.programs.program import Program, program

# Polynomials and moves of entries: computed as they are, so that zeros stay zeros.
_EXACT = """add sub mul neg add_any copy copy_p real imag conj complex square reshape squeeze expand_dims broadcast_in_dim
transpose slice split concatenate stack unstack pad rev reduce_sum cumsum dot_general conv_general_dilated gather dynamic_slice
dynamic_update_slice optimization_barrier"""
_COMPUTED = {*_EXACT.split()}
_VANISHING = "tanh sin tan asin atan sinh asinh atanh abs sign sqrt cbrt expm1 log1p erf integer_pow"
_ZERO_AT_ZERO = {*_VANISHING.split()}  # of one known operand
_ANYTHING = object()  # an integer, flag or key that is computed from params, carry or x
_NEGLIGIBLE = 1e-12  # what two equal paths of opposite sign leave by rounding

Reached = np.ndarray  # for each entry of a leaf the one entry that it reaches, or -1


def reached_entries(
    step: Callable[..., Any], params: Any, carry: Any, x: Any
) -> tuple[list[list[Reached | None]], list[list[Reached | None]]]:
    """Of each leaf k of the new carry the one entry that is reached from each entry of each leaf.

    Returns:
        (of_params, of_carry): `of_params[k][a]` are integers like leaf a of the params, -1 where nothing is reached and `None`
        for all of a leaf that has an entry which reaches several; `of_carry` the same for the leaves of the carry.
    """
    leaves, rng = jax.tree.leaves(carry), np.random.default_rng(1)
    # With one entry alone, cotangents of 1, of i and of rᵢ give f, f i and f rᵢ.
    tests = [np.stack([np.ones(leaf.size), 1 + np.arange(leaf.size), _random(rng, (leaf.size,))]) for leaf in leaves]
    bars = []
    for k, leaf in enumerate(leaves):
        shape = (3 * len(leaves), leaf.size)
        bars.append(np.zeros(shape))
        bars[k][3 * k : 3 * k + 3] = tests[k]
        bars[k] = bars[k].reshape(shape[0], *leaf.shape)
    found = _pulled(step, params, carry, x, bars, jax.vmap)
    found = [[_one_entry(leaf[3 * k : 3 * k + 3], tests[k][2]) for leaf in found] for k in range(len(leaves))]
    count = len(jax.tree.leaves(params))
    return [of_leaf[:count] for of_leaf in found], [of_leaf[count:] for of_leaf in found]


def patterns(step: Callable[..., Any], params: Any, carry: Any, x: Any) -> tuple[list[np.ndarray], np.ndarray]:
    """Where F and J can differ from zero: flags `[n, *leaf]` for each leaf of the params, and `[n, n]`."""
    leaves = jax.tree.leaves(carry)
    n, ends = sum(leaf.size for leaf in leaves), np.cumsum([leaf.size for leaf in leaves])
    one = np.split(np.eye(n), ends[:-1], axis=1)
    bars = [rows.reshape(n, *leaf.shape) for rows, leaf in zip(one, leaves, strict=True)]
    found = _pulled(step, params, carry, x, bars, lambda fn: lambda bars: jax.lax.map(fn, bars))
    found = [np.abs(leaf) > _NEGLIGIBLE for leaf in found]
    count = len(jax.tree.leaves(params))
    return found[:count], np.concatenate([leaf.reshape(n, -1) for leaf in found[count:]], axis=1)


def _one_entry(found: np.ndarray, r: np.ndarray) -> Reached | None:
    ones, numbered, random = found
    reached = (np.abs(found) > _NEGLIGIBLE).any(0)
    ratio = np.divide(numbered, ones, out=np.zeros(ones.shape), where=reached & (ones != 0)) - 1
    at = np.where(reached, np.clip(np.nan_to_num(ratio.round()), 0, len(r) - 1), 0).astype(int)
    close = np.abs(random - r[at] * ones) <= 1e-8 * np.abs(random)
    close &= np.abs(ratio - at) <= 1e-8 * len(r)
    return np.where(reached, at, -1) if close[reached].all() else None


def _pulled(
    step: Callable[..., Any], params: Any, carry: Any, x: Any, bars: list[np.ndarray], over: Callable[..., Any]
) -> list[np.ndarray]:
    """What these cotangents of the new carry are at the leaves of the params and the carry, with random numbers for known ones."""

    def pulled(params, carry, x, bars):
        _, vjp = jax.vjp(lambda params, carry: jax.tree.leaves(step(params, carry, x)[0]), params, carry)
        return vjp(bars)

    like = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(carry)]
    traced = program(pulled, params, carry, x, like)
    # In double precision, whatever the step computes in; at once, also while the step is traced for something else.
    with jax.ensure_compile_time_eval(), jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        fn = over(_Evaluation(traced).run)
        closed = jax.make_jaxpr(fn)(bars)
        # The random numbers are arguments: as constants, the compiler would compute with them.
        found = jax.jit(lambda consts, bars: evaluate_jaxpr(closed.jaxpr, consts, bars))(closed.consts, bars)
        return [np.asarray(leaf) for leaf in found]


class _Evaluation:
    """A program of (params, carry, x, bars), linear in its bars, evaluated with random numbers for the others."""

    def __init__(self, traced: Program) -> None:
        self.traced = traced
        self.rng = np.random.default_rng(0)

    def run(self, bars: list[Any]) -> list[Any]:
        traced = self.traced
        constants = {var for var, value in traced.consts.items() if not isinstance(value, Tracer)}
        env = {var: value if var in constants else self._drawn(var) for var, value in traced.consts.items()}
        *known, of_bars = traced.arguments
        env |= {var: self._drawn(var) for argument in known for var in argument}
        env |= zip(of_bars, bars, strict=True)
        moving = set(of_bars)

        def value_of(var):
            return np.asarray(var.val, as_type(var.aval).dtype) if isinstance(var, Literal) else env[var]

        for eqn in traced.eqns:
            values = [value_of(var) for var in eqn.invars]
            variables = [var for var in eqn.invars if not isinstance(var, Literal)]
            if constants.issuperset(variables) and not eqn.effects:
                constants.update(eqn.outvars)
                env |= zip(eqn.outvars, bind(eqn, values), strict=True)
                continue
            tangent = [value for var, value in zip(eqn.invars, values, strict=True) if _is_in(var, moving)]
            if tangent:
                moving.update(eqn.outvars)
            env |= zip(eqn.outvars, self._computed(eqn, list(map(_wide, values)), tangent), strict=True)
        return [_wide(value_of(var)) for var in traced.results]

    def _computed(self, eqn: Any, values: list[Any], tangent: list[Any]) -> list[Any]:
        """The results of an equation that is not constant; `tangent` are those of its operands that are linear in the bars."""
        kind = eqn.primitive.name
        known = not any(value is _ANYTHING for value in values)
        floats = all(_is_inexact(var) for var in eqn.outvars)
        if kind == "convert_element_type" and known and floats:
            complex_ = jnp.issubdtype(eqn.params["new_dtype"], jnp.complexfloating)
            return [values[0].astype(complex) if complex_ else values[0].real.astype(float)]
        if kind == "reduce_precision":
            return values
        if kind == "scatter-add" and known and floats:
            # Its sum is a program of its own, in the dtype that it was traced in.
            same = {
                name: eqn.params[name] for name in ("dimension_numbers", "indices_are_sorted", "unique_indices", "mode")
            }
            return [jax.lax.scatter_add(*values, **same)]
        if kind in _COMPUTED and known and floats:
            exact = (
                {"preferred_element_type": None, "precision": None} if "preferred_element_type" in eqn.params else {}
            )
            return bind(eqn, values, **exact)
        if kind == "select_n" and floats and not any(case is _ANYTHING for case in values[1:]):
            if values[0] is not _ANYTHING:
                return bind(eqn, values)
            return [sum(self._drawn(eqn.outvars[0]) * case for case in values[1:])]
        if kind == "div" and known:
            return [self._drawn(eqn.outvars[0]) * values[0]]
        if kind in _ZERO_AT_ZERO and known and floats and not tangent:
            return [self._drawn(eqn.outvars[0]) * jnp.real(values[0])]
        if kind in ("scatter-add", "dynamic_update_slice") and floats:
            spread = self._at_any_place(eqn, values)
            if spread is not None:
                return [spread]
        drawn = [self._drawn(var) for var in eqn.outvars]
        if not tangent:
            return drawn
        parts = [part for value in map(_wide, tangent) for part in (jnp.real(value), jnp.imag(value))]
        total = sum(jnp.sum(_random(self.rng, part.shape) * part) for part in parts)
        return [number if number is _ANYTHING else number * total for number in drawn]

    def _at_any_place(self, eqn: Any, values: list[Any]) -> Any:
        """What is added or written at a place that is not constant, added at all places: the gradient of a row of a table."""
        scatter = eqn.primitive.name == "scatter-add"
        whole, part = (values[0], values[2]) if scatter else (values[0], values[1])
        if any(value is _ANYTHING for value in (whole, part)):
            return None
        if scatter:
            numbers = eqn.params["dimension_numbers"]
            if numbers.operand_batching_dims:
                return None
            others = [axis for axis in range(part.ndim) if axis not in numbers.update_window_dims]
            part = jnp.sum(
                part
                * _random(self.rng, [part.shape[axis] for axis in others]).reshape(
                    [part.shape[axis] if axis in others else 1 for axis in range(part.ndim)]
                ),
                others,
            )
            part = jnp.expand_dims(part, numbers.inserted_window_dims)
        along = [axis for axis in range(whole.ndim) if part.shape[axis] != whole.shape[axis]]
        factors = _random(self.rng, part.shape)
        part = jnp.sum(factors * part, along, keepdims=True) if along else factors * part
        return whole + _random(self.rng, whole.shape) * part

    def _drawn(self, var: Any) -> Any:
        if not _is_inexact(var):
            return _ANYTHING
        numbers = _random(self.rng, var.aval.shape)
        if jnp.issubdtype(var.aval.dtype, jnp.complexfloating):
            return numbers + 1j * _random(self.rng, var.aval.shape)
        return numbers


def _is_in(var: Any, variables: set[Any]) -> bool:
    return not isinstance(var, Literal) and var in variables


def _is_inexact(var: Any) -> bool:
    return hasattr(var.aval, "dtype") and jnp.issubdtype(var.aval.dtype, jnp.inexact)


def _wide(value: Any) -> Any:
    """In double precision, where it is a floating-point number."""
    if value is _ANYTHING or not jnp.issubdtype(value.dtype, jnp.inexact):
        return value
    return jnp.asarray(value, complex if jnp.issubdtype(value.dtype, jnp.complexfloating) else float)


def _random(rng: np.random.Generator, shape: Any) -> np.ndarray:
    """Of either sign, and not small: products of a few are not small either."""
    size = math.prod(shape)
    return (rng.uniform(0.5, 1.5, size) * rng.choice([-1.0, 1.0], size)).reshape(shape)
