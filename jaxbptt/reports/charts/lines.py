r"""Charts with a line for each network: the gradient by time, its parts by lag, singular values by lag."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from jaxbptt.reports.charts.embed import Chart
from jaxbptt.reports.charts.style import DASHES, SHAPES, cell_colours, cell_scale, configured, key
from jaxbptt.reports.report import CellReport

# With more points than this on a line they run into each other.
_FEW = 40
# So many points of a line can be told apart on a screen.
_MANY = 800


def flow_chart(reports: Sequence[CellReport]) -> Chart:
    """‖∂L/∂hₜ‖ by time, of every network."""
    norms = [np.asarray(report.flow.norms, float) for report in reports]
    steps = np.arange(1, len(norms[0]) + 1)
    rows = _rows(steps, norms, low=steps - 0.5, high=steps + 0.5)
    x = alt.X("x:Q", title="time step t", scale=alt.Scale(domain=[0.5, len(steps) + 0.5], nice=False), axis=_whole())
    y = alt.Y("value:Q", title="‖∂L/∂hₜ‖", scale=alt.Scale(type="log"), axis=_powers())
    spec = _chart(rows, [report.name for report in reports], x, y, of_x="time step", height=260)
    return Chart("flow", spec, "Norm of the gradient of the last step's loss at each earlier state, by time step.")


def lags_chart(reports: Sequence[CellReport]) -> Chart | None:
    """‖G⁽ˡ⁾‖ by lag, of the networks where it was computed."""
    found = [(report.name, np.asarray(report.lags.norms, float)) for report in reports if report.lags is not None]
    if not found:
        return None
    names, norms = zip(*found, strict=True)
    lags = _spread(len(norms[0]))
    rows = _rows(lags, [values[lags] for values in norms], place=lags + 1, low=lags + 0.5, high=lags + 1.5)
    x = _lag_axis(len(norms[0]), "lag l, time steps")
    y = alt.Y("value:Q", title="‖G⁽ˡ⁾‖", scale=alt.Scale(type="log"), axis=_powers())
    spec = _chart(rows, names, x, y, of_x="lag", height=240)
    return Chart("lags", spec, "What the paths of each length contribute to the gradient of the weights, by lag.")


def _lag_axis(count: int, title: str) -> alt.X:
    """Logarithmic in lag + 1, since lag 0 has no logarithm; its labels are lags."""
    ticks = [0, *(scale * 10**power for power in range(6) for scale in (1, 2, 5))]
    axis = alt.Axis(
        values=[lag + 1 for lag in ticks if lag < count], labelExpr="format(datum.value - 1, ',')", grid=False
    )
    scale = alt.Scale(type="log", domain=[0.9, max(count, 2) * 1.02], nice=False)
    return alt.X("place:Q", title=f"{title}; logarithmic, of lag + 1", scale=scale, axis=axis)


def _spread(count: int) -> np.ndarray:
    """Lags from 0 on, as close to each other as a logarithmic axis can show."""
    return np.unique(np.geomspace(1, count, _MANY).round().astype(int)) - 1


def _rows(steps: np.ndarray, curves: Sequence[np.ndarray], **places: np.ndarray) -> list[dict[str, Any]]:
    """A row for each step, with the value of every network under its key: `None` where it is not finite."""
    return [
        {"x": int(step)}
        | {name: float(where[i]) for name, where in places.items()}
        | {key(j): _number(values[i]) for j, values in enumerate(curves)}
        for i, step in enumerate(steps)
    ]


def _number(value: float, digits: int = 4) -> float | None:
    """What JSON can hold, with as many digits as a chart can show."""
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None


def _whole() -> alt.Axis:
    return alt.Axis(format=",d", tickMinStep=1, tickCount=6, grid=False)


def _powers() -> alt.Axis:
    return alt.Axis(format="~g", tickCount=6)


def names_param(names: Sequence[str]) -> alt.Parameter:
    """The networks' names by key: in data and never in an expression, since they are arbitrary strings."""
    return alt.param(name="names", value={key(i): name for i, name in enumerate(names)})


def _chart(
    rows: list[dict[str, Any]], names: Sequence[str], x: alt.X, y: alt.Y, *, of_x: str, height: int
) -> dict[str, Any]:
    keys: list[Any] = [key(i) for i in range(len(names))]
    legend = alt.Legend(labelExpr="names[datum.value]", symbolType="stroke", symbolFillColor="transparent")
    base = alt.Chart(alt.Data(values=rows))
    lines = base.transform_fold(keys, as_=["cell", "number"]).transform_calculate(
        # What is 0 has no logarithm; the line is broken there.
        value="datum.number > 0 ? datum.number : null",
    )
    shown = {
        "x": x,
        "y": y,
        "color": alt.Color("cell:N", scale=cell_colours(len(names)), legend=legend),
    }
    picked, params = picking(names)
    if params:
        shown["opacity"] = alt.condition(picked, alt.value(1), alt.value(0.12))
    drawn = lines.mark_line(strokeWidth=2.2, clip=True).encode(
        **shown, strokeDash=alt.StrokeDash("cell:N", scale=cell_scale(len(names), DASHES), legend=legend)
    )
    layers = [drawn.add_params(*params[:1])]
    if len(rows) <= _FEW:
        # Not as a scale: the legend has lines, since few charts have points.
        shape = alt.expr(f"({{c0: '{SHAPES[0]}', c1: '{SHAPES[1]}', c2: '{SHAPES[2]}'}})[datum.cell]")
        layers.append(lines.mark_point(size=34, filled=True, opacity=1, shape=shape).encode(**shown))
    over = alt.selection_point(name="over", on="pointerover", clear="pointerout", fields=["x"], empty=False)
    tooltip = [
        alt.Tooltip("x:Q", title=of_x, format=",d"),
        *(alt.Tooltip(f"{k}:Q", title=name, format=".3g") for k, name in zip(keys, names, strict=True)),
    ]
    layers.append(
        base.mark_rect(color="#767676", aria=False)
        .encode(
            x=alt.X("low:Q"),
            x2="high:Q",
            y=alt.value(0),
            y2=alt.value("height"),
            opacity=alt.condition(over, alt.value(0.2), alt.value(0)),
            tooltip=tooltip,
        )
        .properties(name="hover")
        .add_params(over)
    )
    return configured(
        alt.layer(*layers).add_params(names_param(names), *params[1:]).properties(width="container", height=height)
    )


def picking(names: Sequence[str]) -> tuple[Any, list[Any]]:
    """A network is picked by a click on the legend or in a select, which the keyboard reaches too.

    Returns:
        The condition that a network is shown in full, and the parameters: the legend's, and the select's.
    """
    if len(names) < 2:
        return True, []
    keys = [key(i) for i in range(len(names))]
    legend = alt.selection_point(name="legend", fields=["cell"], bind="legend")
    select = alt.param(
        name="pick",
        value="all",
        bind=alt.binding_select(options=["all", *keys], labels=["all", *names], name="network"),
    )
    return (
        "pick == 'all' && !legend.cell || pick == datum.cell || legend.cell && indexof(legend.cell, datum.cell) >= 0",
        [legend, select],
    )
