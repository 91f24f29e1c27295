r"""Learning curves: the training loss at every update, and the validation loss at some of them."""

from typing import Any

import numpy as np

from jaxbptt.plots.figure import (
    COLOURS,
    FEW,
    Ax,
    Drawing,
    add_legend,
    drawing,
    finite,
    label_axes,
    log_ticks,
    panels_in,
    step_ticks,
)
from jaxbptt.words import counted

# The running mean at each update is over 1/50 of all updates.
_MEANS = 50


def plot_learning_curve(training: Any, validation: Any = None, *, measure: str = "loss", ax: Ax = None) -> Drawing:
    r"""Loss against update: training (every update, and its running mean) and validation.

    The mean at an update is over the last n/50 of all n updates. The axis is logarithmic where losses span more than a
    decade. Values that are not finite are left out.

    Args:
        training: pair of arrays, the numbers of the updates and the loss at each.
        validation: a pair of the same kind, or `None`.
        measure: what is measured, such as `"bits per character"`; the label of the axis.
        ax: the Axes to draw in; a new figure by default.

    Returns:
        A `Drawing`; the artists are the lines `"training"`, `"training mean"` where there are 100 updates or more, and
        `"validation"`.

    Raises:
        ValueError: two arrays of a pair are not of the same length; `ax` of more than one Axes.

    Example:
        >>> import numpy as np
        >>> from jaxbptt import plots
        >>> updates = np.arange(1, 101)
        >>> drawing = plots.plot_learning_curve((updates, 1 / updates), ([50, 100], [0.03, 0.02]))
        >>> list(drawing.artists)
        ['training', 'training mean', 'validation']
    """
    (axes,) = panels = panels_in(ax, 1, width=8.0)
    artists: dict[str, Any] = {}
    curves = []
    steps, losses = _pair("training", training)
    window = max(len(steps) // _MEANS, 1)
    style: dict[str, Any] = {"color": COLOURS[0], "marker": "o" if len(steps) <= FEW else ""}
    if window > 1:
        (artists["training"],) = axes.plot(steps, losses, color=COLOURS[0], alpha=0.3, linewidth=0.8, label="training")
        losses = _running_mean(losses, window)
        label = f"training, mean of {counted(window, 'update')}"
        (artists["training mean"],) = axes.plot(steps, losses, linewidth=1.8, label=label, **style)
    else:
        (artists["training"],) = axes.plot(steps, losses, linewidth=1.8, label="training", **style)
    curves.append(losses)
    if validation is not None:
        steps, losses = _pair("validation", validation)
        if len(steps):
            style = {"color": COLOURS[1], "marker": "s", "markersize": 4 if len(steps) <= 4 * FEW else 0}
            (artists["validation"],) = axes.plot(steps, losses, "--", linewidth=1.8, label="validation", **style)
            curves.append(losses)
    values = np.concatenate(curves)
    values = values[np.isfinite(values)]
    if values.size and values.min() > 0 and values.max() > 10 * values.min():
        axes.set_yscale("log")
        log_ticks(axes.yaxis, values.min(), values.max())
    label_axes(axes, "Learning curve", "update", measure)
    step_ticks(axes.xaxis)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    add_legend(panels, ax)
    return drawing(panels, artists)


def _pair(name: str, pair: Any) -> tuple[np.ndarray, np.ndarray]:
    steps, losses = (np.asarray(numbers, float) for numbers in pair)
    if steps.shape != losses.shape or steps.ndim != 1:
        raise ValueError(f"{name} has {steps.shape} updates and {losses.shape} losses: pass two arrays of one length.")
    return steps, finite(losses)


def _running_mean(losses: np.ndarray, window: int) -> np.ndarray:
    """The mean of the last `window` values at each update, without those that are nan."""
    is_finite = np.isfinite(losses)
    total = np.cumsum(np.concatenate([np.zeros(window), np.where(is_finite, losses, 0)]))
    count = np.cumsum(np.concatenate([np.zeros(window), is_finite]))
    count = count[window:] - count[:-window]
    with np.errstate(invalid="ignore"):
        return np.where(count > 0, (total[window:] - total[:-window]) / np.maximum(count, 1), np.nan)
