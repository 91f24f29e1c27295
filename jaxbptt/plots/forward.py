r"""Figures of gradients taken forward in time: what an influence is, what it keeps, and what accuracy costs."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullFormatter, NullLocator

from jaxbptt.analysis.scoreboard import Scoreboard, ScoreboardRow
from jaxbptt.plots.figure import (
    DASHES,
    FEW,
    MARKERS,
    NEUTRAL,
    Ax,
    Drawing,
    add_legend,
    artist_name,
    by_name,
    colour,
    drawing,
    extremes,
    finite,
    label_axes,
    log_ticks,
    panels_in,
    positive,
    power_of_ten,
    time_unit,
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
    bottom.

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
    off = [row.relative_error for row in rows] + [row.bias for row in rows], [1 - row.cosine for row in rows]
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


def plot_kept_contributions(kept: Any, *, ax: Ax = None, dt: float | None = None, unit: str | None = None) -> Drawing:
    r"""How much of the gradient each influence keeps, by lag: direction and size of its part G̃⁽ˡ⁾ of the exact G⁽ˡ⁾.

    Cosine of G̃⁽ˡ⁾ and G⁽ˡ⁾ on the left, in grey how large G⁽ˡ⁾ is where all results have the same; ‖G̃⁽ˡ⁾‖ / ‖G⁽ˡ⁾‖ on the right.

    Args:
        kept: `KeptContributions` from `kept_contributions`, or several by name. With a leading axis of draws, as `jax.vmap` over
            keys gives them, the mean and a band of a standard deviation are drawn.
        ax: two Axes to draw in; a new figure by default.
        dt: the time from one step to the next, for lags in a unit of time; time steps by default.
        unit: what `dt` is given in, such as `"s"`.

    Returns:
        A `Drawing`; the artists are the lines `"cosine"` and `"norm ratio"`, or of several `"snap(1) cosine"` and so on, with draws
        the bands `"cosine band"` and `"norm ratio band"`, and the area `"exact norms"`.

    Raises:
        ValueError: `ax` of another number of Axes, `dt` that is not above 0, `unit` without `dt`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> cell = bptt.elman(2, 4)
        >>> xs, loss = jax.random.normal(jax.random.key(1), (12, 2)), lambda h, hs: jnp.mean(hs**2)
        >>> @jax.jit
        ... def kept(params):
        ...     args = cell, params, cell.initial_carry(), xs, loss
        ...     return bptt.kept_contributions(*args, influence=bptt.influences.snap(1))
        >>> list(plots.plot_kept_contributions({"snap(1)": kept(cell.init(jax.random.key(0)))}).artists)
        ['snap(1) cosine', 'snap(1) norm ratio', 'exact norms']
    """
    time = time_unit(dt, unit)
    cosines, ratios = panels = panels_in(ax, 2, width=10.0, height=4.4)
    artists: dict[str, Any] = {}
    named = by_name(kept)
    for i, (name, result) in enumerate(named.items()):
        for axes, values, what in (
            (cosines, finite(result.cosines), "cosine"),
            (ratios, positive(result.norm_ratios), "norm ratio"),
        ):
            x = time.times(np.arange(values.shape[-1]))
            style: dict[str, Any] = {"color": colour(i), "linestyle": DASHES[i % len(DASHES)], "label": name}
            style["marker"] = MARKERS[i % len(MARKERS)] if len(x) <= FEW else ""
            middle, spread = _mean_and_deviation(values)
            (artists[artist_name(name, what)],) = axes.plot(x, middle, linewidth=1.8, markersize=5, **style)
            if values.ndim > 1:
                # On a logarithmic axis a band may not reach 0.
                low = middle - spread if axes is cosines else np.maximum(middle - spread, middle / 10)
                band = axes.fill_between(x, low, middle + spread, color=colour(i), alpha=0.15, linewidth=0)
                artists[artist_name(name, f"{what} band")] = band
    norms = [
        np.reshape(finite(result.exact_norms), (-1, np.shape(result.exact_norms)[-1]))[0] for result in named.values()
    ]
    if (
        norms
        and all(np.array_equal(other, norms[0], equal_nan=True) for other in norms)
        and np.nanmax(norms[0], initial=0)
    ):
        edges = time.times(np.arange(len(norms[0]) + 1) - 0.5)
        share = norms[0] / np.nanmax(norms[0])
        style = {
            "fill": True,
            "color": NEUTRAL,
            "alpha": 0.5,
            "zorder": 0,
            "label": "size of the exact part, largest 1",
        }
        artists["exact norms"] = cosines.stairs(share, edges, **style)
    ratios.set_yscale("log")
    ratios.axhline(1, color="0.6", linewidth=1, zorder=1)
    log_ticks(ratios.yaxis, *(extremes(line.get_ydata() for line in ratios.lines) or (1.0, 1.0)))
    cosines.set_ylim(min(-0.05, 1.1 * (extremes(line.get_ydata() for line in cosines.lines) or (0, 0))[0]), 1.05)
    time.ticks(cosines.xaxis, ratios.xaxis)
    lag = time.label("lag l, time steps", "lag l")
    label_axes(cosines, "", lag, "cosine of kept and exact part")
    label_axes(ratios, "", lag, "‖kept part‖ / ‖exact part‖")
    add_legend(panels[:1], ax)
    return drawing(panels, artists)


def _mean_and_deviation(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over draws, where there are any; what no draw has is nan."""
    drawn = np.atleast_2d(values)
    some = np.isfinite(drawn).any(0)
    middle, spread = np.full((2, drawn.shape[-1]), np.nan)
    middle[some], spread[some] = np.nanmean(drawn[:, some], 0), np.nanstd(drawn[:, some], 0)
    return middle, spread


def plot_influence(influences: Any, *, steps: Any = None, ax: Ax = None) -> Drawing:
    r"""The influence dcₜ/dθ as a picture at several time steps, one above the other, on one scale: red above 0 and blue below.

    Rows are the numbers of the carry, columns the weights; lines separate the leaves, and within a leaf what its first axis counts.

    Args:
        influences: of a leaf of the params, `[time, carry, *leaf]`, or of several by name.
        steps: time steps to draw, the first is 1; by default six of them, evenly.
        ax: the Axes to draw in, one for each time step; a new figure by default.

    Returns:
        A `Drawing`; the artists are the images `"t = 1"` and so on, and the scale, `"colour bar"`.

    Raises:
        ValueError: leaves without those axes or of different lengths, time steps that there are none of, `ax` of another number of
            Axes.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> cell = bptt.elman(2, 3)
        >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (8, 2))
        >>> M = jax.jacrev(lambda params: bptt.scan(cell, params, cell.initial_carry(), xs)[1])(params)
        >>> drawing = plots.plot_influence({"W_xh": M.W_xh, "W_hh": M.W_hh, "b": M.b}, steps=[1, 4, 8])
        >>> [axes.get_ylabel() for axes in drawing.axes]
        ['t = 1', 't = 4', 't = 8']
    """
    named = {name: finite(leaf) for name, leaf in by_name(influences).items()}
    _check_influences(named)
    length, n = next(iter(named.values())).shape[:2]
    chosen = np.unique(np.linspace(1, length, min(6, length)).round().astype(int)) if steps is None else np.ravel(steps)
    if not len(chosen) or not all(step in range(1, length + 1) for step in chosen):
        raise ValueError(
            f"steps are {[*chosen]}: pass time steps between 1 and {length}, for which there is an influence."
        )
    whole = np.concatenate([leaf.reshape(length, n, -1) for leaf in named.values()], -1)[chosen - 1]
    limit = float(np.max(np.abs(extremes([whole]) or (0.0, 0.0)))) or 1.0
    palette = matplotlib.colormaps["RdBu_r"].with_extremes(bad=NEUTRAL)
    style: dict[str, Any] = {"cmap": palette, "vmin": -limit, "vmax": limit, "interpolation": "none", "aspect": "auto"}
    height = float(np.clip(5 * n / whole.shape[-1], 0.5, 2.0))
    panels = panels_in(
        ax, len(chosen), width=9.0, height=0.6 + (height + 0.15) * len(chosen), stacked=True, sharex=True
    )
    artists: dict[str, Any] = {}
    for axes, step, matrix in zip(panels, chosen, whole, strict=True):
        artists[f"t = {step}"] = axes.imshow(matrix, **style)
        label_axes(axes, "", "", f"t = {step}")
        axes.spines[["top", "right"]].set_visible(True)
        axes.grid(visible=False)
        axes.set_yticks([])
        axes.tick_params(bottom=False, labelbottom=axes is panels[-1] or ax is not None)
        centres = _separate(axes, named)
        axes.set_xticks(centres, list(named))
    bar = panels[0].figure.colorbar(next(iter(artists.values())), ax=panels, label="dcₜ/dθ", aspect=30)
    return drawing(panels, artists | {"colour bar": bar})


def _check_influences(named: Mapping[str, np.ndarray]) -> None:
    sizes = {leaf.shape[:2] for leaf in named.values()}
    if len(sizes) != 1 or len(next(iter(sizes))) != 2 or not all(leaf.size for leaf in named.values()):
        shapes = ", ".join(f"{name} {leaf.shape}".strip() for name, leaf in named.items()) or "none"
        raise ValueError(f"influences are of shapes {shapes}: pass [time, carry, *leaf], of one length and one carry.")


def _separate(axes: Axes, named: Mapping[str, np.ndarray]) -> list[float]:
    """Lines between leaves, thin ones within them; where the names of the leaves go."""
    start, centres = 0, []
    for leaf in named.values():
        size = int(np.prod(leaf.shape[2:], dtype=int))
        if leaf.ndim > 3:
            for between in np.arange(start, start + size, size // leaf.shape[2])[1:]:
                axes.axvline(between - 0.5, color="0.6", linewidth=0.5)
        if start:
            axes.axvline(start - 0.5, color="black", linewidth=1.2)
        centres.append(start + size / 2 - 0.5)
        start += size
    return centres
