"""From a file to a model that is used, as a user does it: each command a process of its own, in another folder."""

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import jaxbptt as bptt
from jaxbptt import checkpoints

ROOT = Path(__file__).parents[1]
SMALL = ["--hidden", "16", "--steps", "20", "--batch", "4", "--save-every", "20", "--sample", "0"]


def environment():
    return os.environ | {"PYTHONPATH": str(ROOT)}


def command(*arguments, cwd):
    """A command that works, and what it prints."""
    run = subprocess.run(
        [sys.executable, "-m", "jaxbptt", *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return run.stdout


def train_until_interrupted(*arguments, cwd, folder):
    """Ctrl-C after the first checkpoint; returns the last line, which says how to resume."""
    run = subprocess.Popen(
        [sys.executable, "-m", "jaxbptt", "train", *arguments, "--checkpoints", str(folder)],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    for _ in range(600):
        if checkpoints.latest(folder) is not None or run.poll() is not None:
            break
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    out, error = run.communicate(timeout=60)
    assert (run.returncode, error) == (130, ""), (out, error)
    return out.strip().splitlines()[-1]


@pytest.mark.slow
def test_a_text(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    text = here / "poem.txt"
    text.write_text("Über allen Gipfeln ist Ruh, in allen Wipfeln spürest du kaum einen Hauch. " * 40, encoding="utf-8")
    how = train_until_interrupted("--text", "poem.txt", "--updates", "1000000", *SMALL, cwd=here, folder=here / "run")
    assert how.endswith(f"-m jaxbptt train --resume {here / 'run'}")
    interrupted = checkpoints.latest(here / "run")
    assert interrupted >= 20
    folder = shutil.move(here / "run", there / "moved")
    updates = interrupted + 60
    printed = command("train", "--resume", str(folder), "--updates", str(updates), cwd=there)
    assert f"resumed at update {interrupted:,}" in printed
    assert checkpoints.latest(folder) == updates
    text.unlink()
    written = command("sample", str(folder), "--prompt", "Über", "--length", "50", "--seed", "3", cwd=tmp_path)
    assert written.startswith("Über")
    assert len(written.rstrip("\n")) == 54
    assert written == command("sample", str(folder), "--prompt", "Über", "--length", "50", "--seed", "3", cwd=here)
    command("export", str(folder), "--output", "weights.safetensors", cwd=there)
    assert (there / "weights.safetensors").exists()
    model = bptt.load(folder)
    assert model.info["metrics"]["best"]["update"] == model.step
    with pytest.raises(AssertionError, match=r"poem\.txt"):
        command("report", "--checkpoint", str(folder), "--steps", "10", "--batch", "2", cwd=there)


@pytest.mark.slow
def test_a_table(tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    days = np.arange("2021-01-01", "2023-01-01", dtype="datetime64[D]")
    load = 500 + 100 * np.sin(2 * np.pi * np.arange(len(days)) / 7) + np.arange(len(days)) / 10
    lines = ["day;load;note", *(f"{day};{value:.2f};x" for day, value in zip(days, load, strict=True))]
    (here / "load.csv").write_text("\n".join(lines).replace(".", ","))
    table = ["--csv", "load.csv", "--drop", "note", "--cell", "gru"]
    train_until_interrupted(*table, "--updates", "1000000", *SMALL, cwd=here, folder=here / "run")
    folder = here / "run"
    updates = checkpoints.latest(folder) + 200
    printed = command("train", "--resume", str(folder), "--updates", str(updates), cwd=there)
    assert re.search(r"load\.csv: header in line 1, delimiter ';', decimal ','", printed)
    assert re.search(r"load .* 50 ", printed), printed  # the score table
    forecast = ["forecast", str(folder), "--csv", str(here / "load.csv"), "--steps", "14", "--output", "next.csv"]
    command(*forecast, cwd=there)
    with (there / "next.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 14
    assert rows[0]["date"].startswith("2023-01-01")
    expected = 500 + 100 * np.sin(2 * np.pi * (len(days) + np.arange(14)) / 7) + (len(days) + np.arange(14)) / 10
    found = np.array([float(row["load"]) for row in rows])
    assert np.sqrt(np.mean((found - expected) ** 2)) < 60
    assert all(float(row["load low"]) < float(row["load"]) < float(row["load high"]) for row in rows)
