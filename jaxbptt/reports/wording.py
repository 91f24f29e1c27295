r"""The report in words: sentences and tables, the same in the terminal and on the page."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from jaxbptt.analysis import certificate as certificates
from jaxbptt.analysis.certificate import Certificate
from jaxbptt.analysis.credit import TruncationBias
from jaxbptt.analysis.flow import GradientFlow
from jaxbptt.models.forecasting import ValidationErrors
from jaxbptt.models.wording import errors_sentences, errors_table, measured_sentence
from jaxbptt.reports.report import CellReport
from jaxbptt.words import counted


class Table(NamedTuple):
    """A table in words.

    Attributes:
        head: the columns' names.
        rows: a cell for each column.
    """

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


class Section(NamedTuple):
    """What a report says beside the gradient.

    Attributes:
        title: of the section.
        sentences: above the table.
        table: of numbers.
        warnings: below it.
    """

    title: str
    sentences: tuple[str, ...]
    table: Table
    warnings: tuple[str, ...] = ()


def losses_section(reports: Sequence[CellReport], easy: tuple[str, float], unit: str) -> Section:
    """The loss of networks on the sequences of the report, beside that of what is easy."""
    rows = [(report.name, report.loss) for report in reports] + [easy]
    return Section(
        "What was learnt",
        (f"The mean loss on the sequences of this report, in {unit}.",),
        Table(("prediction", "mean loss"), tuple((name, "" if loss is None else f"{loss:.4g}") for name, loss in rows)),
    )


def errors_section(errors: ValidationErrors) -> Section:
    """The errors of a network's forecasts, beside those of what is easy."""
    head, rows = errors_table(errors)
    return Section(
        "Forecasts of the validation data",
        (measured_sentence(errors),),
        Table(head, tuple(rows)),
        tuple(errors_sentences(errors)),
    )


def persistence_section(columns: Sequence[str], values: np.ndarray, observed: np.ndarray) -> Section:
    """What each column of a table changes by in one step, which a forecast has to be better than."""
    seen = observed[1:] & observed[:-1]
    changes = np.where(seen, np.diff(values, axis=0), 0.0)
    changes = np.sqrt((changes**2).sum(axis=0) / np.maximum(seen.sum(axis=0), 1))
    rows = zip(columns, changes, values.std(axis=0), strict=True)
    return Section(
        "What is easy",
        (
            "Persistence, the forecast that nothing changes, is off by this much one step ahead: the root mean square of a "
            "column's changes, in its own units, and relative to its standard deviation.",
        ),
        Table(
            ("column", "change in a step", "in deviations"),
            tuple((name, f"{change:.3g}", f"{change / (std or 1):.3g}") for name, change, std in rows),
        ),
    )


def certificate_table(certificate: Certificate) -> Table:
    """A row for each method."""
    return Table(certificates.COLUMNS, tuple(map(certificates.row_in_words, certificate.rows)))


def bias_table(bias: TruncationBias) -> Table:
    """A row for each truncation length K: the error and the cosine of both truncated methods."""
    curves = {"truncated": bias.truncated, "windowed": bias.windowed}
    head = ("K, time steps", *(f"{method} {number}" for method in curves for number in ("error", "cosine")))
    rows = []
    for i, K in enumerate(bias.lengths):
        pairs = ((f"{c.relative_errors[i]:#.2g}", f"{c.cosines[i]:.3f}") for c in curves.values())
        rows.append((str(K), *(cell for pair in pairs for cell in pair)))
    return Table(head, tuple(rows))


def sentences(report: CellReport) -> list[str]:
    """What a cell's report says, in a few sentences."""
    found = reach_sentence(report), horizon_sentence(report), diagnosis_sentence(report)
    return [sentence for sentence in found if sentence is not None]


def reach(flow: GradientFlow, fraction: float) -> int | None:
    """The longest lag at which ‖∂L/∂hₜ‖ is at least a fraction of its largest value; `None` where it is 0 throughout."""
    norms = np.asarray(flow.norms, float)
    if not norms.max(initial=0) > 0:
        return None
    return len(norms) - 1 - int(np.argmax(norms >= fraction * norms.max()))


def reach_sentence(report: CellReport) -> str:
    """How far back the gradient of the last step's loss reaches."""
    norms = np.asarray(report.flow.norms, float)
    steps = len(norms)
    if not np.isfinite(norms).all():
        bad = np.count_nonzero(~np.isfinite(norms))
        return f"{report.name}: the gradient is not finite in {bad} of {counted(steps, 'step')}."
    lag = reach(report.flow, 0.01)
    if lag is None:
        return f"{report.name}: no gradient reaches any state: the last step's loss does not depend on them."
    gradient = f"{report.name}: the gradient of the last step's loss"
    at_first = f"at the first step it is {norms[0] / norms.max():.0e} of it"
    if lag == steps - 1:
        return (
            f"{gradient} reaches back all {counted(steps, 'step')} with at least 1 % of its largest norm; {at_first}."
        )
    falls = f"{gradient} falls below 1 % of its largest norm {counted(lag + 1, 'step')} back"
    dtype = report.flow.norms.dtype
    above_rounding = reach(report.flow, float(np.finfo(dtype).eps)) or 0
    if above_rounding == steps - 1:
        return f"{falls}; {at_first}."
    return f"{falls}, and below the rounding error of {dtype} {counted(above_rounding + 1, 'step')} back."


def horizon_sentence(report: CellReport) -> str | None:
    """How far back the gradient of the mean loss comes from; `None` where it was not computed."""
    if report.lags is None:
        return None
    steps = len(report.lags.norms)
    if not np.isfinite(report.lags.norms).all() or not report.horizon:
        return f"{report.name}: no horizon: the gradient of the mean loss is 0 or not finite."
    last = f"the last {report.horizon} of {counted(steps, 'step')}"
    return f"{report.name}: all but 1 % of the gradient of the mean loss comes from {last}."


def diagnosis_sentence(report: CellReport) -> str:
    """Why the gradient of the last step's loss became what it is."""
    return f"{report.name}: {report.diagnosis.sentence}"
