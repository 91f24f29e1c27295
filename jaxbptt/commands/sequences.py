"""The sequences on which a checkpoint is opened up: of a file that is given, or of the end of the one it was trained on."""

import argparse
from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxbptt import tasks
from jaxbptt.commands import numbers, sources, tables
from jaxbptt.models.model import Model
from jaxbptt.reports.trained import Sequences
from jaxbptt.tasks.files import standard_library_file
from jaxbptt.words import counted


class Cut(NamedTuple):
    """Sequences from a file.

    Attributes:
        sequences: what the model reads, and what it is to predict.
        words: where they are from.
        read_as: lines that say how the file was read.
        name: of the file.
    """

    sequences: Sequences
    words: str
    read_as: tuple[str, ...]
    name: str


def of_model(model: Model, options: argparse.Namespace) -> Cut:
    """Sequences of `--steps` steps, evenly spread over the file, or over its validation part.

    Raises:
        InputError: the file is not there or another one, can't be read, is too short, or does not fit the model.
    """
    path, trained_on = _path(model, options)
    name = Path(path).name
    if model.columns is None:
        tables.given(options)
        values, observed, read_as = tasks.map_text(path).values, None, ()
    else:
        kind = "csv" if options.csv else "npz" if options.npz else model.settings["data"]["kind"]
        table = numbers.read_for_model(model, options, kind, path)
        values, read_as = table.values, table.read_as
        masked = (options.missing or model.settings["data"]["reading"].get("missing")) == "mask" and kind == "csv"
        observed = table.observed[:, list(model.columns.targets)] if masked and not table.observed.all() else None
    total, steps = len(values), options.steps
    if total <= steps:
        raise tasks.InputError(
            f"{name} has {counted(total, 'time step')}, but --steps {steps:,} needs {steps + 1:,}, one more to predict. Use "
            f"a longer file, or at most --steps {max(total - 1, 0)}."
        )
    cut = total - round(total * model.settings["training"]["validation"])
    # Where validation is too short for as many sequences as are wanted, they begin before it.
    first = max(min(cut, total - steps - options.batch), 0) if trained_on and cut < total else 0
    starts = np.arange(first, total - steps)
    if observed is not None:
        # Without a target at its last step a sequence would have no gradient of the last loss.
        starts = starts[observed[starts + steps].any(axis=1)]
        if not len(starts):
            raise tasks.InputError(f"{name} has no observed target after {steps:,} steps: use fewer --steps.")
    starts = starts[np.linspace(0, len(starts) - 1, options.batch).astype(int)]
    rows = starts + np.arange(steps + 1)[:, None]
    if model.vocabulary is not None:
        symbols = _symbol_numbers(name, model.vocabulary, np.asarray(values[rows]))
        sequences = Sequences(symbols[:-1], symbols[1:])
    else:
        assert model.columns is not None
        encoded = model.columns.encode(values[rows])
        targets = encoded[1:][..., list(model.columns.targets)]
        sequences = Sequences(encoded[:-1], targets, None if observed is None else observed[rows[1:]])
    return Cut(sequences, f"{name}, {_part(trained_on, first, cut, total)}", read_as, name)


def _path(model: Model, options: argparse.Namespace) -> tuple[str, bool]:
    """The file to read, and whether it is the one that the model was trained on."""
    data, text = model.settings["data"], model.vocabulary is not None
    named = options.text or options.csv or options.npz
    if named and bool(options.text) != text:
        reads, option = ("text", "--text") if text else ("numbers", "--csv or --npz")
        raise tasks.InputError(f"{options.checkpoint} was trained on {reads}: pass its file with {option}.")
    if named:
        return named, _fingerprint(named) == data["fingerprint"]
    path = data["path"] or standard_library_file()
    found = _fingerprint(path)
    if found != data["fingerprint"]:
        state = "is not there any more" if found is None else "has changed since"
        raise tasks.InputError(
            f"{options.checkpoint} was trained on {path}, which {state}: pass a file with --{data['kind']}."
        )
    return path, True


def _fingerprint(path: str) -> str | None:
    return sources.fingerprint(path) if Path(path).is_file() else None


def _symbol_numbers(name: str, vocabulary: tasks.Vocabulary, raw: np.ndarray) -> np.ndarray:
    known = np.full(256, -1, np.int32)
    known[list(vocabulary.symbols)] = np.arange(len(vocabulary.symbols))
    numbers = known[raw]
    if (numbers < 0).any():
        byte = int(raw[numbers < 0][0])
        shown = repr(chr(byte)) if byte < 0x80 else f"the byte 0x{byte:02x}"
        raise tasks.InputError(
            f"{name} has {shown}, which the model has never seen: use a text of characters of its training text."
        )
    return numbers


def _part(trained_on: bool, first: int, cut: int, total: int) -> str:
    if not trained_on:
        return f"all {counted(total, 'step')}; it was trained on another file"
    part = f"the last {counted(total - first, 'step')}" if first else f"all {counted(total, 'step')}"
    if first == cut:
        return f"{part}, held out from training"
    return f"{part}, {'which' if cut == total else 'some of which'} it was trained on"
