r"""Panels, legends, colours, labels and units of time, which all figures share.

Figures are made without pyplot, which holds on to every figure it makes and has global settings.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

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

Ax = Axes | Iterable[Any] | None
"""Where to draw: one Axes, several (an array of them too), or `None` for a new figure."""


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

    def __repr__(self) -> str:
        return f"Drawing of {', '.join(map(repr, self.artists))}"

    def _repr_png_(self) -> bytes | None:
        if self.figure.canvas.manager is not None:
            return None  # a figure of pyplot, which a notebook shows by itself
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def drawing(panels: Sequence[Axes], artists: Mapping[str, Any]) -> Drawing:
    """What was drawn in the panels."""
    # Axes of a SubFigure have that as their figure, and the whole figure as its.
    return Drawing(cast(Figure, cast(Any, panels[0].figure).figure), tuple(panels), artists)


def artist_name(name: str, what: str, *, main: bool = False) -> str:
    """An artist's name: that of the result, if there is one, and what is drawn; of the main thing, the first alone."""
    return name if name and main else f"{name} {what}".strip()


def new_figure(
    panels: int, *, width: float, height: float = 4.0, stacked: bool = False, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure and its panels, beside each other or one above the other. Options are those of `Figure.subplots`."""
    figure = Figure(figsize=(width, height), layout="constrained")
    shape = (panels, 1) if stacked else (1, panels)
    return figure, list(figure.subplots(*shape, squeeze=False, **options).flat)


def panels_in(ax: Ax, number: int, *, width: float, height: float = 4.0, **options: Any) -> list[Axes]:
    """The panels to draw in: the Axes given, or those of a new figure, which the options are for.

    Raises:
        TypeError: what is given are not Axes.
        ValueError: they are too many or too few.
    """
    if ax is None:
        return new_figure(number, width=width, height=height, **options)[1]
    given = [ax] if isinstance(ax, Axes) else list(np.ravel(np.asarray(ax, object)))
    for axes in given:
        if not isinstance(axes, Axes):
            raise TypeError(
                f"ax has a {type(axes).__name__} in it: pass Axes of matplotlib, as subplots() returns them."
            )
    if len(given) != number:
        wanted = "one Axes" if number == 1 else f"a sequence of {number} Axes"
        raise ValueError(
            f"ax has {len(given)} Axes, but what is drawn takes {number}: pass {wanted}, one for each panel."
        )
    return given


def label_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, unless there is one, and labels, a faint grid, and no frame at the top and right."""
    if title and not axes.get_title():
        axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def label_y(panels: Sequence[Axes], label: str, ax: Ax) -> None:
    """One label for the first of the panels beside each other; for all that were given, which may stand anywhere."""
    for axes in panels[:1] if ax is None else panels:
        axes.set_ylabel(label)


def add_legend(panels: Sequence[Axes], ax: Ax, *, columns: int = 4, handles: Any = (), loc: Any = "best") -> None:
    """One legend for all panels, each label once: below the panels of a new figure, and in the first of those given.

    Args:
        panels: whose labelled artists it shows.
        ax: the Axes that were given, if any.
        columns: the most labels in a row below a figure.
        handles: further handles, which no panel has.
        loc: where in the Axes that were given; by default where it covers the least.
    """
    named = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    named |= {handle.get_label(): handle for handle in handles}
    if not named:
        return
    if ax is None:
        figure = panels[0].figure
        ncols = min(len(named), columns)
        # A legend that is wider than its figure is cut.
        while ncols > 1 and _legend_width([*named], ncols) > figure.bbox.width / figure.dpi:
            ncols -= 1
        below: dict[str, Any] = {"loc": "outside lower center", "ncols": ncols, "frameon": False}
        figure.legend(named.values(), named.keys(), **below)
    else:
        panels[0].legend(named.values(), named.keys(), loc=loc, fontsize="small", framealpha=0.8)


def _legend_width(labels: list[str], columns: int) -> float:
    """About as wide as it is drawn, in inches, its columns filled one after the other."""
    return sum(0.75 + 0.075 * max(map(len, column)) for column in np.array_split(labels, columns))


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


def step_ticks(*axes: Axis, whole: bool = True) -> None:
    """Ticks at a few round numbers, whole ones by default, even for a single step."""
    for axis in axes:
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=whole, min_n_ticks=1))


def log_ticks(axis: Axis, low: float, high: float) -> None:
    """Plain numbers along a logarithmic axis that spans less than three decades; powers of ten along a longer one."""
    if high >= 1000 * low:
        return
    if high < 10 * low:
        # Within one decade a logarithmic locator may find a single tick.
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1, 3)))
    axis.set_major_formatter(lambda value, _: f"{value:,g}")
    axis.set_minor_formatter(NullFormatter())


class TimeUnit(NamedTuple):
    """Time on the axes: time steps, or `dt` times as many of a unit. Made by `time_unit`."""

    dt: float | None
    unit: str | None

    def times(self, steps: Any) -> Any:
        """Numbers of time steps in this unit."""
        return steps if self.dt is None else np.asarray(steps) * self.dt

    def label(self, in_steps: str, quantity: str) -> str:
        """The label of an axis: `in_steps`, or the quantity with its unit."""
        return in_steps if self.dt is None else f"{quantity} ({self.unit})" if self.unit else quantity

    def ticks(self, *axes: Axis) -> None:
        """Ticks at a few round numbers: whole ones for time steps, even for a single step."""
        step_ticks(*axes, whole=self.dt is None)


def time_unit(dt: float | None, unit: str | None) -> TimeUnit:
    """The unit of time of a figure.

    Raises:
        ValueError: a `dt` that is not a number above 0, a unit without it.
    """
    if dt is None and unit is not None:
        raise ValueError(f"unit is {unit!r}, but dt is None: pass how many {unit} a time step is, dt=…, too.")
    if dt is not None and not 0 < dt < np.inf:
        raise ValueError(f"dt is {dt}: the time from one step to the next is above 0.")
    return TimeUnit(dt, unit)


def length_axis(axes: Axes, lengths: np.ndarray, time: TimeUnit) -> None:
    """A logarithmic axis of numbers of time steps, with ticks at the lengths themselves if there is room for them.

    Args:
        axes: whose x axis it is.
        lengths: in order, each once.
        time: the unit to draw them in.
    """
    axes.set_xscale("log")
    lengths = time.times(lengths)
    gaps = np.diff(np.log(lengths))
    if len(lengths) <= 8 and np.min(gaps, initial=np.inf) >= 0.08 * np.sum(gaps):
        axes.set_xticks(lengths)
    elif lengths[-1] < 10 * lengths[0]:
        # Within one decade a logarithmic locator may find a single tick.
        time.ticks(axes.xaxis)
    else:
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if lengths[-1] < 1000 * lengths[0] else (1,)))
    axes.xaxis.set_major_formatter(lambda length, _: f"{length:,.0f}" if time.dt is None else f"{length:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
