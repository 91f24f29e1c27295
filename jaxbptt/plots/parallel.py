r"""Figures of recurrences that are solved for all time steps at once: the tree of an associative scan, and Newton's method."""

from typing import Any

import matplotlib
import numpy as np
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

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
    log_ticks,
    panels_in,
    positive,
    power_of_ten,
    step_ticks,
    time_unit,
)

# With more columns than this the ranges of steps run into each other.
_LABELLED = 16


def plot_scan_tree(length: int, *, ax: Ax = None) -> Drawing:
    r"""Which products an associative scan makes, round after round, from top to bottom.

    Each dot is the product of the two values that its lines come from; m–t beside it says which factors are in it, Mₜ … Mₘ.
    Products of one row do not wait for each other. First neighbours are joined, then pairs of them, until the product of
    all is there; on the way down the others are completed. The tree is that of `jax.lax.associative_scan`.

    Args:
        length: T, how many factors, from 2 to some dozens.
        ax: the Axes to draw in; a new figure by default.

    Returns:
        A `Drawing`; the artists are the dots `"up"` and `"down"`, and the `"lines"`, in which nan separates them.

    Raises:
        ValueError: a length below 2, `ax` of more than one Axes.

    Example:
        >>> from jaxbptt import plots
        >>> drawing = plots.plot_scan_tree(8)
        >>> dots = [*drawing.artists["up"].get_xydata(), *drawing.artists["down"].get_xydata()]
        >>> len(dots), int(max(round for _, round in dots))  # products, and rounds
        (11, 5)

    References:
        Blelloch, Prefix sums and their applications, 1990, CMU-CS-90-190.
    """
    if length < 2:
        raise ValueError(f"length is {length}: a product takes two factors at least.")
    products = _products(list(range(length)), 1)
    rounds = max(made for made, *_ in products)
    (axes,) = panels = panels_in(ax, 1, width=9.0, height=1.6 + 0.55 * rounds)
    first, since = list(range(length)), [0] * length  # of each column: the first factor in it, and its last product
    lines: list[Any] = []
    dots: dict[str, list[Any]] = {"up": [], "down": []}
    for made, way, earlier, later in sorted(products):
        for column in (earlier, later):
            lines += [(column + 1, since[column]), (later + 1, made), (np.nan, np.nan)]
        first[later], since[later] = first[earlier], made
        dots[way].append((later + 1, made))
        if length <= _LABELLED:
            name = f"{first[later] + 1}–{later + 1}"
            axes.annotate(name, (later + 1, made), (4, 2), textcoords="offset points", fontsize="small")
    line: dict[str, Any] = {"color": "0.7", "linewidth": 1.2, "zorder": 1}
    artists: dict[str, Any] = {"lines": axes.plot(*np.array(lines).T, "-", **line)[0]}
    axes.plot(np.arange(1, length + 1), np.zeros(length), "o", color="0.3", label="factor Mₜ")
    for i, (way, label) in enumerate((("up", "up: neighbours"), ("down", "down: the steps between"))):
        style: dict[str, Any] = {"color": COLOURS[i], "marker": MARKERS[i], "linestyle": "", "label": label}
        (artists[way],) = axes.plot(*np.reshape(dots[way], (-1, 2)).T, **style)
    axes.set_ylim(rounds + 0.6, -0.4)
    axes.set_xlim(0.5, length + 1)
    label_axes(axes, "", "time step t", "round")
    step_ticks(axes.xaxis, axes.yaxis)
    if length <= _LABELLED:
        axes.set_xticks(range(1, length + 1))
    add_legend(panels, ax)
    return drawing(panels, artists)


def _products(columns: list[int], made: int) -> list[tuple[int, str, int, int]]:
    """The products of these columns from round `made` on: the round, up or down, the column of earlier and later factors."""
    if len(columns) < 2:
        return []
    neighbours = [(made, "up", *pair) for pair in zip(columns[::2], columns[1::2], strict=False)]
    inside = _products(columns[1::2], made + 1)
    last = max((product[0] for product in inside), default=made)
    # The columns between were left out of the inner scan: each lacks what the one before it has by now.
    between = [(last + 1, "down", *pair) for pair in zip(columns[1::2], columns[2::2], strict=False)]
    return neighbours + inside + between


def plot_newton_errors(errors: Any, *, ax: Ax = None, dt: float | None = None, unit: str | None = None) -> Drawing:
    r"""How far each iterate of Newton's method is from the true states, at each time step, in powers of ten.

    ‖hₜ after k iterations − hₜ‖ in row k and column t, on one scale for all panels

    Left of the dashed line an iterate is right whatever the recurrence: after k iterations the first k steps are. The scale
    ends at the largest error of the guess, since the first iterates may be off by many powers of ten more. An error of 0
    has the colour of the smallest one; what is not finite is grey.

    Args:
        errors: `[iterations, time]`, the first row of the guess, or several by name.
        ax: the Axes to draw in, one for each name, which also give room to the scale of colours; a new figure by default.
        dt: the time from one step to the next, for an axis in a unit of time; time steps by default.
        unit: what `dt` is given in, such as `"s"`.

    Returns:
        A `Drawing`; the artists are the meshes, `"errors"` or by name, in powers of ten, the lines, `"t = k"` or
        `"chaos t = k"`, and the scale, `"colour bar"`.

    Raises:
        ValueError: errors that are not `[iterations, time]`, `ax` of another number of Axes, `dt` that is not above 0, `unit`
            without `dt`.

    Example:
        >>> from jaxbptt import plots
        >>> of_guess, then, last = [0.7, 0.9, 0.8], [0.0, 0.1, 0.2], [0.0, 0.0, 1e-3]
        >>> drawing = plots.plot_newton_errors([of_guess, then, last])
        >>> drawing.axes[0].get_ylabel(), list(drawing.artists)
        ('iteration k', ['errors', 't = k', 'colour bar'])

    References:
        Lim et al., Parallelizing non-linear sequential models over the sequence length, 2024, arXiv:2309.12252.
    """
    time = time_unit(dt, unit)
    named = {name: np.asarray(values, float) for name, values in by_name(errors).items()}
    for values in named.values():
        if values.ndim != 2:
            raise ValueError(
                f"errors have shape {values.shape}, but a row for each iterate is drawn: [iterations, time]."
            )
    powers = {name: np.log10(positive(values)) for name, values in named.items()}
    low, highest = extremes(powers.values()) or (0.0, 0.0)
    _, high = extremes(values[:1] for values in powers.values()) or (low, highest)
    room = max(0.0, 0.5 - (high - low) / 2)  # an empty range has no colours
    scale: dict[str, Any] = {"vmin": low - room, "vmax": high + room}
    scale["cmap"] = matplotlib.colormaps["viridis"].with_extremes(bad=NEUTRAL)
    panels = panels_in(ax, len(named), width=1.5 + 3.1 * len(named), height=4.0)
    artists: dict[str, Any] = {}
    for axes, (name, values) in zip(panels, named.items(), strict=True):
        iterates, steps = values.shape
        at, rows = time.times(np.arange(steps + 1) + 0.5), np.arange(iterates + 1) - 0.5
        drawn = np.where(values == 0, scale["vmin"], powers[name])
        artists[name or "errors"] = axes.pcolormesh(at, rows, drawn, rasterized=True, **scale)
        # Between the step that is right in any case and the next.
        edge, k = time.times(np.arange(iterates) + 0.5), np.arange(iterates)
        style: dict[str, Any] = {"color": COLOURS[1], "linewidth": 1.6, "label": "t = k: right to the left of it"}
        (artists[artist_name(name, "t = k")],) = axes.plot(edge, k, "--", **style)
        axes.set_xlim(at[0], at[-1])
        axes.set_ylim(rows[-1], rows[0])
        step_ticks(axes.yaxis)
        time.ticks(axes.xaxis)
        label_axes(axes, name, time.label("time step t", "time t"), "")
        axes.grid(visible=False)
    label_y(panels, "iteration k", ax)
    mesh = next(iter(artists.values()))
    style = {"shrink": 0.8, "pad": 0.02, "extend": "max" if highest > high else "neither"}
    bar = panels[0].figure.colorbar(mesh, ax=panels, label="error ‖hₜ − true hₜ‖", **style)
    bar.ax.yaxis.set_major_locator(MaxNLocator(6, integer=high - low >= 3))
    bar.ax.yaxis.set_major_formatter(power_of_ten)
    add_legend(panels, ax)
    return drawing(panels, artists | {"colour bar": bar})


def plot_newton_iterations(exponents: Any, iterations: Any, *, converged: Any = None, ax: Ax = None) -> Drawing:
    r"""Iterations of Newton's method against the leading Lyapunov exponent of the recurrence.

    Below 0 perturbations shrink and a few iterations suffice, above 0 each of them gets only some steps further. Runs
    that did not converge are hollow: how many iterations they would take is not known.

    Args:
        exponents: λ₁, `[runs]`, from `lyapunov_exponents`.
        iterations: `[runs]`, from `newton_states`, or several by name, such as lengths of the sequence.
        converged: whether each did, in the form of `iterations`; by default all of them.
        ax: the Axes to draw in; a new figure by default.

    Returns:
        A `Drawing`; the artists are the lines, `"iterations"` or by name, and the hollow markers, `"not converged"` or
        `"T = 100 not converged"`.

    Raises:
        ValueError: iterations of another number than exponents, `ax` of more than one Axes.

    Example:
        >>> from jaxbptt import plots
        >>> counts = {"T = 100": [4, 6, 40], "T = 1,000": [4, 10, 200]}
        >>> drawing = plots.plot_newton_iterations(
        ...     [-0.7, -0.1, 0.1], counts, converged={"T = 1,000": [True, True, False]}
        ... )
        >>> drawing.axes[0].get_yscale(), list(drawing.artists)
        ('log', ['T = 100', 'T = 1,000', 'T = 1,000 not converged'])

    References:
        Gonzalez et al., Predictability enables parallelization of nonlinear state space models, 2025, arXiv:2508.16817.
    """
    exponents, named = finite(exponents), by_name(iterations)
    did = {} if converged is None else by_name(converged)
    (axes,) = panels = panels_in(ax, 1, width=8.0)
    axes.axvline(0, color="0.4", linewidth=0.8, zorder=1)
    order, artists, any_hollow = np.argsort(exponents), {}, {}
    for i, (name, counts) in enumerate(named.items()):
        counts = positive(counts)
        if counts.shape != exponents.shape:
            raise ValueError(
                f"iterations have shape {counts.shape}, but exponents {exponents.shape}: pass a number for each run."
            )
        style: dict[str, Any] = {"color": colour(i), "marker": MARKERS[i % len(MARKERS)], "markersize": 6}
        (artists[name or "iterations"],) = axes.plot(
            exponents[order], counts[order], label=name, linewidth=1.2, **style
        )
        flags = np.asarray(did.get(name, np.ones(counts.shape, bool)), bool)
        if not flags.all():
            style |= {"markerfacecolor": "white", "linestyle": ""}
            where = artist_name(name, "not converged")
            (artists[where],) = axes.plot(exponents, np.where(flags, np.nan, counts), **style)
            any_hollow = {**style, "color": "0.3", "label": "not converged"}
    axes.set_yscale("log")
    low, high = extremes(np.ravel(line.get_ydata()) for line in artists.values()) or (1.0, 1.0)
    log_ticks(axes.yaxis, low, high)
    label_axes(axes, "", "leading Lyapunov exponent λ₁, nats per step", "iterations")
    handles = [Line2D([], [], **any_hollow)] if any_hollow else []
    add_legend(panels, ax, handles=handles)
    return drawing(panels, artists)
