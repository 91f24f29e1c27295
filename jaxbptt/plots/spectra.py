r"""Figures of Jacobians: what they do to perturbations of the state, over one step, over many, and in the long run.

None of them depends on a loss.
"""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.patches import Circle
from matplotlib.ticker import MaxNLocator

from jaxbptt.analysis.jacobians import LogSingularValues
from jaxbptt.analysis.lyapunov import LyapunovSpectrum
from jaxbptt.plots.figure import (
    COLOURS,
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
    panels_in,
    positive,
    power_of_ten,
    step_ticks,
    time_unit,
)


def plot_singular_values(
    values: LogSingularValues | Mapping[str, LogSingularValues],
    *,
    bound_rate: float | Mapping[str, float] | None = None,
    lags: Any = None,
    ranks: int = 6,
    ax: Ax = None,
    dt: float | None = None,
    unit: str | None = None,
) -> Drawing:
    r"""Singular values of ∂h_T/∂hₜ against the lag T − t, log scale, one panel for each name.

    With `bound_rate` = γ σ_max(W_hh), the bound σ₁(∂h_T/∂hₜ) ≤ (γ σ_max)^(T−t) of Pascanu et al. (2013) is drawn (γ = 1
    for tanh). Values below the rounding error of the product are left out.

    Args:
        values: from `product_log_singular_values`, or from `singular_values` for several starts; or several by name.
        bound_rate: the rate of the bound, or several by the same names.
        lags: T − s for each start s of `singular_values`; T − 1 … 0, as for `product_log_singular_values`, by default.
        ranks: how many of the singular values to draw, evenly spaced from the largest to the smallest that is given.
        ax: the Axes to draw in, one for each name; a new figure by default.
        dt: the time from one step to the next, for lags in a unit of time; time steps by default.
        unit: what `dt` is given in, such as `"s"`.

    Returns:
        A `Drawing`; the artists are the list of lines, `"singular values"` or by name, and the line `"bound"` or
        `"elman bound"`.

    Raises:
        ValueError: values of one product alone, `lags` of another number, `ax` of another number of Axes, `dt` that is not
            above 0, `unit` without `dt`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> J = jnp.tile(0.9 * jnp.eye(3), (20, 1, 1))
        >>> values = bptt.product_log_singular_values(bptt.jacobian_products(J))
        >>> drawing = plots.plot_singular_values(values, bound_rate=0.9)
        >>> drawing.axes[0].get_xlabel(), list(drawing.artists)
        ('lag T − t, time steps', ['singular values', 'bound'])

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, 2013, arXiv:1211.5063.
    """
    values = by_name(values)
    bounds = bound_rate if isinstance(bound_rate, Mapping) else dict.fromkeys(values, bound_rate)
    time = time_unit(dt, unit)
    panels = panels_in(ax, len(values), width=max(3.6 * len(values) + 1.0, 6.0), sharey=True)
    artists: dict[str, Any] = {}
    for axes, (label, (log_values, resolved)) in zip(panels, values.items(), strict=True):
        # Drawn as powers of ten, since the singular values themselves may be outside the range of floats.
        powers = np.where(resolved, finite(log_values), np.nan) / np.log(10)
        if powers.ndim != 2:
            raise ValueError(
                f"The singular values have shape {powers.shape}, but one row for each lag is drawn: pass those of several "
                "products, as singular_values(J, start=[…]) returns them."
            )
        x = np.arange(len(powers))[::-1] if lags is None else np.asarray(lags)
        if x.shape != (len(powers),):
            raise ValueError(
                f"lags have shape {x.shape}, but there are {len(powers)} rows of values: pass a lag for each."
            )
        order = np.argsort(x)
        x, powers = x[order], powers[order]
        at, lines = time.times(x), []
        drawn = np.unique(np.linspace(0, powers.shape[1] - 1, ranks).round().astype(int))
        for shade, rank in zip(np.linspace(1, 0.35, len(drawn)), drawn, strict=True):
            name = "largest, σ₁" if rank == 0 else "smaller ones" if rank == drawn[-1] else None
            style: dict[str, Any] = {"alpha": shade, "linewidth": 2 if rank == 0 else 1, "label": name}
            lines += axes.plot(at, powers[:, rank], "o" if len(x) == 1 else "-", color=COLOURS[0], **style)
        artists[label or "singular values"] = lines
        rate = bounds.get(label)
        if rate is not None:
            bound, style = x * np.log10(positive(rate)), {"color": COLOURS[1], "label": "bound (γσ)^lag"}
            (artists[artist_name(label, "bound")],) = axes.plot(at, bound, "--", **style)
        label_axes(axes, label, time.label("lag T − t, time steps", "lag T − t"), "")
        axes.yaxis.set_major_formatter(power_of_ten)
    label_y(panels, "singular values of ∂h_T/∂hₜ", ax)
    add_legend(panels, ax)
    return drawing(panels, artists)


def plot_lyapunov_spectrum(
    spectra: LyapunovSpectrum | Mapping[str, LyapunovSpectrum],
    *,
    theory: Any = None,
    ax: Ax = None,
    dt: float | None = None,
    unit: str | None = None,
) -> Drawing:
    r"""Lyapunov exponents, largest first, with error bars of two standard errors.

    λᵢ ± 2 sᵢ against i; against i/k where several spectra differ in their number of exponents k

    Above the line at 0 perturbations grow, below it they shrink. Exponents that are not resolved are hollow; those of −∞
    are left out.

    Args:
        spectra: from `lyapunov_exponents`, or several by name.
        theory: exponents to compare with, `[m]`, largest first: a dashed line over the same range of indices, whatever m.
        ax: the Axes to draw in; a new figure by default.
        dt: the time from one step to the next, for exponents, and theory, that are per step: they are divided by it. Not for
            those that are per unit of time already, by `time_step`.
        unit: of time, such as `"s"`.

    Returns:
        A `Drawing`; the artists are the markers, `"exponents"` or by name, those of exponents that are not resolved,
        `"not resolved"` or `"elman not resolved"`, the bars, `"errors"` or `"elman errors"`, and the line `"theory"`.

    Raises:
        ValueError: `ax` of more than one Axes, `dt` that is not above 0.

    Example:
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> logistic = lambda r, x, _: (r * x * (1 - x), None)
        >>> spectrum = bptt.lyapunov_exponents(logistic, 3.2, 0.3, length=1_000, burn_in=200)
        >>> drawing = plots.plot_lyapunov_spectrum(spectrum, theory=[-0.916])
        >>> drawing.axes[0].get_xlabel(), list(drawing.artists)
        ('index i', ['errors', 'exponents', 'theory'])

    References:
        Engelken, Wolf and Abbott, Lyapunov spectra of chaotic recurrent neural networks, 2020, arXiv:2006.02427.
    """
    rate = time_unit(1.0 if dt is None else dt, unit)
    (axes,) = panels = panels_in(ax, 1, width=7.0, height=4.4)
    artists: dict[str, Any] = {}
    named = by_name(spectra)
    counts = [len(spectrum.exponents) for spectrum in named.values()]
    relative = len(set(counts)) > 1
    axes.axhline(0, color="0.4", linewidth=0.8, zorder=1)
    handles: list[Line2D] = []
    for i, (name, spectrum) in enumerate(named.items()):
        exponents, resolved = finite(spectrum.exponents) / rate.dt, np.asarray(spectrum.resolved, bool)
        x = np.arange(1, counts[i] + 1) / (counts[i] if relative else 1)
        style: dict[str, Any] = {"color": colour(i), "marker": MARKERS[i % len(MARKERS)], "linestyle": ""}
        style["markersize"] = 6 if counts[i] <= 60 else 3
        errors = np.nan_to_num(finite(spectrum.standard_errors)) / rate.dt
        bars: dict[str, Any] = {"fmt": "none", "ecolor": colour(i), "elinewidth": 1.4}
        artists[artist_name(name, "errors")] = axes.errorbar(x, exponents, 2 * errors, **bars)
        (artists[name or "exponents"],) = axes.plot(x, np.where(resolved, exponents, np.nan), label=name, **style)
        if not resolved.all():
            hollow: dict[str, Any] = style | {"markerfacecolor": "white"}
            (artists[artist_name(name, "not resolved")],) = axes.plot(
                x, np.where(resolved, np.nan, exponents), **hollow
            )
            hollow |= {"color": "0.3", "label": "not resolved"}
            handles = [Line2D([], [], **hollow)]
    if theory is not None:
        values = np.atleast_1d(finite(theory)) / rate.dt
        first, last = (1 / max(counts), 1) if relative else (1, max(counts))
        values = np.repeat(values, 2) if len(values) == 1 else values
        x, style = np.linspace(first, last, len(values)), {"color": "0.2", "linewidth": 1.4, "label": "theory"}
        (artists["theory"],) = axes.plot(x, values, "--", **style)
    if not relative:
        step_ticks(axes.xaxis)
        axes.set_xlim(0.5 - 0.02 * max(counts), max(counts) * 1.02 + 0.5)
    per = unit or "unit of time"
    label_axes(axes, "", "index i / k" if relative else "index i", f"Lyapunov exponents λᵢ, nats per {per}")
    add_legend(panels, ax, handles=handles)
    return drawing(panels, artists)


def plot_eigenvalues(eigenvalues: Any, *, ax: Ax = None) -> Drawing:
    r"""Eigenvalues in the complex plane with the unit circle, one panel for each name.

    μᵢ(Jₜ), all steps t on top of each other

    Args:
        eigenvalues: from `jacobian_eigenvalues`, or any other complex numbers in any shape; or several by name.
        ax: the Axes to draw in, one for each name; a new figure by default.

    Returns:
        A `Drawing`; the artists are the points, `"eigenvalues"` or by name, and the `"unit circle"` or
        `"elman unit circle"`.

    Raises:
        ValueError: `ax` of another number of Axes.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> J = jnp.tile(0.9 * jnp.eye(3), (20, 1, 1))
        >>> drawing = plots.plot_eigenvalues(bptt.jacobian_eigenvalues(J))
        >>> drawing.axes[0].get_xlabel()
        'real part'
    """
    named = {name: np.ravel(np.asarray(values, complex)) for name, values in by_name(eigenvalues).items()}
    points = {name: (finite(np.real(values)), finite(np.imag(values))) for name, values in named.items()}
    low, high = extremes(coordinates for point in points.values() for coordinates in point) or (0.0, 0.0)
    reach = 1.1 * max(1.0, -low, high)
    panels = panels_in(ax, len(named), width=0.8 + 3.4 * len(named), height=4.2, sharey=True)
    artists: dict[str, Any] = {}
    for axes, (name, (real, imaginary)) in zip(panels, points.items(), strict=True):
        circle = Circle((0, 0), 1, fill=False, edgecolor="0.4", linewidth=1)
        artists[artist_name(name, "unit circle")] = axes.add_patch(circle)
        alpha = float(np.clip(15 / np.sqrt(max(len(real), 1)), 0.1, 0.7))
        style: dict[str, Any] = {"color": COLOURS[0], "alpha": alpha, "markersize": 6, "markeredgewidth": 0}
        (artists[name or "eigenvalues"],) = axes.plot(real, imaginary, ".", **style)
        axes.set_aspect("equal")
        axes.set_xlim(-reach, reach)
        axes.set_ylim(-reach, reach)
        axes.locator_params(nbins=5)
        label_axes(axes, name, "real part", "")
    label_y(panels, "imaginary part", ax)
    return drawing(panels, artists)


def plot_log_norms(log_norms: Any, *, ax: Ax = None, dt: float | None = None, unit: str | None = None) -> Drawing:
    r"""How strongly each state influences each later one: rows are later states, columns earlier ones.

    ‖∂hₜ/∂hₛ‖ in powers of ten, on one scale for all panels

    If norms lie far on both sides of 1, colours are centred on it: one hue where perturbations grow, another where they
    shrink. Norms of 0, such as those above the diagonal, are grey.

    Args:
        log_norms: natural logarithms `[time, time]` from `log_norms`, or several by name.
        ax: the Axes to draw in, one for each name, which also give room to the scale of colours; a new figure by default.
        dt: the time from one step to the next, for axes in a unit of time; time steps by default.
        unit: what `dt` is given in, such as `"s"`.

    Returns:
        A `Drawing`; the artists are the meshes, `"log norms"` or by name, in powers of ten, and the scale, `"colour bar"`.

    Raises:
        ValueError: norms that are not `[time, time]`, `ax` of another number of Axes, `dt` that is not above 0, `unit`
            without `dt`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> drawing = plots.plot_log_norms(bptt.log_norms(jnp.full((3, 1, 1), jnp.exp(-1.0))))
        >>> drawing.axes[0].get_ylabel()
        'later state hₜ, step t'

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, 2013, arXiv:1211.5063.
    """
    time = time_unit(dt, unit)
    named = {name: finite(logs) / np.log(10) for name, logs in by_name(log_norms).items()}
    for powers in named.values():
        if powers.ndim != 2 or powers.shape[0] != powers.shape[1]:
            raise ValueError(
                f"log_norms have shape {powers.shape}, but [time, time] is drawn: pass those of all pairs, from log_norms(J)."
            )
    low, high = extremes(named.values()) or (0.0, 0.0)
    if 4 * min(-low, high) > max(-low, high):
        palette, low, high = "RdBu_r", min(low, -high), max(high, -low)
    else:
        palette = "viridis"
    room = max(0.0, 0.5 - (high - low) / 2)  # an empty range has no colours
    colours = matplotlib.colormaps[palette].with_extremes(bad=NEUTRAL)
    scale: dict[str, Any] = {"cmap": colours, "vmin": low - room, "vmax": high + room}
    panels = panels_in(ax, len(named), width=1.5 + 3.1 * len(named), height=4.0, sharey=True)
    meshes: dict[str, Any] = {}
    for axes, (name, powers) in zip(panels, named.items(), strict=True):
        edges = time.times(np.arange(len(powers) + 1) + 0.5)
        meshes[name or "log norms"] = axes.pcolormesh(edges, edges, powers, rasterized=True, **scale)
        axes.set_aspect("equal")
        axes.set_ylim(edges[-1], edges[0])
        time.ticks(axes.xaxis, axes.yaxis)
        label_axes(axes, name, time.label("earlier state hₛ, step s", "earlier state hₛ, time"), "")
        axes.grid(visible=False)
    label_y(panels, time.label("later state hₜ, step t", "later state hₜ, time"), ax)
    bar = panels[0].figure.colorbar(
        next(iter(meshes.values())), ax=panels, label="norm ‖∂hₜ/∂hₛ‖", shrink=0.8, pad=0.02
    )
    bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=high - low >= 3))
    bar.ax.yaxis.set_major_formatter(power_of_ten)
    return drawing(panels, meshes | {"colour bar": bar})
