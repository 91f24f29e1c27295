r"""Tables of numbers over time as people have them, in text files: read right, or refused with the option that helps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxbptt.tasks import dates as date_columns
from jaxbptt.tasks.body import Body, choose, place
from jaxbptt.tasks.dialect import DELIMITERS, Reading, likeliest, readings
from jaxbptt.tasks.files import InputError, Series, standardise
from jaxbptt.tasks.lines import NO_DELIMITER, Lines, line_of, load, without_ragged
from jaxbptt.words import counted, install_command

Missing = Literal["error", "hold", "interpolate", "mask"]


class Table(NamedTuple):
    """Numbers over time, in their own units.

    Attributes:
        name: of the file.
        columns: names, each once.
        values: `[time, columns]`, float64, all finite.
        observed: `[time, columns]`, False where the cell was missing and its value is made up.
        times: of the rows, `[time]`, or `None` where the file has none or they can't be known.
        read_as: lines for the user that say how the file was read.
        places: of the columns in the file, from 1.
    """

    name: str
    columns: tuple[str, ...]
    values: np.ndarray
    observed: np.ndarray
    times: np.ndarray | None
    read_as: tuple[str, ...]
    places: tuple[int, ...]

    def positions(self, names: Sequence[str | int]) -> tuple[int, ...]:
        """The places in `values` of columns given by name, or by position in the file.

        Raises:
            InputError: a column that isn't there, with those that are.
        """
        return tuple(_find(name, self.columns, self.places, self.name) for name in names)


def read_table(
    path: str | Path,
    *,
    delimiter: str | None = None,
    decimal: str | None = None,
    header: bool | None = None,
    encoding: str = "utf-8",
    skip: int = 0,
    columns: Sequence[str | int] = (),
    drop: Sequence[str | int] = (),
    missing: Missing = "error",
    dates: date_columns.Order | None = None,
    sort: bool = False,
    ragged: Literal["error", "drop"] = "error",
) -> Table:
    """Read a table."""
    try:
        import pandas  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(f"pandas is not installed: {install_command('tables')}") from None
    delimiter = None if delimiter is None else DELIMITERS.get(delimiter, delimiter)
    lines = load(path, encoding, skip)
    if ragged == "drop":
        lines = without_ragged(lines, *likeliest(lines, delimiter if delimiter is not None else lines.delimiter))
    found = readings(lines, delimiter, decimal, header)
    names = [_names(reading) for reading in found]
    chosen = [_chosen(reading, each[0], columns, drop, lines) for reading, each in zip(found, names, strict=True)]
    body = choose(lines, found, chosen, settled=(delimiter is not None, decimal is not None))
    labels, renamed = names[found.index(body.reading)]
    return _table(lines, body, labels, renamed, tuple(columns), missing, dates, sort)


def read_csv(path: str | Path, **options: Any) -> Series:
    """The columns of a table, standardised; with the options of `read_table`."""
    table = read_table(path, **options)
    return Series(table.name, standardise(table.values), ())


def _names(reading: Reading) -> tuple[tuple[str, ...], str]:
    """Names of all columns, each once, and what was done for that."""
    width = len(reading.kinds)
    if not reading.names:
        return tuple(f"column {i + 1}" for i in range(width)), ""
    given = reading.names
    names, renamed = [], []
    for i, name in enumerate(given):
        if not name:
            names.append(f"column {i + 1}")
        elif given.count(name) > 1:
            names.append(f"{name} ({i + 1})")
            renamed.append(names[-1])
        else:
            names.append(name)
    return tuple(names), f"names that occur more than once have their position: {', '.join(renamed)}" if renamed else ""


def _chosen(
    reading: Reading, names: tuple[str, ...], columns: Sequence[str | int], drop: Sequence[str | int], lines: Lines
) -> tuple[int, ...]:
    """Positions of the columns to read: those chosen, and columns of dates."""
    places = tuple(range(1, len(names) + 1))
    file = Path(lines.path).name
    wanted = {_find(name, names, places, file, "--columns ") for name in columns} or set(range(len(names)))
    wanted |= {i for i, kind in enumerate(reading.kinds) if kind == "date"}
    return tuple(sorted(wanted - {_find(name, names, places, file, "--drop ") for name in drop}))


def _find(name: str | int, names: Sequence[str], places: Sequence[int], file: str, option: str = "") -> int:
    if name in names:
        return names.index(str(name))
    if (isinstance(name, int) or name.isdecimal()) and int(name) in places:
        return places.index(int(name))
    there = ", ".join(f"{number} {each!r}" for number, each in zip(places[:20], names, strict=False))
    raise InputError(f"{option}{name}: {file} has no such column, but {there}{' …' if len(names) > 20 else ''}.")


def _table(
    lines: Lines,
    body: Body,
    names: tuple[str, ...],
    renamed: str,
    columns: tuple[str | int, ...],
    missing: Missing,
    order: date_columns.Order | None,
    sort: bool,
) -> Table:
    notes = [renamed] if renamed else []
    reading = body.reading
    values = dict(body.values)
    if reading.units:
        notes.append(f"line {reading.head.lines[1]} has units and is no row")
    if body.blank > lines.ragged:
        notes.append(f"{counted(body.blank - lines.ragged, 'blank line is no row', 'blank lines are no rows')}")
    if body.empty:
        notes.append(f"{counted(body.empty, 'row', 'rows')} of empty cells at the end left out")
    for i in tuple(values):
        if not reading.named(i) and not columns and np.isnan(values[i]).all():
            del values[i]
            notes.append(f"{names[i]} is empty, and left out")
    is_first = 0 in values and not columns and reading.header and reading.named(0) in ("", "Unnamed: 0")
    if is_first and len(values) > 1 and np.array_equal(values[0], np.arange(len(values[0]))):
        del values[0]
        notes.append("column 1 counts the rows, as pandas writes them, and is left out")
    if not values or not len(body.rows):
        raise InputError(f"{lines.path} has no rows of numbers.")
    kept = tuple(values)
    array = np.stack([values.pop(i) for i in kept], axis=1)
    rows = body.rows
    times, about = date_columns.times_of_rows(body.dates, names, order, lines.path)
    notes += about
    if sort and times is None:
        raise InputError(f"--sort needs dates that give the rows an order: {'; '.join(about) or 'there are none'}.")
    if times is not None and (back := np.diff(times) < np.timedelta64(0)).any():
        if sort:
            rank = np.argsort(times, kind="stable")
            array, rows, times = array[rank], rows[rank], times[rank]
            notes.append("rows sorted by time")
        elif back.all():
            notes.append("the newest row is first: --sort puts the oldest first")
        else:
            line = line_of(lines, reading.delimiter, int(rows[back.argmax() + 1]))
            notes.append(f"the rows are not in the order of time, first in line {line}: --sort puts them in order")
    observed = ~np.isnan(array)
    if not observed.all():
        notes += _fill(lines, body, array, observed, rows, [names[i] for i in kept], kept, missing)
    for i in kept:
        signs = sorted(body.marks[i] - {reading.decimal, "."} - {"\u2212"})
        if signs:
            notes.append(f"{names[i]}: {' '.join(repr(sign) for sign in signs)} in its numbers left out")
    delimiter = next((name for name, each in DELIMITERS.items() if each == reading.delimiter), reading.delimiter)
    head = "no header"
    if reading.names:
        head = f"header in line {reading.head.lines[0]}" if reading.header else "names in the comment above"
    between = (
        ""
        if reading.delimiter == NO_DELIMITER
        else f"delimiter {delimiter if len(delimiter) > 1 else repr(delimiter)}, "
    )
    first = (
        f"{Path(lines.path).name}: {head}, {between}decimal {reading.decimal!r}, {counted(len(kept), 'column')}, "
        f"{counted(len(array), 'row')}"
    )
    return Table(
        Path(lines.path).name,
        tuple(names[i] for i in kept),
        array,
        observed,
        times,
        (first, *lines.read_as, *notes),
        tuple(i + 1 for i in kept),
    )


def _fill(
    lines: Lines,
    body: Body,
    values: np.ndarray,
    observed: np.ndarray,
    rows: np.ndarray,
    names: list[str],
    kept: tuple[int, ...],
    missing: Missing,
) -> list[str]:
    """Values for missing cells, in place."""
    if missing == "error":
        row, column = np.argwhere(~observed)[0]
        where = place(lines, body.reading, int(rows[row]), kept[column])
        raise InputError(
            f"{where}: the cell is missing, the first of "
            f"{(~observed).sum():,}. Repeat the last value with --missing hold, draw a line with --missing interpolate, or "
            "leave such cells out of the loss with --missing mask."
        )
    empty = np.flatnonzero(~observed.any(axis=0))
    if len(empty):
        number = kept[empty[0]] + 1
        raise InputError(f"{lines.path}, column {number} ({names[empty[0]]}) has no number: --drop {number}.")
    time = np.arange(len(values))
    leading = 0
    for column in range(values.shape[1]):
        there = np.flatnonzero(observed[:, column])
        if missing == "interpolate":
            values[:, column] = np.interp(time, there, values[there, column])
        else:
            last = np.searchsorted(there, time, side="right") - 1
            leading += int((last < 0).sum())
            values[:, column] = values[there[np.maximum(last, 0)], column]
    how = {
        "hold": "repeat the last value",
        "interpolate": "are interpolated from their neighbours, and so use later values",
        "mask": "do not count in the loss, and repeat the last value as an input",
    }[missing]
    first = f"; {leading:,} before the first value take that one" if leading else ""
    return [f"{counted(int((~observed).sum()), 'missing cell')}: {how}{first}"]
