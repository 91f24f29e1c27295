"""Regularisers against their formulas, clipping inside the recursion, and initial weights against vanishing gradients."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, make_cell, problem, random_like

import jaxbptt as bptt

LOSSES = {
    "all steps": lambda carry, ys: jnp.sum(jnp.sin(ys) ** 2),
    "last": lambda carry, ys: jnp.sum(jnp.sin(ys[-1])),
}


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
@pytest.mark.parametrize("name", ["elman", "lstm"])
@pytest.mark.costly
def test_pascanu_is_its_formula(name, loss):
    cell = make_cell(name)
    args = problem(cell, 7)
    omega = jax.jit(lambda *args: bptt.regularizers.pascanu(cell, *args, loss))(*args)
    _, J = bptt.state_jacobians(cell, *args)
    adjoints = bptt.gradient_flow(cell, *args, loss).adjoints
    d = np.concatenate([np.asarray(leaf) for leaf in jax.tree.leaves(adjoints)], axis=1)
    expected = sum((np.linalg.norm(d[t] @ J[t]) / np.linalg.norm(d[t]) - 1) ** 2 for t in range(7))
    np.testing.assert_allclose(omega, expected, rtol=1e-10)


def test_descent_on_pascanu():
    """Its gradient is right, and a step against it evens out the norms of the gradient over time."""
    cell = make_cell("elman")
    params, h_0, xs = problem(cell, 8)
    omega = jax.jit(lambda W: bptt.regularizers.pascanu(cell, params._replace(W_hh=W), h_0, xs, LOSSES["all steps"]))
    gradient = jax.jit(jax.grad(omega))(params.W_hh)
    direction = random_like(params.W_hh, 5)
    difference = (omega(params.W_hh + 1e-6 * direction) - omega(params.W_hh - 1e-6 * direction)) / 2e-6
    np.testing.assert_allclose(jnp.vdot(gradient, direction), difference, rtol=1e-6)
    smaller = params.W_hh - 1e-3 * gradient / jnp.linalg.norm(gradient)
    assert omega(smaller) < omega(params.W_hh)


def test_pascanu_without_gradient_is_zero_and_has_no_nan():
    cell = make_cell("elman")
    params, h_0, xs = problem(cell, 4)
    early = lambda h, ys: jnp.sum(jnp.sin(ys[1]))  # steps 3 and 4 have no gradient
    omega = lambda params: bptt.regularizers.pascanu(cell, params, h_0, xs, early)
    value, gradient = jax.jit(jax.value_and_grad(omega))(params)
    _, J = bptt.state_jacobians(cell, params, h_0, xs)
    d = np.asarray(bptt.gradient_flow(cell, params, h_0, xs, early).adjoints)
    expected = sum((np.linalg.norm(d[t] @ J[t]) / np.linalg.norm(d[t]) - 1) ** 2 for t in range(2))
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.slow
def test_flossing_moves_exponents_to_zero():
    cell = bptt.elman(2, 6, dtype=jnp.float64)
    params = cell.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (40, 2), jnp.float64)
    args = cell.initial_carry(), xs

    @jax.jit
    def floss(params):
        return bptt.regularizers.gradient_flossing(cell, params, *args, num_exponents=3, burn_in=5)

    exponents = lambda params: bptt.lyapunov_exponents(cell, params, *args, num_exponents=3, burn_in=5).exponents
    np.testing.assert_allclose(floss(params), np.mean(np.square(exponents(params))), rtol=1e-12)
    before, largest = floss(params), np.abs(exponents(params)).max()
    descend = jax.jit(lambda params: jax.tree.map(lambda p, g: p - 0.05 * g, params, jax.grad(floss)(params)))
    for _ in range(60):
        params = descend(params)
    assert floss(params) < 0.05 * before
    assert np.abs(exponents(params)).max() < 0.3 * largest


def clipped_by_hand(cell, params, h_0, xs, clip, hs_bar):
    """The recursion as a Python loop of vector-Jacobian products."""
    states = [h_0]
    for x in xs:
        states.append(cell.step(params, states[-1], x)[0])
    carry_bar, total = jnp.zeros_like(h_0), jax.tree.map(jnp.zeros_like, params)
    for t in reversed(range(len(xs))):
        _, pull = jax.vjp(lambda p, h, t=t: cell.step(p, h, xs[t]), params, states[t])
        params_bar, carry_bar = pull((carry_bar, hs_bar[t]))
        total = jax.tree.map(jnp.add, total, params_bar)
        carry_bar = clip(carry_bar)
    return total, carry_bar


@pytest.mark.parametrize("by", ["number", "function"])
@pytest.mark.parametrize("derived", [False, True])
@pytest.mark.costly
def test_clipped_adjoint(by, derived):
    cell = make_cell("elman")
    params, h_0, xs = problem(cell, 9)
    hs_bar = random_like(jax.ShapeDtypeStruct((9, 4), jnp.float64), 3)
    clip = {"number": lambda bar: jnp.clip(bar, -0.3, 0.3), "function": lambda bar: bar / (1 + jnp.linalg.norm(bar))}[
        by
    ]
    option = 0.3 if by == "number" else clip

    def loss(params, h_0, **options):
        return jnp.vdot(bptt.adjoint_scan(cell.step if derived else cell, params, h_0, xs, **options)[1], hs_bar)

    gradient = jax.jit(jax.grad(lambda p, h: loss(p, h, clip_adjoint=option), argnums=(0, 1)))(params, h_0)
    assert_close(gradient, clipped_by_hand(cell, params, h_0, xs, clip, hs_bar))
    exact = jax.grad(loss, argnums=(0, 1))(params, h_0)
    assert not np.allclose(gradient[0].W_hh, exact[0].W_hh, rtol=1e-2)
    loose = jax.grad(lambda p, h: loss(p, h, clip_adjoint=1e6), argnums=(0, 1))(params, h_0)
    assert_close(loose, exact)


def test_clipping_stops_an_explosion():
    step = lambda w, h, x: (w * h, None)
    gradient = lambda **options: jax.grad(
        lambda h: jnp.sum(bptt.adjoint_scan(step, 3.0, h, length=2_000, **options)[0] * 1e-300)
    )
    assert np.isinf(gradient()(jnp.full(1, 1e-300)))
    np.testing.assert_allclose(gradient(clip_adjoint=5.0)(jnp.full(1, 1e-300)), 5)


@pytest.mark.parametrize("clip", [0, -1.0, True, float("nan"), "1", {}, np.ones(2), jnp.ones(2)], ids=repr)
def test_wrong_clip(clip):
    with pytest.raises(ValueError, match=f"clip_adjoint is {re.escape(repr(clip))}, but it bounds a magnitude"):
        bptt.adjoint_scan(lambda w, h, x: (w * h, h), 1.0, 1.0, length=2, clip_adjoint=clip)


def test_initial_weights():
    key = jax.random.key(0)
    gates = bptt.lstm(3, 5, recurrent_init=bptt.initializers.identity(0.5)).init(key).W_hh
    np.testing.assert_array_equal(gates, np.concatenate([0.5 * np.eye(5)] * 4))
    W = np.asarray(bptt.gru(3, 5, recurrent_init=bptt.initializers.orthogonal(0.9), dtype=jnp.float64).init(key).W_hh)
    for block in np.split(W, 3):
        np.testing.assert_allclose(block @ block.T, 0.81 * np.eye(5), atol=1e-12)


def test_chrono_keeps_memory_for_as_long_as_asked():
    """Biases are log u with u even between 1 and length − 1: a tenth of the units keeps longer than 0.9 of the length."""
    key, n = jax.random.key(0), 4_000
    b = np.asarray(bptt.lstm(1, n, chrono_length=500, recurrent_init=jnp_zeros).init(key).b, float)
    b_i, b_f, rest = b[:n], b[n : 2 * n], b[2 * n :]
    np.testing.assert_array_equal(b_i, -b_f)
    assert not rest.any()
    kept = 1 + np.exp(b_f)  # 1 / (1 − σ(b))
    assert 2 <= kept.min() < 5
    assert 495 < kept.max() <= 500.01
    np.testing.assert_allclose(np.mean(kept > 450), 0.1, atol=0.02)
    z = np.asarray(bptt.gru(1, n, chrono_length=500, recurrent_init=jnp_zeros).init(key).b, float)
    assert not z[:n].any()
    assert not z[2 * n :].any()
    np.testing.assert_allclose(np.mean(1 + np.exp(z[n : 2 * n]) > 450), 0.1, atol=0.02)
    for cell in (bptt.lstm, bptt.gru):
        with pytest.raises(ValueError, match="chrono_length is 2, but the longest dependency has to be above 2"):
            cell(1, 3, chrono_length=2)


def jnp_zeros(key, shape, dtype):
    return jnp.zeros(shape, dtype)


def test_chrono_gate_forgets_at_the_rate_of_its_bias():
    """A GRU whose candidates are 0 decays by σ(b_z) a step: to 1/e in about as many steps as the length says."""
    cell = bptt.gru(1, 3, chrono_length=50, dtype=jnp.float64, recurrent_init=jnp_zeros, input_init=jnp_zeros)
    params = cell.init(jax.random.key(0))
    h, _ = bptt.scan(cell, params, jnp.ones(3), jnp.zeros((10, 1)))
    np.testing.assert_allclose(h, jax.nn.sigmoid(params.b[3:6]) ** 10, rtol=1e-10)
    assert math.isclose(float(h.max()), float(jax.nn.sigmoid(params.b[3:6].max()) ** 10), rel_tol=1e-10)
