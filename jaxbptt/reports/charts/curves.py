r"""What charts with lines share: curves by network, a legend and a select that pick one, and what appears under the pointer."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import altair as alt
import numpy as np

from jaxbptt.reports.charts.style import CELLS, DASHES, SHAPES, key, power_of_ten

# With more points than this on a line they run into each other.
_FEW = 40
WIDTHS = (3, 1.3)


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
        return f"{self.word}: {self.network}" if self.word else self.network

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


def labels(curves: Sequence[Curve]) -> dict[str, Any]:
    """What the legend of `drawn` names: the curves, by key."""
    return {"labels": {curve.key: curve.name for curve in curves}}


def drawn(
    curves: Sequence[Curve], points: int, x: alt.X, y: alt.Y, *, positive: bool = True, label: str = ""
) -> tuple[list[Any], list[Any]]:
    """The layers with lines, and with points where these are few, and the controls of the whole chart.

    Args:
        curves: to draw, of the dataset "curves", made by `rows`.
        points: how many each has.
        x: of the rows.
        y: of `value`.
        positive: whether 0 is left out, having no logarithm; the line is broken there.
        label: an expression for what stands before a curve's name in the legend.
    """
    folded: list[Any] = [curve.key for curve in curves]
    lines = (
        alt.Chart(alt.NamedData("curves"))
        .transform_fold(folded, as_=["curve", "number"])
        .transform_calculate(
            value="datum.number > 0 ? datum.number : null" if positive else "datum.number",
            cell="split(datum.curve, '_')[0]",
        )
    )
    legend = alt.Legend(
        labelExpr=f"{label and label + ' + '}labels[datum.value]",
        symbolType="stroke",
        symbolFillColor="transparent",
        symbolOpacity=1,
    )
    legend = legend if len(curves) > 1 else None

    def scale(choices: Sequence[Any], which: str) -> alt.Scale:
        chosen = [choices[getattr(curve, which) % len(choices)] for curve in curves]
        return alt.Scale(type="ordinal", domain=folded, range=chosen)

    picked, controls = _picking(curves)
    shown: dict[str, Any] = {"x": x, "y": y}
    shown["color"] = alt.Color("curve:N", scale=scale([light for light, _ in CELLS], "cell"), legend=legend)
    if controls:
        shown["opacity"] = alt.condition(picked, alt.value(1), alt.value(0.12))
    layers = [
        lines.mark_line(clip=True, opacity=1)
        .encode(
            **shown,
            strokeDash=alt.StrokeDash("curve:N", scale=scale(DASHES, "cell"), legend=legend),
            strokeWidth=alt.StrokeWidth("curve:N", scale=scale(WIDTHS, "kind"), legend=legend, sort=folded),
        )
        .add_params(*controls[:1])
        .properties(name="lines")
    ]
    if points <= _FEW:
        layers.append(lines.mark_point(size=34, filled=True, opacity=1, shape=shape_of_cell()).encode(**shown))
    return layers, controls[1:]


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


def hover(x: alt.X, curves: Sequence[Curve], tooltip: list[alt.Tooltip], *, logarithms: bool = False) -> Any:
    """Rectangles from `low` to `high` over the whole height: where the pointer is, all curves' values are shown."""
    over = alt.selection_point(name="over", on="pointerover", clear="pointerout", fields=["low"], empty=False)
    chart = alt.Chart(alt.NamedData("curves"))
    for curve in curves:
        value = f"datum.{curve.key}"
        words = power_of_ten(value) if logarithms else f"format({value}, '.3~g')"
        shown = f"{value} === null ? '–' : {words}"
        chart = chart.transform_calculate(**{f"{curve.key}_shown": shown})
    values = [alt.Tooltip(f"{curve.key}_shown:N", title=curve.name) for curve in curves]
    return (
        chart.mark_rect(color="#767676", aria=False, clip=True)
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
