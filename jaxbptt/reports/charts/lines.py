r"""Charts with a line for each network: the gradient by time, its parts by lag, singular values by lag."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from jaxbptt.reports.charts import curves
from jaxbptt.reports.charts.curves import Curve
from jaxbptt.reports.charts.embed import Chart
from jaxbptt.reports.charts.style import configured, log_axis, power_of_ten, step_axis
from jaxbptt.reports.report import CellReport

# So many points of a line can be told apart on a screen.
_MANY = 800


def flow_chart(reports: Sequence[CellReport]) -> Chart:
    """‖∂L/∂hₜ‖ by time, of every network."""
    found = [Curve(i, report.name, np.asarray(report.flow.norms, float)) for i, report in enumerate(reports)]
    steps = np.arange(1, len(found[0].values) + 1)
    rows = curves.rows(found, x=steps, low=steps - 0.5, high=steps + 0.5)
    time = alt.Scale(domain=[0.5, len(steps) + 0.5], nice=False, zero=False)
    axis = step_axis(len(steps), "time step t")
    x, low = (alt.X(field, type="quantitative", scale=time, axis=axis) for field in ("x", "low"))
    y = _log_y("‖∂L/∂hₜ‖", found)
    layers, params = curves.drawn(found, len(steps), x, y)
    hover = curves.hover(low, found, [alt.Tooltip("x:Q", title="time step", format=",d")])
    spec = _whole([*layers, hover], params, 260, rows, found)
    return Chart("flow", spec, "Norm of the gradient of the last step's loss at each earlier state, by time step.")


def lags_chart(reports: Sequence[CellReport]) -> Chart | None:
    """‖G⁽ˡ⁾‖ by lag, of the networks where it was computed."""
    found = [
        Curve(i, report.name, np.asarray(report.lags.norms, float))
        for i, report in enumerate(reports)
        if report.lags is not None
    ]
    if not found:
        return None
    spec = _by_lag(found, _log_y("‖G⁽ˡ⁾‖", found), "lag l, time steps", 240)
    return Chart("lags", spec, "What the paths of each length contribute to the gradient of the weights, by lag.")


def singular_values_chart(reports: Sequence[CellReport]) -> Chart | None:
    """The largest and the median singular value of ∂h_T/∂hₜ by lag, of the networks where they were computed."""
    found = []
    for i, report in enumerate(reports):
        if report.singular_values is None:
            continue
        log_values, resolved = (np.asarray(leaf) for leaf in report.singular_values)
        # As powers of ten, since the singular values themselves may be outside the range of floats.
        powers = np.where(resolved, log_values, np.nan)[::-1].astype(float) / np.log(10)
        ranks = {"largest": 0, "median": powers.shape[1] // 2}
        for kind, (word, rank) in enumerate(ranks.items()):
            if kind == 0 or rank > 0:
                found.append(Curve(i, report.name, powers[:, rank], kind, word))
    if not found:
        return None
    axis = alt.Axis(tickCount=6, labelExpr=power_of_ten("datum.value"))
    y = alt.Y("value:Q", title="singular values of ∂h_T/∂hₜ", axis=axis, scale=alt.Scale(zero=False))
    spec = _by_lag(found, y, "lag T − t, time steps", 260, positive=False)
    return Chart("singular-values", spec, "Singular values of the product of Jacobians over the last steps, by lag.")


def _log_y(title: str, found: Sequence[Curve]) -> alt.Y:
    scale, axis = log_axis(curve.values for curve in found)
    return alt.Y("value:Q", title=title, scale=alt.Scale(**scale), axis=alt.Axis(**axis))


def _by_lag(found: Sequence[Curve], y: alt.Y, title: str, height: int, *, positive: bool = True) -> dict[str, Any]:
    """Lines over a lag axis that is logarithmic in lag + 1, since lag 0 has no logarithm; its labels are lags."""
    count = len(found[0].values)
    lags = np.unique(np.geomspace(1, count, _MANY).round().astype(int)) - 1
    kept = [curve._replace(values=curve.values[lags]) for curve in found]
    rows = curves.rows(kept, lag=lags, x=lags + 1, low=lags + 0.5, high=np.append(lags[1:], count) + 0.5)
    ticks = [0, *(scale * 10**power for power in range(6) for scale in (1, 2, 5))]
    axis = alt.Axis(
        values=[lag + 1 for lag in ticks if lag < count],
        labelExpr="format(datum.value - 1, ',')",
        grid=False,
        title=f"{title} (log of lag + 1)",
    )
    scale = alt.Scale(type="log", domain=[0.9, max(count, 2) * 1.03], nice=False)
    x, low = (alt.X(field, type="quantitative", scale=scale, axis=axis) for field in ("x", "low"))
    layers, params = curves.drawn(kept, len(lags), x, y, positive=positive)
    tooltip = [alt.Tooltip("lag:Q", title="lag", format=",d")]
    hover = curves.hover(low, kept, tooltip, logarithms=not positive)
    return _whole([*layers, hover], params, height, rows, kept)


def _whole(
    layers: list[Any], params: list[Any], height: int, rows: list[dict[str, Any]], found: Sequence[Curve]
) -> dict[str, Any]:
    chart = alt.layer(*layers).add_params(*params).properties(height=height)
    if len(found) == 1:
        chart = chart.properties(title=found[0].name)
    return configured(chart, {"curves": rows}, curves.labels(found))
