r"""The report as one self-contained HTML page: no network, readable on a phone and on paper, light and dark."""

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from jaxbptt.reports import charts, wording
from jaxbptt.reports.report import CellReport, Row
from jaxbptt.reports.summary import advice
from jaxbptt.reports.wording import CAPTIONS, Section, Table

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --line: #d0d0d0; --quiet: #555555; --link: #0b57a4; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --paper: #16181b; --line: #43484f; --quiet: #b0b4b9; --link: #8ab8ff; } }
* { box-sizing: border-box; }
body { color: var(--ink); background: var(--paper); font: 17px/1.55 system-ui, sans-serif; margin: 0 auto; padding: 1rem;
  max-width: 60rem; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; } h2 { font-size: 1.3rem; margin: 2.5rem 0 0.5rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 0.3rem; } p, li, dd, figcaption, caption { max-width: 44rem; }
a { color: var(--link); } a:focus-visible, summary:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
code { font-size: 0.9em; overflow-wrap: anywhere; } ul, ol { padding-left: 1.3rem; } li { margin: 0.25rem 0; }
.warning { font-weight: 600; } figcaption, caption, .quiet { color: var(--quiet); font-size: 0.92rem; }
figure { margin: 1.2rem 0; } dt { font-weight: 600; } dd { margin: 0 0 0.5rem; }
#summary { border-left: 0.25rem solid var(--link); padding-left: 1rem; } #summary h2 { margin-top: 1rem; }
nav ul { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: 0.2rem 1.2rem; }
summary { cursor: pointer; color: var(--link); padding: 0.3rem 0; }
details { border-bottom: 1px solid var(--line); margin: 0.5rem 0; }
table { border-collapse: collapse; min-width: min(100%, 22rem); margin: 0.8rem 0; font-size: 0.92rem; font-variant-numeric: tabular-nums; }
caption { text-align: left; padding-bottom: 0.3rem; }
th, td { padding: 0.3rem 0.6rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line); }
tr > :first-child { text-align: left; padding-left: 0; overflow-wrap: anywhere; } tbody th { font-weight: 400; }
@media (max-width: 36rem) {
  body { font-size: 16px; } table { font-size: 0.8rem; } th, td { padding: 0.25rem 0.3rem; }
  .stacked, .stacked tbody, .stacked tr, .stacked th, .stacked td, .stacked caption { display: block; width: 100%; }
  .stacked thead { display: none; } .stacked tr { border-bottom: 1px solid var(--line); padding: 0.3rem 0; }
  .stacked tbody > tr > * { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: 0.1rem 0; }
  .stacked tbody > tr > *::before { content: attr(data-head); color: var(--quiet); } }
@media print { body { font-size: 11pt; max-width: none; } nav { display: none; } h2, h3 { break-after: avoid; }
  figure, tr { break-inside: avoid; } details::details-content { content-visibility: visible; block-size: auto; }
  details > :not(summary) { display: block; } details > table { display: table; } }
"""


def render(
    facts: Mapping[str, str],
    reports: Sequence[CellReport],
    sections: Sequence[Section] = (),
    *,
    summary: Sequence[str],
    row: Row,
    trained: bool = False,
) -> str:
    """The page as a string.

    Args:
        facts: what was reported on, by name.
        reports: one for each network.
        sections: what is said beside the gradient.
        summary: the sentences that come first.
        row: what the networks read in the first row of the batch.
        trained: whether the networks are one, before and after training, and not untrained.
    """
    title = "How far back the gradient reaches" + (", before and after training" if trained else "")
    drawn = charts.charts(row, reports)
    figures = {name: charts.figure(chart, CAPTIONS[name]) for name, chart in drawn.items()}
    of_text = row.characters is not None
    parts = [
        f"<header><h1>{title}</h1>\n<p class='quiet'>{escape(row.name)}</p></header>",
        "<main>",
        "<section id='summary' aria-labelledby='in-short'><h2 id='in-short'>In short</h2>",
        *(f"<p>{_marked(sentence)}</p>" for sentence in summary),
        "</section>",
        _details("run", "What was run, and on what machine", _facts(facts)),
        _contents(of_text),
        *(_section(section, folded=not trained) for section in sections),
        _saliency(reports, of_text, figures),
        _flow(reports, trained, figures),
        _causes(reports, trained, figures),
        _lags(reports, figures),
        _truncation(reports, figures),
        _agreement(reports, figures),
        "</main>",
        charts.scripts(drawn.values()),
    ]
    body = "\n".join(parts)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<title>{title}: {escape(row.name)}</title><style>{_STYLE}{charts.STYLE}</style></head>\n<body>\n{body}\n</body></html>\n"
    )


def _contents(of_text: bool) -> str:
    links = {
        "sequence": "Over the text" if of_text else "Over the series",
        "back-in-time": "Back through time",
        "why": "Why",
        "distance": "By distance",
        "cut": "Cut at K",
        "methods": "Do the methods agree?",
    }
    items = "".join(f"<li><a href='#{id}'>{words}</a></li>" for id, words in links.items())
    return f"<nav aria-label='On this page'><ul>{items}</ul></nav>"


def _saliency(reports: Sequence[CellReport], of_text: bool, figures: Mapping[str, str]) -> str:
    what, one = ("text", "character") if of_text else ("series", "row")
    return _part(
        "sequence",
        f"The gradient over the {what} itself",
        f"<p>A loss at one step depends on what was read before it. How much it depends on a {one} is the size of its "
        f"gradient with respect to that input, ‖∂L/∂x‖. Shown is the first sequence of the batch.</p>",
        figures.get("saliency", ""),
        _list(wording.saliency_sentence(report) for report in reports if report.saliency is not None),
    )


def _flow(reports: Sequence[CellReport], trained: bool, figures: Mapping[str, str]) -> str:
    networks = "the network before training and after it" if trained else "untrained networks"
    which = "How far it reaches" if len(reports) == 1 else "Which of these networks reaches furthest"
    return _part(
        "back-in-time",
        "The gradient on its way back",
        "<p>Backpropagation through time starts at the loss of the last step and takes its gradient from each state to the "
        f"one before it. Here is its size at each state, ‖∂L/∂h‖, in {networks}. Steps where it is below 1 % of its largest "
        "size hardly count in the gradient of the weights.</p>",
        figures.get("flow", ""),
        _list(map(wording.reach_sentence, reports), id="reach"),
        ""
        if trained
        else f"<p>{which} "
        "is decided by how the weights start, see <a href='#start'>below</a>; training changes it.</p>",
    )


def _causes(reports: Sequence[CellReport], trained: bool, figures: Mapping[str, str]) -> str:
    starts = [sentence for sentence in map(wording.start_sentence, reports) if sentence]
    exact = _table(
        wording.rates_table(reports), "Change of the gradient in a step back, as a mean over the first sequence."
    )
    slopes = "".join(
        _table(wording.slopes_table(report), "In the order of the step; 1 is unsaturated, 0 is flat.")
        for report in reports
        if report.diagnosis.slopes
    )
    rates = any(report.bound_rate is not None for report in reports)
    bound = " For an Elman network none can exceed σ<sup>lag</sup>, with σ the largest singular value of W_hh." * rates
    singular = (
        f"<p>Going back several steps multiplies the gradient by a product of Jacobians, one for each step. Its singular values "
        f"say by how much a gradient can shrink or grow at that lag, in the best and the worst direction.{bound}</p>"
    )
    return _part(
        "why",
        "Why it shrinks or grows",
        "<p>Each step back multiplies the gradient by some factor. Its logarithm is the sum of three parts, so they can be "
        "compared. The unit is the <dfn>nat</dfn>: −0.1 nats a step is a factor of exp(−0.1), about 0.9, in each step.</p>",
        "<dl><dt>Weights</dt><dd>What the weights and gates would do if no tanh and no gate were saturated.</dd>"
        "<dt>Saturation</dt><dd>What is lost because a tanh or a gate near its limit is flat: its slope is a factor below 1. "
        "</dd><dt>Alignment</dt><dd>What is lost or won because the gradient points in another direction than the one "
        "that the network keeps best.</dd></dl>",
        figures.get("causes", ""),
        _list(map(wording.cause_sentence, reports)),
        _details("rates", "The numbers, in nats a step", exact + slopes),
        ("<h3>How the weights start</h3>" + _list(starts, id="start")) if starts else "<span id='start'></span>",
        "<h3>To reach further back</h3>",
        _list((f"{report.name}: {advice(report)}." for report in (reports[-1:] if trained else reports)), id="change"),
        f"<h3>What the Jacobians let through</h3>{singular}{figures['singular-values']}"
        if "singular-values" in figures
        else "",
    )


def _lags(reports: Sequence[CellReport], figures: Mapping[str, str]) -> str:
    sentences = [sentence for sentence in map(wording.horizon_sentence, reports) if sentence]
    left_out = [f"{report.name}: left out: {words}." for report in reports for words in report.left_out]
    return _part(
        "distance",
        "From what distance the gradient comes",
        "<p>The gradient of the mean loss over all steps and sequences is a sum over lags: a lag is the number of steps from "
        "a loss back to the step where a weight was used. The part of lag l is G<sup>(l)</sup>, and its norm is its size.</p>"
        * bool(sentences),
        figures.get("lags", ""),
        _list(sentences),
        _list(left_out),
    )


def _truncation(reports: Sequence[CellReport], figures: Mapping[str, str]) -> str:
    note = "The shortest K, of powers of two, from which on the error is at most 10 %. All: only the whole sequence is enough."
    folded = "".join(
        _table(
            wording.bias_table(reports, method), f"{method}_scan: the error, and in brackets the cosine of the angle."
        )
        for method in ("windowed", "truncated")
    )
    return _part(
        "cut",
        "What is lost when the gradient is cut at K",
        "<p>Long sequences are often cut, to save memory. <code>truncated_scan</code> cuts them into pieces of K steps that "
        "no gradient crosses. With <code>windowed_scan</code> each loss reaches back exactly K steps. With the exact gradient "
        "g and the cut one g<sub>K</sub>, the error is ‖g<sub>K</sub> − g‖ / ‖g‖.</p>",
        figures.get("truncation", ""),
        _table(wording.lengths_table(reports), note),
        _details("errors", "The errors at each K", folded),
    )


def _agreement(reports: Sequence[CellReport], figures: Mapping[str, str]) -> str:
    costs = "".join(
        _table(table, f"{name}, in {table.head[0]}.") for name, table in wording.cost_tables(reports).items()
    )
    return _part(
        "methods",
        "Do the methods agree?",
        f"<p>{escape(wording.agreement_sentence(reports))}</p>",
        _table(
            wording.agreement_table(reports),
            "The largest error of each method against jax.grad through lax.scan, which is scan, relative to the largest "
            "entry of the gradient of the same weights.",
        ),
        figures.get("agreement", ""),
        _details(
            "costs",
            "What each method costs",
            "<p>Times are medians of compiled runs; memory is what the compiler reports beyond arguments and results; "
            f"operations are counted in the traced program, each loop as often as it runs.</p>{costs}",
        ),
    )


def _section(section: Section, *, folded: bool) -> str:
    body = "\n".join(
        [
            *(f"<p>{escape(sentence)}</p>" for sentence in section.sentences),
            _table(section.table, ""),
            *(f"<p class='warning'>{escape(warning)}</p>" for warning in section.warnings),
        ]
    )
    id = re.sub(r"\W+", "-", section.title.lower())
    return _details(id, section.title, body) if folded else _part(id, section.title, body)


def _part(id: str, title: str, *parts: str) -> str:
    return "\n".join([f"<section id='{id}'>", f"<h2>{escape(title)}</h2>", *filter(None, parts), "</section>"])


def _details(id: str, title: str, body: str) -> str:
    return f"<details id='{id}'><summary>{escape(title)}</summary>\n{body}\n</details>"


def _facts(facts: Mapping[str, str]) -> str:
    return "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items()) + "</dl>"


def _list(sentences: Iterable[str], id: str = "") -> str:
    items = "".join(f"<li>{_marked(sentence)}</li>" for sentence in sentences)
    return f"<ul{f' id={id!r}' if id else ''}>{items}</ul>" if items else ""


def _marked(sentence: str) -> str:
    """A sentence with what stands between backticks as code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(sentence))


def _table(table: Table, caption: str) -> str:
    """On a phone, a table of many columns has a line for each cell."""
    many = len(table.head) > 4
    roles = [" role='table'", " role='row'", " role='rowheader'", " role='cell'"] if many else ["", "", "", ""]
    top = "".join(f"<th scope='col'>{escape(cell)}</th>" for cell in table.head)
    rows = []
    for first, *rest in table.rows:
        heads = [f" data-head='{escape(head)}'" if many else "" for head in table.head]
        cells = (f"<td{roles[3]}{head}>{escape(cell)}</td>" for head, cell in zip(heads[1:], rest, strict=True))
        rows.append(f"<tr{roles[1]}><th scope='row'{roles[2]}{heads[0]}>{escape(first)}</th>{''.join(cells)}</tr>")
    return (
        f"<table{' class=stacked' if many else ''}{roles[0]}>{f'<caption>{escape(caption)}</caption>' if caption else ''}"
        f"<thead><tr>{top}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    )
