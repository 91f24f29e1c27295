r"""Numbers as people write them: strict, so that what is not surely a number is none."""

import re
import unicodedata
from typing import NamedTuple

import numpy as np

MISSING = frozenset(
    ("", "na", "n/a", "#n/a", "n.a.", "nan", "-nan", "<na>", "nat", "null", "none", "?", "-", "--", ".", "..")
)
# What surrounds a number without being part of it: blanks that people see as such, not line ends.
BLANKS = " \t\u00a0\u202f\u2009"
_PLAIN = b"0123456789+-eE\n"
_GROUPS = {".": ",", ",": "."}
# Blanks and the Swiss apostrophe separate thousands whatever the decimal is.
_OTHER_GROUPS = " \u00a0\u202f\u2009'\u2019"
_MINUS = "\u2212"
_LIKE_A_NUMBER = re.compile(
    r"[\s\d.,'\u2019_%+\-\u2212eE()/:]*\d[\s\d.,'\u2019_%+\-\u2212eE()/:]*|[+-]?inf(inity)?", re.I
)


class Numbers(NamedTuple):
    """Cells read as numbers.

    Attributes:
        values: nan where a cell is missing or bad.
        missing: where a cell is missing.
        bad: place of the first cell that is no finite number, after which nothing is read; or `None`.
        marks: the characters in the cells beyond digits, signs and `e`; with `%`, all are percentages.
    """

    values: np.ndarray
    missing: np.ndarray
    bad: int | None
    marks: frozenset[str]


def numbers(cells: np.ndarray, decimal: str) -> Numbers:
    r"""Texts as numbers.

    A number is digits with at most one decimal mark and an exponent, or digits with thousands separators in groups of
    strictly three, with a sign and at most one currency sign at one end. All else is bad, `1_0` and `inf` too. Where all are
    percentages, `5%` is 0.05.

    Args:
        cells: texts, an array of objects.
        decimal: `"."` or `","`; the other one separates thousands.
    """
    converted = _convert(cells, decimal)
    if converted is not None:
        return Numbers(converted[0], np.zeros(len(cells), bool), None, converted[1])
    texts = np.array([cell.strip(BLANKS) for cell in cells], object)
    missing = np.array([text.casefold() in MISSING for text in texts], bool)
    there, bad = np.flatnonzero(~missing), None
    if len(there) and all(text.endswith("%") and text.count("%") == 1 for text in texts[there]):
        bare = np.array([text.removesuffix("%").rstrip(BLANKS) for text in texts], object)
        read = numbers(bare, decimal)
        if np.array_equal(read.missing, missing):
            return Numbers(read.values / 100, missing, read.bad, read.marks | {"%"})
    converted = _convert(texts[there], decimal)
    if converted is None:
        good, size = 0, len(there)
        while size - good > 1:  # the first bad one is in [good, size)
            middle = (good + size) // 2
            good, size = (good, middle) if _convert(texts[there[good:middle]], decimal) is None else (middle, size)
        there, bad = there[:good], int(there[good])
        converted = _convert(texts[there], decimal)
        assert converted is not None
    values = np.full(len(cells), np.nan)
    values[there] = converted[0]
    return Numbers(values, missing, bad, converted[1])


def looks_like_a_number(cell: str) -> bool:
    """Whether a cell is meant as a number, such as `1_0`, `5%` or `inf`: it is hardly a name."""
    text = "".join(c for c in cell.strip(BLANKS) if unicodedata.category(c) != "Sc")
    return _LIKE_A_NUMBER.fullmatch(text) is not None


def _convert(cells: np.ndarray, decimal: str) -> tuple[np.ndarray, frozenset[str]] | None:
    """All cells at once, or nothing if one of them is no number."""
    if not len(cells):
        return np.zeros(0), frozenset()
    text = "\n".join(cells)
    if text.count("\n") != len(cells) - 1:
        return None
    marks = frozenset(text.encode().translate(None, _PLAIN).decode())
    if marks and (decimal != "." or marks != {"."}):
        if not _pattern(decimal, "".join(sorted(marks))).fullmatch(text):
            return None
        text = text.translate({ord(mark): None for mark in marks} | {ord(decimal): ".", ord(_MINUS): "-"})
    # Of digits, signs, `.` and `e`, Python's float takes nothing that is not written as a number.
    try:
        values = np.array(list(map(float, text.split("\n"))))
    except ValueError:
        return None
    return (values, marks) if np.isfinite(values).all() else None


def _pattern(decimal: str, marks: str) -> re.Pattern[str]:
    """Lines that are all numbers."""
    groups = [re.escape(mark) for mark in _GROUPS[decimal] + _OTHER_GROUPS if mark in marks]
    point = re.escape(decimal)
    # A comma at the end of a cell is punctuation, but `1.` is what Fortran and numpy write.
    body = rf"(?:[0-9]+(?:{point}[0-9]{'*' if decimal == '.' else '+'})?|{point}[0-9]+)(?:[eE][+-]?[0-9]+)?"
    grouped = "|".join(f"(?:{mark}[0-9]{{3}})+" for mark in groups)
    if grouped:
        body = rf"(?:[1-9][0-9]{{0,2}}(?:{grouped})(?:{point}[0-9]+)?|{body})"
    sign = f"[+\\-{_MINUS}]?"
    currency = "".join(re.escape(mark) for mark in marks if unicodedata.category(mark) == "Sc")
    cell = sign + body
    if currency:
        unit, blank = f"[{currency}]", f"[{BLANKS}]?"
        cell = f"(?:{sign}{unit}{blank}{body}|{unit}{blank}{sign}{body}|{sign}{body}{blank}{unit}|{sign}{body})"
    return re.compile(rf"(?:{cell}\n)*+{cell}")
