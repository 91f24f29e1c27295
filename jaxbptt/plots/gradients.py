r"""Figures from analysis results. Each function returns a new matplotlib `Figure` and touches no global state.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and every line has a marker or dash of its own.
Needs the extra `report`.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from jaxbptt.analysis.certificate import Certificate
from jaxbptt.analysis.flow import GradientFlow
from jaxbptt.analysis.jacobians import LogSingularValues

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_CUT = "#c9c9c9"
_DASHES = ("-", "--", "-.", ":")


def plot_gradient_flow(flows: GradientFlow | Mapping[str, GradientFlow]) -> Figure:
    r"""Gradient magnitude against time step, log scale; several cells beside each other.

    ‖∂L/∂hₜ‖ (line) and, for a loss at more than the last step, the part through yₜ alone (dots)

    Steps where the norm is exactly 0 are left out, since a logarithm has no place for them.

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
    figure, (axes,) = _figure(1, width=8.0)
    for i, (label, flow) in enumerate(_by_name(flows).items()):
        norms, immediate = np.asarray(flow.norms, float), np.asarray(flow.immediate_norms, float)
        steps = np.arange(1, len(norms) + 1)
        style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": _DASHES[i % len(_DASHES)]}
        axes.plot(steps, _positive(norms), label=label or "in full", linewidth=1.8, **style)
        if np.count_nonzero(immediate) > 1:
            axes.plot(
                steps, _positive(immediate), ".", markersize=4, color=style["color"], label=f"{label} immediate".strip()
            )
    axes.set_yscale("log")
    _label(axes, "Gradient flow through time", "time step t", "gradient magnitude ‖∂L/∂hₜ‖")
    axes.legend(frameon=False)
    return figure


def plot_certificate(certificate: Certificate) -> Figure:
    """Every way to take the gradient: its largest relative error, temporary memory and run time, side by side.

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
    figure, (errors, memory, seconds) = _figure(3, width=10.0, height=1.2 + 0.42 * len(rows), sharey=True)
    places = range(len(rows))
    colours = [COLOURS[0] if row.agrees else COLOURS[1] for row in rows]
    for place, row, colour in zip(places, rows, colours, strict=True):
        style: dict[str, Any] = {"color": colour, "marker": "o" if row.agrees else "X", "markersize": 8}
        if row.largest_error > 0:
            errors.plot(row.largest_error, place, **style)
        else:
            words = "0, exactly" if row.largest_error == 0 else "not a number"
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
    _label(errors, "", "largest relative error", "")
    _label(memory, "", "temporary memory, KiB", "")
    _label(seconds, "", "time, ms", "")
    return figure


def plot_surviving_paths(tables: Any) -> Figure:
    r"""Which ∂Lₜ/∂hₛ a strategy keeps: rows are losses, columns states; several strategies beside each other.

    Above the diagonal, where the loss comes before the state, there is nothing to keep.

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
    named = {name: np.asarray(table, bool) for name, table in _by_name(tables).items()}
    figure, panels = _figure(len(named), width=0.6 + 3.2 * len(named), height=4.2, sharey=True)
    for axes, (name, kept) in zip(panels, named.items(), strict=True):
        steps = len(kept)
        shown = np.where(np.tril(np.ones_like(kept)), kept, np.nan)
        edges = np.arange(steps + 1) + 0.5
        lines: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.6} if steps <= 40 else {}
        axes.pcolormesh(edges, edges, shown, cmap=ListedColormap([_CUT, COLOURS[0]]), vmin=0, vmax=1, **lines)
        axes.set_aspect("equal")
        axes.set_ylim(steps + 0.5, 0.5)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        _label(axes, name, "state hₛ, step s", "")
        axes.grid(visible=False)
    panels[0].set_ylabel("loss Lₜ, step t")
    handles = [Patch(color=COLOURS[0], label="kept"), Patch(color=_CUT, label="cut")]
    figure.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False)
    return figure


def plot_truncation_bias(biases: Any) -> Figure:
    r"""Relative norm and cosine of the error of truncated gradients against the truncation length K.

    ‖g_K − g‖ / ‖g‖ on the left, log-log; the cosine between g_K and g on the right, 1 for no error of direction.

    Args:
        biases: results with `lengths [k]`, and `relative_errors` and `cosines` `[k]` by strategy; several by name.

    Returns:
        A matplotlib `Figure`.
    """
    figure, (errors, cosines) = _figure(2, width=10.0, height=4.4)
    biases = _by_name(biases)
    lengths = {K for bias in biases.values() for K in bias.lengths}
    for i, (name, bias) in enumerate(biases.items()):
        for j, way in enumerate(bias.relative_errors):
            style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "linestyle": _DASHES[j], "marker": "os^d"[j]}
            style["label"] = f"{name} {way}".strip()
            errors.plot(bias.lengths, _positive(np.asarray(bias.relative_errors[way])), **style)
            cosines.plot(bias.lengths, bias.cosines[way], **style)
    for axes in (errors, cosines):
        axes.set_xscale("log")
        axes.set_xticks(sorted(lengths), [f"{K:,}" for K in sorted(lengths)])
        axes.xaxis.set_minor_formatter(NullFormatter())
    if any(np.max(values) > 0 for bias in biases.values() for values in bias.relative_errors.values()):
        errors.set_yscale("log")
    _label(errors, "relative norm of the error", "truncation length K, time steps", "‖g_K − g‖ / ‖g‖")
    _label(cosines, "direction", "truncation length K, time steps", "cosine of g_K and g")
    legend = errors.get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_singular_values(
    values: LogSingularValues | Mapping[str, LogSingularValues],
    *,
    bound_rate: float | Mapping[str, float] | None = None,
    ranks: int = 8,
) -> Figure:
    r"""Singular values of ∂h_T/∂hₜ against the lag T − t, log scale, one panel for each name.

    With `bound_rate` = γ σ_max(W_hh), the bound σ₁(∂h_T/∂hₜ) ≤ (γ σ_max)^(T−t) of Pascanu et al. (2013) is drawn (γ = 1
    for tanh). Values below the rounding error of the product are left out.

    Args:
        values: from `log_singular_values`, or several by name.
        bound_rate: the rate of the bound, or several by the same names.
        ranks: how many of the n singular values to draw, evenly spaced from the largest to the smallest.

    Returns:
        A matplotlib `Figure`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> J = jnp.tile(0.9 * jnp.eye(3), (20, 1, 1))
        >>> figure = plots.plot_singular_values(bptt.log_singular_values(bptt.jacobian_products(J)), bound_rate=0.9)
        >>> figure.axes[0].get_xlabel()
        'lag T − t, time steps'

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, 2013, arXiv:1211.5063.
    """
    values = _by_name(values)
    bounds = bound_rate if isinstance(bound_rate, Mapping) else dict.fromkeys(values, bound_rate)
    figure, panels = _figure(len(values), width=3.6 * len(values) + 1.0, sharey=True)
    for axes, (label, (logs, resolved)) in zip(panels, values.items(), strict=True):
        # In powers of ten, drawn as such: e to the power of a log singular value may be outside the range of floats.
        tens = np.where(resolved, np.asarray(logs, float), np.nan)[::-1] / np.log(10)
        lags = np.arange(len(tens))
        drawn = np.unique(np.linspace(0, tens.shape[1] - 1, ranks).round().astype(int))
        for shade, rank in zip(np.linspace(1, 0.35, len(drawn)), drawn, strict=True):
            name = "largest, σ₁" if rank == 0 else "smaller ones, to σₙ" if rank == drawn[-1] else None
            axes.plot(lags, tens[:, rank], color=COLOURS[0], alpha=shade, linewidth=2 if rank == 0 else 1, label=name)
        rate = bounds.get(label)
        if rate is not None:
            axes.plot(lags, lags * np.log10(rate), "--", color=COLOURS[1], label="bound (γσ)^lag")
        _label(axes, label, "lag T − t, time steps", "")
        axes.yaxis.set_major_formatter(lambda power, _: f"$10^{{{power:g}}}$")
    panels[0].set_ylabel("singular values of ∂h_T/∂hₜ")
    legend = {text: line for axes in panels for line, text in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend), frameon=False)
    return figure


def _figure(panels: int, *, width: float, height: float = 4.0, **options: Any) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False, **options)[0])


def _label(axes: Axes, title: str, x: str, y: str) -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _by_name(results: Any) -> dict[str, Any]:
    return dict(results) if isinstance(results, Mapping) else {"": results}


def _positive(norms: np.ndarray) -> np.ndarray:
    return np.where(norms > 0, norms, np.nan)
