r"""Where the first nan or infinity appears in the forward pass and in the backward pass, by leaf and time step."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbptt.analysis.flow import GradientFlow
from jaxbptt.html_table import fields_table
from jaxbptt.scans.recurrence import Recurrence
from jaxbptt.trees import differentiable, name


class BadEntry(NamedTuple):
    """The first value that is not finite.

    Attributes:
        leaf: its name, as in `carry.h`, `ys`, `params.W_hh`, `xs`, `∂L/∂carry.h`, `∂L/∂params.W_hh`, `loss`.
        time_index: the entry along time, from 0: `xs[time_index]` is the input of that step; `None` without a time axis.
        value: "nan" or "inf".
    """

    leaf: str
    time_index: int | None
    value: str

    _repr_html_ = fields_table


def first_bad_forward(r: Recurrence, carries: Any, ys: Any, loss: Any, valid: np.ndarray) -> BadEntry | None:
    """The earliest in time; leaves without a time axis come before all steps, the loss after them.

    What stands in xs where a step is not `valid` counts for nothing.
    """
    found = [
        *_bad_entries("params", r.params),
        *_bad_entries("init", r.init),
        *_bad_entries("xs", r.xs, over_time=True, valid=valid),
        *_bad_entries("carry", carries, over_time=True),
        *_bad_entries("ys", ys, over_time=True),
    ]
    if not found:
        return next(_bad_entries("loss", loss), None)
    return min(found, key=lambda entry: -1 if entry.time_index is None else entry.time_index)


def first_bad_backward(flow: GradientFlow) -> BadEntry | None:
    """The latest in time, which is the first in the backward pass."""
    found = [
        *_bad_entries("∂L/∂carry", flow.adjoints, over_time=True, backward=True),
        *_bad_entries("∂L/∂params", flow.contribution_norms, over_time=True, backward=True),
        *_bad_entries("∂L/∂xs", flow.input_gradients, over_time=True, backward=True),
    ]
    if not found:
        return next(_bad_entries("∂L/∂init", flow.init_gradients), None)
    return max(found, key=lambda entry: -1 if entry.time_index is None else entry.time_index)


def _bad_entries(
    root: str, tree: Any, *, over_time: bool = False, backward: bool = False, valid: np.ndarray | None = None
) -> Iterator[BadEntry]:
    """For each leaf with an entry that is not finite: the first one, or the last one for the backward pass."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(differentiable(tree)):
        values = np.asarray(leaf)
        values = values if np.issubdtype(values.dtype, np.inexact) else values.astype(np.float32)  # bfloat16
        bad = ~np.isfinite(values)
        if valid is not None:
            bad[~valid] = False
        if not bad.any():
            continue
        if over_time:
            steps = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))
            index = int(steps[-1 if backward else 0])
            yield BadEntry(name(root, path), index, _kind(values[index]))
        else:
            yield BadEntry(name(root, path), None, _kind(values))


def _kind(values: np.ndarray) -> str:
    return "nan" if np.isnan(values).any() else "inf"
