r"""All rows of a table under one reading, and the choice between readings that make sense of the whole file."""

from typing import NamedTuple

import numpy as np

from jaxbptt.tasks.files import InputError
from jaxbptt.tasks.tables import dates
from jaxbptt.tasks.tables.cells import BLANKS, numbers
from jaxbptt.tasks.tables.dialect import Reading, option
from jaxbptt.tasks.tables.lines import NO_DELIMITER, Lines, frames, is_blank, line_of, ragged, rows
from jaxbptt.words import counted

# Totals and notes stand in the last rows.
_LAST = 3


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
        nothing: positions of columns without a character in any cell.
        marks: characters in numbers beyond digits, signs and `e`, by position.
    """

    reading: Reading
    values: dict[int, np.ndarray]
    dates: dict[int, dict[str, np.ndarray]]
    rows: np.ndarray
    blank: int
    empty: int
    bad: tuple[tuple[int, int, str], ...]
    nothing: frozenset[int]
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
    percent: dict[int, bool] = {}
    bad: dict[int, tuple[int, int, str]] = {}
    nothing = set(parts)
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
                if i in nothing and (not read.missing.all() or any(cell.strip(BLANKS) for cell in cells)):
                    nothing.remove(i)
                place = read.bad
                is_percent = "%" in read.marks
                if place is None and not read.missing.all() and percent.setdefault(i, is_percent) != is_percent:
                    place = int(read.missing.argmin())
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
        {i: {name: np.concatenate(v)[where] for name, v in found[i].items()} for i in tuple(found) if i not in bad},
        kept,
        blank,
        empty,
        tuple(sorted(bad.values())),
        frozenset(nothing),
        marks,
    )


def choose(lines: Lines, found: list[tuple[Reading, tuple[int, ...]]], *, settled: tuple[bool, bool]) -> Body:
    """The one reading that makes sense of the whole file.

    Args:
        lines: of the file.
        found: readings that make sense of its first rows, with the columns to read.
        settled: whether the delimiter and the decimal were named.

    Raises:
        InputError: where none does, where two give different numbers, and where the first row may be names or numbers.
    """
    bodies, errors = [], []
    for reading, columns in found:
        same = [body for body in bodies if body.reading[0] == reading[0] and body.reading[2:4] == reading[2:4]]
        if same and not same[0].bad and not frozenset().union(*same[0].marks.values()):
            continue  # whole numbers are the same under both decimals
        try:
            bodies.append(read_body(lines, reading, columns, stop=len(found) == 1))
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
    if best.reading.delimiter == NO_DELIMITER and not best.reading.header and not settled[0]:
        _check_one_column(lines, best, best.reading.decimal if settled[1] else "")
    if best.reading.header is None:
        line, shown = best.reading.head.lines[0], ", ".join(best.reading.head.cells[0, :4])
        raise InputError(
            f"{lines.path}, line {line}: {shown!r} may be names or data. Say which: --header yes or --header no."
        )
    return best


def _check_one_column(lines: Lines, body: Body, decimal: str) -> None:
    """Refuse numbers with a mark that may be a delimiter, even if it cuts rows into different numbers of cells."""
    for mark in sorted(frozenset().union(*body.marks.values()) & {",", " "} - {decimal}):
        for line, cells in rows(lines, mark):
            if len(cells) > 1:
                raise InputError(
                    f"{lines.path}, line {line}: {mark.join(cells)!r} may be {counted(len(cells), 'cell')} or one number. "
                    f"Say which: {option(mark)}, or {option(NO_DELIMITER, body.reading.decimal)}."
                )


def _refuse_cell(lines: Lines, body: Body) -> None:
    row, column, cell = body.bad[0]
    reading = body.reading
    where = place(lines, reading, row, column)
    start = reading.head.rows[skipped := (reading.header is not False) + reading.units]
    first = reading.head.cells[skipped, column].strip(BLANKS)
    wrong = "is not a finite number"
    other = "," if reading.decimal == "." else "."
    if row > start and dates.formats(first):
        wrong = "is not a date as those above it are"
    elif numbers(np.array([cell], object), reading.decimal).bad is None:
        wrong = "is a percentage, but not all" if "%" in cell else "is not a percentage, but other"
        wrong += " cells of this column are"
    elif numbers(np.array([cell], object), other).bad is None:
        wrong += f" where {reading.decimal!r} is the decimal mark, as in other cells"
    drop = " ".join(str(i + 1) for i in sorted({i for _, i, _ in body.bad}))
    out = "Leave the column out with"
    if " " in drop:
        out = f"Columns {drop.replace(' ', ', ')} have such cells: leave them out with"
    names = " If this line has names: --header yes." if row == 0 and reading.header is False else ""
    below = sum(1 for _ in rows(lines, reading.delimiter)) - 1 - row
    if row > start and below < _LAST:
        out = f"If this is no row of the table, remove it{' and those below' if below else ''}; or {out[0].lower()}{out[1:]}"
    raise InputError(
        f"{where}: {cell[:40]!r} {wrong}.{names} {out} --drop {drop}, or name those to keep with --columns."
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
        cut = body.reading.delimiter if one.reading.delimiter != other.reading.delimiter else None
        words.append((" and ".join(shown) + (" …" if len(body.values) > 4 else ""), option(cut, body.reading.decimal)))
    return (
        f"{lines.path}, line {line} may be {words[0][0]}, or {words[1][0]}. Say which: {words[0][1]}, or {words[1][1]}."
    )


def _is_even(lines: Lines, delimiter: str, width: int, total: int) -> bool:
    """Whether all rows have the usual number of cells: no last cell is empty, and the delimiters are as many as needed."""
    if width == 1 and delimiter == NO_DELIMITER:
        return True
    return delimiter not in (" ", NO_DELIMITER) and lines.raw.count(delimiter.encode()) == total * (width - 1)


def _kept_rows(lines: Lines, delimiter: str, width: int, start: int, total: int) -> tuple[np.ndarray, int, int]:
    """The rows that are some, and how many of the others are blank lines, and rows of empty cells at the end."""
    blank, last, count = [], start - 1, 0
    for row, (line, cells) in enumerate(rows(lines, delimiter)):
        count = row + 1
        if width > 1 and is_blank(cells):
            blank.append(row)
        elif len(cells) != width and not (width == 1 and not cells):
            raise InputError(ragged(lines, line, len(cells), width))
        elif any(cells) or width == 1:
            last = row
    if count != total:
        raise InputError(f"{lines.path}: its quotes can't be followed. Write each quote inside a cell twice.")
    within = [row for row in blank if start <= row <= last]
    kept = np.delete(np.arange(start, last + 1), np.array(within, int) - start)
    return kept, len(within), total - 1 - last - sum(row > last for row in blank)
