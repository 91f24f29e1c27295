r"""Why a gradient shrinks or grows: the terms of its rate as bars."""

from collections.abc import Mapping
from typing import Any

from jaxbptt.analysis.diagnosis import GradientDiagnosis
from jaxbptt.plots.figure import COLOURS, Ax, Drawing, add_legend, artist_name, by_name, drawing, label_axes, panels_in

_TERMS = {"weights": COLOURS[0], "saturation": COLOURS[4], "alignment": COLOURS[3]}


def plot_gradient_rates(diagnoses: GradientDiagnosis | Mapping[str, GradientDiagnosis], *, ax: Ax = None) -> Drawing:
    r"""What weights, saturation and alignment do to a gradient at each step back, and their sum, which is observed.

    observed = weights + saturation + alignment, nats per step

    Left of 0 a term shrinks the gradient, right of 0 it makes it grow: by −0.69 it halves, by +0.69 it doubles. Rates that
    are not finite are left out.

    Args:
        diagnoses: from `diagnose_gradient`, or several by name.
        ax: the Axes to draw in; a new figure by default.

    Returns:
        A `Drawing`; the artists are the bars `"weights"`, `"saturation"` and `"alignment"` and the line `"observed"`, or of
        several `"lstm weights"` and so on.

    Raises:
        ValueError: `ax` of more than one Axes.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> cell = bptt.elman(3, 4)
        >>> args = cell.init(jax.random.key(0)), cell.initial_carry(), jnp.ones((20, 3))
        >>> diagnosis = bptt.diagnose_gradient(cell, *args, lambda h, ys: jnp.sum(ys[-1]), num_exponents=1)
        >>> list(plots.plot_gradient_rates(diagnosis).artists)
        ['weights', 'saturation', 'alignment', 'observed']
    """
    named = by_name(diagnoses)
    (axes,) = panels = panels_in(ax, 1, width=9.0, height=1.5 + 0.7 * len(named))
    axes.axvline(0, color="0.4", linewidth=0.8)
    artists: dict[str, Any] = {}
    for row, (name, diagnosis) in enumerate(named.items()):
        rates = diagnosis.rates
        for i, (term, ink) in enumerate(_TERMS.items()):
            (bar,) = axes.barh(row + 0.22 * (i - 1), getattr(rates, term), height=0.2, color=ink, label=term)
            artists[artist_name(name, term)] = bar
        (artists[artist_name(name, "observed")],) = axes.plot(
            [rates.observed] * 2, [row - 0.4, row + 0.4], color="black", linewidth=2, label="observed: their sum"
        )
    causes = [f"{name}\n→ {diagnosis.cause}" if name else diagnosis.cause for name, diagnosis in named.items()]
    axes.set_yticks(range(len(named)), causes)
    axes.set_ylim(len(named) - 0.4, -0.6)
    label_axes(axes, "", "change of the gradient at each step back, nats", "")
    axes.grid(visible=False, axis="y")
    add_legend(panels, ax)
    return drawing(panels, artists)
