"""Wording of messages."""

import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]


def counted(number: Any, one: str, many: str | None = None) -> str:
    """A count with its noun: `1 step`, `1,000 steps`, and for a symbolic number `b steps`."""
    count = f"{number:,}" if isinstance(number, int) else str(number)
    return f"{count} {one if count == '1' else many or one + 's'}"


def install_command(extra: str) -> str:
    """The command that installs an extra beside the package that is running, into the Python that runs it.

    The package is named by its folder where it runs from a checkout, installed with `-e` or not, and otherwise by its name.
    """
    project = _ROOT / "pyproject.toml"
    checkout = project.is_file() and 'name = "jaxbptt"' in project.read_text("utf-8")
    folder = "." if Path.cwd() == _ROOT else str(_ROOT)
    what = f"-e {_quoted(f'{folder}[{extra}]')}" if checkout else _quoted(f"jaxbptt[{extra}]")
    pip = shutil.which("pip")
    if pip and Path(pip).absolute().parent == Path(sys.executable).parent:
        return f"pip install {what}"
    # The pip that a shell finds, if any, would install for another Python.
    return f"{shlex.quote(sys.executable)} -m pip install {what}"


def _quoted(text: str) -> str:
    # Always: a shell takes brackets for a pattern.
    return shlex.quote(text) if "'" in text else f"'{text}'"
