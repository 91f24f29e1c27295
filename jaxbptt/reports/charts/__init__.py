r"""The report's charts: Vega-Lite, made with Altair, and everything they need to work in one file without a network."""

from collections.abc import Sequence

from jaxbptt.reports.charts.bars import agreement_chart, causes_chart
from jaxbptt.reports.charts.embed import Chart, figure, scripts
from jaxbptt.reports.charts.lines import flow_chart, lags_chart, singular_values_chart
from jaxbptt.reports.charts.saliency import saliency_chart
from jaxbptt.reports.charts.style import STYLE
from jaxbptt.reports.charts.truncation import truncation_chart
from jaxbptt.reports.report import CellReport, Row

__all__ = ["STYLE", "Chart", "charts", "figure", "scripts"]


def charts(row: Row, reports: Sequence[CellReport]) -> dict[str, Chart]:
    """The charts that there is data for, by name.

    Args:
        row: what the networks read.
        reports: one for each network.
    """
    found = [saliency_chart(row, reports)]
    makers = flow_chart, causes_chart, lags_chart, truncation_chart, agreement_chart, singular_values_chart
    found += [make(reports) for make in makers]
    return {chart.name: chart for chart in found if chart is not None}
