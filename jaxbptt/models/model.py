r"""A trained model, from its checkpoints alone: the network, its weights, and how its numbers are read.

A checkpoint's settings describe it: `architecture`, `vocabulary` or `columns`, and `prompt`, the encoded end of the training
data.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from jaxbptt.html_table import fields_table
from jaxbptt.models.architecture import Architecture, ModelNetwork, ModelParams, build
from jaxbptt.tasks.vocabulary import Vocabulary
from jaxbptt.training import checkpoints

BEST = "best"


class Columns(NamedTuple):
    """The columns that a model of numbers reads, and how they are standardised.

    Attributes:
        names: of the columns read, in order.
        mean: of each, over the training data.
        deviation: standard deviation of each, over the training data.
        targets: the positions among them of the columns that are predicted.
    """

    names: tuple[str, ...]
    mean: np.ndarray
    deviation: np.ndarray
    targets: tuple[int, ...]

    @property
    def target_names(self) -> tuple[str, ...]:
        """Names of the columns that are predicted."""
        return tuple(self.names[i] for i in self.targets)

    def encode(self, raw: Any) -> np.ndarray:
        """What the network reads, float32, of rows `[*, columns]` in the columns' own units."""
        return ((np.asarray(raw, float) - self.mean) / self.deviation).astype(np.float32)

    def decode(self, outputs: Any) -> np.ndarray:
        """The predicted columns `[*, targets]` in their own units, float64."""
        targets = list(self.targets)
        return np.asarray(outputs, float) * self.deviation[targets] + self.mean[targets]


class Model(NamedTuple):
    """A trained network, and what is needed to use it.

    Attributes:
        network: `network.apply(params, carry, xs)` returns the last carry and the outputs.
        params: its weights.
        carry: to start from, zeros without batch axes; `network.cell.initial_carry(batch_shape)` has them.
        vocabulary: of a model of text, else `None`.
        columns: of a model of numbers, else `None`.
        settings: what it was trained with.
        info: versions, the metrics so far, and the validation errors by horizon of a model of numbers.
        step: how many updates it was trained for.
    """

    network: ModelNetwork
    params: ModelParams
    carry: Any
    vocabulary: Vocabulary | None
    columns: Columns | None
    settings: dict[str, Any]
    info: dict[str, Any]
    step: int

    _repr_html_ = fields_table


def load(folder: str | Path, *, which: Literal["best", "last"] = "best") -> Model:
    r"""A model that `python -m jaxbptt train` has trained, from its folder of checkpoints; the data is not needed.

    Args:
        folder: of the checkpoints.
        which: `"best"`, the one with the least validation loss, or the last where there was no validation; or `"last"`.

    Returns:
        A `Model`.

    Raises:
        CheckpointError: no checkpoint, one that is damaged, or one that holds no model.
        ValueError: another `which`.
        ImportError: without orbax.

    Example:
        >>> import contextlib, io, tempfile
        >>> import jaxbptt as bptt
        >>> from jaxbptt.__main__ import main
        >>> options = ["--updates", "2", "--hidden", "4", "--validation", "0", "--sample", "0"]
        >>> with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        ...     _ = main(["train", *options, "--checkpoints", f"{folder}/run"])
        ...     model = bptt.load(f"{folder}/run")
        >>> carry, logits = model.network.apply(model.params, model.carry, model.vocabulary.encode("def "))
        >>> model.step, len(logits)
        (2, 4)
    """
    if which not in ("best", "last"):
        raise ValueError(f"which is {which!r}, but there are two: pass 'best' or 'last'.")
    folder = Path(folder)
    if which == "best" and checkpoints.latest(folder / BEST) is not None:
        folder = folder / BEST
    try:
        record = checkpoints.record(folder)
    except checkpoints.CheckpointError as error:
        raise checkpoints.CheckpointError(
            f"{error} The last checkpoint is one folder above: which='last', or --which last."
            if folder.name == BEST
            else str(error)
        ) from None
    if "architecture" not in record.settings:
        raise checkpoints.CheckpointError(
            f"{folder} has checkpoints, but not of a model that `jaxbptt train` of this version has trained: read them with "
            "checkpoints.restore."
        )
    network, vocabulary, columns = described(record.settings)
    like = jax.eval_shape(network.init, jax.random.key(0))
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    saved = checkpoints.read(folder)
    params = structure.unflatten(jax.numpy.asarray(saved[f".params{jax.tree_util.keystr(path)}"]) for path, _ in leaves)
    return Model(
        network, params, network.cell.initial_carry(), vocabulary, columns, record.settings, record.info, record.step
    )


def described(settings: Mapping[str, Any]) -> tuple[ModelNetwork, Vocabulary | None, Columns | None]:
    """The network, and the vocabulary or the columns, that a checkpoint's settings describe."""
    vocabulary, columns = settings.get("vocabulary"), settings.get("columns")
    return (
        build(saved_architecture(settings)),
        None if vocabulary is None else Vocabulary(tuple(vocabulary)),
        None
        if columns is None
        else Columns(
            tuple(columns["names"]),
            np.array(columns["mean"], float),
            np.array(columns["deviation"], float),
            tuple(columns["targets"]),
        ),
    )


def saved_architecture(settings: Mapping[str, Any]) -> Architecture:
    """The architecture that a checkpoint's settings describe."""
    return Architecture(**{key: _as_tuple(value) for key, value in settings["architecture"].items()})


def settings_of(
    architecture: Architecture, vocabulary: Vocabulary | None, columns: Columns | None, prompt: Any
) -> dict[str, Any]:
    """The part of a checkpoint's settings that `load` reads, in JSON's types."""
    return {
        "architecture": architecture._asdict(),
        "vocabulary": None if vocabulary is None else list(vocabulary.symbols),
        "columns": None
        if columns is None
        else {key: np.asarray(value).tolist() for key, value in columns._asdict().items()},
        "prompt": np.asarray(prompt).tolist(),
    }


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
