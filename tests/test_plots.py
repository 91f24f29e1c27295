"""Figures show the numbers they are given, labelled, and leave matplotlib as it was."""

import inspect
import io
from itertools import pairwise

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from reference import make_cell, problem

import jaxbptt as bptt
from jaxbptt import models, plots
from jaxbptt.plots.figure import MARKERS, NEUTRAL

NO_NUMBERS = [np.zeros(1), np.zeros(4), np.full(4, np.nan), np.array([0.0, np.nan, np.inf, -np.inf])]


@pytest.fixture(autouse=True)
def nothing_global():
    before = dict(matplotlib.rcParams)
    yield
    assert dict(matplotlib.rcParams) == before
    import matplotlib.pyplot as plt

    assert plt.get_fignums() == []


def flow(name="elman", loss=lambda h, ys: jnp.sum(ys[-1])):
    cell = make_cell(name)
    return bptt.gradient_flow(cell, *problem(cell, 9), loss)


def save(drawing):
    assert isinstance(drawing, plots.Drawing)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png")
    return buffer.getvalue()


def texts(drawing):
    return [text.get_text() for text in drawing.figure.legends[0].get_texts()]


def test_gradient_flow():
    flows = {"elman": flow(), "lstm": flow("lstm")}
    drawing = plots.plot_gradient_flow(flows)
    (axes,) = drawing.axes
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "time step t"
    assert "gradient magnitude" in axes.get_ylabel()
    assert texts(drawing) == ["elman", "lstm"]
    for line, name in zip(axes.lines, flows, strict=True):
        np.testing.assert_allclose(line.get_xdata(), np.arange(1, 10))
        np.testing.assert_allclose(line.get_ydata(), flows[name].norms)
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()
    assert save(drawing)


def test_immediate_part_and_zeros():
    everywhere = plots.plot_gradient_flow(flow(loss=lambda h, ys: jnp.sum(ys**2)))
    assert len(everywhere.axes[0].lines) == 2
    assert texts(everywhere) == ["in full", "through yₜ alone"]
    cut = flow(loss=lambda h, ys: jnp.sum(ys[3]))
    drawing = plots.plot_gradient_flow(cut)
    assert np.isnan(drawing.axes[0].lines[0].get_ydata()[4:]).all()
    assert save(drawing)


def test_certificate():
    cell = make_cell("elman")
    wrong = cell.adjoint._replace(contract=lambda *a: jax.tree.map(lambda b: 2 * b, cell.adjoint.contract(*a)))
    scans = {"right": bptt.adjoint_scan, "wrong": lambda *a, **kw: bptt.adjoint_scan(*a, adjoint=wrong, **kw)}
    certificate = bptt.certify(cell, *problem(cell, 5), lambda h, ys: jnp.sum(ys**2), scans=scans, repeats=1)
    drawing = plots.plot_certificate(certificate)
    errors, memory, seconds = drawing.axes
    assert [label.get_text() for label in errors.get_yticklabels()] == ["scan", "right", "wrong"]
    drawn = [line.get_xdata()[0] for line in errors.lines if line.get_marker() in ("o", "X")]
    np.testing.assert_allclose(drawn, [row.largest_error for row in certificate.rows[1:]])
    assert [line.get_marker() for line in seconds.lines] == ["o", "o", "X"]
    np.testing.assert_allclose(
        [line.get_xdata()[0] for line in memory.lines], [row.temporary_bytes / 1024 for row in certificate.rows]
    )
    assert save(drawing)


def test_singular_values():
    J = jnp.tile(jnp.diag(jnp.array([0.9, 0.1])), (30, 1, 1))
    values = bptt.product_log_singular_values(bptt.jacobian_products(J))
    drawing = plots.plot_singular_values({"one": values, "two": values}, bound_rate={"one": 0.95})
    one, two = drawing.axes
    assert one.get_title() == "one"
    largest, smallest, bound = (line.get_ydata() for line in one.lines)
    np.testing.assert_allclose(largest, np.arange(30) * np.log10(0.9), atol=1e-9)
    np.testing.assert_allclose(smallest[:10], -np.arange(10.0), atol=1e-3)
    assert np.isnan(smallest[20:]).all()
    np.testing.assert_allclose(bound, np.arange(30) * np.log10(0.95))
    assert len(two.lines) == 2
    assert len(plots.plot_singular_values(values, bound_rate=0.9).axes[0].lines) == 3
    assert save(drawing)


def test_singular_values_at_chosen_lags():
    """Of the sweep, for starts in any order; entry s has the lag T − s."""
    J = jnp.tile(jnp.diag(jnp.array([0.9, 0.1])), (30, 1, 1))
    starts = np.array([0, 25, 10])
    drawing = plots.plot_singular_values(bptt.singular_values(J, start=starts), lags=30 - starts, bound_rate=0.95)
    largest, smallest, bound = drawing.axes[0].lines
    for line, rate in ((largest, 0.9), (smallest, 0.1), (bound, 0.95)):
        np.testing.assert_array_equal(line.get_xdata(), [5, 20, 30])
        np.testing.assert_allclose(line.get_ydata(), np.array([5, 20, 30]) * np.log10(rate), rtol=1e-9)


def test_surviving_paths():
    tables = {
        "chunks": bptt.surviving_paths(bptt.truncated_scan, 6, truncation_length=3),
        "full": bptt.surviving_paths(bptt.scan, 6),
    }
    drawing = plots.plot_surviving_paths(tables)
    for axes, (name, table) in zip(drawing.axes, tables.items(), strict=True):
        shown = axes.collections[0].get_array().reshape(6, 6)
        kept = np.ma.filled(shown, -1.0)
        np.testing.assert_array_equal(kept == 1, table)
        np.testing.assert_array_equal(kept == 0, np.tril(np.ones((6, 6))) - np.asarray(table, float) > 0)
        assert axes.get_title() == name
        assert axes.get_ylim() == (6.5, 0.5)
    assert texts(drawing) == ["kept", "cut"]
    assert save(drawing)
    assert save(plots.plot_surviving_paths(tables["full"]))


def bias(lengths, windowed, truncated=None, array=jnp.asarray):
    """Relative errors of both kinds; cosines are 1 less half of them."""
    curves = (np.asarray(errors, float) for errors in (windowed, windowed if truncated is None else truncated))
    curves = (bptt.analysis.BiasCurve(array(errors), array(1 - errors / 2)) for errors in curves)
    return bptt.analysis.TruncationBias(array(np.asarray(lengths)), *curves)


@pytest.mark.parametrize("array", [jnp.asarray, np.asarray])
def test_truncation_bias(array):
    three = bias((1, 4, 20), (0.5, 0.1, 0.01), (0.5, 0.2, 0.0), array)
    drawing = plots.plot_truncation_bias({"elman": three, "gru": three})
    errors, cosines = drawing.axes
    assert errors.get_yscale() == errors.get_xscale() == cosines.get_xscale() == "log"
    assert len(errors.lines) == len(cosines.lines) == 4
    for line, direction, drawn in zip(
        errors.lines, cosines.lines, [[0.5, 0.1, 0.01], [0.5, 0.2, np.nan]] * 2, strict=True
    ):
        np.testing.assert_allclose(line.get_xdata(), [1, 4, 20])
        np.testing.assert_allclose(line.get_ydata(), drawn, err_msg="no error has no place on a log axis")
        np.testing.assert_allclose(direction.get_ydata(), 1 - np.nan_to_num(drawn) / 2)
        assert line.get_marker() in ("o", "s")
    assert errors.lines[0].get_linestyle() != errors.lines[1].get_linestyle()
    assert texts(drawing) == ["elman windowed", "elman truncated", "gru windowed", "gru truncated"]
    assert texts(plots.plot_truncation_bias(three)) == ["windowed", "truncated"]
    assert save(drawing)
    assert [label.get_text() for label in cosines.get_xticklabels()] == ["1", "4", "20"]


@pytest.mark.parametrize("lengths", [range(1, 401), range(95, 101), range(990, 1_010), range(1, 9), [7]])
def test_ticks_at_truncation_lengths(lengths):
    drawing = plots.plot_truncation_bias(bias(lengths, 1 / np.array(lengths)))
    errors, _ = drawing.axes
    assert errors.lines[0].get_marker() == ("None" if len(lengths) > 12 else "o")
    assert save(drawing)
    low, high = errors.get_xlim()
    shown = [label.get_text() for label in errors.get_xticklabels() if low <= label.get_position()[0] <= high]
    assert 1 <= len(shown) <= 10
    assert all(text.replace(",", "").isdigit() for text in shown)
    boxes = [label.get_window_extent() for label in errors.get_xticklabels()]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes)), "labels do not overlap"


@pytest.mark.slow
def test_truncation_bias_of_what_bptt_returns():
    cell = make_cell("gru")
    result = bptt.truncation_bias(cell, *problem(cell, 6), lambda h, ys: jnp.sum(ys**2))
    drawing = plots.plot_truncation_bias(result)
    np.testing.assert_allclose(drawing.axes[0].lines[0].get_ydata()[:5], result.windowed.relative_errors[:5])
    assert save(drawing)


def lags(norms, array=jnp.asarray):
    norms = np.asarray(norms, float)
    return bptt.analysis.LagContributions(None, None, array(norms), array(norms / 2), array(1 - norms / 4))


@pytest.mark.parametrize("array", [jnp.asarray, np.asarray])
def test_lag_contributions(array):
    drawing = plots.plot_lag_contributions({"elman": lags([1, 0, 0.01], array)})
    sizes, sums = drawing.axes
    assert sizes.get_title() == "elman"
    assert sizes.get_yscale() == "log"
    np.testing.assert_allclose([bar.get_height() for bar in sizes.patches], [1, np.nan, 0.01])
    np.testing.assert_allclose([bar.get_x() + bar.get_width() / 2 for bar in sizes.patches], [0, 1, 2])
    assert sizes.get_ylim()[0] < 0.01
    cosine, error = sums.lines
    np.testing.assert_allclose(cosine.get_ydata(), [0.75, 1, 0.9975])
    np.testing.assert_allclose(error.get_ydata(), [0.5, 0, 0.005])
    assert texts(drawing) == ["cosine", "relative error"]
    assert save(drawing)


def test_many_lags_and_many_names():
    decay = lags(0.9 ** np.arange(100))
    drawing = plots.plot_lag_contributions(decay)
    (area,) = drawing.axes[0].patches
    np.testing.assert_allclose(area.get_data().values, decay.norms)
    np.testing.assert_allclose(area.get_data().edges[:2], [-0.5, 0.5])
    assert save(drawing)

    drawing = plots.plot_lag_contributions({"one": decay, "two": lags([1.0, 0.5])})
    sizes, sums = drawing.axes
    assert not sizes.patches
    np.testing.assert_allclose(sizes.lines[1].get_ydata(), [1, 0.5])
    assert len({line.get_color() for line in sizes.lines}) == 2
    assert len(sums.lines) == 4
    assert texts(drawing) == ["one", "two", "cosine", "relative error"]
    assert save(drawing)


def spectrum(exponents, errors=0.1, resolved=True, array=jnp.asarray):
    exponents = np.asarray(exponents, float)
    k = len(exponents)
    fields = exponents, np.full(k, errors), np.broadcast_to(resolved, k), exponents[None], np.array([9])
    return bptt.analysis.LyapunovSpectrum(*map(array, fields), array(0.0), array(0.0))


@pytest.mark.parametrize("array", [jnp.asarray, np.asarray])
def test_lyapunov_spectrum(array):
    one = spectrum([0.5, -1, -3, -np.inf], resolved=[True, True, False, False], array=array)
    drawing = plots.plot_lyapunov_spectrum(one, theory=array(np.array([0.4, -3.0])))
    (axes,) = drawing.axes
    zero, filled, hollow, theory = axes.lines
    assert set(zero.get_ydata()) == {0}
    np.testing.assert_allclose(filled.get_xdata(), [1, 2, 3, 4])
    np.testing.assert_allclose(filled.get_ydata(), [0.5, -1, np.nan, np.nan])
    np.testing.assert_allclose(hollow.get_ydata(), [np.nan, np.nan, -3, np.nan])
    assert hollow.get_markerfacecolor() == "white"
    np.testing.assert_allclose(theory.get_xdata(), [1, 4])
    np.testing.assert_allclose(theory.get_ydata(), [0.4, -3])
    assert theory.get_linestyle() == "--"
    bars = axes.collections[0].get_segments()
    np.testing.assert_allclose(bars[0], [[1, 0.3], [1, 0.7]], err_msg="two standard errors")
    assert axes.get_xlabel() == "index i"
    assert texts(drawing) == ["theory", "not resolved"]
    assert save(drawing)


def test_lyapunov_spectra_of_several_sizes():
    drawing = plots.plot_lyapunov_spectrum({"two": spectrum([0, -1]), "four": spectrum([0, -1, -2, -3])}, theory=-1.0)
    _, two, four, theory = drawing.axes[0].lines
    np.testing.assert_allclose(two.get_xdata(), [0.5, 1])
    np.testing.assert_allclose(four.get_xdata(), [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(theory.get_xdata(), [0.25, 1])
    assert (two.get_marker(), four.get_marker()) == MARKERS[:2]
    assert drawing.axes[0].get_xlabel() == "index i / k"
    assert texts(drawing) == ["two", "four", "theory"]
    assert save(drawing)
    same = plots.plot_lyapunov_spectrum({"a": spectrum([0, -1]), "b": spectrum([0, -2])})
    assert same.axes[0].get_xlabel() == "index i"


def test_lyapunov_spectrum_without_errors():
    drawing = plots.plot_lyapunov_spectrum(spectrum([-1.0, np.nan], errors=np.nan), theory=[-1.0, -np.inf])
    assert not drawing.figure.legends or texts(drawing) == ["theory"]
    assert save(drawing)


@pytest.mark.parametrize("array", [jnp.asarray, np.asarray])
def test_eigenvalues(array):
    values = np.array([[0.5 + 0.5j, 0.5 - 0.5j], [2.0, np.nan], [-0.1, complex(np.inf, 1)]])
    drawing = plots.plot_eigenvalues({"all": array(values), "real": array(np.array([0.1, 0.2]))})
    first, second = drawing.axes
    (points,) = first.lines
    drawn = points.get_xdata() + 1j * points.get_ydata()
    np.testing.assert_allclose(drawn[np.isfinite(drawn)], [0.5 + 0.5j, 0.5 - 0.5j, 2, -0.1])
    np.testing.assert_allclose(second.lines[0].get_ydata(), [0, 0])
    for axes, name in zip(drawing.axes, ["all", "real"], strict=True):
        (circle,) = axes.patches
        assert (circle.center, circle.radius) == ((0, 0), 1)
        assert axes.get_aspect() == 1
        assert axes.get_title() == name
        low, high = axes.get_xlim()
        assert low < -1 < 2 < high, "one scale, and all in sight"
    assert save(drawing)


def shown(axes):
    mesh = axes.collections[0]
    steps = round(mesh.get_array().size ** 0.5)
    return mesh, np.ma.filled(np.ma.asarray(mesh.get_array(), float), np.nan).reshape(steps, steps)


@pytest.mark.parametrize("array", [jnp.asarray, np.asarray])
def test_log_norms(array):
    J = jnp.full((5, 1, 1), 0.01)
    falling = array(np.asarray(bptt.log_norms(J)))
    drawing = plots.plot_log_norms({"small": falling, "smaller": 2 * falling})
    small, smaller = drawing.axes
    bar = drawing.artists["colour bar"].ax
    mesh, tens = shown(small)
    t, s = np.indices((5, 5))
    np.testing.assert_allclose(tens, np.where(t >= s, -2.0 * (t - s), np.nan))
    np.testing.assert_allclose(shown(smaller)[1], 2 * tens)
    np.testing.assert_allclose([mesh.get_clim(), shown(smaller)[0].get_clim()], [(-16, 0)] * 2, err_msg="one scale")
    assert mesh.cmap.name == "viridis"
    assert to_rgb(mesh.cmap.get_bad()) == to_rgb(NEUTRAL)
    assert (small.get_title(), small.get_ylim(), small.get_xlim()) == ("small", (5.5, 0.5), (0.5, 5.5))
    assert "later" in small.get_ylabel()
    assert "earlier" in small.get_xlabel()
    assert "norm" in bar.get_ylabel()
    assert save(drawing)


def test_log_norms_on_both_sides_of_one():
    drawing = plots.plot_log_norms(np.log(10) * np.array([[0, -np.inf], [-4, 2]]))
    mesh, _ = shown(drawing.axes[0])
    np.testing.assert_allclose(mesh.get_clim(), (-4, 4), err_msg="centred on norms of 1")
    assert mesh.cmap.name == "RdBu_r"
    mostly_falling = plots.plot_log_norms(np.log(10) * np.array([[0.3, -np.inf], [-9, 0.3]]))
    assert shown(mostly_falling.axes[0])[0].cmap.name == "viridis"
    assert save(drawing)


def written(axes):
    return "".join(text.get_text() for text in axes.texts)


@pytest.mark.parametrize("array", [jnp.asarray, np.asarray])
def test_text_saliency(array):
    values = np.array([0.0, 0.1, 0.2, np.nan, 0.4, 0.5, 1.0])
    drawing = plots.plot_text_saliency("a\tb \ncd", array(values), per_line=4)
    (axes,), bar = drawing.axes, drawing.artists["colour bar"].ax
    assert written(axes) == "a→b·↵cd"
    places = [text.get_position() for text in axes.texts]
    np.testing.assert_allclose(
        places, [(x + 0.5, y + 0.5) for x, y in [(0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (0, 2), (1, 2)]]
    )
    (boxes,) = axes.collections
    np.testing.assert_allclose(np.ma.filled(boxes.get_array(), np.nan), values)
    assert boxes.get_clim() == (0, 1)
    corners = [path.get_extents().p0 for path in boxes.get_paths()]
    np.testing.assert_allclose(corners, np.array(places) - 0.5)
    assert save(drawing)
    np.testing.assert_allclose(boxes.get_facecolor()[0], [1, 1, 1, 1])
    np.testing.assert_allclose(boxes.get_facecolor()[3][:3], to_rgb(NEUTRAL))
    inks = [to_rgb(text.get_color()) for text in axes.texts]
    assert inks[0] == (0, 0, 0)
    assert inks[-1] == (1, 1, 1), "white on the darkest shade"
    assert inks[1] not in [(0, 0, 0), (1, 1, 1)], "symbols are quiet"
    assert "saliency" in bar.get_xlabel()


def test_text_saliency_by_name():
    drawing = plots.plot_text_saliency("word", {"first": np.ones(4), "second": 3 * jnp.ones(4)})
    first, second = drawing.axes
    assert (first.get_title("left"), second.get_title("left")) == ("first", "second")
    assert written(first) == written(second) == "word"
    assert first.collections[0].get_clim() == second.collections[0].get_clim() == (0, 3), "one scale"
    assert save(drawing)


def test_text_of_any_characters():
    text = "$x$ \\frac 漢é😀\x00\ŕ\ud800→"
    drawing = plots.plot_text_saliency(text, np.arange(len(text)))
    drawn = written(drawing.axes[0])
    assert len(drawn) == len(text)
    assert drawn.startswith("$x$·\\frac·□é□□")
    glyphs = get_font(findfont("DejaVu Sans Mono"))
    assert all(glyphs.get_char_index(ord(character)) for character in drawn)
    assert save(drawing)


def test_boxes_keep_their_size():
    for text, per_line in [("ab", 64), ("word " * 30, 64), ("word\n" * 12, 10)]:
        drawing = plots.plot_text_saliency(text, np.ones(len(text)), per_line=per_line)
        assert save(drawing)
        axes = drawing.axes[0]
        (x0, y0), (x1, y1) = axes.transData.transform([(0, 0), (1, 1)]) / drawing.figure.dpi
        assert 0.12 < x1 - x0 < 0.17, text
        assert 0.2 < y0 - y1 < 0.3, text


@pytest.mark.parametrize(
    ("text", "values", "options", "message"),
    [
        ("abc", np.ones(2), {}, r"shape \(2,\), but text has 3 characters"),
        ("abc", np.ones((1, 3)), {}, "one row"),
        ("abc", {"last": np.ones(4)}, {}, "saliency 'last' has shape"),
        ("abc", -np.ones(3), {}, "negative"),
        ("", np.ones(0), {}, "empty"),
        ("abc", np.ones(3), {"per_line": 0}, "per_line is 0"),
    ],
)
def test_text_saliency_says_what_is_wrong(text, values, options, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_text_saliency(text, values, **options)


def future(steps, columns=1, measured=None):
    mean, spread = np.arange(steps * columns, dtype=float).reshape(steps, columns), np.ones((steps, columns))
    spread[measured if measured is not None else steps :] = np.nan
    names = tuple(f"$c_{i}" for i in range(columns))
    return models.Forecast(names, mean, mean - spread, mean + 2 * spread, 0.95, (), measured or 0)


def test_forecast():
    past = np.arange(40.0).reshape(20, 2) + 100
    drawing = plots.plot_forecast(future(4, 2, measured=3), past)
    upper, lower = drawing.axes
    for i, axes in enumerate((upper, lower)):
        behind, ahead, points, _ = axes.lines
        np.testing.assert_array_equal(behind.get_xdata(), np.arange(-19, 1))
        np.testing.assert_array_equal(behind.get_ydata(), past[:, i])
        np.testing.assert_array_equal(ahead.get_xdata(), np.arange(5))
        np.testing.assert_array_equal(ahead.get_ydata(), [past[-1, i], *future(4, 2).mean[:, i]])
        np.testing.assert_array_equal(points.get_xdata(), np.arange(1, 5))
        assert points.get_marker() == "o"
        (band,) = axes.collections
        corners = band.get_paths()[0].vertices
        assert set(corners[:, 0]) == {1, 2, 3}, "no interval where there is none"
        np.testing.assert_array_equal(
            np.unique(corners[:, 1]), np.unique([[2 * h + i - 1, 2 * h + i + 2] for h in range(3)])
        )
        assert axes.get_ylabel() == rf"\$c_{i}"
    assert texts(drawing) == ["past", "forecast", "95 % interval"]
    assert lower.get_xlabel() == "steps after the last known row"
    assert save(drawing)


def test_forecast_on_dates():
    past = np.arange(1500.0).reshape(300, 5)
    times = np.datetime64("2024-02-20T05") + np.arange(330) * np.timedelta64(1, "h")
    drawing = plots.plot_forecast(future(30, 5), past, times=times)
    assert save(drawing)
    assert len(drawing.axes) == 4
    assert drawing.axes[0].get_title() == "Forecast, 4 of 5 columns"
    behind, ahead, points, _ = drawing.axes[3].lines
    np.testing.assert_array_equal(behind.get_xdata(), times[210:300])
    np.testing.assert_array_equal(behind.get_ydata(), past[210:, 3])
    assert points.get_marker() in ("", "None")
    np.testing.assert_array_equal(ahead.get_xdata(), times[299:])
    assert drawing.axes[-1].get_xlabel() == ""
    assert texts(plots.plot_forecast(future(3, measured=0), np.zeros((9, 1)))) == ["past", "forecast"]


def test_forecast_on_months():
    months = np.datetime64("2020-01") + np.arange(56)
    drawing = plots.plot_forecast(future(6, 1), np.zeros((50, 1)), times=months.astype("datetime64[us]"))
    assert save(drawing)  # matplotlib has no warning
    assert 3 <= len(drawing.axes[0].get_xticks()) <= 8


@pytest.mark.parametrize(
    ("past", "options", "message"),
    [
        (np.zeros((9, 2)), {}, r"past has shape \(9, 2\), but the forecast is of 1 column"),
        (
            np.zeros((9, 1)),
            {"times": np.arange(9)},
            "times has 9 dates, but the past has 9 rows and the forecast 3: pass 12",
        ),
    ],
)
def test_forecast_says_what_is_wrong(past, options, message):
    with pytest.raises(ValueError, match=message):
        plots.plot_forecast(future(3), past, **options)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("values", NO_NUMBERS, ids=["one zero", "zeros", "nan", "nan and inf"])
@pytest.mark.costly
def test_nothing_to_draw_is_no_error(values, several):
    n = len(values)
    square = np.broadcast_to(values, (n, n))
    resolved = np.ones((n, n), bool)
    drawings = [
        (plots.plot_gradient_flow, bptt.analysis.GradientFlow(*[values] * len(bptt.analysis.GradientFlow._fields))),
        (
            plots.plot_truncation_bias,
            bptt.analysis.TruncationBias(np.arange(1, n + 1), *[bptt.analysis.BiasCurve(values, values)] * 2),
        ),
        (plots.plot_lag_contributions, bptt.analysis.LagContributions(None, None, values, values, values)),
        (plots.plot_singular_values, bptt.analysis.LogSingularValues(square, resolved)),
        (plots.plot_lyapunov_spectrum, spectrum(values, errors=np.inf)),
        (plots.plot_eigenvalues, square),
        (plots.plot_log_norms, square),
        (plots.plot_surviving_paths, np.zeros((n, n), bool)),
        (lambda saliency: plots.plot_text_saliency("abcd"[:n], saliency), np.where(values < 0, np.nan, values)),
    ]
    column = values[:, None]
    assert save(plots.plot_forecast(models.Forecast(("a",), column, column, column, 0.9, (), 0), column))
    for draw, result in drawings:
        assert save(draw({"a": result, "b": result} if several else result))


def test_one_step_is_seen():
    one = jnp.ones(1)
    for drawing in (
        plots.plot_gradient_flow(bptt.analysis.GradientFlow(*[one] * len(bptt.analysis.GradientFlow._fields))),
        plots.plot_lag_contributions(lags([1.0])),
        plots.plot_singular_values(bptt.analysis.LogSingularValues(jnp.zeros((1, 2)), jnp.ones((1, 2), bool))),
    ):
        lines = [line for axes in drawing.axes for line in axes.lines]
        assert lines
        assert {line.get_marker() for line in lines} == {"o"}


def kept(cosines, array=jnp.asarray):
    """Norm ratios are half of the cosines."""
    cosines = np.asarray(cosines, float)
    return bptt.analysis.KeptContributions(None, array(cosines), array(cosines / 2), array(np.ones_like(cosines)))


def score(name, error, **fields):
    """A row of a scoreboard: the cosine is 1 less a tenth of the error; what it costs is the same for all."""
    numbers = {"norm_ratio": 1.0, "bias": error, "standard_error": 0.0, "variance": 0.0, "bytes": 2048, "flops": 8.0}
    row = {"cosine": 1 - error / 10, "relative_error": error, "seconds": 1e-6} | numbers | fields
    return bptt.analysis.ScoreboardRow(name, **row)


def example(name):
    """What a function of `plots` draws of a single result, or of two, and how many panels that takes."""
    at = np.arange(1.0, 4)
    certificate = bptt.analysis.Certificate(
        (bptt.analysis.CertificateRow("scan", True, 0.0, {}, 1e-9, 2048, 1.0, 1.0, 0.5, 0.1),), 1e-6, "float32"
    )
    single = {
        "gradient_flow": (bptt.analysis.GradientFlow(*[at] * len(bptt.analysis.GradientFlow._fields)), 1),
        "certificate": (certificate, 3),
        "learning_curve": ((at, at), 1),
        "forecast": (future(3), 1),
        "text_saliency": ("abc", 1),
        "eigenvalues": (at * 1j, 1),
        "log_norms": (-at[:, None] * at, 1),
        "lyapunov_spectrum": (spectrum([-1.0, -2.0]), 1),
        "singular_values": (bptt.analysis.LogSingularValues(-at[:, None] * at, np.ones((3, 3), bool)), 1),
        "lag_contributions": (lags([0.1, 1.0, 0.5]), 2),
        "surviving_paths": (np.eye(3), 1),
        "scoreboard": (bptt.analysis.Scoreboard((score("a", 0.1),), score("scan", 0.0), {}), 2),
        "kept_contributions": (kept([1.0, 0.5, 0.2]), 2),
        "truncation_bias": (bias((1, 2, 4), at), 2),
    }
    result, panels = single[name]
    more = {"forecast": [np.ones((9, 1))], "text_saliency": [at]}.get(name, [])
    return getattr(plots, f"plot_{name}"), [result, *more], panels


# The artists of each, and what is read back from the first one: in steps, and with two seconds a step.
DRAWN = {
    "gradient_flow": (["norms", "immediate"], lambda line: line.get_xdata(), [1, 2, 3], "time t (s)"),
    "certificate": (
        ["scan error", "scan memory", "scan time", "tolerance"],
        lambda line: line.get_xdata(),
        [1e-9],
        None,
    ),
    "learning_curve": (["training"], lambda line: line.get_ydata(), [1, 2, 3], None),
    "forecast": (
        ["$c_0 past", "$c_0 forecast", "$c_0 steps", "$c_0 interval"],
        lambda line: line.get_xdata(),
        np.arange(-8, 1),
        "time after the last known row (s)",
    ),
    "text_saliency": (["saliency", "letters", "colour bar"], lambda boxes: boxes.get_array(), [1, 2, 3], None),
    "eigenvalues": (["unit circle", "eigenvalues"], lambda circle: circle.radius, 1, None),
    "log_norms": (
        ["log norms", "colour bar"],
        lambda mesh: mesh.get_coordinates()[0, :, 0],
        [0.5, 1.5, 2.5, 3.5],
        "earlier state hₛ, time (s)",
    ),
    "lyapunov_spectrum": (["errors", "exponents"], lambda bars: bars.lines[2][0].get_segments()[0][:, 0], [1, 1], None),
    "singular_values": (["singular values"], lambda lines: lines[0].get_xdata(), [0, 1, 2], "lag T − t (s)"),
    "lag_contributions": (
        ["norms", "cosine", "relative error"],
        lambda bars: [bar.get_x() for bar in bars],
        [-0.4, 0.6, 1.6],
        "lag l (s)",
    ),
    "scoreboard": (
        ["a cosine", "a error", "scan cosine", "scan error"],
        lambda line: line.get_ydata(),
        [0.01],
        None,
    ),
    "kept_contributions": (
        ["cosine", "norm ratio", "exact norms"],
        lambda line: line.get_xdata(),
        [0, 1, 2],
        "lag l (s)",
    ),
    "surviving_paths": (
        ["paths"],
        lambda mesh: mesh.get_coordinates()[0, :, 0],
        [0.5, 1.5, 2.5, 3.5],
        "state hₛ, time (s)",
    ),
    "truncation_bias": (
        ["windowed error", "windowed cosine", "truncated error", "truncated cosine"],
        lambda line: line.get_xdata(),
        [1, 2, 4],
        "truncation length K (s)",
    ),
}


def test_every_figure_takes_axes_and_says_what_it_drew():
    functions = {name: getattr(plots, name) for name in dir(plots) if name.startswith("plot_")}
    assert set(functions) >= {f"plot_{name}" for name in DRAWN}
    for name, function in functions.items():
        signature = inspect.signature(function)
        assert signature.return_annotation is plots.Drawing, name
        assert signature.parameters["ax"].kind is inspect.Parameter.KEYWORD_ONLY, name
        assert ("dt" in signature.parameters) == ("unit" in signature.parameters), name


@pytest.mark.parametrize("name", DRAWN)
def test_in_the_axes_of_a_user(name):
    """The user's other panel, title and figure stay as they are; the legend is in the axes; artists can be read back."""
    draw, args, panels = example(name)
    names, read, in_steps, label = DRAWN[name]
    figure = Figure(figsize=(9, 4))
    other, *given = figure.subplots(1, panels + 1)
    given[0].set_title("mine")
    drawing = draw(*args, ax=given[0] if panels == 1 else np.array(given))
    assert drawing.figure is figure
    assert drawing.axes == tuple(given)
    assert not figure.legends
    assert not other.has_data()
    assert given[0].get_title() == "mine"
    assert all(axes.has_data() for axes in given)
    assert sorted(drawing.artists) == sorted(names)
    assert repr(drawing) == f"Drawing of {', '.join(map(repr, drawing.artists))}"
    np.testing.assert_allclose(read(drawing.artists[names[0]]), in_steps)
    if label is not None:
        drawing = draw(*args, ax=given, dt=2.0, unit="s")
        np.testing.assert_allclose(read(drawing.artists[names[0]]), 2 * np.asarray(in_steps))
        assert drawing.axes[-1].get_xlabel() == label
        with pytest.raises(ValueError, match=r"unit is 's', but dt is None: pass how many s a time step is"):
            draw(*args, unit="s")
        with pytest.raises(ValueError, match=r"dt is 0\.0: the time from one step to the next is above 0"):
            draw(*args, dt=0.0)
    assert save(drawing)
    with pytest.raises(ValueError, match=rf"ax has {panels + 1} Axes, but what is drawn takes {panels}: pass "):
        draw(*args, ax=[*given, other])


def test_axes_that_are_none():
    with pytest.raises(TypeError, match="ax has a int in it: pass Axes of matplotlib"):
        plots.plot_eigenvalues(np.ones(2), ax=[3])


def test_exponents_per_unit_of_time():
    plain, per_second, labelled = (
        plots.plot_lyapunov_spectrum(spectrum([-1.0, -2.0]), theory=-1.0, **options)
        for options in ({}, {"dt": 0.5, "unit": "s"}, {"unit": "τ"})
    )
    np.testing.assert_allclose(plain.artists["exponents"].get_ydata(), [-1, -2])
    np.testing.assert_allclose(per_second.artists["exponents"].get_ydata(), [-2, -4])
    np.testing.assert_allclose(per_second.artists["theory"].get_ydata(), [-2, -2])
    np.testing.assert_allclose(per_second.artists["errors"].lines[2][0].get_segments()[0][:, 1], [-2.4, -1.6])
    np.testing.assert_allclose(labelled.artists["exponents"].get_ydata(), [-1, -2])
    labels = [drawing.axes[0].get_ylabel().rpartition(", ")[2] for drawing in (plain, per_second, labelled)]
    assert labels == ["nats per unit of time", "nats per s", "nats per τ"]


def test_several_results_have_artists_of_their_own():
    flows = {"lstm": flow("lstm", loss=lambda h, ys: jnp.sum(ys)), "gru": flow("gru")}
    drawing = plots.plot_gradient_flow(flows)
    assert sorted(drawing.artists) == ["gru", "lstm", "lstm immediate"]
    np.testing.assert_allclose(drawing.artists["lstm"].get_ydata(), flows["lstm"].norms)
    two = plots.plot_lag_contributions({"lstm": lags([1.0, 0.5]), "gru": lags([1.0, 0.5])})
    assert sorted(two.artists) == sorted(
        f"{n} {what}" for n in ("lstm", "gru") for what in ("norms", "cosine", "relative error")
    )
    panels = Figure().subplots(1, 2)
    plots.plot_lag_contributions({"lstm": lags([1.0, 0.5]), "gru": lags([1.0, 0.5])}, ax=panels)
    assert [[text.get_text() for text in axes.get_legend().get_texts()] for axes in panels] == [
        ["lstm", "gru"],
        ["cosine", "relative error"],
    ]


def test_axes_in_a_part_of_a_figure():
    whole = Figure()
    part, _ = whole.subfigures(1, 2)
    drawing = plots.plot_log_norms(-np.ones((3, 3)), ax=part.subplots())
    assert drawing.figure is whole
    assert save(drawing)


def test_a_notebook_shows_a_figure_once():
    import matplotlib.pyplot as plt

    drawing = plots.plot_eigenvalues(np.ones(2))
    assert drawing._repr_png_().startswith(b"\x89PNG")
    figure, axes = plt.subplots()
    assert plots.plot_eigenvalues(np.ones(2), ax=axes)._repr_png_() is None
    plt.close(figure)


def test_dates_are_no_unit():
    with pytest.raises(ValueError, match="times and dt are both given"):
        plots.plot_forecast(future(3), np.zeros((9, 1)), times=np.arange(12), dt=1.0)


@pytest.mark.parametrize("width", [3.0, 12.0])
def test_a_legend_fits_its_figure(width):
    figure, panels = plots.figure.new_figure(1, width=width)
    for name in ("a cell of some name", "another cell, with a longer name", "third"):
        panels[0].plot([1, 2], label=name)
    plots.figure.add_legend(panels, None)
    figure.canvas.draw()
    extent = figure.legends[0].get_window_extent()
    assert extent.x0 >= 0
    assert extent.x1 <= figure.bbox.width
    assert figure.legends[0]._ncols == (1 if width == 3.0 else 3)


def test_values_of_single_pairs_and_products_are_no_picture():
    with pytest.raises(ValueError, match=r"log_norms have shape \(2,\), but \[time, time\] is drawn"):
        plots.plot_log_norms(np.zeros(2))
    values = bptt.analysis.LogSingularValues(jnp.zeros((2, 3)), jnp.ones((2, 3), bool))
    with pytest.raises(ValueError, match=r"have shape \(3,\), but one row for each lag is drawn"):
        plots.plot_singular_values(bptt.analysis.LogSingularValues(*(part[0] for part in values)))
    with pytest.raises(ValueError, match=r"lags have shape \(3,\), but there are 2 rows of values"):
        plots.plot_singular_values(values, lags=[3, 2, 1])
