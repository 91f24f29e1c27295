r"""Figures of what a recurrence does in the long run: fixed and slow points, beside the trajectory and by their eigenvalues."""

from typing import Any

import numpy as np
from matplotlib.patches import Circle

from jaxbptt.analysis.components import PrincipalComponents
from jaxbptt.analysis.fixed_points import FixedPoints
from jaxbptt.plots.figure import COLOURS, Ax, Drawing, add_legend, drawing, extremes, finite, label_axes, panels_in

# Marker and colour of each kind of point, in the order they are drawn. Hollow ones are those that repel.
_STYLES: dict[str, dict[str, Any]] = {
    "slow": {"marker": "d", "color": COLOURS[4], "markersize": 5},
    "fixed, marginal": {"marker": "s", "color": COLOURS[2], "markersize": 6},
    "fixed, unstable": {"marker": "o", "color": COLOURS[1], "markersize": 8, "markerfacecolor": "white"},
    "fixed, stable": {"marker": "o", "color": COLOURS[0], "markersize": 8},
}


def plot_fixed_points(points: FixedPoints, components: PrincipalComponents, *, ax: Ax = None) -> Drawing:
    r"""Fixed and slow points beside the trajectory, in its first two principal components.

    wᵢᵀ (h* − mean h),  i = 1, 2

    Stable fixed points, which attract in every direction, are full circles; those with unstable directions are hollow;
    marginal ones, with an eigenvalue on the unit circle and none outside, are squares; slow points are diamonds. Points close
    to each other in the picture may lie far apart in the other directions.

    Args:
        points: from `fixed_points`.
        components: from `principal_components` of the states `[time, *rows, n]`, of which each row is drawn as a line.
        ax: the Axes to draw in; a new figure by default.

    Returns:
        A `Drawing`; the artists are the lines of the `"trajectory"`, and the points by kind, such as `"fixed, stable"`.

    Raises:
        ValueError: fewer than two components, or those of another number of states.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> network = lambda W, h, x: (jnp.tanh(W @ h), jnp.tanh(W @ h))
        >>> W = jnp.array([[1.5, 0.2], [-0.2, 1.2]])
        >>> _, hs = bptt.scan(network, W, jnp.array([0.1, 0.3]), length=40)
        >>> guesses = bptt.sample_states(hs, 20, key=jax.random.key(0), noise=1.0)
        >>> drawing = plots.plot_fixed_points(bptt.fixed_points(network, W, None, guesses), bptt.principal_components(hs))
        >>> drawing.axes[0].get_xlabel()[:6]
        'PC 1, '

    References:
        Sussillo and Barak, Opening the black box, 2013, doi:10.1162/NECO_a_00409.
    """
    if len(components.components) < 2:
        raise ValueError("components holds one direction, but the picture has two: take num_components of at least 2.")
    (axes,) = panels_in(ax, 1, width=5.6, height=4.8)
    trajectory = finite(components.projections)[..., :2]
    lines = trajectory.reshape(len(trajectory), -1, 2)
    artists: dict[str, Any] = {
        "trajectory": axes.plot(lines[:, :, 0], lines[:, :, 1], color="0.6", linewidth=0.8, zorder=1)
    }
    artists["trajectory"][0].set_label("trajectory")
    at = finite(components.project(points.states))[:, :2]
    for kind, chosen in _kinds(points).items():
        (artists[kind],) = axes.plot(*at[chosen].T, linestyle="", label=kind, zorder=2, **_STYLES[kind])
    share = 100 * np.asarray(components.explained_variance_ratio, float)
    x, y = (f"PC {i + 1}, {share[i]:.0f} % of the variance" for i in range(2))
    label_axes(axes, "", x, y)
    add_legend([axes], ax)
    return drawing([axes], artists)


def plot_fixed_point_eigenvalues(points: FixedPoints, *, ax: Ax = None) -> Drawing:
    r"""Eigenvalues of the Jacobians at fixed and slow points in the complex plane, with the unit circle.

    μᵢ(∂F/∂h at h*),  for each point h*

    Perturbations along an eigenvector grow outside the circle and shrink inside it; an angle of ω stands for an oscillation
    of 2π/ω steps. Markers are those of `plot_fixed_points`.

    Args:
        points: from `fixed_points`.
        ax: the Axes to draw in; a new figure by default.

    Returns:
        A `Drawing`; the artists are the `"unit circle"`, and the eigenvalues by the kind of their point, such as
        `"fixed, stable"`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> unit = lambda w, h, x: (jnp.tanh(w * h), None)
        >>> found = bptt.fixed_points(unit, 1.5, None, jnp.linspace(-1.0, 1.0, 7))
        >>> sorted(plots.plot_fixed_point_eigenvalues(found).artists)
        ['fixed, stable', 'fixed, unstable', 'unit circle']

    References:
        Sussillo and Barak, Opening the black box, 2013, doi:10.1162/NECO_a_00409.
    """
    (axes,) = panels_in(ax, 1, width=5.0, height=4.8)
    circle = Circle((0, 0), 1, fill=False, edgecolor="0.4", linewidth=1)
    artists: dict[str, Any] = {"unit circle": axes.add_patch(circle)}
    real, imaginary = (finite(part(np.asarray(points.eigenvalues))) for part in (np.real, np.imag))
    for kind, chosen in _kinds(points).items():
        style: dict[str, Any] = _STYLES[kind] | {"markersize": 5}
        (artists[kind],) = axes.plot(real[chosen].ravel(), imaginary[chosen].ravel(), linestyle="", label=kind, **style)
    axes.set_aspect("equal")
    for limit, part in ((axes.set_xlim, real), (axes.set_ylim, imaginary)):
        low, high = extremes([part, [-1, 1]]) or (-1.0, 1.0)
        limit(low - 0.05 * (high - low), high + 0.05 * (high - low))
    axes.locator_params(nbins=5)
    label_axes(axes, "", "real part", "imaginary part")
    add_legend([axes], ax)
    return drawing([axes], artists)


def _kinds(points: FixedPoints) -> dict[str, np.ndarray]:
    """Which points are of each kind, for the kinds that there are."""
    fixed, unstable, marginal = (np.asarray(a) > 0 for a in (points.fixed, points.num_unstable, points.num_marginal))
    kinds = {
        "slow": ~fixed,
        "fixed, marginal": fixed & ~unstable & marginal,
        "fixed, unstable": fixed & unstable,
        "fixed, stable": fixed & ~unstable & ~marginal,
    }
    return {kind: chosen for kind, chosen in kinds.items() if chosen.any()}
