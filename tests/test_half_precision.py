"""Sums over time are in single precision at least, whatever the recurrence is computed in."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import problem

import jaxbptt as bptt
from jaxbptt.analysis import norms
from jaxbptt.analysis.credit import LagContributions

halves = pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16], ids=["float16", "bfloat16"])


@halves
def test_norms(dtype):
    """70,000 squares of 1: float16 overflows, and bfloat16 rounds the sum to 70,144."""
    ones = jnp.ones((1, 70_000), dtype)
    root = np.sqrt(70_000)
    np.testing.assert_allclose(norms.norm(ones), root, rtol=1e-6)
    np.testing.assert_allclose(norms.norm_over_time({"h": ones}), [root], rtol=1e-6)
    np.testing.assert_allclose(norms.tree_norm({"W": ones, "b": jnp.zeros(2)}), root, rtol=1e-6)
    np.testing.assert_allclose(norms.cosine(ones, 3 * ones), 1, rtol=1e-6)


@halves
def test_logarithms_of_a_product(dtype):
    J = jnp.full((5_000, 1, 1), 0.75, dtype)
    products = bptt.jacobian_products(J)
    np.testing.assert_allclose(float(products.log_scales[0]), 4_999 * np.log(0.75), rtol=1e-6)
    values, _ = bptt.product_log_singular_values(products)
    np.testing.assert_allclose(float(values[0, 0]), 4_999 * np.log(0.75), rtol=1e-6)


@halves
@pytest.mark.costly
def test_sums_over_lags(dtype):
    """A tail that falls by 1/512 a lag: each term is too small to change a sum in half precision."""
    terms = jnp.asarray(0.998 ** np.arange(3_000), dtype)
    wide = terms.astype(jnp.float64)
    sizes = jnp.asarray(norms.norm(terms[:, None], (1,)))
    lags = LagContributions(terms, wide.sum().astype(dtype), sizes, None, None)
    expected = LagContributions(wide, wide.sum(), wide, None, None)
    for eps in (0.5, 0.1):
        assert abs(bptt.effective_horizon(lags, eps) - bptt.effective_horizon(expected, eps)) <= 5
    mine, theirs = (bptt.adaptive_truncation_length(some, relative_bias=0.1).window for some in (lags, expected))
    assert abs(mine - theirs) <= 5


@pytest.mark.slow
def test_textbook_and_pascanu():
    cell = bptt.elman(3, 4, dtype=jnp.bfloat16)
    net = bptt.network(cell, 2)
    params = net.init(jax.random.key(0))
    xs, targets = jax.random.normal(jax.random.key(1), (1_000, 3), jnp.bfloat16), jnp.zeros(1_000, int)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, xs, cell.initial_carry()))
    mine, theirs = bptt.bptt(params, xs, cell.initial_carry(), targets), bptt.bptt(*wide, targets)
    np.testing.assert_allclose(mine.loss, theirs.loss, rtol=1e-6)
    np.testing.assert_allclose(mine.dW_hy, theirs.dW_hy, rtol=1e-6)
    # Ω of h → w h is T (w − 1)², here 300 / 4: a sum of quarters stops at 64 in bfloat16.
    half, one = jnp.asarray(0.5, jnp.bfloat16), jnp.ones((), jnp.bfloat16)
    step = lambda w, h, x: (w * h + (h - jax.lax.stop_gradient(h)) * 0, None)
    omega = bptt.regularizers.pascanu(step, half, one, None, lambda h, ys: h, length=100)
    assert omega.dtype == jnp.bfloat16
    assert omega == 25


def test_norms_of_an_update():
    """Squares beyond 65,504 are infinite in float16."""

    def loss(params, carry, chunk, *, scan, key):
        return jnp.sum(300 * params), carry

    init, update = bptt.tbptt(loss, optax.sgd(0.1))
    state = init(jnp.ones(4, jnp.float16), jnp.full((1, 4), 300, jnp.float16), jax.random.key(0))
    _, metrics = update(state, bptt.Chunk(jnp.ones((2, 1, 1), jnp.float16)))
    assert metrics.gradient_norm == metrics.carry_norm == 600


@pytest.mark.slow
@halves
def test_diagnosis(dtype):
    cell = bptt.elman(3, 4, dtype=dtype)
    params, init, xs = problem(cell, 600, dtype=dtype)
    loss = lambda h, ys: jnp.sum(h)
    found = bptt.diagnose_gradient(cell, params, init, xs, loss)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, init, xs))
    expected = bptt.diagnose_gradient(bptt.elman(3, 4, dtype=jnp.float64), *wide, loss)
    assert found.cause == expected.cause
    np.testing.assert_allclose(list(found.slopes.values()), list(expected.slopes.values()), rtol=0.02)
