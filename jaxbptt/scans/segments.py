r"""Forward over segments of time, storing some states, and backward over them, one segment at a time.

What `checkpointed_scan` runs. A `Layout` says how time is cut.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt.along_time import at, at_one_step, filled, put, put_window, room, window
from jaxbptt.array_types import as_weak_as
from jaxbptt.programs.perturbed import fit
from jaxbptt.programs.program import program
from jaxbptt.scans import schedule
from jaxbptt.scans.passes import BarAndSums, Bars, Pass, lengths_to_contract
from jaxbptt.scans.residuals import Storage, stored_once
from jaxbptt.trees import select


@jax.tree_util.register_static
@dataclass(frozen=True)
class Layout:
    """How time is cut, and what is kept.

    Attributes:
        segment: time steps in a segment.
        segments: whole segments.
        left_over: time steps of a last, shorter one, or 0.
        slots: states kept at the same time.
        kept: the segments before which the forward pass keeps a state.
        lean: whether weight gradients are added up at every step, not once for a segment: this needs neither the deltas
            of a segment nor a second array like the params, and takes more time.
    """

    segment: int
    segments: int
    left_over: int
    slots: int
    kept: tuple[int, ...]
    lean: bool

    @property
    def length(self) -> int:
        """Time steps in all."""
        return self.segments * self.segment + self.left_over

    @property
    def all_kept(self) -> bool:
        """Whether there is a state before every segment, so that nothing is computed more than twice."""
        return self.slots >= self.segments

    @property
    def forward_steps(self) -> int:
        """Steps computed for one gradient: the forward pass, and all that is recomputed."""
        if self.all_kept:
            return 2 * self.length
        # The schedule also counts its first sweep, up to the last stored state; the forward pass has done that.
        recomputed = schedule.forward_steps(self.segments, self.slots) - self.kept[-1]
        return self.length + recomputed * self.segment + self.left_over

    @property
    def steps_recomputed(self) -> Fraction:
        """Steps recomputed between kept states before one segment is reversed, on average."""
        return Fraction(self.forward_steps - 2 * self.length, self.segments)


def forward(over_time: Pass, params: Any, init: Any, xs: Any, cut: Layout) -> tuple[Any, Any]:
    """`lax.scan`, and the states that the backward pass starts from: in slots, and before what is left over."""
    upcoming = None if cut.all_kept else jnp.array([*cut.kept, cut.segments], jnp.int32)
    step = partial(over_time.step.step, params)

    def over_segment(carry, ys, start, length):
        xs_here = window(xs, start, length)
        carry, ys_here = over_time.loop(step, carry, xs_here, length)
        return carry, put_window(ys, ys_here, start)

    def body(index, state):
        carry, ys, states, slot = state
        index = jnp.asarray(index, jnp.int32)
        # Each state overwrites the slot until the one before segment `upcoming[slot]` is in it; then the next slot begins.
        slot = index if upcoming is None else slot + (index > upcoming[slot]).astype(jnp.int32)
        states = put(states, carry, slot)
        return *over_segment(carry, ys, index * cut.segment, cut.segment), states, slot

    _, y = jax.eval_shape(step, init, at_one_step(xs))
    ys = room(y, cut.length)
    # One slot more than is kept: the last is written where no slot is free, and never read.
    state = init, ys, room(init, cut.slots + 1), jnp.array(0, jnp.int32)
    carry, ys, states, _ = jax.lax.fori_loop(0, cut.segments, body, state)
    last = carry
    if cut.left_over:
        carry, ys = over_segment(carry, ys, cut.segments * cut.segment, cut.left_over)
    return (carry, jax.tree.map(as_weak_as, ys, y)), (states, last)


def backward(over_time: Pass, params: Any, states: Any, xs: Any, bars: Bars, cut: Layout) -> tuple[Any, Any, Any]:
    """Gradients of params, init and xs, from those of the last carry and ys, and the states that `forward` stored."""
    (states, last), (carry_bar, ys_bar) = states, bars
    # The lean loop contracts every step alone.
    lengths = {1} if cut.lean else lengths_to_contract(last, cut.segment, cut.left_over)
    over_time = over_time.prepared(params, last, xs, bars, lengths, move_each=cut.lean)
    over_segment = _lean(over_time, params, last, xs, ys_bar) if cut.lean else _at_once(over_time, params, xs, ys_bar)

    xs_bar = room(at_one_step(select(xs, over_time.adjoint.perturbed.x)), cut.length)
    state = (carry_bar, over_time.weights.zeros()), xs_bar
    if cut.left_over:
        state = over_segment(state, last, cut.segments * cut.segment, cut.left_over)

    def from_kept_states(i, state):
        index = cut.segments - 1 - i
        return over_segment(state, at(states, index), index * cut.segment, cut.segment)

    def by_schedule(i, stack_and_state):
        stack, state = stack_and_state
        index = cut.segments - 1 - jnp.asarray(i, jnp.int32)
        stack, carry = _recompute(over_time, params, xs, stack, index, cut)
        return stack, over_segment(state, carry, index * cut.segment, cut.segment)

    if cut.all_kept:
        state = jax.lax.fori_loop(0, cut.segments, from_kept_states, state)
    else:
        starts = jnp.zeros(cut.slots + 1, jnp.int32).at[: len(cut.kept)].set(jnp.array(cut.kept, jnp.int32))
        stack = states, starts, jnp.array(len(cut.kept) - 1, jnp.int32)
        _, state = jax.lax.fori_loop(0, cut.segments, by_schedule, (stack, state))
    (carry_bar, sums), xs_bar = state
    return over_time.weights.finish(sums), carry_bar, xs_bar


def _recompute(over_time: Pass, params: Any, xs: Any, stack: Any, index: Any, cut: Layout) -> tuple[Any, Any]:
    """The state before a segment, from the nearest one kept; states in between are kept as the schedule says.

    The stack is (states, the segments they are before, index of the top one).
    """
    reaches = jnp.asarray(schedule.reaches(cut.segments, cut.slots)) if cut.slots > 1 else None

    def advance(carry, start, stop):
        def body(t, carry):
            return over_time.step.step(params, carry, at(xs, t))[0]

        with schedule.runs(cut.steps_recomputed):
            return jax.lax.fori_loop(start * cut.segment, stop * cut.segment, body, carry)

    def is_before_segment(state):
        _, (_, before) = state
        return before < index

    def advance_once(state):
        (states, starts, top), (carry, before) = state
        if reaches is None:  # with the first state alone there is nothing to decide
            return (states, starts, top), (advance(carry, before, index), index)
        free = top + 1 < cut.slots
        stop = jnp.where(free, before + schedule.split(reaches, index + 1 - before, cut.slots - top), index)
        carry = advance(carry, before, stop)
        slot = jnp.where(free, top + 1, cut.slots)
        stack = put(states, carry, slot), starts.at[slot].set(stop), top + free.astype(jnp.int32)
        return stack, (carry, stop)

    states, starts, top = stack
    with schedule.runs(1):  # what is computed inside has its own average, over all of them
        stack, (carry, _) = jax.lax.while_loop(is_before_segment, advance_once, (stack, (at(states, top), starts[top])))
    states, starts, top = stack
    return (states, starts, top - (starts[top] == index).astype(jnp.int32)), carry


# ((carry_bar, sums), xs_bar) after a segment, the carry before it, its start and length, to those before the segment.
OverSegment = Callable[[tuple[BarAndSums, Any], Any, Any, int], tuple[BarAndSums, Any]]


def _at_once(over_time: Pass, params: Any, xs: Any, ys_bar: Any) -> OverSegment:
    """How a segment is recomputed from the carry before it and reversed: with one contraction for all of it."""

    def over_segment(state, carry, start, length):
        bar_and_sums, xs_bar = state
        _, (bar_and_sums, xs_bar_here) = over_time.forward_and_back(
            params, bar_and_sums, carry, xs, ys_bar, start, length
        )
        return bar_and_sums, put_window(xs_bar, xs_bar_here, start)

    return over_segment


def _lean(over_time: Pass, params: Any, carry: Any, xs: Any, ys_bar: Any) -> OverSegment:
    """The same with a contraction at every step: all that is stored of a step is its carry, and residuals beyond that."""
    adjoint = over_time.adjoint
    traced = program(adjoint.forward, params, carry, at_one_step(xs))
    (new_carry, _), residuals = traced.outputs
    storage = stored_beside_carries(traced.arguments[1], new_carry, residuals)

    def forward(carry, t):
        (new_carry, _), residuals = adjoint.forward(params, carry, at(xs, t))
        return new_carry, (carry, storage.store(residuals))

    def backward(state, at_t):
        new_carry, ((carry_bar, sums), xs_bar) = state
        t, (carry, stored) = at_t
        x, y_bar = at((xs, ys_bar), t)
        residuals = storage.restore(stored=stored, carry=jax.tree.leaves((carry, new_carry)))
        previous_bar, deltas = adjoint.backward(params, residuals, x, carry_bar, filled(y_bar))
        one_step = jax.tree.map(lambda leaf: leaf[None], (residuals, x, y_bar, deltas))
        sums, xs_bar_here = over_time.weights.add(params, sums, *one_step, length=1)
        bar_and_sums = fit(previous_bar, carry, adjoint.perturbed.carry, "init"), sums
        return (carry, (bar_and_sums, put_window(xs_bar, xs_bar_here, t))), None

    def over_segment(state, carry, start, length):
        times = start + jnp.arange(length, dtype=jnp.int32)
        new_carry, stored = over_time.loop(forward, carry, times, length)
        (_, state), _ = over_time.loop(backward, (new_carry, state), (times, stored), length, reverse=True)
        return state

    return over_segment


def stored_beside_carries(carry: list[Any], new_carry: Any, residuals: Any) -> Storage:
    """Which residuals to store where the carries before and after a step are stored anyway, from variables of its program."""
    return stored_once(residuals, carry=[*carry, *jax.tree.leaves(new_carry)])
