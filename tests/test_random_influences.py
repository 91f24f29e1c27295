"""Influences that draw random signs are right on average: over all patterns of signs, and not only within an error of sampling."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, random_like

import jaxbptt as bptt
from jaxbptt.influences import signs

INFLUENCES = {"uoro": bptt.influences.uoro}
influences = pytest.mark.parametrize("make", INFLUENCES.values(), ids=INFLUENCES)
KEY = jax.random.key(0)


def total(carry, ys):
    """Of the last carry and of all outputs, each with weights of its own."""
    leaves = jax.tree.leaves((carry, ys))
    return sum(jnp.sum(w * jnp.sin(leaf)) for w, leaf in zip(random_like(leaves, 9), leaves, strict=True))


def drawn_per_step(influence, step, params, carry, x):
    """How many signs one row draws in one step."""
    M = influence.init(step, params, carry, x)
    drawn = []

    def counted(key, shape, dtype):
        drawn.append(int(np.prod(shape)))
        return jnp.ones(shape, dtype)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(signs, "signs", counted)
        jax.eval_shape(partial(influence.advance, step), params, carry, x, M, KEY)
    (count,) = drawn
    return count


def with_given_signs(influence, monkeypatch):
    """The influence of a step on (x, signs): it takes its signs from the input."""
    given = []
    monkeypatch.setattr(signs, "signs", lambda key, shape, dtype: given[-1].reshape(shape).astype(dtype))

    def advance(step, params, carry, x, M, key):
        given.append(x[0][1])
        M = influence.advance(step, params, carry, x, M, key)
        given.pop()
        return M

    return influence._replace(advance=advance)


def mean_over_patterns(influence, monkeypatch, step, params, init, xs, *, rows=(), **flags):
    """The gradient of a loss of all outputs: the mean of those by all patterns of signs, their spread, and that by BPTT."""
    length = len(jax.tree.leaves(xs)[0])
    row = lambda leaf: leaf[(0,) * len(rows)]
    one = drawn_per_step(influence, step, params, jax.tree.map(row, init), jax.tree.map(lambda leaf: row(leaf[0]), xs))
    count = length * one * int(np.prod(rows))
    assert count <= 12
    patterns = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=count))).reshape(-1, length, *rows, one)
    given = with_given_signs(influence, monkeypatch)

    def loss(scan, params, xs):
        return total(*scan(lambda params, carry, x: step(params, carry, x[0]), params, init, xs, **flags))

    @jax.jit
    def gradients():
        scan = partial(bptt.forward_scan, influence=given, key=KEY)
        drawn = jax.lax.map(lambda signs: jax.grad(partial(loss, scan))(params, (xs, signs)), patterns)
        mean, spread = (jax.tree.map(lambda leaf, by=by: by(leaf, 0), drawn) for by in (jnp.mean, jnp.std))
        return mean, spread, jax.grad(partial(loss, bptt.scan))(params, (xs, patterns[0]))

    return gradients()


def tiny(cell, length=3, batch=()):
    """Params that none is zero of, a carry and inputs."""
    params = random_like(jax.eval_shape(cell.init, KEY), 0, 0.7)
    init = random_like(cell.initial_carry(batch), 1)
    return cell.step, params, init, random_like(jax.ShapeDtypeStruct((length, *batch, 2), float), 2)


@influences
def test_right_on_average(make, monkeypatch):
    problem = tiny(bptt.elman(2, 2, dtype=float))
    mean, spread, exact = mean_over_patterns(make(), monkeypatch, *problem)
    assert_close(mean, exact)
    assert min(leaf.max() for leaf in jax.tree.leaves(spread)) > 1e-3


@influences
def test_needs_a_key(make):
    step, params, init, xs = tiny(bptt.elman(2, 2, dtype=float))

    def loss(params):
        return total(*bptt.forward_scan(step, params, init, xs, influence=make()))

    assert loss(params) == total(*bptt.scan(step, params, init, xs))
    with pytest.raises(ValueError, match=rf"{make.__name__}\(.*\) draws random signs, .* pass key=jax.random.key\(0\)"):
        jax.grad(loss)(params)
