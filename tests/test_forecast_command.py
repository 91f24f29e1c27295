"""Forecasts from the command line: the right columns of the right file, dates, intervals, and what it says of errors."""

import csv
import io
import re
from pathlib import Path
from unittest.mock import patch

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas
import pytest
from rich.console import Console

import jaxbptt as bptt
from jaxbptt import checkpoints, models, tasks
from jaxbptt.__main__ import main
from jaxbptt.commands import display
from jaxbptt.commands import forecast as command
from jaxbptt.models.model import BEST, settings_of

COLUMNS = models.Columns(("load, MW", "temp"), np.array([100.0, 15.0]), np.array([10.0, 5.0]), (0,))
ROWS = 30
VALUES = np.stack([100 + 10 * np.sin(np.arange(ROWS) / 4), 15 + np.cos(np.arange(ROWS))], axis=1).round(3)


def save(folder, columns=COLUMNS, *, shift=0.1, errors=True, data=None, reading=None, vocabulary=None):
    """A checkpoint of an untrained network that adds about `shift` deviations a step."""
    inputs, targets = len(columns.names), columns.targets
    architecture = models.Architecture(
        "gru", 4, 1, inputs, len(targets), False, targets=targets, change=(shift,) * len(targets)
    )
    if vocabulary:
        architecture, columns = models.Architecture("gru", 4, 1, 3, 3, text=True), None
    net = models.build(architecture)
    init, _ = bptt.tbptt(lambda params, carry, *_, **__: (0.0, carry), optax.sgd(0.1))
    params = net.init(jax.random.key(1))
    params = params._replace(b_y=jnp.ones_like(params.b_y))
    state = init(params, net.cell.initial_carry((2,)), jax.random.key(0))
    info = {"metrics": {}, "versions": {}, "errors": None}
    if errors and columns:
        info["errors"] = models.validation_errors(
            net, params, columns, np.random.default_rng(0).normal(15, 5, (44, inputs)), start=20, season=1, horizons=3
        ).to_json()
    settings = settings_of(architecture, vocabulary, columns, [])
    settings["data"] = {"kind": "csv", "path": data, "fingerprint": "", "reading": reading or {}}
    checkpoints.save(folder, 1, state, settings, info=info)


def table(path="new.csv", names=("date", "load, MW", "temp"), freq="h", values=VALUES):
    dates = pandas.date_range("2024-02-27 21:00", periods=len(values), freq=freq)
    frame = pandas.DataFrame({"date": dates, "load, MW": values[:, 0], "temp": values[:, 1], "words": "x"})
    frame[list(names)].to_csv(path, index=False)
    return path


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        save("run")
        table()
        yield


def run(*arguments, steps=5):
    return main(["forecast", "run", "--steps", str(steps), "--output", "out.csv", *arguments])


def written(path="out.csv"):
    return list(csv.DictReader(io.StringIO(Path(path).read_text(encoding="utf-8"))))


def numbers(name, path="out.csv"):
    return np.array([float(row[name] or "nan") for row in written(path)])


def test_forecasts_are_those_of_the_library(capsys):
    assert run("--csv", "new.csv", "--level", "0.8") == 0
    printed = capsys.readouterr().out
    model = bptt.load("run")
    expected = models.forecast(model, VALUES, steps=5, level=0.8)
    np.testing.assert_allclose(numbers("load, MW"), expected.mean[:, 0], rtol=1e-8)
    for end, found in (("low", expected.low), ("high", expected.high)):
        np.testing.assert_allclose(numbers(f"load, MW {end}"), found[:, 0], rtol=1e-8)
        assert np.isfinite(found[:, 0]).tolist() == [True] * 3 + [False] * 2
    assert list(written()[0]) == ["step", "date", "load, MW", "load, MW low", "load, MW high"]
    assert [row["step"] for row in written()] == ["1", "2", "3", "4", "5"]
    assert [row["date"] for row in written()][:3] == [f"2024-02-29 {hour:02}:00:00" for hour in (3, 4, 5)]
    assert "5 rows after the last of 30 rows of new.csv, for load, MW." in printed
    assert "temp: read but not predicted, held at the last value" in printed
    assert "There are intervals for the first 3 steps" in printed
    assert "persistence" in printed
    assert "Warning: load, MW: the network is worse than persistence 1 and 3 steps ahead" in printed
    assert "Forecast: out.csv\nFigure: out.png" in printed
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


def test_columns_are_found_by_name(capsys):
    assert run("--csv", "new.csv") == 0
    expected = numbers("load, MW")
    table(names=("words", "temp", "date", "load, MW"))
    assert run("--csv", "new.csv") == 0
    np.testing.assert_array_equal(numbers("load, MW"), expected)
    table(names=("date", "load, MW"))
    assert run("--csv", "new.csv") == 2
    assert capsys.readouterr().err == (
        "jaxbptt forecast: the model reads temp: new.csv has no such column, but 1 'date', 2 'load, MW'.\n"
    )


def test_what_is_drawn():
    with patch("jaxbptt.plots.plot_forecast", wraps=bptt.plots.plot_forecast) as plot:
        assert run("--csv", "new.csv", "--figure", "f.svg") == 0
    (future, past), options = plot.call_args
    assert future.columns == ("load, MW",)
    np.testing.assert_array_equal(past[:, 0], VALUES[:, 0])
    np.testing.assert_array_equal(options["times"][[0, -1]], np.array(["2024-02-27T21", "2024-02-29T07"], "M8[h]"))
    assert "<svg" in Path("f.svg").read_text()


@pytest.mark.parametrize(
    ("freq", "dates"),
    [
        ("D", ["2024-03-28", "2024-03-29"]),
        ("MS", ["2026-09-01", "2026-10-01"]),
        ("B", ["2024-04-09", "2024-04-10"]),
        ("15min", ["2024-02-28 04:30:00", "2024-02-28 04:45:00"]),
        ("ME", ["2026-08-31", "2026-09-30"]),
    ],
)
def test_dates_go_on(freq, dates):
    times = pandas.date_range("2024-02-27 21:00", periods=ROWS, freq=freq)
    times = (times if freq == "15min" else times.normalize()).to_numpy()
    found, words = command._continued(times, 2)
    assert command._written(found)[-2:] == dates
    assert words == ""


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda times: None, ""),
        (lambda times: times[:2], "Fewer than 3 rows don't show how dates are spaced, so the forecast has steps only."),
        (lambda times: np.delete(times, 5), "The dates are not evenly spaced, so the forecast has steps only."),
    ],
)
def test_dates_that_do_not_go_on(change, words):
    times = pandas.date_range("2024-01-01", periods=9, freq="D").to_numpy()
    found, said = command._continued(change(times), 2)
    assert found is None
    assert words in said


@pytest.mark.parametrize(
    ("order", "words"),
    [
        (np.arange(ROWS)[::-1], "the newest row is first, but a forecast continues the last row"),
        (
            np.r_[0:8, 9, 8, 10:ROWS],
            "the row of 2024-02-28 06:00:00 is before that of 2024-02-28 05:00:00, but a forecast continues the last",
        ),
    ],
)
def test_rows_out_of_order_are_refused(order, words, capsys):
    assert run("--csv", "new.csv") == 0
    expected = Path("out.csv").read_text()
    Path("out.csv").unlink()
    pandas.read_csv("new.csv", dtype=str).iloc[order].to_csv("new.csv", index=False)
    assert run("--csv", "new.csv") == 2
    assert re.search(f"new.csv: {words}.*--sort", capsys.readouterr().err)
    assert not Path("out.csv").exists()
    assert run("--csv", "new.csv", "--sort") == 0
    assert Path("out.csv").read_text() == expected


@pytest.mark.parametrize(
    ("zone", "head", "date"),
    [("+01:00", "date", "2024-02-29 03:00:00"), ("Europe/Berlin", "date (UTC)", "2024-04-01 02:00:00")],
)
def test_dates_with_a_zone(zone, head, date):
    frame = pandas.read_csv("new.csv")
    start = "2024-03-30 21:00" if "B" in zone else "2024-02-27 21:00"
    hours = pandas.date_range(start, periods=ROWS, freq="h", tz=zone)
    frame["date"] = [hour.isoformat() for hour in hours]
    frame.to_csv("new.csv", index=False)
    assert run("--csv", "new.csv") == 0
    assert written()[0][head] == date


def test_without_a_file_the_training_data_goes_on(capsys):
    table("old.csv")
    save("other", data=str(Path("old.csv").absolute()))
    assert main(["forecast", "other", "--steps", "2"]) == 0
    assert len(written("jaxbptt-forecast.csv")) == 2
    Path("old.csv").unlink()
    assert main(["forecast", "other", "--steps", "2"]) == 2
    assert "old.csv, is gone: name one by --csv or --npz." in capsys.readouterr().err


def test_a_table_is_read_as_the_training_data_was():
    """With its decimal comma, which alone would be read otherwise; and what is given here comes first."""
    text = "date;load, MW;temp;junk\n" + "".join(f"2024-01-{i + 1:02};{i},5;1,{i};-\n" for i in range(20))
    Path("new.csv").write_text(text)
    reading = {"delimiter": ";", "decimal": ",", "drop": ["gone"]}
    save("other", reading=reading)
    with patch.object(tasks, "read_table", wraps=tasks.read_table) as read:
        assert main(["forecast", "other", "--csv", "new.csv", "--steps", "2", "--missing", "hold"]) == 0
    assert read.call_args.kwargs == {
        "delimiter": ";", "decimal": ",", "missing": "hold", "columns": ["load, MW", "temp"]
    }  # fmt: skip


@pytest.mark.parametrize("missing", ["hold", "mask", "interpolate"])
def test_a_table_that_ends_with_gaps(missing, capsys):
    warning = "Warning: the table ends with missing cells"
    values = VALUES.copy()
    values[5] = np.nan
    table(values=values)
    assert run("--csv", "new.csv", "--missing", missing) == 0
    assert warning not in capsys.readouterr().out
    values[-2:, 0] = np.nan
    table(values=values)
    save("other", reading={"missing": missing})
    for arguments in (["run", "--missing", missing], ["other"]):
        assert main(["forecast", *arguments, "--csv", "new.csv", "--steps", "2", "--output", "out.csv"]) == 0
        printed = capsys.readouterr().out
        assert (
            f"{warning}, whose values are made up and from which the forecast starts: load, MW (2 rows).\n" in printed
        )
        assert "loss" not in printed
        assert ("repeat the last value" in printed) == (missing != "interpolate")
    values[-2:, 0] = VALUES[-3, 0]
    expected = models.forecast(bptt.load("run"), pandas.DataFrame(values).ffill().to_numpy(), steps=2)
    if missing != "interpolate":
        np.testing.assert_allclose(numbers("load, MW"), expected.mean[:, 0], rtol=1e-8)


def test_arrays(capsys):
    columns = models.Columns(("column 1", "column 2"), *COLUMNS[1:3], (0, 1))
    save("other", columns)
    np.save("new.npy", VALUES)
    assert main(["forecast", "other", "--npz", "new.npy", "--steps", "3", "--output", "out.csv"]) == 0
    expected = models.forecast(bptt.load("other"), VALUES, steps=3)
    np.testing.assert_allclose(numbers("column 2"), expected.mean[:, 1], rtol=1e-8)
    assert "date" not in written()[0]
    np.save("new.npy", VALUES[:, :1])
    assert main(["forecast", "other", "--npz", "new.npy", "--steps", "3"]) == 2
    assert "new.npy has 1 column, but the model reads 2: pass an array [time, 2]." in capsys.readouterr().err


def test_best_and_last():
    save(Path("run") / BEST, shift=0.5)
    assert run("--csv", "new.csv") == 0
    best = numbers("load, MW")
    assert run("--csv", "new.csv", "--which", "last") == 0
    assert numbers("load, MW")[0] < best[0]


def test_without_validation(capsys):
    save("other", errors=False)
    assert main(["forecast", "other", "--csv", "new.csv", "--steps", "3", "--output", "out.csv"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("intervals") == printed.count("validation") == 1
    assert "There are no intervals: the model was trained without validation data, so nothing is known of" in printed
    assert np.isnan(numbers("load, MW low")).all()


def test_a_forecast_that_is_not_finite_says_so(capsys):
    save("other", shift=3e38)
    assert main(["forecast", "other", "--csv", "new.csv", "--steps", "9", "--output", "out.csv"]) == 0
    lost = np.isnan(numbers("load, MW"))
    assert not lost[0]
    assert f"Warning: from step {lost.argmax() + 1} on the forecast is not finite." in capsys.readouterr().out
    assert written()[8]["load, MW"] == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--csv", "none.csv"], "none.csv can't be read"),
        (
            ["--csv", "new.csv", "--output", "no/out.csv"],
            "--output no/out.csv can't be written: there is no folder no.",
        ),
        (["--csv", "new.csv", "--output", "out.png"], "--output out.png is the name of the figure, too"),
        (["--csv", "new.csv", "--figure", "out.txt"], "--figure out.txt ends in '.txt': use .png, .svg or .pdf."),
        (["--csv", "new.csv", "--columns", "temp"], "--columns can't be chosen: the model reads load, MW, temp."),
        (["--npz", "new.npy", "--missing", "hold"], "--missing says how a CSV file is read, but there is none"),
    ],
)
def test_what_cannot_be(arguments, message, capsys):
    assert run(*arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_model_of_text(capsys):
    save("text", vocabulary=tasks.Vocabulary((97, 98, 99)))
    assert main(["forecast", "text", "--csv", "new.csv", "--steps", "3"]) == 2
    assert capsys.readouterr().err == (
        "jaxbptt forecast: text has a model of text, which forecasts no numbers: jaxbptt sample text\n"
    )


def test_errors_of_many_columns(capsys):
    numbers = np.ones((3, 10))
    names = tuple(f"c{i}" for i in range(10))
    found = models.ValidationErrors(
        names, (None,) * 10, 9, 2 * numbers, numbers, np.nan * numbers, 9 * numbers, np.ones((7, 3, 10))
    )
    display.show_errors(Console(), found)
    printed = capsys.readouterr().out
    rows = re.findall(r"^ *(c\d) +\d", printed, flags=re.M)
    assert rows == [f"c{i}" for i in range(8) for _ in range(2)]  # each at 1 and 3 steps ahead
    assert "and 2 more columns" in printed
    assert printed.count("Warning: ") == 8
    assert "and 2 more warnings" in printed
