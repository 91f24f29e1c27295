"""The notebooks run as they are committed, and so do the solutions of their exercises."""

import importlib.util
import os
import re
import tomllib
from pathlib import Path

import nbformat
import pytest
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
# The one that takes the least time first: it is run with the quick tests.
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"), key=lambda path: (path.stem[:2] != "03", path.stem))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == kind]


def solutions(path):
    """The code of every folded solution, one string for each exercise."""
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    folded = re.findall(r"<details><summary>Solution</summary>\n\n(.*?)\n</details>", text, re.DOTALL)
    return ["\n".join(re.findall(r"```python\n(.*?)```", solution, re.DOTALL)) for solution in folded]


@every_notebook
def test_every_notebook_has_its_parts(path):
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    assert "on two cores" in text.split("\n## ")[0]  # how long it takes, before the first section
    exercises = re.findall(r"^\*\*(\d)\. ", text.split(" Exercises\n")[1], re.MULTILINE)
    assert exercises == [str(i + 1) for i in range(len(exercises))]
    assert 3 <= len(exercises) <= 5
    assert len(solutions(path)) == len(exercises)
    assert all(solutions(path)), "a solution without code"


@every_notebook
def test_outputs_are_committed_and_small(path):
    code = cells(path, "code")
    assert all(cell.execution_count for cell in code), "commit the notebook with its outputs"
    assert not [cell.source for cell in code if any(output.output_type == "error" for output in cell.outputs)]
    assert path.stat().st_size < 700_000
    drawn = [cell for cell in code if "plt.subplots" in cell.source or "plt.figure" in cell.source]
    assert all(cell.metadata.get("tags") == ["hide-input"] for cell in drawn), "code that draws is folded"


@every_notebook
def test_it_installs_the_package_where_that_is_missing(path, monkeypatch):
    """From the repository, with an extra that exists; and does nothing where the package is there."""
    first = cells(path, "code")[0].source
    assert first == cells(NOTEBOOKS[0], "code")[0].source
    installed = []

    class Shell:
        def run_line_magic(self, magic, line):
            installed.append((magic, line))

    program = TransformerManager().transform_cell(first)
    exec(program, {"get_ipython": Shell})
    assert installed == []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    exec(program, {"get_ipython": Shell})
    assert installed == [("pip", 'install --quiet "..[notebooks]"')]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "notebooks" in project["optional-dependencies"]


@pytest.mark.costly
@every_notebook
def test_notebook_and_its_solutions_run(path, monkeypatch):
    if path.stem[:2] == "05":  # it trains for long enough that its programs had better be optimised a little
        monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"].replace("optimization_level=0", "optimization_level=1"))
    notebook = nbformat.read(path, as_version=4)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in solutions(path)]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
