r"""Figures of truncation: which paths a strategy keeps, what each lag contributes, how large the bias is."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxbptt.plots.figure import (
    COLOURS,
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
    label_y,
    length_axis,
    panels_in,
    positive,
    time_unit,
)

# With more lags than this, bars are too thin to be told apart.
_MANY_BARS = 60


def plot_surviving_paths(tables: Any, *, ax: Ax = None, dt: float | None = None, unit: str | None = None) -> Drawing:
    r"""Which ∂Lₜ/∂hₛ a strategy keeps: rows are losses, columns states; several strategies beside each other.

    Above the diagonal the loss comes before the state: there is no path.

    Args:
        tables: from `surviving_paths`, or several by name.
        ax: the Axes to draw in, one for each name; a new figure by default.
        dt: the time from one step to the next, for axes in a unit of time; time steps by default.
        unit: what `dt` is given in, such as `"s"`.

    Returns:
        A `Drawing`; the artists are the meshes, `"paths"` or by name: 1 for a path that is kept, 0 for one that is cut.

    Raises:
        ValueError: `ax` of another number of Axes, `dt` that is not above 0, `unit` without `dt`.

    Example:
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> table = bptt.surviving_paths(bptt.truncated_scan, 6, truncation_length=3)
        >>> drawing = plots.plot_surviving_paths({"chunks of 3": table})
        >>> drawing.axes[0].get_xlabel()
        'state hₛ, step s'
    """
    named = {name: np.asarray(table, bool) for name, table in by_name(tables).items()}
    time = time_unit(dt, unit)
    panels = panels_in(ax, len(named), width=0.6 + 3.2 * len(named), height=4.2, sharey=True)
    artists: dict[str, Any] = {}
    for axes, (name, kept) in zip(panels, named.items(), strict=True):
        steps = len(kept)
        shown = np.where(np.tril(np.ones_like(kept)), kept, np.nan)
        edges = time.times(np.arange(steps + 1) + 0.5)
        style: dict[str, Any] = {"cmap": ListedColormap([NEUTRAL, COLOURS[0]]), "vmin": 0, "vmax": 1}
        style |= {"edgecolors": "white", "linewidth": 0.6} if steps <= 40 else {}
        artists[name or "paths"] = axes.pcolormesh(edges, edges, shown, **style)
        axes.set_aspect("equal")
        axes.set_ylim(edges[-1], edges[0])
        time.ticks(axes.xaxis, axes.yaxis)
        label_axes(axes, name, time.label("state hₛ, step s", "state hₛ, time"), "")
        axes.grid(visible=False)
    label_y(panels, time.label("loss Lₜ, step t", "loss Lₜ, time"), ax)
    handles = [Patch(color=COLOURS[0], label="kept"), Patch(color=NEUTRAL, label="cut")]
    add_legend(panels, ax, handles=handles, loc="upper right")  # above the diagonal there is nothing
    return drawing(panels, artists)


def plot_truncation_bias(biases: Any, *, ax: Ax = None, dt: float | None = None, unit: str | None = None) -> Drawing:
    r"""Relative norm and cosine of the error of truncated gradients against the truncation length K.

    ‖g_K − g‖ / ‖g‖ on the left, log-log; the cosine between g_K and g on the right, 1 where the direction is exact.

    Errors of exactly 0 are left out, since they have no logarithm.

    Args:
        biases: `TruncationBias` from `truncation_bias`, or several by name.
        ax: two Axes to draw in; a new figure by default.
        dt: the time from one step to the next, for lengths in a unit of time; time steps by default.
        unit: what `dt` is given in, such as `"s"`.

    Returns:
        A `Drawing`; the artists are the lines `"windowed error"`, `"windowed cosine"`, `"truncated error"` and
        `"truncated cosine"`, or `"elman windowed error"` and so on.

    Raises:
        ValueError: `ax` of another number of Axes, `dt` that is not above 0, `unit` without `dt`.

    Example:
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> power = lambda w, h, x: (w * h, w * h)
        >>> bias = bptt.truncation_bias(power, 0.2, 0.9, None, lambda h, ys: ys[-1], length=3)
        >>> drawing = plots.plot_truncation_bias(bias)
        >>> list(drawing.artists)
        ['windowed error', 'windowed cosine', 'truncated error', 'truncated cosine']

    References:
        Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent network trajectories,
        1990, doi:10.1162/neco.1990.2.4.490.
    """
    time = time_unit(dt, unit)
    errors, cosines = panels = panels_in(ax, 2, width=10.0, height=4.4)
    artists: dict[str, Any] = {}
    named = by_name(biases)
    lengths = np.unique(np.concatenate([np.asarray(bias.lengths) for bias in named.values()]))
    for i, (name, bias) in enumerate(named.items()):
        x = time.times(np.asarray(bias.lengths))
        for j, kind in enumerate(("windowed", "truncated")):
            curve = getattr(bias, kind)
            style: dict[str, Any] = {"color": colour(i), "linestyle": DASHES[j], "label": artist_name(name, kind)}
            if len(x) <= FEW:
                # Where the two coincide, the hollow square shows around the circle.
                style |= {"marker": "o"} if j == 0 else {"marker": "s", "markersize": 9, "markerfacecolor": "none"}
            label = style["label"]
            (artists[f"{label} error"],) = errors.plot(x, positive(curve.relative_errors), **style)
            (artists[f"{label} cosine"],) = cosines.plot(x, finite(curve.cosines), **style)
    for axes in panels:
        length_axis(axes, lengths, time)
    if any(np.isfinite(line.get_ydata()).any() for line in errors.lines):
        errors.set_yscale("log")
    _room_for_cosines(cosines)
    length = time.label("truncation length K, time steps", "truncation length K")
    label_axes(errors, "relative norm of the error", length, "‖g_K − g‖ / ‖g‖")
    label_axes(cosines, "direction", length, "cosine of g_K and g")
    add_legend(panels[:1], ax, columns=min(len(named), 4) if len(named) > 1 else 2)
    return drawing(panels, artists)


def plot_lag_contributions(lags: Any, *, ax: Ax = None, dt: float | None = None, unit: str | None = None) -> Drawing:
    r"""What each lag contributes to the gradient, log scale, and how close the sum of lags up to it is to the whole.

    ‖G⁽ˡ⁾‖ on the left; on the right ‖Σₖ G⁽ᵏ⁾ − g‖ / ‖g‖ and the cosine between Σₖ G⁽ᵏ⁾ and g, with the lags k ≤ l

    Bars for a single result, or an area where there are too many lags for bars; lines for several results.

    Args:
        lags: `LagContributions` from `lag_contributions`, or several by name.
        ax: two Axes to draw in; a new figure by default.
        dt: the time from one step to the next, for lags in a unit of time; time steps by default.
        unit: what `dt` is given in, such as `"s"`.

    Returns:
        A `Drawing`; the artists are the bars, area or line `"norms"` and the lines `"cosine"` and `"relative error"`, or of
        several `"elman norms"` and so on.

    Raises:
        ValueError: `ax` of another number of Axes, `dt` that is not above 0, `unit` without `dt`.

    Example:
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> power = lambda w, h, x: (w * h, w * h)
        >>> lags = bptt.lag_contributions(power, 0.2, 0.9, None, lambda h, ys: ys[-1], length=3)
        >>> drawing = plots.plot_lag_contributions(lags)
        >>> [f"{bar.get_height():.3f}" for bar in drawing.artists["norms"]]
        ['0.036', '0.036', '0.036']

    References:
        Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent network trajectories,
        1990, doi:10.1162/neco.1990.2.4.490.
    """
    time = time_unit(dt, unit)
    sizes, sums = panels = panels_in(ax, 2, width=10.0, height=4.4)
    artists: dict[str, Any] = {}
    named = by_name(lags)
    several = len(named) > 1
    for i, (name, result) in enumerate(named.items()):
        norms = positive(result.norms)
        x = time.times(np.arange(len(norms)))
        style: dict[str, Any] = {"color": colour(i), "linewidth": 1.8}
        if several:
            style |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 5, "markevery": max(1, len(x) // 8)}
            (drawn,) = sizes.plot(x, norms, label=name, **style)
        elif len(x) <= _MANY_BARS:
            drawn = sizes.bar(x, norms, width=time.times(0.8), color=colour(i))
        else:
            drawn = sizes.stairs(norms, time.times(np.arange(len(x) + 1) - 0.5), fill=True, color=colour(i))
        artists[artist_name(name, "norms")] = drawn
        if len(x) == 1:
            style["marker"] = MARKERS[i % len(MARKERS)]  # a line through one point is invisible
        (artists[artist_name(name, "cosine")],) = sums.plot(x, finite(result.cosines), DASHES[0], **style)
        style["color"] = colour(i) if several else COLOURS[1]
        errors = finite(result.relative_errors)
        (artists[artist_name(name, "relative error")],) = sums.plot(x, errors, DASHES[1], **style)
    _log_sizes(sizes, extremes(positive(result.norms) for result in named.values()))
    time.ticks(sizes.xaxis, sums.xaxis)
    title = next(iter(named)) if not several else ""
    lag = time.label("lag l, time steps", "lag l")
    label_axes(sizes, title, lag, "norm of its contribution ‖G⁽ˡ⁾‖")
    label_axes(sums, "", lag, "sum up to lag l, against the whole")
    inks = ("0.3", "0.3") if several else COLOURS
    quantities = zip(DASHES, inks, ("cosine", "relative error"), strict=False)
    handles = [Line2D([], [], linestyle=dash, color=ink, label=text) for dash, ink, text in quantities]
    if ax is None:
        add_legend([sizes], ax, handles=handles, columns=6)
    else:
        add_legend([sizes], ax)
        add_legend([sums], ax, handles=handles)
    return drawing(panels, artists)


def _log_sizes(axes: Axes, limits: tuple[float, float] | None) -> None:
    """A logarithmic axis for bars, which can't start at 0: it starts a little below the smallest."""
    if limits is not None:
        low, high = limits
        room = max((high / low) ** 0.05, 2.0)
        axes.set_yscale("log")
        axes.set_ylim(max(low / room, np.finfo(float).tiny), min(high * room, np.finfo(float).max))


def _room_for_cosines(axes: Axes) -> None:
    """Limits up to 1, and wide enough that rounding errors don't fill the panel."""
    low, _ = extremes(line.get_ydata() for line in axes.lines) or (0.0, 1.0)
    low = min(low, 0.9)
    axes.set_ylim(low - 0.05 * (1 - low), 1 + 0.05 * (1 - low))
