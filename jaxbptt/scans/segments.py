r"""Forward over segments of time, keeping some states, and back over them, one at a time.

What `checkpointed_scan` runs. Every function takes the `Layout` that says how time is cut.
"""

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt.along_time import at, at_one_step, filled, put, put_window, room, window
from jaxbptt.array_types import as_weak_as
from jaxbptt.programs.perturbed import PerturbedAdjoint
from jaxbptt.scans import schedule
from jaxbptt.scans.backward import back_over, stretches, without
from jaxbptt.scans.contraction import fit, weight_gradient
from jaxbptt.trees import select

Step = Callable[..., Any]


@jax.tree_util.register_static
@dataclass(frozen=True)
class Layout:
    """How time is cut, and what is kept.

    Attributes:
        segment: time steps in a segment.
        units: whole segments.
        left_over: time steps of a last, shorter one, or 0.
        slots: states kept at the same time.
        kept: the segments before which a state is kept on the way forward.
        lean: whether weight gradients are added up at every step, not once for a segment: this needs neither the adjoints
            of a segment nor a second array like the params, and takes more time.
    """

    segment: int
    units: int
    left_over: int
    slots: int
    kept: tuple[int, ...]
    lean: bool

    @property
    def all_kept(self) -> bool:
        """Whether there is a state before every segment, so that nothing is computed more than twice."""
        return self.slots >= self.units

    @property
    def forward_steps(self) -> int:
        """Steps computed for one gradient: the way forward, and all that is computed again."""
        length = self.units * self.segment + self.left_over
        if self.all_kept:
            return 2 * length
        # Of the schedule's steps, the way forward is the first sweep up to the last state that is kept.
        again = schedule.forward_steps(self.units, self.slots) - self.kept[-1]
        return length + again * self.segment + self.left_over

    @property
    def steps_again(self) -> Fraction:
        """Steps computed between kept states for one segment to be taken back, on average."""
        return Fraction(self.forward_steps - 2 * (self.units * self.segment + self.left_over), self.units)


def forward(step: Step, params: Any, init: Any, xs: Any, cut: Layout, unroll: int | bool) -> tuple[Any, Any]:
    """`lax.scan`, and the states that the way back starts with: in slots, and before what is left over."""
    upcoming = None if cut.all_kept else jnp.array([*cut.kept, cut.units], jnp.int32)

    def stretch(carry, ys, start, length):
        carry, some = jax.lax.scan(
            partial(step, params), carry, window(xs, start, length), length=length, unroll=unroll
        )
        return carry, put_window(ys, some, start)

    def body(unit, state):
        carry, ys, states, slot = state
        unit = jnp.asarray(unit, jnp.int32)
        # Written at every segment: what stays is the last one written, the state before the segment wanted.
        slot = unit if upcoming is None else slot + (unit > upcoming[slot]).astype(jnp.int32)
        states = put(states, carry, slot)
        return *stretch(carry, ys, unit * cut.segment, cut.segment), states, slot

    _, y = jax.eval_shape(partial(step, params), init, at_one_step(xs))
    ys = room(y, cut.units * cut.segment + cut.left_over)
    state = init, ys, room(init, cut.slots + 1), jnp.array(0, jnp.int32)
    carry, ys, states, _ = jax.lax.fori_loop(0, cut.units, body, state)
    last = carry
    if cut.left_over:
        carry, ys = stretch(carry, ys, cut.units * cut.segment, cut.left_over)
    return (carry, jax.tree.map(as_weak_as, ys, y)), (states, last)


class Task(NamedTuple):
    """What stays the same on the way back; `ys_bar` is the gradient of the outputs."""

    step: Step
    adjoint: PerturbedAdjoint
    params: Any
    xs: Any
    ys_bar: Any
    unroll: int | bool


def backward(task: Task, states: Any, carry_bar: Any, cut: Layout) -> tuple[Any, Any, Any]:
    """Gradients of params, init and xs, from that of the last carry and what `forward` kept."""
    states, last = states
    xs_bar = room(at_one_step(select(task.xs, task.adjoint.perturbed.x)), cut.units * cut.segment + cut.left_over)
    total = weight_gradient(
        task.adjoint,
        task.params,
        last,
        task.xs,
        carry_bar,
        task.ys_bar,
        {1} if cut.lean else stretches(last, cut.segment, cut.left_over),
        in_place=cut.lean,
    )
    take_back = partial(_take_back_lean if cut.lean else _take_back, task, total.add)
    back = carry_bar, total.zeros, xs_bar
    if cut.left_over:
        back = take_back(back, last, cut.units * cut.segment, cut.left_over)

    def by_kept_states(i, back):
        unit = cut.units - 1 - i
        return take_back(back, at(states, unit), unit * cut.segment, cut.segment)

    def by_schedule(i, both):
        stack, back = both
        unit = cut.units - 1 - jnp.asarray(i, jnp.int32)
        stack, carry = _compute_again(task, stack, unit, cut)
        return stack, take_back(back, carry, unit * cut.segment, cut.segment)

    if cut.all_kept:
        back = jax.lax.fori_loop(0, cut.units, by_kept_states, back)
    else:
        starts = jnp.zeros(cut.slots + 1, jnp.int32).at[: len(cut.kept)].set(jnp.array(cut.kept, jnp.int32))
        stack = states, starts, jnp.array(len(cut.kept) - 1, jnp.int32)
        _, back = jax.lax.fori_loop(0, cut.units, by_schedule, (stack, back))
    carry_bar, sums, xs_bar = back
    return total.finish(sums), carry_bar, xs_bar


def _compute_again(task: Task, stack: Any, unit: Any, cut: Layout) -> tuple[Any, Any]:
    """The state before a segment, from the nearest one kept; on the way others are kept as the schedule says.

    The stack is (states, the segments they are before, index of the top one).
    """
    reaches = jnp.asarray(schedule.reaches(cut.units, cut.slots)) if cut.slots > 1 else None

    def advance(carry, start, stop):
        def body(t, carry):
            return task.step(task.params, carry, at(task.xs, t))[0]

        with schedule.runs(cut.steps_again):
            return jax.lax.fori_loop(start * cut.segment, stop * cut.segment, body, carry)

    def on_the_way(state):
        _, (_, before) = state
        return before < unit

    def go_on(state):
        (states, starts, top), (carry, before) = state
        if reaches is None:  # with the first state alone there is nothing to decide
            return (states, starts, top), (advance(carry, before, unit), unit)
        free = top + 1 < cut.slots
        stop = jnp.where(free, before + schedule.split(reaches, unit + 1 - before, cut.slots - top), unit)
        carry = advance(carry, before, stop)
        # Where no slot is free, into the one that is never read.
        slot = jnp.where(free, top + 1, cut.slots)
        stack = put(states, carry, slot), starts.at[slot].set(stop), top + free.astype(jnp.int32)
        return stack, (carry, stop)

    states, starts, top = stack
    with schedule.runs(1):  # what is computed inside has its own average, over all of them
        stack, (carry, _) = jax.lax.while_loop(on_the_way, go_on, (stack, (at(states, top), starts[top])))
    states, starts, top = stack
    return (states, starts, top - (starts[top] == unit).astype(jnp.int32)), carry


def _take_back(task: Task, add: Callable[..., Any], back: Any, carry: Any, start: Any, length: int) -> Any:
    """One segment: forward once more from `carry`, and back, with one contraction for all of it."""
    carry_bar, sums, xs_bar = back
    _, adjoint, params, xs, ys_bar, unroll = task
    _, (sums, carry_bar, some) = back_over(
        adjoint, add, params, sums, carry, xs, carry_bar, ys_bar, start=start, length=length, unroll=unroll
    )
    return carry_bar, sums, put_window(xs_bar, some, start)


def _take_back_lean(task: Task, add: Callable[..., Any], back: Any, carry: Any, start: Any, length: int) -> Any:
    """The same with a contraction at every step: all that is kept of a step is its carry, and residuals beyond that."""
    _, adjoint, params, xs, ys_bar, unroll = task
    restorers = []

    def forward(carry, t):
        (new_carry, _), residuals = adjoint.forward(params, carry, at(xs, t))
        others, restore = without(residuals, (carry, new_carry))
        restorers.append(restore)
        return new_carry, (carry, others)

    def backward(state, at_t):
        new_carry, (carry_bar, sums, xs_bar) = state
        t, (carry, others) = at_t
        x, y_bar = at(xs, t), filled(at(ys_bar, t))
        residuals = restorers[-1](others, (carry, new_carry))
        previous_bar, delta = adjoint.backward(params, residuals, x, carry_bar, y_bar)
        one = jax.tree.map(lambda leaf: leaf[None], (residuals, x, y_bar, delta))
        sums, some = add(params, sums, *one, length=1)
        return (
            carry,
            (fit(previous_bar, carry, adjoint.perturbed.carry, "init"), sums, put_window(xs_bar, some, t)),
        ), None

    steps = start + jnp.arange(length, dtype=jnp.int32)
    new_carry, kept = jax.lax.scan(forward, carry, steps, unroll=unroll)
    (_, back), _ = jax.lax.scan(backward, (new_carry, back), (steps, kept), reverse=True, unroll=unroll)
    return back
