"""What a user imports: the public names, and nothing that was not asked for."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

import jaxbptt as bptt

ROOT = Path(__file__).parents[1]


def test_contract_names():
    names = "Cell Adjoint elman gru lstm stack network scan adjoint_scan losses state_jacobians jacobian_products"
    names += " truncated_scan windowed_scan checkpointed_scan checkpoint_schedule surviving_paths plan"
    names += " tbptt streams tasks sharding TrainState Chunk"
    names += " gradient_flow lag_contributions certify compare_gradients ElmanParams GRUParams LSTMParams LSTMState"
    assert [name for name in names.split() if not hasattr(bptt, name)] == []
    assert callable(bptt.plots.plot_gradient_flow)


def test_import_is_light_and_changes_nothing():
    """The core runs without matplotlib and rich, and leaves the configuration of jax alone."""
    code = (
        "import sys, jax; before = dict(jax.config.values); import jaxbptt; "
        "assert not {'matplotlib', 'rich', 'torch', 'flax', 'orbax', 'sklearn'} & set(sys.modules), 'heavy import'; "
        "assert dict(jax.config.values) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plots_without_matplotlib_say_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None; import jaxbptt\n"
        "try: jaxbptt.plots\nexcept ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "pip install 'jaxbptt[report]'" in run.stdout


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'jaxbptt' has no attribute 'nothing'"):
        _ = bptt.nothing


def test_imports_run_one_way():
    """Cells and scans know nothing of the rest, and strategies nothing of each other; arrays and words are below all."""
    package = ROOT / "jaxbptt"
    allowed = {
        "cells": ("jaxbptt.cells",),
        "scans": (
            "jaxbptt.cells.cell",
            *(
                f"jaxbptt.scans.{shared}"
                for shared in (
                    *("recurrence", "tracing", "reverse_mode", "backward", "contraction", "perturbed"),
                    *("along_time", "resets", "schedule", "segments", "parts", "linearized", "residuals"),
                    *("array_types", "devices"),
                )
            ),
            "jaxbptt.scans",  # `from jaxbptt.scans import schedule`
        ),
        "analysis": ("jaxbptt.cells", "jaxbptt.scans", "jaxbptt.analysis"),
        "training": ("jaxbptt.cells", "jaxbptt.scans", "jaxbptt.analysis", "jaxbptt.training", "jaxbptt.tasks"),
    }
    for folder, prefixes in allowed.items():
        for file in (package / folder).glob("*.py"):
            imports = [line.split()[1] for line in file.read_text().splitlines() if line.startswith("from jaxbptt")]
            assert all(name.startswith((*prefixes, "jaxbptt.arrays", "jaxbptt.words")) for name in imports), (
                file,
                imports,
            )


@pytest.mark.costly
@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path):
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code), "commit the notebook with its outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": path.parent}}).execute()
