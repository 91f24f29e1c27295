"""The report runs on real input, says what is so, and leaves nothing half written."""

import re
import subprocess
import sys
from html.parser import HTMLParser

import jax.numpy as jnp
import numpy as np
import pytest

import jaxbptt as bptt
from jaxbptt import tasks, words
from jaxbptt.__main__ import main
from jaxbptt.commands import report as command
from jaxbptt.reports import page, report, wording

SMALL = ["--hidden", "6", "--steps", "12", "--batch", "2"]


class Page(HTMLParser):
    """What a browser would ask the network for, and whether every id is there once."""

    def __init__(self, text):
        super().__init__()
        self.outside, self.ids, self.references = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        for key, value in attributes:
            if key == "id":
                self.ids.append(value)
            if key in ("src", "href", "xlink:href", "action"):
                (self.references if value.startswith("#") else self.outside).append(value.removeprefix("#"))


@pytest.mark.slow
def test_report_on_the_standard_library(tmp_path, capsys):
    output = tmp_path / "report.html"
    assert main(["report", *SMALL, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    html = output.read_text(encoding="utf-8")
    for cell in ("elman", "gru", "lstm"):
        assert f"{cell}: every method" in printed
        assert re.search(rf"{cell}: the gradient of the last step's loss (falls below|reaches back)", printed)
        assert f"{cell}: all but 1 % of the gradient of the mean loss comes from the last" in printed
        assert f"<li>{cell}: Over 12 steps the gradient " in html
        assert f"<h3>{cell}</h3>" in html
    for method in (
        "scan",
        "adjoint_scan",
        "adjoint_scan (derived)",
        "Jacobian products",
        "textbook loop",
        "checkpointed_scan",
    ):
        assert f"<td>{method}</td>" in html
    assert "NO" not in printed
    assert html.count("<svg ") == 7
    assert printed.count("truncated at K steps") == 3
    assert html.count("<tr><td>1</td>") == 3, "a row of each cell's bias for K = 1"
    parsed = Page(html)
    assert parsed.outside == []
    assert len(parsed.ids) == len(set(parsed.ids))
    assert set(parsed.references) <= set(parsed.ids)
    assert "url(http" not in html
    assert "prefers-color-scheme: dark" in html
    assert "width=device-width" in html
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


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
    assert "elman: Over 12 steps the gradient" in run.stdout
    html = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "data.csv" in html
    assert "numbers float64" in html
    assert "textbook loop" not in html


@pytest.mark.parametrize(
    ("kind", "features", "words"),
    [
        ("npz", 2, "40 steps of 2 columns"),
        ("csv", 1, "40 steps of 1 column"),
        ("text", 27, "43 steps of 27 characters"),
    ],
)
def test_what_is_read_is_what_is_reported(tmp_path, monkeypatch, kind, features, words):
    path, seen = tmp_path / f"data.{kind}", []
    if kind == "npz":
        np.savez(path, xs=np.sin(np.arange(40)[:, None] * [0.3, 0.5]))
    elif kind == "csv":
        np.savetxt(path, np.sin(np.arange(40)))
    else:
        path.write_text("the quick brown fox jumps over the lazy dog")
    monkeypatch.setattr(report, "stages", lambda name, task, **_: seen.append((name, task)) or [])
    monkeypatch.setattr(report, "report_cell", lambda name, stages, progress: None)
    monkeypatch.setattr(page, "render", lambda facts, reports: facts["data"])
    with pytest.raises(
        AttributeError, match="has no attribute"
    ):  # there is no report to print, after the page is written
        main(["report", f"--{kind}", str(path), *SMALL, "--cell", "gru", "--output", str(tmp_path / "r.html")])
    ((name, task),) = seen
    assert name == "gru"
    assert task.xs.shape == (12, 2, features)
    assert (tmp_path / "r.html").read_text() == f"data.{kind}, {words}"


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

    monkeypatch.setattr(report, "stages", lambda *_, **__: [])
    monkeypatch.setattr(report, "report_cell", lambda *_: None)
    monkeypatch.setattr(page, "render", lambda *_: "")
    monkeypatch.setattr(command, "write_whole", fail)
    arguments = ["report", *SMALL, "--cell", "gru", "--output", str(tmp_path / "r.html")]
    assert main(arguments) == 2
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
    assert "elman: No gradient passes from step to step" in html
    assert "elman: no horizon: the gradient of the mean loss is 0 or not finite" in html


def flow_of(norms):
    norms = np.asarray(norms, np.float32)
    return bptt.analysis.GradientFlow(0, None, None, norms, None, None, None, None, None)


def sentence(norms):
    return wording.reach_sentence(report.CellReport("elman", None, None, flow_of(norms), None))


def test_reach():
    flow = flow_of(2.0 ** np.arange(-40, 1))
    assert wording.reach(flow, 0.01) == 6
    assert wording.reach(flow, 2.0**-23) == 23
    assert wording.reach(flow_of(np.zeros(3)), 0.1) is None
    assert wording.reach(flow_of([5.0, 1.0]), 1.0) == 1


def test_reach_in_words():
    assert sentence(2.0 ** np.arange(-40, 1)) == (
        "elman: the gradient of the last step's loss falls below 1 % of its largest norm 7 steps back, "
        "and below the rounding error of float32 24 steps back."
    )
    assert sentence([0.5, 0.5, 1.0]) == (
        "elman: the gradient of the last step's loss reaches back all 3 steps with at least 1 % of its largest norm; "
        "at the first step it is 5e-01 of it."
    )
    assert sentence([1e-4, 1.0]).endswith("largest norm 1 step back; at the first step it is 1e-04 of it.")
    assert "no gradient reaches any state" in sentence(np.zeros(4))
    assert "is not finite in 2 of 4 steps" in sentence([1, np.nan, np.inf, 1])
    assert "largest norm 1 step back, and below the rounding error of float32 1 step back." in sentence([1e-30, 1.0])
    assert "is not finite in 1 of 1 step." in sentence([np.nan])


def test_tables_in_words():
    """A certificate reads the same in every place, and units are what the heads say."""
    row = bptt.analysis.CertificateRow("mine", False, 0.0, {}, 0.25, 3 * 2**20 + 512, 1_500_000.0, 0.0, 0.0012345, 1.0)
    certificate = bptt.analysis.Certificate((row,), 1e-5, "float32")
    table = wording.certificate_table(certificate)
    assert table.head == ("method", "relative error", "temporary KiB", "Mflop", "ms", "agrees")
    assert table.rows == (("mine", "2.5e-01", "3,072.5", "1.50", "1.23", "NO"),)
    assert [line.split()[-6:] for line in str(certificate).splitlines()][1] == list(table.rows[0])
    curve = bptt.analysis.BiasCurve(np.array([0.123456, 0.0]), np.array([0.98765, 1.0]))
    bias = bptt.analysis.TruncationBias(np.array([1, 64]), curve, curve._replace(cosines=np.array([0.5, 1.0])))
    table = wording.bias_table(bias)
    assert table.head[1:3] == ("truncated error", "truncated cosine")
    assert table.rows == (("1", "0.12", "0.500", "0.12", "0.988"), ("64", "0.0", "1.000", "0.0", "1.000"))


@pytest.mark.slow
def test_what_does_not_fit_is_left_out_and_said(monkeypatch):
    monkeypatch.setattr(report, "MAX_DENSE_BYTES", 0)
    task = tasks.next_step(tasks.read_standard_library(), steps=5, batch=1)
    stages = report.stages("gru", task, hidden=3, seed=0, dtype=jnp.float32)
    seen = []
    result = report.report_cell("gru", stages, lambda words, done: seen.append((words, done)))
    assert result.singular_values is result.lags is wording.horizon_sentence(result) is None
    assert "Jacobian products" not in [row.name for row in result.certificate.rows]
    assert "GiB of dense matrices" in result.left_out[0]
    assert sum(done for _, done in seen) == len(stages)
    assert {words for words, _ in seen} >= {"gru: certificate", "gru: adjoint_scan", "gru: truncation"}
    assert "Left out: Jacobian products" in page.render({}, [result])


@pytest.mark.parametrize("name", ["report", "train"])
def test_help_names_the_defaults_that_there_are(capsys, name):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    printed = capsys.readouterr().out
    assert "(default: 0)" in " ".join(printed.split())
    assert not re.search(r"default:\s+(None|False)", printed)
