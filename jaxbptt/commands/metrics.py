"""The file of metrics: one line for each update, as CSV or as JSON lines. The same run writes the same bytes."""

import csv
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from jaxbptt.files import write_whole
from jaxbptt.tasks import InputError

_CSV, _JSON = (".csv",), (".jsonl", ".ndjson", ".json")
COLUMNS = (
    "update",
    "loss",
    "bits_per_character",
    "gradient_norm",
    "fraction_clipped",
    "carry_norm",
    "validation_loss",
    "validation_bits_per_character",
)

Row = Mapping[str, float | int | None]


def check(path: Path) -> None:
    """Check that the file can hold metrics, without touching it.

    Raises:
        InputError: an unknown file ending, or a file that holds something else.
    """
    if path.suffix not in _CSV + _JSON:
        raise InputError(f"--metrics {path} ends in {path.suffix!r}: use .csv or .jsonl.")
    if not path.exists():
        return
    try:
        with path.open(encoding="utf-8") as file:
            first = file.readline()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--metrics {path} can't be read: {error}.") from None
    ours = (_header(True), _header(False)) if path.suffix in _CSV else ('{"update": ',)
    if first and not first.startswith(ours):
        raise InputError(f"--metrics {path} exists and does not hold metrics of jaxbptt: name another file.")


def begin(path: Path, update: int, *, text: bool) -> None:
    """Keep the lines up to an update and drop those after it; start a new file if there is none."""
    kept = [row for row in read(path) if row["update"] <= update] if update and path.exists() else []
    write_whole(path, (_header(text) if path.suffix in _CSV else "") + _lines(path, kept, text))


def append(path: Path, rows: Iterable[Row], *, text: bool) -> None:
    """Add lines at the end."""
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(_lines(path, rows, text))


def read(path: Path) -> list[dict[str, float]]:
    """The lines of the file, without empty cells. A last line that was cut short is dropped."""
    rows = []
    text = path.read_text(encoding="utf-8")
    text = text[: text.rfind("\n") + 1]
    if path.suffix in _CSV:
        for row in csv.DictReader(io.StringIO(text)):
            rows.append({key: float(cell) for key, cell in row.items() if cell})
    else:
        rows = [json.loads(line) for line in text.splitlines()]
    return [row | {"update": int(row["update"])} for row in rows]


def _columns(text: bool) -> tuple[str, ...]:
    """Bits per character are of texts only."""
    return COLUMNS if text else tuple(column for column in COLUMNS if "character" not in column)


def _header(text: bool) -> str:
    return ",".join(_columns(text)) + "\n"


def _lines(path: Path, rows: Iterable[Row], text: bool) -> str:
    columns = _columns(text)
    if path.suffix in _CSV:
        return "".join(",".join(_number(row.get(column)) for column in columns) + "\n" for row in rows)
    return "".join(
        "{" + ", ".join(f'"{key}": {_number(row.get(key))}' for key in columns if row.get(key) is not None) + "}\n"
        for row in rows
    )


def _number(value: float | int | None) -> str:
    # Nine significant digits give every float32 back.
    return "" if value is None else str(value) if isinstance(value, int) else f"{value:.9g}"
