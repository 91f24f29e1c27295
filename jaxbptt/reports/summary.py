r"""The report in three sentences: what was measured, what it says about this sequence, and what to do about it."""

import math
from collections.abc import Sequence

import numpy as np

from jaxbptt.analysis.credit import BiasCurve, TruncationBias
from jaxbptt.analysis.flow import GradientFlow
from jaxbptt.reports.report import CellReport
from jaxbptt.words import counted

# A truncated gradient that is off by no more is close enough to learn from.
CLOSE = 0.1


def summary(
    measured: str, reports: Sequence[CellReport], *, trained: bool = False, easy: tuple[str, float] | None = None
) -> tuple[str, str, str]:
    """The three sentences; code in them stands between backticks.

    Args:
        measured: the first of them.
        reports: one for each network, or of one before and after training.
        trained: whether they are one network before and after training.
        easy: of a trained network: what is easy, in words, and its loss.
    """
    if trained:
        before, after = reports
        return measured, _learnt(before, after, easy), _to_do(after, trained=True)
    found = _furthest(reports)
    return measured, _reaches(reports, found), _to_do(reports[0] if found is None else found)


def reach(flow: GradientFlow, fraction: float) -> int | None:
    """The longest lag at which ‖∂L/∂hₜ‖ is at least a fraction of its largest value; `None` where it is 0 throughout."""
    norms = np.asarray(flow.norms, float)
    if not norms.max(initial=0) > 0:
        return None
    return len(norms) - 1 - int(np.argmax(norms >= fraction * norms.max()))


def learns_from(report: CellReport) -> int | None:
    """How many of the last steps the gradient comes from, all but 1 % of it; `None` where there is none or it is not finite.

    That of the mean loss, and where its lags were left out, of the last step's.
    """
    if report.diagnosis.cause in ("forward", "backward"):
        return None
    if report.lags is not None:
        return report.horizon if report.horizon and np.isfinite(report.lags.norms).all() else None
    lag = reach(report.flow, 0.01) if np.isfinite(report.flow.norms).all() else None
    return None if lag is None else lag + 1


def shortest(bias: TruncationBias, curve: BiasCurve) -> int | None:
    """The shortest K that was measured from which on the gradient is close enough; `None` where none is."""
    errors = np.asarray(curve.relative_errors, float)
    far = np.flatnonzero(~(errors <= CLOSE))  # nan is far
    first = int(far[-1]) + 1 if far.size else 0
    return int(bias.lengths[first]) if first < len(errors) else None


def advice(report: CellReport) -> str:
    """What to change so that the gradient of the network reaches further back."""
    steps, cause = len(report.flow.norms), report.diagnosis.cause
    kind = report.kind or "lstm"
    gated = f"`{'lstm' if kind == 'elman' else kind}(..., chrono_length={max(steps, 3)})`"
    if steps == 1:
        return "read more than one step (`--steps 256`): with a single one there is nothing to look back on"
    if cause == "forward":
        return (
            "find the number that is not finite in the forward pass first: the inputs, the weights or the step made it"
        )
    if cause == "backward":
        return (
            "find where the backward pass divides by 0 or overflows first, such as a square root or a logarithm at 0; "
            "`--float64` tells an overflow from an error"
        )
    if cause == "no gradient":
        return "choose a sequence whose next step depends on earlier ones: nothing here can be learned through time"
    if cause == "cut":
        return "look at the step that passes no gradient back: a reset, or units that are all switched off"
    if cause == "explosion":
        return (
            "clip the norm of the gradient (`--clip` in `train`, `optax.clip_by_global_norm`), and start with smaller "
            "recurrent weights: `recurrent_init=initializers.orthogonal(0.9)`"
        )
    if cause == "steady":
        return (
            f"read longer sequences than {steps:,} steps (`--steps`), to see where it ends: nothing has to be changed"
        )
    if kind == "elman" and cause == "saturation":
        return f"feed smaller inputs or start with a smaller `input_init`, so that tanh stays steep; or use {gated}"
    if kind == "elman":
        return f"use a cell that keeps its state, such as {gated}"
    if kind in ("lru", "rg_lru"):
        option = {"lru": "r_min", "rg_lru": "a_min"}[kind]
        return f"start with a larger `{option}`, so that no unit forgets fast"
    bias = (
        "a smaller `update_bias`" if kind == "min_gru" else f"a larger `{'update' if kind == 'gru' else 'forget'}_bias`"
    )
    return f"start with {gated}, which lets units keep their state for up to {steps:,} steps, or with {bias}"


def _furthest(reports: Sequence[CellReport]) -> CellReport | None:
    """The network whose gradient comes from furthest back; where several do, the one whose gradient shrinks least."""
    usable = [report for report in reports if learns_from(report) is not None]
    rate = lambda report: -abs(report.diagnosis.rates.observed)  # noqa: E731
    return max(usable, key=lambda r: (learns_from(r), rate(r) if math.isfinite(rate(r)) else -math.inf), default=None)


def _reaches(reports: Sequence[CellReport], found: CellReport | None) -> str:
    """What the sequence says of untrained networks."""
    odd = _odd(reports)
    if found is None:
        return odd
    steps, last = len(found.flow.norms), learns_from(found)
    which = "each loss" if found.lags is not None else "the last loss"
    whole = steps > 1 and last == steps
    comes = (
        f"reaches back over all {counted(steps, 'step')}"
        if whole
        else f"comes from within {counted(last, 'step')} of {which}"
    )
    part = "" if whole else "all but 1 % of "
    others = [r for r in reports if r is not found and learns_from(r) is not None]
    if steps == 1:
        text = "There is a single step, so there is nothing before it that could be learned from."
    elif len(reports) == 1:
        text = f"On this sequence {part}the gradient of the {found.name} network {comes}."
    else:
        as_far = [r.name for r in others if learns_from(r) == last]
        names = listed([found.name, *as_far])
        text = f"On this sequence the gradient reaches furthest back in {names}: {part}it {comes}"
        nearer = [f"{learns_from(r)} in {r.name}" for r in others if r.name not in as_far]
        text += f", against {listed(nearer)}." if nearer else "."
    return f"{text} {odd}".strip()


def _odd(reports: Sequence[CellReport]) -> str:
    """What is not as it should be, in any of the networks."""
    said = []
    for report in reports:
        cause = report.diagnosis.cause
        if cause in ("forward", "backward", "cut") or (cause == "no gradient" and len(report.flow.norms) > 1):
            said.append(f"{report.name}: {report.diagnosis.sentence}")
        elif cause == "explosion":
            said.append(f"{report.name}: the gradient explodes on its way back.")
        elif learns_from(report) is None:
            said.append(f"{report.name}: the gradient is 0 or not finite.")
    return " ".join(said)


def _learnt(before: CellReport, after: CellReport, easy: tuple[str, float] | None) -> str:
    """What training changed."""
    parts = []
    if before.loss is not None and after.loss is not None:
        word = "down" if after.loss < before.loss else "up" if after.loss > before.loss else "nowhere"
        beside = "" if easy is None else f" ({easy[0]}: {easy[1]:.3g})"
        parts.append(f"training took the mean loss {word}, from {before.loss:.3g} to {after.loss:.3g}{beside}")
    then, now = learns_from(before), learns_from(after)
    if then is not None and now is not None:
        parts.append(
            f"all but 1 % of the gradient came from within {counted(then, 'step')} of each loss before training, and comes "
            f"from within {now} after it"
        )
    text = "; ".join(parts)
    return f"{text[:1].upper()}{text[1:]}. {_odd([before, after])}".strip()


def _to_do(report: CellReport, *, trained: bool = False) -> str:
    """What to do with a network: where to cut its gradient, and how to reach further."""
    steps, cause = len(report.flow.norms), report.diagnosis.cause
    change = advice(report)
    if steps == 1 or learns_from(report) is None:
        return f"{change[0].upper()}{change[1:]}."
    bias, name = report.bias, "the trained network" if trained else report.name
    lengths = {"windowed_scan": shortest(bias, bias.windowed), "truncated_scan": shortest(bias, bias.truncated)}
    kept = [f"{K:,} steps with `{method}`" for method, K in lengths.items() if K is not None and steps > K]
    cut = (
        f"To save memory, the gradient of {name} may be cut, but at no less than {' or '.join(kept)}: it is then off by "
        "at most 10 %"
        if kept
        else f"Do not cut the gradient of {name} at less than all {steps:,} steps: it would be off by more than 10 %"
    )
    if cause in ("explosion", "cut"):
        return f"{change[0].upper()}{change[1:]}. {cut}."
    again = "train again and " if trained and cause != "steady" else ""
    return f"{cut}; to reach further back, {again}{change}."


def listed(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]])) if words else ""
