r"""The report as one self-contained HTML page: inline SVG, no network, readable on a phone, light and dark."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

import matplotlib

from jaxbptt import plots
from jaxbptt.reports.report import CellReport
from jaxbptt.reports.wording import (
    Section,
    Table,
    bias_table,
    certificate_table,
    diagnosis_sentence,
    horizon_sentence,
    reach_sentence,
)

_TITLE = "The gradient through time, by every method"
_TITLE_TRAINED = "The gradient through time, before and after training"

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --line: #d5d5d5; --quiet: #5c5c5c; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #16181b; --line: #3a3e44; --quiet: #a5a9ae; } }
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; padding: 1rem;
  max-width: 62rem; }
h1 { font-size: 1.5rem; margin: 0.5rem 0; } h2 { font-size: 1.15rem; margin: 2rem 0 0.5rem; } h3 { font-size: 1rem; }
p, li { max-width: 46rem; } .warning { font-weight: 600; } .quiet { color: var(--quiet); font-size: 0.9rem; }
figure { margin: 1rem 0; overflow-x: auto; } figure svg { width: 100%; height: auto; min-width: 34rem; }
svg text { fill: var(--ink); }
.table { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
"""


def render(
    facts: Mapping[str, str], reports: Sequence[CellReport], sections: Sequence[Section] = (), *, trained: bool = False
) -> str:
    """The page as a string.

    Args:
        facts: what was reported on, by name.
        reports: one for each network.
        sections: what is said first.
        trained: whether the networks are one, before and after training, and not untrained.
    """
    title = _TITLE_TRAINED if trained else _TITLE
    # What there is to say of a checkpoint takes a line each.
    separator = "<br>" if trained else " · "
    where = (
        "before training and after it, on the same sequences, each from a state of zeros"
        if trained
        else "in an untrained network"
    )
    flows = {report.name: report.flow for report in reports}
    values = {report.name: report.singular_values for report in reports if report.singular_values is not None}
    rates = {report.name: report.bound_rate for report in reports if report.bound_rate is not None}
    bound = (
        " For an Elman network none can exceed (γσ)^lag, with γ = 1 for tanh and σ the largest singular value of W_hh."
        if rates
        else ""
    )
    parts = [
        f"<h1>{title}</h1>",
        "<p class='quiet'>" + separator.join(f"{escape(key)} {escape(value)}" for key, value in facts.items()) + "</p>",
        *map(_section, sections),
        "<h2>How far back the gradient reaches, and why</h2>",
        _list(map(reach_sentence, reports)),
        f"<p>The gradient of the last step's loss with respect to each earlier state, {where}. What is below "
        "1 % of its largest norm hardly counts in the gradient of the weights, which sums over all steps; what is below "
        "the rounding error does not count at all.</p>",
        _inline(plots.plot_gradient_flow(flows), "Gradient magnitude against time step"),
        "<p>Why, on the first sequence of the batch: the rate at which the gradient changes per step is the sum of three "
        "parts. <em>Weights</em>: the rate if every tanh and σ had its steepest slope. <em>Saturation</em>: what flatter "
        "slopes take away. <em>Alignment</em>: the rest, from misalignment with the leading Lyapunov direction.</p>",
        _list(map(diagnosis_sentence, reports)),
        *_lags(reports),
        "<h2>Do the methods agree?</h2>",
        "<p>The gradient of the mean loss over all steps by every exact method, against <code>jax.grad</code> through "
        "<code>lax.scan</code>: with respect to the cell's weights, the first state and the inputs for the scans, and to "
        "the weights alone for the other methods. The error is the largest over all leaves, each relative to its own "
        "largest entry. Memory is what the compiler reports beyond arguments and results; operations are counted in the "
        "traced program, each loop as often as it runs; times are medians of compiled runs.</p>",
    ]
    for report in reports:
        certificate = report.certificate
        parts += [
            f"<h3>{escape(report.name)}</h3>",
            _html(certificate_table(certificate)),
            f"<p class='quiet'>{certificate.dtype}: agrees up to {certificate.tolerance:.0e}.</p>",
            *(f"<p class='quiet'>Left out: {escape(words)}.</p>" for words in report.left_out),
            _inline(plots.plot_certificate(certificate), f"Certificate of {report.name}"),
        ]
    parts += [
        "<h2>What truncation leaves out</h2>",
        "<p>The same gradient with paths cut: <code>truncated_scan</code> cuts every K steps, "
        "<code>windowed_scan</code> lets every loss reach back exactly K steps. The error is the norm of the difference "
        "from the exact gradient of all weights, relative to the norm of the exact one; the cosine is that of the angle "
        "between the two.</p>",
        _inline(plots.plot_truncation_bias({report.name: report.bias for report in reports}), "Bias against K"),
        *(f"<h3>{escape(report.name)}</h3>{_html(bias_table(report.bias))}" for report in reports),
    ]
    if values:
        parts += [
            "<h2>Products of Jacobians</h2>",
            "<p>Each step back multiplies the gradient by the transposed state Jacobian. Where all singular values of the "
            f"product decay, the gradient vanishes whatever the loss is; where one grows, it can explode.{bound}</p>",
            _inline(plots.plot_singular_values(values, bound_rate=rates), "Singular values against lag"),
        ]
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{_STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _section(section: Section) -> str:
    return "\n".join(
        [
            f"<h2>{escape(section.title)}</h2>",
            *(f"<p>{escape(sentence)}</p>" for sentence in section.sentences),
            _html(section.table),
            *(f"<p class='warning'>{escape(warning)}</p>" for warning in section.warnings),
        ]
    )


def _list(sentences: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "</ul>"


def _lags(reports: Sequence[CellReport]) -> list[str]:
    lags = {report.name: report.lags for report in reports if report.lags is not None}
    if not lags:
        return []
    return [
        "<p>The gradient of the mean loss over all steps, split by lag: what the paths of each length, from a loss back to "
        "a use of the weights, contribute to it.</p>",
        _list(sentence for sentence in map(horizon_sentence, reports) if sentence),
        _inline(plots.plot_lag_contributions(lags), "Contributions to the gradient by lag"),
    ]


def _html(table: Table) -> str:
    top = "".join(f"<th>{escape(cell)}</th>" for cell in table.head)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in table.rows)
    return f"<div class='table'><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>"


def _inline(figure: plots.Drawing, description: str) -> str:
    """A figure as SVG inside the page, its ink the page's: black in light mode, white in dark."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": description}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("#000000", "currentColor")
    # Two figures on one page must not share the ids of their clip paths and markers.
    prefix = re.sub(r"\W+", "-", description)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    svg = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(description)}" ', 1)
    return f"<figure>{svg}</figure>"
