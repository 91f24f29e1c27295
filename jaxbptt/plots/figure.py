r"""Colours, panels, labels, legends and axes that all figures share.

Figures are made without pyplot, which holds on to every figure it makes and has global settings.
"""

import io
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
NEUTRAL = "#c9c9c9"
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "d", "v", "P")
# With more points than this on a curve, markers run into each other.
FEW = 12


class Drawing(NamedTuple):
    """What a function of `plots` drew. A notebook shows it as a picture.

    Attributes:
        figure: a new one, or that of the axes that were given.
        axes: the panels, in order.
        artists: lines, bars, images and the like, by name.
    """

    figure: Figure
    axes: tuple[Axes, ...]
    artists: Mapping[str, Any]

    def savefig(self, *args: Any, **options: Any) -> None:
        """That of the figure."""
        self.figure.savefig(*args, **options)

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def new_figure(
    panels: int, *, width: float, height: float = 4.0, stacked: bool = False, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, beside each other or one above the other. Options are those of `Figure.subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    shape = (panels, 1) if stacked else (1, panels)
    return figure, list(figure.subplots(*shape, squeeze=False, **options).flat)


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Title and labels, a faint grid, and no frame at the top and right."""
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Figure, *panels: Axes, columns: int = 4, handles: Any = ()) -> None:
    """One legend for all panels, below them, where it covers no data; each label once.

    Args:
        figure: gets the legend.
        *panels: whose labelled lines it shows.
        columns: the most labels in a row.
        handles: further handles, which no panel has.
    """
    named = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    named |= {handle.get_label(): handle for handle in handles}
    if named:
        ncols = min(len(named), columns)
        figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=ncols, frameon=False)


def colour(i: int) -> str:
    """The colour of the i-th name."""
    return COLOURS[i % len(COLOURS)]


def by_name(results: Any) -> dict[str, Any]:
    """Results by name; a single result has the empty name."""
    return dict(results) if isinstance(results, Mapping) else {"": results}


def finite(values: Any) -> np.ndarray:
    """Real values, with nan for those that are not finite."""
    values = np.asarray(values, float)
    return np.where(np.isfinite(values), values, np.nan)


def positive(values: Any) -> np.ndarray:
    """Values that can be drawn on a logarithmic axis, with nan for the others."""
    values = finite(values)
    return np.where(values > 0, values, np.nan)


def extremes(arrays: Any) -> tuple[float, float] | None:
    """The least and the largest finite value of several arrays; `None` if there is none."""
    values = np.concatenate([finite(array).ravel() for array in arrays])
    values = values[np.isfinite(values)]
    return (float(values.min()), float(values.max())) if values.size else None


def power_of_ten(power: float, _: Any = None) -> str:
    """The label of a tick, for values drawn as logarithms since they may be outside the range of floats."""
    return f"$10^{{{power:g}}}$"


def step_ticks(*axes: Axis) -> None:
    """Ticks at a few whole numbers, even for a single step."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))


def length_axis(axes: Axes, lengths: np.ndarray) -> None:
    """A logarithmic axis of numbers of time steps, with ticks at the lengths themselves if there is room for them.

    Args:
        axes: whose x axis it is.
        lengths: in order, each once.
    """
    axes.set_xscale("log")
    gaps = np.diff(np.log(lengths))
    if len(lengths) <= 8 and np.min(gaps, initial=np.inf) >= 0.08 * np.sum(gaps):
        axes.set_xticks(lengths)
    elif lengths[-1] < 10 * lengths[0]:
        # Within one decade a logarithmic locator may find a single tick.
        step_ticks(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if lengths[-1] < 1000 * lengths[0] else (1,)))
    axes.xaxis.set_major_formatter(lambda length, _: f"{length:,.0f}")
    axes.xaxis.set_minor_formatter(NullFormatter())
