r"""Curves of a reader's own numbers, drawn as the other figures are: one panel, colours, dashes, one legend.

The other functions take a type of result; what has none, such as a loss against training time, is drawn by this one.
"""

from typing import Any

import numpy as np

from jaxbptt.plots.figure import (
    DASHES,
    FEW,
    MARKERS,
    Ax,
    Drawing,
    add_legend,
    by_name,
    colour,
    drawing,
    finite,
    label_axes,
    length_axis,
    panels_in,
    positive,
    time_unit,
)


def plot_lines(
    lines: Any,
    *,
    x: str = "",
    y: str = "",
    title: str = "",
    xscale: str = "linear",
    yscale: str = "linear",
    markers: bool | None = None,
    ax: Ax = None,
) -> Drawing:
    r"""Several curves in one panel, told apart by colour, dash and marker, with one legend.

    Points that are not finite, or not above 0 on a logarithmic axis, are left out. Few whole numbers on a logarithmic x axis
    get a tick each.

    Args:
        lines: the values of a curve, `[points]`, at 1, 2, …; or a pair of arrays `(x values, y values)`; or several curves
            by name, each in one of these forms.
        x: the label of the horizontal axis.
        y: the label of the vertical axis.
        title: above the panel.
        xscale: `"linear"` or `"log"`.
        yscale: `"linear"` or `"log"`.
        markers: whether every point has a marker; by default where a curve has at most 12 of them.
        ax: the Axes to draw in; a new figure by default.

    Returns:
        A `Drawing`; the artists are the lines, `"line"` or by name.

    Raises:
        ValueError: the two arrays of a curve are not of the same length, `ax` of more than one Axes.

    Example:
        >>> import numpy as np
        >>> from jaxbptt import plots
        >>> steps = np.arange(1, 101)
        >>> drawing = plots.plot_lines({"g = 0.9": 0.9**steps, "g = 0.5": 0.5**steps}, x="lag", y="norm", yscale="log")
        >>> drawing.axes[0].get_yscale(), list(drawing.artists)
        ('log', ['g = 0.9', 'g = 0.5'])
    """
    (axes,) = panels = panels_in(ax, 1, width=8.0)
    artists: dict[str, Any] = {}
    for i, (name, curve) in enumerate(by_name(lines).items()):
        xs, ys = _points(name, curve)
        xs, ys = positive(xs) if xscale == "log" else finite(xs), positive(ys) if yscale == "log" else finite(ys)
        marked = len(xs) <= FEW if markers is None else markers
        style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)] if marked else "", "markersize": 5}
        (artists[name or "line"],) = axes.plot(
            xs, ys, DASHES[i % len(DASHES)], color=colour(i), linewidth=1.8, label=name, **style
        )
    axes.set_xscale(xscale)
    axes.set_yscale(yscale)
    at = np.unique([x for line in artists.values() for x in line.get_xdata() if np.isfinite(x)])
    if xscale == "log" and at.size and (at % 1 == 0).all():
        length_axis(axes, at, time_unit(None, None))  # numbers of steps or the like, written out
    label_axes(axes, title, x, y)
    longest = max(map(len, artists), default=0)
    add_legend(panels, ax, columns=max(1, min(4, 90 // (longest + 6))))  # as many as the width has room for
    return drawing(panels, artists)


def _points(name: str, curve: Any) -> tuple[np.ndarray, np.ndarray]:
    if isinstance(curve, tuple) and len(curve) == 2:
        xs, ys = (np.asarray(values, float) for values in curve)
    else:
        ys = np.asarray(curve, float)
        xs = np.arange(1, ys.size + 1)
    if xs.shape != ys.shape or ys.ndim != 1:
        which = f"curve {name!r}" if name else "the curve"
        raise ValueError(
            f"{which} has {xs.shape} x values and {ys.shape} y values: pass one array of values, or a pair of arrays of "
            "one length, (x, y)."
        )
    return xs, ys
