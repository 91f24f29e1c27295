r"""Figures of truncation: which paths a strategy keeps, what each lag contributes, how large the bias is."""

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from jaxbptt.plots.figure import (
    COLOURS,
    DASHES,
    FEW,
    MARKERS,
    NEUTRAL,
    by_name,
    colour,
    extremes,
    finite,
    label_axes,
    legend_below,
    length_axis,
    new_figure,
    positive,
    step_ticks,
)

# With more lags than this, bars are too thin to be told apart.
_MANY_BARS = 60


def plot_surviving_paths(tables: Any) -> Figure:
    r"""Which ∂Lₜ/∂hₛ a strategy keeps: rows are losses, columns states; several strategies beside each other.

    Above the diagonal the loss comes before the state: there is no path.

    Args:
        tables: from `surviving_paths`, or several by name.

    Returns:
        A matplotlib `Figure`.

    Example:
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> table = bptt.surviving_paths(bptt.truncated_scan, 6, truncation_length=3)
        >>> figure = plots.plot_surviving_paths({"chunks of 3": table})
        >>> figure.axes[0].get_xlabel()
        'state hₛ, step s'
    """
    named = {name: np.asarray(table, bool) for name, table in by_name(tables).items()}
    figure, panels = new_figure(len(named), width=0.6 + 3.2 * len(named), height=4.2, sharey=True)
    for axes, (name, kept) in zip(panels, named.items(), strict=True):
        steps = len(kept)
        shown = np.where(np.tril(np.ones_like(kept)), kept, np.nan)
        edges = np.arange(steps + 1) + 0.5
        lines: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.6} if steps <= 40 else {}
        axes.pcolormesh(edges, edges, shown, cmap=ListedColormap([NEUTRAL, COLOURS[0]]), vmin=0, vmax=1, **lines)
        axes.set_aspect("equal")
        axes.set_ylim(steps + 0.5, 0.5)
        step_ticks(axes.xaxis, axes.yaxis)
        label_axes(axes, name, "state hₛ, step s", "")
        axes.grid(visible=False)
    panels[0].set_ylabel("loss Lₜ, step t")
    handles = [Patch(color=COLOURS[0], label="kept"), Patch(color=NEUTRAL, label="cut")]
    legend_below(figure, handles=handles)
    return figure


def plot_truncation_bias(biases: Any) -> Figure:
    r"""Relative norm and cosine of the error of truncated gradients against the truncation length K.

    ‖g_K − g‖ / ‖g‖ on the left, log-log; the cosine between g_K and g on the right, 1 where the direction is exact.

    Errors of exactly 0 are left out, since they have no logarithm.

    Args:
        biases: `TruncationBias` from `truncation_bias`, or several by name.

    Returns:
        A matplotlib `Figure`.

    Example:
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> power = lambda w, h, x: (w * h, w * h)
        >>> bias = bptt.truncation_bias(power, 0.2, 0.9, None, lambda h, ys: ys[-1], length=3)
        >>> figure = plots.plot_truncation_bias(bias)
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['windowed', 'truncated']

    References:
        Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent network trajectories,
        1990, doi:10.1162/neco.1990.2.4.490.
    """
    figure, (errors, cosines) = new_figure(2, width=10.0, height=4.4)
    named = by_name(biases)
    lengths = np.unique(np.concatenate([np.asarray(bias.lengths) for bias in named.values()]))
    for i, (name, bias) in enumerate(named.items()):
        x = np.asarray(bias.lengths)
        for j, kind in enumerate(("windowed", "truncated")):
            curve = getattr(bias, kind)
            style: dict[str, Any] = {"color": colour(i), "linestyle": DASHES[j], "label": f"{name} {kind}".strip()}
            if len(x) <= FEW:
                # Where the two coincide, the hollow square shows around the circle.
                style |= {"marker": "o"} if j == 0 else {"marker": "s", "markersize": 9, "markerfacecolor": "none"}
            errors.plot(x, positive(curve.relative_errors), **style)
            cosines.plot(x, finite(curve.cosines), **style)
    for axes in (errors, cosines):
        length_axis(axes, lengths)
    if any(np.isfinite(line.get_ydata()).any() for line in errors.lines):
        errors.set_yscale("log")
    _room_for_cosines(cosines)
    label_axes(errors, "relative norm of the error", "truncation length K, time steps", "‖g_K − g‖ / ‖g‖")
    label_axes(cosines, "direction", "truncation length K, time steps", "cosine of g_K and g")
    legend_below(figure, errors, columns=min(len(named), 4) if len(named) > 1 else 2)
    return figure


def plot_lag_contributions(lags: Any) -> Figure:
    r"""What each lag contributes to the gradient, log scale, and how close the sum of lags up to it is to the whole.

    ‖G⁽ˡ⁾‖ on the left; on the right ‖Σₖ G⁽ᵏ⁾ − g‖ / ‖g‖ and the cosine between Σₖ G⁽ᵏ⁾ and g, with the lags k ≤ l

    Bars for a single result, or an area where there are too many lags for bars; lines for several results.

    Args:
        lags: `LagContributions` from `lag_contributions`, or several by name.

    Returns:
        A matplotlib `Figure`.

    Example:
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> power = lambda w, h, x: (w * h, w * h)
        >>> lags = bptt.lag_contributions(power, 0.2, 0.9, None, lambda h, ys: ys[-1], length=3)
        >>> figure = plots.plot_lag_contributions(lags)
        >>> [f"{bar.get_height():.3f}" for bar in figure.axes[0].patches]
        ['0.036', '0.036', '0.036']

    References:
        Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent network trajectories,
        1990, doi:10.1162/neco.1990.2.4.490.
    """
    figure, (sizes, sums) = new_figure(2, width=10.0, height=4.4)
    named = by_name(lags)
    several = len(named) > 1
    for i, (name, result) in enumerate(named.items()):
        norms = positive(result.norms)
        x = np.arange(len(norms))
        style: dict[str, Any] = {"color": colour(i), "linewidth": 1.8}
        if several:
            style |= {"marker": MARKERS[i % len(MARKERS)], "markersize": 5, "markevery": max(1, len(x) // 8)}
            sizes.plot(x, norms, label=name, **style)
        elif len(x) <= _MANY_BARS:
            sizes.bar(x, norms, width=0.8, color=colour(i))
        else:
            sizes.stairs(norms, np.arange(len(x) + 1) - 0.5, fill=True, color=colour(i))
        if len(x) == 1:
            style["marker"] = MARKERS[i % len(MARKERS)]  # a line through one point is invisible
        sums.plot(x, finite(result.cosines), DASHES[0], **style)
        style["color"] = colour(i) if several else COLOURS[1]
        sums.plot(x, finite(result.relative_errors), DASHES[1], **style)
    _log_sizes(sizes, extremes(positive(result.norms) for result in named.values()))
    for axes in (sizes, sums):
        step_ticks(axes.xaxis)
    title = next(iter(named)) if not several else ""
    label_axes(sizes, title, "lag l, time steps", "norm of its contribution ‖G⁽ˡ⁾‖")
    label_axes(sums, "", "lag l, time steps", "sum of the lags up to l, against the gradient")
    inks = ("0.3", "0.3") if several else COLOURS
    quantities = zip(DASHES, inks, ("cosine", "relative error"), strict=False)
    handles = [Line2D([], [], linestyle=dash, color=ink, label=text) for dash, ink, text in quantities]
    legend_below(figure, sizes, handles=handles, columns=6)
    return figure


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
