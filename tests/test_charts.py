"""What the report's charts are made of: axes, heights, paths, and names that can't leave their script."""

import json
import math
import re

import numpy as np
import pytest

import jaxbptt as bptt
from jaxbptt.analysis.certificate import Certificate, CertificateRow
from jaxbptt.analysis.credit import BiasCurve, LagContributions, TruncationBias
from jaxbptt.analysis.diagnosis import GradientDiagnosis, GradientRates
from jaxbptt.analysis.flow import GradientFlow
from jaxbptt.analysis.jacobians import LogSingularValues
from jaxbptt.reports import charts
from jaxbptt.reports.charts import embed, saliency, style, truncation
from jaxbptt.reports.report import CellReport, Row, Saliency

ALL = ["saliency", "flow", "causes", "lags", "truncation", "agreement", "singular-values"]
NAME = "</script><!-- \u2028 'a' \\ ${b} {{c}} [d] e.f"


def made_up(name, steps, *, bad=False):
    """A report of a network that there is not; `bad`: what is computed is 0 or not finite."""
    values = np.zeros(steps) if bad else 0.5 ** np.arange(steps)[::-1]
    flow = GradientFlow(*[None] * 3, values, *[None] * 5)
    rates = GradientRates(*([math.nan] * 4 if bad else [-0.1, 0.2, -0.3, 0.0]))
    diagnosis = GradientDiagnosis("", "", rates, *[None] * (len(GradientDiagnosis._fields) - 3))
    rows = [
        CertificateRow(method, True, 0.0, {}, error, memory, 1.0, 1.0, 1e-3, 1.0)
        for method, error, memory in (("scan", 0.0, 2048), ("mine", math.nan if bad else 1e-7, 0))
    ]
    lengths = np.array([2**i for i in range(steps.bit_length())])
    curve = BiasCurve(np.full(len(lengths), math.nan) if bad else 1.0 / lengths, np.ones(len(lengths)))
    return CellReport(
        name,
        Certificate(tuple(rows), 1e-5, "float32"),
        TruncationBias(lengths, curve, curve),
        flow,
        diagnosis,
        lags=LagContributions(None, None, values[::-1], values, values),
        singular_values=LogSingularValues(
            np.full((steps, 3), -np.inf if bad else -1000.0), np.full((steps, 3), not bad)
        ),
        saliency=Saliency(np.arange(steps), np.tril(np.full((steps, steps), 0.0 if bad else 1.0))),
    )


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "bad", "networks"), [(7, False, 3), (1, True, 1), (1, False, 2), (7, True, 2)])
def test_every_chart_can_be_drawn(steps, bad, networks):
    """One step, nothing but zeros, and names that would be something else outside of a string."""
    reports = [made_up(f"{NAME}{i}", steps, bad=bad) for i in range(networks)]
    rows = Row("a", tuple("<\n\0 é中a"[:steps])), Row("b", None, ("x]", "'y"), np.full((steps, 2), math.nan))
    for row in rows:
        found = charts.charts(row, reports)
        assert list(found) == [name for name in ALL if not (bad and name == "causes")]
        script = charts.scripts(found.values())
        assert len(re.findall("</script", script, re.IGNORECASE)) == len(re.findall("<script", script)) == 1
        assert "<!--" not in script
        specs = json.loads(re.search(r"\nconst specs = (.*);\n", script)[1])
        assert specs["saliency"]["description"] == found["saliency"].description
        assert {"name": "names", "value": {f"c{i}": f"{NAME}{i}" for i in range(networks)}} in specs["saliency"][
            "params"
        ]
        for chart in found.values():
            html = charts.figure(chart, NAME)
            assert html.startswith(f'<figure class="chart" id="{chart.name}">')
            assert "<!--" not in html
            assert "NaN" not in re.sub('aria-label="[^"]*"', "", html)


def test_charts_without_data_are_left_out():
    report = made_up("a", 3)._replace(lags=None, singular_values=None, saliency=None)
    assert list(charts.charts(Row("a"), [report])) == ["flow", "causes", "truncation", "agreement"]
    assert charts.scripts([]) == ""


@pytest.mark.parametrize("K", [1, 2, 3, 5, 7])
def test_paths_are_counted(K):
    kept = [
        bptt.surviving_paths(bptt.truncated_scan, 7, truncation_length=K).sum(),
        bptt.surviving_paths(bptt.windowed_scan, 7, window=K).sum(),
    ]
    words = truncation._kept(7, K)
    for count, word in zip(kept, words, strict=True):
        assert re.search(r": (.*) of 28 paths", word)[1] == truncation._percent(count / 28)


def test_heights_are_logarithmic():
    assert saliency._levels(np.array([1e-9, 1e-2, 0.0, 10.0, 99.0]), 3) == {"first": 3, "levels": [1000]}
    levels = saliency._levels(np.array([0.05, math.nan, 1.0, 0.1]), 3)
    expected = [round(1000 * (1 + math.log10(share) / 3)) for share in (0.05, 1, 1, 0.1)]
    assert levels == {"first": 0, "levels": [expected[0], 0, *expected[2:]]}
    assert saliency._levels(np.zeros(3), 2) == {"first": 0, "levels": []}


def test_losses_are_thinned_to_what_a_page_can_hold():
    many = Saliency(np.arange(0, 3000, 24), np.ones((125, 3000), np.float32))
    steps, values = saliency._thinned([many] * 3)
    assert steps[-1] == 2976
    assert 3 * (steps + 1).sum() < 250_000
    assert len(set(np.diff(steps))) == 1
    assert [len(of_cell) for of_cell in values] == [len(steps)] * 3


@pytest.mark.parametrize(
    ("values", "marked"),
    [
        ([[0.0, math.nan, math.inf]], [0.3, 0.5, 1, 2, 3]),
        ([[1e-30, 1.0]], None),
        ([[0.02, 0.06]], [0.02, 0.03, 0.05]),
        ([], None),
    ],
)
def test_logarithmic_axes_have_few_round_numbers(values, marked):
    scale, axis = style.log_axis(values)
    low, high = scale["domain"]
    assert 0 < low < high
    assert 1 <= len(axis["values"]) <= 6
    assert all(low <= value <= high for value in axis["values"])
    if marked is not None:
        assert axis["values"] == marked


def test_json_that_a_script_can_hold():
    value = {"a": NAME, "b": ["&lt;", 1.5, None]}
    text = embed._json(value)
    assert json.loads(text) == value
    assert not set("<>&\u2028\u2029") & set(text)
    with pytest.raises(ValueError, match="Out of range"):
        embed._json(math.nan)
