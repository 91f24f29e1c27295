"""A report on three networks, which takes a quarter of a minute: `test_report.py` reads its words, a browser draws it."""

import contextlib
import io
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from jaxbptt.__main__ import main
from jaxbptt.reports import page as pages
from jaxbptt.reports.report import Row

STEPS = 24
TAGS = "<img src=x onerror=alert(1)>"


class WholeReport(NamedTuple):
    """Files text.html and numbers.html in a folder, what the command printed, and the numbers on the page."""

    folder: Path
    printed: str
    reports: Any


def make(folder):
    """On a text that is named and filled with tags; and the same networks beside numbers whose columns are named so."""
    data = folder.parent / f"{TAGS}.txt"
    data.write_text("</script><script>alert(2)</script><!--\u2028<b id=evil>${x}`'\"&amp;\\ " * 3)
    given = {}
    render = pages.render

    def keep(*args, **options):
        given.update(args=args, options=options)
        return render(*args, **options)

    printed = io.StringIO()
    sizes = ["--hidden", "6", "--steps", str(STEPS), "--batch", "2"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(pages, "render", keep)
        with jax.numpy_dtype_promotion("strict"):
            assert main(["report", "--text", str(data), *sizes, "--output", str(folder / "text.html")]) == 0
    assert [file.name for file in folder.iterdir()] == ["text.html"]
    wave = np.sin(np.arange(STEPS)[:, None] * [0.3, 0.7])
    row = Row(data.name, None, ("<b id=evil>a</b>", "</script><script>alert(3)</script>"), wave)
    numbers = render(*given["args"], **given["options"] | {"row": row})
    (folder / "numbers.html").write_text(numbers, encoding="utf-8")
    return WholeReport(folder, printed.getvalue(), given["args"][1])
