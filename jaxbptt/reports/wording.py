r"""The report in words: what each network did in a sentence, tables, and what to see in the figures."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from jaxbptt.analysis.certificate import Certificate, CertificateRow
from jaxbptt.models.forecasting import ValidationErrors
from jaxbptt.models.wording import errors_sentences, errors_table, measured_sentence
from jaxbptt.reports.report import CellReport
from jaxbptt.reports.summary import learns_from, listed, reach, shortest
from jaxbptt.words import counted

CAPTIONS = {
    "saliency": "The higher the bar at a place, the more the loss at the chosen step depends on what was read there. Heights "
    "are logarithmic: where there is no bar, it is less than a thousandth of the largest, and from there the network learns "
    "next to nothing.",
    "flow": "Read it from right to left, as the gradient goes. The axis is logarithmic: on a straight line the gradient "
    "changes by the same factor in every step. The steeper the line, the sooner the network forgets; a level one keeps the "
    "gradient.",
    "causes": "Bars to the left shrink the gradient in each step back, bars to the right make it grow. The last bar is their "
    "sum, which is the change that was observed.",
    "singular-values": "The higher the largest value at a lag, the more of a gradient can come that far. Where even the "
    "largest is tiny, no loss can teach the network anything from so long ago.",
    "lags": "How much of the gradient comes from so many steps before a loss. Where a curve has fallen to a thousandth of its "
    "start, a longer memory would hardly change what is learned.",
    "truncation": "Above: the further right, the smaller the error. Below 0.1, that is 10 %, little is lost. Below: each "
    "point is a state and a loss, and the coloured ones are those between which the gradient still passes at the K chosen.",
    "agreement": "From top to bottom: error, memory and time of every method; further left is better. Errors to the left of "
    "the dashed line are no more than rounding.",
}

_CAUSES = {
    "weights": "vanishes: weights",
    "saturation": "vanishes: saturation",
    "alignment": "vanishes: alignment",
    "explosion": "explodes",
    "forward": "not finite",
    "backward": "not finite",
    "no gradient": "none",
}


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
    nats = " A nat is 1.44 bits: a loss of 0.69 nats is that of a coin toss." if unit.startswith("nats") else ""
    return Section(
        "What was learnt",
        (f"The mean loss on the sequences of this report, in {unit}; smaller is better.{nats}",),
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
    rms = np.sqrt(np.sum(changes**2, axis=0) / np.maximum(seen.sum(axis=0), 1))
    rows = zip(columns, rms, values.std(axis=0), strict=True)
    return Section(
        "What is easy",
        (
            "What each column changes by in one step, as a root mean square: a forecast that nothing changes (persistence) "
            "is off by as much, in the column's own unit and relative to its standard deviation.",
        ),
        Table(
            ("column", "change in a step", "in deviations"),
            tuple((name, f"{change:.3g}", f"{change / (std or 1):.3g}") for name, change, std in rows),
        ),
    )


def saliency_sentence(report: CellReport) -> str:
    """From how far back what was read still moves the loss of the last step."""
    assert report.saliency is not None
    values = np.asarray(report.saliency.values[-1], float)
    if not np.isfinite(values).all():
        return f"{report.name}: the dependence is not finite."
    if not values.sum() > 0:
        return f"{report.name}: the loss of the last step depends on nothing that was read."
    from_end = np.cumsum(values[::-1]) / values.sum()
    half, most = (int(np.argmax(from_end >= share * (1 - 1e-9))) + 1 for share in (0.5, 0.99))
    return (
        f"{report.name}: half of the dependence of the last step's loss is on the last {counted(half, 'step')}, 99 % on the "
        f"last {most}."
    )


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
    if steps == 1:
        return f"{report.name}: a single step, with none before it."
    back = steps - 1 - int(norms.argmax())
    if norms.max() > 100 * norms[-1]:
        if norms[-1] == 0:
            return f"{report.name}: the gradient is 0 at the last step and largest {counted(back, 'step')} before it."
        factor = f"{norms.max() / norms[-1]:.1g}"
        return f"{report.name}: the gradient grows: {counted(back, 'step')} back it is {factor} times as large as at the end."
    at_first = _percent(norms[0] / norms.max())
    if lag == steps - 1:
        return f"{report.name}: the gradient reaches all {steps:,} steps; {at_first} of its largest size are left at the first."
    falls = f"{report.name}: the gradient falls below 1 % of its largest size {counted(lag + 1, 'step')} back"
    dtype = report.flow.norms.dtype
    above_rounding = reach(report.flow, float(np.finfo(dtype).eps)) or 0
    if above_rounding == steps - 1:
        return f"{falls}; {at_first} are left at the first step, {counted(steps - 1, 'step')} back."
    return f"{falls}, and below the rounding error of {dtype} {counted(above_rounding + 1, 'step')} back."


def cause_sentence(report: CellReport) -> str:
    """Why the gradient of the last step's loss became what it is."""
    diagnosis, name = report.diagnosis, report.name
    rate = diagnosis.rates.observed
    if diagnosis.cause in ("forward", "backward", "cut", "no gradient") or not math.isfinite(rate):
        return f"{name}: {diagnosis.sentence}"
    each = f"a step back multiplies it by {math.exp(rate):.3g} on average"
    if diagnosis.cause == "steady":
        return f"{name}: the gradient stays within a factor of 100 over the whole sequence; {each}."
    if diagnosis.cause == "explosion":
        return f"{name}: the gradient explodes; {each}."
    because = {
        "weights": "because of its weights and gates, which let through less than they receive",
        "saturation": "because of saturation",
        "alignment": "because it lies in directions that the network forgets faster than others",
    }[diagnosis.cause]
    if diagnosis.cause == "saturation" and diagnosis.slopes:
        flattest, slope = min(diagnosis.slopes.items(), key=lambda item: item[1])
        which = {"tanh": "the flattest tanh has", "logistic": "the flattest gate has"}.get(flattest.split()[0])
        because += f": {which or f'{flattest} has'} {_percent(slope)} of its steepest slope"
    return f"{name}: the gradient vanishes, mainly {because}; {each}."


def start_sentence(report: CellReport) -> str | None:
    """How the weights start, where that decides how far the gradient reaches; `None` for other cells and trained weights."""
    if report.kept is not None:
        gate, bias = {"gru": ("update", "update_bias"), "lstm": ("forget", "forget_bias")}[report.kind]
        at = math.log(report.kept / (1 - report.kept)) if 0 < report.kept < 1 else math.inf
        return (
            f"{report.name}: the bias of its {gate} gate starts at {at:.2g} (`{bias}`), so that a unit keeps about "
            f"{report.kept:.0%} of its state in each step, and as much of the gradient on that way back.".replace(
                "%", " %"
            )
        )
    if report.kind == "elman" and report.bound_rate is not None and not report.trained:
        return (
            f"{report.name}: W_hh starts as an orthogonal matrix, with {report.bound_rate:.2f} for all its singular values. It "
            "keeps the length of a gradient, and only the slopes of tanh, below 1, shrink it."
        )
    return None


def rates_table(reports: Sequence[CellReport]) -> Table:
    """The rates of the gradient, in nats a step, by network."""
    terms = {
        "observed": lambda d: d.rates.observed,
        "weights": lambda d: d.rates.weights,
        "saturation": lambda d: d.rates.saturation,
        "alignment": lambda d: d.rates.alignment,
        "upper bound, by the weights": lambda d: math.log(d.bound_rate) if d.bound_rate > 0 else -math.inf,
        "largest Lyapunov exponent": lambda d: float(d.exponents[0]),
    }
    rows = [(term, *(_signed(value(report.diagnosis)) for report in reports)) for term, value in terms.items()]
    return Table(("nats a step", *_names(reports)), tuple(rows))


def slopes_table(report: CellReport) -> Table:
    """How steep each tanh and gate of a network is."""
    rows = ((name.replace("logistic", "σ"), f"{slope:.2f}") for name, slope in report.diagnosis.slopes.items())
    return Table(("of " + report.name, "mean slope / steepest"), tuple(rows))


def horizon_sentence(report: CellReport) -> str | None:
    """How far back the gradient of the mean loss comes from; `None` where it was not computed."""
    if report.lags is None:
        return None
    steps, last = len(report.lags.norms), learns_from(report)
    if last is None:
        return f"{report.name}: no horizon: the gradient of the mean loss is 0 or not finite."
    return f"{report.name}: all but 1 % of the gradient comes from within {counted(last, 'step')} of each loss, of {steps:,}."


def lengths_table(reports: Sequence[CellReport]) -> Table:
    """The shortest K with an error within 10 %, by network."""
    rows = []
    for report in reports:
        lengths = (shortest(report.bias, curve) for curve in (report.bias.windowed, report.bias.truncated))
        steps = len(report.flow.norms)
        rows.append((report.name, *(f"all {steps:,}" if K is None or steps <= K else f"{K:,}" for K in lengths)))
    return Table(("network", "windowed_scan", "truncated_scan"), tuple(rows))


def bias_table(reports: Sequence[CellReport], method: str) -> Table:
    """The error at each truncation length K, by network, with the cosine in brackets."""
    curves = [getattr(report.bias, method) for report in reports]
    lengths = reports[0].bias.lengths
    rows = [
        (f"{K:,}", *(f"{c.relative_errors[i]:.2g} ({c.cosines[i]:.3f})" for c in curves)) for i, K in enumerate(lengths)
    ]
    return Table(("K", *_names(reports)), tuple(rows))


def agreement_sentence(reports: Sequence[CellReport]) -> str:
    """Whether all methods agree, and how well."""
    certificates = [report.certificate for report in reports]
    differ = [f"{row.name} of {r.name}" for r in reports for row in r.certificate.rows if not row.agrees]
    if differ:
        return f"Not all methods agree: {listed(differ)} differ from the reference by more than rounding explains."
    largest = max((row.largest_error for c in certificates for row in c.rows), default=0.0)
    methods = len({row.name for c in certificates for row in c.rows})
    where = "" if len(reports) == 1 else f" in {'both' if len(reports) == 2 else 'all'} networks"
    return (
        f"All {methods} methods agree{where}: the largest error is {largest:.1e}, and up to "
        f"{max(c.tolerance for c in certificates):.0e} counts as rounding in {certificates[0].dtype}."
    )


def agreement_table(reports: Sequence[CellReport]) -> Table:
    """The relative error of each method, by network."""
    return _by_method(reports, lambda row: f"{row.largest_error:.1e}{'' if row.agrees else ', differs'}", "method")


def cost_tables(reports: Sequence[CellReport]) -> dict[str, Table]:
    """Time, memory and operations of each method, by network."""
    return {
        "Time": _by_method(reports, lambda row: f"{1e3 * row.seconds:.2f}", "milliseconds"),
        "Memory": _by_method(reports, lambda row: f"{row.temporary_bytes / 1024:,.0f}", "KiB"),
        "Operations": _by_method(reports, lambda row: _number(row.flops / 1e6), "millions"),
    }


def overview_table(reports: Sequence[CellReport]) -> Table:
    """What a terminal shows of each network."""
    agrees = lambda certificate: "yes" if all(row.agrees for row in certificate.rows) else "NO"  # noqa: E731
    rows = []
    for report, (_, windowed, truncated) in zip(reports, lengths_table(reports).rows, strict=True):
        last = learns_from(report)
        learns = "–" if last is None else f"{last:,} of {len(report.flow.norms):,}"
        rows.append(
            (
                report.name,
                learns,
                _CAUSES.get(report.diagnosis.cause, report.diagnosis.cause),
                windowed,
                truncated,
                agrees(report.certificate),
            )
        )
    head = "network", "reaches back, steps", "gradient", "K windowed", "K truncated", "methods agree"
    return Table(head, tuple(rows))


def _by_method(reports: Sequence[CellReport], cell: Callable[[CertificateRow], str], head: str) -> Table:
    """A row for each method, a column for each network; the order is that of the longest certificate."""
    certificates: list[Certificate] = [report.certificate for report in reports]
    methods: Iterable[str] = dict.fromkeys(
        row.name for c in sorted(certificates, key=lambda c: -len(c.rows)) for row in c.rows
    )
    found = [{row.name: cell(row) for row in c.rows} for c in certificates]
    return Table((head, *_names(reports)), tuple((name, *(of.get(name, "–") for of in found)) for name in methods))


def _names(reports: Sequence[CellReport]) -> tuple[str, ...]:
    return tuple(report.name for report in reports)


def _percent(share: float) -> str:
    return (
        f"{100 * share:.2g} %" if share >= 0.01 else f"{100 * share:.0e} %" if share < 1e-6 else f"{100 * share:.1g} %"
    )


def _signed(value: float) -> str:
    return f"{value:+.3f}" if math.isfinite(value) else str(value)


def _number(value: float) -> str:
    return f"{value:,.1f}" if math.isfinite(value) else "–"
