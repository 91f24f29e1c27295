r"""Newton's method on all time steps of a recurrence at once: the inside of `newton_scan` and `newton_states`.

The unknowns are the states of all steps. At a guess g of them the recurrence is linearised, and the correction δ of the guess
solves an affine recurrence, as an associative scan (`affine`):

    δₜ = Jₜ δₜ₋₁ + (f(gₜ₋₁, xₜ) − gₜ),  δ₀ = 0

It is written for the correction and not for the new states: what is right already is not computed again, with other
rounding errors. Where the guess is right up to step t − 1, the next one is right at t, whatever J is. So J may be replaced by its
diagonal, or damped, and what is not finite by any number: the steps that are right only become more.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt.along_time import at, put, put_window, room, window
from jaxbptt.array_types import as_weak_as, varying
from jaxbptt.programs.diagonal import diagonals
from jaxbptt.programs.structure import Group
from jaxbptt.scans.affine import (
    Affine,
    apply,
    at_all_steps,
    flattened,
    leaves_in_sequence,
    linearize,
    of_group,
    shifted,
    solve_group,
    split_up,
    value_and_jacobian,
    widened,
)
from jaxbptt.trees import is_differentiable


class Options(NamedTuple):
    """How to iterate.

    Attributes:
        diagonal: whether a dense Jacobian is replaced by its diagonal.
        tolerance: of the change of a state in one iteration, relative to its size; `None` for that of its dtype.
        max_iterations: passes over all time steps, at most.
        damping: 1 minus the factor on J.
        chunk_length: time steps in a window, at most; `None` for all at once.
    """

    diagonal: bool
    tolerance: float | None
    max_iterations: int
    damping: float
    chunk_length: int | None


class Report(NamedTuple):
    """What happened: iterations in all, the largest residual, and the first step that is not right, or T."""

    iterations: Any
    residual: Any
    first_bad_step: Any

    @classmethod
    def nothing_done(cls, length: int) -> "Report":
        """Where there is nothing to solve."""
        return cls(jnp.zeros((), jnp.int32), jnp.zeros(()), jnp.asarray(length, jnp.int32))


def newton(
    fn: Callable[..., Any],
    groups: list[Group],
    init: list[Any],
    stacked: Any,
    guess: list[Any] | None,
    length: int,
    options: Options,
    *,
    one_at_a_time: bool,
    finish: bool,
) -> tuple[list[Any], list[Any], Report]:
    """The leaves of cₜ = fn(cₜ₋₁, stacked at t) before and after every step, group after group.

    With `finish`, a group that did not converge is computed in sequence before the next one reads it.
    """
    before = [jnp.broadcast_to(leaf, (length, *leaf.shape)) for leaf in init]
    after, reports = list(before), []
    for group in groups:
        mine = [init[i] for i in group.leaves]
        if all(map(is_differentiable, mine)):
            first = [room(leaf, length) for leaf in mine] if guess is None else [guess[i] for i in group.leaves]
            iteration = _Iteration(fn, group, mine, before, stacked, length, options, one_at_a_time)
            found, report = iteration.run(first, finish=finish)
            reports.append(report)
        else:
            found = _after(*leaves_in_sequence(fn, group, mine, before, stacked))
        for i, leaf in zip(group.leaves, found, strict=True):
            after[i] = leaf
        for i, leaf in zip(group.leaves, _before(found, mine), strict=True):
            before[i] = leaf
    return before, after, _joined(reports, length)


class _Iteration(NamedTuple):
    """Newton's method for one group of leaves, all groups before it being known."""

    fn: Callable[..., Any]
    group: Group
    init: list[Any]
    before: list[Any]
    stacked: Any
    length: int
    options: Options
    one_at_a_time: bool

    @property
    def window_length(self) -> int:
        """Time steps that are solved at once."""
        return min(self.options.chunk_length or self.length, self.length)

    def run(self, guess: list[Any], *, finish: bool) -> tuple[list[Any], Report]:
        """The leaves after every step from a guess of them, and what happened."""
        most = self.options.max_iterations * -(-self.length // self.window_length)

        def going_on(state):
            _, first_bad, iterations = state
            return (first_bad < self.length) & (iterations < most)

        def improve(state):
            after, first_bad, iterations = state
            after, first_bad = self._improved(after, self._start(first_bad))
            return after, _on_all_devices(first_bad), iterations + 1

        guess = [jnp.where(jnp.isfinite(leaf), leaf, jnp.zeros_like(leaf)) for leaf in guess]
        zero = jnp.zeros((), jnp.int32)
        after, first_bad, iterations = jax.lax.while_loop(going_on, improve, (guess, zero, zero))
        if finish:
            after = self._finished(after, first_bad)
        new = self._mapped(lambda step, here: step(here))(self._here(after, 0, self.length))
        off = _difference(new, after)
        sizes = self._sizes(after, self.init)
        residual = jnp.stack([_largest_ratio(*each) for each in zip(off, sizes, strict=True)]).max()
        return after, Report(iterations, residual, jnp.minimum(first_bad, _leading(self._within(off, sizes))))

    def _start(self, first_bad: Any) -> Any:
        """The first step of the window. The steps before the first bad one are right, and stay as they are."""
        return jnp.minimum(first_bad, self.length - self.window_length)

    def _here(self, after: list[Any], start: Any, length: int) -> tuple[list[Any], list[Any], Any]:
        """What the steps of a window read: the group before each of them, all other leaves, and what is stacked."""
        if length == self.length:
            return _before(after, self.init), self.before, self.stacked
        found = at(after, jnp.maximum(start - 1, 0))
        first = [jnp.where(start == 0, *each) for each in zip(self.init, found, strict=True)]
        first = list(map(as_weak_as, first, self.init))
        after, before, stacked = window((after, self.before, self.stacked), start, length)
        return _before(after, first), before, stacked

    def _mapped(self, function: Callable[..., Any], length: int | None = None) -> Callable[..., Any]:
        """`function(group's step, leaves before)` at all steps of a window, as a function of what `_here` returns."""

        def at_t(here, before, at_t):
            return function(of_group(self.fn, self.group, before, at_t), here)

        mapped = at_all_steps(at_t, length or self.length, one_at_a_time=self.one_at_a_time)
        return lambda window: mapped(*window)

    def _improved(self, after: list[Any], start: Any) -> tuple[list[Any], Any]:
        """One iteration on a window: the leaves after every step, and the first step that is not right yet."""
        length = self.window_length
        here = self._here(after, start, length)
        old = after if length == self.length else window(after, start, length)
        value, A = self._mapped(self._value_and_jacobian, length)(here)
        finite = [jnp.isfinite(leaf) for leaf in value]
        # Where the step itself overflows at the guess there is nothing to go by.
        value = [jnp.where(flag, leaf, jnp.zeros_like(leaf)) for flag, leaf in zip(finite, value, strict=True)]
        A = jax.tree.map(lambda leaf: jnp.where(jnp.isfinite(leaf), (1 - self.options.damping) * leaf, 0), A)
        # And not the guess plus its correction: where the guess is huge, that would lose all digits of the value.
        new = jax.tree.map(jnp.add, value, self._carried(A, _difference(value, old)))
        # The product of many Jacobians may overflow where the states do not.
        new = [jnp.where(jnp.isfinite(leaf), leaf, v) for leaf, v in zip(new, value, strict=True)]
        new = [leaf.astype(first.dtype) for leaf, first in zip(new, self.init, strict=True)]
        change = [jnp.where(flag, leaf, jnp.inf) for flag, leaf in zip(finite, _difference(new, old), strict=True)]
        first = [leaf[0] for leaf in here[0]]
        first_bad = start + _leading(self._within(change, self._sizes(new, first)))
        return new if length == self.length else put_window(after, new, start), first_bad

    def _value_and_jacobian(self, step: Callable[..., Any], here: list[Any]) -> tuple[list[Any], Any]:
        if self.options.diagonal and not self.group.elementwise:
            value, tangent = linearize(step, here)
            return widened(value), widened(diagonals(tangent, here, self.group.batch))
        return value_and_jacobian(step, here, self.group)

    def _carried(self, A: Any, off: list[Any]) -> list[Any]:
        """Jₜ δₜ₋₁: what the corrections of the steps before add to the value, from J and what the guess is off by."""
        zero = [jnp.zeros_like(leaf[0]) for leaf in off]
        if self.group.elementwise:
            before, _ = solve_group(self.group, Affine(A, off), zero)
            return [sum(a * leaf for a, leaf in zip(row, before, strict=True)) for row in A]
        if self.options.diagonal:
            alone = Group((0,), (), elementwise=True, batch=0, clashes=())
            each = zip(A, off, zero, strict=True)
            return [a * solve_group(alone, Affine([[a]], [b]), [c])[0][0] for a, b, c in each]
        flat = jax.vmap(lambda leaves: flattened(leaves, self.group.batch))
        before, _ = solve_group(self.group, Affine(A, flat(off)), zero)
        return split_up(apply(A, flat(before)), [leaf.shape for leaf in zero], self.group.batch)

    def _sizes(self, after: list[Any], first: list[Any]) -> list[Any]:
        """How large each leaf has been so far, the leaf before the first step included.

        Of an element-wise group for each entry, otherwise for each row of the batch axes.
        """

        def so_far(leaf, first):
            sizes = jnp.abs(jnp.concatenate([first[None], leaf]))
            if not self.group.elementwise:
                sizes = sizes.max(axis=range(1 + self.group.batch, sizes.ndim), keepdims=True, initial=0)
            return jax.lax.cummax(sizes)[1:]

        return [so_far(*each) for each in zip(widened(after), widened(first), strict=True)]

    def _within(self, errors: list[Any], sizes: list[Any]) -> Any:
        """The steps at which errors are within the tolerance."""
        right = jnp.ones(len(errors[0]), bool)
        for error, size, leaf in zip(errors, sizes, self.init, strict=True):
            tolerance = self.options.tolerance or default_tolerance(leaf.dtype)
            right &= (jnp.abs(error) <= tolerance * size).all(axis=range(1, error.ndim))
        return right

    def _finished(self, after: list[Any], first_bad: Any) -> list[Any]:
        """The leaves after every step, those of the window that did not converge and all after it in sequence."""
        # From the first step of the window, not from the first bad one: mapped over time, steps round differently, and where
        # small errors grow, the sequence from there on would have nothing in common with the one that `scan` computes.
        start = jnp.where(first_bad < self.length, self._start(first_bad), self.length)

        def going_on(state):
            return state[0] < self.length

        def one_step(state):
            t, mine, after = state
            mine = list(map(as_weak_as, mine, self.init))
            new = of_group(self.fn, self.group, *at((self.before, self.stacked), t))(mine)
            new = [jnp.asarray(leaf, first.dtype) for leaf, first in zip(new, self.init, strict=True)]
            return t + 1, new, put(after, new, t)

        found = at(after, jnp.maximum(start - 1, 0))
        mine = [jnp.where(start == 0, *each) for each in zip(self.init, found, strict=True)]
        return jax.lax.while_loop(going_on, one_step, (start, mine, after))[2]


def default_tolerance(dtype: Any) -> float:
    """1e-10 in double precision, otherwise what rounding allows: 16 units in the last place, in half precision 4."""
    info = jnp.finfo(dtype)
    return 1e-10 if info.bits >= 64 else float(info.eps) * (16 if info.bits == 32 else 4)


def _before(after: list[Any], first: list[Any]) -> list[Any]:
    """The leaves before every step, from those after it and those before the first."""
    return [as_weak_as(shifted(*each), each[1]) for each in zip(after, first, strict=True)]


def _after(before: list[Any], last: list[Any]) -> list[Any]:
    """The leaves after every step, from those before it and those after the last."""
    return [jnp.concatenate([leaf[1:], end[None]]) for leaf, end in zip(before, last, strict=True)]


def _difference(leaves: list[Any], others: list[Any]) -> list[Any]:
    return jax.tree.map(jnp.subtract, widened(leaves), widened(others))


def _leading(right: Any) -> Any:
    """How many steps are right before the first that is not."""
    return jnp.where(right.all(), len(right), jnp.argmin(right)).astype(jnp.int32)


def _on_all_devices(step: Any) -> Any:
    """The first of all devices of a `shard_map`: what they share stays the same on each if they read it at the same steps."""
    axes = varying(step)
    return jax.lax.pmin(step, axes) if axes else step


def _largest_ratio(error: Any, size: Any) -> Any:
    ratio = jnp.where(error == 0, 0, jnp.abs(error) / size)
    return jnp.where(jnp.isnan(ratio), jnp.inf, ratio).max(initial=0)


def _joined(reports: list[Report], length: int) -> Report:
    """The report of all groups: iterations one after the other, the largest residual, the first bad step."""
    if not reports:
        return Report.nothing_done(length)
    iterations, residuals, first_bad_steps = zip(*reports, strict=True)
    return Report(sum(iterations), jnp.stack(widened(list(residuals))).max(), jnp.stack(first_bad_steps).min())
