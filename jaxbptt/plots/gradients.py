r"""Figures of the gradient through time, and of the methods of taking it against the reference.

Figures of truncated gradients are in `truncation`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import NullFormatter

from jaxbptt.analysis.certificate import Certificate
from jaxbptt.analysis.flow import GradientFlow
from jaxbptt.plots.figure import (
    COLOURS,
    DASHES,
    Ax,
    Drawing,
    add_legend,
    artist_name,
    by_name,
    colour,
    drawing,
    extremes,
    label_axes,
    log_ticks,
    panels_in,
    positive,
    time_unit,
)


def plot_gradient_flow(
    flows: GradientFlow | Mapping[str, GradientFlow],
    *,
    ax: Ax = None,
    dt: float | None = None,
    unit: str | None = None,
) -> Drawing:
    r"""Gradient magnitude against time step, log scale; several cells in one panel.

    ‖∂L/∂hₜ‖ (line) and, for a loss at more than the last step, the term through yₜ alone (dots)

    Steps where the norm is exactly 0 are left out, since it has no logarithm.

    Args:
        flows: from `gradient_flow`, or several by name.
        ax: the Axes to draw in; a new figure by default.
        dt: the time from one step to the next, for axes in a unit of time; time steps by default.
        unit: what `dt` is given in, such as `"s"`.

    Returns:
        A `Drawing`; the artists are the lines `"norms"` and `"immediate"`, or of several `"lstm"` and `"lstm immediate"`.

    Raises:
        ValueError: `ax` of more than one Axes, `dt` that is not above 0, `unit` without `dt`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> cell = bptt.elman(3, 4)
        >>> args = cell.init(jax.random.key(0)), cell.initial_carry(), jnp.ones((20, 3))
        >>> flow = bptt.gradient_flow(cell, *args, lambda h, ys: jnp.sum(ys[-1]))
        >>> drawing = plots.plot_gradient_flow({"elman": flow}, dt=0.02, unit="s")
        >>> drawing.axes[0].get_xlabel(), len(drawing.artists["elman"].get_ydata())
        ('time t (s)', 20)
    """
    time = time_unit(dt, unit)
    (axes,) = panels = panels_in(ax, 1, width=8.0)
    artists: dict[str, Any] = {}
    handles: list[Line2D] = []
    for i, (label, flow) in enumerate(by_name(flows).items()):
        norms, immediate = positive(flow.norms), positive(flow.immediate_norms)
        at = time.times(np.arange(1, len(norms) + 1))
        style: dict[str, Any] = {"color": colour(i), "linestyle": DASHES[i % len(DASHES)]}
        if len(at) == 1:
            style["marker"] = "o"  # a line through one point is not seen
        dots = np.isfinite(immediate).sum() > 1
        style["label"] = label or ("in full" if dots else "_")  # one line that has no name needs no legend
        (artists[label or "norms"],) = axes.plot(at, norms, linewidth=1.8, **style)
        if dots:
            style = {"color": style["color"], "markersize": 4}
            (artists[artist_name(label, "immediate")],) = axes.plot(at, immediate, ".", **style)
            handles = [Line2D([], [], linestyle="", marker=".", color="0.3", label="through yₜ alone")]
    axes.set_yscale("log")
    log_ticks(axes.yaxis, *(extremes(positive(line.get_ydata()) for line in axes.lines) or (1.0, 1.0)))
    label_axes(axes, "Gradient flow through time", time.label("time step t", "time t"), "gradient magnitude ‖∂L/∂hₜ‖")
    add_legend(panels, ax, handles=handles)
    return drawing(panels, artists)


def plot_certificate(certificate: Certificate, *, ax: Ax = None) -> Drawing:
    """Largest relative error, temporary memory and run time of every method of taking the gradient, in three panels.

    Args:
        certificate: from `certify`. The tolerance is drawn as a line; an error of exactly 0 is written out.
        ax: three Axes to draw in; a new figure by default.

    Returns:
        A `Drawing`; the artists are the line `"tolerance"` and, for each method, a marker or words such as `"scan error"`,
        and the markers `"scan memory"` and `"scan time"`.

    Raises:
        ValueError: `ax` of another number of Axes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> cell = bptt.elman(3, 4)
        >>> args = cell.init(jax.random.key(0)), cell.initial_carry(), jnp.ones((20, 3))
        >>> drawing = plots.plot_certificate(bptt.certify(cell, *args, lambda h, ys: jnp.sum(ys)))
        >>> [axes.get_xlabel() for axes in drawing.axes]
        ['largest relative error', 'temporary memory, KiB', 'time, ms']
    """
    rows = certificate.rows
    panels = panels_in(ax, 3, width=10.0, height=1.2 + 0.42 * len(rows), sharey=True)
    errors, memory, seconds = panels
    artists: dict[str, Any] = {}
    places = range(len(rows))
    for place, row in zip(places, rows, strict=True):
        style: dict[str, Any] = (
            {"color": COLOURS[0], "marker": "o"} if row.agrees else {"color": COLOURS[1], "marker": "X"}
        )
        style["markersize"] = 8
        if 0 < row.largest_error < np.inf:
            (artists[f"{row.name} error"],) = errors.plot(row.largest_error, place, **style)
        else:
            words = {0.0: "0, exactly", np.inf: "infinite"}.get(row.largest_error, "not a number")
            transform = errors.get_yaxis_transform()
            artists[f"{row.name} error"] = errors.text(0.04, place, words, transform=transform, va="center")
        (artists[f"{row.name} memory"],) = memory.plot(row.temporary_bytes / 1024, place, **style)
        (artists[f"{row.name} time"],) = seconds.plot(row.seconds * 1e3, place, **style)
    artists["tolerance"] = errors.axvline(
        certificate.tolerance, color=COLOURS[4], linestyle="--", label=f"agrees up to {certificate.tolerance:.0e}"
    )
    errors.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    for axes in panels:
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in (memory, seconds):
        log_ticks(axes.xaxis, *axes.get_xlim())
    errors.set_xlim(
        min([certificate.tolerance * 1e-4, *(r.largest_error / 3 for r in rows if r.largest_error > 0)]), None
    )
    for axes in panels:
        axes.set_yticks(places, [row.name for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
    label_axes(errors, "", "largest relative error", "")
    label_axes(memory, "", "temporary memory, KiB", "")
    label_axes(seconds, "", "time, ms", "")
    return drawing(panels, artists)
