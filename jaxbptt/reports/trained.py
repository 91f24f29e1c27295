r"""The networks that the report of a checkpoint opens up: the trained one, and the same as it was before training."""

import codecs
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.models.model import Model
from jaxbptt.reports.report import Entry, Row
from jaxbptt.training import losses


class Sequences(NamedTuple):
    """A batch of sequences as a model reads them.

    Attributes:
        xs: symbol numbers `[time, batch]` of a text, or standardised rows `[time, batch, columns]`.
        targets: the symbol numbers one step later, or the rows' target columns, `[time, batch, targets]`.
        observed: booleans like `targets`, False where an entry does not count; `None` where all do.
    """

    xs: Any
    targets: Any
    observed: Any = None


def entries(model: Model, sequences: Sequences, *, dtype: Any) -> tuple[Entry, Entry]:
    """The network with the weights that training started from, and with those it has.

    The loss is that of training, without dropout, and every sequence starts from a state of zeros.

    Args:
        model: from `load`.
        sequences: on which both are opened up.
        dtype: of all that is computed.
    """
    network, cell = model.network, model.settings["architecture"]["cell"]
    key, _ = jax.random.split(jax.random.key(model.settings["training"]["seed"]))
    as_given = jnp.asarray(sequences.xs)
    numbers = model.vocabulary is None
    known = Sequences(
        as_given.astype(dtype) if numbers else as_given,
        jnp.asarray(sequences.targets, dtype if numbers else None),
        None if sequences.observed is None else jnp.asarray(sequences.observed),
    )
    init = network.cell.initial_carry(sequences.xs.shape[1:2])

    def entry(name: str, params: Any, *, trained: bool) -> Entry:
        params = _cast(params, dtype)

        def loss(hs, known):
            outputs = network.readout(params, known.xs, hs)
            if numbers:
                return losses.mean_squared_error(outputs, known.targets, mask=known.observed)
            return losses.cross_entropy(outputs, known.targets)

        xs = network.read(params, known.xs).astype(dtype)
        parts = network.cell, params.cell, _cast(init, dtype), xs, known, loss
        return Entry(f"{cell}, {name}", *parts, kind=cell, trained=trained)

    return entry("untrained", network.init(key), trained=False), entry("trained", model.params, trained=True)


def easy(model: Model, sequences: Sequences) -> tuple[str, float]:
    """What is easy, in words, and its loss: that nothing changes, or of a text each symbol with its frequency."""
    if model.columns is None:
        _, counts = np.unique(sequences.targets, return_counts=True)
        return "frequencies of the symbols", float(-np.average(np.log(counts / counts.sum()), weights=counts))
    changes = (sequences.xs[..., list(model.columns.targets)] - sequences.targets).astype(float)
    mask = np.ones(changes.shape, bool) if sequences.observed is None else sequences.observed
    return "persistence: nothing changes", float(np.mean(changes[mask] ** 2))


def first_row(model: Model, sequences: Sequences, name: str) -> Row:
    """What a model reads in the first sequence: numbers in their own units, or of a text one symbol for each byte.

    A character of several bytes stands at its last one, where it is known, and nothing at those before.
    """
    xs = np.asarray(sequences.xs)[:, 0]
    if model.vocabulary is None:
        assert model.columns is not None
        columns = model.columns
        return Row(name, None, columns.names, np.asarray(xs, float) * columns.deviation + columns.mean)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return Row(name, tuple(decoder.decode(bytes([model.vocabulary.symbols[number]]))[-1:] for number in xs))


def _cast(tree: Any, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)
