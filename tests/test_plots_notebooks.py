"""The figures that the notebooks brought with them show the numbers they are given, in given axes too."""

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

import jaxbptt as bptt
from jaxbptt import plots
from jaxbptt.analysis import GradientDiagnosis, GradientRates, LyapunovSpectrum


@pytest.fixture(autouse=True)
def nothing_global():
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before


def legend(drawing):
    return [text.get_text() for text in drawing.figure.legends[0].get_texts()]


def test_lines_in_all_forms():
    drawing = plots.plot_lines({"pair": ([2, 4, 8], [1.0, 0.0, np.inf]), "alone": np.arange(20.0)}, x="K", yscale="log")
    pair, alone = drawing.artists.values()
    np.testing.assert_array_equal(pair.get_xdata(), [2, 4, 8])
    np.testing.assert_array_equal(pair.get_ydata(), [1, np.nan, np.nan])
    np.testing.assert_array_equal(alone.get_xdata(), np.arange(1, 21))
    assert (pair.get_marker(), alone.get_marker()) == ("o", "")
    assert pair.get_linestyle() != alone.get_linestyle()
    assert legend(drawing) == ["pair", "alone"]
    assert (drawing.axes[0].get_xlabel(), drawing.axes[0].get_yscale()) == ("K", "log")
    lengths = plots.plot_lines(([1, 4, 16], [3.0, 2.0, 1.0]), xscale="log")
    assert list(lengths.axes[0].get_xticks()) == [1, 4, 16]
    assert plots.plot_lines([1.0, 2.0], markers=False).artists["line"].get_marker() == ""


def test_lines_that_are_none():
    with pytest.raises(ValueError, match=r"curve 'a' has \(2,\) x values and \(3,\) y values"):
        plots.plot_lines({"a": ([1, 2], [1, 2, 3])})
    with pytest.raises(ValueError, match=r"pass one array of values"):
        plots.plot_lines(np.ones((2, 3)))


def test_matrices_on_one_scale():
    drawing = plots.plot_matrices({"small": np.eye(2), "large": np.array([[-4.0, np.nan, 1.0]])})
    small, large, bar = drawing.artists.values()
    assert small.get_clim() == large.get_clim() == (-4, 4)
    np.testing.assert_array_equal(small.get_array(), np.eye(2))
    assert np.ma.getmaskarray(large.get_array()).tolist() == [[False, True, False]]
    assert bar.mappable is small
    assert plots.plot_matrices(np.zeros((2, 2))).artists["matrix"].get_clim() == (-1, 1)
    with pytest.raises(ValueError, match=r"matrix 'v' has shape \(3,\): pass an array of two axes"):
        plots.plot_matrices({"v": np.ones(3)})


def test_schedule():
    """Every move is drawn, every step is reversed once, and no state is kept for longer than it is needed."""
    schedule = bptt.checkpoint_schedule(10, 3)
    drawing = plots.plot_schedule(schedule)
    lines = {
        name: np.reshape(drawing.artists[name].get_xydata(), (-1, 3, 2)) for name in ("forward", "reverse", "kept")
    }
    assert [tuple(piece[:2, 0]) for piece in lines["forward"]] == [tuple(move[:2]) for move in schedule.moves]
    assert sorted(lines["reverse"][:, 0, 0]) == list(range(10))
    assert sum(bar.get_height() for bar in drawing.artists["times computed"]) == schedule.forward_steps == 25
    kept = lines["kept"]
    assert len(kept) == 1 + int(schedule.moves[:, 2].sum())
    rows = np.arange(len(schedule.moves) + 1)[:, None]
    assert np.max(np.sum((kept[:, 0, 1] <= rows) & (rows < kept[:, 1, 1]), axis=1)) == schedule.checkpoints
    assert legend(drawing) == ["compute forward", "reverse the step", "state kept, from the dot on"]


def test_gradient_rates():
    rates = GradientRates(observed=-0.5, weights=0.25, saturation=-0.7, alignment=-0.05)
    rest = dict.fromkeys(GradientDiagnosis._fields) | {"cause": "saturation", "rates": rates}
    drawing = plots.plot_gradient_rates({"lstm": GradientDiagnosis(**rest), "gru": GradientDiagnosis(**rest)})
    for name, row in (("lstm", 0), ("gru", 1)):
        for term in ("weights", "saturation", "alignment"):
            bar = drawing.artists[f"{name} {term}"]
            assert bar.get_width() == getattr(rates, term)
            assert abs(bar.get_y() - row) < 0.5
        np.testing.assert_array_equal(drawing.artists[f"{name} observed"].get_xdata(), [-0.5, -0.5])
    assert [text.get_text() for text in drawing.axes[0].get_yticklabels()] == [
        "lstm\n→ saturation",
        "gru\n→ saturation",
    ]
    assert legend(drawing) == ["observed: their sum", "weights", "saturation", "alignment"]


def spectrum(count):
    """Estimates that come nearer to the last one like 1/t."""
    steps = np.arange(1, 1_001)
    last = -np.arange(1.0, count + 1)
    fields = {"exponents": last, "standard_errors": np.full(count, 0.01), "steps": steps}
    fields["running"] = last + 1 / steps[:, None]
    return LyapunovSpectrum(**dict.fromkeys(LyapunovSpectrum._fields) | fields)


def test_lyapunov_convergence():
    drawing = plots.plot_lyapunov_convergence(spectrum(3), indices=[3, 1], theory=[-3.1, -1.1])
    assert [axes.get_ylabel() for axes in drawing.axes] == [rf"$\lambda_{{{i}}}$, nats per step" for i in (3, 1)]
    np.testing.assert_allclose(drawing.artists["λ3"].get_ydata(), -3 + 1 / np.arange(1, 1_001))
    band = drawing.artists["λ3 last"].get_extents().transformed(drawing.axes[0].transData.inverted())
    np.testing.assert_allclose([band.ymin, band.ymax], [-3.02, -2.98])
    np.testing.assert_array_equal(drawing.artists["λ1 theory"].get_ydata(), [-1.1, -1.1])
    assert list(plots.plot_lyapunov_convergence(spectrum(3)).artists) == ["λ1", "λ1 last", "λ2", "λ2 last"]
    with pytest.raises(ValueError, match="indices has 4, but the spectrum has the exponents 1 to 3"):
        plots.plot_lyapunov_convergence(spectrum(3), indices=[4])
    with pytest.raises(ValueError, match="theory has 1 values for 2 exponents"):
        plots.plot_lyapunov_convergence(spectrum(3), theory=0.5)


def test_scan_tree_is_that_of_jax():
    """Every product of `associative_scan` has a dot, named by its factors; a round for each call of the operator."""
    for length in (2, 11):
        calls = []

        def join(earlier, later, calls=calls):
            assert (earlier[1] + 1 == later[0]).all()
            if len(earlier[0]):
                calls.append([f"{first}–{last}" for first, last in zip(earlier[0], later[1], strict=True)])
            return earlier[0], later[1]

        steps = jnp.arange(1, length + 1)
        jax.lax.associative_scan(join, (steps, steps))
        drawing = plots.plot_scan_tree(length)
        axes, dots = drawing.axes[0], [drawing.artists[way].get_xydata() for way in ("up", "down")]
        column, made = np.concatenate(dots).T
        assert sorted(text.get_text() for text in axes.texts) == sorted(name for call in calls for name in call)
        assert set(made) == set(range(1, len(calls) + 1))
        assert sorted(int(text.get_text().split("–")[1]) for text in axes.texts) == sorted(column)
        # Two lines lead to each dot: from an earlier column and from its own, both from what was made before.
        lines = drawing.artists["lines"].get_xydata().reshape(-1, 3, 2)[:, :2]
        assert len(lines) == 2 * len(made)
        assert (lines[:, 0, 1] < lines[:, 1, 1]).all()
        assert ((lines[:, 0, 0] < lines[:, 1, 0]).sum(), (lines[:, 0, 0] == lines[:, 1, 0]).sum()) == (len(made),) * 2
    assert not plots.plot_scan_tree(17).axes[0].texts
    with pytest.raises(ValueError, match="length is 1: a product takes two factors"):
        plots.plot_scan_tree(1)


def test_newton_errors():
    errors = np.array([[1.0, 10.0, 1.0], [0.0, 1e30, 1e-4], [0.0, 1e-8, np.inf]])
    drawing = plots.plot_newton_errors({"a": errors, "b": errors[:2] / 100}, dt=0.5, unit="s")
    mesh, line, other, _, bar = drawing.artists.values()
    assert mesh.get_clim() == other.get_clim() == (-8, 1)
    assert bar.extend == "max"
    np.testing.assert_allclose(mesh.get_array()[:, 1], [1, 30, -8])
    np.testing.assert_allclose(mesh.get_array()[1:, 0], -8)
    assert np.ma.getmaskarray(mesh.get_array()).sum() == 1
    np.testing.assert_allclose(line.get_xydata(), [[0.25, 0], [0.75, 1], [1.25, 2]])
    first = drawing.axes[0]
    assert (first.get_ylim(), first.get_xlim()) == ((2.5, -0.5), (0.25, 1.75))
    assert (first.get_xlabel(), first.get_ylabel()) == ("time t (s)", "iteration k")
    assert plots.plot_newton_errors(np.zeros((2, 2)))._repr_png_()
    with pytest.raises(ValueError, match=r"errors have shape \(3,\), but a row for each iterate is drawn"):
        plots.plot_newton_errors(np.ones(3))


def test_newton_iterations():
    counts = {"T = 10": [9, 3, 4], "T = 100": [100, 3, 5]}
    drawing = plots.plot_newton_iterations([0.2, -0.5, -0.1], counts, converged={"T = 100": [False, True, True]})
    short, long, hollow = drawing.artists.values()
    np.testing.assert_array_equal(short.get_xydata(), [[-0.5, 3], [-0.1, 4], [0.2, 9]])
    np.testing.assert_array_equal(long.get_ydata(), [3, 5, 100])
    np.testing.assert_array_equal(hollow.get_xydata()[0], [0.2, 100])
    assert np.isnan(hollow.get_ydata()[1:]).all()
    assert legend(drawing) == ["T = 10", "T = 100", "not converged"]
    assert list(plots.plot_newton_iterations([0.1], [4]).artists) == ["iterations"]
    with pytest.raises(ValueError, match=r"iterations have shape \(2,\), but exponents \(1,\)"):
        plots.plot_newton_iterations([0.1], [4, 5])


@pytest.mark.parametrize(
    ("draw", "panels"),
    [
        (lambda ax: plots.plot_lines([1.0, 2.0], ax=ax), 1),
        (lambda ax: plots.plot_matrices({"a": jnp.eye(2), "b": jnp.eye(3)}, ax=ax), 2),
        (lambda ax: plots.plot_schedule(bptt.checkpoint_schedule(5, 2), ax=ax), 2),
        (lambda ax: plots.plot_lyapunov_convergence(spectrum(2), ax=ax), 2),
        (lambda ax: plots.plot_scan_tree(5, ax=ax), 1),
        (lambda ax: plots.plot_newton_errors({"a": np.eye(3), "b": np.eye(2)}, ax=ax), 2),
        (lambda ax: plots.plot_newton_iterations([-0.1, 0.1], [3, 9], converged=[True, False], ax=ax), 1),
    ],
)
def test_given_axes_and_a_picture(draw, panels):
    given = list(Figure().subplots(1, panels, squeeze=False).flat)
    drawing = draw(given if panels > 1 else given[0])
    assert list(drawing.axes) == given
    assert drawing.figure is given[0].figure
    assert drawing._repr_png_().startswith(b"\x89PNG")
    assert draw(None)._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=f"{panels + 1} Axes"):
        draw(list(Figure().subplots(1, panels + 1, squeeze=False).flat))
