"""Figures show the numbers they are given, labelled, and leave matplotlib as it was."""

import io

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from reference import make_cell, problem

import jaxbptt as bptt
from jaxbptt import plots
from jaxbptt.report import TruncationBias


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


def save(figure):
    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def test_gradient_flow():
    flows = {"elman": flow(), "lstm": flow("lstm")}
    figure = plots.plot_gradient_flow(flows)
    (axes,) = figure.axes
    assert axes.get_yscale() == "log"
    assert axes.get_xlabel() == "time step t"
    assert "gradient magnitude" in axes.get_ylabel()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["elman", "lstm"]
    for line, name in zip(axes.lines, flows, strict=True):
        np.testing.assert_allclose(line.get_xdata(), np.arange(1, 10))
        np.testing.assert_allclose(line.get_ydata(), flows[name].norms)
    assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()
    assert save(figure)


def test_immediate_part_and_zeros():
    everywhere = plots.plot_gradient_flow(flow(loss=lambda h, ys: jnp.sum(ys**2)))
    assert len(everywhere.axes[0].lines) == 2
    cut = flow(loss=lambda h, ys: jnp.sum(ys[3]))
    figure = plots.plot_gradient_flow(cut)
    assert np.isnan(figure.axes[0].lines[0].get_ydata()[4:]).all()
    assert save(figure)


def test_certificate():
    cell = make_cell("elman")
    wrong = cell.adjoint._replace(contract=lambda *a: jax.tree.map(lambda b: 2 * b, cell.adjoint.contract(*a)))
    scans = {"right": bptt.adjoint_scan, "wrong": lambda *a, **kw: bptt.adjoint_scan(*a, adjoint=wrong, **kw)}
    certificate = bptt.certify(cell, *problem(cell, 5), lambda h, ys: jnp.sum(ys**2), scans=scans, repeats=1)
    figure = plots.plot_certificate(certificate)
    errors, memory, seconds = figure.axes
    assert [label.get_text() for label in errors.get_yticklabels()] == ["scan", "right", "wrong"]
    drawn = [line.get_xdata()[0] for line in errors.lines if line.get_marker() in ("o", "X")]
    np.testing.assert_allclose(drawn, [row.largest_error for row in certificate.rows[1:]])
    assert [line.get_marker() for line in seconds.lines] == ["o", "o", "X"]
    np.testing.assert_allclose(
        [line.get_xdata()[0] for line in memory.lines], [row.temporary_bytes / 1024 for row in certificate.rows]
    )
    assert save(figure)


def test_singular_values():
    J = jnp.tile(jnp.diag(jnp.array([0.9, 0.1])), (30, 1, 1))
    values = bptt.log_singular_values(bptt.jacobian_products(J))
    figure = plots.plot_singular_values({"one": values, "two": values}, bound_rate={"one": 0.95})
    one, two = figure.axes
    assert one.get_title() == "one"
    largest, smallest, bound = (line.get_ydata() for line in one.lines)
    np.testing.assert_allclose(largest, np.arange(30) * np.log10(0.9), atol=1e-9)
    np.testing.assert_allclose(smallest[:10], -np.arange(10.0), atol=1e-3)
    assert np.isnan(smallest[20:]).all()
    np.testing.assert_allclose(bound, np.arange(30) * np.log10(0.95))
    assert len(two.lines) == 2
    assert len(plots.plot_singular_values(values, bound_rate=0.9).axes[0].lines) == 3
    assert save(figure)


def test_surviving_paths():
    tables = {
        "chunks": bptt.surviving_paths(bptt.truncated_scan, 6, truncation_length=3),
        "full": bptt.surviving_paths(bptt.scan, 6),
    }
    figure = plots.plot_surviving_paths(tables)
    for axes, (name, table) in zip(figure.axes, tables.items(), strict=True):
        shown = axes.collections[0].get_array().reshape(6, 6)
        kept = np.ma.filled(shown, -1.0)
        np.testing.assert_array_equal(kept == 1, table)
        np.testing.assert_array_equal(kept == 0, np.tril(np.ones((6, 6))) - np.asarray(table, float) > 0)
        assert axes.get_title() == name
        assert axes.get_ylim() == (6.5, 0.5)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["kept", "cut"]
    assert save(figure)
    assert save(plots.plot_surviving_paths(tables["full"]))


def test_truncation_bias():
    bias = TruncationBias((1, 4), {"cut": (0.5, 0.0), "window": (0.5, 0.1)}, {"cut": (0.8, 1.0), "window": (0.8, 0.9)})
    figure = plots.plot_truncation_bias({"elman": bias, "gru": bias})
    errors, cosines = figure.axes
    assert errors.get_yscale() == errors.get_xscale() == cosines.get_xscale() == "log"
    assert len(errors.lines) == len(cosines.lines) == 4
    np.testing.assert_allclose(errors.lines[1].get_ydata(), [0.5, 0.1])
    assert np.isnan(errors.lines[0].get_ydata()[1]), "no error has no place on a log axis"
    assert save(figure)
