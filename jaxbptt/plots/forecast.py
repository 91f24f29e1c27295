r"""Forecasts beside the past that they continue, with their intervals."""

from typing import Any

import numpy as np
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure

from jaxbptt.models.forecasting import Forecast
from jaxbptt.plots.figure import COLOURS, FEW, finite, label_axes, legend_below, new_figure, step_ticks

MAX_PANELS = 4
# So many times the steps of the forecast are shown of the past, and at least so many rows.
_PAST, _LEAST = 3, 50


def plot_forecast(forecast: Forecast, past: Any, *, times: Any = None) -> Figure:
    r"""The last values of each column, their forecast, and its interval; a panel for each of the first four columns.

    Of the past it shows three times as many rows as are forecast, and at least 50. Values that are not finite are left out.

    Args:
        forecast: what `models.forecast` returns.
        past: `[time, columns]`, what the forecast's columns were, in their own units.
        times: dates of the rows of the past and of those forecast, `[time + steps]`; `None` for the number of steps from the
            last row that is known.

    Returns:
        A matplotlib `Figure`.

    Raises:
        ValueError: a past of another number of columns, or times of another length.

    Example:
        >>> import numpy as np
        >>> from jaxbptt import models, plots
        >>> ahead, spread = np.full((3, 1), 7.0), np.arange(1.0, 4)[:, None]
        >>> future = models.Forecast(("load",), ahead, ahead - spread, ahead + spread, 0.9, (), 3)
        >>> figure = plots.plot_forecast(future, np.full((10, 1), 7.0))
        >>> [text.get_text() for text in figure.legends[0].get_texts()]
        ['past', 'forecast', '90 % interval']
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
    shown = min(len(past), max(_PAST * steps, _LEAST))
    at = np.arange(1 - shown, steps + 1) if times is None else np.asarray(times)[len(past) - shown :]
    panels = min(columns, MAX_PANELS)
    figure, axes = new_figure(panels, width=9.0, height=1.5 + 2.5 * panels, stacked=True, sharex=True)
    few = "o" if steps <= FEW else ""
    for i, panel in enumerate(axes):
        behind, low, mean, high = (
            finite(each[:, i]) for each in (past[-shown:], forecast.low, forecast.mean, forecast.high)
        )
        panel.plot(at[:shown], behind, color="0.25", linewidth=1.3, label="past")
        # From the last value that is known, so that there is no gap.
        joined = np.concatenate([behind[-1:], mean])
        panel.plot(at[shown - 1 :], joined, color=COLOURS[0], linewidth=1.8, label="forecast")
        panel.plot(at[shown:], mean, color=COLOURS[0], linestyle="", marker=few, markersize=3.5)
        if np.isfinite(low).any():
            label = f"{100 * forecast.level:g} % interval"
            panel.fill_between(at[shown:], low, high, color=COLOURS[0], alpha=0.2, linewidth=0, label=label)
        panel.axvline(at[shown - 1], color="0.6", linewidth=0.8, linestyle=":")
        label_axes(panel, "", "", _quoted(forecast.columns[i]))
        panel.margins(x=0.01)
    axes[0].set_title("Forecast" if panels == columns else f"Forecast, {panels} of {columns} columns")
    if times is None:
        axes[-1].set_xlabel("steps after the last known row")
        step_ticks(axes[-1].xaxis)
        axes[-1].xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}")
    else:
        # With at least 5 ticks and at most 8, matplotlib has none for 4 years of months, and warns.
        locator = AutoDateLocator(minticks=3, maxticks=8)
        axes[-1].xaxis.set_major_locator(locator)
        axes[-1].xaxis.set_major_formatter(ConciseDateFormatter(locator))
    legend_below(figure, axes[0])
    return figure


def _quoted(name: str) -> str:
    """A name as it is: matplotlib reads what is between dollar signs as mathematics."""
    return name.replace("$", r"\$")
