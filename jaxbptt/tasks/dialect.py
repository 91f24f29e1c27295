r"""How a table is written: its delimiter, decimal mark and header, found out by trying the few that there are.

A reading is a delimiter, a decimal mark and a header under which the first rows make sense: all have the same number of
cells, and a column has numbers. What the first rows leave open, the whole file has to settle.
"""

import itertools
import re
from collections import Counter
from typing import Literal, NamedTuple

import numpy as np

from jaxbptt.tasks import dates
from jaxbptt.tasks.cells import BLANKS, MISSING, looks_like_a_number, numbers
from jaxbptt.tasks.files import InputError
from jaxbptt.tasks.lines import NO_DELIMITER, Lines, frames, is_blank, ragged, rows

DELIMITERS = {",": ",", ";": ";", "tab": "\t", "|": "|", "space": " ", "none": NO_DELIMITER}
_HEAD = 1000
_SOME = 50
# mixed: numbers, and something else
Kind = Literal["number", "missing", "date", "text", "mixed"]


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
        if not head.problem
        for mark in ((".", ",") if decimal is None else (decimal,))
        if (reading := _read_head(lines, head, mark, header)) is not None
    ]
    if delimiter is None:
        found = [reading for reading in found if not _splits_names(reading, heads)]
        if any(reading.delimiter == "\t" for reading in found):
            found = [reading for reading in found if reading.delimiter != " "]
    found = [reading for reading in found if {"number", "mixed"} & {*reading.kinds}]
    if found:
        fewest = min(reading.texts for reading in found)
        found = [reading for reading in found if reading.texts == fewest]
        if fewest and len(found) > 1:
            found = [reading for reading in found if not _cut_too_little(reading)] or found
        return found
    raise InputError(_why_none(lines, heads))


def _head(lines: Lines, delimiter: str) -> Head:
    none = np.empty((0, 0), object)
    try:
        read = list(itertools.islice(rows(lines, delimiter), _HEAD))
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
        frame = next(frames(lines, delimiter, width))
    except InputError as error:
        return Head(delimiter, none, problem=str(error))
    read = read[: len(frame)]
    kept = [i for i, (_, cells) in enumerate(read) if width == 1 or not is_blank(cells)]
    return Head(delimiter, frame.to_numpy()[kept], tuple(kept), tuple(read[i][0] for i in kept), "", width, agree)


def _read_head(lines: Lines, head: Head, decimal: str, header: bool | None) -> Reading | None:
    """The header, the units and the kinds of the columns."""
    cells = head.cells
    if head.delimiter == "," == decimal and not any("," in cell for cell in cells.flat):
        return None  # the decimal commas would be quoted
    below = _kinds(cells[1:], decimal)
    further = _kinds(cells[2:], decimal)
    units = header is not False and len(cells) > 2 and _is_units(cells[1], below, further, decimal)
    named = header if header is not None else _is_header(cells, further if units else below, decimal)
    if named is False:
        names = _names_in_comment(lines.comment, head)
        return Reading(head.delimiter, decimal, False, False, names, _kinds(cells, decimal), head)
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


def _kinds(cells: np.ndarray, decimal: str) -> tuple[Kind, ...]:
    return tuple(_kind(column, decimal) for column in cells.T)


def _kind(column: np.ndarray, decimal: str) -> Kind:
    read = numbers(column, decimal)
    if read.bad is None:
        return "missing" if read.missing.all() else "number"
    found = dates.start(column)
    if found is not None and not isinstance(dates.read(found, column), int):
        return "date"
    one_by_one = (numbers(column[i : i + 1], decimal) for i in range(len(column[:_SOME])))
    return "mixed" if any(one.bad is None and not one.missing[0] for one in one_by_one) else "text"


def _is_units(row: np.ndarray, with_it: tuple[Kind, ...], below: tuple[Kind, ...], decimal: str) -> bool:
    """Whether the row below the names has no number where all further rows have one."""
    columns = [i for i, kind in enumerate(below) if kind == "number"]
    kinds = _kinds(row[None], decimal)
    return (
        any(with_it[i] == "mixed" for i in columns)
        and all(kinds[i] == "missing" or (kinds[i] == "text" and not looks_like_a_number(row[i])) for i in columns)
        and all(kind in ("missing", "text") for kind in kinds)
    )


def _is_header(cells: np.ndarray, below: tuple[Kind, ...], decimal: str) -> bool | None:
    """Whether the first row has names: texts above numbers or dates. `None` where it may be both."""
    first = cells[0]
    kinds = _kinds(first[None], decimal)
    texts = [i for i, kind in enumerate(kinds) if kind == "text" and not looks_like_a_number(first[i])]
    names = any(below[i] in ("number", "date", "mixed") for i in texts)
    data = any(kind in ("number", "date") for kind in kinds) or len(texts) < kinds.count("text")
    if not data:
        return True if names else None if texts and "number" in below else False
    if names:
        return None
    rest = cells[1:]
    labels = [cell.strip(BLANKS) for cell in first]
    if not labels[0] and len(labels) > 1 and _counts(labels[1:]) and _counts([c.strip(BLANKS) for c in rest[:, 0]]):
        return True  # columns and rows numbered by pandas
    if _counts(labels) and (len(labels) > 1 or _written_unlike(rest)):
        return None
    return None if len(labels) > 1 and _consecutive(labels) and _written_unlike(rest) else False


def _counts(labels: list[str]) -> bool:
    """Whether these are 0, 1, …, n-1."""
    return bool(labels) and labels == [str(i) for i in range(len(labels))]


def _consecutive(labels: list[str]) -> bool:
    """Whether these are whole numbers, each one more than the last, such as years."""
    if not all(re.fullmatch("[0-9]{1,9}", label) for label in labels):
        return False
    return [int(label) for label in labels] == [int(labels[0]) + i for i in range(len(labels))]


def _written_unlike(rest: np.ndarray) -> bool:
    """Whether no cell is a whole number without a decimal mark, but for those that are missing."""
    cells = [cell.strip(BLANKS) for cell in rest.flat]
    there = [cell for cell in cells if cell.casefold() not in MISSING]
    return bool(there) and not any(cell.lstrip("+-").isdigit() for cell in there)


def _splits_names(reading: Reading, heads: list[Head]) -> bool:
    """Whether a line is one cell here, but its names are as many as another delimiter makes cells."""
    if reading.delimiter != NO_DELIMITER or not reading.header:
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
    texts = [i for i, kind in enumerate(_kinds(cells[1:], ".")) if kind == "text"]
    if texts:
        cell = cells[1, texts[0]].strip()[:40]
        return f"{lines.path} has no column of numbers: line {head.lines[1]}, column {texts[0] + 1} is {cell!r}."
    return f"{lines.path} has no rows of numbers."
