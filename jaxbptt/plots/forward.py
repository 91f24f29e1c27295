r"""Figures of gradients taken forward in time: what an influence keeps of the gradient, by lag, and what it is."""

from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes

from jaxbptt.plots.figure import (
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
    log_ticks,
    panels_in,
    positive,
    time_unit,
)


def plot_kept_contributions(kept: Any, *, ax: Ax = None, dt: float | None = None, unit: str | None = None) -> Drawing:
    r"""How much of the gradient each influence keeps, by lag: direction and size of its part G̃⁽ˡ⁾ of the exact G⁽ˡ⁾.

    Cosine of G̃⁽ˡ⁾ and G⁽ˡ⁾ on the left, in grey how large G⁽ˡ⁾ is where all results have the same; ‖G̃⁽ˡ⁾‖ / ‖G⁽ˡ⁾‖ on the right.

    Args:
        kept: `KeptContributions` from `kept_contributions`, or several by name. With a leading axis of draws, as `jax.vmap` over
            keys gives them, the mean and a band of a standard deviation are drawn.
        ax: two Axes to draw in; a new figure by default.
        dt: the time from one step to the next, for lags in a unit of time; time steps by default.
        unit: what `dt` is given in, such as `"s"`.

    Returns:
        A `Drawing`; the artists are the lines `"cosine"` and `"norm ratio"`, or of several `"snap(1) cosine"` and so on, with draws
        the bands `"cosine band"` and `"norm ratio band"`, and the area `"exact norms"`.

    Raises:
        ValueError: `ax` of another number of Axes, `dt` that is not above 0, `unit` without `dt`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> cell = bptt.elman(2, 4)
        >>> xs, loss = jax.random.normal(jax.random.key(1), (12, 2)), lambda h, hs: jnp.mean(hs**2)
        >>> @jax.jit
        ... def kept(params):
        ...     args = cell, params, cell.initial_carry(), xs, loss
        ...     return bptt.kept_contributions(*args, influence=bptt.influences.snap(1))
        >>> list(plots.plot_kept_contributions({"snap(1)": kept(cell.init(jax.random.key(0)))}).artists)
        ['snap(1) cosine', 'snap(1) norm ratio', 'exact norms']
    """
    time = time_unit(dt, unit)
    cosines, ratios = panels = panels_in(ax, 2, width=10.0, height=4.4)
    artists: dict[str, Any] = {}
    named = by_name(kept)
    for i, (name, result) in enumerate(named.items()):
        for axes, values, what in (
            (cosines, finite(result.cosines), "cosine"),
            (ratios, positive(result.norm_ratios), "norm ratio"),
        ):
            x = time.times(np.arange(values.shape[-1]))
            style: dict[str, Any] = {"color": colour(i), "linestyle": DASHES[i % len(DASHES)], "label": name}
            style["marker"] = MARKERS[i % len(MARKERS)] if len(x) <= FEW else ""
            middle, spread = _mean_and_deviation(values)
            (artists[artist_name(name, what)],) = axes.plot(x, middle, linewidth=1.8, markersize=5, **style)
            if values.ndim > 1:
                # On a logarithmic axis a band may not reach 0.
                low = middle - spread if axes is cosines else np.maximum(middle - spread, middle / 10)
                band = axes.fill_between(x, low, middle + spread, color=colour(i), alpha=0.15, linewidth=0)
                artists[artist_name(name, f"{what} band")] = band
    norms = [np.atleast_2d(finite(result.exact_norms))[0] for result in named.values()]
    largest = max((np.nanmax(one, initial=0) for one in norms), default=0)
    if largest > 0 and all(np.array_equal(one, norms[0], equal_nan=True) for one in norms):
        edges = time.times(np.arange(len(norms[0]) + 1) - 0.5)
        style = {"fill": True, "color": NEUTRAL, "alpha": 0.5, "zorder": 0}
        style["label"] = "size of the exact part, largest 1"
        artists["exact norms"] = cosines.stairs(norms[0] / largest, edges, **style)
    ratios.set_yscale("log")
    ratios.axhline(1, color="0.6", linewidth=1, zorder=1)
    log_ticks(ratios.yaxis, *(extremes(line.get_ydata() for line in ratios.lines) or (1.0, 1.0)))
    cosines.set_ylim(min(-0.05, 1.1 * (extremes(line.get_ydata() for line in cosines.lines) or (0, 0))[0]), 1.05)
    time.ticks(cosines.xaxis, ratios.xaxis)
    lag = time.label("lag l, time steps", "lag l")
    label_axes(cosines, "", lag, "cosine of kept and exact part")
    label_axes(ratios, "", lag, "‖kept part‖ / ‖exact part‖")
    add_legend(panels[:1], ax)
    return drawing(panels, artists)


def _mean_and_deviation(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Over draws, where there are any; what no draw has is nan."""
    drawn = np.atleast_2d(values)
    some = np.isfinite(drawn).any(0)
    middle, spread = np.full((2, drawn.shape[-1]), np.nan)
    middle[some], spread[some] = np.nanmean(drawn[:, some], 0), np.nanstd(drawn[:, some], 0)
    return middle, spread


def plot_influence(influences: Any, *, steps: Any = None, ax: Ax = None) -> Drawing:
    r"""The influence dcₜ/dθ as a picture at several time steps, one above the other, on one scale: red above 0 and blue below.

    Rows are the numbers of the carry, columns the weights; lines separate the leaves, and within a leaf what its first axis counts.

    Args:
        influences: of a leaf of the params, `[time, carry, *leaf]`, or of several by name.
        steps: time steps to draw, the first is 1; by default six of them, evenly.
        ax: the Axes to draw in, one for each time step; a new figure by default.

    Returns:
        A `Drawing`; the artists are the images `"t = 1"` and so on, and the scale, `"colour bar"`.

    Raises:
        ValueError: leaves without those axes or of different lengths, time steps that there are none of, `ax` of another number of
            Axes.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> cell = bptt.elman(2, 3)
        >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (8, 2))
        >>> M = jax.jacrev(lambda params: bptt.scan(cell, params, cell.initial_carry(), xs)[1])(params)
        >>> drawing = plots.plot_influence({"W_xh": M.W_xh, "W_hh": M.W_hh, "b": M.b}, steps=[1, 4, 8])
        >>> [axes.get_ylabel() for axes in drawing.axes]
        ['t = 1', 't = 4', 't = 8']
    """
    named = {name: finite(leaf) for name, leaf in by_name(influences).items()}
    _check_influences(named)
    length, n = next(iter(named.values())).shape[:2]
    chosen = np.unique(np.linspace(1, length, min(6, length)).round().astype(int)) if steps is None else np.ravel(steps)
    if not len(chosen) or not all(step in range(1, length + 1) for step in chosen):
        raise ValueError(
            f"steps are {[*chosen]}: pass time steps between 1 and {length}, for which there is an influence."
        )
    whole = np.concatenate([leaf.reshape(length, n, -1) for leaf in named.values()], -1)[chosen - 1]
    limit = float(np.max(np.abs(extremes([whole]) or (0.0, 0.0)))) or 1.0
    palette = matplotlib.colormaps["RdBu_r"].with_extremes(bad=NEUTRAL)
    style: dict[str, Any] = {"cmap": palette, "vmin": -limit, "vmax": limit, "interpolation": "none", "aspect": "auto"}
    height = float(np.clip(5 * n / whole.shape[-1], 0.5, 2.0))
    panels = panels_in(
        ax, len(chosen), width=9.0, height=0.6 + (height + 0.15) * len(chosen), stacked=True, sharex=True
    )
    artists: dict[str, Any] = {}
    for axes, step, matrix in zip(panels, chosen, whole, strict=True):
        artists[f"t = {step}"] = axes.imshow(matrix, **style)
        label_axes(axes, "", "", f"t = {step}")
        axes.spines[["top", "right"]].set_visible(True)
        axes.grid(visible=False)
        axes.set_yticks([])
        axes.tick_params(bottom=False, labelbottom=axes is panels[-1] or ax is not None)
        centres = _separate(axes, named)
        axes.set_xticks(centres, list(named))
    bar = panels[0].figure.colorbar(next(iter(artists.values())), ax=panels, label="dcₜ/dθ", aspect=30)
    return drawing(panels, artists | {"colour bar": bar})


def _check_influences(named: Mapping[str, np.ndarray]) -> None:
    sizes = {leaf.shape[:2] for leaf in named.values()}
    if len(sizes) != 1 or len(next(iter(sizes))) != 2 or not all(leaf.size for leaf in named.values()):
        shapes = ", ".join(f"{name} {leaf.shape}".strip() for name, leaf in named.items()) or "none"
        raise ValueError(f"influences are of shapes {shapes}: pass [time, carry, *leaf], of one length and one carry.")


def _separate(axes: Axes, named: Mapping[str, np.ndarray]) -> list[float]:
    """Lines between leaves, thin ones within them; where the names of the leaves go."""
    start, centres = 0, []
    for leaf in named.values():
        size = int(np.prod(leaf.shape[2:], dtype=int))
        if leaf.ndim > 3:
            for between in np.arange(start, start + size, size // leaf.shape[2])[1:]:
                axes.axvline(between - 0.5, color="0.6", linewidth=0.5)
        if start:
            axes.axvline(start - 0.5, color="black", linewidth=1.2)
        centres.append(start + size / 2 - 0.5)
        start += size
    return centres
