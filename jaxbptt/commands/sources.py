"""The data of a run: a file, split in time, and how its values are encoded for the network."""

import argparse
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxbptt import tasks
from jaxbptt.commands import arguments, tables
from jaxbptt.models.model import Columns, Model
from jaxbptt.tasks.files import npz_values, standard_library_file
from jaxbptt.tasks.mapped import blocks
from jaxbptt.training import streams
from jaxbptt.training.chunks import Stream
from jaxbptt.words import counted

# Validation uses at most this many chunks, however long the file is.
MAX_VALIDATION_CHUNKS = 50
_FINGERPRINT_BYTES = 2**20
_STEPS = 64
# As many names of columns are shown as fit on a screen.
_SHOWN = 8


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
    if resumed is not None and (found := fingerprint(path)) != resumed["data"]["fingerprint"]:
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
        "fingerprint": fingerprint(path),
        "reading": options.reading,
    }
    if text is not None:
        parts: dict[str, Any] = _text_parts(text, cut, options.steps)
    else:
        assert table is not None
        parts = _number_parts(table, cut, options)
    encode, series = parts.pop("encode"), parts.pop("series")
    sizes = {"batch": options.batch, "chunk_length": options.steps, "encode": encode}
    lines = parts.pop("read_as")
    if not parts["constant_loss"]:
        raise tasks.InputError(f"{name} is the same at every step of the training data: there is nothing to learn.")
    held_out = f"; the last {total - cut:,} are for validation" if cut < total else ""
    return Source(
        name=name,
        training=streams.rows(series[:cut], **sizes),
        validation=streams.rows(series[cut:], **sizes) if cut < total else None,
        values=values,
        cut=cut,
        data=data,
        words=(*lines, f"{name}: {total:,} {parts.pop('what')}{held_out}"),
        **parts,
    )


def _text_parts(text: tasks.MappedText, cut: int, steps: int) -> dict[str, Any]:
    counts = np.zeros(256, np.int64)
    for block in blocks(text.values[:cut]):
        counts += np.bincount(block, minlength=256)
    frequencies = counts[counts > 0] / counts.sum()
    return {
        "vocabulary": tasks.Vocabulary(text.symbols),
        "columns": None,
        "change": (),
        "observed": None,
        "constant_loss": float(-np.sum(frequencies * np.log(frequencies))),
        "bytes_per_character": text.bytes_per_character,
        "prompt": text.encode(text.values[max(cut - steps, 0) : cut]),
        "encode": text.encode,
        "series": text.values,
        "read_as": (),
        "what": f"bytes ({text.features} different, {counted(text.characters, 'character')})",
    }


def read_numbers(kind: str, path: str, reading: Mapping[str, Any]) -> tasks.Table:
    """The numbers of a `--csv` or `--npz`; a `.npy` file stays on disk."""
    if kind == "csv":
        return tasks.read_table(path, **reading)
    values = tasks.map_array(path).values if Path(path).suffix == ".npy" else npz_values(path)
    values = values.reshape(len(values), -1)
    places = tuple(range(1, values.shape[1] + 1))
    observed = np.broadcast_to(True, values.shape)
    return tasks.Table(Path(path).name, tuple(f"column {i}" for i in places), values, observed, None, (), places)


def read_for_model(model: Model, options: argparse.Namespace, kind: str, path: str) -> tasks.Table:
    """The columns that a model of numbers reads, in its order, from a table like the one it was trained on.

    Args:
        model: its settings say how that table was read.
        options: of the command, those for tables count more.
        kind: `"csv"` or `"npz"`.
        path: of the file.

    Raises:
        InputError: options that choose columns, a file that can't be read, or that lacks columns.
    """
    assert model.columns is not None
    names = model.columns.names
    given = tables.given(argparse.Namespace(**{**vars(options), "csv": path if kind == "csv" else None}))
    for name in ("columns", "drop"):
        if name in given:
            raise tasks.InputError(f"--{name} can't be chosen: the model reads {shortened(names)}.")
    reading: dict[str, Any] = {}
    if kind == "csv":
        # Columns that the model doesn't read may be of any kind, and those that were dropped may be gone.
        reading = {key: value for key, value in model.settings["data"]["reading"].items() if key != "drop"}
        reading |= given | {"columns": list(names)}
    try:
        table = read_numbers(kind, path, reading)
    except tasks.InputError as error:
        words = str(error)
        if not words.startswith("--columns "):
            raise
        raise tasks.InputError(f"the model reads the column {words.removeprefix('--columns ')}") from None
    if len(table.columns) != len(names):
        raise tasks.InputError(
            f"{path} has {counted(len(table.columns), 'column')}, but the model reads {len(names)}: pass an array "
            f"[time, {len(names)}]."
        )
    if kind != "csv":
        return table
    order = [table.columns.index(name) for name in names]
    return table._replace(columns=names, values=table.values[:, order], observed=table.observed[:, order])


def shortened(names: Sequence[str]) -> str:
    """Names in a sentence, of many the first."""
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _number_parts(table: tasks.Table, cut: int, options: argparse.Namespace) -> dict[str, Any]:
    observed = table.observed if options.reading.get("missing") == "mask" and not table.observed.all() else None
    targets = table.positions(options.target, option="--target") if options.target else range(len(table.columns))
    targets = tuple(targets)
    for i in targets:
        if targets.count(i) > 1:
            raise tasks.InputError(f"--target names {table.columns[i]} twice.")
    if observed is None:
        mean, deviation = tasks.mean_and_deviation(table.values, steps=cut, name=table.name)
    else:
        _check_observed(table, cut, targets)
        mean, deviation = _of_observed(table.values[:cut], observed[:cut])
    columns = Columns(table.columns, mean, deviation, targets)
    series, encode = table.values, columns.encode
    if observed is not None:
        # Whether an entry was observed goes beside it, so that the loss of a chunk knows.
        series, encode = np.concatenate([table.values, observed], axis=1), _with_observed(columns)
    lowest, highest = (extreme(table.values[:cut], axis=0) for extreme in (np.min, np.max))
    still = [name for name, low, high in zip(table.columns, lowest, highest, strict=True) if low == high]
    about = (f"the same in every row of the training data: {shortened(still)}",) if still else ()
    predicted = f", of which {', '.join(columns.target_names)} predicted" if options.target else ""
    return {
        "vocabulary": None,
        "columns": columns,
        "change": _changes(table.values[:cut], None if observed is None else observed[:cut], columns),
        "observed": observed,
        # Of a column that never changes in training, the mean is right.
        "constant_loss": float(np.mean([table.columns[i] not in still for i in targets])),
        "bytes_per_character": 1.0,
        "prompt": np.zeros((0, len(table.columns)), np.float32),
        "encode": encode,
        "series": series,
        "read_as": (*table.read_as, *about),
        "what": f"rows of {counted(len(table.columns), 'number')}{predicted}, standardised by the training data",
    }


def _check_observed(table: tasks.Table, cut: int, targets: tuple[int, ...]) -> None:
    for part, observed in (("training", table.observed[1:cut]), ("validation", table.observed[cut + 1 :])):
        for i in targets:
            if len(observed) and not observed[:, i].any():
                raise tasks.InputError(
                    f"{table.name}: {table.columns[i]} has no number in the {part} data, so nothing can be learnt or measured "
                    "of it: choose others with --target, or another --validation."
                )


def _of_observed(values: np.ndarray, observed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each column over the entries that were observed; 0 and 1 where there are none."""
    means, deviations = [], []
    for column, seen in zip(values.T, observed.T, strict=True):
        found = column[seen]
        mean, deviation = tasks.mean_and_deviation(found) if len(found) else (0.0, 1.0)
        means.append(mean)
        deviations.append(deviation)
    return np.array(means, float), np.array(deviations, float)


def _with_observed(columns: Columns) -> Callable[[np.ndarray], np.ndarray]:
    width = len(columns.names)
    return lambda raw: np.concatenate([columns.encode(raw[:, :width]), raw[:, width:].astype(np.float32)], axis=1)


def _changes(values: np.ndarray, observed: np.ndarray | None, columns: Columns) -> tuple[float, ...]:
    """Root mean square of one step's change of each target, standardised, between observed entries; 1 where there is none."""
    squares, counts = np.zeros((2, len(columns.names)))
    start = 0
    for block in blocks(values):
        low, start = max(start - 1, 0), start + len(block)
        changes = np.diff(columns.encode(values[low:start]).astype(float), axis=0)
        counted_ones = np.ones(changes.shape, bool)
        if observed is not None:
            counted_ones = observed[low : start - 1] & observed[low + 1 : start]
        squares += np.sum(changes**2, axis=0, where=counted_ones)
        counts += counted_ones.sum(axis=0)
    changes = np.sqrt(squares / np.maximum(counts, 1))[list(columns.targets)]
    return tuple(np.where(changes > 0, changes, 1.0).tolist())


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
            f"--steps {options.steps:,} is longer than a row: {name} has {counted(cut, 'time step')} for training, which make "
            f"--batch {options.batch} rows of {row:,}. Use at most --steps {row}, or a smaller --batch."
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
