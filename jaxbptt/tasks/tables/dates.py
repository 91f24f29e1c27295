r"""Columns of dates and times: recognised only where every cell is one, and claimed only where it can be known."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxbptt.tasks.files import InputError
from jaxbptt.tasks.tables.cells import BLANKS, MISSING
from jaxbptt.words import counted

_CLOCKS = {
    r"\d{1,2}:\d{2}": "%H:%M",
    r"\d{1,2}:\d{2}:\d{2}": "%H:%M:%S",
    r"\d{1,2}:\d{2}:\d{2}\.\d+": "%H:%M:%S.%f",
    r"\d{1,2}:\d{2}[AaPp][Mm]": "%I:%M%p",
    r"\d{1,2}:\d{2} [AaPp][Mm]": "%I:%M %p",
    r"\d{1,2}:\d{2}:\d{2}[AaPp][Mm]": "%I:%M:%S%p",
    r"\d{1,2}:\d{2}:\d{2} [AaPp][Mm]": "%I:%M:%S %p",
    r"\d{1,2}\.\d{2}\.\d{2}": "%H.%M.%S",
}
# What a date's shape leaves open: the order of day, month and year, and whether May is short for itself.
_DAYS = (
    (r"(\d{1,2})([/.\-])\d{1,2}\2\d{4}", ("%d{0}%m{0}%Y", "%m{0}%d{0}%Y")),
    (r"(\d{1,2})([/.\-])\d{1,2}\2\d{2}", ("%d{0}%m{0}%y", "%m{0}%d{0}%y", "%y{0}%m{0}%d")),
    (r"(\d{4})([/.\-])\d{1,2}\2\d{1,2}", ("%Y{0}%m{0}%d",)),
    (r"(\d{4})(-)\d{2}", ("%Y{0}%m",)),
    (r"(\d{1,2})([ \-])[A-Za-z]{3}\2\d{4}", ("%d{0}%b{0}%Y", "%d{0}%B{0}%Y")),
    (r"(\d{1,2})([ \-])[A-Za-z]{3}\2\d{2}", ("%d{0}%b{0}%y",)),
    (r"(\d{1,2})( )[A-Za-z]{4,}\2\d{4}", ("%d{0}%B{0}%Y",)),
    (r"([A-Za-z]{3})( )\d{1,2}, \d{4}", ("%b %d, %Y", "%B %d, %Y")),
    (r"([A-Za-z]{4,})( )\d{1,2}, \d{4}", ("%B %d, %Y",)),
    (r"([A-Za-z]{3})([ \-])\d{4}", ("%b{0}%Y", "%B{0}%Y")),
    (r"([A-Za-z]{4,})( )\d{4}", ("%B{0}%Y",)),
)
_ISO = re.compile(r"\d{4}-\d{2}-\d{2}(?:[T ]\d{2}:\d{2}(?::\d{2}(?:[.,]\d+)?)?)?( ?(?:Z|UTC|[+\-]\d{2}:?\d{2}))?")
Order = Literal["day-first", "month-first", "year-first"]
_ORDERS = {"%d": "day-first", "%m": "month-first", "%y": "year-first"}
ISO, ISO_WITH_ZONE = "ISO8601", "ISO8601 with a zone"
# With the zone behind it: fits cells that all have that one.
_ISO_IN = "ISO8601 in "
# What the cells of a column are under each format that fits them all.
Dates = dict[str, list[np.ndarray]]


def start(cells: np.ndarray) -> Dates | None:
    """The formats that the first cell may have."""
    first = next((text for text in (cell.strip(BLANKS) for cell in cells) if text.casefold() not in MISSING), "")
    found = formats(first)
    return {name: [] for name in found} if found else None


def read(dates: Dates, cells: np.ndarray) -> Dates | int:
    """Further cells, under the formats that fit them, NaT where one is missing; or the place of one that none fits."""
    texts = [cell.strip(BLANKS) for cell in cells]
    missing = np.array([text.casefold() in MISSING for text in texts], bool)
    kept, first_bad = {}, 0
    for name, parts in dates.items():
        values = _parse(texts, name)
        bad = np.flatnonzero(np.isnat(values) & ~missing)
        if len(bad):
            first_bad = max(first_bad, int(bad[0]))
        else:
            kept[name] = [*parts, values]
    return kept or first_bad


def formats(cell: str) -> tuple[str, ...]:
    """The formats of a date, a time, or both, that a cell has the shape of."""
    iso = _ISO.fullmatch(cell)
    if iso:
        return (_ISO_IN + iso[1], ISO_WITH_ZONE) if iso[1] else (ISO,)
    days = _day_formats(cell)
    for clock, clock_format in _CLOCKS.items():
        if re.fullmatch(clock, cell):
            return (*days, clock_format)
        split = re.fullmatch(rf"(.*?)([ T]|, ){clock}", cell)
        if split:
            return tuple(day + split[2] + clock_format for day in _day_formats(split[1]))
    return days


def times_of_rows(
    columns: dict[int, dict[str, np.ndarray]], names: Sequence[str], order: Order | None, path: str | Path
) -> tuple[np.ndarray | None, list[str], str]:
    """The times that the first column of dates gives, if they can be known, and a line about each column.

    With one zone in all cells they are as written, with several they are in UTC, which the last item returned says.

    Args:
        columns: of dates and times of day: what they are under each format that fits.
        names: of all columns.
        order: of day, month and year, where a date leaves it open.
        path: of the file.

    Raises:
        InputError: an order that doesn't fit.
    """
    notes, times, clocks = [], None, {}
    dated = first = None
    for i, found in columns.items():
        found = _in_order(found, order, names[i], path)
        if len(found) > 1:
            found = {name: values for name, values in found.items() if name != ISO_WITH_ZONE}
        values = next(iter(found.values()))
        if all(name.startswith(("%H", "%I")) for name in found):
            clocks[i] = values
        elif dated is not None:
            notes.append(f"{names[i]}: more dates, left out")
        elif any(not np.array_equal(values, other, equal_nan=True) for other in found.values()):
            dated = i
            known = all((other[1:] >= other[:-1]).all() for other in found.values())
            unknown = "" if known else ", nor whether the rows are in order"
            options = "--dates " + _order_of(found)
            notes.append(
                f"{names[i]}: dates, left out; which is the day and which the month can't be known{unknown}: {options}"
            )
        elif np.isnat(values).any():
            dated = i
            notes.append(
                f"{names[i]}: dates, left out, since {counted(int(np.isnat(values).sum()), 'is', 'are')} missing"
            )
        else:
            dated, first, times = i, next(iter(found)), values
    for i, clock in clocks.items():
        whole_days = times is not None and (times == times.astype("datetime64[D]")).all()
        if whole_days and times is not None and not np.isnat(clock).any():
            times = times + (clock - np.datetime64("1900-01-01"))
            notes.append(f"{names[i]}: times of day, added to the dates")
        else:
            notes.append(f"{names[i]}: times of day, left out")
    if times is not None and first is not None and dated is not None:
        unit = "D" if (times == times.astype("datetime64[D]")).all() else "s"
        span = " to ".join(np.datetime_as_string([times.min(), times.max()], unit=unit))
        zone = " in UTC" if first == ISO_WITH_ZONE else ""
        if first.startswith(_ISO_IN):
            zone = f" in the zone {first.removeprefix(_ISO_IN).strip()}"
        century = "; years of two digits lie between 1969 and 2068" if "%y" in first else ""
        notes.insert(0, f"{names[dated]}: the times of the rows, {span}{zone}, not an input{century}")
    return times, notes, "UTC" if times is not None and first == ISO_WITH_ZONE else ""


def _in_order(found: dict[str, np.ndarray], order: Order | None, name: str, path: str | Path) -> dict[str, np.ndarray]:
    """The formats that have the order, if that is open."""
    kept = {each: values for each, values in found.items() if _ORDERS.get(each[:2]) == order}
    if order is None or not any(each[:2] in _ORDERS and each[3:5] in _ORDERS for each in found):
        return found
    if not kept:
        raise InputError(
            f"--dates {order} does not fit {path}, column {name}: its dates can only be {_order_of(found)}."
        )
    return kept


def _order_of(found: dict[str, np.ndarray]) -> str:
    return " or ".join(sorted({_ORDERS[each[:2]] for each in found if each[:2] in _ORDERS}))


def _day_formats(text: str) -> tuple[str, ...]:
    for shape, found in _DAYS:
        match = re.fullmatch(shape, text)
        if match:
            return tuple(name.format(match[2]) for name in found)
    return ()


def _parse(texts: list[str], name: str) -> np.ndarray:
    import pandas

    # pandas takes two words for the time at which it reads them.
    series: Any = pandas.Series(["" if text.casefold() in ("now", "today") else text for text in texts], dtype=object)
    if name.startswith(_ISO_IN):
        zone = name.removeprefix(_ISO_IN)
        local = [text.removesuffix(zone) if text.endswith(zone) else "" for text in series]
        times = pandas.to_datetime(pandas.Series(local, dtype=object), format=ISO, errors="coerce")
    elif name == ISO_WITH_ZONE:
        # pandas would take a cell without a zone to be in UTC.
        series = series.where([(match := _ISO.fullmatch(text)) is not None and bool(match[1]) for text in texts], "")
        times = pandas.to_datetime(series, format="ISO8601", errors="coerce", utc=True).dt.tz_localize(None)
    else:
        times = pandas.to_datetime(series, format=name, errors="coerce")
    if times.dtype.kind != "M":  # cells with a zone among others without
        return np.full(len(texts), "NaT", "datetime64[us]")
    return times.to_numpy().astype("datetime64[us]")
