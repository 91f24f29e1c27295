r"""Sequences to learn from: the user's own text or numbers, and real text that is on every machine.

Every reader checks what it reads and says in one line what is wrong and where; nothing is repaired silently.
"""

import importlib.util
from collections import Counter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from jaxbptt.html_table import fields_table
from jaxbptt.words import counted

MAX_SYMBOLS = 256


class InputError(ValueError):
    """The data can't be used as it is; the message says what is wrong, where, and how to fix it."""


class Series(NamedTuple):
    """A sequence to predict.

    Attributes:
        name: where it is from.
        values: symbol numbers `[time]`, or standardised numbers `[time, features]`.
        symbols: the characters that the numbers stand for; empty for numeric series.
    """

    name: str
    values: np.ndarray
    symbols: tuple[str, ...]

    _repr_html_ = fields_table

    @property
    def features(self) -> int:
        """Size of the network's input and output."""
        return len(self.symbols) or self.values.shape[1]


class NextStep(NamedTuple):
    """Next-step prediction on a batch of sequences cut from a series.

    Attributes:
        xs: inputs, `[time, batch, features]`; characters as one-hot vectors.
        targets: the inputs one step later, character numbers `[time, batch]`, or `[time, batch, features]`.
        loss: what fits the targets.
    """

    xs: np.ndarray
    targets: np.ndarray
    loss: Literal["cross_entropy", "mean_squared_error"]

    _repr_html_ = fields_table


def read_text(path: str | Path) -> Series:
    r"""Characters of a UTF-8 text file, without a byte order mark.

    Of more than 256, the 255 most frequent ones are kept, and all the rest become `"\ufffd"`.
    """
    text = _decoded(path)
    kept = [symbol for symbol, _ in Counter(text).most_common(MAX_SYMBOLS)]
    if len(set(text)) > MAX_SYMBOLS:
        kept = [*kept[: MAX_SYMBOLS - 1], "\ufffd"]
    symbols = tuple(sorted(kept))
    numbers = {symbol: number for number, symbol in enumerate(symbols)}
    other = numbers.get("\ufffd", 0)
    return Series(Path(path).name, np.array([numbers.get(symbol, other) for symbol in text], np.int32), symbols)


def read_standard_library() -> Series:
    """The source of Python's own decimal arithmetic: about 230,000 characters, on every machine that has Python."""
    return read_text(standard_library_file())


def standard_library_file() -> str:
    """The file that `read_standard_library` reads."""
    spec = importlib.util.find_spec("_pydecimal")
    if spec is None or spec.origin is None or not Path(spec.origin).is_file():
        raise InputError("This Python has no sources of its standard library: pass a text of your own with --text.")
    return spec.origin


def read_npz(path: str | Path) -> Series:
    """The array of a numpy `.npy` file, or of an `.npz` file the only one or the one named `xs`; standardised.

    Its shape is `[time]` or `[time, features]`.
    """
    return Series(Path(path).name, standardise(npz_values(path)), ())


def npz_values(path: str | Path) -> np.ndarray:
    """The numbers that `read_npz` reads, float64 `[time, features]`, in their own units."""
    read_bytes(path)
    kind = ".npy" if Path(path).suffix == ".npy" else ".npz"
    try:
        with open(path, "rb") as file:
            loaded = np.load(file, allow_pickle=False)
            arrays = {"": loaded} if isinstance(loaded, np.ndarray) else {key: loaded[key] for key in loaded.files}
    except Exception as error:  # numpy, zipfile and zlib each have errors of their own for a broken file
        words = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is not a readable {kind} file of plain arrays: {words}") from None
    if len(arrays) != 1 and "xs" not in arrays:
        raise InputError(f"{path} holds {sorted(arrays)}: name the array to predict 'xs', or keep a single one.")
    key = "xs" if "xs" in arrays else next(iter(arrays))
    values, what = arrays[key], f"{path}: " + (f"array {key!r}" if key else "the array")
    check_numbers(what, values)
    values = values.astype(float).reshape(len(values), -1)
    bad = np.argwhere(~np.isfinite(values))
    if len(bad):
        raise InputError(f"{what} is {values[tuple(bad[0])]} at [time, feature] = {bad[0].tolist()}.")
    return values


def next_step(series: Series, *, steps: int, batch: int) -> NextStep:
    """Cut `batch` sequences of `steps` + 1 values, evenly spread over the series, into inputs and what comes next."""
    total = len(series.values)
    if total < steps + 1:
        raise InputError(
            f"{series.name} has {counted(total, 'time step')}, but steps={steps:,} needs {steps + 1:,}, one more to "
            f"predict. Use a longer sequence, or at most --steps {max(total - 1, 0)}."
        )
    starts = np.linspace(0, total - steps - 1, batch).astype(int)
    sequences = np.stack([series.values[start : start + steps + 1] for start in starts], axis=1)
    if series.symbols:
        return NextStep(np.eye(series.features)[sequences[:-1]], sequences[1:], "cross_entropy")
    return NextStep(sequences[:-1], sequences[1:], "mean_squared_error")


def check_numbers(what: str, values: np.ndarray) -> None:
    """Refuse what is not an array of real numbers over time."""
    if values.dtype.kind not in "fiub" or values.ndim not in (1, 2):
        raise InputError(
            f"{what} is {values.dtype} of shape {values.shape}, but real numbers of shape [time] or "
            "[time, features] are expected."
        )
    if not values.size:
        raise InputError(f"{what} is empty, its shape is {values.shape}.")


def read_bytes(path: str | Path) -> bytes:
    """What is in a file that is not empty."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}.") from None
    if not raw:
        raise InputError(f"{path} is empty.")
    return raw


def _decoded(path: str | Path) -> str:
    raw = read_bytes(path)
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise InputError(
            f"{path} is not UTF-8 text: byte {error.start} (line {line}) is 0x{raw[error.start]:02x}. Save it as UTF-8."
        ) from None
    if not text:
        raise InputError(f"{path} is empty.")
    return text


def standardise(values: np.ndarray) -> np.ndarray:
    """Mean 0 and variance 1 in each column; a constant column becomes 0."""
    values = values / np.maximum(np.abs(values).max(axis=0), np.finfo(float).tiny)  # squares of 1e200 would overflow
    deviation = values.std(axis=0)
    return (values - values.mean(axis=0)) / np.where(deviation > 0, deviation, 1)
