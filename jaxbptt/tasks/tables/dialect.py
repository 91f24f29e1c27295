r"""How a table is written: its delimiter, decimal mark and header, found out by trying the few that there are.

A reading is a delimiter, a decimal mark and a header under which the first rows make sense: all have the same number of
cells, and a column has numbers. What the first rows leave open, the whole file has to settle.
"""

import itertools
from collections import Counter
from typing import NamedTuple

import numpy as np

from jaxbptt.tasks.files import InputError
from jaxbptt.tasks.tables.cells import looks_like_a_number
from jaxbptt.tasks.tables.headers import Kind, is_header, is_units, kinds_of
from jaxbptt.tasks.tables.lines import NO_DELIMITER, Lines, frames, is_blank, ragged, rows

DELIMITERS = {",": ",", ";": ";", "tab": "\t", "|": "|", "space": " ", "none": NO_DELIMITER}
# Rows and cells from which the few readings are found that the whole file is tried with.
_HEAD_ROWS, _HEAD_CELLS = 1000, 200_000


def delimiter_of(given: str) -> str:
    """The character that an option names.

    Raises:
        InputError: what can't be between cells.
    """
    found = DELIMITERS.get(given.replace("\\t", "tab"), given)
    plain = len(found) == 1 and found.isascii() and (found.isprintable() or found in DELIMITERS.values())
    if not plain or found.isalnum() or found in '".-+':
        raise InputError(f"--delimiter {given!r} is none: a character such as ',' or ';', or tab, space, none.")
    return found


def option(delimiter: str | None = None, decimal: str | None = None) -> str:
    """The options that name a delimiter and a decimal mark."""
    named = next((name for name, each in DELIMITERS.items() if each == delimiter), delimiter)
    shown = [f"--delimiter {named if named.isalpha() else repr(named)}"] if named else []
    return " ".join([*shown, *([f"--decimal {decimal!r}"] if decimal else [])])


class Head(NamedTuple):
    """The first rows, cut into cells at one delimiter.

    Attributes:
        delimiter: at which they are cut.
        cells: texts `[rows, columns]`, without blank lines.
        rows: the number of each row in the file, blank lines counted.
        lines: the line of each row.
        problem: what is wrong if the rows differ in their number of cells; `cells` is then empty.
        width: the usual number of cells.
        agree: how many of the rows have it, if it is at least two.
    """

    delimiter: str
    cells: np.ndarray
    rows: tuple[int, ...] = ()
    lines: tuple[int, ...] = ()
    problem: str = ""
    width: int = 1
    agree: int = 0


class Reading(NamedTuple):
    """One way to read a table.

    Attributes:
        delimiter: between cells.
        decimal: mark.
        header: whether the first row has the names, or `None` where that can't be known.
        units: whether a row of units follows.
        names: that the file gives the columns, in the header or in a comment above; empty if it gives none.
        kinds: what each column holds below.
        head: the rows that it was found from.
    """

    delimiter: str
    decimal: str
    header: bool | None
    units: bool
    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    head: Head

    def named(self, column: int) -> str:
        """The name that the file gives a column, or nothing."""
        return self.names[column] if self.names else ""

    @property
    def texts(self) -> int:
        """How many columns are neither numbers nor dates."""
        return self.kinds.count("text") + self.kinds.count("mixed")


def readings(lines: Lines, delimiter: str | None, decimal: str | None, header: bool | None) -> list[Reading]:
    """The readings that make sense of the first rows, with the fewest columns of text; at least one.

    Raises:
        InputError: if there is none, with what is wrong with the likeliest.
    """
    delimiter = delimiter if delimiter is not None else lines.delimiter
    heads = [_head(lines, each) for each in (DELIMITERS.values() if delimiter is None else (delimiter,))]
    if delimiter is None:  # where nothing is cut, all delimiters read the same
        heads = [head for head in heads if head.problem or head.cells.shape[1] > 1 or head.delimiter == NO_DELIMITER]
    found = [
        reading
        for head in heads
        if len(head.cells)
        for mark in ((".", ",") if decimal is None else (decimal,))
        if (reading := _read_head(lines, head, mark, header)) is not None
    ]
    if delimiter is None:
        found = [reading for reading in found if not _splits_names(reading, heads)]
        if any(reading.names and not reading.header for reading in found):  # a comment above has names
            found = [reading for reading in found if reading.names]
        if any(reading.delimiter == "\t" for reading in found):
            found = [reading for reading in found if reading.delimiter != " "]
    found = [reading for reading in found if {"number", "mixed"} & {*reading.kinds}]
    if found:
        fewest = min(reading.texts for reading in found)
        found = [reading for reading in found if reading.texts == fewest]
        broken = max(heads, key=lambda head: head.agree)
        if fewest and broken.problem and broken.agree and all(reading.delimiter == NO_DELIMITER for reading in found):
            raise InputError(broken.problem)
        if fewest and len(found) > 1:
            found = [reading for reading in found if not _cut_too_little(reading)] or found
        return found
    raise InputError(_why_none(lines, heads))


def _head(lines: Lines, delimiter: str) -> Head:
    none = np.empty((0, 0), object)
    try:
        read, total = [], 0
        for row in itertools.islice(rows(lines, delimiter), _HEAD_ROWS):
            read.append(row)
            total += len(row[1])
            if total > _HEAD_CELLS:
                break
    except InputError as error:
        return Head(delimiter, none, problem=str(error))
    counts = Counter(len(cells) for _, cells in read if not is_blank(cells))
    width, usual = max(counts.items(), key=lambda item: (item[1], item[0]), default=(1, 0))
    agree = usual if width > 1 else 0
    for line, cells in read:
        if len(cells) != width and not is_blank(cells):
            table_from = next(line for line, cells in read if len(cells) == width)
            return Head(delimiter, none, (), (), ragged(lines, line, len(cells), width, table_from), width, agree)
    try:
        frame = next(frames(lines, delimiter, width, len(read)))
    except InputError as error:
        return Head(delimiter, none, (), (), str(error), width, agree)
    read = read[: len(frame)]
    kept = [i for i, (_, cells) in enumerate(read) if width == 1 or not is_blank(cells)]
    return Head(delimiter, frame.to_numpy()[kept], tuple(kept), tuple(read[i][0] for i in kept), "", width, agree)


def _read_head(lines: Lines, head: Head, decimal: str, header: bool | None) -> Reading | None:
    """The header, the units and the kinds of the columns."""
    cells = head.cells
    if head.delimiter == "," == decimal and not any("," in cell for cell in cells.flat):
        return None  # the decimal commas would be quoted
    below = kinds_of(cells[1:], decimal)
    further = kinds_of(cells[2:], decimal)
    units = header is not False and len(cells) > 2 and is_units(cells[1], below, further, decimal)
    named = header if header is not None else is_header(cells, further if units else below, decimal)
    if named is False:
        names = _names_in_comment(lines.comment, head)
        return Reading(head.delimiter, decimal, False, False, names, kinds_of(cells, decimal), head)
    names = tuple(" ".join(cell.split()) for cell in cells[0])
    return Reading(head.delimiter, decimal, named, units, names, further if units else below, head)


def _names_in_comment(comment: str, head: Head) -> tuple[str, ...]:
    """The names that numpy.savetxt writes above a table, with a `#`."""
    split = comment.split() if head.delimiter == " " else comment.split(head.delimiter)
    names = tuple(" ".join(name.split()) for name in split)
    fits = head.width > 1 and len(names) == head.width and all(names)
    return names if fits and not any(looks_like_a_number(name) for name in names) else ()


def likeliest(lines: Lines, delimiter: str | None) -> tuple[str, int]:
    """The delimiter that most of the first rows agree on, and their number of cells."""
    heads = [_head(lines, each) for each in (DELIMITERS.values() if delimiter is None else (delimiter,))]
    best = max(heads, key=lambda head: head.agree)
    return best.delimiter, best.width


def _splits_names(reading: Reading, heads: list[Head]) -> bool:
    """Whether a line is one cell here, but its names are as many as another delimiter makes cells."""
    if reading.delimiter != NO_DELIMITER or reading.header is False:
        return False
    name = reading.head.cells[0, 0]
    return any(head.agree and head.delimiter != " " and head.delimiter in name for head in heads)


def _cut_too_little(reading: Reading) -> bool:
    """Whether all cells of a text column have another delimiter inside."""
    columns = [reading.head.cells[1:, i] for i, kind in enumerate(reading.kinds) if kind in ("text", "mixed")]
    others = [each for each in ",;\t|" if each != reading.delimiter]
    return any(all(other in cell for cell in column) for column in columns for other in others)


def _why_none(lines: Lines, heads: list[Head]) -> str:
    head = max(heads, key=lambda head: head.agree)
    if head.problem:
        return head.problem
    cells = head.cells
    texts = [i for i, kind in enumerate(kinds_of(cells[1:], ".")) if kind == "text"]
    if texts:
        cell = cells[1, texts[0]].strip()[:40]
        return f"{lines.path} has no column of numbers: line {head.lines[1]}, column {texts[0] + 1} is {cell!r}."
    return f"{lines.path} has no rows of numbers."
