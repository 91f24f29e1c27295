r"""Tables of numbers over time as people have them, in text files: read right, or refused with the option that helps."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from jaxbptt.html_table import columns_table
from jaxbptt.tasks.files import InputError, Series, standardise
from jaxbptt.tasks.tables import dates as date_columns
from jaxbptt.tasks.tables.body import Body, choose, place
from jaxbptt.tasks.tables.columns import chosen, find, names_of
from jaxbptt.tasks.tables.dialect import delimiter_of, likeliest, option, readings
from jaxbptt.tasks.tables.lines import NO_DELIMITER, Lines, line_of, load, without_ragged
from jaxbptt.tasks.tables.missing import Missing, fill
from jaxbptt.tasks.tables.missing import words as fill_words
from jaxbptt.words import counted, install_command

# Fewer rows may rise evenly by chance.
_LEAST = 5
# Columns that a notebook shows.
_SHOWN = 8


class Table(NamedTuple):
    """Numbers over time, in their own units.

    Attributes:
        name: of the file.
        columns: names, each once.
        values: `[time, columns]`, float64, all finite.
        observed: `[time, columns]`, False where the cell was missing and its value is made up.
        times: of the rows, `[time]`, or `None` where the file has none or they can't be known.
        read_as: lines for the user that say how the file was read.
        places: of the columns in the file, from 1; empty if there are no others.
        zone: `"UTC"` where the cells have several time zones and `times` are in UTC; empty where they are as written.
    """

    name: str
    columns: tuple[str, ...]
    values: np.ndarray
    observed: np.ndarray
    times: np.ndarray | None
    read_as: tuple[str, ...]
    places: tuple[int, ...] = ()
    zone: str = ""

    def _repr_html_(self) -> str:
        columns: dict[str, Any] = {"row": range(1, len(self.values) + 1)} if self.times is None else {"": self.times}
        columns |= dict(zip(self.columns[:_SHOWN], self.values.T, strict=False))
        more = len(self.columns) - _SHOWN
        notes = [*self.read_as, *([f"{counted(more, 'more column')} not shown."] if more > 0 else [])]
        return columns_table(self, columns, notes=notes)

    def positions(self, names: Sequence[str | int], *, option: str = "") -> tuple[int, ...]:
        """The indices in `columns` of columns given by name, or by position in the file from 1.

        Args:
            names: of columns.
            option: that they were given with, for the error.

        Raises:
            InputError: a column that isn't there, with those that are.
        """
        places = self.places or range(1, len(self.columns) + 1)
        return tuple(find(name, self.columns, places, self.name, option) for name in names)


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
    r"""The numbers of a text file with one row for each time step, such as CSV as spreadsheets and pandas write it.

    How the file is written is found out by trying the few ways there are: comma, semicolon, tab, bar or spaces between
    cells, a point or a comma as decimal mark, a line of names or none. Where two of them make sense of the whole file and
    give different numbers, it is refused with the options that settle it. pandas cuts the file into cells.

    A number is written strictly: digits with a decimal mark and an exponent, or with thousands separators in groups of
    three; a currency sign at one end is left out, and where all cells of a column end in `%`, 5% is 0.05. A cell is missing
    if it is empty or one of `nan NA N/A n.a. null None NaT ? - -- . ..`, whatever the case; all other cells are refused.

    A file compressed by gzip is read as it is, `#` lines above the table are left out, blank lines are no rows. Of columns
    of dates and times of day, the first date becomes `times`, with the times of day added if it has none. Names that occur
    more than once get their position, columns without a name are called `column 3`.

    Cost: two passes over the file at most, usually one; a million rows of three numbers take about a second. Memory is
    that of the file and of the values.

    Args:
        path: of the file.
        delimiter: a character, or `"tab"`, `"space"` for any number of blanks, `"none"` for one cell a line.
        decimal: `"."` or `","`; the other one may separate thousands.
        header: whether the first row has the names.
        encoding: of the text.
        skip: lines above the table.
        columns: to read, by name or by position from 1; all by default.
        drop: columns to leave out.
        missing: `"error"` refuses missing cells; `"hold"` repeats the last value of the column; `"interpolate"` draws a
            line between its neighbours, which uses later values; `"mask"` repeats the last value and leaves it to the
            caller not to count those entries, which are False in `observed`. Before the first value, that one is taken.
        dates: `"day-first"`, `"month-first"` or `"year-first"`, where dates such as 01/02/2020 leave that open.
        sort: the rows by date.
        ragged: `"error"` refuses rows of another length than the others, `"drop"` leaves them out.

    Returns:
        A `Table`; `read_as` says in its first line what was found out, and then all that was left out or made up.

    Raises:
        InputError: a file that can't be read, or read in one way only, with the line and the column as an editor and a
            spreadsheet show them, and the option that helps.
        ValueError: an option that doesn't exist.

    Example:
        >>> import tempfile, pathlib
        >>> from jaxbptt import tasks
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "weather.csv")
        ...     _ = path.write_text("Tag;Temperatur;Druck\n30.01.2020;1,5;1.013\n31.01.2020;-2;NA\n")
        ...     table = tasks.read_table(path, missing="hold")
        >>> print(table.columns, table.times.astype("datetime64[D]"))
        ('Temperatur', 'Druck') ['2020-01-30' '2020-01-31']
        >>> print(table.values)
        [[   1.5 1013. ]
         [  -2.  1013. ]]
        >>> for line in table.read_as:
        ...     print(line)
        weather.csv: header in line 1, delimiter ';', decimal ',', 2 columns, 2 rows
        Tag: the times of the rows, 2020-01-30 to 2020-01-31, not an input
        missing cells, 1 of 4, repeat the last value
        Druck: '.' in its numbers left out
    """
    try:
        import pandas  # noqa: F401
    except ModuleNotFoundError:
        raise InputError(f"pandas is not installed: {install_command('tables')}") from None
    _check_options(
        decimal=(decimal, (None, ".", ",")),
        header=(header, (None, True, False)),
        missing=(missing, ("error", "hold", "interpolate", "mask")),
        dates=(dates, (None, "day-first", "month-first", "year-first")),
        ragged=(ragged, ("error", "drop")),
    )
    lines = load(path, encoding, skip)
    cut = lines.delimiter if delimiter is None else delimiter_of(delimiter)
    if ragged == "drop":
        lines = without_ragged(lines, *likeliest(lines, cut))
    found, errors = [], []
    for reading in readings(lines, cut, decimal, header):
        try:
            found.append((reading, chosen(reading, columns, drop, lines)))
        except InputError as error:  # a name that is not there: under another reading it may be
            errors.append(error)
    if not found:
        raise errors[0]
    body = choose(lines, found, settled=(cut is not None, decimal is not None))
    return _table(lines, body, bool(columns), missing, dates, sort)


def _check_options(**options: tuple[Any, tuple[Any, ...]]) -> None:
    for name, (value, allowed) in options.items():
        if value not in allowed:
            raise ValueError(
                f"{name} is {value!r}, but {', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r} is expected."
            )


def read_csv(path: str | Path, **options: Any) -> Series:
    """The columns of a table, standardised; with the options of `read_table`."""
    table = read_table(path, **options)
    return Series(table.name, standardise(table.values), ())


def _table(
    lines: Lines, body: Body, some: bool, missing: Missing, order: date_columns.Order | None, sort: bool
) -> Table:
    reading, names = body.reading, names_of(body.reading)
    kept, notes = _kept_columns(lines, body, names, some)
    if not kept or not len(body.rows):
        raise InputError(f"{lines.path} has no rows of numbers.")
    values, rows = np.stack([body.values.pop(i) for i in kept], axis=1), body.rows
    times, about, zone = date_columns.times_of_rows(body.dates, names, order, lines.path)
    if sort and times is None:
        raise InputError(f"--sort needs dates that give the rows an order: {'; '.join(about) or 'there are none'}.")
    if times is not None and (back := times[1:] < times[:-1]).any():
        if sort:
            rank = np.argsort(times, kind="stable")
            values, rows, times = values[rank], rows[rank], times[rank]
            about.append("the rows are sorted by time")
        elif back.all():
            about.append("Warning: the newest row is first: --sort puts the oldest first")
        else:
            line = line_of(lines, reading.delimiter, int(rows[back.argmax() + 1]))
            about.append(
                f"Warning: the rows are not in the order of time, first in line {line}: --sort puts them in order"
            )
    if times is not None and (again := len(times) - len(np.unique(times))):
        about.append(f"Warning: {counted(again, 'row has', 'rows have')} the date of another row: is this one series?")
    observed = ~np.isnan(values)
    if not some and len(kept) > 1:
        about += _counting(values, names, kept)
    if not observed.all():
        _check_missing(lines, body, observed, rows, kept, missing)
        about.append(fill_words(observed, fill(values, observed, missing), missing))
    for i in kept:
        if "%" in body.marks[i]:
            about.append(f"{names[i]}: percentages, of which 5% is read as 0.05")
        signs = sorted(body.marks[i] - {reading.decimal, "\u2212", "%"})
        if signs:
            about.append(f"{names[i]}: {' and '.join(map(repr, signs))} in its numbers left out")
    where = "no header"
    if reading.names:
        where = f"header in line {reading.head.lines[0]}" if reading.header else "names in the comment above"
    cut = "" if reading.delimiter == NO_DELIMITER else option(reading.delimiter).removeprefix("--") + ", "
    size = f"{counted(len(kept), 'column')}, {counted(len(values), 'row')}"
    file = Path(lines.path).name
    first = f"{file}: {where}, {cut}decimal {reading.decimal!r}, {size}"
    labels, places = tuple(names[i] for i in kept), tuple(i + 1 for i in kept)
    return Table(file, labels, values, observed, times, (first, *lines.read_as, *notes, *about), places, zone)


def _kept_columns(lines: Lines, body: Body, names: tuple[str, ...], some: bool) -> tuple[list[int], list[str]]:
    """Positions of the columns of numbers, and what was left out or renamed."""
    reading, notes = body.reading, []
    renamed = [name for i, name in enumerate(names) if reading.named(i) not in ("", name)]
    if renamed:
        notes.append(f"names that occur more than once have their position: {', '.join(renamed)}")
    if reading.units:
        notes.append(f"line {reading.head.lines[1]} has units and is no row")
    if body.blank > lines.ragged:
        notes.append(counted(body.blank - lines.ragged, "blank line is no row", "blank lines are no rows"))
    if body.empty:
        notes.append(f"{counted(body.empty, 'row')} of empty cells at the end left out")
    kept = list(body.values)
    if some:
        return kept, notes
    empty = [i for i in kept if i in body.nothing and not reading.named(i)]
    if empty:
        notes.append(f"without name and numbers, left out: {', '.join(names[i] for i in empty)}")
    kept = [i for i in kept if i not in empty]
    counts = kept and kept[0] == 0 and reading.header and reading.named(0) in ("", "Unnamed: 0")
    if counts and len(kept) > 1 and any(np.array_equal(body.values[0], np.arange(len(body.rows)) + i) for i in (0, 1)):
        notes.append("column 1 counts the rows, as pandas and R write them, and is left out")
        del kept[0]
    return kept, notes


def _counting(values: np.ndarray, names: tuple[str, ...], kept: list[int]) -> list[str]:
    """A line for each column that rises by the same amount in every row, as an index or the time does."""
    lines = []
    if len(values) < _LEAST:
        return lines
    for i, column in zip(kept, values.T, strict=True):
        with np.errstate(over="ignore", invalid="ignore"):
            rise = (column[-1] - column[0]) / (len(column) - 1)
            # Decimals such as 0.1 are rounded.
            rounding = 8 * np.finfo(float).eps * np.abs(column).max()
            evenly = np.abs(np.diff(column) - rise).max() <= rounding
        if rise > 0 and evenly:
            lines.append(
                f"{names[i]} counts up by {rise:.6g} in every row: leave it out with --drop {shlex.quote(names[i])} if it is "
                "an index"
            )
    return lines


def _check_missing(
    lines: Lines, body: Body, observed: np.ndarray, rows: np.ndarray, kept: list[int], missing: Missing
) -> None:
    if missing == "error":
        row, column = np.argwhere(~observed)[0]
        where = place(lines, body.reading, int(rows[row]), kept[column])
        number = int((~observed).sum())
        raise InputError(
            f"{where}: the cell is missing{f', the first of {number:,}' if number > 1 else ''}. Repeat the last value with "
            "--missing hold, draw a line with --missing interpolate, or keep such cells out of the loss with --missing mask."
        )
    empty = np.flatnonzero(~observed.any(axis=0))
    if len(empty):
        where = place(lines, body.reading, int(rows[0]), kept[empty[0]])
        raise InputError(
            f"{where}: no cell of this column has a number. Leave it out with --drop {kept[empty[0]] + 1}."
        )
