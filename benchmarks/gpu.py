"""All that has to be known of a GPU, in one command and in the minutes given: is it right, how fast is it, what fits.

Parts run one after the other, the most important first, each in a process of its own (`gpu_parts.py`). A part is killed at
the end of its share of the time that is left, and what it leaves of its share goes to the later ones. Each row is written
when it is measured, so a machine that goes away leaves all that was measured until then:

    DIR/results.jsonl    one row in a line
    DIR/results.md       the same as tables, and how far each part came

    python benchmarks/gpu.py [--output DIR] [--minutes 8] [--quick] [--parts device,exactness]

It also runs on a machine without a GPU; with `--quick` at sizes where the numbers say nothing, by default in a temporary folder.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import harness

HERE = Path(__file__).parent


class Part(NamedTuple):
    """A part: its title, and its share of the time."""

    title: str
    share: float


PARTS = {
    "device": Part("The device", 1.0),
    "exactness": Part("Exactness: every strategy against scan on this device, and against the CPU", 4.0),
    "peers": Part("One layer in every library: milliseconds for value and gradient", 8.0),
    "long": Part("Long sequences", 3.0),
    "parallel": Part("Sequential and parallel in time", 2.0),
    "choices": Part("Choices for this platform: segments, unroll and graphs", 3.0),
    "kernels": Part("Kernels that a time step starts", 1.0),
    "analysis": Part("Spectra", 1.5),
    "suite": Part("The test suite", 3.0),
}


def run_part(name, share, options):
    """Run a part for `share` seconds at most; yields now and then, and at last how it ended."""
    # No memory set aside: a part may start other processes that use the device.
    env = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "GPU_COMMAND": str(os.getpid())}
    command = [sys.executable, HERE / "gpu_parts.py", name, options.output / "results.jsonl"]
    start = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command + ["--quick"] * options.quick, stdout=output, stderr=output, env=env, start_new_session=True
        )
        try:
            while process.poll() is None and time.monotonic() < start + share:
                yield "is running", None
                time.sleep(min(0.5, max(start + share - time.monotonic(), 0)))
        finally:
            ended = process.poll()
            with contextlib.suppress(ProcessLookupError):  # what the part started goes too
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = f"{time.monotonic() - start:.0f} s"
        if ended is None:
            yield f"was cut after {seconds}", None
        elif ended == 0:
            yield f"took {seconds}", None
        else:
            output.seek(max(output.seek(0, os.SEEK_END) - 3000, 0))
            yield f"failed after {seconds}", output.read().decode(errors="replace")


def markdown(parts, endings, rows, minutes):
    """How far each part came, and its tables."""
    text = [f"# {minutes:g} minutes on one device"]
    for name in parts:
        how, error = endings.get(name, ("was not begun", None))
        text.append(f"## {PARTS[name].title}\n\nThis part {how}.")
        mine = [row for row in rows if row["part"] == name]
        for title in dict.fromkeys(row["table"] for row in mine):
            found = [row["row"] for row in mine if row["table"] == title]
            columns = list(dict.fromkeys(column for row in found for column in row))
            if title:
                text.append(title)
            text.append(harness.table(columns, [[row.get(column, "–") for column in columns] for row in found]))
        if error:
            text.append(f"```\n{error.strip()}\n```")
    return "\n\n".join(text) + "\n"


def read_rows(path):
    """The rows so far; a line that a killed process left unfinished is no row."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=harness.RESULTS / "gpu", help="folder for the results")
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together")
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it runs")
    parser.add_argument("--parts", default=",".join(PARTS), help="some of them")
    options = parser.parse_args()
    parts = options.parts.split(",")
    unknown = [name for name in parts if name not in PARTS]
    if unknown:
        parser.error(f"{unknown[0]} is no part: pass some of {','.join(PARTS)}.")
    if not (HERE / "parallel.py").exists():
        parts = [name for name in parts if name != "parallel"]

    if options.quick and options.output == parser.get_default("output"):
        options.output = Path(tempfile.mkdtemp())
    options.output.mkdir(parents=True, exist_ok=True)
    results = options.output / "results.jsonl"
    results.unlink(missing_ok=True)
    endings = {}

    def write():
        text = markdown(parts, endings, read_rows(results), options.minutes)
        unfinished = options.output / "results.md.new"
        unfinished.write_text(text)
        unfinished.replace(options.output / "results.md")
        return text

    def stop(*_):
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    end = time.monotonic() + 60 * options.minutes
    try:
        for i, name in enumerate(parts):
            later = sum(PARTS[other].share for other in parts[i:])
            left = max(end - time.monotonic(), 0)
            for ending in run_part(name, left * PARTS[name].share / later, options):
                endings[name] = ending
                write()
            print(f"{name} {endings[name][0]}", flush=True)
    except KeyboardInterrupt:
        how = "was stopped"
        endings = {name: (how if "running" in ending[0] else ending[0], ending[1]) for name, ending in endings.items()}
    print(write())
    failed = [name for name, (how, _) in endings.items() if "failed" in how or "stopped" in how]
    # What was found before a part was cut counts as well.
    failed += [row["part"] for row in read_rows(results) if row["row"].get("agrees", "yes") != "yes"]
    sys.exit(f"failed: {', '.join(dict.fromkeys(failed))}" if failed else 0)


if __name__ == "__main__":
    main()
