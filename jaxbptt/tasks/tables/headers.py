r"""What the first rows of a table are: names of the columns, their units, or numbers; and what each column holds."""

import re
from typing import Literal

import numpy as np

from jaxbptt.tasks.tables import dates
from jaxbptt.tasks.tables.cells import BLANKS, MISSING, looks_like_a_number, numbers

# mixed: numbers, and something else
Kind = Literal["number", "missing", "date", "text", "mixed"]
_SOME = 50


def kinds_of(cells: np.ndarray, decimal: str) -> tuple[Kind, ...]:
    """What each column holds."""
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


def is_units(row: np.ndarray, with_it: tuple[Kind, ...], below: tuple[Kind, ...], decimal: str) -> bool:
    """Whether the row below the names has no number where all further rows have one."""
    columns = [i for i, kind in enumerate(below) if kind == "number"]
    kinds = kinds_of(row[None], decimal)
    return (
        any(with_it[i] == "mixed" for i in columns)
        and all(kinds[i] == "missing" or (kinds[i] == "text" and _may_be_a_unit(row[i])) for i in columns)
        and all(kind in ("missing", "text") for kind in kinds)
    )


def _may_be_a_unit(cell: str) -> bool:
    """Whether this is `m/s` or `1/s`, and not a number written badly."""
    text = cell.strip(BLANKS)
    return text.startswith(("1/", "10^")) or not (looks_like_a_number(text) or text[:1].isdigit())


def is_header(cells: np.ndarray, below: tuple[Kind, ...], decimal: str) -> bool | None:
    """Whether the first row has names: texts above numbers or dates. `None` where it may be both."""
    first = cells[0]
    kinds = kinds_of(first[None], decimal)
    texts = [i for i, kind in enumerate(kinds) if kind == "text" and not looks_like_a_number(first[i])]
    names = any(below[i] in ("number", "date", "mixed") for i in texts)
    data = any(kind in ("number", "date") for kind in kinds) or len(texts) < kinds.count("text")
    if not data:
        # A name may begin with a digit; where all do, they may be numbers with something else in the cell.
        surely = names and not all(first[i].strip(BLANKS)[0].isdigit() for i in texts)
        return True if surely else None if texts and (names or "number" in below) else False
    if names:
        return None
    rest = cells[1:]
    if not len(rest):
        return False
    labels = [cell.strip(BLANKS) for cell in first]
    if not labels[0] and len(labels) > 1 and _counts(labels[1:]) and _counts([c.strip(BLANKS) for c in rest[:, 0]]):
        return True  # columns and rows numbered by pandas
    if _counts(labels) and (len(labels) > 1 or _written_unlike(rest)):
        return None
    return None if len(labels) > 1 and _whole_above_decimals(labels, rest, decimal) else False


def _counts(labels: list[str]) -> bool:
    """Whether these are 0, 1, …, n-1."""
    return bool(labels) and labels == [str(i) for i in range(len(labels))]


def _whole_above_decimals(labels: list[str], rest: np.ndarray, decimal: str) -> bool:
    """Whether these are different whole numbers over columns with decimals, or, such as years, each one more than the last."""
    if not all(re.fullmatch("[0-9]{1,9}", label) for label in labels) or len(set(labels)) < len(labels):
        return False
    years = [int(label) for label in labels] == [int(labels[0]) + i for i in range(len(labels))]
    decimals = [any(decimal in cell for cell in column) for column in rest.T]
    return all(decimals) or (years and (any(decimals) or _written_unlike(rest)))


def _written_unlike(rest: np.ndarray) -> bool:
    """Whether no cell is a whole number without a decimal mark, but for those that are missing."""
    cells = [cell.strip(BLANKS) for cell in rest.flat]
    there = [cell for cell in cells if cell.casefold() not in MISSING]
    return bool(there) and not any(cell.lstrip("+-").isdigit() for cell in there)
