r"""Figures of the gradient through time, and of the methods of taking it against the reference.

Figures of truncated gradients are in `truncation`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from jaxbptt.analysis.certificate import Certificate
from jaxbptt.analysis.flow import GradientFlow
from jaxbptt.plots.figure import COLOURS, DASHES, by_name, colour, label_axes, legend_below, new_figure, positive


def plot_gradient_flow(flows: GradientFlow | Mapping[str, GradientFlow]) -> Figure:
    r"""Gradient magnitude against time step, log scale; several cells in one panel.

    ‖∂L/∂hₜ‖ (line) and, for a loss at more than the last step, the term through yₜ alone (dots)

    Steps where the norm is exactly 0 are left out, since it has no logarithm.

    Args:
        flows: from `gradient_flow`, or several by name.

    Returns:
        A matplotlib `Figure`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> cell = bptt.elman(3, 4)
        >>> args = cell.init(jax.random.key(0)), cell.initial_carry(), jnp.ones((20, 3))
        >>> figure = plots.plot_gradient_flow(bptt.gradient_flow(cell, *args, lambda h, ys: jnp.sum(ys[-1])))
        >>> figure.axes[0].get_yscale()
        'log'
    """
    figure, (axes,) = new_figure(1, width=8.0)
    for i, (label, flow) in enumerate(by_name(flows).items()):
        norms, immediate = positive(flow.norms), positive(flow.immediate_norms)
        steps = np.arange(1, len(norms) + 1)
        style: dict[str, Any] = {"color": colour(i), "linestyle": DASHES[i % len(DASHES)]}
        if len(steps) == 1:
            style["marker"] = "o"  # a line through one point is not seen
        axes.plot(steps, norms, label=label or "in full", linewidth=1.8, **style)
        if np.isfinite(immediate).sum() > 1:
            axes.plot(steps, immediate, ".", markersize=4, color=style["color"], label=f"{label} immediate".strip())
    axes.set_yscale("log")
    label_axes(axes, "Gradient flow through time", "time step t", "gradient magnitude ‖∂L/∂hₜ‖")
    legend_below(figure, axes)
    return figure


def plot_certificate(certificate: Certificate) -> Figure:
    """Largest relative error, temporary memory and run time of every method of taking the gradient, in three panels.

    Args:
        certificate: from `certify`. The tolerance is drawn as a line; an error of exactly 0 is written out.

    Returns:
        A matplotlib `Figure`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> cell = bptt.elman(3, 4)
        >>> args = cell.init(jax.random.key(0)), cell.initial_carry(), jnp.ones((20, 3))
        >>> figure = plots.plot_certificate(bptt.certify(cell, *args, lambda h, ys: jnp.sum(ys)))
        >>> [axes.get_xlabel() for axes in figure.axes]
        ['largest relative error', 'temporary memory, KiB', 'time, ms']
    """
    rows = certificate.rows
    figure, (errors, memory, seconds) = new_figure(3, width=10.0, height=1.2 + 0.42 * len(rows), sharey=True)
    places = range(len(rows))
    for place, row in zip(places, rows, strict=True):
        style: dict[str, Any] = (
            {"color": COLOURS[0], "marker": "o"} if row.agrees else {"color": COLOURS[1], "marker": "X"}
        )
        style["markersize"] = 8
        if 0 < row.largest_error < np.inf:
            errors.plot(row.largest_error, place, **style)
        else:
            words = {0.0: "0, exactly", np.inf: "infinite"}.get(row.largest_error, "not a number")
            errors.text(0.04, place, words, transform=errors.get_yaxis_transform(), va="center")
        memory.plot(row.temporary_bytes / 1024, place, **style)
        seconds.plot(row.seconds * 1e3, place, **style)
    errors.axvline(
        certificate.tolerance, color=COLOURS[4], linestyle="--", label=f"agrees up to {certificate.tolerance:.0e}"
    )
    errors.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=9)
    for axes in (errors, memory, seconds):
        axes.set_xscale("log")
        axes.margins(x=0.15)
        axes.xaxis.set_minor_formatter(NullFormatter())
    for axes in (memory, seconds):
        low, high = axes.get_xlim()
        # Within one decade a logarithmic locator may find a single tick.
        axes.xaxis.set_major_locator(
            LogLocator(subs=(1, 3) if high < 30 * low else (1,))
            if high > 10 * low
            else MaxNLocator(3, steps=[1, 2, 5, 10])
        )
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    errors.set_xlim(
        min([certificate.tolerance * 1e-4, *(r.largest_error / 3 for r in rows if r.largest_error > 0)]), None
    )
    errors.set_yticks(places, [row.name for row in rows])
    errors.set_ylim(len(rows) - 0.5, -0.5)
    label_axes(errors, "", "largest relative error", "")
    label_axes(memory, "", "temporary memory, KiB", "")
    label_axes(seconds, "", "time, ms", "")
    return figure
