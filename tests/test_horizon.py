"""How far back is far enough: against closed forms, and against the bias that a window really has."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import make_cell, problem

import jaxbptt as bptt

effective_horizon = jax.jit(bptt.effective_horizon, static_argnums=1)


def decaying(rate, weights, *, lags, steps=1_000, dtype=jnp.float64):
    """Each step back counts `rate` times as much: ‖G⁽ˡ⁾‖ = rateˡ for each weight."""
    step = lambda w, h, x: ({k: w[k] + jnp.asarray(rate[k], dtype) * h[k] for k in w}, None)
    weights = {k: jnp.asarray(w, dtype) for k, w in weights.items()}
    zeros = jax.tree.map(jnp.zeros_like, weights)
    loss = lambda h, ys: sum(h.values())
    compiled = jax.jit(
        lambda weights: bptt.lag_contributions(step, weights, zeros, None, loss, length=steps, max_lag=lags - 1)
    )
    return compiled(weights)


def test_horizon_of_each_leaf():
    lags = decaying({"fast": 0.1, "slow": 0.5}, {"fast": 1.0, "slow": 1.0}, lags=60)
    horizon = effective_horizon(lags, 0.9e-3)
    # 0.1^4 is the first power below 0.0009, and 0.5^11 is: what is left out after K lags is rate^K of the whole.
    assert (int(horizon["fast"]), int(horizon["slow"])) == (4, 11)


@pytest.mark.parametrize(("dtype", "bits"), [(jnp.float32, 23), (jnp.float64, 52)])
def test_horizon_of_the_dtype(dtype, bits):
    """What lies further back than the digits of the number format."""
    lags = decaying({"w": 0.5}, {"w": 1.0}, lags=80, steps=80, dtype=dtype)
    assert int(effective_horizon(lags)["w"]) in (bits, bits + 1)


def test_horizon_beyond_the_lags_computed_and_of_no_gradient():
    lags = decaying({"w": 0.9, "none": 0.5}, {"w": 1.0, "none": 1.0}, lags=5)
    assert int(effective_horizon(lags, 0.01)["w"]) == 6
    nothing = jax.tree.map(jnp.zeros_like, lags)
    assert int(effective_horizon(nothing)["w"]) == 0


def test_horizon_is_where_the_window_is_exact():
    cell = make_cell("gru")
    args = problem(cell, 40)
    loss = lambda h, ys: jnp.sum(jnp.sin(ys))
    lags = jax.jit(lambda *args: bptt.lag_contributions(cell, *args, loss))(*args)
    horizon = effective_horizon(lags, 0.05)
    for leaf, K in zip(jax.tree.leaves(lags.contributions), jax.tree.leaves(horizon), strict=True):
        whole = leaf.sum(axis=0)
        left_out = [np.linalg.norm(whole - leaf[:k].sum(axis=0)) / np.linalg.norm(whole) for k in (K - 1, K)]
        assert left_out[0] >= 0.05 > left_out[1]


@pytest.mark.parametrize("eps", [0, 1, -0.1])
def test_wrong_eps(eps):
    with pytest.raises(ValueError, match=r"eps is .*, but it is a fraction of the gradient"):
        bptt.effective_horizon(decaying({"w": 0.5}, {"w": 1.0}, lags=3), eps)


@pytest.mark.parametrize("relative_bias", [0.3, 0.01, 1e-6])
def test_geometric_decay_gives_the_smallest_window(relative_bias):
    """Rate β: the bias of a window of K steps is β^K. The bound knows ‖g‖ only from the lags that were computed."""
    found = bptt.adaptive_truncation_length(decaying({"w": 0.8}, {"w": 1.0}, lags=30), relative_bias=relative_bias)
    np.testing.assert_allclose(found.decay_rate, 0.8, rtol=1e-10)
    assert 0.8**found.window <= found.bound <= relative_bias
    assert found.bound / 0.8 > relative_bias  # one step less would not do
    assert f"A window of {found.window} steps" in found.reason
    assert ("beyond the 30 lags" in found.reason) == (found.window > 30)


def test_bound_holds_for_a_network():
    """The lags of 12 steps certify windows, whose bias on all of the sequence is measured."""
    cell = make_cell("elman")
    params, h_0, xs = problem(cell, 150)
    args = params._replace(W_hh=0.5 * params.W_hh), h_0, xs
    loss = lambda h, ys: jnp.sum(jnp.sin(ys))
    lags = jax.jit(lambda *args: bptt.lag_contributions(cell, *args, loss, max_lag=11))(*args)
    found = bptt.adaptive_truncation_length(lags, relative_bias=0.05)
    assert found.window is not None
    bias = jax.jit(lambda *args: bptt.truncation_bias(cell, *args, loss, lengths=[found.window]))(*args)
    assert bias.windowed.relative_errors[0] <= found.bound <= 0.05


def test_decay_is_an_upper_envelope():
    """Contributions that go up and down: what lies beyond is bounded by the largest of them, not by the middle."""
    norms = np.where(np.arange(200) % 3 == 0, 1.0, 0.2) * 0.9 ** np.arange(200)
    lags = decaying({"w": 0.5}, {"w": 1.0}, lags=20)
    lags = lags._replace(norms=norms[:20], contributions={"w": norms[:20]})
    for relative_bias in (0.3, 0.1, 0.01):
        found = bptt.adaptive_truncation_length(lags, relative_bias=relative_bias)
        left_out = norms[found.window :].sum() / norms.sum()
        assert left_out <= found.bound <= relative_bias


@pytest.mark.parametrize("max_lag", [9, 10, 21])
def test_lags_that_contribute_nothing_are_no_end(max_lag):
    """Two states that swap places: every other lag has nothing, and 0.99 a swap is hardly a decay."""
    swap = lambda w, c, x: ((0.99 * c[1] + w, c[0]), None)
    loss = lambda c, ys: c[0]
    measure = lambda w: bptt.lag_contributions(swap, w, (0.0, 0.0), None, loss, max_lag=max_lag, length=1_000)
    lags = jax.jit(measure)(1.0)
    found = bptt.adaptive_truncation_length(lags)
    assert found.window is None
    np.testing.assert_allclose(found.decay_rate, np.sqrt(0.99), rtol=1e-9)


def test_horizon_is_not_moved_by_the_rounding_of_the_sum():
    """All lags are there, so nothing can lie beyond them, in single precision neither."""
    cell = make_cell("gru", jnp.float32)
    args = problem(cell, 30, dtype=jnp.float32)
    lags = jax.jit(lambda *args: bptt.lag_contributions(cell, *args, lambda h, ys: jnp.sum(jnp.sin(ys))))(*args)
    assert max(int(K) for K in jax.tree.leaves(effective_horizon(lags))) <= 30


def test_no_bound():
    growing = bptt.adaptive_truncation_length(decaying({"w": 1.01}, {"w": 1.0}, lags=20, steps=100))
    assert growing.window is None
    assert growing.bound == np.inf
    assert "No bound: from lag 10 on the contributions do not fall" in growing.reason
    # 0.99 falls, but so slowly that twenty lags say little about the whole.
    slow = bptt.adaptive_truncation_length(decaying({"w": 0.99}, {"w": 1.0}, lags=20))
    assert slow.window is None
    assert "what may lie beyond lag 19 is as large as all up to it" in slow.reason
    lags = decaying({"w": 0.5}, {"w": 1.0}, lags=20)
    alone = bptt.adaptive_truncation_length(lags._replace(norms=lags.norms.at[10:19].set(0)))
    assert alone.window is None
    assert "only one lag contributes" in alone.reason
    broken = bptt.adaptive_truncation_length(lags._replace(norms=lags.norms.at[3].set(jnp.nan)))
    assert broken.window is None
    assert "not finite" in broken.reason


def test_a_gradient_that_ends_needs_no_extrapolation():
    """Nothing is passed on, so one step has it all."""
    found = bptt.adaptive_truncation_length(decaying({"w": 0.0}, {"w": 1.0}, lags=10), relative_bias=1e-9)
    assert (found.window, found.decay_rate, found.bound) == (1, 0.0, 0.0)


def test_wrong_arguments():
    lags = decaying({"w": 0.5}, {"w": 1.0}, lags=4)
    with pytest.raises(ValueError, match="relative_bias is 0, but it bounds a relative error"):
        bptt.adaptive_truncation_length(lags, relative_bias=0)
    for fit_from in (-1, 3):
        with pytest.raises(ValueError, match=f"fit_from is {fit_from}, but of 4 lags at least two are needed"):
            bptt.adaptive_truncation_length(lags, fit_from=fit_from)
