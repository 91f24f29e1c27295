"""Lyapunov exponents: closed forms, published values, mean-field theory, and the volume, which is exact for any system."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.polynomial.hermite_e import hermegauss
from reference import make_cell, problem

import jaxbptt as bptt


def linear(W, h, x):
    return W @ h, None


def henon(p, c, x):
    return (1 - p[0] * c[0] ** 2 + c[1], p[1] * c[0]), None


def symmetric(n, seed=0):
    W = np.random.default_rng(seed).standard_normal((n, n))
    return (W + W.T) / np.sqrt(2 * n)


@pytest.mark.parametrize("options", [{}, {"qr_every": 7}, {"num_exponents": 3}], ids=str)
def test_linear_network(options):
    W = symmetric(6)
    run = jax.jit(lambda W: bptt.lyapunov_exponents(linear, W, jnp.ones(6), length=2_000, burn_in=1_500, **options))
    spectrum = run(W)
    expected = np.sort(np.log(np.abs(np.linalg.eigvalsh(W))))[::-1]
    np.testing.assert_allclose(spectrum.exponents, expected[: len(spectrum.exponents)], atol=1e-8)
    assert spectrum.resolved.all()
    assert (spectrum.standard_errors < 1e-8).all()


def test_diagonal_network_has_its_largest_exponents_found():
    """A frame of unit vectors would stay in the subspace of the first ones, and report those."""
    W = jnp.diag(jnp.array([0.1, 0.5, 2.0]))
    spectrum = bptt.lyapunov_exponents(linear, W, jnp.ones(3), length=300, burn_in=200, num_exponents=1)
    np.testing.assert_allclose(spectrum.exponents, [math.log(2)], atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"qr_every": 3}, {"burn_in": 11, "qr_every": 4}], ids=str)
@pytest.mark.parametrize("name", ["elman", "gru", "lstm"])
@pytest.mark.costly
def test_sum_is_the_mean_log_determinant(name, options):
    cell = make_cell(name)
    args = problem(cell, 50)
    spectrum = jax.jit(lambda *args: bptt.lyapunov_exponents(cell, *args, **options))(*args)
    _, J = bptt.state_jacobians(cell, *args)
    expected = np.linalg.slogdet(J[options.get("burn_in", 0) :])[1].mean()
    np.testing.assert_allclose(spectrum.exponents.sum(), expected, atol=1e-8)
    assert (np.diff(spectrum.exponents) <= 0).all()
    assert spectrum.steps[-1] == 50 - options.get("burn_in", 0)
    np.testing.assert_allclose(spectrum.running[-1], spectrum.exponents, rtol=1e-12)


def test_running_estimates_and_standard_errors_by_hand():
    """A scalar: growth is log|wₜ| at each step, here an input."""
    w = np.exp(np.random.default_rng(0).standard_normal(45))
    spectrum = bptt.lyapunov_exponents(
        lambda _, h, w: (w * h, None), None, jnp.ones(()), jnp.asarray(w), burn_in=2, qr_every=2
    )
    growth = np.log(w[2:])
    np.testing.assert_allclose(spectrum.exponents, [growth.mean()])
    np.testing.assert_array_equal(spectrum.steps, [*range(2, 43, 2), 43])
    np.testing.assert_allclose(spectrum.running[:, 0], [growth[:n].mean() for n in spectrum.steps])
    # 21 intervals of 2 steps between factorisations: 20 blocks of one each; the first and the left-over step are dropped.
    blocks = growth[2:42].reshape(20, 2).mean(axis=1)
    np.testing.assert_allclose(spectrum.standard_errors, [blocks.std(ddof=1) / math.sqrt(20)])


def test_henon_map():
    """λ = 0.41922 and −1.62319 for a = 1.4, b = 0.3 (Sprott 2003); their sum is log 0.3 exactly."""
    run = jax.jit(lambda init: bptt.lyapunov_exponents(henon, (1.4, 0.3), init, length=1_001_000, burn_in=1_000))
    spectrum = run((0.1, 0.1))
    error = np.abs(spectrum.exponents - np.array([0.41922, -1.62319]))
    assert (error < 1e-3).all()
    assert (error < 3 * spectrum.standard_errors).all()
    assert (spectrum.standard_errors < 1e-3).all()
    np.testing.assert_allclose(spectrum.exponents.sum(), math.log(0.3), atol=1e-8)
    np.testing.assert_allclose(spectrum.kaplan_yorke_dimension, 1 + 0.41922 / 1.62319, atol=1e-3)
    np.testing.assert_allclose(spectrum.entropy_rate, 0.41922, atol=1e-3)


def test_logistic_map():
    logistic = lambda r, x, _: (r * x * (1 - x), None)
    run = jax.jit(lambda x: bptt.lyapunov_exponents(logistic, 4.0, x, length=200_000, burn_in=100))
    spectrum = run(0.3)
    assert abs(spectrum.exponents[0] - math.log(2)) < min(1e-3, 3 * spectrum.standard_errors[0])


def random_network(N, g, seed):
    rng = np.random.default_rng(seed)
    return g * rng.standard_normal((N, N)) / math.sqrt(N), rng.standard_normal(N)


def tanh_then_weights(G, h, x):
    return G @ jnp.tanh(h), None


def mean_field(g):
    """σ² = g² E tanh²(σz), λ₁ = ½ log(g² E sech⁴(σz)), mean λ = log g − ½ + E log sech²(σz), with z ~ N(0, 1)."""
    z, weights = hermegauss(200)
    weights = weights / weights.sum()
    sigma = 1.0
    for _ in range(500):
        sigma = g * math.sqrt(weights @ np.tanh(sigma * z) ** 2)
    sech2 = 1 / np.cosh(sigma * z) ** 2
    return 0.5 * math.log(g**2 * (weights @ sech2**2)), math.log(g) - 0.5 + weights @ np.log(sech2)


@pytest.mark.slow
def test_random_network_in_chaos_against_mean_field():
    largest, mean = mean_field(1.5)
    np.testing.assert_allclose([largest, mean], [0.0652, -0.714], atol=5e-4)
    G, h = random_network(1000, 1.5, 0)
    one = jax.jit(
        lambda G, h: (
            bptt.lyapunov_exponents(tanh_then_weights, G, h, length=4_000, burn_in=1_000, num_exponents=1).exponents
        )
    )
    np.testing.assert_allclose(one(G, h), largest, rtol=0.05)
    # The mean of all is that of log|det J|, whatever the frame is: a few steps will do.
    settled, _ = jax.jit(lambda G, h: bptt.scan(tanh_then_weights, G, h, length=1_000))(G, h)
    everything = jax.jit(lambda G, h: bptt.lyapunov_exponents(tanh_then_weights, G, h, length=8).exponents)(G, settled)
    np.testing.assert_allclose(everything.mean(), mean, rtol=0.05)


def test_random_network_at_rest_has_the_exponent_of_its_weights():
    G, h = random_network(300, 0.5, 0)
    run = jax.jit(
        lambda G, h: (
            bptt.lyapunov_exponents(tanh_then_weights, G, h, length=2_000, burn_in=1_000, num_exponents=1).exponents
        )
    )
    expected = math.log(np.abs(np.linalg.eigvals(G)).max())
    np.testing.assert_allclose(run(G, h), expected, rtol=0.01)


@pytest.mark.parametrize(
    ("rates", "dimension", "entropy"),
    [
        ((2.0, 0.25), 1.5, math.log(2)),
        ((2.0, 2.0, 0.5, 0.125), 3 + 1 / 3, 2 * math.log(2)),
        ((0.5, 0.25), 0.0, 0.0),
        ((4.0, 2.0), 2.0, math.log(8)),
    ],
)
@pytest.mark.costly
def test_dimension_and_entropy_by_hand(rates, dimension, entropy):
    step = lambda _, h, x: (h * jnp.array(rates), None)
    spectrum = bptt.lyapunov_exponents(step, None, jnp.ones(len(rates)), length=400, burn_in=300)
    np.testing.assert_allclose(spectrum.exponents, np.log(rates), atol=1e-10)
    np.testing.assert_allclose(spectrum.kaplan_yorke_dimension, dimension, atol=1e-9)
    np.testing.assert_allclose(spectrum.entropy_rate, entropy, atol=1e-9)


def test_too_few_exponents_for_dimension_and_entropy():
    step = lambda _, h, x: (h * jnp.array([4.0, 2.0, 0.1]), None)
    two = bptt.lyapunov_exponents(step, None, jnp.ones(3), length=100, num_exponents=2)
    assert np.isnan(two.kaplan_yorke_dimension)
    assert np.isnan(two.entropy_rate)


def test_continuous_time():
    """h′ = A h, integrated exactly over Δt: the exponents are the real parts of the eigenvalues of A, per unit of time."""
    A = symmetric(4)
    dt = 0.05
    values, vectors = np.linalg.eigh(A)
    flow = vectors @ np.diag(np.exp(dt * values)) @ vectors.T
    spectrum = bptt.lyapunov_exponents(linear, flow, jnp.ones(4), length=4_000, burn_in=3_000, time_step=dt)
    np.testing.assert_allclose(spectrum.exponents, np.sort(values)[::-1], atol=1e-8)


def test_batch_by_vmap():
    cell = make_cell("gru")
    params, _, xs = problem(cell, 20, (3,))
    one = jax.jit(lambda xs: bptt.lyapunov_exponents(cell, params, cell.initial_carry(), xs))
    together = jax.vmap(one, in_axes=1)(xs)
    np.testing.assert_allclose(together.exponents[2], one(xs[:, 2]).exponents, rtol=1e-9)


@pytest.mark.parametrize("options", [{}, {"qr_every": 3, "burn_in": 4}], ids=str)
@pytest.mark.costly
def test_gradient_against_finite_differences(options):
    cell = make_cell("elman")
    params, h_0, xs = problem(cell, 15)

    @jax.jit
    def square(W_hh):
        spectrum = bptt.lyapunov_exponents(cell, params._replace(W_hh=W_hh), h_0, xs, num_exponents=2, **options)
        return jnp.mean(spectrum.exponents**2)

    direction = np.random.default_rng(0).standard_normal(params.W_hh.shape)
    along = jnp.vdot(jax.jit(jax.grad(square))(params.W_hh), direction)
    difference = (square(params.W_hh + 1e-6 * direction) - square(params.W_hh - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose(along, difference, rtol=1e-6)


def test_a_direction_that_is_lost_between_factorisations_is_said_to_be():
    W = jnp.diag(jnp.array([1.0, 1e-5]))
    W = jnp.array([[0.6, -0.8], [0.8, 0.6]]) @ W @ jnp.array([[0.6, 0.8], [-0.8, 0.6]])
    often = bptt.lyapunov_exponents(linear, W, jnp.ones(2), length=60)
    seldom = bptt.lyapunov_exponents(linear, W, jnp.ones(2), length=60, qr_every=5)
    assert often.resolved.tolist() == [True, True]
    assert seldom.resolved.tolist() == [True, False]


def test_step_that_branches():
    """A network that switches weights with the sign of its input; by hand from the Jacobians."""
    cell = make_cell("elman")
    params, h_0, xs = problem(cell, 40)
    other = params._replace(W_hh=params.W_hh.T)
    step = lambda p, h, x: jax.lax.cond(x[0] > 0, lambda: cell.step(params, h, x), lambda: cell.step(p, h, x))
    spectrum = jax.jit(lambda p, h, xs: bptt.lyapunov_exponents(step, p, h, xs))(other, h_0, xs)
    _, J = bptt.state_jacobians(step, other, h_0, xs)
    np.testing.assert_allclose(spectrum.exponents.sum(), np.linalg.slogdet(J)[1].mean(), atol=1e-8)


def test_burn_in_leaves_the_start_out():
    """Growth of 2 at first, of 1/2 later."""
    w = jnp.where(jnp.arange(30) < 10, 2.0, 0.5)
    step = lambda _, h, w: (w * h, None)
    assert_exponent = lambda burn_in, value: np.testing.assert_allclose(
        bptt.lyapunov_exponents(step, None, jnp.ones(1), w, burn_in=burn_in).exponents, [value], atol=1e-12
    )
    assert_exponent(10, -math.log(2))
    assert_exponent(9, (math.log(2) - 20 * math.log(2)) / 21)


def test_integers_in_the_carry_and_no_standard_error():
    step = lambda w, carry, x: ((w * carry[0], carry[1] + 1), None)
    spectrum = bptt.lyapunov_exponents(step, 0.5, (jnp.ones(1), jnp.array(0)), length=1)
    np.testing.assert_allclose(spectrum.exponents, [-math.log(2)])
    assert np.isnan(spectrum.standard_errors).all()


def test_matrix_free_memory():
    """T = 10,000 and n = 128: beyond the results, two of which are T n, O(T n + n²); the dense Jacobians alone are T n²."""
    cell = bptt.elman(4, 128)
    params = jax.eval_shape(cell.init, jax.random.key(0))
    xs = jax.ShapeDtypeStruct((10_000, 4), jnp.float32)
    run = jax.jit(lambda params, xs: bptt.lyapunov_exponents(cell, params, cell.initial_carry(), xs))
    memory = run.lower(params, xs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * (6 * 10_000 * 128 + 30 * 128**2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_exponents": 0}, "num_exponents is 0, but a state of 3 numbers has 1 to 3 exponents"),
        ({"num_exponents": 4}, "num_exponents is 4, but a state of 3 numbers has 1 to 3 exponents"),
        (
            {"burn_in": 5},
            "burn_in is 5, but of 5 time steps at least one has to be left: pass a whole number from 0 to 4",
        ),
        ({"burn_in": -1}, "burn_in is -1"),
        ({"qr_every": 0}, "qr_every is 0, but it counts time steps"),
        ({"time_step": -0.1}, "time_step is -0.1, but it is the time that a step stands for"),
        ({"length": 0}, "A sequence without time steps has no exponents"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        bptt.lyapunov_exponents(linear, jnp.eye(3), jnp.ones(3), **({"length": 5} | options))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.costly
def test_a_direction_that_one_step_loses_is_not_resolved(dtype):
    """One step in 20,000 maps it to 0: its exponent is −∞, but rounding may make a number near the others of it."""
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    dead = jnp.asarray(turn @ np.diag([1, 0]) @ turn.T, dtype)
    step = lambda _, h, t: (jnp.where(t == 7, dead @ h, h / 2), None)
    spectrum = bptt.lyapunov_exponents(step, None, jnp.ones(2, dtype), jnp.arange(20_000))
    np.testing.assert_allclose(spectrum.exponents[0], -math.log(2), atol=0.01)
    assert spectrum.resolved.tolist() == [True, False]
