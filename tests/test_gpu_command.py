"""`benchmarks/gpu.py`: what it leaves behind when its time is short, and when it is killed; and what it compares."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import jaxbptt as bptt

COMMAND = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


def start(folder, *options, platform="cpu"):
    command = [sys.executable, COMMAND, "--output", folder, *options]
    env = os.environ | {"JAX_PLATFORMS": platform}
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)


def processes_that_write_to(folder):
    found = []
    for line in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if str(folder).encode() in line.read_bytes():
                found.append(line.parent.name)
        except OSError:  # it has ended meanwhile
            continue
    return found


@pytest.mark.slow
def test_a_part_is_cut_and_the_next_one_begins(tmp_path):
    """24 seconds are too few for these parts at their full size, and enough for the first to leave a row."""
    start_time = time.monotonic()
    with start(tmp_path, "--minutes", "0.4", "--parts", "long,choices") as run:
        _, error = run.communicate()
    assert run.returncode == 0, error
    assert time.monotonic() - start_time < 24 + 15  # what starting and stopping take
    text = (tmp_path / "results.md").read_text()
    assert text.count("This part was cut after") == 2
    assert "| checkpointed_scan " in text
    assert processes_that_write_to(tmp_path) == []


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for the processes there")
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM])
def test_killed(tmp_path, sent):
    """The tables are there, and nothing goes on in the background."""
    with start(tmp_path, "--minutes", "1", "--parts", "device,long") as run:
        while "product" not in _read(tmp_path / "results.md"):
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.1)
        run.send_signal(sent)
    text = (tmp_path / "results.md").read_text()
    assert "| machine " in text
    assert ("was stopped" if sent == signal.SIGTERM else "is running") in text
    assert "This part was not begun." in text
    for _ in range(100):
        if not processes_that_write_to(tmp_path):
            return
        time.sleep(0.1)
    raise AssertionError("A part goes on after the command has ended.")


@pytest.mark.slow
def test_a_part_that_fails(tmp_path):
    """Its error is in the tables, and the command fails."""
    with start(tmp_path, "--quick", "--parts", "device", platform="nonsense") as run:
        _, error = run.communicate()
    assert run.returncode == 1
    assert error.strip() == "failed: device"
    text = (tmp_path / "results.md").read_text()
    assert "This part failed after" in text
    assert "Unable to initialize backend 'nonsense'" in text


def test_unknown_part(tmp_path):
    with start(tmp_path, "--parts", "device,speed") as run:
        _, error = run.communicate()
    assert run.returncode == 2
    assert "speed is no part: pass some of device,exactness," in error


@pytest.mark.slow
def test_gradients_that_are_compared_do_not_depend_on_rounding(monkeypatch):
    """Else those of two devices would differ with nothing wrong."""
    monkeypatch.syspath_prepend(str(COMMAND.parent))
    import gpu_parts

    setting = gpu_parts.Setting("float32", "none", "elman")  # the gates of the other cells forget
    single, double = (
        gpu_parts.gradient_on(jax.devices()[0], bptt.scan, setting._replace(dtype=dtype), (200, 16))
        for dtype in ("float32", "float64")
    )
    assert max(leaf.relative_error for leaf in bptt.compare_gradients(single, double).leaves) < 1e-5


def _read(path):
    return path.read_text() if path.exists() else ""
