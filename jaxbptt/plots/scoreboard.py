r"""The figure of a scoreboard: what accuracy of a gradient costs."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from jaxbptt.analysis.scoreboard import Scoreboard, ScoreboardRow
from jaxbptt.plots.figure import (
    MARKERS,
    Ax,
    Drawing,
    add_legend,
    colour,
    drawing,
    extremes,
    finite,
    label_axes,
    log_ticks,
    panels_in,
    positive,
    power_of_ten,
)

# Below these an error, or 1 less a cosine, is one of rounding in single precision.
_ROUNDING = 1e-5, 1e-10

_COSTS = {
    "seconds": (1e6, "time a step, µs"),
    "flops": (1.0, "operations a step"),
    "bytes": (1 / 1024, "temporary memory, KiB"),
}

_HOLLOW = {"linestyle": "", "markerfacecolor": "white"}
_DASH = {"marker": "_", "markersize": 12}


def plot_scoreboard(scoreboard: Scoreboard, *, cost: str = "seconds", ax: Ax = None) -> Drawing:
    r"""What accuracy costs: the error of every gradient against time, operations or memory, and how far its direction is off.

    ‖g − g*‖ / ‖g*‖ on the left and 1 − cos ∠(g, g*) on the right, log-log: the lower left corner is best.

    Three methods or more whose names differ in one number, such as truncations, are joined by a line, with the number beside the
    points. Below a random one a hollow marker shows the error of the mean of all draws, its bias, and a dash the standard error
    of that: a bias near the dash may be none. What differs from the exact gradient by no more than float32 rounds is drawn at the
    bottom; a method whose operations can't be counted is left out of a figure of them.

    Args:
        scoreboard: from `score_gradients`.
        cost: what is on the horizontal axis: `"seconds"` or `"flops"`, both a time step, or `"bytes"`.
        ax: two Axes to draw in; a new figure by default.

    Returns:
        A `Drawing`; the artists are, for each method or family of them, lines such as `"uoro error"` and `"uoro cosine"`, and of
        random ones `"uoro bias"` and `"uoro standard error"`.

    Raises:
        ValueError: another `cost`, `ax` of another number of Axes.

    Example:
        >>> from functools import partial
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> cell = bptt.elman(2, 4)
        >>> args = cell.init(jax.random.key(0)), cell.initial_carry(), jax.random.normal(jax.random.key(1), (20, 2))
        >>> scans = {f"K = {K}": partial(bptt.truncated_scan, truncation_length=K) for K in (1, 2, 4)}
        >>> board = bptt.score_gradients(cell, *args, lambda h, ys: jnp.mean(ys**2), scans=scans)
        >>> list(plots.plot_scoreboard(board, cost="flops").artists)
        ['scan error', 'scan cosine', 'K = 1 … 4 error', 'K = 1 … 4 cosine']
    """
    if cost not in _COSTS:
        raise ValueError(f"cost is {cost!r}: pass one of {', '.join(map(repr, _COSTS))}.")
    scale, x_label = _COSTS[cost]
    errors, cosines = panels = panels_in(ax, 2, width=10.0, height=4.8)
    rows = (scoreboard.exact, *scoreboard.rows)
    most = max(row.draws for row in rows)
    off = [row.relative_error for row in rows], [1 - row.cosine for row in rows]
    off[0].extend(value for row in rows if row.draws > 1 for value in (row.bias, row.standard_error))
    floors = [_floor(values, rounding) for values, rounding in zip(off, _ROUNDING, strict=True)]
    artists: dict[str, Any] = {}
    families = _families(rows)
    # Of those that coincide the smaller is drawn last.
    sizes = np.linspace(11, 6, len(families))
    numbered = []
    for i, ((name, members), size) in enumerate(zip(families.items(), sizes, strict=True)):
        marker = MARKERS[(i + i // len(MARKERS)) % len(MARKERS)]
        style: dict[str, Any] = {"color": colour(i - 1) if i else "0.2", "marker": marker, "markersize": size}
        joined: dict[str, Any] = (
            {"markersize": 6, "linewidth": 1.2, "linestyle": "-"} if len(members) > 1 else {"linestyle": ""}
        )
        at = positive(_column(members, cost) * scale)
        joined["label"] = name if np.isfinite(at).any() else "_"  # of what is not drawn nothing is said
        drawn = _column(members, "relative_error"), 1 - _column(members, "cosine")
        for axes, values, floor, what in zip(panels, drawn, floors, ("error", "cosine"), strict=True):
            values = _at_least(floor, values)
            (artists[f"{name} {what}"],) = axes.plot(at, values, **style | joined)
            if len(members) > 1:
                numbered.append((axes, list(members), at, values, style["color"]))
        if max(row.draws for row in members.values()) > 1:
            fields = "relative_error", "bias", "standard_error"
            values = [_at_least(floors[0], _column(members, field)) for field in fields]
            artists |= {f"{name} {what}": artist for what, artist in _draw_bias(errors, at, *values, style).items()}
    for axes, floor in zip(panels, floors, strict=True):
        axes.set_xscale("log")
        axes.margins(x=0.1)
        axes.xaxis.set_minor_formatter(NullFormatter())
        log_ticks(axes.xaxis, *(extremes(line.get_xdata() for line in axes.lines) or (1.0, 1.0)))
        _log_errors(axes, floor)
    for family in numbered:
        _write_numbers(*family)
    label_axes(errors, "", x_label, "relative error ‖g − g*‖ / ‖g*‖")
    label_axes(cosines, "", x_label, "1 − cosine of g and g*")
    mean: dict[str, Any] = {"color": "0.3", "marker": "o"} | _HOLLOW
    handles = (
        Line2D([], [], label=f"mean of {most} draws", **mean),
        Line2D([], [], label="its standard error", **mean | _DASH),
    )
    add_legend(panels[:1], ax, handles=handles if most > 1 else ())
    return drawing(panels, artists)


def _column(members: Mapping[str, ScoreboardRow], field: str) -> np.ndarray:
    return np.array([getattr(row, field) for row in members.values()], float)


def _draw_bias(axes: Axes, at: Any, error: Any, bias: Any, standard_error: Any, style: Any) -> dict[str, Any]:
    """What is left of the error of random gradients in their mean."""
    (mean,) = axes.plot(at, bias, **style | _HOLLOW)
    (dash,) = axes.plot(at, standard_error, **style | _HOLLOW | _DASH)
    axes.vlines(at, np.fmin(bias, standard_error), error, style["color"], ":", zorder=1)
    return {"bias": mean, "standard error": dash}


def _families(rows: Iterable[ScoreboardRow]) -> dict[str, dict[str, ScoreboardRow]]:
    """Rows by name; three or more whose names differ in one number alone together, by that number."""
    alike: dict[Any, dict[str, ScoreboardRow]] = {}
    for row in rows:
        parts = re.split(r"(\d+)", row.name)
        before, number, after = parts if len(parts) == 3 else (row.name, "", "")
        alike.setdefault((before, after), {})[number] = row
    families = {}
    for (before, after), members in alike.items():
        if len(members) < 3:
            families |= {row.name: {"": row} for row in members.values()}
        else:
            numbers = sorted(members, key=int)
            families[f"{before}{numbers[0]} … {numbers[-1]}{after}"] = {number: members[number] for number in numbers}
    return families


def _floor(values: Any, rounding: float) -> float | None:
    """Where what is below rounding is drawn: a decade below the others; `None` if there is no such value."""
    values = np.asarray(values, float)
    others = values[np.isfinite(values) & (values >= rounding)]
    if not (values < rounding).any():
        return None
    return 10.0 ** (np.floor(np.log10(others.min())) - 1) if others.size else rounding


def _at_least(floor: float | None, values: Any) -> np.ndarray:
    values = finite(values)
    return positive(values if floor is None else np.maximum(values, floor))


def _log_errors(axes: Axes, floor: float | None) -> None:
    """A logarithmic axis of errors, whose lowest tick says that there is none."""
    low, high = extremes(line.get_ydata() for line in axes.lines) or (0.1, 1.0)
    axes.set_yscale("log")
    axes.set_ylim(low / 2, high * 2)
    if floor is None:
        log_ticks(axes.yaxis, low, high)
        return
    first, last = np.ceil(np.log10(floor)) + 1, np.floor(np.log10(high * 2))
    powers = np.arange(first, last + 1)[:: int(max(1, (last - first) // 6 + 1))]
    axes.yaxis.set_major_locator(FixedLocator([floor, *10.0**powers]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_yticklabels(["rounding", *map(power_of_ten, powers)])


def _write_numbers(axes: Axes, numbers: list[str], at: np.ndarray, values: np.ndarray, ink: str) -> None:
    """Numbers beside the points of a line, the first and the last one, and those between that have room."""
    places = axes.transAxes.inverted().transform(axes.transData.transform(np.column_stack([at, values])))
    written: list[int] = []
    for i in dict.fromkeys([0, len(numbers) - 1, *range(len(numbers))]):
        near = any((np.abs(places[i] - places[j]) < (0.06, 0.05)).all() for j in written)
        if np.isfinite(places[i]).all() and not near:
            written.append(i)
            axes.annotate(
                numbers[i], (at[i], values[i]), (7, -3), textcoords="offset points", fontsize="small", color=ink
            )
