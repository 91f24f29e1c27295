r"""Figures of Jacobians: what they do to perturbations of the state, over one step, over many, and in the long run.

None of them depends on a loss.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator

from jaxbptt.analysis.jacobians import LogSingularValues
from jaxbptt.analysis.lyapunov import LyapunovSpectrum
from jaxbptt.plots.figure import (
    COLOURS,
    MARKERS,
    NEUTRAL,
    by_name,
    colour,
    extremes,
    finite,
    label_axes,
    legend_below,
    new_figure,
    positive,
    power_of_ten,
    step_ticks,
)


def plot_singular_values(
    values: LogSingularValues | Mapping[str, LogSingularValues],
    *,
    bound_rate: float | Mapping[str, float] | None = None,
    lags: Any = None,
    ranks: int = 8,
) -> Figure:
    r"""Singular values of ∂h_T/∂hₜ against the lag T − t, log scale, one panel for each name.

    With `bound_rate` = γ σ_max(W_hh), the bound σ₁(∂h_T/∂hₜ) ≤ (γ σ_max)^(T−t) of Pascanu et al. (2013) is drawn (γ = 1
    for tanh). Values below the rounding error of the product are left out.

    Args:
        values: from `product_log_singular_values`, or from `singular_values` for several starts; or several by name.
        bound_rate: the rate of the bound, or several by the same names.
        lags: T − s for each start s of `singular_values`; T − 1 … 0, as for `product_log_singular_values`, by default.
        ranks: how many of the n singular values to draw, evenly spaced from the largest to the smallest.

    Returns:
        A matplotlib `Figure`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> J = jnp.tile(0.9 * jnp.eye(3), (20, 1, 1))
        >>> figure = plots.plot_singular_values(bptt.product_log_singular_values(bptt.jacobian_products(J)), bound_rate=0.9)
        >>> figure.axes[0].get_xlabel()
        'lag T − t, time steps'

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, 2013, arXiv:1211.5063.
    """
    values = by_name(values)
    bounds = bound_rate if isinstance(bound_rate, Mapping) else dict.fromkeys(values, bound_rate)
    figure, panels = new_figure(len(values), width=3.6 * len(values) + 1.0, sharey=True)
    for axes, (label, (log_values, resolved)) in zip(panels, values.items(), strict=True):
        # Drawn as powers of ten, since the singular values themselves may be outside the range of floats.
        powers = np.where(resolved, finite(log_values), np.nan) / np.log(10)
        x = np.arange(len(powers))[::-1] if lags is None else np.asarray(lags)
        order = np.argsort(x)
        x, powers = x[order], powers[order]
        drawn = np.unique(np.linspace(0, powers.shape[1] - 1, ranks).round().astype(int))
        for shade, rank in zip(np.linspace(1, 0.35, len(drawn)), drawn, strict=True):
            name = "largest, σ₁" if rank == 0 else "smaller ones, to σₙ" if rank == drawn[-1] else None
            style: dict[str, Any] = {"alpha": shade, "linewidth": 2 if rank == 0 else 1, "label": name}
            axes.plot(x, powers[:, rank], "o" if len(x) == 1 else "-", color=COLOURS[0], **style)
        rate = bounds.get(label)
        if rate is not None:
            axes.plot(x, x * np.log10(positive(rate)), "--", color=COLOURS[1], label="bound (γσ)^lag")
        label_axes(axes, label, "lag T − t, time steps", "")
        axes.yaxis.set_major_formatter(power_of_ten)
    panels[0].set_ylabel("singular values of ∂h_T/∂hₜ")
    legend_below(figure, *panels)
    return figure


def plot_lyapunov_spectrum(spectra: LyapunovSpectrum | Mapping[str, LyapunovSpectrum], *, theory: Any = None) -> Figure:
    r"""Lyapunov exponents, largest first, with error bars of two standard errors.

    λᵢ ± 2 sᵢ against i; against i/k where several spectra differ in their number of exponents k

    Above the line at 0 perturbations grow, below it they shrink. Exponents that are not resolved are hollow; those of −∞
    are left out.

    Args:
        spectra: from `lyapunov_exponents`, or several by name.
        theory: exponents to compare with, `[m]`, largest first: a dashed line over the same range of indices, whatever m.

    Returns:
        A matplotlib `Figure`.

    Example:
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> logistic = lambda r, x, _: (r * x * (1 - x), None)
        >>> spectrum = bptt.lyapunov_exponents(logistic, 3.2, 0.3, length=1_000, burn_in=200)
        >>> figure = plots.plot_lyapunov_spectrum(spectrum, theory=[-0.916])
        >>> figure.axes[0].get_xlabel()
        'index i'

    References:
        Engelken, Wolf and Abbott, Lyapunov spectra of chaotic recurrent neural networks, 2020, arXiv:2006.02427.
    """
    figure, (axes,) = new_figure(1, width=7.0, height=4.4)
    named = by_name(spectra)
    counts = [len(spectrum.exponents) for spectrum in named.values()]
    relative = len(set(counts)) > 1
    axes.axhline(0, color="0.4", linewidth=0.8, zorder=1)
    handles: list[Line2D] = []
    for i, (name, spectrum) in enumerate(named.items()):
        exponents, resolved = finite(spectrum.exponents), np.asarray(spectrum.resolved, bool)
        x = np.arange(1, counts[i] + 1) / (counts[i] if relative else 1)
        style: dict[str, Any] = {"color": colour(i), "marker": MARKERS[i % len(MARKERS)], "linestyle": ""}
        style["markersize"] = 6 if counts[i] <= 60 else 3
        errors = np.nan_to_num(finite(spectrum.standard_errors))
        axes.errorbar(x, exponents, 2 * errors, fmt="none", ecolor=colour(i), elinewidth=1.4)
        axes.plot(x, np.where(resolved, exponents, np.nan), label=name, **style)
        if not resolved.all():
            axes.plot(x, np.where(resolved, np.nan, exponents), markerfacecolor="white", **style)
            hollow: dict[str, Any] = style | {"color": "0.3", "markerfacecolor": "white"}
            handles = [Line2D([], [], label="not resolved", **hollow)]
    if theory is not None:
        values = np.atleast_1d(finite(theory))
        first, last = (1 / max(counts), 1) if relative else (1, max(counts))
        values = np.repeat(values, 2) if len(values) == 1 else values
        axes.plot(np.linspace(first, last, len(values)), values, "--", color="0.2", linewidth=1.4, label="theory")
    if not relative:
        step_ticks(axes.xaxis)
        axes.set_xlim(0.5 - 0.02 * max(counts), max(counts) * 1.02 + 0.5)
    label_axes(axes, "", "index i / k" if relative else "index i", "Lyapunov exponents λᵢ, nats per unit of time")
    legend_below(figure, axes, handles=handles)
    return figure


def plot_eigenvalues(eigenvalues: Any) -> Figure:
    r"""Eigenvalues in the complex plane with the unit circle, one panel for each name.

    μᵢ(Jₜ), all steps t on top of each other

    Args:
        eigenvalues: from `jacobian_eigenvalues`, or any other complex numbers in any shape; or several by name.

    Returns:
        A matplotlib `Figure`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> J = jnp.tile(0.9 * jnp.eye(3), (20, 1, 1))
        >>> figure = plots.plot_eigenvalues(bptt.jacobian_eigenvalues(J))
        >>> figure.axes[0].get_xlabel()
        'real part'
    """
    named = {name: np.ravel(np.asarray(values, complex)) for name, values in by_name(eigenvalues).items()}
    points = {name: (finite(np.real(values)), finite(np.imag(values))) for name, values in named.items()}
    low, high = extremes(coordinates for point in points.values() for coordinates in point) or (0.0, 0.0)
    reach = 1.1 * max(1.0, -low, high)
    figure, panels = new_figure(len(named), width=0.8 + 3.4 * len(named), height=4.2, sharey=True)
    for axes, (name, (real, imaginary)) in zip(panels, points.items(), strict=True):
        axes.add_patch(Circle((0, 0), 1, fill=False, edgecolor="0.4", linewidth=1))
        alpha = float(np.clip(15 / np.sqrt(max(len(real), 1)), 0.1, 0.7))
        axes.plot(real, imaginary, ".", color=COLOURS[0], alpha=alpha, markersize=6, markeredgewidth=0)
        axes.set_aspect("equal")
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-reach, reach)
        axes.locator_params(nbins=5)
        label_axes(axes, name, "real part", "")
    panels[0].set_ylabel("imaginary part")
    return figure


def plot_log_norms(log_norms: Any) -> Figure:
    r"""How strongly each state influences each later one: rows are later states, columns earlier ones.

    ‖∂hₜ/∂hₛ‖ in powers of ten, on one scale for all panels

    If norms lie far on both sides of 1, colours are centred on it: one hue where perturbations grow, another where they
    shrink. Norms of 0, such as those above the diagonal, are grey.

    Args:
        log_norms: natural logarithms `[time, time]` from `log_norms`, or several by name.

    Returns:
        A matplotlib `Figure`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> figure = plots.plot_log_norms(bptt.log_norms(jnp.full((3, 1, 1), jnp.exp(-1.0))))
        >>> figure.axes[0].get_ylabel()
        'later state hₜ, step t'

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, 2013, arXiv:1211.5063.
    """
    named = {name: finite(logs) / np.log(10) for name, logs in by_name(log_norms).items()}
    low, high = extremes(named.values()) or (0.0, 0.0)
    if 4 * min(-low, high) > max(-low, high):
        palette, low, high = "RdBu_r", min(low, -high), max(high, -low)
    else:
        palette = "viridis"
    room = max(0.0, 0.5 - (high - low) / 2)  # an empty range has no colours
    colours = matplotlib.colormaps[palette].with_extremes(bad=NEUTRAL)
    scale: dict[str, Any] = {"cmap": colours, "vmin": low - room, "vmax": high + room}
    figure, panels = new_figure(len(named), width=1.5 + 3.1 * len(named), height=4.0, sharey=True)
    meshes = []
    for axes, (name, powers) in zip(panels, named.items(), strict=True):
        edges = np.arange(len(powers) + 1) + 0.5
        meshes.append(axes.pcolormesh(edges, edges, powers, rasterized=True, **scale))
        axes.set_aspect("equal")
        axes.set_ylim(len(powers) + 0.5, 0.5)
        step_ticks(axes.xaxis, axes.yaxis)
        label_axes(axes, name, "earlier state hₛ, step s", "")
        axes.grid(visible=False)
    panels[0].set_ylabel("later state hₜ, step t")
    bar = figure.colorbar(meshes[0], ax=panels, label="norm ‖∂hₜ/∂hₛ‖", shrink=0.8, pad=0.02)
    bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=high - low >= 3))
    bar.ax.yaxis.set_major_formatter(power_of_ten)
    return figure
