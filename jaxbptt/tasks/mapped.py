r"""Sequences larger than memory: read from the file as they are needed, through a memory map.

A text is its bytes, so that nothing needs to be decoded before it is used; a file is counted and measured in blocks.
"""

import codecs
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxbptt.html_table import fields_table
from jaxbptt.tasks.files import InputError, check_numbers
from jaxbptt.tasks.vocabulary import LATER_BYTES, Vocabulary

# Large enough that numpy's overhead doesn't count, small enough for any machine.
BLOCK_BYTES = 2**22


class MappedText(NamedTuple):
    """A text file as numbers of the bytes that occur in it.

    Attributes:
        name: of the file.
        values: its bytes without a byte order mark, a memory map `[time]` of uint8.
        symbols: the bytes that occur, in order; a symbol's number is its place here.
        characters: how many UTF-8 characters there are; of a text that is not UTF-8, its bytes.
        utf8: whether it is UTF-8, but for a character that is cut off at either end.
    """

    name: str
    values: np.ndarray
    symbols: tuple[int, ...]
    characters: int
    utf8: bool = True

    _repr_html_ = fields_table

    @property
    def features(self) -> int:
        """Size of the network's input and output."""
        return len(self.symbols)

    @property
    def bytes_per_character(self) -> float:
        """What bits per byte are multiplied with to get bits per character."""
        return len(self.values) / self.characters

    def encode(self, raw: np.ndarray) -> np.ndarray:
        """Symbol numbers, int32, of bytes that occur in the file."""
        table = np.zeros(256, np.int32)
        table[list(self.symbols)] = np.arange(len(self.symbols))
        return table[np.asarray(raw)]

    def decode(self, numbers: np.ndarray) -> str:
        r"""The text of symbol numbers; bytes that are not valid UTF-8 become `"\ufffd"`.

        A character that is cut off at either end is left out.
        """
        return Vocabulary(self.symbols).decode(numbers)


class MappedArray(NamedTuple):
    """Numbers over time, in a file.

    Attributes:
        name: of the file.
        values: a memory map `[time]` or `[time, features]`.
    """

    name: str
    values: np.ndarray

    _repr_html_ = fields_table

    @property
    def features(self) -> int:
        """Size of the network's input and output."""
        return math.prod(self.values.shape[1:])


def map_text(path: str | Path) -> MappedText:
    r"""The bytes of a text file of any size, as symbols to predict; in UTF-8 or any other encoding.

    bits per character = bits per byte · bytes / characters

    One pass over the file in blocks of 4 MiB, or two where it is not ASCII, finds the bytes that occur and counts the
    characters: all bytes but the second and further ones of a UTF-8 character, which are 10xxxxxx in binary. Where the text is
    not UTF-8, each byte counts as a character, as in latin-1.

    Args:
        path: of the file.

    Returns:
        A `MappedText`; `values` stay in the file.

    Raises:
        InputError: a file that can't be read, or is empty.

    Example:
        >>> import tempfile, pathlib
        >>> from jaxbptt import tasks
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "a.txt")
        ...     _ = path.write_text("añ", encoding="utf-8")
        ...     text = tasks.map_text(path)
        ...     print(text.symbols, text.encode(text.values), text.bytes_per_character, text.decode([0, 2, 1]))
        (97, 177, 195) [0 2 1] 1.5 añ
    """
    path = Path(path)
    try:
        if not path.is_file():
            # Opening raises the system's own error where there is nothing, or a folder.
            path.open("rb").close()
            raise InputError(f"{path} is not a file.")
        with path.open("rb") as file:
            mark = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
        if path.stat().st_size == mark:
            raise InputError(f"{path} is empty.")
        values = np.memmap(path, np.uint8, mode="r", offset=mark)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}.") from None
    counts = np.zeros(256, np.int64)
    for block in blocks(values):
        counts += np.bincount(block, minlength=256)
    utf8 = is_utf8(values) if counts[0x80:].any() else True
    characters = max(len(values) - int(counts[0x80:0xC0].sum()), 1) if utf8 else len(values)
    return MappedText(path.name, values, tuple(np.flatnonzero(counts).tolist()), characters, utf8)


def is_utf8(values: np.ndarray) -> bool:
    """Whether bytes are UTF-8, but for characters that are cut off at either end."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    cut_off = len(bytes(values[:3])) - len(bytes(values[:3]).lstrip(LATER_BYTES))
    try:
        for block in blocks(values[cut_off:]):
            decoder.decode(bytes(block))
    except UnicodeDecodeError:
        return False
    return True


def map_array(path: str | Path) -> MappedArray:
    """The array of a numpy `.npy` file of any size, left in the file.

    Args:
        path: of a file with real numbers, `[time]` or `[time, features]`.

    Returns:
        A `MappedArray`.

    Raises:
        InputError: a file that can't be read, is cut short, or holds something else.

    Example:
        >>> import tempfile, pathlib, numpy as np
        >>> from jaxbptt import tasks
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(pathlib.Path(folder, "a.npy"), np.ones((5, 2)))
        ...     tasks.map_array(pathlib.Path(folder, "a.npy")).values.shape
        (5, 2)
    """
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}.") from None
    except Exception as error:  # numpy has several errors of its own for a broken file
        words = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not a readable .npy file of plain numbers: {words}") from None
    if not isinstance(values, np.ndarray):
        values.close()
        raise InputError(f"{path} is an archive of arrays, but a single .npy array is expected: name it .npz.")
    check_numbers(f"{path}: the array", values)
    return MappedArray(Path(path).name, values)


def mean_and_deviation(
    values: np.ndarray, *, steps: int | None = None, name: str = "values"
) -> tuple[np.ndarray, np.ndarray]:
    r"""Mean and standard deviation of each column over the first time steps, in two passes over blocks, float64.

    μ = 1/T Σₜ xₜ,  σ² = 1/T Σₜ (xₜ − μ)²

    Args:
        values: `[time]` or `[time, features]`, usually a memory map; all of them have to be finite.
        steps: T, such as the training data; all time steps by default.
        name: of the values, for the error.

    Returns:
        μ and σ, each `[features]`, or scalars for `[time]`; σ = 1 for a column that doesn't change.

    Raises:
        InputError: a value that is not finite, with its place.

    Example:
        >>> import numpy as np
        >>> from jaxbptt import tasks
        >>> mean, deviation = tasks.mean_and_deviation(np.array([[1.0, 5.0], [3.0, 5.0], [9.0, 9.0]]), steps=2)
        >>> print(mean, deviation)
        [2. 5.] [1. 1.]
    """
    first = values[:steps]
    # Squares of 1e200 would overflow.
    scale = np.full(values.shape[1:], np.finfo(float).tiny)
    start = 0
    for block in blocks(values):
        block = np.asarray(block, float)
        finite = np.isfinite(block)
        if not finite.all():
            place = np.argwhere(~finite)[0]
            where = [start + int(place[0]), *place[1:].tolist()]
            axes = "[time, feature]" if block.ndim == 2 else "[time]"
            raise InputError(f"{name} is {block[tuple(place)]} at {axes} = {where}. Fill it in or leave it out.")
        inside = block[: max(len(first) - start, 0)]
        scale = np.maximum(scale, np.abs(inside).max(axis=0, initial=0))
        start += len(block)
    mean, squares = np.zeros_like(scale), np.zeros_like(scale)
    for block in blocks(first):
        mean += (np.asarray(block, float) / scale).sum(axis=0) / len(first)
    for block in blocks(first):
        squares += ((np.asarray(block, float) / scale - mean) ** 2).sum(axis=0) / len(first)
    deviation = np.sqrt(squares)
    # Of a constant column, rounding leaves a deviation of a few epsilon.
    constant = deviation <= 8 * np.finfo(float).eps
    return mean * scale, np.where(constant, 1.0, deviation * scale)


def blocks(values: np.ndarray) -> Iterator[np.ndarray]:
    """Consecutive blocks along time, of `BLOCK_BYTES` or one time step if that is more."""
    length = max(BLOCK_BYTES // max(values[:1].nbytes, 1), 1)
    for start in range(0, len(values), length):
        yield values[start : start + length]
