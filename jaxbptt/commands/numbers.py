"""Numbers over time, from a table or an array: as a run needs them, and as a trained model reads them."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxbptt import tasks
from jaxbptt.commands import tables
from jaxbptt.models.model import Columns, Model
from jaxbptt.tasks.files import npz_values
from jaxbptt.tasks.mapped import blocks
from jaxbptt.words import counted

# As many names of columns are shown as fit on a screen.
_SHOWN = 8
# What is easy is measured on this many rows at most.
_EASY_ROWS = 100_000


class Read(NamedTuple):
    """A series as a run needs it.

    Attributes:
        series: what chunks are cut from.
        encode: of a chunk of the series.
        fields: the fields of a `Source` that follow from it.
        as_words: lines that say how it was read.
        what: it consists of.
        easy: which loss is easy to reach.
    """

    series: np.ndarray
    encode: Callable[[np.ndarray], np.ndarray]
    fields: dict[str, Any]
    as_words: tuple[str, ...]
    what: str
    easy: str


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
        raise tasks.InputError(f"the model reads {words.removeprefix('--columns ')}") from None
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


def read_table(table: tasks.Table, cut: int, options: argparse.Namespace) -> Read:
    """A table as `train` needs it; what is before `cut` is for training.

    Raises:
        InputError: targets that are not there, twice, or never observed.
    """
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
    fields = {
        "vocabulary": None,
        "columns": columns,
        "change": _changes(table.values[:cut], None if observed is None else observed[:cut], columns),
        "observed": observed,
        # Of a column that never changes in training, the mean is right.
        "constant_loss": float(np.mean([table.columns[i] not in still for i in targets])),
        "bytes_per_character": 1.0,
        "prompt": np.zeros((0, len(table.columns)), np.float32),
    }
    predicted = f", of which {', '.join(columns.target_names)} predicted" if options.target else ""
    what = f"rows of {counted(len(table.columns), 'number')}{predicted}, standardised by the training data"
    easy = _easy(table.values, observed, cut, columns)
    return Read(series, encode, fields, (*table.read_as, *about), what, easy)


def _easy(values: np.ndarray, observed: np.ndarray | None, cut: int, columns: Columns) -> str:
    """The losses of the last value and of the mean, over the validation data where there is some."""
    start = cut if cut < len(values) else 0
    rows, targets = slice(start, start + _EASY_ROWS), list(columns.targets)
    found = columns.encode(values[rows])[:, targets].astype(float)
    seen = np.ones(found.shape, bool) if observed is None else observed[rows][:, targets]
    last, mean = (np.mean(errors[seen[1:]] ** 2) for errors in (np.diff(found, axis=0), found[1:]))
    return f"{last:.3f} by the last value (persistence), {mean:.3f} by the mean"


def _check_observed(table: tasks.Table, cut: int, targets: tuple[int, ...]) -> None:
    for part, observed in (("training", table.observed[1:cut]), ("validation", table.observed[cut + 1 :])):
        for i in targets:
            if len(observed) and not observed[:, i].any():
                raise tasks.InputError(
                    f"{table.name}: {table.columns[i]} has no number in the {part} data, so nothing can be learnt or "
                    "measured of it: choose others with --target, or another --validation."
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
    """Root mean square of one step's change of each target, standardised, where it was observed; 1 where there is none."""
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
