"""What an influence keeps of the gradient, by lag: all of it if it is exact."""

import jax
import jax.numpy as jnp
import optax
import pytest
from reference import assert_close, make_cell, problem

import jaxbptt as bptt


def loss(carry, ys):
    return jnp.sum(ys**2 + ys) + sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(carry))


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


@pytest.mark.parametrize(
    "name", [pytest.param("none", marks=pytest.mark.slow), pytest.param("is_first", marks=pytest.mark.slow), "both"]
)
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
    rtrl = bptt.influences.rtrl()
    found = jax.jit(lambda: bptt.kept_contributions(*args, of_outputs, influence=rtrl).contributions)()
    assert_close(found, jax.jit(lambda: bptt.lag_contributions(*args, of_outputs).contributions)())


def test_parts_of_snap_are_those_that_its_mask_lets_through():
    """By a loop: what enters the masked influence at a step, multiplied by masked Jacobians until the loss."""
    cell, params, init, xs = args = make_cell("elman"), *problem(make_cell("elman"), 5)
    h, T = init, len(xs)
    a_bar = [2 * y + 1 for y in bptt.scan(cell, params, init, xs)[1]]
    a_bar[-1] += jnp.cos((a_bar[-1] - 1) / 2)  # the last carry is the last output
    parts = [jax.tree.map(jnp.zeros_like, params) for _ in range(T)]
    entered = []
    jacobians = jax.jit(jax.jacrev(lambda params, h, x: cell.step(params, h, x)[0], argnums=(0, 1)))
    for t in range(T):
        F, J = jacobians(params, h, xs[t])
        entered = [own_units(product(J, M)) for M in entered] + [own_units(F)]
        for s, M in enumerate(entered):
            parts[t - s] = jax.tree.map(jnp.add, parts[t - s], product(a_bar[t], M))
        h = cell.step(params, h, xs[t])[0]
    found = kept(args, bptt.influences.snap(1), max_lag=3)
    expected = jax.tree.map(lambda *lags: jnp.stack(lags), *parts[:4])
    assert_close(found.contributions, expected)
    exact = bptt.lag_contributions(*args, loss, max_lag=3)
    assert_close(found.exact_norms, exact.norms)
    assert_close(found.norm_ratios, jax.vmap(optax.tree.norm)(expected) / exact.norms)
    together = jax.vmap(optax.tree.vdot)(expected, exact.contributions)
    assert_close(found.cosines, together / jax.vmap(optax.tree.norm)(expected) / exact.norms)
    assert (found.cosines[1:] < 0.99).all()


def product(matrix, M):
    return jax.tree.map(lambda leaf: jnp.tensordot(matrix, leaf, 1), M)


def own_units(M):
    """An influence, leaves `[n, n, ...]`, where a weight belongs to the unit."""
    return jax.tree.map(lambda leaf: leaf * jnp.eye(len(leaf)).reshape(*leaf.shape[:2], *(1,) * (leaf.ndim - 2)), M)


def test_parts_of_a_random_influence_sum_to_its_estimate():
    """All drawn with the keys of `forward_scan`, so that lags have one and the same noise."""
    cell, params, init, xs = args = make_cell("elman"), *problem(make_cell("elman"), 5, (2,))
    found = kept(args, bptt.influences.uoro(), key=jax.random.key(3))

    def drawn(params):
        options = {"influence": bptt.influences.uoro(), "key": jax.random.key(3)}
        return loss(*bptt.forward_scan(cell, params, init, xs, **options))

    assert_close(jax.tree.map(lambda leaf: leaf.sum(0), found.contributions), jax.jit(jax.grad(drawn))(params))
    assert (found.cosines < 0.999).all()


def test_wrong_arguments():
    args = make_cell("elman"), *problem(make_cell("elman"), 4)
    with pytest.raises(TypeError, match="influence is a function, but an Influence is expected"):
        bptt.kept_contributions(*args, loss, influence=bptt.influences.rtrl)
    with pytest.raises(ValueError, match="max_lag"):
        bptt.kept_contributions(*args, loss, influence=bptt.influences.rtrl(), max_lag=4)
