"""The loop of a run: updates, metrics, validation, checkpoints, and a stop that loses nothing."""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbptt.commands import metrics
from jaxbptt.commands.model import Model
from jaxbptt.commands.sources import Source
from jaxbptt.tasks import InputError
from jaxbptt.training import checkpoints
from jaxbptt.training.tbptt import TrainState

# Reading a number waits for the device, so the metrics of this many updates are read at once.
READ_EVERY = 20


class Limits(NamedTuple):
    """When a run stops and what it writes.

    Attributes:
        updates: in total, including those before a resume; `None` for no limit.
        seconds: since this start; `None` for no limit.
        save_every: updates between two checkpoints; each is preceded by a validation.
        folder: of the checkpoints.
        metrics: the file, or `None` in a process that doesn't write it.
        settings: to save with each checkpoint.
    """

    updates: int | None
    seconds: float | None
    save_every: int
    folder: Path
    metrics: Path | None
    settings: dict[str, Any]


class Progress(NamedTuple):
    """How far a run is, and how well it does.

    Attributes:
        update: the number of updates so far.
        training: mean of `Source.measure` over the updates read last.
        validation: `Source.measure` of the validation loss, where it has just been computed.
        rate: updates per second.
        share: of the run that is done.
        left: seconds.
    """

    update: int
    training: float
    validation: float | None
    rate: float
    share: float
    left: float


def train(
    model: Model, state: TrainState, source: Source, limits: Limits, show: Callable[[Progress], None]
) -> tuple[TrainState, int | None]:
    """Update until a limit is reached or a signal comes; the last state is saved.

    Returns:
        The state, and the signal that ended the run, or `None`.

    Raises:
        InputError: a loss or gradient that is not finite; nothing is saved from then on.
    """
    first = step = int(state.step)
    saved = step or -1
    chunks = source.training.start(step)
    pending: list[Any] = []
    began = time.monotonic()
    clock = _Clock(began, first)
    with _signals() as caught:
        while True:
            ended, stop = _asked_to_end(step, first, began, limits, caught)
            boundary = step > max(saved, first) and step % limits.save_every == 0
            if len(pending) == READ_EVERY or boundary or ended or stop:
                validation = None
                if (boundary or ended) and step > saved and model.validate is not None:
                    validation = model.validate(state.params)
                rows = _read(pending, step, validation, source, limits)
                if rows:
                    show(_progress(rows, clock, began, source, limits))
                pending = []
                if (boundary or ended or stop) and step > saved:
                    checkpoints.save(limits.folder, step, state, limits.settings)
                    saved = step
                if ended or stop:
                    return state, stop or None
            state, measured = model.update(state, next(chunks))
            pending.append(measured)
            step += 1


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
        row: dict[str, Any] = {"update": number, "loss": float(m.loss)}
        row |= {key: float(getattr(m, key)) for key in ("gradient_norm", "fraction_clipped", "carry_norm")}
        if source.text:
            row["bits_per_character"] = source.measure(row["loss"])
        rows.append(row)
    if rows and validation is not None:
        rows[-1]["validation_loss"] = validation
        if source.text:
            rows[-1]["validation_bits_per_character"] = source.measure(validation)
    if rows and limits.metrics is not None:
        try:
            metrics.append(limits.metrics, rows, text=source.text is not None)
        except OSError as error:
            raise InputError(f"--metrics {limits.metrics} can't be written: {error.strerror or error}.") from None
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


def _progress(rows: list[dict[str, Any]], clock: _Clock, began: float, source: Source, limits: Limits) -> Progress:
    update = rows[-1]["update"]
    rate, seconds = clock.rate(update), time.monotonic() - began
    share, left = 0.0, math.inf
    if limits.updates is not None:
        share, left = update / limits.updates, (limits.updates - update) / rate
    if limits.seconds is not None:
        share, left = max(share, seconds / limits.seconds), min(left, max(limits.seconds - seconds, 0))
    training = source.measure(sum(row["loss"] for row in rows) / len(rows))
    validation = rows[-1].get("validation_loss")
    measured = None if validation is None else source.measure(validation)
    return Progress(update, training, measured, rate, min(share, 1.0), left)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects the first signal to stop; a second one has its usual effect."""
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
