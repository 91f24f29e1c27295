r"""What a truncation at K loses: the error by K, and the paths that survive, both moved by one slider of K."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from jaxbptt.reports.charts import curves
from jaxbptt.reports.charts.curves import Curve
from jaxbptt.reports.charts.embed import Chart
from jaxbptt.reports.charts.style import ACCENT, INK, QUIET, configured, log_axis
from jaxbptt.reports.report import CellReport

# Where the two panels end, pixels from the top: the error above, the paths below.
_ERRORS = (0, 190)
_PATHS = (292, 552)
# Where what they keep is said.
_WORDS = 250
# So many steps of the staircase can be told apart on a screen.
_MANY = 400
_KINDS = ("truncated", "windowed")


def truncation_chart(reports: Sequence[CellReport]) -> Chart:
    """The errors of `truncated_scan` and `windowed_scan` at every K, and which ∂Lₜ/∂hₛ they keep at the K of a slider."""
    lengths = np.asarray(reports[0].bias.lengths)
    steps = len(reports[0].flow.norms)
    middle = len(lengths) // 2
    bind: dict[str, Any] = {}
    if len(lengths) > 1:
        bind["bind"] = alt.binding_range(min=0, max=len(lengths) - 1, step=1, name="K")
    found = [
        Curve(i, report.name, np.asarray(getattr(report.bias, kind).relative_errors, float), j, f"{kind}_scan")
        for i, report in enumerate(reports)
        for j, kind in enumerate(_KINDS)
    ]
    errors, params = _errors(found, lengths)
    spec = configured(
        alt.layer(errors, _paths(steps))
        .resolve_scale(x="independent", y="independent")
        .add_params(
            *params,
            alt.param(name="k", value=middle, **bind),
            alt.param(name="lengths", value=lengths.tolist()),
            alt.param(
                name="errors", value={curve.key: [_in_words(error) for error in curve.values] for curve in found}
            ),
            alt.param(name="kept", value=[_kept(steps, int(K)) for K in lengths]),
        )
        .properties(
            width="container",
            height=_PATHS[1],
            title=alt.TitleParams({"expr": "'K = ' + lengths[k] + ': the gradient is off by'"}),
        )
    )
    return Chart(
        "truncation", spec, "Error of truncated gradients by the truncation length K, and the paths they keep."
    )


def _in_words(error: float) -> str:
    """A relative error with two digits."""
    if not np.isfinite(error):
        return "not finite"
    return f"{100 * error:.2g} %" if 1e-4 <= error < 10 else "0" if error == 0 else f"{error:.1e}"


def _kept(steps: int, K: int) -> list[str]:
    """How many of the paths from a state to the same or a later loss each method keeps, in words."""
    whole, rest = divmod(steps, K)
    truncated = whole * (K * (K + 1) // 2) + rest * (rest + 1) // 2
    windowed = K * steps - K * (K - 1) // 2
    total = steps * (steps + 1) // 2
    shares = (f"{count:,} of {total:,} ({100 * count / total:.2g} %)" for count in (truncated, windowed))
    return [f"■ kept by {kind}_scan: {share}" for kind, share in zip(_KINDS, shares, strict=True)]


def _errors(found: Sequence[Curve], lengths: np.ndarray) -> tuple[Any, list[Any]]:
    gap = _PATHS[1] - _ERRORS[1]
    rows = curves.rows(found, x=lengths, low=lengths / np.sqrt(2), high=lengths * np.sqrt(2))
    across = alt.Scale(type="log", domain=[0.8, max(2, lengths[-1]) * 1.25], nice=False)
    axis = alt.Axis(
        title="truncation length K, time steps",
        orient="bottom",
        values=lengths.tolist(),
        format=",d",
        offset=-gap,
        grid=False,
    )
    x, low = (alt.X(field, type="quantitative", scale=across, axis=axis) for field in ("x", "low"))
    scale, ticks = log_axis((curve.values for curve in found), ticks=5)
    y = alt.Y(
        "value:Q",
        title="‖g_K − g‖ / ‖g‖",
        scale=alt.Scale(**scale, range=[_ERRORS[1], _ERRORS[0]]),
        axis=alt.Axis(**ticks, orient="left"),
    )
    layers, params = curves.drawn(rows, found, x, y, label="': ' + errors[datum.value][k]")
    rule = (
        alt.Chart(alt.Data(values=rows))
        .transform_filter("datum.x == lengths[k]")
        .mark_rule(color=INK[0], strokeDash=[3, 3])
        .encode(x, y=alt.value(_ERRORS[0]), y2=alt.value(_ERRORS[1]))
        .properties(name="at")
    )
    tooltip = [alt.Tooltip("x:Q", title="K", format=",d")]
    over = curves.hover(rows, low, found, tooltip).encode(y=alt.value(_ERRORS[0]), y2=alt.value(_ERRORS[1]))
    return alt.layer(rule, *layers, over), params


def _paths(steps: int) -> Any:
    """Rows are losses, columns states: a path goes from a state to the same or a later loss, below the diagonal."""
    stride = -(-steps // _MANY)
    data = alt.Data(values=[{"s": s} for s in [*range(0, steps, stride), steps]])
    side = alt.expr(f"min(width, {_PATHS[1] - _PATHS[0]})")
    axis: dict[str, Any] = {"format": ",d", "tickMinStep": 1, "tickCount": 5, "grid": False}
    x = alt.X(
        "s:Q",
        scale=alt.Scale(domain=[0, steps], rangeMin=0, rangeMax=side, nice=False),
        axis=alt.Axis(title="state hₛ, step s", orient="bottom", **axis),
    )
    y = alt.Y(
        "s:Q",
        scale=alt.Scale(domain=[0, steps], range=list(_PATHS), nice=False),
        axis=alt.Axis(title="loss Lₜ, step t", orient="left", **axis),
    )
    base = alt.Chart(data)
    areas = [
        base.transform_calculate(last=f"min({steps}, {last})")
        .mark_area(interpolate="step-after", color=colour[0], opacity=1)
        .encode(x, y, alt.Y2("last:Q"))
        .properties(name=name)
        for name, last, colour in (
            ("windowed", "datum.s + lengths[k]", QUIET),
            ("truncated", "(floor(datum.s / lengths[k]) + 1) * lengths[k]", ACCENT),
        )
    ]
    words = [
        alt.Chart(alt.Data(values=[{}]))
        .mark_text(align="left", baseline="top", color=colour[0], fontSize=12)
        .encode(x=alt.value(0), y=alt.value(_WORDS + 18 * i), text=alt.value(alt.expr(f"kept[k][{i}]")))
        for i, colour in enumerate((ACCENT, QUIET))
    ]
    diagonal = base.mark_line(color=QUIET[0], strokeWidth=1).encode(x, y)
    return alt.layer(*areas, diagonal, *words)
