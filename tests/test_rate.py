"""The rate network: its equation, its noise, its limits, and what it costs."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, make_cell, problem, python_loop, random_like

import jaxbptt as bptt

TAU = np.array([20.0, 30.0, 50.0, 90.0])


def noisy(sigma=0.3, **options):
    options = {"tau": TAU, "dt": 10.0, "dtype": jnp.float64} | options
    return bptt.rate(3, 4, noise=sigma, **options)


def with_keys(xs, seed=5):
    return xs, jax.random.split(jax.random.key(seed), len(xs))


def test_equation():
    cell = noisy(nonlinearity=jax.nn.relu)
    p, h, xs = problem(cell, 1)
    x, key = xs[0], jax.random.key(7)
    alpha = 10 / TAU
    new = (1 - alpha) * h + alpha * (p.W_hh @ np.maximum(h, 0) + p.W_xh @ x + p.b)
    new = new + np.sqrt(2 * alpha) * 0.3 * jax.random.normal(key, (4,))
    assert_close(cell.step(p, h, (x, key)), (new, np.maximum(new, 0)))


def test_one_time_constant_for_all():
    params, h, xs = problem(make_cell("rate"), 1)
    one, each = (bptt.rate(3, 4, tau=tau, dt=1.0, dtype=jnp.float64) for tau in (5, [5] * 4))
    assert_close(one.step(params, h, xs[0]), each.step(params, h, xs[0]))


def test_is_an_elman_network_where_the_step_is_tau():
    """hₜ = W_hh tanh(hₜ₋₁) + W_xh xₜ + b, whose rates are the states of `elman`."""
    cell = bptt.rate(3, 4, tau=7.0, dt=7.0, dtype=jnp.float64)
    params, h, xs = problem(cell, 6, (2,))
    _, rates = bptt.scan(cell, params, h, xs)
    _, states = bptt.scan(make_cell("elman"), bptt.ElmanParams(*params), jnp.tanh(h), xs)
    assert_close(rates, states)


def test_noise_has_the_standard_deviation_that_was_asked_for():
    """Without weights h is an autoregression of variance 2α σ²/(1 − (1 − α)²) = σ²/(1 − α/2)."""
    cell = noisy(0.5, tau=100.0)
    params = jax.tree.map(jnp.zeros_like, cell.init(jax.random.key(0)))
    _, rates = bptt.scan(cell, params, cell.initial_carry((500,)), with_keys(jnp.zeros((300, 500, 3))))
    assert np.std(np.arctanh(rates[100:])) == pytest.approx(0.5 / np.sqrt(1 - 0.05), rel=0.01)
    assert abs(np.corrcoef(rates[-1].T) - np.eye(4)).max() < 0.2, "units and rows are independent"


@pytest.mark.parametrize("flagged", [False, True])
@pytest.mark.costly
def test_noise_is_the_same_under_every_strategy(flagged):
    """Also where rows are reset and padded; and its keys have no derivative."""
    cell = noisy()
    params, h, xs = problem(cell, 7, (5,))
    xs = with_keys(xs)
    flags = {
        "is_first": jnp.zeros((7, 5), bool).at[3, 1].set(True),
        "valid": jnp.ones((7, 5), bool).at[5:, 2].set(False),
    }
    flags = flags if flagged else {}

    def value_and_gradient(scan):
        def loss(params, h, x):
            carry, ys = scan(cell, params, h, (x, xs[1]), **flags)
            return jnp.sum(jnp.sin(ys)) + jnp.sum(carry**2)

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(params, h, xs[0])

    scans = (bptt.scan if flagged else python_loop, bptt.adjoint_scan, bptt.checkpointed_scan)
    expected, *others = jax.jit(lambda: [value_and_gradient(scan) for scan in scans])()
    for mine in others:
        assert_close(mine, expected)


def test_evaluated_without_noise_by_a_cell_without():
    cell = noisy()
    params, h, xs = problem(cell, 3)
    _, quiet = bptt.scan(noisy(0.0), params, h, xs)
    _, little = bptt.scan(noisy(1e-9), params, h, with_keys(xs))
    np.testing.assert_allclose(little, quiet, atol=1e-7)
    assert not np.allclose(bptt.scan(cell, params, h, with_keys(xs))[1], quiet, atol=0.1)


def test_time_constants_can_be_learned():
    params, h, xs = problem(make_cell("rate"), 6)

    def loss(tau, scan):
        return jnp.sum(scan(bptt.rate(3, 4, tau=tau, dt=10.0, dtype=jnp.float64), params, h, xs)[1] ** 2)

    for tau in (jnp.asarray(TAU), jnp.asarray(30.0)):
        gradient, expected = (jax.grad(loss)(tau, scan) for scan in (bptt.adjoint_scan, bptt.scan))
        assert_close(gradient, expected)
    above, below = (float(loss(30 + step, bptt.scan)) for step in (1e-5, -1e-5))
    assert float(gradient) == pytest.approx((above - below) / 2e-5, rel=1e-6)


def test_numbers_do_not_change_the_dtype():
    cell = noisy(np.float64(0.1), dtype=jnp.float32)
    assert cell.step(cell.init(jax.random.key(0)), cell.initial_carry(), (jnp.ones(3, jnp.float32), jax.random.key(1)))[
        0
    ].dtype == jnp.dtype("float32")


def test_costs_at_most_two_arrays_more_than_elman():
    """Whose output is its state: here the rates are the output, and the currents, or slopes, are kept beside them."""
    T, B, n = 200, 8, 16
    cells = bptt.rate(3, n, tau=5.0, dt=1.0), bptt.elman(3, n)
    params = random_like(jax.eval_shape(cells[1].init, jax.random.key(0)), 0)
    xs = jnp.ones((T, B, 3), jnp.float32)

    def temporary(cell):
        loss = lambda params: jnp.sum(bptt.adjoint_scan(cell, params, cell.initial_carry((B,)), xs)[1] ** 2)
        return jax.jit(jax.grad(loss)).lower(params).compile().memory_analysis().temp_size_in_bytes

    rate, elman = map(temporary, cells)
    assert rate < elman + 2 * T * B * n * 4


SIZES = {"input_size": 3, "hidden_size": 4, "tau": 100.0, "dt": 20.0}


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dt": 0}, ValueError, "dt is 0, but it is the time that one step takes: pass a number above 0"),
        (
            {"tau": 10.0},
            ValueError,
            "tau is 10.0, but it is a time constant, in the unit of dt=20.0: pass a number of at",
        ),
        ({"tau": np.array([100.0, 10.0, 100.0, 100.0])}, ValueError, "tau is .*, but it is a time constant"),
        ({"tau": np.inf}, ValueError, "tau is inf, but it is a time constant"),
        ({"tau": "slow"}, ValueError, "tau is slow, but it is a time constant"),
        ({"tau": np.full(3, 99.0)}, ValueError, r"tau has shape \(3,\).*: pass a number, or an array of shape \(4,\)"),
        ({"noise": -0.1}, ValueError, "noise is -0.1, but it is a standard deviation: pass a number of at least 0"),
        (
            {"nonlinearity": "tanh"},
            TypeError,
            "nonlinearity is a str, but a function is expected: pass a function of h",
        ),
        ({"hidden_size": 0}, ValueError, "hidden_size is 0"),
    ],
)
def test_options(options, error, message):
    with pytest.raises(error, match=message):
        inspect.unwrap(bptt.rate)(**SIZES | options)


@pytest.mark.parametrize(
    ("options", "x", "error", "message"),
    [
        (
            {"noise": 0.1},
            jnp.ones(3),
            TypeError,
            "noise is 0.1, but an input is a .* and no pair of x and a random key: pass",
        ),
        ({"noise": 0.1}, (jnp.ones(3), 1), TypeError, "key is 1, but a random key is expected"),
        ({}, (jnp.ones(3), jax.random.key(0)), TypeError, r"rate: x is a tuple, but \[\*batch, 3\] is expected"),
        (
            {"nonlinearity": jnp.sum},
            jnp.ones(3),
            ValueError,
            r"rate: nonlinearity returned shape \(\) for h of shape \(4,\)",
        ),
    ],
    ids=["no key", "wrong key", "key without noise", "no nonlinearity of each unit"],
)
def test_at_a_step(options, x, error, message):
    cell = bptt.rate(**SIZES, **options)
    with pytest.raises(error, match=message):
        cell.step(cell.init(jax.random.key(0)), cell.initial_carry(), x)
