"""A notebook shows every result as a table: well-formed, escaped, with its numbers, and of arrays only what fits."""

import importlib
import pkgutil
import tempfile
from collections import namedtuple
from functools import cache, partial
from pathlib import Path
from xml.etree import ElementTree

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbptt as bptt
from jaxbptt import analysis, checkpoints, models, tasks, training
from jaxbptt.html_table import columns_table, fields_table, html_table, in_words

# What users make, weights and states, and functions that are kept together: they are no results.
NO_RESULTS = {
    *(
        "Adjoint",
        "Architecture",
        "Bidirectional",
        "Cell",
        "Chunk",
        "Columns",
        "DeviceFigures",
        "Directions",
        "Healing",
        "Influence",
        "LRUState",
        "LSTMState",
        "ModelNetwork",
    ),
    *("Network", "TruncatedBPTT", "Vocabulary"),
}


def result_types():
    """NamedTuples of all that a user can import without an underscore, but weights."""
    names = ["analysis", "interop", "models", "scans", "tasks", "textbook", "training"]
    names += [f"training.{module.name}" for module in pkgutil.iter_modules(training.__path__)]
    spaces = [bptt, *(importlib.import_module(f"jaxbptt.{name}") for name in names)]
    found = {name: value for space in spaces for name, value in vars(space).items() if hasattr(value, "_fields")}
    return {name: kind for name, kind in found.items() if not name.startswith("_") and not name.endswith("Params")}


RESULTS = {name: kind for name, kind in result_types().items() if name not in NO_RESULTS}


def step(w, h, x):
    h = jnp.tanh(w["<W>"] * h + x)
    return h, h


PARAMS = {"<W>": jnp.float32(0.5)}
ARGS = step, PARAMS, jnp.zeros(1, jnp.float32), jnp.array([[0.3], [-0.2], [0.1], [0.4]], jnp.float32)


def loss(h, ys):
    return jnp.sum(ys)


def products():
    return bptt.jacobian_products(jnp.full((4, 1, 1), 0.25))


@cache
def lags():
    return bptt.lag_contributions(*ARGS, loss)


@cache
def bias():
    return bptt.truncation_bias(*ARGS, loss, lengths=(1, 2))


@cache
def diagnosis(scale=1.0):
    return bptt.diagnose_gradient(step, PARAMS, ARGS[2], ARGS[3] * jnp.float32(scale), loss)


@cache
def certificate():
    cell = bptt.elman(1, 1)
    wrong = cell.adjoint._replace(contract=lambda *a: jax.tree.map(lambda b: 2 * b, cell.adjoint.contract(*a)))
    args = cell.init(jax.random.key(0)), cell.initial_carry(), jnp.ones((4, 1), jnp.float32)
    return bptt.certify(cell, *args, loss, scans={"<plain>": bptt.checkpointed_scan}, adjoint=wrong, repeats=1)


@cache
def forecast():
    return bptt.plan_parallel(lambda w, h, x: (w["<W>"] * h + x, h), *ARGS[1:], platform="cuda")


@cache
def compared():
    return bptt.compare_gradients({"<W>": jnp.array([3.0, 1.0])}, {"<W>": jnp.array([2.0, 1.0])})


@cache
def scored():
    scans = {"<K = 1>": partial(bptt.truncated_scan, truncation_length=1)}
    return bptt.score_gradients(*ARGS, loss, scans=scans, by_leaf=True, repeats=1)


def textbook():
    cell = bptt.elman(2, 2)
    params = bptt.network(cell, 2).init(jax.random.key(0))
    return bptt.bptt(params, jnp.eye(2, dtype=jnp.float32), cell.initial_carry(), jnp.array([1, 0]))


def run():
    """A state of training, its functions, and a chunk."""

    def chunk_loss(params, carry, chunk, *, scan, key):
        carry, ys = scan(step, params, carry, chunk.xs)
        return jnp.mean(ys**2), carry

    functions = bptt.tbptt(chunk_loss, optax.sgd(0.1))
    return functions, functions.init(PARAMS, jnp.zeros(1, jnp.float32), jax.random.key(0)), bptt.Chunk(ARGS[3], ARGS[3])


@cache
def updated():
    functions, state, chunk = run()
    return functions.update(state, chunk)


def evaluated():
    functions, state, chunk = run()
    return functions.evaluate(state, chunk)


def model():
    columns = models.Columns(("<load>",), np.array([50.0]), np.array([10.0]), (0,))
    net = models.build(models.Architecture("gru", 2, 1, 1, 1, text=False, targets=(0,), change=(0.1,)))
    params, settings = net.init(jax.random.key(0)), {"<hidden>": 2}
    return models.Model(net, params, net.cell.initial_carry(), None, columns, settings, {"errors": None}, step=7)


def errors():
    rows = 50 + 10 * np.sin(2 * np.pi * np.arange(60) / 20)[:, None]
    found = model()
    return models.validation_errors(found.network, found.params, found.columns, rows, start=40, horizons=2)


def in_file(name, content, read):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        np.save(path, content) if name.endswith("npy") else path.write_text(content)
        return read(path)


def sequences():
    return tasks.adding_problem(steps=4).sample(jax.random.key(0), 2)


# Every result from a real call, and what must be seen of it.
CALLS = {
    "Accuracy": (
        lambda: scored().rows[0].leaves["params['<W>']"],
        lambda r: [r.cosine, r.relative_error, r.norm_ratio],
    ),
    "AdaptiveTruncation": (lambda: bptt.adaptive_truncation_length(lags()), lambda r: [r.reason, r.bound]),
    "AdjointPart": (lambda: certificate().parts[-1], lambda r: ["contract", r.comparison.leaves[0].cause]),
    "BadEntry": (lambda: diagnosis(jnp.inf).forward, lambda r: [r.leaf, "inf"]),
    "BiasCurve": (lambda: bias().windowed, lambda r: [*r.relative_errors, *r.cosines]),
    "Certificate": (certificate, lambda r: ["<plain>", "NO", "float32", f"{r.rows[1].largest_error:.1e}"]),
    "CertificateRow": (lambda: certificate().rows[1], lambda r: ["<plain>", r.temporary_bytes, r.seconds]),
    "CovariantVectors": (
        lambda: bptt.covariant_lyapunov_vectors(*ARGS[:3], jnp.tile(ARGS[3], (5, 1))),
        lambda r: [*r.exponents],
    ),
    "Digits": (
        lambda: tasks.Digits(tasks.adding_problem(steps=4), sequences()),
        lambda r: [r.train.baseline, "bool[4, 2], 2 true"],
    ),
    "Evaluation": (lambda: evaluated()[1], lambda r: [r.loss, r.carry_norm]),
    "FixedPoints": (
        lambda: bptt.fixed_points(lambda w, h, x: (jnp.tanh(w * h), None), 1.5, None, jnp.array([-1.0, 0.1, 1.0])),
        lambda r: ["fixed", *(f"{abs(mu):.4g}" for mu in r.eigenvalues[:, 0])],
    ),
    "Forecast": (
        lambda: models.Forecast(("<load>",), *np.arange(12.0).reshape(3, 4, 1), 0.9, ("<held>",), 4),
        lambda r: ["<load>, low", 7, 11, "90 %", "<held>"],
    ),
    "GradientComparison": (compared, lambda r: ["gradient['<W>']", "5.0e-01", r.leaves[0].cause]),
    "GradientDiagnosis": (diagnosis, lambda r: [r.sentence, r.cause, r.rates.weights, *r.exponents]),
    "GradientFlow": (
        lambda: bptt.gradient_flow(*ARGS, loss),
        lambda r: [r.loss, *r.norms, "contribution_norms['<W>']", "‖aₜ‖, [time]."],
    ),
    "GradientRates": (lambda: diagnosis().rates, lambda r: [*r]),
    "JacobianOperators": (
        lambda: bptt.jacobian_operators(*ARGS[:-1], ARGS[3]),
        lambda r: ["function push", 4, "float32"],
    ),
    "KeptContributions": (
        lambda: bptt.kept_contributions(*ARGS, loss, influence=bptt.influences.rtrl(), max_lag=2),
        lambda r: [*r.cosines, *r.norm_ratios, *r.exact_norms],
    ),
    "LagContributions": (lags, lambda r: [*r.norms, *r.cosines]),
    "LeafComparison": (lambda: compared().leaves[0], lambda r: ["gradient['<W>']", "no", r.cosine, r.cause]),
    "LogSingularValues": (
        lambda: bptt.product_log_singular_values(products()),
        lambda r: ["float64[4, 1], values from -4.159 to 0", "bool[4, 1], 4 true"],
    ),
    "LyapunovSpectrum": (
        lambda: bptt.lyapunov_exponents(*ARGS),
        lambda r: [*r.exponents, *r.standard_errors, r.kaplan_yorke_dimension],
    ),
    "MappedArray": (lambda: in_file("<x>.npy", np.arange(9.0), tasks.map_array), lambda r: ["<x>.npy", "0 to 8"]),
    "MappedText": (
        lambda: in_file("<x>.txt", "ab<b>", tasks.map_text),
        lambda r: ["<x>.txt", "60, 62, 97, 98", "uint8[5]"],
    ),
    "Metrics": (lambda: updated()[1], lambda r: [r.loss, r.gradient_norm]),
    "Model": (model, lambda r: ["<load>", "settings", "<hidden> 2", "params.", 7]),
    "NewtonStates": (
        lambda: bptt.newton_states(*ARGS[:3], jnp.tile(ARGS[3], (5, 1)), max_iterations=1),
        lambda r: [r.iterations, r.residual, "no", "affine recurrences that were solved"],
    ),
    "NextStep": (
        lambda: tasks.next_step(series(), steps=2, batch=1),
        lambda r: ["cross_entropy", "[2, 1, 2]"],
    ),
    "NormalityDeparture": (
        lambda: bptt.departure_from_normality(jnp.array([[[0.0, 2.0], [0.0, 0.0]]])),
        lambda r: [*r.absolute, *r.relative],
    ),
    "ParallelPlan": (forecast, lambda r: [r.reason, "parallel_adjoint_scan", f"{r.rows[1].depth:,.0f}"]),
    "Plan": (lambda: bptt.plan(*ARGS, memory_bytes=1e6), lambda r: [r.reason, r.predicted_bytes, f"function {r.name}"]),
    "PrincipalComponents": (
        lambda: bptt.principal_components(jnp.array([[1.0, 0.0], [3.0, 1.0], [2.0, 0.5], [7.0, 1.0]])),
        lambda r: [*r.explained_variance],
    ),
    "Record": (
        lambda: checkpoints.Record(1234, {"<seed>": 0}, {"loss": 0.5}),
        lambda r: ["1,234", "<seed> 0", "loss 0.5"],
    ),
    "ScaledProducts": (products, lambda r: ["all values 1", *r.log_scales]),
    "Schedule": (
        lambda: bptt.checkpoint_schedule(9, 3),
        lambda r: [r.forward_steps, *r.moves[0, :2], "reverse the step"],
    ),
    "Scoreboard": (
        scored,
        lambda r: ["<K = 1>", "scan", "1.0000", f"{r.rows[0].relative_error:.2g}", f"{r.rows[0].norm_ratio:.3g}"],
    ),
    "ScoreboardRow": (
        lambda: scored().rows[0],
        lambda r: ["<K = 1>", r.relative_error, r.norm_ratio, r.bytes, r.flops, r.seconds],
    ),
    "Sequences": (sequences, lambda r: ["bool[4, 2], 2 true"]),
    "Series": (lambda: series(), lambda r: ["<x>.txt", "<, a", "0, 1, 0, 1"]),
    "StrategyForecast": (lambda: forecast().rows[0], lambda r: ["adjoint_scan", r.flops, r.temporary_bytes]),
    "Table": (
        lambda: in_file(
            "<x>.csv", "day,<b>load\n" + "".join(f"2024-01-0{i},{i}.5\n" for i in range(1, 9)), tasks.read_table
        ),
        lambda r: ["<b>load", 1.5, 8.5, "2024-01-08", *r.read_as],
    ),
    "Task": (lambda: tasks.adding_problem(steps=4), lambda r: ["mean_squared_error", r.baseline, "function"]),
    "TemporalContributions": (
        lambda: bptt.temporal_contributions(*ARGS, loss),
        lambda r: ["contributions['<W>']", *r.contributions["<W>"]],
    ),
    "TextbookBPTT": (textbook, lambda r: [r.loss, *r.db, "∂L/∂W_hh, [hidden, hidden]."]),
    "TrainState": (lambda: updated()[0], lambda r: ["params['<W>']", r.params["<W>"], "key<fry>[]"]),
    "TruncationBias": (bias, lambda r: [1, 2, *r.windowed.cosines, *r.truncated.relative_errors]),
    "ValidationErrors": (errors, lambda r: ["<load>", f"{r.network[1, 0]:.3g}", f"{r.persistence[0, 0]:.3g}"]),
}


def series():
    return in_file("<x>.txt", "<a<a", tasks.read_text)


def text_of(html):
    """What a reader sees of a fragment, which must be well-formed."""
    assert html.isprintable()
    return "\n".join(ElementTree.fromstring(html).itertext())


def test_every_result_is_a_table():
    assert {name for name, kind in RESULTS.items() if not hasattr(kind, "_repr_html_")} == set()
    assert set(RESULTS) == set(CALLS), "a call in CALLS for each type of result"


@pytest.mark.parametrize("name", CALLS)
def test_a_result_is_shown(name):
    call, seen = CALLS[name]
    result = call()
    assert type(result) is RESULTS[name]
    html = result._repr_html_()
    assert "<table style='color: inherit'>" in html, "quirks mode has tables in black"
    assert "<W>" not in html
    cells = text_of(f"<div>{html}</div>")
    for value in seen(result):
        assert in_words(value) in cells, (value, cells)


def test_traced_and_batched_results_show_shapes():
    def flow(xs):
        result = bptt.gradient_flow(*ARGS[:3], xs, loss)
        seen.append(text_of(result._repr_html_()))
        return result

    def others(xs):
        results = bptt.lag_contributions(*ARGS[:3], xs, loss), bptt.lyapunov_exponents(*ARGS[:3], xs)
        seen.extend(text_of(result._repr_html_()) for result in results)

    seen = []
    batch = jax.jit(jax.vmap(flow))(jnp.stack([ARGS[3], 2 * ARGS[3]]))
    jax.eval_shape(others, ARGS[3])
    for cells in seen:
        assert "float32[4]" in cells or "float32[1]" in cells
        assert "values from" not in cells
    assert "norms\nfloat32[2, 4], values from" in text_of(batch._repr_html_())
    assert "norms\nfloat32[4]\n" in text_of(jax.eval_shape(flow, ARGS[3])._repr_html_())


ARRAYS = {
    "float64[2, 2], all values 1": np.ones((2, 2)),
    "float64[7], values from 0 to 5, 1 not finite": np.array([0, 1, 2, 3, 4, 5, np.nan]),
    "float64[7], 7 not finite": np.full(7, np.nan),
    "bfloat16[8], values from 0 to 7": jnp.arange(8, dtype=jnp.bfloat16),
    "complex128[7], all absolute values 5": np.full(7, 3 + 4j),
    "int64[3]: 1,000, -2, 3": np.array([1000, -2, 3]),
    "bool[9], 0 true": np.zeros(9, bool),
    "float64[0, 3], empty": np.zeros((0, 3)),
    "1.5": jnp.bfloat16(1.5),
    "key<fry>[2]": jax.random.split(jax.random.key(0)),
    "object[2]": np.array([{}, None]),
    "float32[5]": jax.ShapeDtypeStruct((5,), jnp.float32),
    "2024-05-01": np.datetime64("2024-05-01", "us"),
    "2024-05-01 06:30": np.datetime64("2024-05-01T06:30", "s"),
    "NaT": np.datetime64("NaT", "s"),
    "function scan": partial(bptt.scan, unroll=2),
    "none": None,
    "no": np.False_,
    "nan": float("nan"),
}


@pytest.mark.parametrize("words", ARRAYS)
def test_values_in_words(words):
    assert in_words(ARRAYS[words]) == words


def test_what_is_gone_or_large_has_a_shape():
    gone = jnp.ones(3)
    gone.delete()
    assert in_words(gone) == "float64[3]"
    assert in_words(np.broadcast_to(np.float32(0), (10**5, 10**5))) == "float32[100000, 100000]"
    assert len(in_words("x" * 10**6)) < 1_100


def test_long_tables_are_cut_and_long_trees_too():
    table = html_table(("i", "square"), [(str(i), str(i * i)) for i in range(100)])
    cells = text_of(table)
    assert "… 87 more" in cells
    assert "81" in cells.split()
    assert "100" not in cells.split()
    assert "9801" in cells.split()
    assert table.count("<tr>") == 1 + 10 + 1 + 3
    curve = analysis.BiasCurve(np.arange(1000) / 8, {f"leaf {i}": np.ones(2) for i in range(20)})
    assert "… 987 more" in text_of(columns_table(curve, {"error": curve.relative_errors}))
    assert "12 more" in text_of(fields_table(curve))


def test_tags_are_text():
    html = html_table(("<i>", "&"), [("<script>alert(1)</script>", "'")], title="<b>", notes=["<img>"])
    assert "<script>" not in html
    assert list(ElementTree.fromstring(html).itertext()) == [
        "<b>",
        "<i>",
        "&",
        "<script>alert(1)</script>",
        "'",
        "<img>",
    ]


def test_without_docstrings():
    """As `python -OO` has it."""
    kind = namedtuple("kind", "a b")
    kind.__doc__ = None
    assert "3" in text_of(fields_table(kind(3, [np.ones(2), None])))
