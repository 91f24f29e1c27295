"""The data of a run: a file, split in time, and how its values are encoded for the network."""

import argparse
import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxbptt import tasks
from jaxbptt.tasks.files import standard_library_file
from jaxbptt.training import streams
from jaxbptt.training.chunks import Stream
from jaxbptt.words import counted

# Validation uses at most this many chunks, however long the file is.
MAX_VALIDATION_CHUNKS = 50
_FINGERPRINT_BYTES = 2**20


class Source(NamedTuple):
    """A series to learn from.

    Attributes:
        name: of the file.
        training: chunks of the training data, the start of the series.
        validation: chunks of the validation data, the rest of it, or `None`.
        features: of the network's input and output.
        text: the symbols of a text, or `None` for numbers.
        prompt: the end of the training data, encoded.
        fingerprint: distinguishes this file from others.
        words: a description for the user.
    """

    name: str
    training: Stream
    validation: Stream | None
    features: int
    text: tasks.MappedText | None
    prompt: np.ndarray
    fingerprint: str
    words: str

    def measure(self, loss: float) -> float:
        """Bits per character of a text's loss in nats per byte; the loss itself for numbers."""
        return loss / math.log(2) * self.text.bytes_per_character if self.text else loss

    @property
    def measured_in(self) -> str:
        """The unit of `measure`."""
        return "bits per character" if self.text else "mean squared error, standardised"


def open_source(options: argparse.Namespace) -> Source:
    """The data that the options name, or the standard library's decimal arithmetic.

    Raises:
        InputError: data that can't be read, or is too short.
    """
    path = options.csv or options.npz or options.text or standard_library_file()
    text = None if options.csv or options.npz else tasks.map_text(path)
    values = _numbers(options, path) if text is None else text.values
    name = Path(path).name
    total = len(values)
    cut = total - round(total * options.validation)
    _check_length(name, "training", cut, options.batch)
    if cut < total:
        _check_length(name, f"validation (--validation {options.validation:g})", total - cut, options.batch)
    if text is None:
        features = math.prod(values.shape[1:])
        encode = _standardiser(name, values, cut)
        kind = f"rows of {counted(features, 'number')}, standardised by the training data"
    else:
        features, encode = text.features, text.encode
        kind = f"bytes ({features} different, {counted(text.characters, 'character')})"
    sizes = {"batch": options.batch, "chunk_length": options.steps, "encode": encode}
    return Source(
        name=name,
        training=streams.rows(values[:cut], **sizes),
        validation=streams.rows(values[cut:], **sizes) if cut < total else None,
        features=features,
        text=text,
        prompt=encode(values[max(cut - options.steps, 0) : cut]),
        fingerprint=_fingerprint(path),
        words=f"{name}: {total:,} {kind}; the last {total - cut:,} are for validation",
    )


def _numbers(options: argparse.Namespace, path: str) -> np.ndarray:
    if options.csv:
        return tasks.read_csv(path).values
    return tasks.map_array(path).values if Path(path).suffix == ".npy" else tasks.read_npz(path).values


def _check_length(name: str, purpose: str, steps: int, batch: int) -> None:
    if steps <= batch:
        raise tasks.InputError(
            f"{name} has {counted(steps, 'time step')} for {purpose}, but --batch {batch} needs {batch + 1:,}, one more to "
            "predict: use a longer file or a smaller --batch."
        )


def _standardiser(name: str, values: np.ndarray, steps: int) -> Callable[[np.ndarray], np.ndarray]:
    mean, deviation = tasks.mean_and_deviation(values, steps=steps, name=name)

    def encode(raw: np.ndarray) -> np.ndarray:
        return ((np.asarray(raw, float) - mean) / deviation).astype(np.float32).reshape(len(raw), -1)

    return encode


def _fingerprint(path: str | Path) -> str:
    with open(path, "rb") as file:
        start = file.read(_FINGERPRINT_BYTES)
    return f"{Path(path).stat().st_size} bytes, sha256 {hashlib.sha256(start).hexdigest()[:16]}"
