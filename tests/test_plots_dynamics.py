"""Figures of fixed points show each kind of point where it lies, and its eigenvalues."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

import jaxbptt as bptt
from jaxbptt import plots


def network(W, h, x):
    h = jnp.tanh(W @ h)
    return h, h


@pytest.fixture(scope="module")
def found():
    """Nine fixed points of two bistable units: four stable ones, the origin, and four saddles between; and three rows."""
    with jax.enable_x64(True):
        W = jnp.array([[3.0, -0.3], [-0.5, 2.5]])
        start = jnp.array([[0.1, 0.3, -0.1], [0.2, -0.1, -0.2]])
        _, hs = bptt.scan(lambda W, h, x: (jnp.tanh(W @ h),) * 2, W, start, length=12)
        hs = hs.transpose(0, 2, 1)
        return bptt.fixed_points(
            network, W, None, bptt.sample_states(hs, 60, key=jax.random.key(0), noise=1.0, batch_axes=1)
        ), bptt.principal_components(hs)


def test_points_beside_their_trajectory(found):
    points, components = found
    drawn = plots.plot_fixed_points(points, components)
    (axes,) = drawn.axes
    assert len(drawn.artists["trajectory"]) == 3
    np.testing.assert_allclose(
        drawn.artists["trajectory"][1].get_xydata(), np.asarray(components.projections)[:, 1], atol=1e-12
    )
    at = np.asarray(components.project(points.states))
    for kind, chosen in {"fixed, stable": points.stable, "fixed, unstable": points.num_unstable > 0}.items():
        np.testing.assert_allclose(drawn.artists[kind].get_xydata(), at[np.asarray(chosen)], atol=1e-12)
    assert (int(points.stable.sum()), len(points.speeds)) == (4, 9)
    assert "slow" not in drawn.artists
    ratio = 100 * components.explained_variance_ratio[0]
    assert axes.get_xlabel() == f"PC 1, {ratio:.0f} % of the variance"
    assert [text.get_text() for text in drawn.figure.legends[0].get_texts()] == [
        "trajectory",
        "fixed, unstable",
        "fixed, stable",
    ]
    assert drawn._repr_png_()


def test_eigenvalues_by_kind(found):
    points, _ = found
    some = points._replace(
        fixed=jnp.asarray([True] * 7 + [False] * 2),
        num_unstable=points.num_unstable.at[0].set(0),
        num_marginal=points.num_marginal.at[0].set(1),
    )
    drawn = plots.plot_fixed_point_eigenvalues(some)
    assert set(drawn.artists) == {"unit circle", "slow", "fixed, marginal", "fixed, stable", "fixed, unstable"}
    slow = drawn.artists["slow"].get_xydata() @ [1, 1j]
    np.testing.assert_allclose(slow, np.asarray(points.eigenvalues)[7:].ravel())
    shown = sum(len(drawn.artists[kind].get_xydata()) for kind in drawn.artists if kind != "unit circle")
    assert shown == 18
    assert drawn._repr_png_()


def test_into_given_axes(found):
    figure = Figure()
    left, right = figure.subplots(1, 2)
    assert plots.plot_fixed_points(*found, ax=left).axes == (left,)
    assert plots.plot_fixed_point_eigenvalues(found[0], ax=right).figure is figure
    assert left.get_legend()
    with pytest.raises(ValueError, match="ax has 2 Axes, but what is drawn takes 1"):
        plots.plot_fixed_points(*found, ax=[left, right])


def test_no_points_and_one_component(found):
    points, components = found
    none = jax.tree.map(lambda leaf: leaf[:0], points)
    assert set(plots.plot_fixed_points(none, components).artists) == {"trajectory"}
    assert plots.plot_fixed_point_eigenvalues(none)._repr_png_()
    one = bptt.principal_components(jnp.asarray([[1.0, 2.0], [2.0, 1.0], [0.0, 1.0]]), num_components=1)
    with pytest.raises(ValueError, match="components holds one direction"):
        plots.plot_fixed_points(points, one)
