r"""How the estimate of a Lyapunov exponent settles as the run gets longer."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxbptt.analysis.lyapunov import LyapunovSpectrum
from jaxbptt.plots.figure import (
    COLOURS,
    Ax,
    Drawing,
    add_legend,
    artist_name,
    drawing,
    finite,
    label_axes,
    panels_in,
)

# Before this part of the run an estimate is a mean over a few steps, whose scatter would set the scale.
_SETTLING = 0.002


def plot_lyapunov_convergence(
    spectrum: LyapunovSpectrum, *, indices: Sequence[int] | None = None, theory: Any = None, ax: Ax = None
) -> Drawing:
    r"""The estimate of each exponent after t time steps, and the last one with a band of two standard errors.

    mean of log |R_{s,ii}| over the steps s ≤ t that are measured

    Args:
        spectrum: from `lyapunov_exponents`.
        indices: which exponents, counted from 1, one panel for each; by default the first two.
        theory: known values to compare with, one for each of the exponents that are drawn.
        ax: the Axes to draw in, one for each exponent; a new figure by default.

    Returns:
        A `Drawing`; the artists are `"λ1"` (the line), `"λ1 last"` (the band) and, where there is one, `"λ1 theory"`, and
        so on for the others.

    Raises:
        ValueError: an index that the spectrum does not have, `theory` or `ax` of another number.

    Example:
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> logistic = lambda r, x, _: (r * x * (1 - x), None)
        >>> spectrum = bptt.lyapunov_exponents(logistic, 4.0, 0.3, length=2_000, burn_in=200)
        >>> drawing = plots.plot_lyapunov_convergence(spectrum, theory=[0.693])
        >>> list(drawing.artists)
        ['λ1', 'λ1 last', 'λ1 theory']
    """
    count = len(spectrum.exponents)
    chosen = list(range(1, min(count, 2) + 1) if indices is None else indices)
    for i in chosen:
        if not 1 <= i <= count:
            raise ValueError(f"indices has {i}, but the spectrum has the exponents 1 to {count}.")
    known = None if theory is None else np.atleast_1d(finite(theory))
    if known is not None and len(known) != len(chosen):
        raise ValueError(f"theory has {len(known)} values for {len(chosen)} exponents: pass one for each.")
    panels = panels_in(ax, len(chosen), width=8.0, height=1.4 + 1.7 * len(chosen), stacked=True, sharex=True)
    steps, running = np.asarray(spectrum.steps), finite(spectrum.running)
    artists: dict[str, Any] = {}
    for place, (axes, i) in enumerate(zip(panels, chosen, strict=True)):
        name, values = f"λ{i}", running[:, i - 1]
        last, error = (float(np.asarray(of)[i - 1]) for of in (spectrum.exponents, spectrum.standard_errors))
        (artists[name],) = axes.plot(steps, values, color=COLOURS[0], linewidth=1.5, label="estimate so far")
        band: dict[str, Any] = {"color": COLOURS[0], "alpha": 0.2, "label": "last estimate ± 2 standard errors"}
        artists[artist_name(name, "last")] = axes.axhspan(last - 2 * error, last + 2 * error, **band)
        if known is not None:
            line: dict[str, Any] = {"color": COLOURS[1], "linestyle": "--", "label": "theory"}
            artists[artist_name(name, "theory")] = axes.axhline(known[place], **line)
        axes.set_xscale("log")
        axes.set_xlim(max(_SETTLING * steps[-1], steps[0]), steps[-1])
        settled = values[steps >= _SETTLING * steps[-1]]
        reach = 1.2 * np.nanmax(np.abs(settled - last), initial=0)
        if reach > 0:
            axes.set_ylim(last - reach, last + reach)
        label_axes(axes, "", "time steps" if axes is panels[-1] else "", rf"$\lambda_{{{i}}}$, nats per step")
    add_legend(panels, ax)
    return drawing(panels, artists)
