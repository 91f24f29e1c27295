r"""What charts with lines share: curves by network, a legend and a select that pick one, and what appears under the pointer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np

from jaxbptt.reports.charts.style import CELLS, DASHES, SHAPES, key

# With more points than this on a line they run into each other.
_FEW = 40
WIDTHS = (2.6, 1.3)


class Curve(NamedTuple):
    """A line of a chart.

    Attributes:
        cell: which network it is of: its colour, dash and shape.
        network: its name.
        values: one for each row of the data; those that are not finite are left out.
        kind: which of the network's curves: its width.
        word: for the kind.
    """

    cell: int
    network: str
    values: np.ndarray
    kind: int = 0
    word: str = ""

    @property
    def name(self) -> str:
        """What the reader calls it."""
        return f"{self.network}, {self.word}" if self.word else self.network

    @property
    def key(self) -> str:
        """What it is called inside of a chart."""
        return f"{key(self.cell)}_{self.kind}"


def number(value: float, digits: int = 4) -> float | None:
    """What JSON can hold, with as many digits as a chart can show."""
    return float(f"{value:.{digits}g}") if np.isfinite(value) else None


def rows(curves: Sequence[Curve], **places: np.ndarray) -> list[dict[str, Any]]:
    """A row for each point, with its places on the axis and the values of all curves."""
    columns = {name: np.asarray(where, float) for name, where in places.items()}
    columns |= {curve.key: np.asarray(curve.values, float) for curve in curves}
    return [
        {name: number(value, 6) for name, value in zip(columns, row, strict=True)}
        for row in zip(*columns.values(), strict=True)
    ]


def drawn(
    data: list[dict[str, Any]], curves: Sequence[Curve], x: alt.X, y: alt.Y, *, positive: bool = True, label: str = ""
) -> tuple[list[Any], list[Any]]:
    """The layers with lines, and with points where these are few, and the parameters of the whole chart.

    Args:
        data: from `rows`.
        curves: to draw.
        x: of the rows.
        y: of `value`.
        positive: whether 0 is left out, having no logarithm; the line is broken there.
        label: an expression to be added to a curve's name in the legend.
    """
    folded: list[Any] = [curve.key for curve in curves]
    lines = (
        alt.Chart(alt.Data(values=data))
        .transform_fold(folded, as_=["curve", "number"])
        .transform_calculate(
            value="datum.number > 0 ? datum.number : null" if positive else "datum.number",
            cell="split(datum.curve, '_')[0]",
        )
    )
    names = {curve.key: curve.name for curve in curves}
    legend = alt.Legend(
        labelExpr=f"labels[datum.value]{label and ' + ' + label}", symbolType="stroke", symbolFillColor="transparent"
    )

    def scale(choices: Sequence[Any], which: str) -> alt.Scale:
        chosen = [choices[getattr(curve, which) % len(choices)] for curve in curves]
        return alt.Scale(domain=folded, range=chosen)

    picked, controls = _picking(curves)
    shown: dict[str, Any] = {"x": x, "y": y}
    shown["color"] = alt.Color("curve:N", scale=scale([light for light, _ in CELLS], "cell"), legend=legend)
    shown["opacity"] = alt.condition(picked, alt.value(1), alt.value(0.12)) if controls else alt.value(1)
    layers = [
        lines.mark_line(clip=True)
        .encode(
            **shown,
            strokeDash=alt.StrokeDash("curve:N", scale=scale(DASHES, "cell"), legend=legend),
            strokeWidth=alt.StrokeWidth("curve:N", scale=scale(WIDTHS, "kind"), legend=legend, sort=folded),
        )
        .add_params(*controls[:1])
        .properties(name="lines")
    ]
    if len(data) <= _FEW:
        layers.append(lines.mark_point(size=34, filled=True, shape=shape_of_cell()).encode(**shown))
    return layers, [alt.param(name="labels", value=names), *controls[1:]]


def shape_of_cell() -> Any:
    """A property of marks and not a scale, so that the legend's lines stay lines."""
    return alt.expr("({" + ", ".join(f"{key(i)}: '{shape}'" for i, shape in enumerate(SHAPES)) + "})[datum.cell]")


def _picking(curves: Sequence[Curve]) -> tuple[str, list[Any]]:
    """A network is picked by a click on the legend, or in a select, which the keyboard reaches too; both add up.

    Returns:
        The condition that a curve is shown in full, and the parameters: the legend's, and the select's.
    """
    networks = {key(curve.cell): curve.network for curve in curves}
    if len(networks) < 2:
        return "", []
    legend = alt.selection_point(name="legend", fields=["curve"], bind="legend")
    bind = alt.binding_select(options=["all", *networks], labels=["all", *networks.values()], name="network")
    condition = (
        "(pick == 'all' && !legend.curve) || pick == datum.cell || "
        "(isArray(legend.curve) && indexof(legend.curve, datum.curve) >= 0)"
    )
    return condition, [legend, alt.param(name="pick", value="all", bind=bind)]


def hover(data: list[dict[str, Any]], x: alt.X, curves: Sequence[Curve], tooltip: list[alt.Tooltip]) -> Any:
    """Rectangles from `low` to `high` over the whole height: where the pointer is, all curves' values are shown."""
    over = alt.selection_point(name="over", on="pointerover", clear="pointerout", fields=["low"], empty=False)
    values = [alt.Tooltip(f"{curve.key}:Q", title=curve.name, format=".3g") for curve in curves]
    return (
        alt.Chart(alt.Data(values=data))
        .mark_rect(color="#767676", aria=False)
        .encode(
            x,
            alt.X2("high:Q"),
            y=alt.value(0),
            y2=alt.value("height"),
            opacity=alt.condition(over, alt.value(0.25), alt.value(0)),
            tooltip=[*tooltip, *values],
        )
        .properties(name="hover")
        .add_params(over)
    )
