r"""What each loss depends on, drawn over what the network reads: a text in rows, or a series of numbers.

Every height is logarithmic, since what a loss depends on falls off exponentially with the lag: from a thousandth of the
loss's largest ‖∂Lₜ/∂xₛ‖, below which nothing is drawn, to the largest.
"""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from jaxbptt.reports.charts.curves import number
from jaxbptt.reports.charts.embed import Chart
from jaxbptt.reports.charts.style import (
    ACCENT,
    INK,
    MONOSPACE,
    QUIET,
    cell_colours,
    configured,
    key,
)
from jaxbptt.reports.report import CellReport, Row, Saliency

_DECADES = 3
# Levels of height: fine enough that a value read back from one has two digits.
_LEVELS = 1000
# Entries over all losses and networks, about four bytes each on the page; of numbers in a column, about seven.
_MAX_ENTRIES = 200_000
_MAX_NUMBERS = 40_000
# So many steps are shown at once, those before the loss and a few after it.
_MAX_SHOWN = 480
_AFTER = 20
# A character's width and a row's height, pixels; the upper part of a row is for the bar.
_WIDTH, _HEIGHT, _BAR = 14, 44, 22

_COLUMNS = f"max(8, floor(width / {_WIDTH}))"
_NAMES = {" ": "space", "\n": "newline", "\t": "tab", "\r": "carriage return"}
_SIGNS = {" ": "·", "\n": "↵", "\t": "⇥", "\r": "␍"}


def saliency_chart(row: Row, reports: Sequence[CellReport]) -> Chart | None:
    """‖∂Lₜ/∂xₛ‖ over the characters or numbers xₛ, for the loss of a step t that a slider moves."""
    found = [(report.name, report.saliency) for report in reports if report.saliency is not None]
    if not found or (row.characters is None and row.values is None):
        return None
    names, saliencies = zip(*found, strict=True)
    steps, values = _thinned(saliencies)
    controls = _controls(names, steps)
    known = _known(names, steps, values)
    spec = _over_text(row.characters, controls, known) if row.characters else _over_numbers(row, controls, known)
    return Chart("saliency", spec, "How much the loss of one step depends on each input that was read before it.")


def _thinned(saliencies: Sequence[Saliency]) -> tuple[np.ndarray, list[np.ndarray]]:
    """As many losses as the page has room for, evenly spread, the last among them."""
    steps = np.asarray(saliencies[0].steps)
    most = max(2, int(_MAX_ENTRIES / (len(saliencies) * max(steps.mean(), 1.0))))
    stride = -(-len(steps) // most)
    kept = np.arange(len(steps) - 1, -1, -stride)[::-1]
    return steps[kept], [np.asarray(saliency.values, float)[kept] for saliency in saliencies]


def _controls(names: Sequence[str], steps: np.ndarray) -> list[Any]:
    """A select of the network and a slider of the loss's step, where there is something to choose."""
    strides = np.unique(np.diff(steps))
    first, last, stride = int(steps[0]) + 1, int(steps[-1]) + 1, int(strides[0]) if len(strides) == 1 else 1
    keys = [key(i) for i in range(len(names))]
    select = alt.binding_select(options=keys, labels=list(names), name="network")
    slider = alt.binding_range(min=first, max=last, step=stride, name="loss of step")
    bound: list[dict[str, Any]] = [
        {"bind": select} if len(names) > 1 else {},
        {"bind": slider} if len(steps) > 1 else {},
    ]
    return [alt.param(name="cell", value=key(0), **bound[0]), alt.param(name="step", value=last, **bound[1])]


def _known(names: Sequence[str], steps: np.ndarray, values: Sequence[np.ndarray]) -> dict[str, Any]:
    """What the controls choose from."""
    by_cell = {key(i): of_cell for i, of_cell in enumerate(values)}
    return {
        "names": {key(i): name for i, name in enumerate(names)},
        "losses": (steps + 1).tolist(),
        # Where not every step's loss is there, the slider takes the nearest.
        "nearest": np.abs(np.arange(steps[-1] + 1)[:, None] - steps).argmin(axis=1).tolist(),
        "levels": {
            cell: [_levels(*at) for at in zip(of_cell, steps, strict=True)] for cell, of_cell in by_cell.items()
        },
        "largest": {cell: [number(at.max(initial=0)) for at in of_cell] for cell, of_cell in by_cell.items()},
    }


def _levels(values: np.ndarray, last: int) -> dict[str, Any]:
    """Heights from the first that is above a thousandth of the largest, up to the loss's own step."""
    values = np.nan_to_num(values[: last + 1], nan=0.0, posinf=0.0)
    largest = values.max(initial=0)
    if not largest > 0:
        return {"first": 0, "levels": []}
    with np.errstate(divide="ignore"):
        heights = (_LEVELS * (1 + np.log10(values / largest) / _DECADES)).clip(min=0).round().astype(int)
    first = int(np.argmax(heights > 0))
    return {"first": first, "levels": heights[first:].tolist()}


_AT = {
    "loss": "losses[nearest[step - 1]]",
    "cell": "cell",
    "entry": "levels[cell][nearest[step - 1]]",
    "level": "(datum.s > datum.entry.first && datum.entry.levels[datum.s - 1 - datum.entry.first]) || 0",
    "depends": (
        "datum.s > datum.loss ? 'comes after the loss' : datum.level == 0 ? 'below 0.1 % of the largest' : "
        f"format(largest[cell][nearest[step - 1]] * pow(10, {_DECADES} * (datum.level / {_LEVELS} - 1)), '.2g')"
    ),
}
_TITLE = {"expr": "[names[cell], 'What the loss of step ' + format(losses[nearest[step - 1]], ',') + ' depends on']"}


def _calculated(chart: alt.Chart, **fields: str) -> alt.Chart:
    for name, expression in fields.items():
        chart = chart.transform_calculate(**{name: expression})
    return chart


def _start(steps: int) -> str:
    """An expression for the first step in view, from 1."""
    return f"clamp(losses[nearest[step - 1]] - {_MAX_SHOWN - _AFTER}, 1, {max(1, steps - _MAX_SHOWN + 1)})"


def _in_view(start: str) -> str:
    return f"datum.s >= {start} && datum.s < {start} + {_MAX_SHOWN}"


def _over_text(characters: Sequence[str], controls: list[Any], known: dict[str, Any]) -> dict[str, Any]:
    rows = [
        {"s": i + 1, "sign": _SIGNS.get(c, c if c.isprintable() else "�"), "name": _NAMES.get(c, c)}
        for i, c in enumerate(characters)
    ]
    start = _start(len(rows))
    base = alt.Chart(alt.NamedData("inputs")).transform_filter(_in_view(start))
    base = _calculated(
        base,
        column=f"(datum.s - {start}) % {_COLUMNS}",
        line=f"floor((datum.s - {start}) / {_COLUMNS})",
        left="datum.column + 0.1",
        right="datum.column + 0.9",
        middle="datum.column + 0.5",
        end="datum.column + 1",
        **_AT,
    )
    columns = alt.Scale(domainMin=0, domainMax=alt.expr(_COLUMNS), zero=False, nice=False)
    left, right = alt.X("left:Q", scale=columns, axis=None), alt.X2("right:Q")
    line = alt.Y(
        "line:O",
        title=None,
        axis=alt.Axis(
            labelOffset=_HEIGHT / 2 - 11,
            labelPadding=6,
            labelExpr=f"format(datum.value * {_COLUMNS} + {start}, ',')",
            ticks=False,
            domain=False,
        ),
        scale=alt.Scale(paddingInner=0, paddingOuter=0),
    )
    height = f"datum.level / {_LEVELS} * {_BAR}"
    bars = (
        base.transform_filter("datum.level > 0")
        .mark_rect(
            height=alt.expr(f"max(1, {height})"), yOffset=alt.expr(f"{_BAR - _HEIGHT / 2} - ({height}) / 2"), aria=False
        )
        .encode(left, right, line, color=alt.Color("cell:N", scale=cell_colours(), legend=None))
        .properties(name="bars")
    )
    read = alt.condition("datum.s > datum.loss", alt.value(QUIET[0]), alt.value(INK[0]))
    letters = base.mark_text(font=MONOSPACE, fontSize=15, yOffset=_HEIGHT / 2 - 11, aria=False).encode(
        alt.X("middle:Q", scale=columns, axis=None), line, text="sign:N", color=read
    )
    mark = (
        base.transform_filter("datum.s == datum.loss")
        .mark_rect(filled=False, color=INK[0], strokeWidth=2, height=20, yOffset=_HEIGHT / 2 - 11, aria=False)
        .encode(alt.X("column:Q", scale=columns, axis=None), alt.X2("end:Q"), line)
        .properties(name="loss")
    )
    hover = (
        base.mark_rect(opacity=0, aria=False)
        .encode(
            alt.X("column:Q", scale=columns, axis=None),
            alt.X2("end:Q"),
            line,
            tooltip=[
                alt.Tooltip("name:N", title="character"),
                alt.Tooltip("s:Q", title="step", format=",d"),
                alt.Tooltip("depends:N", title="‖∂L/∂x‖"),
            ],
        )
        .properties(name="hover")
    )
    chart = alt.layer(bars, letters, mark, hover).add_params(*controls)
    chart = chart.properties(height=alt.Step(_HEIGHT), title=alt.TitleParams(_TITLE))
    return configured(chart, {"inputs": rows}, known)


def _over_numbers(row: Row, controls: list[Any], known: dict[str, Any]) -> dict[str, Any]:
    assert row.values is not None
    values = np.asarray(row.values, float)
    values = values.reshape(len(values), -1)[:, : max(1, _MAX_NUMBERS // len(values))]
    columns = [str(name) for name in row.columns][: values.shape[1]]
    steps = len(values)
    choose: dict[str, Any] = {}
    if len(columns) > 1:
        most = f" (first {len(columns)} of {len(row.columns)})" if len(columns) < len(row.columns) else ""
        choose["bind"] = alt.binding_select(options=list(range(len(columns))), labels=columns, name=f"column{most}")
    controls = [*controls, alt.param(name="column", value=0, **choose)]
    start = _start(steps)
    base = _calculated(
        alt.Chart(alt.NamedData("inputs")).transform_filter(_in_view(start)),
        value="series[column][datum.s - 1]",
        column="columns[column]",
        low="datum.s - 0.5",
        high="datum.s + 0.5",
        **_AT,
    )
    first, last = alt.expr(f"{start} - 0.5"), alt.expr(f"{start} + {min(steps, _MAX_SHOWN) - 0.5}")
    time = alt.Scale(domainMin=first, domainMax=last, nice=False, zero=False)
    axis = alt.Axis(format=",d", tickMinStep=1, tickCount=5, grid=False, title="time step s")
    x = alt.X("s:Q", scale=time, axis=axis)
    few: dict[str, Any] = {"point": alt.OverlayMarkDef(size=24, filled=True, color=INK[0])} if steps <= 40 else {}
    series = (
        base.mark_line(color=INK[0], strokeWidth=1.5, clip=True, **few)
        .encode(
            x,
            alt.Y(
                "value:Q",
                scale=alt.Scale(range=[110, 0], zero=False),
                axis=alt.Axis(orient="left", title="value", tickCount=4, format="~g", grid=False),
            ),
        )
        .properties(name="series")
    )
    # The label of an axis for each decade.
    ticks = {round(_LEVELS * i / _DECADES): f"{100 * 10.0 ** (i - _DECADES):g} %" for i in range(_DECADES + 1)}
    bars = (
        base.mark_area(interpolate="step", line=False, opacity=1)
        .encode(
            x,
            alt.Y(
                "level:Q",
                scale=alt.Scale(range=[230, 140], domain=[0, _LEVELS], nice=False),
                axis=alt.Axis(
                    orient="left",
                    title="of the largest",
                    values=list(ticks),
                    labelExpr="shares[datum.value]",
                    grid=False,
                ),
            ),
            color=alt.Color("cell:N", scale=cell_colours(), legend=None),
        )
        .properties(name="bars")
    )
    mark = (
        base.transform_filter("datum.s == datum.loss")
        .mark_rule(color=INK[0], strokeWidth=2, strokeDash=[3, 3])
        .encode(x, y=alt.value(0), y2=alt.value("height"))
        .properties(name="loss")
    )
    over = alt.selection_point(name="over", on="pointerover", clear="pointerout", fields=["s"], empty=False)
    hover = (
        base.mark_rect(color=ACCENT[0], aria=False)
        .encode(
            alt.X("low:Q", scale=time, axis=axis),
            alt.X2("high:Q"),
            y=alt.value(0),
            y2=alt.value("height"),
            opacity=alt.condition(over, alt.value(0.3), alt.value(0)),
            tooltip=[
                alt.Tooltip("s:Q", title="step", format=",d"),
                alt.Tooltip("column:N", title="column"),
                alt.Tooltip("value:Q", title="value", format=".4g"),
                alt.Tooltip("depends:N", title="‖∂L/∂x‖"),
            ],
        )
        .properties(name="hover")
        .add_params(over)
    )
    chart = alt.layer(series, bars, mark, hover).resolve_scale(y="independent").add_params(*controls)
    known |= {
        "columns": columns,
        "series": [[number(x) for x in column] for column in values.T],
        "shares": {str(level): label for level, label in ticks.items()},
    }
    chart = chart.properties(height=230, title=alt.TitleParams(_TITLE))
    return configured(chart, {"inputs": [{"s": s} for s in range(1, steps + 1)]}, known)
