"""What an influence keeps of the gradient, by lag: all of it if it is exact."""

import jax
import jax.numpy as jnp
import pytest
from reference import assert_close, make_cell, problem

import jaxbptt as bptt


def loss(carry, ys):
    return jnp.sum(ys**2) + sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(carry))


def kept(args, influence, **options):
    cell, params, init, xs = args
    return jax.jit(
        lambda params: bptt.kept_contributions(cell, params, init, xs, loss, influence=influence, **options)
    )(params)


ROWS = jnp.arange(16).reshape(8, 2)
FLAGS = {
    "none": {},
    "is_first": {"is_first": ROWS % 7 == 5},
    "both": {"is_first": ROWS % 7 == 5, "valid": ROWS % 5 != 2},
}


@pytest.mark.parametrize("name", ["none", pytest.param("is_first", marks=pytest.mark.slow), "both"])
def test_an_exact_influence_keeps_all(name):
    """By lag, as a scan over the lag finds them."""
    cell, flags = make_cell("lstm"), FLAGS[name]
    args = cell, *problem(cell, 8, (2,))
    found = kept(args, bptt.influences.rtrl(), **flags)
    lags = bptt.lag_contributions(*args, loss, **flags)
    assert_close(found.contributions, lags.contributions)
    assert_close(found.exact_norms, lags.norms)
    some = found.exact_norms > 0
    assert_close(found.cosines[some], jnp.ones(int(some.sum())))
    assert_close(found.norm_ratios[some], jnp.ones(int(some.sum())))


def test_the_output_reads_the_carry_before_and_the_params():
    def step(w, h, x):
        return jnp.tanh(w * h + x), (h * w, w)

    args = step, jnp.array([0.5, 0.9]), jnp.ones(2), jnp.linspace(-1.0, 1.0, 10).reshape(5, 2)
    of_outputs = lambda h, ys: jnp.sum(ys[0] ** 2) + jnp.sum(jnp.sin(ys[1]))
    found = bptt.kept_contributions(*args, of_outputs, influence=bptt.influences.rtrl())
    assert_close(found.contributions, bptt.lag_contributions(*args, of_outputs).contributions)


def test_parts_sum_to_the_estimate_and_fade_where_paths_are_left_out():
    args = make_cell("gru"), *problem(make_cell("gru"), 8, (2,))
    found = kept(args, bptt.influences.snap(1))
    cell, params, init, xs = args

    def by_snap(params):
        return loss(*bptt.forward_scan(cell, params, init, xs, influence=bptt.influences.snap(1)))

    assert_close(jax.tree.map(lambda leaf: leaf.sum(0), found.contributions), jax.grad(by_snap)(params))
    assert_close(found.cosines[0], jnp.ones(()))
    assert (found.cosines[2:] < 0.99).all()
    assert len(kept(args, bptt.influences.snap(1), max_lag=2).cosines) == 3


def test_wrong_arguments():
    args = make_cell("elman"), *problem(make_cell("elman"), 4)
    with pytest.raises(TypeError, match="influence is a function, but an Influence is expected"):
        bptt.kept_contributions(*args, loss, influence=bptt.influences.rtrl)
    with pytest.raises(ValueError, match="max_lag"):
        bptt.kept_contributions(*args, loss, influence=bptt.influences.rtrl(), max_lag=4)
