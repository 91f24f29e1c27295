r"""All rows of a table under one reading, and the choice between readings that make sense of the whole file."""

from typing import NamedTuple

import numpy as np

from jaxbptt.tasks import dates
from jaxbptt.tasks.cells import BLANKS, numbers
from jaxbptt.tasks.dialect import DELIMITERS, Reading
from jaxbptt.tasks.files import InputError
from jaxbptt.tasks.lines import NO_DELIMITER, Lines, frames, is_blank, line_of, ragged, rows
from jaxbptt.words import counted


class Body(NamedTuple):
    """The rows of a table.

    Attributes:
        reading: under which they were read.
        values: of the columns of numbers, by position; nan where a cell is missing.
        dates: the columns of dates, by position: under each format that fits all cells.
        rows: the number of each row in the file, the header and blank lines counted.
        blank: how many lines within the table are blank.
        empty: how many rows at the end have no cell with anything in it.
        bad: row, column and text of cells that are neither numbers nor dates, the first of each column.
        marks: characters in numbers beyond digits, signs and `e`, by position.
    """

    reading: Reading
    values: dict[int, np.ndarray]
    dates: dict[int, dict[str, np.ndarray]]
    rows: np.ndarray
    blank: int
    empty: int
    bad: tuple[tuple[int, int, str], ...]
    marks: dict[int, frozenset[str]]


def read_body(lines: Lines, reading: Reading, columns: tuple[int, ...], *, stop: bool) -> Body:
    """The given columns of all rows; with `stop`, only up to the first bad cell.

    Raises:
        InputError: rows of different lengths.
    """
    width = len(reading.kinds)
    skipped = (reading.header is not False) + reading.units
    start = reading.head.rows[skipped]
    parts: dict[int, list[np.ndarray]] = {i: [] for i in columns if reading.kinds[i] != "date"}
    marks: dict[int, frozenset[str]] = {i: frozenset() for i in parts}
    found: dict[int, dates.Dates] = {}
    bad: dict[int, tuple[int, int, str]] = {}
    total, open_end = 0, False
    for frame in frames(lines, reading.delimiter, width):
        frame = frame.iloc[max(start - total, 0) :]
        row = max(start, total)
        total = row + len(frame)
        open_end = open_end or bool((frame[width - 1] == "").any())
        for i in columns:
            if i in bad:
                continue
            cells = frame[i].to_numpy()
            if i in parts:
                read = numbers(cells, reading.decimal)
                parts[i].append(read.values)
                marks[i] |= read.marks
                place = read.bad
                if place is not None and (known := dates.start(cells)) is not None:
                    step = dates.read(known, cells)
                    place = step if isinstance(step, int) else place
            else:
                known = found.get(i) or dates.start(cells)
                step = 0 if known is None else dates.read(known, cells)
                place = step if isinstance(step, int) else None
                if not isinstance(step, int):
                    found[i] = step
            if place is not None:
                bad[i] = (row + place, i, cells[place])
        if bad and stop:
            break
    kept, blank, empty = np.arange(start, total), 0, 0
    if not (bad and stop) and (open_end or not _is_even(lines, reading.delimiter, width, total)):
        kept, blank, empty = _kept_rows(lines, reading.delimiter, width, start, total)
    where = slice(None) if len(kept) == total - start else kept - start
    return Body(
        reading,
        {i: np.concatenate(parts.pop(i))[where] for i in tuple(parts) if i not in bad},
        {
            i: {name: np.concatenate(each)[where] for name, each in found[i].items()}
            for i in tuple(found)
            if i not in bad
        },
        kept,
        blank,
        empty,
        tuple(sorted(bad.values())),
        marks,
    )


def choose(lines: Lines, found: list[Reading], columns: list[tuple[int, ...]], *, settled: tuple[bool, bool]) -> Body:
    """The one reading that makes sense of the whole file.

    Args:
        lines: of the file.
        found: readings that make sense of its first rows.
        columns: to read under each of them.
        settled: whether the delimiter and the decimal were named.

    Raises:
        InputError: where none does, where two give different numbers, and where the first row may be names or numbers.
    """
    bodies, errors = [], []
    for reading, chosen in zip(found, columns, strict=True):
        same = [body for body in bodies if body.reading[0] == reading[0] and body.reading[2:4] == reading[2:4]]
        if same and not same[0].bad and not frozenset().union(*same[0].marks.values()):
            continue  # whole numbers are the same under both decimals
        try:
            bodies.append(read_body(lines, reading, chosen, stop=len(found) == 1))
        except InputError as error:
            errors.append(error)
    if not bodies:
        raise errors[0]
    fewest = min(len(body.bad) for body in bodies)
    bodies = [body for body in bodies if len(body.bad) == fewest]
    if fewest:
        _refuse_cell(lines, max(bodies, key=lambda body: (body.bad[0][0], len(body.reading.kinds))))
    best = bodies[0]
    for other in bodies[1:]:
        if not _same(best, other):
            raise InputError(_ambiguous(lines, best, other))
    one = best.reading.delimiter == NO_DELIMITER
    if one and not settled[0]:
        inside = frozenset().union(*best.marks.values()) & {",", " "}
        for mark in inside - ({best.reading.decimal} if settled[1] else set()):
            if best.reading.header and mark == ",":
                continue
            for line, cells in rows(lines, mark):
                if len(cells) > 1 and not best.reading.header:
                    raise InputError(
                        f"{lines.path}, line {line}: {mark.join(cells)!r} may be {counted(len(cells), 'cell')} or one number. "
                        f"Say which: --delimiter {_named(mark)}, or --delimiter none --decimal {best.reading.decimal}."
                    )
    if best.reading.header is None:
        shown = ",".join(best.reading.head.cells[0, :4])
        raise InputError(
            f"{lines.path}, line {best.reading.head.lines[0]}: {shown!r} may be names or data. Say which: --header yes or "
            "--header no."
        )
    return best


def _refuse_cell(lines: Lines, body: Body) -> None:
    row, column, cell = body.bad[0]
    reading = body.reading
    where = place(lines, reading, row, column)
    first = reading.head.cells[(reading.header is not False) + reading.units, column]
    kind = "date as those above it are" if dates.formats(first.strip(BLANKS)) else "finite number"
    raise InputError(
        f"{where}: {cell[:40]!r} is not a {kind}. Leave the column out with --drop {column + 1}, or name those to keep "
        "with --columns."
    )


def place(lines: Lines, reading: Reading, row: int, column: int) -> str:
    """File, line and column of a cell."""
    name = f" ({reading.named(column)})" if reading.named(column) else ""
    return f"{lines.path}, line {line_of(lines, reading.delimiter, row)}, column {column + 1}{name}"


def _same(one: Body, other: Body) -> bool:
    return (
        one.reading.header == other.reading.header
        and len(one.values) == len(other.values)
        and all(
            np.array_equal(a, b, equal_nan=True)
            for a, b in zip(one.values.values(), other.values.values(), strict=True)
        )
    )


def _ambiguous(lines: Lines, one: Body, other: Body) -> str:
    """What both readings make of the first row that they read differently."""
    shared = min(len(one.rows), len(other.rows))
    row = 0
    if len(one.values) == len(other.values):
        differ = np.zeros(shared, bool)
        for a, b in zip(one.values.values(), other.values.values(), strict=True):
            differ |= ~((a[:shared] == b[:shared]) | (np.isnan(a[:shared]) & np.isnan(b[:shared])))
        row = int(differ.argmax())
    line = line_of(lines, one.reading.delimiter, int(one.rows[row]))
    words = []
    for body in (one, other):
        shown = [f"{column[row]:.10g}" for column in body.values.values()][:4]
        option = f"--decimal {body.reading.decimal}"
        if one.reading.delimiter != other.reading.delimiter:
            option = f"--delimiter {_named(body.reading.delimiter)} {option}"
        words.append((" and ".join(shown) + (" …" if len(body.values) > 4 else ""), option))
    return (
        f"{lines.path}, line {line} may be {words[0][0]}, or {words[1][0]}. Say which: {words[0][1]}, or {words[1][1]}."
    )


def _named(delimiter: str) -> str:
    return next((name for name, each in DELIMITERS.items() if each == delimiter), delimiter)


def _is_even(lines: Lines, delimiter: str, width: int, total: int) -> bool:
    """Whether all rows have the usual number of cells: no last cell is empty, and the delimiters are as many as needed."""
    if width == 1 and delimiter == NO_DELIMITER:
        return True
    return delimiter not in (" ", NO_DELIMITER) and lines.raw.count(delimiter.encode()) == total * (width - 1)


def _kept_rows(lines: Lines, delimiter: str, width: int, start: int, total: int) -> tuple[np.ndarray, int, int]:
    """Which rows are some, and how many of the others are blank lines, and rows of empty cells at the end."""
    kept, blank, end = [], 0, 0
    count = 0
    for row, (line, cells) in enumerate(rows(lines, delimiter)):
        count = row + 1
        if width > 1 and is_blank(cells):
            blank += row >= start
            continue
        if len(cells) != width and not (width == 1 and not cells):
            raise InputError(ragged(lines, line, len(cells), width))
        if row >= start:
            kept.append(row)
            if any(cells):
                end = len(kept)
    if count != total:
        raise InputError(f"{lines.path}: its quotes can't be followed. Write each quote inside a cell twice.")
    empty = len(kept) - end if width > 1 else 0
    return np.array(kept[: len(kept) - empty], int), blank, empty
