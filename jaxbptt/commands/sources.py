"""The data of a run: a file, split in time, and how its values are encoded for the network."""

import argparse
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxbptt import tasks
from jaxbptt.commands import arguments
from jaxbptt.commands.numbers import Read, read_numbers, read_table
from jaxbptt.models.model import Columns
from jaxbptt.tasks.files import standard_library_file
from jaxbptt.tasks.mapped import blocks
from jaxbptt.training import streams
from jaxbptt.training.chunks import Stream
from jaxbptt.words import counted

# Validation uses at most this many chunks, however long the file is.
MAX_VALIDATION_CHUNKS = 50
_FINGERPRINT_BYTES = 2**20
_STEPS = 64


class Source(NamedTuple):
    """A series to learn from.

    Attributes:
        name: of the file.
        training: chunks of the training data, the start of the series.
        validation: chunks of the validation data, the rest of it, or `None`.
        vocabulary: of a text, or `None`.
        columns: of numbers, or `None`.
        change: of numbers, the root mean square of one step's change of each target in the training data, standardised.
        values: the series, bytes `[time]` or raw numbers `[time, columns]`.
        observed: of numbers, booleans like `values`, False where an entry was missing and does not count; `None`: all count.
        cut: where the validation data begins.
        constant_loss: of the prediction that knows only the training data's frequencies, or means.
        bytes_per_character: of a text; 1 for numbers.
        prompt: the end of a text's training data, encoded; empty for numbers.
        data: what a checkpoint says of the data, in JSON's types.
        words: lines that describe it for the user.
    """

    name: str
    training: Stream
    validation: Stream | None
    vocabulary: tasks.Vocabulary | None
    columns: Columns | None
    change: tuple[float, ...]
    values: np.ndarray
    observed: np.ndarray | None
    cut: int
    constant_loss: float
    bytes_per_character: float
    prompt: np.ndarray
    data: dict[str, Any]
    words: tuple[str, ...]

    def measure(self, loss: float) -> float:
        """Bits per character of a text's loss in nats per byte; the loss itself for numbers."""
        return loss / math.log(2) * self.bytes_per_character if self.vocabulary else loss

    @property
    def measured_in(self) -> str:
        """The unit of `measure`."""
        return "bits per character" if self.vocabulary else "mean squared error, standardised"


def open_source(options: argparse.Namespace, resumed: Mapping[str, Any] | None = None) -> Source:
    """The data that the options name, or the standard library's decimal arithmetic.

    Args:
        options: of `train`, complete.
        resumed: the settings of the run that is resumed, whose file it has to be.

    Raises:
        InputError: data that can't be read, is too short, or is not that of the run.
    """
    kind = "csv" if options.csv else "npz" if options.npz else "text"
    named = options.csv or options.npz or options.text
    path = named or standard_library_file()
    name = Path(path).name
    arguments.check_apart(options, path)
    found = fingerprint(path)
    if resumed is not None and found != resumed["data"]["fingerprint"]:
        raise tasks.InputError(
            f"{path} is not the file that the run began with: it has {found}, that one had "
            f"{resumed['data']['fingerprint']}. Give the place of that file, or start another run."
        )
    text = tasks.map_text(path) if kind == "text" else None
    table = read_numbers(kind, path, options.reading) if text is None else None
    values = (text or table).values  # pyright: ignore[reportOptionalMemberAccess] (one of them is there)
    total = len(values)
    cut = total - round(total * options.validation)
    _choose_sizes(options, cut, total)
    _check_lengths(name, options, cut, total)
    data = {
        "kind": kind,
        "path": str(Path(named).absolute()) if named else None,
        "fingerprint": found,
        "reading": options.reading,
    }
    if text is not None:
        read = _read_text(text, cut, options.steps)
    else:
        assert table is not None
        read = read_table(table, cut, options)
    if not read.fields["constant_loss"]:
        raise tasks.InputError(f"{name} is the same at every step of the training data: there is nothing to learn.")
    sizes = {"batch": options.batch, "chunk_length": options.steps, "encode": read.encode}
    held_out = f"; the last {total - cut:,} are for validation" if cut < total else ""
    return Source(
        name=name,
        training=streams.rows(read.series[:cut], **sizes),
        validation=streams.rows(read.series[cut:], **sizes) if cut < total else None,
        values=values,
        cut=cut,
        data=data,
        words=(*read.as_words, f"{name}: {total:,} {read.what}{held_out}", f"easy to reach: {read.easy}"),
        **read.fields,
    )


def _read_text(text: tasks.MappedText, cut: int, steps: int) -> Read:
    counts = np.zeros(256, np.int64)
    for block in blocks(text.values[:cut]):
        counts += np.bincount(block, minlength=256)
    frequencies = counts[counts > 0] / counts.sum()
    entropy = float(-np.sum(frequencies * np.log(frequencies)))
    fields = {
        "vocabulary": tasks.Vocabulary(text.symbols),
        "columns": None,
        "change": (),
        "observed": None,
        "constant_loss": entropy,
        "bytes_per_character": text.bytes_per_character,
        "prompt": text.encode(text.values[max(cut - steps, 0) : cut]),
    }
    bits = entropy / math.log(2) * text.bytes_per_character
    characters = counted(text.characters, "character") if text.utf8 else "not UTF-8: each counts as a character"
    what = f"bytes ({text.features} different, {characters})"
    return Read(text.values, text.encode, fields, (), what, f"{bits:.3f} bits per character by frequencies alone")


def _choose_sizes(options: argparse.Namespace, cut: int, total: int) -> None:
    """Fill in --batch and --steps where they were not given: the usual ones, or as many as a short series has room for."""
    if options.batch is None:
        least = min(cut, total - cut) if cut < total else cut
        wanted = 2 * (options.steps or _STEPS)
        fits = (batch for batch in (32, 16, 8, 4, 2) if cut - 1 >= batch * wanted and least > batch)
        options.batch = next(fits, 1)
    if options.steps is None:
        options.steps = max(min(_STEPS, -(-(cut - 1) // options.batch)), 1)


def _check_lengths(name: str, options: argparse.Namespace, cut: int, total: int) -> None:
    _check_length(name, "training", cut, options.batch)
    if cut < total:
        _check_length(name, f"validation (--validation {options.validation:g})", total - cut, options.batch)
    row = -(-(cut - 1) // options.batch)
    if options.steps > row:
        raise tasks.InputError(
            f"--steps {options.steps:,} is longer than a row: {name} has {counted(cut, 'time step')} for training, which "
            f"make --batch {options.batch} rows of {row:,}. Use at most --steps {row}, or a smaller --batch."
        )


def _check_length(name: str, purpose: str, steps: int, batch: int) -> None:
    if steps <= batch:
        raise tasks.InputError(
            f"{name} has {counted(steps, 'time step')} for {purpose}, but --batch {batch} needs {batch + 1:,}, one more to "
            "predict: use a longer file or a smaller --batch."
        )


def fingerprint(path: str | Path) -> str:
    """What tells a file from others: its size, and a digest of its beginning and its end."""
    try:
        size = Path(path).stat().st_size
        with open(path, "rb") as file:
            digest = hashlib.sha256(file.read(_FINGERPRINT_BYTES))
            file.seek(max(size - _FINGERPRINT_BYTES, 0))
            digest.update(file.read(_FINGERPRINT_BYTES))
    except OSError as error:
        raise tasks.InputError(f"{path} can't be read: {error.strerror or error}.") from None
    return f"{size} bytes, sha256 {digest.hexdigest()[:16]}"
