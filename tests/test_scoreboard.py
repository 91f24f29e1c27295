"""Gradients held against the exact one: what is measured of known errors, biases and variances is what they are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import make_cell, problem

import jaxbptt as bptt
from jaxbptt.analysis import scoreboard
from jaxbptt.analysis.cost import compile_and_cost as cost_of

CELL = make_cell("elman")


def loss(carry, ys):
    return jnp.sum(ys**2)


def board(scans, steps=5, batch=(2,), **options):
    return bptt.score_gradients(CELL, *problem(CELL, steps, batch), loss, scans=scans, repeats=1, **options)


def exact_gradient():
    params, init, xs = problem(CELL, 5, (2,))
    return jax.grad(lambda params: loss(*bptt.scan(CELL, params, init, xs)))(params)


def changed(change):
    """`scan`, with a function of its gradient of the params, and of a key."""

    def strategy(step, params, init, xs, *, length=None, key=None):
        @jax.custom_vjp
        def through(params):
            return params

        through.defvjp(lambda params: (params, None), lambda _, bars: (change(bars, key),))
        return bptt.scan(step, through(params), init, xs, length=length)

    return strategy


def noisy(bias, scale):
    """With an error of `bias` and noise of this standard deviation in the one entry W_hh[0, 0]."""

    def change(bars, key):
        noise = scale * jax.random.normal(key, (), bars.W_hh.dtype)
        return bars._replace(W_hh=bars.W_hh.at[0, 0].add(bias + noise))

    return changed(change)


def test_known_errors(monkeypatch):
    """And costs by time step."""
    monkeypatch.setattr(scoreboard, "median_seconds", lambda calls, repeats: [float(i) for i, _ in enumerate(calls)])
    operations = []

    def compile_and_cost(*args):
        compiled, cost = cost_of(*args)
        operations.append(cost.flops)
        return compiled, cost

    monkeypatch.setattr(scoreboard, "compile_and_cost", compile_and_cost)
    twice = changed(lambda bars, key: jax.tree.map(lambda leaf: 2 * leaf, bars))
    back = changed(lambda bars, key: jax.tree.map(jnp.negative, bars))
    nothing = changed(lambda bars, key: jax.tree.map(jnp.zeros_like, bars))
    found = board({"twice": twice, "back": back, "nothing": nothing, "forward": bptt.forward_scan})
    twice, back, nothing, forward = found.rows
    np.testing.assert_allclose(twice[1:7], (1, 1, 2, 1, 0, 0), atol=1e-12)
    np.testing.assert_allclose(back[1:7], (-1, 2, 1, 2, 0, 0), atol=1e-12)
    assert np.isnan(nothing.cosine)
    assert nothing.relative_error == 1
    assert forward.relative_error < 1e-10
    assert {row.draws for row in found.rows} == {1}
    assert found.exact.name == "scan"
    assert found.exact.relative_error == 0
    rows = found.exact, *found.rows
    np.testing.assert_allclose([row.seconds for row in rows], np.arange(5) / 5)
    np.testing.assert_allclose([row.flops for row in rows], np.array(operations) / 5)


def test_bias_and_variance_of_random_ones():
    """Of noise of 0.5 and an error of 3 in one entry, in 400 draws: within four standard errors of what they are."""
    keys = jax.random.split(jax.random.key(1), 400)
    found = board({"noisy": noisy(0.0, 0.5), "biased": noisy(3.0, 0.5)}, keys=keys)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in exact_gradient()))
    for row, bias in zip(found.rows, (0.0, 3.0), strict=True):
        assert row.draws == 400
        np.testing.assert_allclose(row.variance, 0.25 / norm**2, rtol=4 * np.sqrt(2 / 400))
        np.testing.assert_allclose(row.standard_error, np.sqrt(row.variance / 400), rtol=1e-12)
        assert abs(row.bias - bias / norm) < 4 * row.standard_error
    assert found.rows[1].bias > 10 * found.rows[1].standard_error
    assert found.rows[0].relative_error > found.rows[0].bias


def test_variance_of_few_draws_is_unbiased():
    """Σ‖g − ḡ‖² over the number of draws less one; one draw has none."""
    keys = jax.random.split(jax.random.key(1), 3)
    drawn = [float(jax.random.normal(key, (), float)) for key in keys]
    row = board({"noisy": noisy(0.0, 1.0)}, keys=keys).rows[0]
    one = board({"noisy": noisy(0.0, 1.0)}, keys=keys[:1]).rows[0]
    exact = drawn[0] / one.relative_error
    np.testing.assert_allclose(row.variance, np.var(drawn, ddof=1) / exact**2)
    along = float(exact_gradient().W_hh[0, 0])
    norms = [np.sqrt(exact**2 + 2 * along * noise + noise**2) for noise in drawn]
    np.testing.assert_allclose(row.norm_ratio, np.mean(norms) / abs(exact))
    assert np.isnan(one.variance)
    assert np.isnan(one.standard_error)


@pytest.mark.slow
def test_truncations_are_those_of_truncation_bias():
    lengths = 1, 4
    scans = {f"K = {K}": partial(bptt.truncated_scan, truncation_length=K) for K in lengths}
    found = board(scans)
    bias = bptt.truncation_bias(CELL, *problem(CELL, 5, (2,)), loss, lengths=lengths).truncated
    np.testing.assert_allclose([row.relative_error for row in found.rows], bias.relative_errors, rtol=1e-10)
    np.testing.assert_allclose([row.cosine for row in found.rows], bias.cosines, rtol=1e-10)


def test_by_leaf_and_flags():
    """Leaves are named; flags reach every strategy; what is bound to a strategy is left as it is."""
    flags = {"is_first": jnp.arange(10).reshape(5, 2) % 5 == 3, "valid": jnp.arange(10).reshape(5, 2) != 4}
    uoro = partial(bptt.forward_scan, influence=bptt.influences.uoro())
    scans = {"rtrl": bptt.forward_scan, "drawn": uoro, "drawn once": partial(uoro, key=jax.random.key(0))}
    rtrl, drawn, once = board(scans, keys=jax.random.split(jax.random.key(0), 3), by_leaf=True, **flags).rows
    assert set(rtrl.leaves) == {"params.W_xh", "params.W_hh", "params.b"}
    assert max(leaf.relative_error for leaf in rtrl.leaves.values()) < 1e-10
    assert (drawn.draws, once.draws, once.variance) == (3, 1, 0)
    assert drawn.variance > 0


@pytest.mark.slow
def test_defaults():
    """Truncations and every influence; what does not fit the step is named, and why."""

    def step(params, h, x):
        return jnp.tanh(jnp.sin(params) @ h + x), h

    found = bptt.score_gradients(step, jnp.eye(3) + 0.1, jnp.ones(3), jnp.ones((6, 3)), loss, repeats=1)
    names = {row.name for row in found.rows}
    assert {"truncated, K = 1", "truncated, K = 2", "rtrl", "snap(1)", "snap(2)", "eprop", "rflo", "uoro"} <= names
    assert set(found.skipped) == {"kf_rtrl", "low_rank(4)"}
    assert "Left out: kf_rtrl. " in str(found)
    rows = {row.name: row for row in found.rows}
    assert rows["rtrl"].relative_error < 1e-10
    assert rows["uoro"].draws == 16
    assert rows["uoro"].flops > rows["truncated, K = 1"].flops > found.exact.flops > 0


def test_wrong_arguments():
    with pytest.raises(TypeError, match="keys is a int, but random keys"):
        board([bptt.forward_scan], keys=3)
    with pytest.raises(TypeError, match=r"keys is of shape \(\), but random keys"):
        board([bptt.forward_scan], keys=jax.random.key(0))
    with pytest.raises(ValueError, match="More than one method is called 'scan'"):
        board([bptt.scan])
    with pytest.raises(ValueError, match="no time steps"):
        board([bptt.forward_scan], steps=0)
    with pytest.raises(ValueError, match="The exact gradient is 0"):
        bptt.score_gradients(CELL, *problem(CELL, 3), lambda h, hs: jnp.sum(0.0 * hs), scans={}, repeats=1)
    with pytest.raises(ValueError, match="uoro"):
        board({"uoro": partial(bptt.forward_scan, influence=bptt.influences.uoro(), key=None)})
