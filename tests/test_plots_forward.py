"""Figures of gradients taken forward in time show their numbers where they are, and what random ones leave open."""

import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from test_plots import kept, score

import jaxbptt as bptt
from jaxbptt import plots


def legend(drawing):
    return [text.get_text() for text in drawing.figure.legends[0].get_texts()]


def ticks(axes):
    drawn = io.BytesIO()
    axes.figure.savefig(drawn)
    return [label.get_text() for label in axes.get_yticklabels()]


def board(*rows):
    return bptt.analysis.Scoreboard(rows, score("scan", 0.0, seconds=2e-6), {})


TRUNCATED = [score(f"K = {K}", 1 / K, seconds=3e-6 + K * 1e-7, flops=K, bytes=1024 * K) for K in (2, 10, 1)]
DRAWN = score("uoro", 3.0, draws=16, bias=0.5, standard_error=0.4, seconds=5e-6, flops=4.0, bytes=512)


def test_scoreboard():
    """Truncations are one line, in order; of random ones the error of the mean, and what it would be without a bias."""
    drawing = plots.plot_scoreboard(board(*TRUNCATED, score("snap(1)", 0.2), score("snap(2)", 1e-9), DRAWN))
    errors, cosines = drawing.axes
    artists = drawing.artists
    np.testing.assert_allclose(artists["K = 1 … 10 error"].get_xdata(), [3.1, 3.2, 4.0])
    np.testing.assert_allclose(artists["K = 1 … 10 error"].get_ydata(), [1, 0.5, 0.1])
    np.testing.assert_allclose(artists["K = 1 … 10 cosine"].get_ydata(), [0.1, 0.05, 0.01])
    assert [text.get_text() for text in errors.texts] == ["1", "10", "2"]
    np.testing.assert_allclose(errors.texts[1].xy, (4.0, 0.1))
    lines = [artists[f"uoro {what}"] for what in ("error", "bias", "standard error")]
    np.testing.assert_allclose([line.get_xydata()[0] for line in lines], [(5, 3), (5, 0.5), (5, 0.4)])
    np.testing.assert_allclose(errors.collections[0].get_segments(), [[(5, 0.4), (5, 3)]])
    assert legend(drawing)[:4] == ["scan", "K = 1 … 10", "snap(1)", "snap(2)"]
    assert legend(drawing)[4:] == ["uoro", "mean of 16 draws", "its standard error"]
    assert artists["K = 1 … 10 error"].get_linestyle() == "-"
    assert artists["snap(1) error"].get_linestyle() == "None"
    looks = [(line.get_color(), line.get_marker()) for name, line in artists.items() if name.endswith(" error")]
    assert len(set(looks)) == len(looks)
    assert cosines.get_ylabel() == "1 − cosine of g and g*"


def test_exact_ones_are_at_the_bottom():
    """A decade below the others, where the axis says so; without exact ones there is no such place."""
    drawing = plots.plot_scoreboard(board(*TRUNCATED, score("rtrl", 1e-9, cosine=1.0)))
    for axes, lowest, what in zip(drawing.axes, (0.01, 0.001), ("error", "cosine"), strict=True):
        for name in ("scan", "rtrl"):
            np.testing.assert_allclose(drawing.artists[f"{name} {what}"].get_ydata(), [lowest])
        assert ticks(axes)[0] == "rounding"
        np.testing.assert_allclose(axes.get_yticks()[0], lowest)
        assert axes.get_ylim()[0] < lowest
    averaged = plots.plot_scoreboard(board(*TRUNCATED, DRAWN._replace(bias=0.005, standard_error=0.002)))
    np.testing.assert_allclose(averaged.artists["scan error"].get_ydata(), [1e-4])
    np.testing.assert_allclose(averaged.artists["uoro bias"].get_ydata(), [0.005])
    np.testing.assert_allclose(averaged.artists["uoro standard error"].get_ydata(), [0.002])
    only = plots.plot_scoreboard(board())
    assert ticks(only.axes[0]) == ["rounding"]
    wrong = bptt.analysis.Scoreboard((score("half", 0.5),), score("bfloat16", 0.1), {})
    assert "rounding" not in ticks(plots.plot_scoreboard(wrong).axes[0])


@pytest.mark.parametrize(("cost", "at"), [("seconds", [3.1, 3.2, 4.0]), ("flops", [1, 2, 10]), ("bytes", [1, 2, 10])])
def test_costs(cost, at):
    drawing = plots.plot_scoreboard(board(*TRUNCATED), cost=cost)
    np.testing.assert_allclose(drawing.artists["K = 1 … 10 cosine"].get_xdata(), at)
    assert ("µs", "operations", "KiB")[["seconds", "flops", "bytes"].index(cost)] in drawing.axes[1].get_xlabel()


def test_what_can_not_be_drawn():
    """A cost that could not be counted, and no angle to a gradient of 0."""
    rows = score("low_rank(4)", 0.1, flops=np.nan), score("nothing", 1.0, cosine=np.nan)
    drawing = plots.plot_scoreboard(board(*rows), cost="flops")
    assert legend(drawing) == ["scan", "nothing"]
    assert np.isnan(drawing.artists["nothing cosine"].get_ydata()).all()
    drawing.savefig(io.BytesIO())
    with pytest.raises(ValueError, match="cost is 'time': pass one of 'seconds', 'flops', 'bytes'"):
        plots.plot_scoreboard(board(), cost="time")


def test_kept_contributions():
    one, other = kept([1.0, 0.5, -0.5]), kept([1.0, np.nan, 0.0])
    drawing = plots.plot_kept_contributions({"snap(1)": one, "rflo": other})
    np.testing.assert_allclose(drawing.artists["snap(1) cosine"].get_ydata(), [1, 0.5, -0.5])
    np.testing.assert_allclose(drawing.artists["rflo norm ratio"].get_ydata(), [0.5, np.nan, np.nan])
    np.testing.assert_allclose(drawing.artists["exact norms"].get_data().values, [1, 1, 1])
    assert drawing.axes[0].get_ylim()[0] < -0.5
    assert drawing.axes[1].get_yscale() == "log"
    assert legend(drawing) == ["snap(1)", "rflo", "size of the exact part, largest 1"]
    networks = {"elman": one, "gru": one._replace(exact_norms=2 * one.exact_norms)}
    assert "exact norms" not in plots.plot_kept_contributions(networks).artists
    nothing = one._replace(exact_norms=0 * one.exact_norms)
    assert "exact norms" not in plots.plot_kept_contributions(nothing).artists


def test_kept_contributions_of_draws():
    drawing = plots.plot_kept_contributions(kept([[1.0, 0.5, np.nan], [0.0, 0.7, np.nan]]))
    np.testing.assert_allclose(drawing.artists["cosine"].get_ydata(), [0.5, 0.6, np.nan])
    (outline,) = drawing.artists["cosine band"].get_paths()
    assert {(0, 0), (0, 1)} <= {tuple(point) for point in outline.vertices.round(6)}
    assert {(1, 0.5), (1, 0.7)} <= {tuple(point) for point in outline.vertices.round(6)}
    wide = plots.plot_kept_contributions(kept([[20.0, 1.0], [0.2, 1.0], [0.2, 1.0]])).artists["norm ratio band"]
    np.testing.assert_allclose(wide.get_paths()[0].vertices[:, 1].min(), 0.34, err_msg="a tenth of the mean")
    drawing.savefig(io.BytesIO())


def test_influence():
    """Leaves beside each other, each [carry, weights], at the steps asked for, on one scale around 0."""
    W, b = np.arange(4 * 2 * 2 * 3).reshape(4, 2, 2, 3) - 20.0, np.ones((4, 2, 2))
    drawing = plots.plot_influence({"W": W, "b": b}, steps=[1, 4])
    first, last = (drawing.artists[f"t = {t}"] for t in (1, 4))
    np.testing.assert_array_equal(last.get_array()[:, :6], W[3].reshape(2, 6))
    np.testing.assert_array_equal(first.get_array()[:, 6:], b[0])
    assert first.get_clim() == last.get_clim() == (-27, 27)
    assert [axes.get_ylabel() for axes in drawing.axes] == ["t = 1", "t = 4"]
    assert [label.get_text() for label in drawing.axes[-1].get_xticklabels()] == ["W", "b"]
    np.testing.assert_allclose(drawing.axes[-1].get_xticks(), [2.5, 6.5])
    np.testing.assert_allclose([line.get_xdata()[0] for line in drawing.axes[0].lines], [2.5, 5.5])
    drawing.savefig(io.BytesIO())
    assert [*plots.plot_influence(np.ones((11, 2, 3))).artists] == [
        *(f"t = {t}" for t in (1, 3, 5, 7, 9, 11)),
        "colour bar",
    ]
    given = Figure().subplots(2, 1)
    assert plots.plot_influence(b, steps=[2, 3], ax=given).axes == tuple(given)


def test_influence_says_what_is_wrong():
    with pytest.raises(ValueError, match=r"of shapes W \(4, 2, 3\), b \(3, 2, 2\): pass \[time, carry, \*leaf\]"):
        plots.plot_influence({"W": np.ones((4, 2, 3)), "b": np.ones((3, 2, 2))})
    with pytest.raises(ValueError, match=r"of shapes \(4,\): pass"):
        plots.plot_influence(np.ones(4))
    with pytest.raises(ValueError, match=r"steps are .*0.*: pass time steps between 1 and 4"):
        plots.plot_influence(np.ones((4, 2, 3)), steps=[0, 1])
    with pytest.raises(ValueError, match="between 1 and 4"):
        plots.plot_influence(np.ones((4, 2, 3)), steps=[])
