"""What the benchmarks share: a description of the machine, functions compiled and timed in turns, and tables."""

import argparse
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jax

from jaxbptt.analysis.cost import Cost, compile_and_cost, median_seconds

RESULTS = Path(__file__).parent / "results"


def machine(*versions: str) -> str:
    """Device, versions and date, in one line."""
    device = jax.devices()[0]
    kind = f"{_processor()}" if device.platform == "cpu" else device.device_kind
    words = [kind, f"jax {jax.__version__}", *versions, f"Python {platform.python_version()}", str(date.today())]
    return ", ".join(words)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return platform.processor() or platform.machine()


def measure(
    functions: dict[str, Callable[..., Any]], args: Sequence[Any], repeats: int
) -> dict[str, tuple[Cost, float]]:
    """Cost and median seconds of each, compiled for `args`; the functions take turns."""
    compiled = {name: compile_and_cost(fn, *args) for name, fn in functions.items()}
    seconds = median_seconds([lambda call=call: call(*args) for call, _ in compiled.values()], repeats)
    return {name: (cost, s) for (name, (_, cost)), s in zip(compiled.items(), seconds, strict=True)}


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, aligned so that it can be read in a terminal as well."""
    cells = [list(map(str, row)) for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| "
        + " | ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        + " |"
        for row in cells
    ]
    rule = "| " + " | ".join("-" * (w - 1) + ":" if i else "-" * w for i, w in enumerate(widths)) + " |"
    return "\n".join([lines[0], rule, *lines[1:]])


def section_options(doc: str, titles: Iterable[str]) -> argparse.Namespace:
    """The options of a benchmark in sections, from the command line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs; writes nothing")
    parser.add_argument("--only", nargs="+", choices=list(titles), default=list(titles), help="these sections")
    return parser.parse_args()


def write_sections(path: Path, head: str, titles: Sequence[str], sections: dict[str, str]) -> None:
    """Put these sections into a Markdown file, in the place of what it has of them; `titles` are all there may be, in order."""
    kept = {}
    if path.exists():
        parts = re.split(r"^## (.*)\n", path.read_text(), flags=re.MULTILINE)
        kept = {title: text.strip() for title, text in zip(parts[1::2], parts[2::2], strict=True)}
    kept |= sections
    path.parent.mkdir(exist_ok=True)
    texts = [head, *(f"## {title}\n\n{kept[title]}" for title in titles if title in kept)]
    path.write_text("\n\n".join(texts) + "\n")
