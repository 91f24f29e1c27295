r"""Forecasts beside the past that they continue, with their intervals."""

from typing import Any

import numpy as np
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter

from jaxbptt.models.forecasting import Forecast
from jaxbptt.plots.figure import (
    COLOURS,
    FEW,
    Ax,
    Drawing,
    add_legend,
    drawing,
    finite,
    label_axes,
    panels_in,
    time_unit,
)

MAX_PANELS = 4
# So many times the steps of the forecast are shown of the past, and at least so many rows.
_PAST, _LEAST = 3, 50


def plot_forecast(
    forecast: Forecast,
    past: Any,
    *,
    times: Any = None,
    ax: Ax = None,
    dt: float | None = None,
    unit: str | None = None,
) -> Drawing:
    r"""The last values of each column, their forecast, and its interval; a panel for each of the first four columns.

    Of the past it shows three times as many rows as are forecast, and at least 50. Values that are not finite are left out.

    Args:
        forecast: what `models.forecast` returns.
        past: `[time, columns]`, what the forecast's columns were, in their own units.
        times: dates of the rows of the past and of those forecast, `[time + steps]`; `None` for the number of steps from the
            last row that is known.
        ax: the Axes to draw in, one for each of the columns that are drawn; a new figure by default.
        dt: the time from one row to the next, for an axis in a unit of time; steps by default.
        unit: what `dt` is given in, such as `"h"`.

    Returns:
        A `Drawing`; the artists of each column, here `"load"`, are the lines `"load past"`, `"load forecast"` and
        `"load steps"`, and the area `"load interval"` where there is one.

    Raises:
        ValueError: a past of another number of columns, times of another length, times and `dt`; `ax` of another number of
            Axes, `dt` that is not above 0, `unit` without `dt`.

    Example:
        >>> import numpy as np
        >>> from jaxbptt import models, plots
        >>> ahead, spread = np.full((3, 1), 7.0), np.arange(1.0, 4)[:, None]
        >>> future = models.Forecast(("load",), ahead, ahead - spread, ahead + spread, 0.9, (), 3)
        >>> drawing = plots.plot_forecast(future, np.full((10, 1), 7.0))
        >>> drawing.artists["load forecast"].get_ydata()
        array([7., 7., 7., 7.])
    """
    past = np.asarray(past, float)
    steps, columns = forecast.mean.shape
    if past.ndim != 2 or past.shape[1] != columns:
        raise ValueError(
            f"past has shape {past.shape}, but the forecast is of {columns} columns: pass [time, {columns}]."
        )
    if times is not None and len(times) != len(past) + steps:
        raise ValueError(
            f"times has {len(times)} dates, but the past has {len(past)} rows and the forecast {steps}: pass "
            f"{len(past) + steps} dates."
        )
    if times is not None and dt is not None:
        raise ValueError("times and dt are both given: dates are drawn as they are. Leave dt out.")
    time = time_unit(dt, unit)
    shown = min(len(past), max(_PAST * steps, _LEAST))
    at = time.times(np.arange(1 - shown, steps + 1)) if times is None else np.asarray(times)[len(past) - shown :]
    drawn = min(columns, MAX_PANELS)
    panels = panels_in(ax, drawn, width=9.0, height=1.5 + 2.5 * drawn, stacked=True, sharex=True)
    artists: dict[str, Any] = {}
    few = "o" if steps <= FEW else ""
    for i, (name, axes) in enumerate(zip(forecast.columns, panels, strict=False)):
        behind, low, mean, high = (
            finite(each[:, i]) for each in (past[-shown:], forecast.low, forecast.mean, forecast.high)
        )
        (artists[f"{name} past"],) = axes.plot(at[:shown], behind, color="0.25", linewidth=1.3, label="past")
        # From the last value that is known, so that there is no gap.
        joined = np.concatenate([behind[-1:], mean])
        style: dict[str, Any] = {"color": COLOURS[0], "linewidth": 1.8, "markersize": 3.5}
        (artists[f"{name} forecast"],) = axes.plot(at[shown - 1 :], joined, label="forecast", **style)
        (artists[f"{name} steps"],) = axes.plot(at[shown:], mean, linestyle="", marker=few, **style)
        if np.isfinite(low).any():
            label = f"{100 * forecast.level:g} % interval"
            artists[f"{name} interval"] = axes.fill_between(
                at[shown:], low, high, color=COLOURS[0], alpha=0.2, linewidth=0, label=label
            )
        axes.axvline(at[shown - 1], color="0.6", linewidth=0.8, linestyle=":")
        label_axes(axes, "", "", _quoted(name))
        axes.margins(x=0.01)
    title = "Forecast" if drawn == columns else f"Forecast, {drawn} of {columns} columns"
    label_axes(panels[0], title, "", panels[0].get_ylabel())
    # Those of a new figure share the axis of the last one.
    for axes in panels[-1:] if ax is None else panels:
        if times is not None:
            # With at least 5 ticks and at most 8, matplotlib has none for 4 years of months, and warns.
            locator = AutoDateLocator(minticks=3, maxticks=8)
            axes.xaxis.set_major_locator(locator)
            axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))
            continue
        axes.set_xlabel(time.label("steps after the last known row", "time after the last known row"))
        time.ticks(axes.xaxis)
        axes.xaxis.set_major_formatter(lambda at, _: f"{at:,.0f}" if dt is None else f"{at:,g}")
    add_legend(panels[:1], ax)
    return drawing(panels, artists)


def _quoted(name: str) -> str:
    """A name as it is: matplotlib reads what is between dollar signs as mathematics."""
    return name.replace("$", r"\$")
