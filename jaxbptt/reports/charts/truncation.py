r"""What a truncation at K loses: the error by K, and the paths that survive, both moved by one slider of K."""

from collections.abc import Sequence
from typing import Any

import altair as alt
import numpy as np

from jaxbptt.reports.charts import curves
from jaxbptt.reports.charts.curves import Curve
from jaxbptt.reports.charts.embed import Chart
from jaxbptt.reports.charts.style import ACCENT, INK, QUIET, configured, log_axis, step_axis
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
        Curve(i, report.name, np.asarray(getattr(report.bias, kind).relative_errors, float), j, kind)
        for i, report in enumerate(reports)
        for j, kind in enumerate(_KINDS)
    ]
    rows = curves.rows(found, x=lengths, low=lengths / np.sqrt(2), high=lengths * np.sqrt(2))
    errors, params = _errors(found, lengths)
    title = alt.TitleParams({"expr": "'K = ' + format(lengths[k], ',') + ': the gradient is off by'"})
    chart = (
        alt.layer(errors, _paths(steps))
        .resolve_scale(x="independent", y="independent")
        .add_params(*params, alt.param(name="k", value=middle, **bind))
        .properties(height=_PATHS[1], title=title)
    )
    values = curves.labels(found) | {
        "lengths": lengths.tolist(),
        "errors": {curve.key: [_in_words(error) for error in curve.values] for curve in found},
        "kept": [_kept(steps, int(K)) for K in lengths],
    }
    stride = -(-steps // _MANY)
    spec = configured(chart, {"curves": rows, "states": [{"s": s} for s in [*range(0, steps, stride), steps]]}, values)
    return Chart(
        "truncation", spec, "Error of truncated gradients by the truncation length K, and the paths they keep."
    )


def _in_words(error: float) -> str:
    """A relative error with two digits."""
    if not np.isfinite(error):
        return "not finite"
    return _percent(error) if 1e-4 <= error < 10 else "0" if error == 0 else f"{error:.1e}"


def _kept(steps: int, K: int) -> list[str]:
    """How many of the paths from a state to the same or a later loss each method keeps, in words."""
    whole, rest = divmod(steps, K)
    truncated = whole * (K * (K + 1) // 2) + rest * (rest + 1) // 2
    windowed = K * steps - K * (K - 1) // 2
    total = steps * (steps + 1) // 2
    return [
        f"■ {kind}: {_percent(n / total)} of {total:,} paths"
        for kind, n in zip(_KINDS, (truncated, windowed), strict=True)
    ]


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"


def _errors(found: Sequence[Curve], lengths: np.ndarray) -> tuple[Any, list[Any]]:
    gap = _PATHS[1] - _ERRORS[1]
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
    layers, params = curves.drawn(found, len(lengths), x, y, label="errors[datum.value][k] + '  '")
    chosen = alt.Chart(alt.NamedData("curves")).transform_filter("datum.x == lengths[k]")
    rule = chosen.mark_rule(color=INK[0], strokeDash=[3, 3]).encode(
        x, y=alt.value(_ERRORS[0]), y2=alt.value(_ERRORS[1])
    )
    folded: list[Any] = [curve.key for curve in found]
    rings = (
        chosen.transform_fold(folded, as_=["curve", "value"])
        .transform_filter("datum.value > 0")
        .mark_point(size=120, color=INK[0], strokeWidth=1.5)
        .encode(x, y)
        .properties(name="at")
    )
    tooltip = [alt.Tooltip("x:Q", title="K", format=",d")]
    over = curves.hover(low, found, tooltip).encode(y=alt.value(_ERRORS[0]), y2=alt.value(_ERRORS[1]))
    return alt.layer(rule, *layers, rings, over), params


def _paths(steps: int) -> Any:
    """Rows are losses, columns states: a path goes from a state to the same or a later loss, below the diagonal."""
    side = alt.expr(f"min(width, {_PATHS[1] - _PATHS[0]})")
    x = alt.X(
        "s:Q",
        scale=alt.Scale(domain=[0, steps], rangeMin=0, rangeMax=side, nice=False),
        axis=step_axis(steps, "state hₛ, step s", orient="bottom"),
    )
    y = alt.Y(
        "s:Q",
        scale=alt.Scale(domain=[0, steps], range=list(_PATHS), nice=False),
        axis=step_axis(steps, "loss Lₜ, step t", orient="left"),
    )
    base = alt.Chart(alt.NamedData("states"))
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
        .encode(x=alt.value(-40), y=alt.value(_WORDS + 18 * i), text=alt.value(alt.expr(f"kept[k][{i}]")))
        for i, colour in enumerate((ACCENT, QUIET))
    ]
    diagonal = base.mark_line(color=QUIET[0], strokeWidth=1).encode(x, y)
    return alt.layer(*areas, diagonal, *words)
