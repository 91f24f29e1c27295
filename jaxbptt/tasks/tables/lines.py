r"""The text of a file with a table: decoded, its rows and cells by pandas, and the line that each row stands in."""

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxbptt.tasks.files import InputError, read_bytes
from jaxbptt.words import counted

# Stands for a delimiter where a line is one cell; pandas and csv want a character, and this one is in no table.
NO_DELIMITER = "\x1f"
_CELLS = 2**18
_LINE = re.compile(rb"[^\r\n]*(?:\r\n|\n|\r|\Z)")
_UTF16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


class Lines(NamedTuple):
    """The lines of a table.

    Attributes:
        path: of the file.
        raw: UTF-8, from the table's first line to its last, without a byte order mark.
        first: the number that an editor shows for the first line.
        comment: the last line above the table that begins with `#`, without it.
        delimiter: named by a first line `sep=;`, which spreadsheets write and don't show.
        read_as: lines for the user.
        ragged: how many rows of another length were made blank lines.
    """

    path: str | Path
    raw: bytes
    first: int
    comment: str
    delimiter: str | None
    read_as: tuple[str, ...]
    ragged: int = 0


def load(path: str | Path, encoding: str, skip: int) -> Lines:
    """The lines of a table, without those above and below it: skipped ones, comments, blank ones."""
    raw = read_bytes(path)
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            raise InputError(f"{path} is not a readable gzip file: {error}.") from None
    if raw[:4] == b"PK\x03\x04":
        raise InputError(f"{path} is a spreadsheet or a zip archive, not text: save the table as CSV.")
    raw = _as_utf8(path, raw, encoding)
    start = line = 0
    delimiter, comments, read_as = None, [], []
    while start < len(raw):
        found = _LINE.match(raw, start)
        assert found is not None
        text = found[0].strip().removeprefix(codecs.BOM_UTF8)
        named = re.fullmatch(rb'"?sep=(.)"?', text)
        if line < skip:
            pass
        elif named and not comments and delimiter is None:
            delimiter = named[1].decode()
            read_as.append(f"line {line + 1} names the delimiter and is no row")
        elif text.startswith(b"#"):
            comments.append(text.decode())
        elif text:
            break
        start, line = found.end(), line + 1
    if comments:
        read_as.append(f"{counted(len(comments), 'line')} above the table, with #, left out")
    if skip:
        read_as.insert(0, f"the first {counted(skip, 'line is', 'lines are')} skipped")
    end = len(raw)
    while end > start and raw[end - 1] in b"\r\n ":
        end -= 1
    if start or end < len(raw):
        raw = raw[start:end].removeprefix(codecs.BOM_UTF8)
    if not raw:
        raise InputError(f"{path} has no rows of numbers." if line else f"{path} is empty.")
    return Lines(path, raw, line + 1, comments[-1].lstrip("#").strip() if comments else "", delimiter, tuple(read_as))


def rows(lines: Lines, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Number of the first line and cells of each row: to count cells, and to say where something is."""
    text = io.TextIOWrapper(io.BytesIO(lines.raw), "utf-8", newline="")
    source = map(_single, text) if delimiter == " " else text
    reader = csv.reader(source, delimiter=delimiter, skipinitialspace=True)
    line = lines.first
    try:
        for cells in reader:
            yield line, cells
            line = lines.first + reader.line_num
    except csv.Error:
        raise InputError(f'{lines.path}, line {line}: a quote (") is opened and not closed.') from None


def line_of(lines: Lines, delimiter: str, row: int) -> int:
    """The number that an editor shows for the first line of a row."""
    for number, (line, _) in enumerate(rows(lines, delimiter)):
        if number == row:
            return line
    return lines.first


def frames(lines: Lines, delimiter: str, width: int, count: int | None = None) -> Iterator[Any]:
    """Consecutive rows as pandas frames of texts: nothing guessed, nothing converted; blank lines are empty cells."""
    import pandas

    try:
        with pandas.read_csv(
            io.BytesIO(lines.raw),
            sep=r"\s+" if delimiter == " " else delimiter,
            header=None,
            names=list(range(width)),
            index_col=False,
            dtype=object,
            na_filter=False,
            skip_blank_lines=False,
            skipinitialspace=True,
            engine="c",
            encoding="utf-8",
            chunksize=max(_CELLS // width, 100),
            nrows=count,
        ) as reader:
            yield from reader
    except pandas.errors.ParserError as error:
        line, cells = 0, []
        for line, cells in rows(lines, delimiter):
            if len(cells) > width:
                raise InputError(ragged(lines, line, len(cells), width)) from None
        if "EOF inside string" in str(error):
            raise InputError(f'{lines.path}, line {line}: a quote (") is opened and not closed.') from None
        raise InputError(f"{lines.path} can't be read: {str(error).strip()}.") from None


def ragged(lines: Lines, line: int, cells: int, width: int, table_from: int | None = None) -> str:
    """What is wrong with a row of another length; `table_from`: the line where rows of the usual length begin."""
    words = f"{lines.path}, line {line}: {counted(cells, 'cell')}, but {counted(width, 'column')}. "
    if table_from is not None and table_from > line:
        words += f"If the table begins in line {table_from}: --skip {table_from - 1}. "
        return words + "If not, give every row the same number."
    return words + "Give every row the same number, or leave such rows out with --ragged drop."


def without_ragged(lines: Lines, delimiter: str, width: int) -> Lines:
    """The rows of another length than usual made blank lines, so that all others stay where they are."""
    if width == 1:
        return lines
    each = lines.raw.splitlines(keepends=True)
    starts = [(line, len(cells) not in (width, 0) and not is_blank(cells)) for line, cells in rows(lines, delimiter)]
    ends = [line for line, _ in starts[1:]] + [lines.first + len(each)]
    dropped = []
    for (line, wrong), end in zip(starts, ends, strict=True):
        if wrong:
            dropped.append(line)
            for i in range(line - lines.first, end - lines.first):
                each[i] = b"\n"
    if not dropped:
        return lines
    where = ", ".join(map(str, dropped[:5])) + (" …" if len(dropped) > 5 else "")
    words = f"{counted(len(dropped), 'row')} not of {counted(width, 'cell')} left out: line {where}"
    return lines._replace(raw=b"".join(each), read_as=(*lines.read_as, words), ragged=len(dropped))


def is_blank(cells: list[str]) -> bool:
    """Whether a line shows nothing."""
    return not cells or (len(cells) == 1 and not cells[0].strip())


def _single(line: str) -> str:
    """Runs of spaces as a single one, none at the ends, as pandas reads them."""
    text = re.sub(r"[ \t]+", " ", line.rstrip("\r\n")).strip(" ")
    return text + "\n"


def _as_utf8(path: str | Path, raw: bytes, encoding: str) -> bytes:
    name = encoding
    try:
        name = codecs.lookup(encoding).name
        text = raw.decode(name)
    except LookupError:
        raise InputError(
            f"--encoding {encoding} is unknown: utf-8, latin-1, cp1252 and utf-16 are usual ones."
        ) from None
    except UnicodeDecodeError as error:
        first, line = error.start, raw.count(b"\n", 0, error.start) + 1
        if name != "utf-8":
            raise InputError(f"{path} is not {encoding} text: {error.reason} at byte {first}.") from None
        other = "utf-16" if raw[:2] in _UTF16 else "latin-1"
        raise InputError(
            f"{path} is not UTF-8 text: byte {first} (line {line}) is 0x{raw[first]:02x}. Save it as UTF-8, or name its "
            f"encoding, such as --encoding {other}."
        ) from None
    raw = (raw if name == "utf-8" else text.encode()).removeprefix(codecs.BOM_UTF8)
    if b"\0" in raw:
        raise InputError(f"{path} has bytes 0, which no table has. If it is UTF-16 text: --encoding utf-16-le.")
    return raw
