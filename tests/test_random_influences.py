"""Influences that draw random signs are right on average: over all patterns of signs, and not only within an error of sampling."""

import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CELLS, DIAGONAL, assert_close, cases, make_cell, problem, random_like

import jaxbptt as bptt
from jaxbptt.influences import signs

INFLUENCES = {
    "uoro()": bptt.influences.uoro(),
    "kf_rtrl()": bptt.influences.kf_rtrl(),
    "low_rank(1)": bptt.influences.low_rank(1),
    "low_rank(2)": bptt.influences.low_rank(2),
}
influences = pytest.mark.parametrize("name", INFLUENCES)
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


def check_right_on_average(name, monkeypatch, *problem, **options):
    """And only on average, but for leaves with one axis, which all but UORO keep in full."""
    mean, spread, exact = mean_over_patterns(INFLUENCES[name], monkeypatch, *problem, **options)
    assert_close(mean, exact)
    for deviation in jax.tree.leaves(spread):
        assert deviation.max() > 1e-3 if deviation.ndim > 1 or name == "uoro()" else deviation.max() < 1e-12


@influences
def test_right_on_average(name, monkeypatch):
    check_right_on_average(name, monkeypatch, *tiny(bptt.elman(2, 2, dtype=float), 4 if name == "low_rank(2)" else 3))


@cases(
    "cell",
    {
        "gru": bptt.gru(2, 2, dtype=float),
        "lstm": bptt.lstm(2, 2, dtype=float),
        "layer_norm": bptt.lstm(2, 2, layer_norm=True, dtype=float),
        "stack": bptt.stack(bptt.elman(2, 2, dtype=float), bptt.min_gru(2, 1, dtype=float)),
    },
)
@pytest.mark.parametrize("name", ["kf_rtrl()", "low_rank(1)"])
@pytest.mark.slow
def test_cells_right_on_average(name, cell, monkeypatch):
    check_right_on_average(name, monkeypatch, *tiny(cell))


def check_exact(step, params, init, xs, **options):
    """Enough products for all that there are: nothing is left to chance."""

    def loss(scan, params):
        return total(*scan(step, params, init, xs, **options))

    full = partial(bptt.forward_scan, influence=bptt.influences.low_rank(len(jax.tree.leaves(xs)[0])), key=KEY)
    both = jax.jit(lambda params: [jax.grad(partial(loss, scan))(params) for scan in (full, bptt.scan)])(params)
    assert_close(*both)


@cases("name", {name: name for name in [*CELLS, *DIAGONAL, "rate", "layer_norm"]}, "stack", "lru")
def test_products_of_each_cell(name):
    cell = make_cell(name)
    check_exact(cell, *problem(cell, 4, (2,) if name == "stack" else ()))


@influences
def test_needs_a_key(name):
    step, params, init, xs = tiny(bptt.elman(2, 2, dtype=float))

    def loss(params):
        return total(*bptt.forward_scan(step, params, init, xs, influence=INFLUENCES[name]))

    assert loss(params) == total(*bptt.scan(step, params, init, xs))
    with pytest.raises(ValueError, match=re.escape(name) + r" draws random signs, .* pass key=jax.random.key\(0\)"):
        jax.grad(loss)(params)
