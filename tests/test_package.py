"""What a user imports: the public names, and nothing that was not asked for."""

import re
import subprocess
import sys
import types
from pathlib import Path

import optax
import pytest

import jaxbptt as bptt
from jaxbptt import words

ROOT = Path(__file__).parents[1]


def test_contract_names():
    names = "load Cell Adjoint elman gru lstm stack network scan adjoint_scan losses state_jacobians jacobian_products"
    names += " truncated_scan windowed_scan checkpointed_scan cudnn_scan checkpoint_schedule surviving_paths plan plan_parallel"
    names += (
        " tbptt streams tasks sharding TrainState Chunk as_lax bidirectional valid_from_lengths rate RateParams dropout"
    )
    names += " gradient_flow lag_contributions certify compare_gradients ElmanParams GRUParams LSTMParams LSTMState"
    names += (
        " fixed_points covariant_lyapunov_vectors principal_components participation_ratio departure_from_normality lru"
        " min_gru min_lstm rg_lru"
    )
    assert [name for name in names.split() if not hasattr(bptt, name)] == []
    assert callable(bptt.plots.plot_gradient_flow)


def test_types_of_results_live_in_namespaces():
    """At the top are functions, and of types only those that users make."""
    made_by_users = "Cell Adjoint ElmanParams GRUParams LSTMParams LSTMState Network NetworkParams Chunk TrainState"
    made_by_users += " Bidirectional Directions RateParams LayerNormLSTMParams DropoutParams LRUParams"
    made_by_users += " LRUState MinGRUParams MinLSTMParams RGLRUParams Influence"
    types_at_the_top = {name for name in dir(bptt) if isinstance(getattr(bptt, name), type) and name[0] != "_"}
    assert types_at_the_top == set(made_by_users.split())
    results = "Certificate CertificateRow GradientComparison LeafComparison BiasCurve LagContributions TruncationBias"
    results += " GradientDiagnosis GradientRates BadEntry GradientFlow AdaptiveTruncation LogSingularValues"
    results += " FixedPoints CovariantVectors PrincipalComponents NormalityDeparture AdjointPart ScaledProducts TemporalContributions LyapunovSpectrum JacobianOperators Plan ParallelPlan StrategyForecast DeviceFigures"
    results += " Accuracy Scoreboard ScoreboardRow KeptContributions"
    assert {name for name, value in vars(bptt.analysis).items() if isinstance(value, type)} == set(results.split())
    assert bptt.scans.Schedule is type(bptt.checkpoint_schedule(3, 2))
    assert isinstance(bptt.tbptt(lambda *_: (0.0, ()), optax.sgd(0.1)), bptt.training.TruncatedBPTT)
    assert (bptt.training.Chunk, bptt.training.TrainState) == (bptt.Chunk, bptt.TrainState)
    assert hasattr(bptt.training, "Metrics")
    assert hasattr(bptt.textbook, "TextbookBPTT")


def test_functions_of_the_analysis_are_those_at_the_top():
    for name, value in vars(bptt.analysis).items():
        if isinstance(value, types.FunctionType):
            assert getattr(bptt, name) is value, name


def test_import_is_light_and_changes_nothing():
    """The core runs without matplotlib and rich, and leaves the configuration of jax alone."""
    code = (
        "import sys, jax; before = dict(jax.config.values); import jaxbptt; "
        "assert not {'matplotlib', 'rich', 'torch', 'flax', 'optimistix', 'orbax', 'sklearn'} & set(sys.modules), 'heavy import'; "
        "assert dict(jax.config.values) == before"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_plots_without_matplotlib_say_what_to_install():
    code = (
        "import sys; sys.modules['matplotlib'] = None; import jaxbptt\n"
        "try: jaxbptt.plots\nexcept ImportError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert re.fullmatch(r"jaxbptt\.plots needs matplotlib[.\w]*: (.*)\n", run.stdout)[1] == words.install_command(
        "report"
    )


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'jaxbptt' has no attribute 'nothing'"):
        _ = bptt.nothing


# What each part of the package may import beside itself and the base that everything stands on.
BASE = ("trees", "arrays", "array_types", "along_time", "words", "html_table", "files", "platforms")
ALLOWED = {
    "cells": (),
    "programs": ("cells",),
    "influences": ("cells", "programs"),
    "scans": ("cells", "programs", "influences"),
    "analysis": ("cells", "programs", "influences", "scans"),
    "training": ("cells", "programs", "influences", "scans", "analysis", "tasks"),
    "tasks": (),
    "plots": ("analysis", "models", "scans", "training"),
    "network": ("cells", "scans"),
    "bidirectional": ("cells", "scans"),
    "models": ("cells", "network", "scans", "tasks", "training"),
    "interop": ("bidirectional", "cells", "models", "network"),
    "textbook": ("cells", "network"),
    "reports": ("analysis", "cells", "models", "network", "plots", "scans", "tasks", "textbook", "training"),
}
STRATEGIES = (
    "exact",
    "adjoint",
    "truncated",
    "windowed",
    "checkpointed",
    "cudnn",
    "parallel",
    "parallel_adjoint",
    "newton",
    "forward",
)


def imports_of(file):
    lines = [line.split() for line in file.read_text().splitlines() if re.match(r"\s*from jaxbptt", line)]
    return [name.removeprefix("jaxbptt.") for _, name, *_ in lines if name != "jaxbptt"]


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_run_one_way(part):
    package = ROOT / "jaxbptt"
    files = list((package / part).rglob("*.py")) or [package / f"{part}.py"]
    for file in files:
        parts = {name.split(".")[0] for name in imports_of(file)}
        assert parts <= {part, *BASE, *ALLOWED[part]}, (file, parts)


def test_strategies_never_import_each_other():
    for strategy in STRATEGIES:
        imported = imports_of(ROOT / "jaxbptt" / "scans" / f"{strategy}.py")
        assert not {f"scans.{other}" for other in STRATEGIES} & set(imported), (strategy, imported)
