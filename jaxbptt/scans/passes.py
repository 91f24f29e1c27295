r"""One pass over time, as every strategy with its own derivative runs it: forward, saving residuals, then backward.

Backward means: the recursion c̄ₜ ↦ c̄ₜ₋₁ alone in a loop, then one contraction over the segment for the gradients of params
and inputs. `adjoint_scan` runs one pass over the whole sequence, the other strategies run one over each of their segments.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from jaxbptt.along_time import at, at_one_step, filled, flipped, window
from jaxbptt.array_types import assumed_size
from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.platforms import Choices, all_choices, by_platform, unrolled
from jaxbptt.programs.derived import DifferentiableStep, differentiable_step
from jaxbptt.programs.hoist import hoisted
from jaxbptt.programs.perturbed import Perturbed, PerturbedAdjoint, fit
from jaxbptt.programs.trace import map_over_time
from jaxbptt.scans.contraction import WeightGradient, step_types
from jaxbptt.scans.flags import Flags, with_flags
from jaxbptt.scans.recurrence import Recurrence, length_for_scan
from jaxbptt.scans.residuals import Residuals, stored_once
from jaxbptt.scans.schedule import divisor_near
from jaxbptt.scans.without_sums import back_without_sums
from jaxbptt.trees import differentiable, differentiated_as, same_keys

Bars = tuple[Any, Any]  # of the last carry and of ys
# Time steps below which loops are the same on every platform.
_FEW_STEPS = 32
BarAndSums = tuple[Any, Any]  # of a carry, and the sums of the weight gradient over the steps after it


@dataclass(frozen=True)
class Pass:
    """A pass over time with one step, built once per call of a strategy.

    It holds no params: they are an argument of each method, since inside a custom derivative they are other tracers.

    Attributes:
        step: the step, and how its adjoint is made.
        unroll: time steps in one iteration of its loops, as for `lax.scan`; `None` for the platform's choice.
        adjoint: the step's `PerturbedAdjoint`; set by `differentiated`.
        asked: what the caller takes a derivative with respect to; set by `differentiated`.
        weights: the `WeightGradient`; set by `prepared`.
    """

    step: DifferentiableStep
    unroll: int | bool | None
    adjoint: Any = None
    asked: Any = None
    weights: Any = None

    def run(self, params: Any, init: Any, xs: Any, length: Any) -> tuple[Any, Any]:
        """Values alone, by `lax.scan`: (c_T, ys)."""

        def run(over_time, params, init, xs):
            return over_time.loop(partial(over_time.step.step, params), init, xs, length)

        if self.unroll is not None:
            return run(self, params, init, xs)
        return differentiated_as(partial(run, self.plain()), partial(run, self))(params, init, xs)

    def loop(self, body: Callable[..., Any], init: Any, xs: Any, length: Any, *, reverse: bool = False) -> Any:
        """`lax.scan`, unrolled as this pass says."""

        def unrolled_by(unroll):
            return partial(jax.lax.scan, body, length=length_for_scan(length), reverse=reverse, unroll=unroll)

        return unrolled(self.unroll, unrolled_by)(init, xs)

    def plain(self) -> "Pass":
        """With loops that are the same on every platform, to be differentiated: JAX saves the residuals of all platforms."""
        return replace(self, unroll=1 if self.unroll is None else self.unroll)

    def differentiated(self, perturbed: Perturbed) -> "Pass":
        """For a derivative with respect to these leaves."""
        return replace(self, adjoint=self.step.adjoint(perturbed), asked=perturbed)

    def wrapped(self, wrap: Callable[[PerturbedAdjoint], PerturbedAdjoint]) -> "Pass":
        """With `wrap(adjoint)` in the place of each adjoint of the step."""
        adjoint = self.step.adjoint
        return replace(self, step=self.step._replace(adjoint=lambda perturbed: wrap(adjoint(perturbed))))

    def prepared(
        self, params: Any, carry: Any, xs: Any, bars: Bars, lengths: Iterable[int], *, move_each: bool = False
    ) -> "Pass":
        """For going back over segments of these lengths, with bars of these shapes."""
        types = step_types(self.adjoint, params, carry, xs, bars)
        return replace(self, weights=WeightGradient(self.adjoint, params, types, lengths, move_each=move_each))

    def forward(self, params: Any, init: Any, xs: Any, length: Any) -> tuple[tuple[Any, Any], Residuals]:
        """`lax.scan` that saves residuals: ((c_T, ys), residuals)."""
        forward = hoisted(self.adjoint.forward, params, init, at_one_step(xs))
        (new_carry, y), residuals = forward.program.outputs
        _, carry, _ = forward.program.arguments
        layout = Residuals.layout(residuals, y, carry, new_carry)

        def body(carry, x):
            (carry, y), residuals = forward.call(carry, x)
            return carry, (y, layout.storage.store(residuals))

        carry, (ys, stored) = self.loop(body, init, xs, length)
        return (carry, ys), layout.filled(stored, ys, init)

    def back(
        self, params: Any, bar_and_sums: BarAndSums, residuals: Residuals, xs: Any, ys_bar: Any, init: Any, length: Any
    ) -> tuple[BarAndSums, Any]:
        """Back over `length` steps from (c̄ after them, sums of the weight gradient) to those before them.

        Returns them and the gradient of xs. `ys_bar` may have `Zeros` for leaves.
        """

        @cache
        def passed(segment, unroll):
            if segment >= length:
                how = _at_once
            else:
                how = back_without_sums if self.weights.sums_nothing else partial(_in_segments, segment)
            return partial(how, replace(self, unroll=unroll), length)

        def chosen(choices):
            segment = min(segment_length(init, length, choices), length)
            return passed(segment, choices.unroll if self.unroll is None else self.unroll)

        at_once = passed(length, self.plain().unroll)
        # A step that makes mutable arrays can't be inside a jax.custom_jvp.
        back = at_once if self.adjoint.mutates else by_platform(chosen)
        if back is not at_once:
            # The transpose of a read at a computed position is a write into zeros of all time steps, at every step. So
            # derivatives go through the plain loop.
            back = differentiated_as(at_once, back)
        (carry_bar, sums), xs_bar = back(params, bar_and_sums, *same_keys((residuals, xs)), ys_bar)
        return (fit(carry_bar, init, self.adjoint.perturbed.carry, "init"), sums), xs_bar

    def forward_and_back(
        self, params: Any, bar_and_sums: BarAndSums, carry: Any, xs: Any, ys_bar: Any, start: Any, length: Any
    ) -> tuple[Any, tuple[BarAndSums, Any]]:
        """Forward over `length` steps from the `carry` before step `start`: (the carry after them, what `back` returns)."""
        xs = window(xs, start, length)
        (after, _), residuals = self.forward(params, carry, xs, length)
        return after, self.back(params, bar_and_sums, residuals, xs, window(ys_bar, start, length), carry, length)

    def back_one_lag(self, params: Any, residuals: Any, xs: Any, bars: Any, ys_bar: Any) -> tuple[Any, Any, Any]:
        """All time steps one step back at once: `bars` of the carries after each step, moved to those before it.

        Returns (the bars of the carries after each step, shifted one place earlier; the bar of init; the deltas).
        """
        backward = map_over_time(self.adjoint.backward, one_at_a_time=self.step.one_at_a_time)
        before, deltas = backward(params, residuals, xs, bars, ys_bar)
        after = jax.tree.map(lambda leaf: jnp.concatenate([leaf[1:], jnp.zeros_like(leaf[:1])]), before)
        return after, jax.tree.map(lambda leaf: leaf[0], before), deltas

    def check_recomputable(self, strategy: str) -> None:
        """Raise where a strategy that computes steps more than once would write to a mutable array each time."""
        if self.step.mutable:
            raise TypeError(
                f"{self.step.mutable} is mutable (a Ref), and {strategy} computes each step more than once, so that it "
                "would be written to each time: take the gradient with adjoint_scan or jaxbptt.scan, which run each step "
                "once."
            )


def one_pass(
    step: Callable[..., Any] | Cell, adjoint: Adjoint | None, r: Recurrence, flags: Flags, unroll: int | bool | None
) -> tuple[Pass, Recurrence]:
    """The pass of a prepared recurrence, and the recurrence with the params and xs to call it with.

    In reverse xs are flipped here, so that a pass always runs from the first entry to the last; the caller flips ys back.
    """
    with_adjoint, params = differentiable_step(step, adjoint, r.step, r.params, r.init, r.xs)
    with_adjoint, r = with_flags(with_adjoint, r._replace(params=params), flags)
    # How many steps a symbolic length leaves over is not known; and mutable arrays can't be inside a branch for a platform.
    # A few steps gain nothing by it.
    if unroll is None and (with_adjoint.one_at_a_time or is_symbolic_dim(r.length) or r.length < _FEW_STEPS):
        unroll = 1
    return Pass(with_adjoint, unroll), r._replace(xs=flipped(r.xs)) if r.reverse else r


def lengths_to_contract(carry: Any, *lengths: Any) -> set[Any]:
    """The distinct lengths that `Pass.back` contracts over when it runs over these lengths, for `Pass.prepared`."""
    found = set()
    for length, choices in itertools.product(lengths, all_choices()):
        segment = segment_length(carry, length, choices)
        # The whole length too: a second derivative contracts over all steps at once (`Pass.back`).
        found |= {segment, length % segment, length} if segment < length else {length}
    return found - {0} or {0}  # no time steps: one empty contraction, from which the sums get their shapes


def segment_length(carry: Any, length: Any, choices: Choices) -> Any:
    """Time steps after which the weight gradient is added to.

    About as many as have `segment_rows` rows, but at least 8, half of the steps at most, and rather a divisor of them. All
    steps where no number of rows is chosen, and for a symbolic number of steps.
    """
    if is_symbolic_dim(length):
        return length
    if choices.segment_rows is None or length == 0:
        return max(length, 1)
    leaves = jax.tree.leaves(differentiable(carry))
    rows = max((math.prod(map(assumed_size, leaf.shape[:-1])) for leaf in leaves), default=1)
    return divisor_near(length, max(min(choices.segment_rows / max(rows, 1), length / 2), 8), within=4)


def _recursion(over_time: Pass, params: Any, residuals: Residuals, xs: Any, carry_bar: Any, ys_bar: Any) -> Any:
    """The body of the loop c̄ₜ ↦ c̄ₜ₋₁, which returns distinct deltas, and the `Storage` that restores all of them."""

    def step_back(params, residuals, x, carry_bar, y_bar):
        return over_time.adjoint.backward(params, residuals, x, carry_bar, filled(y_bar))

    residuals_t, x, y_bar = at_one_step((jax.eval_shape(residuals.stacked), xs, ys_bar))
    backward = hoisted(step_back, params, residuals_t, x, carry_bar, y_bar)
    _, deltas = backward.program.outputs
    storage = stored_once(deltas)

    def body(carry_bar, at_t):
        residuals, x, y_bar = at_t
        carry_bar, deltas = backward.call(residuals, x, carry_bar, y_bar)
        return carry_bar, storage.store(deltas)

    return body, storage


def _at_once(
    over_time: Pass, length: Any, params: Any, bar_and_sums: BarAndSums, residuals: Residuals, xs: Any, ys_bar: Any
) -> tuple[BarAndSums, Any]:
    """The recursion over all steps, and one contraction."""
    carry_bar, sums = bar_and_sums
    body, storage = _recursion(over_time, params, residuals, xs, carry_bar, ys_bar)
    stacked = residuals.stacked()
    carry_bar, stored = over_time.loop(body, carry_bar, (stacked, xs, ys_bar), length, reverse=True)
    deltas = storage.restore(stored=stored)
    sums, xs_bar = over_time.weights.add(params, sums, stacked, xs, ys_bar, deltas, length)
    return (carry_bar, sums), xs_bar


def _in_segments(
    segment: int,
    over_time: Pass,
    length: int,
    params: Any,
    bar_and_sums: BarAndSums,
    residuals: Residuals,
    xs: Any,
    ys_bar: Any,
) -> tuple[BarAndSums, Any]:
    """The same with a contraction for each segment, added to the sums while what it reads is in the cache."""
    body, storage = _recursion(over_time, params, residuals, xs, bar_and_sums[0], ys_bar)

    def back(bar_and_sums, start, length):
        def one_step_back(state, _):
            t, carry_bar = state
            carry_bar, deltas = body(carry_bar, (residuals.at(t), at(xs, t), at(ys_bar, t)))
            return (t - 1, carry_bar), deltas

        carry_bar, sums = bar_and_sums
        last = start + length - 1, carry_bar
        (_, carry_bar), stored = over_time.loop(one_step_back, last, None, length, reverse=True)
        xs_here, ys_bar_here = window((xs, ys_bar), start, length)
        residuals_here, deltas = residuals.window(start, length), storage.restore(stored=stored)
        sums, xs_bar = over_time.weights.add(params, sums, residuals_here, xs_here, ys_bar_here, deltas, length)
        return (carry_bar, sums), xs_bar

    def back_over_segment(state, _):
        start, bar_and_sums = state
        bar_and_sums, xs_bar = back(bar_and_sums, start, segment)
        return (start - segment, bar_and_sums), xs_bar

    segments, left_over = divmod(length, segment)
    start, last_xs_bar = jnp.array(segments * segment, jnp.int32), []
    if left_over:  # the last in time, so the first to be reversed
        bar_and_sums, xs_bar = back(bar_and_sums, start, left_over)
        last_xs_bar = [xs_bar]
    state = start - segment, bar_and_sums
    (_, bar_and_sums), xs_bar = jax.lax.scan(back_over_segment, state, None, length=segments, reverse=True)
    xs_bar = jax.tree.map(lambda leaf: leaf.reshape(segments * segment, *leaf.shape[2:]), xs_bar)
    if last_xs_bar:
        xs_bar = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), xs_bar, *last_xs_bar)
    return bar_and_sums, xs_bar
