"""Each likely cause is named for a gradient that has just that fault, made by a loop with the fault in it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import problem

import jaxbptt as bptt

STEPS = 8


def loss(h, hs):
    return jnp.sum(jnp.sin(hs))


def manual_bptt(params, h_0, xs, *, last_step=0, previous=1):
    """The textbook's loop for the elman cell, with two places to go wrong: where it stops, and which state it takes."""
    hs = [h_0]
    for x in xs:
        hs.append(jnp.tanh(params.W_hh @ hs[-1] + params.W_xh @ x + params.b))
    dW_xh, dW_hh, db = (jnp.zeros_like(leaf) for leaf in params)
    dh_next = jnp.zeros_like(h_0)
    for t in reversed(range(last_step, STEPS)):
        dh_raw = (jnp.cos(hs[t + 1]) + dh_next) * (1 - hs[t + 1] ** 2)
        dW_xh, dW_hh = dW_xh + jnp.outer(dh_raw, xs[t]), dW_hh + jnp.outer(dh_raw, hs[t + 1 - previous])
        db = db + dh_raw
        dh_next = params.W_hh.T @ dh_raw
    return bptt.ElmanParams(dW_xh, dW_hh, db)


@pytest.fixture
def setup():
    cell = bptt.elman(6, 6, dtype=jnp.float64)
    params, h_0, xs = problem(cell, STEPS)
    xs = jax.random.normal(jax.random.key(3), (STEPS, 6))
    reference = jax.grad(lambda p: loss(*bptt.scan(cell, p, h_0, xs)))(params)
    return cell, params, h_0, xs, reference


def causes(mine, reference, **options):
    return {leaf.leaf: leaf.cause for leaf in bptt.compare_gradients(mine, reference, **options).leaves}


def test_right(setup):
    _, params, h_0, xs, reference = setup
    report = bptt.compare_gradients(manual_bptt(params, h_0, xs), reference)
    assert report.agrees
    assert report.cause == "agrees"
    assert [leaf.leaf for leaf in report.leaves] == ["gradient.W_xh", "gradient.W_hh", "gradient.b"]
    assert all(leaf.cosine == pytest.approx(1) and leaf.ratio == pytest.approx(1) for leaf in report.leaves)
    assert str(report).count("agrees") == 3


def test_missing_step(setup):
    cell, params, h_0, xs, reference = setup
    mine = manual_bptt(params, h_0, xs, last_step=1)
    alone = bptt.compare_gradients(mine, reference)
    assert not alone.agrees
    assert alone.cause.startswith("no single cause found: pass step, params")
    assert alone.leaves[0].cause.endswith("and the difference has rank 1")
    temporal = bptt.temporal_contributions(cell, params, h_0, xs, loss)
    assert set(causes(mine, reference, temporal=temporal).values()) == {"time step 0 (counted from 0) is missing"}
    twice = jax.tree.map(lambda g, c: g + c[5], reference, temporal.contributions)
    assert set(causes(twice, reference, temporal=temporal).values()) == {
        "time step 5 (counted from 0) is counted twice"
    }


@pytest.mark.slow
def test_missing_lag(setup):
    cell, params, h_0, xs, reference = setup
    lags = bptt.lag_contributions(cell, params, h_0, xs, loss)
    for kept in (3, STEPS - 1):
        mine = jax.tree.map(lambda leaf, kept=kept: leaf[:kept].sum(axis=0), lags.contributions)
        found = causes(mine, reference, lags=lags)
        expected = f"it has the first {kept} of 8 lags, longer paths are cut"
        assert set(found.values()) == {"one lag short: " * (kept == STEPS - 1) + expected}


def test_state_of_the_wrong_step(setup):
    """With hₜ in place of hₜ₋₁ only W_hh is wrong, and no single cause is made up for it."""
    _, params, h_0, xs, reference = setup
    found = causes(manual_bptt(params, h_0, xs, previous=0), reference)
    assert found["gradient.W_xh"] == found["gradient.b"] == "agrees"
    assert found["gradient.W_hh"].startswith("no single cause found: it is nearest to")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (lambda leaf: STEPS * leaf, "it is 8 times the reference, a factor T: one is a sum over time steps"),
        (lambda leaf: leaf / STEPS, "it is 1/8 of the reference, a factor T: one is a sum over time steps"),
        (
            lambda leaf: 5 * leaf,
            "it is 5 times the reference: perhaps one is a sum over 5 time steps or rows, the other a mean",
        ),
        (lambda leaf: 0.3 * leaf, "it is 0.3 times the reference"),
        (lambda leaf: -leaf, "it has the wrong sign"),
        (lambda leaf: 0 * leaf, "it is 0 everywhere"),
        (lambda leaf: leaf.at[..., 0].set(jnp.nan), "it has nan or inf in"),
    ],
)
@pytest.mark.costly
def test_whole_gradient(setup, change, cause):
    cell, params, h_0, xs, reference = setup
    temporal = bptt.temporal_contributions(cell, params, h_0, xs, loss)
    report = bptt.compare_gradients(jax.tree.map(change, reference), reference, temporal=temporal)
    assert not report.agrees
    assert all(leaf.cause.startswith(cause) for leaf in report.leaves)


def test_transpose_square_and_not(setup):
    *_, reference = setup
    assert causes(reference._replace(W_hh=reference.W_hh.T), reference)["gradient.W_hh"] == "it is the transpose"
    wide = {"W": jnp.arange(6.0).reshape(2, 3)}
    assert causes({"W": wide["W"].T}, wide) == {"gradient['W']": "it is the transpose"}
    assert causes({"W": jnp.ones((2, 2))}, wide) == {"gradient['W']": "it has shape (2, 2), not (2, 3)"}


def test_clipped_and_not_summed(setup):
    *_, reference = setup
    clipped = jax.tree.map(lambda leaf: jnp.clip(leaf, -0.5, 0.5), reference)
    assert bptt.compare_gradients(clipped, reference).cause == "its entries are clipped at ±0.5"
    rows = {"b": jnp.array([[1.0, 2.0], [3.0, 5.0]])}
    found = causes(rows, {"b": jnp.array([4.0, 7.0])})
    assert found == {"gradient['b']": "it has shape (2, 2), not (2,): it is not summed over its first axis"}


def test_precision_sets_the_tolerance():
    reference = jnp.linspace(1, 2, 5)
    near = reference * (1 + 1e-6 * jnp.arange(5.0))
    assert not bptt.compare_gradients(near, reference).agrees
    assert bptt.compare_gradients(near.astype(jnp.float32), reference.astype(jnp.float32)).agrees
    assert bptt.compare_gradients(near.astype(jnp.bfloat16), reference).agrees


def test_leaves_without_derivative_are_left_out_and_structures_must_match():
    tree = {"w": jnp.ones(3), "n": jnp.array(2)}
    assert [leaf.leaf for leaf in bptt.compare_gradients(tree, tree).leaves] == ["gradient['w']"]
    assert bptt.compare_gradients({"w": jnp.zeros(3)}, {"w": jnp.zeros(3)}).agrees
    with pytest.raises(ValueError, match="differ in structure"):
        bptt.compare_gradients({"v": jnp.ones(3)}, tree)


def test_numpy_gradients_will_do():
    assert bptt.compare_gradients({"w": np.ones(3)}, {"w": np.ones(3)}).agrees


def test_whole_factors_that_are_no_chance():
    """A large factor is near a whole number whatever it is, and one near 1 is no factor."""
    reference = {"b": jnp.array([1.0, -2.0, 3.0], jnp.float32)}
    factors = {
        1 / 5000.3: "it is 0.000199988 times the reference",
        1 / 538.7: "it is 0.00185632 times the reference",
        100: "it is 100 times the reference: perhaps one is a sum over 100 time steps or rows, the other a mean",
        1 / 8.003: "it is 0.124953 times the reference",
    }
    for factor, cause in factors.items():
        mine = jax.tree.map(lambda leaf, factor=factor: leaf * jnp.float32(factor), reference)
        assert bptt.compare_gradients(mine, reference).cause == cause
    near = {"b": reference["b"] * jnp.array([1.0, 1.0002, 1.0], jnp.float32)}
    assert bptt.compare_gradients(near, reference).cause.startswith("no single cause found")


@pytest.mark.parametrize(
    ("mine", "reference", "cause"),
    [
        ([np.inf, 1], [np.inf, 1], "the reference itself has nan or inf"),
        ([np.inf, 1], [2, 1], "it has nan or inf in 1 of 2 entries"),
        ([1e308, 1], [-1e308, -1], "it has the wrong sign"),
        ([1, 2], [0, 0], "the reference is 0 everywhere, and it is not"),
        ([1 + 2j, 1j], [1 - 2j, -1j], "it is the complex conjugate"),
        ([3 + 6j, 3j], [1 + 2j, 1j], "it is 3 times the reference: perhaps one is a sum over 3"),
    ],
)
def test_numbers_out_of_the_ordinary(mine, reference, cause):
    report = bptt.compare_gradients(
        *({"b": np.asarray(leaf, complex if np.iscomplexobj(leaf) else float)} for leaf in (mine, reference))
    )
    assert report.cause.startswith(cause)
    assert not report.agrees
