"""The report runs on real input, says what is so, and leaves nothing half written."""

import argparse
import re
import subprocess
import sys
from collections import namedtuple
from functools import partial
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from report_questions import QUESTIONS
from rich.console import Console

import jaxbptt as bptt
from jaxbptt import losses, models, tasks, words
from jaxbptt.__main__ import main
from jaxbptt.commands import arguments, sequences, sources
from jaxbptt.commands import report as command
from jaxbptt.commands.display import table
from jaxbptt.reports import charts, page, report, summary, trained, wording

Named = namedtuple("Named", "name")
SMALL = ["--hidden", "6", "--steps", "12", "--batch", "2"]


class Page(HTMLParser):
    """What a browser would ask the network for, whether every id is there once, and the words at each id."""

    VOID = frozenset({"meta", "br", "input", "link", "img", "hr"})

    def __init__(self, text):
        super().__init__()
        self.outside, self.ids, self.references, self.headings = [], [], [], []
        self._open, self.words = [], {}
        self.feed(text)

    def handle_data(self, data):
        for _, id in self._open:
            if id:
                self.words[id] += data

    def handle_endtag(self, tag):
        if tag not in ("code", "sup", "sub", "dfn", "a"):
            self.handle_data(" ")
        if tag in (name for name, _ in self._open):
            while self._open.pop()[0] != tag:
                pass

    def handle_starttag(self, tag, attributes):
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in self.VOID:
            id = dict(attributes).get("id")
            self._open.append((tag, id))
            self.words.setdefault(id, "")
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "action"):
                (self.references if value.startswith("#") else self.outside).append(value.removeprefix("#"))


@pytest.mark.slow
def test_report_on_a_text(whole_report):
    printed = whole_report.printed
    html = (whole_report.folder / "text.html").read_text(encoding="utf-8")
    assert "Three untrained networks of 6 units (elman, gru, lstm) read 2 sequences of 24 characters" in printed
    assert "On this sequence the gradient reaches furthest back in" in printed
    for cell in ("elman", "gru", "lstm"):
        assert re.search(rf"<li>{cell}: the gradient (falls below|reaches all|grows)", html)
        assert f"<li>{cell}: all but 1 % of the gradient comes from within" in html
        assert f"<th scope='col'>{cell}</th>" in html
        assert re.search(rf"^{cell} .* yes$", printed, re.MULTILINE)
    for method in (
        "scan",
        "adjoint_scan",
        "adjoint_scan (derived)",
        "Jacobian products",
        "textbook loop",
        "checkpointed_scan",
    ):
        assert html.count(f"<tr><th scope='row'>{method}</th>") == 4, "its error, time, memory and operations"
    assert "NO" not in printed
    assert "All 7 methods agree in all networks" in html
    assert html.count("<tr><th scope='row'>1</th>") == 2, "the errors of both methods for K = 1"
    parsed = Page(html)
    assert parsed.outside == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert set(parsed.references) <= set(parsed.ids)
    assert "url(http" not in html
    assert "prefers-color-scheme: dark" in html
    assert "width=device-width" in html
    assert all(b <= a + 1 for a, b in zip([0, *parsed.headings], parsed.headings, strict=False)), "headings in order"
    for question, (place, answer) in QUESTIONS.items():
        assert re.search(answer, " ".join(parsed.words[place].split())), f"{question} {parsed.words[place]}"


@pytest.mark.slow
def test_report_on_a_file_as_a_process(tmp_path):
    """As a user runs it: the exit code, the file, and nothing on standard error."""
    wave = np.sin(np.arange(40)[:, None] * [0.3, 0.5])
    np.savetxt(tmp_path / "data.csv", wave, delimiter=",", header="a,b", comments="")
    options = ["--csv", "data.csv", "--cell", "elman", "--float64", "--seed", "3", "--output", "r.html"]
    run = subprocess.run(
        [sys.executable, "-m", "jaxbptt", "report", *SMALL, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    assert "An untrained network of 6 units (elman) read 2 sequences of 12 rows from data.csv" in run.stdout
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "data.csv" in html
    assert "<dt>numbers</dt><dd>float64</dd>" in html
    assert "textbook loop" not in html


def what_is_read(options, monkeypatch, output):
    """The cell and task of the network that would be measured, the row that is shown, and what the page says of the data."""
    seen, rows = [], []
    monkeypatch.setattr(report, "untrained", lambda name, task, **_: seen.append((name, task)) or Named(name))
    monkeypatch.setattr(report, "stages", lambda entry: [])
    monkeypatch.setattr(report, "report_cells", lambda entries, progress: [])
    monkeypatch.setattr(summary, "summary", lambda measured, reports, **_: (measured,))
    monkeypatch.setattr(page, "render", lambda facts, reports, sections, row, **_: rows.append(row) or facts["data"])
    assert main(["report", *options, *SMALL, "--cell", "gru", "--output", str(output)]) == 0
    ((name, task),), (row,) = seen, rows
    return name, task, row, output.read_text()


@pytest.mark.parametrize(
    ("kind", "features", "words"),
    [
        ("npz", 2, "40 steps of 2 columns"),
        ("npy", 2, "40 steps of 2 columns"),
        ("csv", 1, "40 steps of 1 column"),
        ("text", 27, "43 steps of 27 characters"),
    ],
)
def test_what_is_read_is_what_is_reported(tmp_path, monkeypatch, kind, features, words):
    path = tmp_path / f"data.{kind}"
    wave = np.sin(np.arange(40)[:, None] * [0.3, 0.5])
    if kind == "npz":
        np.savez(path, xs=wave)
    elif kind == "npy":
        np.save(path, wave)
    elif kind == "csv":
        np.savetxt(path, wave[:, 0])
    else:
        path.write_text("the quick brown fox jumps over the lazy dog")
    option = "--npz" if kind == "npy" else f"--{kind}"
    name, task, row, data = what_is_read([option, str(path)], monkeypatch, tmp_path / "r.html")
    if kind == "text":
        assert "".join(row.characters) == "the quick br"
    else:
        assert row.characters is None
        assert len(row.columns) == features
        np.testing.assert_allclose(row.values, wave[:12, :features], atol=1e-12)
    assert name == "gru"
    assert task.xs.shape == (12, 2, features)
    assert data == f"data.{kind}, {words}"


def test_without_a_file_it_reads_the_standard_library(tmp_path, monkeypatch):
    series = tasks.read_standard_library()
    _, task, row, data = what_is_read([], monkeypatch, tmp_path / "r.html")
    np.testing.assert_array_equal(task.xs[:, 0].argmax(axis=-1), series.values[:12])
    assert "".join(row.characters) == "# Copyright "
    assert data == f"{series.name}, {len(series.values):,} steps of {series.features} characters"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--text", "nowhere.txt"], r"jaxbptt report: nowhere\.txt can't be read: No such file or directory\."),
        (["--text", "empty.txt"], r"jaxbptt report: empty\.txt is empty\."),
        (["--text", "short.txt"], r"jaxbptt report: short\.txt has 5 time steps, but steps=12 needs 13"),
        (["--csv", "short.txt"], r"jaxbptt report: short\.txt has no rows of numbers"),
        (
            ["--output", "nowhere/r.html"],
            r"jaxbptt report: --output nowhere/r\.html can't be written: there is no folder",
        ),
        (["--output", "."], r"jaxbptt report: --output \. is a folder or a device, not a file"),
        (["--output", "/dev/null"], r"jaxbptt report: --output /dev/null is a folder or a device, not a file"),
        (["--steps", "0"], r"jaxbptt report: argument --steps: 0 is too small: at least 1 is needed"),
        (["--hidden", "-3"], r"jaxbptt report: argument --hidden: -3 is too small: at least 1 is needed"),
        (["--batch", "two"], r"jaxbptt report: argument --batch: 'two' is not a whole number"),
        (["--cell", "rnn"], r"jaxbptt report: argument --cell: invalid choice: 'rnn'"),
        (["--text", "short.txt", "--delimiter", ";"], r"jaxbptt report: --delimiter says how a CSV file is read"),
        (
            ["--which", "last"],
            r"jaxbptt report: --which chooses among checkpoints, but there is none: name their folder",
        ),
        (["--checkpoint", "."], r"jaxbptt report: --hidden is that of the checkpoint: leave it out, or leave out"),
        (["--text", "a", "--csv", "b"], r"jaxbptt report: argument --csv: not allowed with argument --text"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").touch()
    (tmp_path / "short.txt").write_text("abcde")
    before = sorted(tmp_path.iterdir())
    try:
        code = main(["report", *SMALL, *arguments])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert re.match(message, error), error
    assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_without_the_report_extra(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert main(["report", *SMALL, "--output", str(tmp_path / "r.html")]) == 2
    assert f"is not installed: {words.install_command('report')}\n" in capsys.readouterr().err


def test_a_failed_write_is_one_line(monkeypatch, tmp_path, capsys):
    def fail(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(report, "report_cells", lambda *_: [])
    monkeypatch.setattr(summary, "summary", lambda *_, **__: ())
    monkeypatch.setattr(page, "render", lambda *_, **__: "")
    monkeypatch.setattr(arguments, "write_whole", fail)
    assert main(["report", *SMALL, "--cell", "gru", "--output", str(tmp_path / "r.html")]) == 2
    assert "can't be written: Permission denied." in capsys.readouterr().err


@pytest.mark.slow
def test_one_repeated_character(tmp_path):
    """Nothing to predict: every gradient is 0, every error too, and the report says so instead of failing."""
    path = tmp_path / "a.txt"
    path.write_text("a" * 100)
    output = tmp_path / "r.html"
    assert main(["report", *SMALL, "--cell", "elman", "--text", str(path), "--output", str(output)]) == 0
    html = output.read_text()
    assert "no gradient reaches any state" in html
    assert html.count("elman: No gradient passes from step to step") == 2, "in the summary and among the causes"
    assert "elman: no horizon: the gradient of the mean loss is 0 or not finite" in html
    assert "<p>Choose a sequence whose next step depends on earlier ones" in html


def made(name="lstm", *, norms=None, cause="weights", rate=-0.1, horizon=12, errors=(0.5, 0.05), rows=(), **fields):
    """A report with made-up numbers; `errors` of the windowed method are those of K = 1, 2, 4, ..."""
    norms = np.asarray(np.geomspace(1e-3, 1, 32) if norms is None else norms, np.float32)
    nan, A = float("nan"), bptt.analysis
    slopes = {"logistic 1": 0.9, "tanh 3": 0.25}
    diagnosis = A.GradientDiagnosis(
        "In full.",
        cause,
        A.GradientRates(rate, rate, 0.0, 0.0),
        np.zeros(1),
        np.zeros(1),
        slopes,
        None,
        1.0,
        None,
        None,
    )
    errors = np.asarray(errors, float)
    curve = A.BiasCurve(errors, 1 - errors / 2)
    bias = A.TruncationBias(2 ** np.arange(len(errors)), curve, A.BiasCurve(2 * errors, 1 - errors))
    lags = None if horizon is None else A.LagContributions(None, None, np.ones(len(norms)), None, None)
    return report.CellReport(
        name,
        A.Certificate(tuple(rows), 1e-5, "float32"),
        bias,
        A.GradientFlow(nan, None, None, norms, None, None, None, None, None),
        diagnosis,
        lags=lags,
        horizon=horizon,
        **{"kind": name.split(",")[0]} | fields,
    )


def sentence(norms):
    return wording.reach_sentence(made("elman", norms=norms))


def test_reach():
    flow = made(norms=2.0 ** np.arange(-40, 1)).flow
    assert summary.reach(flow, 0.01) == 6
    assert summary.reach(flow, 2.0**-23) == 23
    assert summary.reach(made(norms=np.zeros(3)).flow, 0.1) is None
    assert summary.reach(made(norms=[5.0, 1.0]).flow, 1.0) == 1


def test_reach_in_words():
    assert sentence(2.0 ** np.arange(-40, 1)) == (
        "elman: the gradient falls below 1 % of its largest size 7 steps back, and below the rounding error of float32 24 "
        "steps back."
    )
    assert sentence([0.5, 0.5, 1.0]) == (
        "elman: the gradient reaches all 3 steps; 50 % of its largest size are left at the first."
    )
    assert sentence([1e-4, 1.0]).endswith("largest size 1 step back; 0.01 % are left at the first step, 1 step back.")
    assert "no gradient reaches any state" in sentence(np.zeros(4))
    assert "is not finite in 2 of 4 steps" in sentence([1, np.nan, np.inf, 1])
    assert "largest size 1 step back, and below the rounding error of float32 1 step back." in sentence([1e-30, 1.0])
    assert "is not finite in 1 of 1 step." in sentence([np.nan])
    assert sentence([1.0]) == "elman: a single step, with none before it."
    assert (
        sentence([1.0, 4e4, 1.0]) == "elman: the gradient grows: 1 step back it is 4e+04 times as large as at the end."
    )
    assert sentence([1.0, 1.0, 0.0]) == "elman: the gradient is 0 at the last step and largest 2 steps before it."


def test_tables_in_words():
    """Units are what the heads say, and networks stand beside each other."""
    row = bptt.analysis.CertificateRow("mine", False, 0.0, {}, 0.25, 3 * 2**20 + 512, 1_500_000.0, 0.0, 0.0012345, 1.0)
    other = row._replace(name="other", agrees=True, largest_error=1e-7, flops=float("nan"))
    reports = made("gru", rows=[other]), made(rows=[row, other], errors=(0.123456, 0.0))
    table = wording.agreement_table(reports)
    assert table.head == ("method", "gru", "lstm")
    assert table.rows == (("mine", "–", "2.5e-01, differs"), ("other", "1.0e-07", "1.0e-07"))
    assert "mine of lstm differ from" in wording.agreement_sentence(reports)
    tables = wording.cost_tables(reports)
    assert [table.head[0] for table in tables.values()] == ["milliseconds", "KiB", "millions"]
    assert [table.rows[0][2] for table in tables.values()] == ["1.23", "3,072", "1.5"]
    assert tables["Operations"].rows[1][2] == "–"
    assert wording.bias_table(reports, "windowed").rows == (
        ("1", "0.5 (0.750)", "0.12 (0.938)"),
        ("2", "0.05 (0.975)", "0 (1.000)"),
    )
    assert wording.lengths_table(reports).rows == (("gru", "2", "2"), ("lstm", "2", "2"))
    assert wording.lengths_table([made(errors=(0.01, 0.2))]).rows == (("lstm", "all 32", "all 32"),)
    assert wording.lengths_table([made(errors=(0.01, np.nan, 0.08))]).rows == (("lstm", "4", "all 32"),)
    assert wording.lengths_table([made(errors=(0.5, 0.05, 0.2, 0.04))]).rows == (("lstm", "8", "8"),)
    assert wording.overview_table([made(rows=[row])]).rows == (
        ("lstm", "12 of 32", "vanishes: weights", "2", "2", "NO"),
    )


SUMMARIES = {
    "several": (
        [made("elman", horizon=9), made("gru", horizon=4), made()],
        "On this sequence the gradient reaches furthest back in lstm: all but 1 % of it comes from within 12 steps of each "
        "loss, against 9 in elman and 4 in gru.",
        "To save memory, the gradient of lstm may be cut, but at no less than 2 steps with `windowed_scan` or 2 steps with "
        "`truncated_scan`: it is then off by at most 10 %; to reach further back, start with `lstm(..., chrono_length=32)`",
    ),
    "equally far": ([made(), made("gru")], "furthest back in lstm and gru: all but 1 %", "the gradient of lstm may"),
    "one": (
        [made("elman", cause="saturation")],
        "On this sequence all but 1 % of the gradient of the elman network comes from within 12 steps of each loss.",
        "start with a smaller `input_init`",
    ),
    "the whole sequence": (
        [made(horizon=32, cause="steady", errors=(0.5, 0.4))],
        "the gradient of the lstm network reaches back over all 32 steps.",
        "Do not cut the gradient of lstm at less than all 32 steps: it would be off by more than 10 %; to reach further back, "
        "read longer sequences",
    ),
    "no lags": (
        [made(horizon=None)],
        "of the lstm network comes from within 21 steps of the last loss.",
        "than 2 steps with",
    ),
    "explosion": ([made(cause="explosion")], "lstm: the gradient explodes on its way back.", "Clip the norm of"),
    "a nan": ([made(cause="forward"), made("gru")], "in gru: all but 1 %.* lstm: In full.", "the gradient of gru may"),
    "only nans": ([made(cause="backward")], "^lstm: In full.$", "Find where the backward pass divides by 0"),
    "nans in the lags": ([made(horizon=0)], "lstm: the gradient is 0 or not finite", "Start with"),
    "no gradient": ([made(cause="no gradient", horizon=0)], "^lstm: In full.$", "Choose a sequence whose next step"),
    "one step": (
        [made(norms=[1.0], cause="steady", horizon=1)],
        "^There is a single step, so there is nothing before it that could be learned from.$",
        "^Read more than one step",
    ),
    "cut": ([made("elman", cause="cut")], "elman: In full.", "^Look at the step that passes no gradient back"),
}


@pytest.mark.parametrize("case", SUMMARIES)
def test_the_summary_says_what_is_so(case):
    reports, second, third = SUMMARIES[case]
    sentences = summary.summary("Measured.", reports)
    assert sentences[0] == "Measured."
    for pattern, found in ((second, sentences[1]), (third, sentences[2])):
        pattern = pattern if pattern.startswith("^") or ".*" in pattern else re.escape(pattern)
        assert re.search(pattern, found), found
        assert found.endswith(".")
        assert "nan" not in found


def test_the_summary_of_training():
    before, after = made("gru, untrained", horizon=4, loss=2.0), made("gru, trained", loss=0.5, trained=True)
    _, learnt, to_do = summary.summary("Measured.", [before, after], trained=True, easy=("persistence", 0.75))
    assert learnt == (
        "Training took the mean loss down, from 2 to 0.5 (persistence: 0.75); all but 1 % of the gradient came from "
        "within 4 steps of each loss before training, and comes from within 12 after it."
    )
    assert to_do.startswith(
        "To save memory, the gradient of the trained network may be cut, but at no less than 2 steps"
    )
    assert "to reach further back, train again and start with `gru(..., chrono_length=32)`" in to_do
    worse = summary.summary("", [before, after._replace(loss=3.0, horizon=0)], trained=True)[1]
    assert worse == "Training took the mean loss up, from 2 to 3. gru, trained: the gradient is 0 or not finite."


def test_causes_in_words():
    assert wording.cause_sentence(made()) == (
        "lstm: the gradient vanishes, mainly because of its weights and gates, which let through less than they receive; a "
        "step back multiplies it by 0.905 on average."
    )
    assert "because of saturation: the flattest tanh has 25 % of its steepest slope" in wording.cause_sentence(
        made(cause="saturation")
    )
    assert wording.cause_sentence(made(cause="explosion", rate=np.log(2))).endswith(
        "explodes; a step back multiplies it by 2 on average."
    )
    assert wording.cause_sentence(made(cause="steady", rate=np.nan)) == "lstm: In full."
    assert "a unit keeps about 73 % of its state" in wording.start_sentence(made(kept=1 / (1 + np.exp(-1))))
    assert "starts at 1 (`update_bias`)" in wording.start_sentence(made("gru", kept=1 / (1 + np.exp(-1))))
    assert "W_hh starts as an orthogonal matrix" in wording.start_sentence(made("elman", bound_rate=1.0))
    assert wording.start_sentence(made("elman", bound_rate=1.0, trained=True)) is None
    half = report.Saliency(np.array([31]), np.array([[0.0, 1.0, 1.0, 1.0, 1.0]]))
    assert "is on the last 2 steps, 99 % on the last 4." in wording.saliency_sentence(made(saliency=half))
    none = half._replace(values=np.zeros((1, 5)))
    assert "depends on nothing that was read" in wording.saliency_sentence(made(saliency=none))


def test_the_page_is_escaped(monkeypatch):
    """All words; the charts have tests of their own."""
    monkeypatch.setattr(charts, "charts", lambda row, reports: {})
    tags = "<script>alert(1)</script>"
    rows = [bptt.analysis.CertificateRow(tags, True, 0.0, {}, 0.0, 1, 1.0, 1.0, 1.0, 1.0)]
    section = wording.Section(tags, (tags,), wording.Table((tags,) * 5, ((tags,) * 5,)), (tags,))
    row = report.Row(f"{tags}'\"", None, (tags,), np.zeros((32, 1)))
    for is_trained in (False, True):
        html = page.render(
            {tags: tags},
            [made(f"lstm, {tags}", rows=rows)],
            [section],
            summary=(tags,) * 3,
            row=row,
            trained=is_trained,
        )
        assert "<script" not in html
        assert html.count("&lt;script&gt;") > 20


@pytest.mark.slow
def test_what_does_not_fit_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(report, "MAX_DENSE_BYTES", 0)
    task = tasks.next_step(tasks.read_standard_library(), steps=5, batch=1)
    entry = report.untrained("gru", task, hidden=3, seed=0, dtype=jnp.float32)
    seen = []
    (result,) = report.report_cells([entry], lambda words, done: seen.append((words, done)))
    assert result.flow.norms.dtype == jnp.float32
    assert result.singular_values is result.lags is wording.horizon_sentence(result) is None
    assert "Jacobian products" not in [row.name for row in result.certificate.rows]
    assert "GiB of dense matrices" in result.left_out[0]
    assert sum(done for _, done in seen) == len(report.stages(entry))
    assert seen[-1] == ("gru: certificate", 1), "it measures times, so it runs alone and last"
    assert {words for words, _ in seen} >= {"gru: certificate", "gru: adjoint_scan", "gru: truncation"}
    row = report.Row("text", tuple("abcde"))
    assert "gru: left out: Jacobian products" in page.render({}, [result], summary=("",) * 3, row=row)


@pytest.mark.parametrize("name", ["report", "train"])
def test_help_names_the_defaults_that_there_are(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert "(default: 0)" in " ".join(printed.split())
    assert not re.search(r"default:\s+(None|False)", printed)


def test_markup_in_a_name_is_no_markup(capsys):
    Console(width=80).print(table("[/red]", ("[bold]", "[/x]"), [("[/b] a", "[red]1[/red]")]))
    printed = capsys.readouterr().out
    assert all(words in printed for words in ("[/red]", "[bold]", "[/x]", "[/b] a", "[red]1[/red]"))


def test_scores_in_words():
    reports = [
        report.CellReport(name, None, None, None, None, loss=loss) for name, loss in (("a", 0.51234), ("b", 0.25))
    ]
    section = wording.losses_section(reports, ("persistence", 0.3), "nats")
    assert section.table.rows == (("a", "0.5123"), ("b", "0.25"), ("persistence", "0.3"))
    assert section.sentences[0].startswith(
        "The mean loss on the sequences of this report, in nats; smaller is better. A nat is"
    )
    values, observed = np.array([[0.0, 5.0], [3.0, 5.0], [100.0, 5.0], [104.0, 5.0]]), np.ones((4, 2), bool)
    observed[2, 0] = False
    section = wording.persistence_section(("x", "constant"), values, observed)
    assert section.table.rows == (("x", "3", "0.0597"), ("constant", "0", "0"))


def model_of(kind, path, *, cell="gru", layers=1, fingerprint=None, validation=0.25, **architecture):
    """A model with other weights than those of its seed, and settings as training saves them."""
    vocabulary = columns = None
    if kind == "text":
        vocabulary = tasks.Vocabulary((97, 98, 177, 195, 200))
        described = models.Architecture(cell, 6, layers, 5, 5, text=True, **architecture)
    else:
        columns = models.Columns(("a", "b", "c"), np.array([0.1, 0.2, 0.3]), np.array([1.0, 0.5, 2.0]), (2, 0))
        described = models.Architecture(cell, 6, layers, 3, 2, text=False, targets=(2, 0), change=(0.1, 0.2))
    network = models.build(described)
    data = {"kind": kind, "path": str(path), "fingerprint": fingerprint or sources.fingerprint(path), "reading": {}}
    settings = {"architecture": described._asdict(), "data": data, "training": {"seed": 7, "validation": validation}}
    params = network.init(jax.random.key(1))
    return models.Model(network, params, network.cell.initial_carry(), vocabulary, columns, settings, {}, 3)


def options(**given):
    parser = argparse.ArgumentParser()
    command.add_parser(parser.add_subparsers())
    words = [f"{word}" for key, value in given.items() for word in (f"--{key}", *(str(value).split()))]
    return parser.parse_args(["report", "--checkpoint", "folder", "--steps", "5", "--batch", "3", *words])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    text = "".join(np.random.default_rng(0).choice(list("abñ"), 70))
    (folder / "text.txt").write_text(text, encoding="utf-8")
    wave = np.sin(np.arange(80)[:, None] * [0.3, 0.5, 0.7])
    np.save(folder / "wave.npy", wave)
    lines = ["note;c;b;a", *(f"x;{c:.4f};{b:.4f};{a:.4f}" for a, b, c in wave)]
    lines[71], lines[73] = "x;;0.5;0.5", "x;;0.5;"
    (folder / "wave.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_before_is_the_network_that_training_began_with(files):
    """One-hot text, so that the network is that of `network`: the same weights and loss; after training they are others."""
    model = model_of("text", files / "text.txt")
    cut = sequences.of_model(model, options())
    before, after = trained.entries(model, cut.sequences, dtype=jnp.float32)
    assert (before.name, after.name) == ("gru, untrained", "gru, trained")
    key = jax.random.split(jax.random.split(jax.random.key(7))[0])[0]
    net = bptt.network(bptt.gru(5, 6), 5, bias=True)
    params = net.init(key)

    jax.tree.map(np.testing.assert_array_equal, before.params, params.cell)
    xs = jax.nn.one_hot(cut.sequences.xs, 5, dtype=jnp.float32)
    _, logits = net.apply(params, bptt.gru(5, 6).initial_carry((3,)), xs)

    @jax.jit
    def loss(params):
        return before.loss(bptt.scan(before.cell, params, before.init, before.xs)[1], before.known)

    expected = losses.cross_entropy(logits, cut.sequences.targets)
    np.testing.assert_allclose(loss(before.params), expected, rtol=1e-5)
    assert abs(float(loss(after.params)) - float(expected)) > 1e-2


@pytest.mark.parametrize("cell", ["elman", "lstm"])
def test_the_loss_of_numbers_is_that_of_training(files, cell):
    """Of target columns, as changes, without masked entries; and Jacobian products add up where rows have unequally many."""
    model = model_of("csv", files / "wave.csv", cell=cell)
    model.settings["data"]["reading"] = {"missing": "mask", "drop": ["note"]}
    cut = sequences.of_model(model, options())
    assert cut.sequences.observed.shape == (5, 3, 2)
    assert 0 < np.count_nonzero(~cut.sequences.observed) < 6
    assert cut.sequences.observed[-1].any(axis=-1).all()
    assert any("missing" in line for line in cut.read_as)
    _, entry = trained.entries(model, cut.sequences, dtype=jnp.dtype(float))
    _, hs = jax.jit(lambda *args: bptt.scan(entry.cell, *args))(entry.params, entry.init, entry.xs)
    xs, targets, observed = map(np.asarray, cut.sequences)
    np.testing.assert_array_equal(targets[~observed], xs[..., [2, 0]][~observed])  # the last value is repeated
    ys = xs[..., [2, 0]] + np.array([0.1, 0.2]) * np.asarray(hs @ model.params.W_hy.T.astype(float))
    errors = (ys - targets)[observed] ** 2
    np.testing.assert_allclose(entry.loss(hs, entry.known), errors.mean(), rtol=1e-5)

    def loss(params):
        return entry.loss(bptt.scan(entry.cell, params, entry.init, entry.xs)[1], entry.known)

    found, expected = jax.jit(lambda *args: (report._by_jacobian_products(entry, *args), jax.grad(loss)(args[0])))(
        entry.params, entry.init, entry.xs
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), found, expected)
    name, easy = trained.easy(model, cut.sequences)
    assert name.startswith("persistence")
    np.testing.assert_allclose(easy, ((xs[..., [2, 0]] - targets)[observed] ** 2).mean(), rtol=1e-5)


def test_what_is_easy_of_a_text(files):
    model = model_of("text", files / "text.txt")
    numbers = np.array([[0, 0], [0, 1]])
    name, easy = trained.easy(model, trained.Sequences(numbers, numbers))
    assert name == "frequencies of the symbols"
    np.testing.assert_allclose(easy, -(0.75 * np.log(0.75) + 0.25 * np.log(0.25)))


def test_sequences_are_of_the_validation_part(files):
    raw = (files / "text.txt").read_bytes()
    total = len(raw)
    model = model_of("text", files / "text.txt")
    cut = sequences.of_model(model, options())
    first = total - round(total / 4)
    assert cut.words == f"text.txt, the last {total - first} steps, held out from training"
    encoded = np.array([model.vocabulary.symbols.index(byte) for byte in raw])
    np.testing.assert_array_equal(cut.sequences.xs[:, 0], encoded[first : first + 5])
    np.testing.assert_array_equal(cut.sequences.targets[:, -1], encoded[-5:])
    few = sequences.of_model(model_of("text", files / "text.txt", validation=0.02), options())
    assert few.words == "text.txt, the last 8 steps, some of which it was trained on"
    assert len({tuple(row) for row in few.sequences.xs.T}) == 3
    none = sequences.of_model(model_of("text", files / "text.txt", validation=0.0), options())
    assert none.words == f"text.txt, all {total} steps, which it was trained on"
    other = model_of("text", files / "text.txt", fingerprint="of another file")
    assert sequences.of_model(other, options(text=files / "text.txt")).words == (
        f"text.txt, all {total} steps; it was trained on another file"
    )


def test_columns_are_found_by_name(files):
    """The table has them in another order, and one that can't be read; an array has them in order."""
    model = model_of("npz", files / "wave.npy")
    from_array = sequences.of_model(model, options())
    assert from_array.sequences.xs.shape == (5, 3, 3)
    wave = np.load(files / "wave.npy")
    np.testing.assert_array_equal(from_array.sequences.xs[:, 0], model.columns.encode(wave[60:65]))
    from_table = sequences.of_model(model, options(csv=files / "wave.csv", missing="hold"))
    assert from_table.words.startswith("wave.csv, all 80 steps")
    assert from_table.sequences.observed is None
    np.testing.assert_allclose(from_table.sequences.xs[:, 0], model.columns.encode(wave[:5]), atol=1e-3)
    np.testing.assert_allclose(
        from_table.sequences.targets[:, 0], model.columns.encode(wave[1:6])[:, [2, 0]], atol=1e-3
    )


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("text", {"csv": "wave.csv"}, "folder was trained on text: pass its file with --text"),
        ("npz", {"text": "text.txt"}, "folder was trained on numbers: pass its file with --csv or --npz"),
        ("gone", {}, r"folder was trained on gone\.txt, which is not there any more: pass a file with --text"),
        ("changed", {}, "folder was trained on text.txt, which has changed since: pass a file with --text"),
        ("text", {"steps": "200"}, "text.txt has 96 time steps, but --steps 200 needs 201, one more to predict"),
        ("text", {"text": "unknown.txt"}, "unknown.txt has 'z', which the model has never seen"),
        ("text", {"delimiter": ";"}, "--delimiter says how a CSV file is read, but there is none"),
        ("npz", {"npz": "narrow.npy"}, r"narrow\.npy has 1 column, but the model reads 3: pass an array \[time, 3\]"),
        (
            "npz",
            {"csv": "narrow.csv"},
            r"the model reads b: narrow\.csv has no such column, but 1 'a', 2 'c'",
        ),
        ("npz", {"csv": "wave.csv", "columns": "a"}, "--columns can't be chosen: the model reads a, b, c"),
    ],
)
def test_files_that_do_not_fit_the_model(files, monkeypatch, kind, given, message):
    monkeypatch.chdir(files)
    np.save("narrow.npy", np.arange(50.0))
    np.savetxt("narrow.csv", np.ones((50, 2)) * [[1.0, 2.0]], delimiter=",", header="a,c", comments="")
    (files / "unknown.txt").write_text("abz" * 20)
    is_text = kind != "npz"
    model = model_of("text" if is_text else "npz", "text.txt" if is_text else "wave.npy")
    if kind == "gone":
        model.settings["data"]["path"] = "gone.txt"
    if kind == "changed":
        model.settings["data"]["fingerprint"] = "another"
    with pytest.raises(tasks.InputError, match=message):
        sequences.of_model(model, options(**given))


def test_a_folder_without_a_model_leaves_nothing_written(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    output = tmp_path / "r.html"
    for more, message in (([], "holds no checkpoint"), (["--seed", "0"], "--seed is that of the checkpoint")):
        assert main(["report", "--checkpoint", str(tmp_path / "empty"), *more, "--output", str(output)]) == 2
        assert message in capsys.readouterr().err
    assert not output.exists()


TRAINED = {
    "text": ["--text", "text.txt", "--cell", "gru", "--embedding", "4"],
    "numbers": ["--csv", "wave.csv", "--drop", "note", "--missing", "mask", "--cell", "elman", "--target", "c"],
}


def train(*words):
    with jax.numpy_dtype_promotion("standard"):  # optax's Adam promotes
        assert main(["train", *words]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", TRAINED)
def test_report_of_a_trained_network(files, monkeypatch, tmp_path, capsys, kind):
    monkeypatch.chdir(files)
    sizes = ["--hidden", "6", "--steps", "8", "--batch", "2", "--updates", "60", "--sample", "0"]
    train(*TRAINED[kind], *sizes, "--validation", "0.3", "--checkpoints", str(tmp_path / "run"))
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    page_options = ["--checkpoint", "run", "--steps", "10", "--batch", "2", "--output", "r.html", "--float64"]
    assert main(["report", *page_options]) == 0
    printed = capsys.readouterr().out
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    cell = "gru" if kind == "text" else "elman"
    for name in (f"{cell}, untrained", f"{cell}, trained"):
        assert re.search(rf"^{name} .* yes$", printed, re.MULTILINE)
        assert re.search(rf"<li>{name}: the gradient (falls below|reaches all|grows)", html)
        assert f"<th scope='col'>{name}</th>" in html
    assert "NO" not in printed
    assert "<h1>How far back the gradient reaches, before and after training</h1>" in html
    assert "<p>Training took the mean loss down, from" in html
    assert "untrained networks" not in html
    assert "<dt>checkpoint</dt><dd>run, update 60, the best on validation</dd>" in html
    assert "held out from training" in html
    assert "textbook loop" not in html
    scores = dict(re.findall(r"<tr><th scope='row'>([^<]*)</th><td>([^<]*)</td></tr>", html))
    untrained, after = float(scores[f"{cell}, untrained"]), float(scores[f"{cell}, trained"])
    assert untrained > after > 0
    if kind == "text":
        assert "gru, 1 layer of 6, embedding of 4" in html
        assert "frequencies of the symbols" in scores
    else:
        assert "persistence: nothing changes" in scores
        assert "<h2>Forecasts of the validation data</h2>" in html
        assert "seasonal naive" in html
        assert "missing" in printed
    parsed = Page(html)
    assert parsed.outside == []
    assert len(parsed.ids) == len(set(parsed.ids))


@pytest.mark.slow
def test_training_begins_with_the_network_that_is_shown(files, monkeypatch, tmp_path):
    """With a rate that changes no weight, what is trained is what training began with."""
    monkeypatch.chdir(files)
    rate = ["--learning-rate", "1e-30", "--weight-decay", "0", "--updates", "2", "--sample", "0", "--seed", "5"]
    sizes = ["--hidden", "6", "--steps", "8", "--batch", "2"]
    deep = ["--text", "text.txt", "--embedding", "4", "--layers", "2", "--layer-norm", "--dropout", "0.1"]
    train(*deep, *sizes, *rate, "--checkpoints", str(tmp_path / "run"))
    model = bptt.load(tmp_path / "run")
    cut = sequences.of_model(model, options())
    before, after = trained.entries(model, cut.sequences, dtype=jnp.float32)
    equal = partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-20)
    jax.tree.map(equal, (before.params, before.xs), (after.params, after.xs))
    assert command._network(model).startswith("lstm, 2 layers of 6, layer normalisation, embedding of 4, ")
