"""What a run shows: a progress bar on a terminal, and a line at each validation."""

import math
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Table

from jaxbptt.commands.run import Progress
from jaxbptt.models import wording
from jaxbptt.models.forecasting import ValidationErrors
from jaxbptt.words import counted

# Of which the errors of forecasts are shown.
MAX_COLUMNS = 8


class Display:
    """Shows `Progress`; a context manager, so that the bar disappears when the run ends."""

    def __init__(self, console: Console, measured_in: str, updates: int | None):
        self._console, self._measured_in = console, measured_in
        self._of = f" of {updates:,}" if updates else ""
        text = "update {task.fields[update]}{task.fields[of]}", "{task.fields[words]}"
        self._bar = Bar(
            TextColumn(text[0], markup=False),
            BarColumn(bar_width=20),
            TextColumn(text[1], markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=1.0, update="0", of=self._of, words="compiling")

    def __enter__(self) -> Self:
        """Show the bar."""
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        """Remove the bar."""
        self._bar.stop()

    def show(self, progress: Progress) -> None:
        """Move the bar, and print a line at each checkpoint."""
        left = "" if math.isinf(progress.left) else f", {_clock(progress.left)} left"
        self._bar.update(
            self._task,
            completed=progress.share,
            update=f"{progress.update:,}",
            words=f"{_loss(progress.training)} {self._measured_in}, {progress.rate:.1f} updates/s{left}",
        )
        if progress.at_checkpoint:
            validation = "" if progress.validation is None else f", validation {_loss(progress.validation)}"
            self._console.print(
                f"update {progress.update:,}: {_loss(progress.training)}{validation} {self._measured_in}, "
                f"{progress.rate:.1f} updates/s{left}"
            )


def _loss(value: float) -> str:
    return f"{value:.3f}" if value < 1e4 else f"{value:.3g}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table for a terminal: the first column to the left, numbers to the right."""
    # Names of columns in a file are arbitrary: what looks like rich's markup in them is not.
    shown = Table(title=escape(title), title_justify="left", box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for i, column in enumerate(head):
        # On a narrow terminal heads are broken between words, never within one.
        longest = max(map(len, column.split()), default=0)
        shown.add_column(escape(column), justify="right" if i else "left", no_wrap=not i, min_width=longest)
    for row in rows:
        shown.add_row(*map(escape, row))
    return shown


def show_errors(console: Console, errors: ValidationErrors) -> None:
    """The errors of forecasts beside those of the baselines, as many as fit on a screen, and the first warnings."""
    head, rows = wording.errors_table(errors)
    shown = rows[: MAX_COLUMNS * len(rows) // len(errors.columns)]
    console.print()
    console.print(table(wording.measured_sentence(errors), head, shown))
    if len(errors.columns) > MAX_COLUMNS:
        console.print(f"and {counted(len(errors.columns) - MAX_COLUMNS, 'more column')}")
    sentences = wording.errors_sentences(errors)
    for sentence in sentences[:MAX_COLUMNS]:
        console.print(sentence)
    if len(sentences) > MAX_COLUMNS:
        console.print(f"and {counted(len(sentences) - MAX_COLUMNS, 'more warning')}")
