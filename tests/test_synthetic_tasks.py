"""Targets are what a plain recount of the inputs gives, and each baseline is the loss of the predictor it is named for."""

import math
import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import solve_ivp

from jaxbptt import losses, tasks
from jaxbptt.tasks import chaotic

TEXT = tasks.Series("song", np.array([0, 1, 2, 0, 0, 3, 1, 4] * 3 + [5], np.int32), tuple("abcdef"))

# name: (task, [time, inputs], shape of a row's targets, steps that count)
TASKS = {
    "adding": (lambda: tasks.adding_problem(steps=7), (7, 2), (7, 1), 1),
    "copy": (lambda: tasks.copy_memory(delay=4, symbols=3, length=2), (8, 5), (8,), 8),
    "order": (lambda: tasks.temporal_order(steps=20), (20, 8), (20,), 1),
    "xor": (lambda: tasks.delayed_xor(delay=3), (8, 1), (8,), 4),
    "lorenz": (lambda: tasks.lorenz(steps=6), (6, 3), (6, 3), 6),
    "mackey-glass": (lambda: tasks.mackey_glass(steps=6), (6, 1), (6, 1), 6),
    "rows": (lambda: tasks.digits(by="rows").train, (8, 8), (8,), 1),
    "pixels": (lambda: tasks.digits(by="pixels").train, (64, 1), (64,), 1),
    "characters": (lambda: tasks.characters(TEXT, steps=5), (5, 6), (5,), 5),
}


def draw(task, batch, seed=0):
    return tasks.Sequences(*map(np.asarray, jax.jit(task.sample, static_argnums=1)(jax.random.key(seed), batch)))


def assert_is_baseline(task, outputs, sequences, *, of_baseline=0.0):
    """Rows are independent, so their spread says how far a mean over them may be off."""
    loss = lambda output, y, mask: getattr(losses, task.loss)(output, y, mask=mask)
    rows = np.asarray(jax.jit(jax.vmap(loss, in_axes=1))(outputs, sequences.ys, sequences.mask))
    tolerance = 4 * math.hypot(rows.std() / math.sqrt(len(rows)), of_baseline) + 1e-6
    assert tolerance < 0.1 * task.baseline
    assert abs(rows.mean() - task.baseline) < tolerance


@pytest.mark.parametrize(("make", "inputs", "targets", "counted"), TASKS.values(), ids=TASKS)
@pytest.mark.costly
def test_every_task(make, inputs, targets, counted):
    task = make()
    batch = 3
    xs, ys, mask = sequences = draw(task, batch)
    classify = task.loss == "cross_entropy"
    assert (xs.dtype, ys.dtype, mask.dtype) == (np.float32, np.int32 if classify else np.float32, bool)
    assert xs.shape == (inputs[0], batch, inputs[1])
    assert ys.shape == (targets[0], batch, *targets[1:])
    assert task.input_size == inputs[1]
    assert mask.sum(0).tolist() == [counted] * batch
    if counted == 1:
        assert mask[-1].all()
    if classify:
        assert 0 <= ys.min() <= ys.max() < task.output_size
    else:
        assert task.output_size == ys.shape[-1]
    jax.tree.map(np.testing.assert_array_equal, sequences, draw(task, batch))
    assert np.any(draw(task, batch, seed=1).xs != xs)
    assert len(np.unique(xs, axis=1)[0]) > 1, "rows differ"
    assert hasattr(losses, task.loss)
    with jax.enable_x64(False):
        narrow = jax.eval_shape(lambda key: make().sample(key, batch), jax.random.key(0))
        assert [(leaf.shape, leaf.dtype) for leaf in narrow] == [(leaf.shape, leaf.dtype) for leaf in sequences]


def test_adding():
    task = tasks.adding_problem(steps=5)
    sequences = draw(task, 4_000)
    values, markers = np.moveaxis(sequences.xs, -1, 0)
    assert ((values >= 0) & (values < 1)).all()
    assert abs(values.mean() - 0.5) < 0.01
    places = [tuple(np.flatnonzero(row)) for row in markers.T]
    assert set(places) == {(first, second) for first in (0, 1) for second in (2, 3, 4)}
    expected = [values[list(place), row].sum() for row, place in enumerate(places)]
    np.testing.assert_allclose(sequences.ys[-1, :, 0], expected, rtol=1e-6)
    assert_is_baseline(task, np.ones_like(sequences.ys), sequences)


def test_copy():
    delay, symbols, length = 6, 3, 4
    task = tasks.copy_memory(delay=delay, symbols=symbols, length=length)
    sequences = draw(task, 200)
    assert (sequences.xs.sum(-1) == 1).all()
    for xs, ys in zip(sequences.xs.argmax(-1).T.tolist(), sequences.ys.T.tolist(), strict=True):
        said = xs[:length]
        assert set(said) <= {0, 1, 2}
        assert xs == [*said, *[3] * (delay - 1), 4, *[3] * length]
        assert ys == [*[3] * (delay + length), *said]
        assert ys.index(said[0]) - (length - 1) == delay + 1, "steps from the last symbol read to the first said"
    assert set(Counter(sequences.ys[-length:].ravel().tolist())) == {0, 1, 2}
    knows_when = np.full((*sequences.ys.shape, symbols + 1), -1e9)
    knows_when[:-length, :, symbols] = 0
    knows_when[-length:, :, :symbols] = 0
    assert_is_baseline(task, knows_when, sequences)


def test_copy_as_published():
    """Arjovsky, Shah and Bengio: sequences of T + 20 steps, 10 log 8 / (T + 20)."""
    task = tasks.copy_memory(delay=100)
    assert draw(task, 1).xs.shape == (120, 1, 10)
    assert task.output_size == 9
    assert task.baseline == pytest.approx(10 * math.log(8) / 120)


def test_temporal_order():
    task = tasks.temporal_order(steps=100)
    sequences = draw(task, 2_000)
    assert (sequences.xs.sum(-1) == 1).all()
    places, classes = set(), Counter()
    for xs, y in zip(sequences.xs.argmax(-1).T, sequences.ys[-1].tolist(), strict=True):
        text = "".join("EBabcdXY"[i] for i in xs)
        assert (text[0], text[-1]) == ("E", "B")
        assert set(text[1:-1]) <= set("abcdXY")
        place = [i for i, symbol in enumerate(text) if symbol in "XY"]
        assert ["XX", "XY", "YX", "YY"][y] == "".join(text[i] for i in place)
        places.add(place[0])
        places.add(place[1])
        classes[y] += 1
    assert places == {*range(10, 21), *range(50, 61)}
    # The last input is always the same, so that the frequencies of the classes are all there is to know.
    assert all(abs(count / 2_000 - 1 / 4) < 4 * math.sqrt(3 / 16 / 2_000) for count in classes.values())
    assert task.baseline == pytest.approx(math.log(4))


@pytest.mark.parametrize("delay", [0, 1, 4])
def test_xor(delay):
    steps, batch = 12, 2_000
    task = tasks.delayed_xor(delay=delay, steps=steps)
    sequences = draw(task, batch)
    bits = sequences.xs[..., 0].astype(int)
    assert set(np.unique(bits)) == {0, 1}
    pairs = Counter()
    for t in range(steps):
        assert (sequences.mask[t] == (t - delay - 1 >= 0)).all()
        if t - delay - 1 >= 0:
            assert (sequences.ys[t] == (bits[t - delay] != bits[t - delay - 1])).all()
            pairs.update(zip(bits[t].tolist(), sequences.ys[t].tolist(), strict=True))
    # What is seen at the step itself says nothing. Pairs at different steps are independent too, or nearly.
    total = pairs.total()
    assert all(abs(count / total - 1 / 4) < 6 * math.sqrt(3 / 16 / total) for count in pairs.values())
    assert len(pairs) == 4
    assert task.baseline == pytest.approx(math.log(2))


def test_lorenz_against_scipy():
    start = np.array([1.0, 2.0, 20.0])
    series = tasks.lorenz_series(200, initial=start, transient=0)
    rate = lambda _, s: [10 * (s[1] - s[0]), s[0] * (28 - s[2]) - s[1], s[0] * s[1] - 8 / 3 * s[2]]
    expected = solve_ivp(rate, (0, 1), start, "DOP853", t_eval=np.arange(100) / 100, rtol=1e-11, atol=1e-11).y.T
    assert series.dtype == jnp.float64
    np.testing.assert_allclose(series[:100], expected, atol=2e-4)
    np.testing.assert_allclose(tasks.lorenz_series(40, dt=0.05, initial=start, transient=0), series[::5], atol=1e-9)
    np.testing.assert_allclose(tasks.lorenz_series(50, initial=start, transient=1.5), series[150:], atol=1e-9)
    batch = tasks.lorenz_series(30, initial=np.stack([start + 1, start]), transient=0)
    np.testing.assert_allclose(batch[:, 1], series[:30], rtol=1e-12)


def test_lorenz_moments():
    """From d⟨z⟩/dt = d⟨x²⟩/dt = 0 on the attractor: ⟨x²⟩ = ⟨xy⟩ = β⟨z⟩. That ⟨z⟩ is 23.55 is in every table."""
    x, y, z = np.asarray(chaotic._draw_lorenz(jax.random.key(3), 512, 1_000, 0.01), np.float64).reshape(-1, 3).T
    assert z.mean() == pytest.approx(23.55, abs=0.15)
    assert np.mean(x * x) == pytest.approx(8 / 3 * z.mean(), rel=0.01)
    assert np.mean(x * y) == pytest.approx(8 / 3 * z.mean(), rel=0.01)


def plain_mackey_glass(start, tau, length, per_unit=100):
    """Euler's midpoint method in steps of 0.01, on a list."""
    lag, h = tau * per_unit, 1 / per_unit
    x = [start] * (lag + 1)
    rate = lambda now, delayed: 0.2 * delayed / (1 + delayed**10) - 0.1 * now
    while len(x) <= lag + (length - 1) * per_unit:
        middle = x[-1] + h / 2 * rate(x[-1], x[-1 - lag])
        x.append(x[-1] + h * rate(middle, (x[-1 - lag] + x[-lag]) / 2))
    return np.array(x[lag::per_unit])[:, None]


@pytest.mark.parametrize("tau", [1, 17])
def test_mackey_glass_against_a_plain_loop(tau):
    series = tasks.mackey_glass_series(150, tau=tau, initial=np.array([0.5, 1.2]), transient=0)
    assert series.shape == (150, 2, 1)
    np.testing.assert_allclose(series[:, 1], plain_mackey_glass(1.2, tau, 150), atol=2e-4)
    np.testing.assert_allclose(series[:, 0], plain_mackey_glass(0.5, tau, 150), atol=2e-4)
    late = tasks.mackey_glass_series(50, tau=tau, initial=np.float64(1.2), transient=100)
    np.testing.assert_allclose(late, series[100:, 1], rtol=1e-9)


@pytest.mark.parametrize(
    ("make", "own_error"),
    [
        (lambda steps: tasks.lorenz(steps=steps), 0.01),
        (lambda steps: tasks.lorenz(steps=steps, dt=0.1), 0.01),
        (lambda steps: tasks.mackey_glass(steps=steps), 0.003),
        (lambda steps: tasks.mackey_glass(steps=steps, tau=30), 0.003),
    ],
    ids=["lorenz", "slow lorenz", "mackey-glass", "mackey-glass 30"],
)
@pytest.mark.costly
def test_chaotic(make, own_error):
    task = make(200)
    sequences = draw(task, 512, seed=5)
    np.testing.assert_array_equal(sequences.ys[:-1], sequences.xs[1:])
    np.testing.assert_allclose(sequences.xs.mean((0, 1)), 0, atol=0.15)
    np.testing.assert_allclose(sequences.xs.std((0, 1)), 1, atol=0.05)
    # The first step is as much on the attractor as the others.
    np.testing.assert_allclose(sequences.xs[0].mean(0), 0, atol=4 / math.sqrt(512))
    assert_is_baseline(task, sequences.xs, sequences, of_baseline=own_error * task.baseline)


def test_default_series():
    with jax.enable_x64(False):
        for series, features in [(tasks.lorenz_series(3), 3), (tasks.mackey_glass_series(3), 1)]:
            assert series.shape == (3, features)
            assert series.dtype == jnp.float32
        assert tasks.lorenz_series(2, initial=[1, 1, 1]).dtype == jnp.float32


def test_digits():
    from sklearn.datasets import load_digits

    known = {image.astype(int).tobytes(): number for image, number in zip(*load_digits(return_X_y=True), strict=True)}
    assert len(known) == 1797

    def images(sequences):
        rows = (16 * sequences.xs).swapaxes(0, 1).reshape(sequences.xs.shape[1], 64).astype(int)
        return {row.tobytes(): number for row, number in zip(rows, sequences.ys[-1].tolist(), strict=True)}

    for by in ("rows", "pixels"):
        train, test = tasks.digits(by=by)
        test = tasks.Sequences(*map(np.asarray, test))
        drawn, held_out = images(draw(train, 30_000)), images(test)
        assert test.xs.dtype == np.float32
        assert len(held_out) == 359
        assert not held_out.keys() & drawn.keys()
        assert {**held_out, **drawn} == known
        np.testing.assert_array_equal(test.mask[-1], True)
        assert test.mask.sum() == 359
    assert images(tasks.Sequences(*map(np.asarray, tasks.digits(seed=1).test))) != held_out
    frequencies = np.array(list(Counter(known.values()).values())) / 1797
    assert train.baseline == pytest.approx(-np.sum(frequencies * np.log(frequencies)), abs=1e-3)


def test_characters():
    text = "".join(TEXT.symbols[i] for i in TEXT.values)
    sequences = draw(tasks.characters(TEXT, steps=5), 1_000)
    xs = ["".join("abcdef"[i] for i in row) for row in sequences.xs.argmax(-1).T]
    ys = ["".join("abcdef"[i] for i in row) for row in sequences.ys.T]
    assert {x + y[-1] for x, y in zip(xs, ys, strict=True)} == {text[i : i + 6] for i in range(len(text) - 5)}
    assert all(x[1:] == y[:-1] for x, y in zip(xs, ys, strict=True))
    assert (sequences.xs.sum(-1) == 1).all()
    assert draw(tasks.characters(TEXT, steps=24), 2).xs.shape == (24, 2, 6)


def test_characters_of_the_standard_library():
    task = tasks.characters(steps=40)
    series = tasks.read_standard_library()
    counts = Counter(series.values.tolist())
    logits = np.log([counts[i] / len(series.values) for i in range(len(series.symbols))])
    sequences = draw(task, 500)
    assert_is_baseline(task, np.broadcast_to(logits, (*sequences.ys.shape, len(logits))), sequences)


NUMBERS = tasks.Series("prices", np.zeros((9, 2)), ())
BAD = {
    "adding": (lambda: tasks.adding_problem(steps=1), ValueError, r"steps=1, but each half needs .*: pass steps=2 or"),
    "float": (lambda: tasks.adding_problem(steps=9.0), TypeError, r"steps is 9\.0, but a Python integer is expected"),
    "bool": (lambda: tasks.adding_problem(steps=True), TypeError, "steps is True, but a Python integer is expected"),
    "delay": (lambda: tasks.copy_memory(delay=0), ValueError, "delay=0, but go takes a step of its own: pass delay=1"),
    "symbols": (lambda: tasks.copy_memory(delay=1, symbols=1), ValueError, "symbols=1, but a single symbol leaves"),
    "length": (lambda: tasks.copy_memory(delay=1, length=0), ValueError, "length=0, but there must be a symbol"),
    "order": (lambda: tasks.temporal_order(steps=9), ValueError, "steps=9, but E, the two symbols and B .* steps=10"),
    "xor delay": (lambda: tasks.delayed_xor(delay=-1), ValueError, "delay=-1, but an answer can't come before"),
    "xor": (lambda: tasks.delayed_xor(delay=3, steps=4), ValueError, "steps=4, but delay=3 leaves .* steps=5"),
    "lorenz": (lambda: tasks.lorenz(steps=0), ValueError, "steps=0, but there must be a step to predict"),
    "dt": (lambda: tasks.lorenz(steps=1, dt=2.0), ValueError, r"dt=2\.0, but the persistence .* 0\.001 to 1"),
    "dt 0": (lambda: tasks.lorenz_series(1, dt=0.0), ValueError, r"dt=0\.0, but it is the time from .* positive"),
    "no states": (lambda: tasks.lorenz_series(0), ValueError, "length=0, but a series has a first state"),
    "transient": (lambda: tasks.lorenz_series(1, transient=-1.0), ValueError, r"transient=-1\.0, but it is a time"),
    "initial": (lambda: tasks.lorenz_series(1, initial=1.0), ValueError, r"initial has shape \(\), but x, y and z"),
    "at rest": (lambda: tasks.mackey_glass(steps=1, tau=4), ValueError, r"tau=4, but below 4\.7 the series comes to"),
    "no delay": (lambda: tasks.mackey_glass_series(1, tau=0), ValueError, "tau=0, but the delay is of one unit"),
    "before": (lambda: tasks.mackey_glass_series(1, transient=-1), ValueError, "transient=-1, but it is a time"),
    "by": (lambda: tasks.digits(by="columns"), ValueError, "by is 'columns', but an image is read by 'rows' or by"),
    "numbers": (lambda: tasks.characters(NUMBERS, steps=1), tasks.InputError, "prices holds numbers, but characters"),
    "short": (lambda: tasks.characters(TEXT, steps=25), tasks.InputError, "song has 25 characters, but .* needs 26"),
    "nothing": (lambda: tasks.characters(TEXT, steps=0), ValueError, "steps=0, but there must be a step to predict"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD)
def test_errors(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(tasks.InputError, match=r"come with scikit-learn: .*pip install .*\[tasks\]'"):
        tasks.digits()
