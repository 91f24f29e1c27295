"""The loop of a run: updates, metrics, validation, checkpoints, and a stop that loses nothing."""

import math
import platform
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbptt import __version__
from jaxbptt.commands import metrics
from jaxbptt.commands.compiled import Compiled
from jaxbptt.commands.sources import Source
from jaxbptt.models.model import BEST
from jaxbptt.tasks import InputError
from jaxbptt.training import checkpoints
from jaxbptt.training.hooks import Hook
from jaxbptt.training.tbptt import TrainState

# Reading a number waits for the device, so the metrics of this many updates are read at once.
READ_EVERY = 20
# A run has diverged when at so many checkpoints in a row, at least so many updates apart, the mean loss of so many updates
# is above that of a constant prediction, and above what it was at an earlier checkpoint.
DIVERGED_INTERVALS, DIVERGED_UPDATES = 3, 100


class Limits(NamedTuple):
    """When a run stops and what it writes.

    Attributes:
        updates: in total, including those before a resume; `None` for no limit.
        seconds: since this start; `None` for no limit.
        save_every: updates between two checkpoints; each is preceded by a validation.
        folder: of the checkpoints.
        metrics: the file, or `None` in a process that doesn't write it.
        settings: to save with each checkpoint, and compared on a resume.
        info: to save with each checkpoint, beside the metrics so far.
        patience: validations without a new least loss after which the run stops; `None` for no limit.
        hooks: called with the metrics of each update.
        errors: `(params) -> JSON`, saved with each best checkpoint.
    """

    updates: int | None
    seconds: float | None
    save_every: int
    folder: Path
    metrics: Path | None
    settings: dict[str, Any]
    info: dict[str, Any]
    patience: int | None = None
    hooks: tuple[Hook, ...] = ()
    errors: Callable[[Any], dict[str, Any] | None] = lambda params: None


class Progress(NamedTuple):
    """How far a run is, and how well it does.

    Attributes:
        update: the number of updates so far.
        training: mean of `Source.measure` over the updates read last.
        validation: `Source.measure` of the validation loss, where it has just been computed.
        rate: updates per second.
        share: of the run that is done.
        left: seconds.
        at_checkpoint: whether the run is at a checkpoint.
    """

    update: int
    training: float
    validation: float | None
    rate: float
    share: float
    left: float
    at_checkpoint: bool


class Outcome(NamedTuple):
    """How a run ended.

    Attributes:
        state: the last, which is saved.
        signal: that stopped it, or `None`.
        progress: the metrics so far, as checkpoints have them.
        out_of_patience: whether it stopped since validations did not get better.
        learnt_nothing: whether the loss was above that of a constant prediction to the end.
    """

    state: TrainState
    signal: int | None
    progress: dict[str, Any]
    out_of_patience: bool
    learnt_nothing: bool


def train(
    compiled: Compiled,
    state: TrainState,
    source: Source,
    limits: Limits,
    show: Callable[[Progress], None],
    so_far: Mapping[str, Any] | None,
    caught: list[int],
) -> Outcome:
    """Update until a limit is reached or a signal comes; the last state is saved, and the best on validation beside it.

    Args:
        compiled: the functions of the run.
        state: to start from.
        source: the data.
        limits: when it stops, and what it writes.
        show: told of progress.
        so_far: the metrics of the run that is resumed, `Outcome.progress`, or `None`.
        caught: signals to stop, from `signals`.

    Raises:
        InputError: a loss or gradient that is not finite, or a loss that stays above a constant prediction's and grows;
            nothing is saved from then on.
    """
    first = step = int(state.step)
    saved = step or -1
    chunks = source.training.start(step)
    pending: list[Any] = []
    began = time.monotonic()
    clock, losses = _Clock(began, first), _Losses(source)
    progress = dict(so_far or {"since_best": 0})
    while True:
        ended, stop = _asked_to_end(step, first, began, limits, caught)
        boundary = step > max(saved, first) and step % limits.save_every == 0
        if len(pending) == READ_EVERY or boundary or ended or stop:
            validation = None
            if (boundary or ended) and step > saved and compiled.validate is not None:
                validation = compiled.validate(state.params)
            rows = _read(pending, step, validation, source, limits)
            losses.add(rows)
            if rows:
                show(_progress(rows, clock, began, source, limits, boundary or ended))
            pending = []
            if boundary:
                losses.check(step)
            impatient = False
            if (boundary or ended or stop) and step > saved:
                progress |= {"update": step, "loss": losses.mean}
                is_best = _note(progress, step, validation)
                impatient = boundary and limits.patience is not None and progress["since_best"] >= limits.patience
                _save(step, state, limits, progress, is_best=is_best, at_end=ended or impatient)
                saved = step
            if ended or stop or impatient:
                return Outcome(state, stop or None, progress, impatient, losses.above_to_the_end)
        state, measured = compiled.update(state, next(chunks))
        pending.append(measured)
        step += 1


def _note(progress: dict[str, Any], step: int, validation: float | None) -> bool:
    """Note a validation among the metrics so far; says whether it is the best."""
    if validation is None or not math.isfinite(validation):
        return False
    progress["validation_loss"] = validation
    is_best = "best" not in progress or validation < progress["best"]["validation_loss"]
    if is_best:
        progress["best"] = {"update": step, "validation_loss": validation}
    progress["since_best"] = 0 if is_best else progress["since_best"] + 1
    return is_best


def _save(
    step: int, state: TrainState, limits: Limits, progress: dict[str, Any], *, is_best: bool, at_end: bool
) -> None:
    info = limits.info | {"metrics": progress}
    # Errors take a while: they are measured of the best and of the last.
    measured = info | {"errors": limits.errors(state.params)} if is_best or at_end else info
    # The best first: a process killed in between comes to this update again, and finds it saved.
    if is_best and (checkpoints.latest(limits.folder / BEST) or -1) < step:
        checkpoints.save(limits.folder / BEST, step, state, limits.settings, info=measured, keep=1)
    checkpoints.save(limits.folder, step, state, limits.settings, info=measured)


def versions() -> dict[str, str]:
    """What a checkpoint was written by."""
    return {"jaxbptt": __version__, "jax": jax.__version__, "python": platform.python_version()}


class _Losses:
    """The losses of the last updates, to notice a run that has diverged."""

    def __init__(self, source: Source):
        self._source, self._recent = source, deque(maxlen=DIVERGED_UPDATES)
        self._unchecked, self._least, self._above = 0, math.inf, 0

    def add(self, rows: list[dict[str, Any]]) -> None:
        self._recent.extend(row["loss"] for row in rows if "loss" in row)
        self._unchecked += len(rows)

    @property
    def mean(self) -> float:
        return sum(self._recent) / max(len(self._recent), 1)

    def check(self, step: int) -> None:
        """At a checkpoint."""
        if self._unchecked < DIVERGED_UPDATES:
            return
        self._unchecked = 0
        self._above = self._above + 1 if self.mean > max(self._source.constant_loss, self._least) else 0
        self._least = min(self._least, self.mean)
        if self._above >= DIVERGED_INTERVALS:
            raise InputError(
                f"at update {step} the loss is {self.mean:.3g}, and for long it has been above "
                f"{self._source.constant_loss:.3g}, that of a constant prediction: the run has diverged. Try a smaller "
                "--learning-rate."
            )

    @property
    def above_to_the_end(self) -> bool:
        """Whether the loss of so many updates is that of a constant prediction, or worse."""
        return len(self._recent) == DIVERGED_UPDATES and self.mean > self._source.constant_loss


def _read(
    pending: list[Any], step: int, validation: float | None, source: Source, limits: Limits
) -> list[dict[str, Any]]:
    """Metrics of the updates since the last read, checked and written."""
    rows = []
    for number, m in enumerate(jax.device_get(pending), start=step - len(pending) + 1):
        if not all(map(math.isfinite, (m.loss, m.gradient_norm))):
            raise InputError(
                f"at update {number} the loss is {m.loss:g} and the gradient's norm {m.gradient_norm:g}: try a smaller "
                "--learning-rate. The checkpoints are from before this update."
            )
        # A chunk without an entry that counts has no loss.
        row: dict[str, Any] = {"update": number, **({"loss": float(m.loss)} if m.aux else {})}
        row |= {key: float(getattr(m, key)) for key in ("gradient_norm", "fraction_clipped", "carry_norm")}
        if source.vocabulary and m.aux:
            row["bits_per_character"] = source.measure(row["loss"])
        rows.append(row)
    if rows and validation is not None:
        rows[-1]["validation_loss"] = validation
        if source.vocabulary:
            rows[-1]["validation_bits_per_character"] = source.measure(validation)
    if rows and limits.metrics is not None:
        try:
            metrics.append(limits.metrics, rows, text=source.vocabulary is not None)
        except OSError as error:
            raise InputError(f"--metrics {limits.metrics} can't be written: {error.strerror or error}.") from None
    for row in rows:
        for hook in limits.hooks:
            hook(dict(row))
    return rows


class _Clock:
    """Updates per second since the first call of `rate`: what came before includes the time to compile."""

    def __init__(self, now: float, update: int):
        self._start, self._looked = (now, update), False

    def rate(self, update: int) -> float:
        now = time.monotonic()
        rate = (update - self._start[1]) / max(now - self._start[0], 1e-9)
        if not self._looked:
            self._start, self._looked = (now, update), True
        return rate


def _progress(
    rows: list[dict[str, Any]], clock: _Clock, began: float, source: Source, limits: Limits, at_checkpoint: bool
) -> Progress:
    update = rows[-1]["update"]
    rate, seconds = clock.rate(update), time.monotonic() - began
    share, left = 0.0, math.inf
    if limits.updates is not None:
        share, left = update / limits.updates, (limits.updates - update) / rate
    if limits.seconds is not None:
        share, left = max(share, seconds / limits.seconds), min(left, max(limits.seconds - seconds, 0))
    losses = [row["loss"] for row in rows if "loss" in row]
    training = source.measure(sum(losses) / len(losses)) if losses else math.nan
    validation = rows[-1].get("validation_loss")
    measured = None if validation is None else source.measure(validation)
    return Progress(update, training, measured, rate, min(share, 1.0), left, at_checkpoint)


@contextmanager
def signals() -> Iterator[list[int]]:
    """Collects the first signal to stop, so that it ends no compilation halfway; a second one has its usual effect."""
    caught: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield caught
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def catch(number: int, _: Any) -> None:
        caught.append(number)
        restore()

    for number in before:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()


def _asked_to_end(step: int, first: int, began: float, limits: Limits, caught: list[int]) -> tuple[bool, int]:
    """Whether a limit is reached, and the signal that came, or 0 for none."""
    ended = limits.updates is not None and step >= limits.updates
    if limits.seconds is not None and step > first:
        ended |= time.monotonic() - began >= limits.seconds
    stop = max(caught, default=0)
    if jax.process_count() == 1:
        return ended, stop
    # All processes have to stop at the same update, so they exchange what they know, but not at every update.
    if step % READ_EVERY and step != limits.updates:
        return False, 0
    from jax.experimental import multihost_utils

    everyone = np.asarray(multihost_utils.process_allgather(np.array([ended, stop], np.int32)))
    ended_any, stop_any = everyone.reshape(-1, 2).max(axis=0)
    return bool(ended_any), int(stop_any)
