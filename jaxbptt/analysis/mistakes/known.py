r"""The classic mistakes of a backward loop, for any step: each a name and the numbers of the `Loop` that it changes."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from jaxbptt.analysis.mistakes.loop import LOSS_TABLES

# Every time step is tried up to this many; of more, half from each end.
_STEPS = 64
_CLIPS = 0.01, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0


class Mistake(NamedTuple):
    """A known mistake.

    Attributes:
        name: in plain words.
        loop: the fields of `Loop` that it changes.
        equations: the fields of the cell's own equations that it changes.
        by_leaf: whether it is made where the weight gradient is summed, so that it can be in one leaf and not in another.
        common: whether it is also tried together with another mistake.
    """

    name: str
    loop: dict[str, Any] = {}  # noqa: RUF012, never changed
    equations: dict[str, Any] = {}  # noqa: RUF012
    by_leaf: bool = False
    common: bool = True


def of_any_loop(steps: int, rows: int) -> Iterator[Mistake]:
    """The mistakes that a backward loop over `steps` can have, whatever the step computes."""
    t, one, zero = np.arange(steps), np.ones(steps), np.zeros(steps)
    last = t == steps - 1
    yield Mistake("nothing is carried back: dh_next is never added, or always 0", {"passed": zero})
    yield Mistake("dh_next is added to from step to step (+=), where it is replaced (=)", {"kept": one})
    yield Mistake("the backward loop runs forward in time, from the first step to the last", {"order": t})
    yield Mistake("only the last time step's loss counts", {"loss_weight": 1.0 * last})
    yield Mistake("the loss at the last state, ∂L/∂c_T, is left out", {"last_weight": np.array(0.0)})
    yield Mistake("the loss at the last state, ∂L/∂c_T, is counted twice", {"last_weight": np.array(2.0)})
    for bound in _CLIPS:
        bound = np.array(bound)
        yield Mistake(f"dh_next is clipped at ±{bound:g} at every step", {"clip": bound}, common=False)
        yield Mistake(f"dh_next is clipped to a norm of {bound:g} at every step", {"clip_norm": bound}, common=False)
    yield Mistake(
        "the gradient of the first state is that of the state after the first step", {"init_from": np.array(1)}
    )
    yield from _of_targets(t)
    yield from _of_sums(t)
    if rows > 1:
        for row, word in ((0, "first"), (rows - 1, "last")):
            yield Mistake(f"only the {word} row of the batch counts", {"rows": 1.0 * (np.arange(rows) == row)})
    chosen = t if steps <= _STEPS else np.concatenate([t[: _STEPS // 2], t[-_STEPS // 2 :]])
    for s in chosen.tolist():
        yield from _of_one_step(s, t)
    for K in chosen[(chosen > 1) & (chosen < steps)].tolist():
        for place, cut in (("from the first step", t % K == 0), ("from the last step", (t + K - steps) % K == 0)):
            name = f"the recursion is cut every {K} steps, counted {place}"
            yield Mistake(name, {"passed": 1.0 * ~cut}, common=False)


def _of_targets(t: np.ndarray) -> Iterator[Mistake]:
    """Losses of other steps and other targets; at the border each variant that a loop or `np.roll` gives."""
    steps = len(t)

    def table(name):
        return LOSS_TABLES.index(name) * steps

    for name, kind, border in (
        ("the target is that of the time step before: target[t − 1]", "target_before", t == 0),
        ("the target is that of the next time step: target[t + 1]", "target_after", t == steps - 1),
    ):
        yield Mistake(name, {"loss_from": table(kind) + t})
        yield Mistake(name, {"loss_from": np.where(border, t, table(kind) + t)})
        yield Mistake(name, {"loss_from": table(kind) + t, "loss_weight": 1.0 * ~border})
    for name, by, border in (
        ("dy is that of the time step before: dy[t − 1]", -1, t == 0),
        ("dy is that of the next time step: dy[t + 1]", 1, t == steps - 1),
    ):
        yield Mistake(name, {"loss_from": (t + by) % steps})
        yield Mistake(name, {"loss_from": np.clip(t + by, 0, steps - 1)})
        yield Mistake(name, {"loss_from": (t + by) % steps, "loss_weight": 1.0 * ~border})
    yield Mistake("dy is in reverse order of time", {"loss_from": t[::-1]})
    yield Mistake("the softmax is missing in dy: dy = y − target", {"loss_from": table("no_softmax") + t})
    yield Mistake("the target is not subtracted in dy: dy = softmax(y)", {"loss_from": table("no_target") + t})
    yield Mistake(
        "the target is the input of the same time step: target[t] = x[t]", {"loss_from": table("input_as_target") + t}
    )


def _of_sums(t: np.ndarray) -> Iterator[Mistake]:
    """The sums over time."""
    steps = len(t)

    def mistake(name, **loop):
        return Mistake(name, loop, by_leaf=True)

    yield mistake("the sum over time is overwritten (=), where it is added to (+=)", counted=1.0 * (t == 0))
    yield mistake("only the last time step counts in the sum over time", counted=1.0 * (t == steps - 1))
    name = "hₜ stands for hₜ₋₁ in the weight gradient"
    yield mistake(name, states_from=t + 1)
    name = "hₜ₋₂ stands for hₜ₋₁ in the weight gradient"
    for border in (0, steps + 1, steps):
        yield mistake(name, states_from=np.where(t == 0, border, t - 1))
    yield mistake("zeros stand for h₀ in the weight gradient", states_from=np.where(t == 0, steps + 1, t))
    yield mistake(
        "the last state stands for h₀ in the weight gradient: hs[t − 1] at t = 0 is hs[−1]",
        states_from=np.where(t == 0, steps, t),
    )
    for name, by in (
        ("xₜ₊₁ stands for xₜ in the weight gradient", 1),
        ("xₜ₋₁ stands for xₜ in the weight gradient", -1),
    ):
        outside = (t + by < 0) | (t + by >= steps)
        for border in ((t + by) % steps, np.clip(t + by, 0, steps - 1), steps):
            yield mistake(name, xs_from=np.where(outside, border, t + by))
    yield mistake("the inputs are in reverse order of time in the weight gradient", xs_from=t[::-1])
    yield mistake(
        "the deltas are in the order of the backward loop, last step first, where the weight gradient needs that of time",
        deltas_from=t[::-1],
    )
    yield mistake("deltas of the next time step stand in the weight gradient", deltas_from=np.minimum(t + 1, steps - 1))


def _of_one_step(s: int, t: np.ndarray) -> Iterator[Mistake]:
    steps = len(t)
    if steps == 1:
        return  # what leaves out the only time step is 0 everywhere
    place = {0: ", the first", steps - 1: ", the last"}.get(s, "")
    step, here = f"time step {s} (counted from 0{place})", t == s
    outer = s in (0, steps - 1)
    yield Mistake(f"{step} is missing in the sum over time", {"counted": 1.0 * ~here}, by_leaf=True, common=outer)
    yield Mistake(f"{step} is counted twice in the sum over time", {"counted": 1.0 + here}, by_leaf=True, common=outer)
    skipped = {"counted": 1.0 * ~here, "passed": 1.0 * ~here, "kept": 1.0 * here}
    yield Mistake(f"{step} is left out of the backward loop", skipped, common=outer)
    yield Mistake(f"the loss of {step} is left out", {"loss_weight": 1.0 * ~here}, common=outer)
    yield Mistake(f"the loss of {step} is counted twice", {"loss_weight": 1.0 + here}, common=outer)
    if s > 0:
        yield Mistake(f"nothing is carried back from {step}", {"passed": 1.0 * ~here}, common=False)
