r"""Why the gradient grows or shrinks, in bars, and what every method costs, in dots."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from jaxbptt.reports.charts.curves import number
from jaxbptt.reports.charts.embed import Chart
from jaxbptt.reports.charts.style import (
    ACCENT,
    CELLS,
    INK,
    QUIET,
    SHAPES,
    configured,
    key,
    log_axis,
)
from jaxbptt.reports.report import CellReport

_PARTS = ("weights", "saturation", "alignment")
_ROW = 22
# Room for an axis with its title below a panel, pixels.
_AXIS = 62


def causes_chart(reports: Sequence[CellReport]) -> Chart | None:
    """The rate of the gradient as a sum: each bar begins where the one above ended, and the last is the sum."""
    rows, labels, networks = [], {}, []
    for i, report in enumerate(reports):
        rates = report.diagnosis.rates
        if not np.isfinite([getattr(rates, part) for part in (*_PARTS, "observed")]).all():
            continue
        networks.append({"row": key(i), "name": report.name})
        start = 0.0
        for part in _PARTS:
            value = getattr(rates, part)
            rows.append(
                {"row": f"{key(i)} {part}", "part": part, "network": report.name, "rate": value, "start": start}
            )
            start += value
        rows.append(
            {"row": f"{key(i)} sum", "part": "sum", "network": report.name, "rate": rates.observed, "start": 0.0}
        )
    if not rows:
        return None
    for row in rows:
        row["end"], row["outer"] = row["start"] + row["rate"], max(row["start"], row["start"] + row["rate"])
        labels[row["row"]] = "= sum" if row["part"] == "sum" else row["part"]
    order = [name for i in range(len(reports)) for name in (key(i), *(f"{key(i)} {part}" for part in (*_PARTS, "sum")))]
    order = [name for name in order if name in labels or name in {network["row"] for network in networks}]
    ends = [row[end] for row in rows for end in ("start", "end")]
    room = 0.32 * ((max(ends) - min(ends)) or 1)
    scale = alt.Scale(domain=[min(ends) - 0.04 * room, max(ends) + room], nice=False)
    x = alt.X(
        "start:Q",
        title="nats per step; below 0 it shrinks",
        scale=scale,
        axis=alt.Axis(tickCount=5, format="~g"),
    )
    y = alt.Y(
        "row:O",
        sort=order,
        title=None,
        scale=alt.Scale(domain=order),
        axis=alt.Axis(labelExpr="labels[datum.value] || ''", ticks=False, domain=False, labelPadding=6),
    )
    base = alt.Chart(alt.Data(values=rows))
    colour = alt.condition("datum.part == 'sum'", alt.value(INK[0]), alt.value(ACCENT[0]))
    tooltip = [
        alt.Tooltip("network:N"),
        alt.Tooltip("part:N"),
        alt.Tooltip("rate:Q", title="nats per step", format="+.3f"),
    ]
    bars = base.mark_bar(height=14).encode(x, alt.X2("end:Q"), y, color=colour, tooltip=tooltip).properties(name="bars")
    zero = alt.Chart(alt.Data(values=[{"start": 0}])).mark_rule(color=QUIET[0]).encode(x)
    values = base.mark_text(align="left", dx=5).encode(
        alt.X("outer:Q", scale=scale), y, text=alt.Text("rate:Q", format="+.3f")
    )
    heads = (
        alt.Chart(alt.Data(values=networks))
        .mark_text(align="left", fontWeight="bold", fontSize=13)
        .encode(x=alt.value(0), y=y, text="name:N")
    )
    chart = alt.layer(zero, bars, values, heads).properties(height=_ROW * len(order))
    spec = configured(chart, {}, {"labels": labels})
    return Chart("causes", spec, "The rate at which the gradient changes in each step back, as a sum of three parts.")


def agreement_chart(reports: Sequence[CellReport]) -> Chart:
    """Error, memory and time of every method, of all networks: a panel for each, one below the other."""
    methods = list(dict.fromkeys(row.name for report in reports for row in report.certificate.rows))
    height = _ROW * len(methods)
    total = 3 * height + 2 * _AXIS
    measures = {
        "relative error (dashed: agrees)": lambda row: row.largest_error,
        "temporary memory, KiB": lambda row: row.temporary_bytes / 1024,
        "time, ms": lambda row: row.seconds * 1e3,
    }
    panels = []
    for i, (title, measure) in enumerate(measures.items()):
        top = i * (height + _AXIS)
        rows = [
            {"cell": key(j), "network": report.name, "method": row.name, "value": number(measure(row))}
            for j, report in enumerate(reports)
            for row in report.certificate.rows
            if np.isfinite(measure(row))
        ]
        limit = max(report.certificate.tolerance for report in reports) if i == 0 else None
        panels.append(_panel(rows, methods, title, top, height, total, len(reports), limit))
    chart = alt.layer(*panels).resolve_scale(x="independent", y="independent", yOffset="independent")
    names = {key(i): report.name for i, report in enumerate(reports)}
    spec = configured(chart.properties(height=total), {}, {"names": names})
    return Chart("agreement", spec, "Largest error, memory and time of every method of taking the gradient.")


def _panel(
    rows: list[dict[str, Any]],
    methods: list[str],
    title: str,
    top: int,
    height: int,
    total: int,
    cells: int,
    limit: float | None,
) -> Any:
    domain = [key(i) for i in range(cells)]
    limits = [] if limit is None else [limit]
    scale, ticks = log_axis([[row["value"] for row in rows], limits], ticks=3)
    axis = alt.Axis(**ticks, title=title, orient="bottom", titleAnchor="end", offset=top + height - total, grid=False)
    x = alt.X("value:Q", scale=alt.Scale(**scale), axis=axis)
    y = alt.Y(
        "method:N",
        sort=methods,
        title=None,
        scale=alt.Scale(domain=methods, range=[top, top + height], paddingInner=0.15, paddingOuter=0.1),
        axis=alt.Axis(orient="left", labelLimit=175, labelFontSize=11, ticks=False, grid=True),
    )
    legend = alt.Legend(labelExpr="names[datum.value]", symbolSize=80, symbolOpacity=1)
    base = alt.Chart(alt.Data(values=rows)).encode(
        y=y,
        yOffset=alt.YOffset("cell:N", scale=alt.Scale(domain=domain)),
        tooltip=[
            alt.Tooltip("network:N"),
            alt.Tooltip("method:N"),
            alt.Tooltip("value:Q", title=title.split(" (")[0], format=".3g"),
        ],
    )
    colours = alt.Scale(domain=domain, range=[light for light, _ in CELLS][:cells])
    shapes = alt.Scale(domain=domain, range=list(SHAPES)[:cells])
    dots = (
        base.transform_filter("datum.value > 0")
        .mark_point(filled=True, size=46, opacity=1)
        .encode(
            x=x,
            color=alt.Color("cell:N", scale=colours, legend=legend),
            shape=alt.Shape("cell:N", scale=shapes, legend=legend),
        )
    )
    # 0 has no logarithm.
    zeros = (
        base.transform_filter("datum.value == 0")
        .mark_text(align="left", dx=4, fontSize=10)
        .encode(x=alt.value(0), text=alt.value("0"))
    )
    rule = (
        alt.Chart(alt.Data(values=[{"value": limit} for limit in limits]))
        .mark_rule(color=QUIET[0], strokeDash=[4, 3])
        .encode(x, y=alt.value(top), y2=alt.value(top + height))
    )
    return alt.layer(rule, dots, zeros)
