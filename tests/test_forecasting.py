"""Forecasts are the free run of a plain Python loop, and their errors are those of the targets that were observed."""

import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pandas
import pytest

from jaxbptt import models, tasks
from jaxbptt.models import baselines, forecasting, wording
from jaxbptt.models.forecasting import LEVELS, ValidationErrors, forecast, validation_errors

NUMBERS = models.Architecture("lstm", 5, 2, 3, 2, text=False, targets=(2, 0), change=(0.1, 0.2))
COLUMNS = models.Columns(("a", "b", "c"), np.array([1.0, 2.0, 1 / 3]), np.array([1.0, 0.1, 3.0]), (2, 0))
PLAIN = models.Columns(("x", "y"), np.zeros(2), np.ones(2), (0, 1))


def series(length, columns=3):
    return np.random.default_rng(0).normal(size=(length, columns)).cumsum(axis=0)


@functools.cache
def untrained():
    net = models.build(NUMBERS)
    params = net.init(jax.random.key(0))
    # The random read-out is small: make the free run differ from the last value.
    return net, params._replace(b_y=jnp.array([2.0, -1.0], jnp.float32))


@functools.cache
def one_step():
    net, params = untrained()
    return jax.jit(lambda carry, x: net.apply(params, carry, x[None]))


def plain_run(rows, steps):
    """One row at a time, and each prediction into a copy of the last row."""
    carry, step = untrained()[0].cell.initial_carry(), one_step()
    for x in COLUMNS.encode(rows):
        last, (carry, ys) = x.copy(), step(carry, x)
    found = []
    for _ in range(steps):
        found.append(COLUMNS.decode(ys[0]))
        last[list(COLUMNS.targets)] = ys[0]
        carry, ys = step(carry, last)
    return np.array(found)


def linear(matrix, columns, traces=None):
    """A network without memory, x ↦ A x of the columns it predicts; counts how often it is traced."""

    def apply(params, carry, xs, *, scan):
        if traces is not None:
            traces.append(xs.shape)
        return scan(lambda a, c, x: (c + 1, x @ a.T), params, carry, xs)

    cell = SimpleNamespace(initial_carry=lambda batch_shape=(): jnp.zeros(batch_shape, jnp.float32))
    return SimpleNamespace(apply=apply, cell=cell), jnp.asarray(matrix, jnp.float32), columns


def as_model(network, params, columns, errors=None):
    return models.Model(network, params, None, None, columns, {}, {"errors": errors}, 0)


def test_forecast_is_the_free_run_of_a_loop():
    net, params = untrained()
    rows = series(12)
    future = forecast(as_model(net, params, COLUMNS), rows, steps=6)
    assert (future.columns, future.held, future.measured, future.level) == (("c", "a"), ("b",), 0, 0.9)
    np.testing.assert_allclose(future.mean, plain_run(rows, 6), rtol=1e-5)
    assert np.isnan(future.low).all()
    one = forecast(as_model(net, params, COLUMNS), rows[:1], steps=1)
    np.testing.assert_allclose(one.mean, plain_run(rows[:1], 1), rtol=1e-5)


@pytest.mark.parametrize(("length", "start", "horizons"), [(30, 12, 5), (9, 1, 3), (14, 12, 1)])
def test_errors_are_those_of_a_loop_from_each_origin(length, start, horizons):
    net, params = untrained()
    rows = series(length)
    observed = np.random.default_rng(1).random(rows.shape) < 0.8
    errors = validation_errors(net, params, COLUMNS, rows, observed, start=start, season=1, horizons=horizons)
    origins = range(start - 1, length - horizons)
    assert (errors.origins, errors.horizons, errors.season) == (len(origins), horizons, (1, 1))
    truth, seen = (np.stack([each[t + 1 : t + 1 + horizons, [2, 0]] for t in origins]) for each in (rows, observed))
    runs = np.stack([plain_run(rows[: t + 1], horizons) for t in origins])
    last = np.stack([np.tile(rows[t, [2, 0]], (horizons, 1)) for t in origins])
    for h in range(horizons):
        for i in range(2):
            which = seen[:, h, i]
            assert errors.observed[h, i] == which.sum()
            missed = np.sort(np.abs(runs - truth)[which, h, i])
            expected = np.sqrt(np.mean(missed**2)) if which.any() else np.nan
            np.testing.assert_allclose(errors.network[h, i], expected, rtol=1e-5)
            np.testing.assert_allclose(
                errors.persistence[h, i], np.sqrt(np.mean((last - truth)[which, h, i] ** 2)) if which.any() else np.nan
            )
            for level, found in zip(LEVELS, errors.quantiles[:, h, i], strict=True):
                rank = int(np.ceil(round((len(missed) + 1) * level, 9)))
                expected = missed[rank - 1] if rank <= len(missed) else np.nan
                np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(errors.seasonal, errors.persistence)  # a season of one step


def test_linear_system():
    """x̂ₜ₊ₕ = Aʰ xₜ, a rotation: its own series is forecast without error, and has a season that is found."""
    angle = 2 * np.pi / 8
    A = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    net, params, columns = linear(A, PLAIN)
    rows = np.stack([np.cos(angle * np.arange(120)), np.sin(angle * np.arange(120))], axis=1)
    future = forecast(as_model(net, params, columns), rows, steps=9)
    expected = [np.linalg.matrix_power(A, h) @ rows[-1] for h in range(1, 10)]
    np.testing.assert_allclose(future.mean, expected, atol=1e-5)
    errors = validation_errors(net, params, columns, rows, start=80, horizons=12)
    assert errors.season == (8, 8)
    np.testing.assert_allclose(errors.network, 0, atol=1e-5)
    np.testing.assert_allclose(errors.seasonal, 0, atol=1e-12)
    np.testing.assert_allclose(errors.persistence[7], 0, atol=1e-12)
    np.testing.assert_allclose(errors.persistence[3], np.sqrt(2), rtol=0.1)


def test_intervals_hold_what_they_promise():
    """Of errors that are drawn alike: about the level of new ones; and about 0.9 of 40 at least in the mean."""
    zero = linear(np.zeros((2, 2)), PLAIN)
    rng = np.random.default_rng(0)
    held = []
    for _ in range(60):
        rows = rng.normal(size=(43, 2)) * [1.0, 5.0]
        errors = validation_errors(*zero, rows, start=1, season=1, horizons=3)
        assert errors.origins == 40
        future = forecast(as_model(*zero, errors.to_json()), rows, steps=5, level=0.9)
        assert future.measured == 3
        assert np.isnan(future.low[3:]).all()
        assert np.isnan(future.high[3:]).all()
        new = rng.normal(size=(200, 3, 2)) * [1.0, 5.0]
        held.append(np.mean((new >= future.low[:3]) & (new <= future.high[:3])))
    assert abs(np.mean(held) - 37 / 41) < 0.01  # the 37th smallest of 40 = ⌈41 · 0.9⌉
    widths = [
        np.mean(future.high[:3] - future.low[:3])
        for future in (forecast(as_model(*zero, errors.to_json()), rows, steps=3, level=level) for level in LEVELS[:-1])
    ]
    assert widths == sorted(widths)
    assert widths[0] < widths[-1] / 2
    longest = forecast(as_model(*zero, errors.to_json()), rows, steps=3, level=0.99)
    assert longest.measured == 0, "40 errors can't tell what 99 % stay below"


def test_made_up_targets_do_not_count():
    net, params = untrained()
    rows, observed = series(40), np.ones((40, 3), bool)
    observed[25:, 2] = False
    changed = rows + 1000 * ~observed
    one, other = (
        validation_errors(net, params, COLUMNS, each, observed, start=20, season=2, horizons=2)
        for each in (rows, changed)
    )
    # Only the origins that read row 25 or later see another value, and their targets don't count.
    assert one.observed.tolist() == [[5, 19], [4, 19]]
    np.testing.assert_array_equal(one.network[:, 0], other.network[:, 0])
    np.testing.assert_array_equal(one.persistence[:, 0], other.persistence[:, 0])
    np.testing.assert_array_equal(one.quantiles[..., 0], other.quantiles[..., 0])
    assert np.isfinite(one.network).all()
    nothing = validation_errors(net, params, COLUMNS, rows, ~np.ones_like(observed), start=20, season=2, horizons=2)
    assert np.isnan(nothing.network).all()
    assert nothing.observed.tolist() == [[0, 0], [0, 0]]


def test_columns_that_are_not_predicted_are_held():
    """y = x + b, with b held: after h steps it is x + h b, whatever came of b in the data."""
    columns = models.Columns(("x", "b"), np.zeros(2), np.ones(2), (0,))
    net = linear(np.array([[1.0, 1.0]]), columns)
    rows = np.array([[0.0, 9.0], [5.0, 2.0]])
    future = forecast(as_model(*net), rows, steps=3)
    assert future.held == ("b",)
    np.testing.assert_allclose(future.mean[:, 0], [7, 9, 11])
    errors = validation_errors(*net, np.array([[0.0, 0], [0, 1], [5, 100], [9, 0]]), start=2, season=1, horizons=2)
    # From row 1, with b = 1: 1 and 2 for 5 and 9; the horizon 2 is measured from there alone, half the rows are two.
    assert (errors.origins, errors.horizons) == (2, 1)
    np.testing.assert_allclose(errors.network, [[np.sqrt(((1 - 5) ** 2 + (105 - 9) ** 2) / 2)]])


def test_the_season_is_that_of_the_training_part():
    t = np.arange(160)
    rows = np.where(t < 100, np.sin(2 * np.pi * t / 8), np.sin(2 * np.pi * t / 5))[:, None] * [1.0, -2.0]
    assert validation_errors(*linear(np.eye(2), PLAIN), rows, start=100, horizons=2).season == (8, 8)
    assert validation_errors(*linear(np.eye(2), PLAIN), rows, start=100, horizons=2, season=5).season == (5, 5)


@pytest.mark.parametrize(
    ("after", "horizons", "origins"),
    [(1, 1, 1), (2, 1, 2), (7, 3, 5), (20, 10, 11), (39, 20, 20), (60, 41, 20), (99, 50, 50)],
)
def test_few_validation_rows_shorten_the_horizons(after, horizons, origins):
    errors = validation_errors(*linear(np.eye(2), PLAIN), series(after + 5, 2), start=5)
    assert (errors.horizons, errors.origins) == (horizons, origins)
    assert (errors.observed == origins).all()


@pytest.mark.parametrize(("after", "season"), [(49 + 256, 12), (49 + 600, 2), (49 + 256 * 6, 12), (49 + 2500, 35)])
def test_origins_are_spread_over_the_validation_rows(after, season):
    found, gap, horizons = forecasting._origins(100, 100 + after, 50, (season, None))
    assert horizons == 50
    assert found[0] == 99
    assert 100 + after - 50 - gap <= found[-1] < 100 + after - 50
    assert set(np.diff(found)) == {gap}
    assert 100 < len(found) <= 256
    assert set(found % season) == set(range(season)), "at all times of the season"


def test_only_so_many_rows_are_read(monkeypatch):
    net, params = untrained()
    rows = series(60)
    whole = validation_errors(net, params, COLUMNS, rows[:50], start=40, season=1, horizons=2)
    future = forecast(as_model(net, params, COLUMNS), rows, steps=2)
    monkeypatch.setattr(forecasting, "WARM_UP", 20)
    monkeypatch.setattr(forecasting, "LOOKED_AT", 20)
    monkeypatch.setattr(forecasting, "MAX_ROWS", 10)
    short = validation_errors(net, params, COLUMNS, rows, start=40, season=1, horizons=2)
    assert short.origins == whole.origins
    assert not np.array_equal(short.network, whole.network)
    last = validation_errors(net, params, COLUMNS, rows[20:50], start=20, season=1, horizons=2)
    np.testing.assert_allclose(short.network, last.network, rtol=1e-6)
    shorter = forecast(as_model(net, params, COLUMNS), rows, steps=2)
    np.testing.assert_allclose(shorter.mean, plain_run(rows[-21:], 2), rtol=1e-5)
    assert not np.array_equal(shorter.mean, future.mean)


def test_compiled_once():
    traces, seen = [], 0
    net, params, columns = linear(np.eye(2), PLAIN, traces)
    for k in range(3):
        validation_errors(net, k * params, columns, series(30, 2) + k, start=20)
        forecast(as_model(net, k * params, columns), series(30, 2), steps=3)
        seen = seen or len(traces)
    assert len(traces) == seen


def test_a_network_that_leaves_all_bounds():
    rows = series(150, 2)
    errors = validation_errors(*linear(10.0 * np.eye(2), PLAIN), rows, start=40, season=1)
    assert np.isnan(errors.network[-1]).all()
    assert np.isfinite(errors.network[0]).all()
    assert "x: the network's forecasts are not finite" in " ".join(wording.errors_sentences(errors))


def test_errors_go_through_json():
    errors = validation_errors(*linear(np.eye(2), PLAIN), series(30, 2), start=20)
    found = ValidationErrors.from_json(json.loads(json.dumps(errors.to_json(), allow_nan=False)))
    assert np.isnan(errors.seasonal).all()
    assert found.season == (None, None)
    for one, other in zip(found, errors, strict=True):
        np.testing.assert_array_equal(one, other)
        assert type(one) is type(other)
    assert errors.network.dtype == np.float64


def made_up(network, persistence, seasonal, season=(7,)):
    arrays = (np.array(each, float)[:, None] for each in (network, persistence, seasonal))
    horizons = len(network)
    return ValidationErrors(("load",), season, 90, *arrays, np.full((horizons, 1), 90), np.ones((7, horizons, 1)))


def test_errors_in_words():
    errors = made_up([1.0, *[2.0] * 8, 6.0], [4.0] * 10, [2.0] * 10)
    head, rows = wording.errors_table(errors)
    assert head[2:5] == ("network", "persistence", "seasonal naive")
    assert rows == [
        ("load", "1", "1", "4", "2", "7", "0.50"),
        ("load", "10", "6", "4", "2", "7", "3.00"),
    ]
    assert wording.errors_sentences(errors) == [
        "Warning: load: the network is worse than persistence 10 steps ahead, with 1.5 times its error.",
        "Warning: load: the network is worse than the seasonal naive forecast 10 steps ahead, with 3 times its error.",
    ]
    assert "from 90 rows and up to 10 steps ahead" in wording.measured_sentence(errors)


def test_words_without_a_season_and_for_short_horizons():
    errors = made_up([2.0, 2.0, 3.0], [1.0, 4.0, 0.0], [np.nan] * 3, (None,))
    assert wording.errors_table(errors)[1] == [
        ("load", "1", "2", "1", "–", "none", "2.00"),
        ("load", "3", "3", "0", "–", "none", "–"),
    ]
    (sentence,) = wording.errors_sentences(errors, (1, 2))
    assert sentence == "Warning: load: the network is worse than persistence 1 step ahead, with 2 times its error."
    assert wording.errors_sentences(errors, (2,)) == []


def test_columns_of_a_data_frame_are_found_by_name():
    model, rows = as_model(*untrained(), COLUMNS), series(12)
    frame = pandas.DataFrame({"c": rows[:, 2], "day": "Monday", "a": rows[:, 0], "b": rows[:, 1]})
    expected = forecast(model, rows, steps=2)
    np.testing.assert_array_equal(forecast(model, frame, steps=2).mean, expected.mean)
    numbered = COLUMNS._replace(names=("0", "1", "2"))
    found = forecast(as_model(*untrained(), numbered), pandas.DataFrame(rows)[[2, 1, 0]], steps=2)
    np.testing.assert_array_equal(found.mean, expected.mean)


@pytest.mark.parametrize(
    ("network", "persistence", "seasonal", "sentences"),
    [
        ([1, 2], [4, 4], [0, 0], ["the seasonal naive forecast is exact 1 and 2 steps ahead, but the network is not."]),
        ([1, 2], [4, 4], [1e-15, 3e-15], ["the seasonal naive forecast is exact 1 and 2 steps ahead, but"]),
        ([1, 2], [4, 0], [4, 4], ["persistence is exact 2 steps ahead, but the network is not."]),
        ([1e-9], [0], [np.nan], ["persistence is exact 1 step ahead, but the network is not."]),
        ([0], [0], [np.nan], []),
        (
            [1.004, 1.02],
            [1, 1],
            [2, 2],
            ["the network is worse than persistence 2 steps ahead, with 1.02 times its error."],
        ),
        ([1.009, 3.0], [1, np.nan], [1, np.nan], []),
        ([np.nan], [0], [0], ["the network's forecasts are not finite 1 step ahead and beyond."]),
    ],
)
def test_baselines_that_are_exact(network, persistence, seasonal, sentences):
    errors = made_up(network, persistence, seasonal)
    found = wording.errors_sentences(errors, (1, 2))
    assert len(found) == len(sentences)
    for sentence, expected in zip(found, sentences, strict=True):
        assert sentence.startswith(f"Warning: load: {expected}")
    for row in wording.errors_table(errors, (1, 2))[1]:
        assert len(row[-1]) < 5, "no ratio to what is only rounding"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: forecast(m._replace(columns=None), series(5), steps=1), "one of text, and a forecast is of numbers"),
        (lambda m: forecast(m, series(5), steps=0), "steps is 0, but it counts the rows to forecast"),
        (lambda m: forecast(m, series(5), steps=1, level=0.91), r"level is 0.91, but .* pass one of \(0.5, "),
        (lambda m: forecast(m, series(5, 2), steps=1), r"shape \(5, 2\), but the model reads 3 columns \(a, b, c\)"),
        (
            lambda m: forecast(m, pandas.DataFrame(series(5), columns=["a", "x", "y"]), steps=1),
            r"values has no column 'b', 'c', but 'a', 'x', 'y': name its columns as",
        ),
        (lambda m: forecast(m, pandas.DataFrame(series(5)), steps=1), r"no column 'a', 'b', 'c', but '0', '1', '2'"),
        (
            lambda m: forecast(m, pandas.DataFrame({"a": [1.0], "b": ["low"], "c": [2]}), steps=1),
            r"values has 'low', which is not a number: pass columns of numbers only",
        ),
        (
            lambda m: forecast(m, pandas.DataFrame({"a": [1], "b": [pandas.NA], "c": [2]}, dtype="Int64"), steps=1),
            r"values\[0, 1\] \(b\) is nan: fill gaps in|values has <NA>, which is not a number: .*gaps filled in",
        ),
        (lambda m: forecast(m, [[1.0, 2.0, None]], steps=1), r"values\[0, 2\] \(c\) is nan: fill gaps in"),
        (lambda m: forecast(m, [[1.0, 2.0], [3.0]], steps=1), r"values (is not an array of numbers|has \[1.0, 2.0\])"),
        (lambda m: forecast(m, series(0), steps=1), "with at least one row"),
        (lambda m: forecast(m, series(5) / [1, 1, 0], steps=1), r"values\[0, 2\] \(c\) is -?inf: fill gaps in"),
    ],
)
def test_forecasts_that_cannot_be(call, message):
    with pytest.raises(ValueError, match=message), np.errstate(divide="ignore"):
        call(as_model(*untrained(), COLUMNS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": 0}, "start is 0, but there must be rows before and after"),
        ({"start": 30}, "start is 30, but .* from 1 to 29"),
        ({"start": 20, "season": 21}, "season is 21, but .* from 1 to 20"),
        ({"start": 20, "horizons": 0}, "horizons is 0"),
        ({"start": 20, "observed": np.ones(30, bool)}, r"observed has shape \(30,\), but rows has \(30, 3\)"),
    ],
)
def test_errors_that_cannot_be_measured(options, message):
    with pytest.raises(ValueError, match=message):
        validation_errors(*untrained(), COLUMNS, series(30), **options)


def test_baselines_by_hand():
    values = np.arange(10.0)[:, None] * [1, 10]
    np.testing.assert_array_equal(baselines.persistence(values, [3, 5], 2)[..., 1], [[30, 30], [50, 50]])
    found = baselines.seasonal_naive(values, [4, 1], 7, season=3)[..., 0]
    np.testing.assert_array_equal(found, [[2, 3, 4, 2, 3, 4, 2], [np.nan, 0, 1, np.nan, 0, 1, np.nan]])
    one = baselines.seasonal_naive(values, [4, 1], 7, season=1)
    np.testing.assert_array_equal(one, baselines.persistence(values, [4, 1], 7))


RNG = np.random.default_rng(0)
T = np.arange(1000)
NOISE = RNG.normal(size=1000)
SEASONS = {
    "sine": (np.sin(2 * np.pi * T / 24), 24),
    "sine and noise": (np.sin(2 * np.pi * T / 24) + 0.5 * NOISE, 24),
    "sine of large numbers": (1e9 + 1e8 * np.sin(2 * np.pi * T / 24), 24),
    "weekends": ((T % 7 >= 5) + 0.2 * NOISE, 7),
    "weekends and a trend": ((T % 7 >= 5) + 0.1 * T + 0.2 * NOISE, 7),
    "weekends and a parabola": ((T % 7 >= 5) + 1e-3 * T**2 + 0.2 * NOISE, 7),
    "eight days and a steep trend": ((T % 8 >= 5) + 10 * T + 0.1 * NOISE, 8),
    "eight days and growth": ((T % 8 >= 5) + np.exp(T / 200) + 0.1 * NOISE, 8),
    "spikes": ((np.arange(5000) % 24 == 0) + 0.05 * np.random.default_rng(2).normal(size=5000), 24),
    "sine of numbers too large to square": (1e200 * np.sin(2 * np.pi * T / 24), 24),
    "four weeks": ((T % 7 >= 5)[:28], 7),
    "day and week": (np.sin(2 * np.pi * T / 24) + 2.0 * (T // 24 % 7 >= 5), 168),
    "every other": (T % 2, 2),
    "white noise": (NOISE, None),
    "random walk": (np.cumsum(NOISE), None),
    "trend": (0.3 * T, None),
    "trend and noise": (0.01 * T + NOISE, None),
    "parabola and noise": (1e-2 * T**2 + NOISE, None),
    "growth": (np.exp(T / 50), None),
    "growth and noise": (np.exp(T / 100) + 0.1 * NOISE, None),
    "constant": (np.full(1000, 1 / 3), None),
    "zeros": (np.zeros(100), None),
    "three cycles": (np.sin(2 * np.pi * T[:75] / 25), None),
    "two values": (np.array([1.0, 2.0]), None),
    "nothing": (np.zeros(0), None),
}


@pytest.mark.parametrize("name", SEASONS)
def test_season_length(name):
    values, season = SEASONS[name]
    assert baselines.season_length(values) == season


def test_lorenz_oscillates_without_a_season():
    states = np.asarray(tasks.lorenz_series(4000, dt=0.02))
    assert [baselines.season_length(states[:, i]) for i in range(3)] == [None] * 3


def test_a_season_is_of_one_series():
    with pytest.raises(ValueError, match=r"values has shape \(9, 2\), but a season is that of one series"):
        baselines.season_length(np.ones((9, 2)))
