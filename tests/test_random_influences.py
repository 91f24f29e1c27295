"""Influences that draw random signs are right on average: over all patterns of signs, and not only within an error of sampling."""

import itertools
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CELLS, DIAGONAL, assert_close, cases, make_cell, problem, random_like

import jaxbptt as bptt
from jaxbptt.influences import signs
from jaxbptt.influences.low_rank import reduced

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


@cases("name", {name: name for name in INFLUENCES}, "uoro()", "kf_rtrl()", "low_rank(2)")
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


@cases("name", {name: name for name in ("uoro()", "kf_rtrl()", "low_rank(1)")}, "kf_rtrl()")
def test_rows_resets_and_padding(name, monkeypatch):
    """Each row draws its own signs; the influence of one starts again where its sequence does, and waits in padding."""
    step, params, init, xs = tiny(bptt.elman(2, 2, dtype=float), batch=(2,))
    is_first, valid = jnp.asarray([[0, 0], [0, 1], [0, 0]]) == 1, jnp.asarray([[1, 1], [0, 1], [1, 1]]) == 1
    xs = jnp.where(valid[..., None], xs, jnp.nan)
    check_right_on_average(name, monkeypatch, step, params, init, xs, rows=(2,), is_first=is_first, valid=valid)


def check_exact(step, params, init, xs, rtol=None):
    """Enough products for all that there are: nothing is left to chance."""

    def loss(scan, params):
        return total(*scan(step, params, init, xs))

    enough = partial(bptt.forward_scan, influence=bptt.influences.low_rank(len(xs)), key=KEY)
    both = jax.jit(lambda params: [jax.grad(partial(loss, scan))(params) for scan in (enough, bptt.scan)])(params)
    assert_close(*both, rtol=rtol)


@cases("name", {name: name for name in [*CELLS, *DIAGONAL, "rate", "layer_norm"]}, "stack", "lru")
def test_products_of_each_cell(name):
    cell = make_cell(name)
    check_exact(cell, *problem(cell, 4, (2,) if name == "stack" else ()))


# A weight [3, 3] in ways that come down to products with vectors, for a carry of as many numbers.
WAYS = {
    "from the right": lambda W, h, x: h @ W + x,
    "twice in one sum": lambda W, h, x: W @ h + W.T @ x,
    "of two products": lambda W, h, x: (1 + W @ h) * (W @ x),
    "one after the other": lambda W, h, x: W @ jnp.sin(W @ h + x),
    "read twice": lambda W, h, x: (lambda a: a + x + jnp.sin(a))(W @ h),
    "concatenated": lambda W, h, x: jnp.concatenate([W, 2 * W, jnp.outer(x, x)], 1) @ jnp.concatenate([h, x, h]),
    "in parts": lambda W, h, x: jnp.concatenate([W[:1] @ h, W[1:].reshape(1, 2, 3)[0] @ x]),
    "antisymmetric": lambda W, h, x: (W - W.T - 0.1 * jnp.eye(3)) @ h + x,
    "of several vectors": lambda W, h, x: jnp.stack([h, x], 1).T.dot(W.T).sum(0),
}


@cases("current", WAYS, "read twice", "concatenated")
def test_ways_to_use_a_weight(current):
    def step(W, h, x):
        h = jnp.tanh(current(W, h, x))
        return h, h

    check_exact(step, *(random_like(jax.ShapeDtypeStruct(shape, float), 3, 0.5) for shape in [(3, 3), (3,), (4, 3)]))


@pytest.mark.slow
def test_products_rounded_to_bfloat16():
    cell = bptt.gru(3, 4, dtype=jnp.float32, compute_dtype=jnp.bfloat16)
    check_exact(cell, *problem(cell, 4, dtype=jnp.float32), rtol=0.02)


@pytest.mark.parametrize(
    ("way", "current"),
    {
        "custom_jvp_call": lambda W, h, x: jax.nn.relu(W) @ h,
        "dot_general": lambda W, h, x: W @ W @ h,
        "mul": lambda W, h, x: (W * h).sum(1),
        "tanh": lambda W, h, x: h + W[0],
        "scan": lambda W, h, x: jax.lax.fori_loop(0, 2, lambda i, h: W @ h, h),
    }.items(),
    ids=lambda item: item if isinstance(item, str) else "",
)
def test_other_ways_are_errors(way, current):
    step = lambda W, h, x: (jnp.tanh(current(W["W"], h, x)), None)
    kf_rtrl = bptt.influences.kf_rtrl()
    with pytest.raises(
        ValueError, match=rf"in the step params\['W'\], of shape \(3, 3\), goes into {way}: .*W @ v.*uoro"
    ):
        kf_rtrl.init(step, {"W": jnp.ones((3, 3))}, jnp.ones(3), jnp.ones(3))


@cases("name", {name: name for name in INFLUENCES}, "uoro()", "kf_rtrl()")
def test_factors_are_balanced(name):
    """What a product is split into does not matter: 2³⁰ u and v/2³⁰ lead to what u and v lead to."""
    step, params, h, xs = tiny(bptt.elman(2, 2, dtype=float))
    influence = INFLUENCES[name]

    @jax.jit
    def pulled(scale):
        M = influence.advance(step, params, h, xs[0], influence.init(step, params, h, xs[0]), KEY)
        if name == "uoro()":
            M = M._replace(u=scale * M.u, v=jax.tree.map(lambda leaf: leaf / scale, M.v))
        else:
            right = jax.tree.map(lambda leaf: leaf / scale, M.right)
            M = replace(M, left=[scale * leaf for leaf in M.left], right=right)
        return influence.pull(influence.advance(step, params, h, xs[1], M, KEY), jnp.ones(2))

    assert_close(pulled(2.0**30), pulled(1.0))


def reduced_by_all_signs(left, right):
    """The mean of one product less over all patterns of signs, and the sum of the variances of its entries."""
    patterns = jnp.asarray(list(itertools.product([-1.0, 1.0], repeat=len(left) - 1)))
    found = jax.vmap(lambda nu: jnp.einsum("ri,rj->ij", *reduced(left, right, nu)))(patterns)
    return found.mean(0), found.var(0).sum()


def test_least_variance_of_one_product_less():
    """Singular values of which all, three or two are mixed, and of which the last is 0: against the best number to keep."""
    values = np.array([[1, 1, 1, 1], [5, 1, 1, 0.9], [8, 4, 2, 1], [3, 2, 1, 0]])
    G, U, V = (np.linalg.qr(random_like(jax.ShapeDtypeStruct((n, 4), float), n))[0] for n in (4, 6, 7))
    left, right = (jnp.asarray((G * np.sqrt(sigma)[:, None, :]) @ side.T) for sigma, side in ((values, U), (values, V)))
    means, variances = jax.jit(jax.vmap(reduced_by_all_signs))(left, right)
    assert_close(means, jnp.asarray(U * values[:, None] @ V.T))
    # Of k products for the last k + 1 values; none may be larger than s/k.
    best = [
        min(tail.sum() ** 2 / k - (tail**2).sum() for k in (1, 2, 3) if k * (tail := row[3 - k :]).max() <= tail.sum())
        for row in values
    ]
    np.testing.assert_allclose(variances, best, atol=1e-12)
    assert best[0] > 1


def test_more_products_than_numbers():
    left, right = (random_like(jax.ShapeDtypeStruct((4, size), float), size) for size in (2, 5))
    assert_close(jax.jit(reduced_by_all_signs)(left, right)[0], left.T @ right)


@influences
def test_needs_a_key(name):
    step, params, init, xs = tiny(bptt.elman(2, 2, dtype=float))
    influence = INFLUENCES[name]
    M = influence.init(step, params, init, xs[0])
    with pytest.raises(ValueError, match=re.escape(name) + r" draws random signs, .* pass key=jax.random.key\(0\)"):
        influence.advance(step, params, init, xs[0], M, None)


@cases("name", {name: name for name in INFLUENCES}, "uoro()", "low_rank(2)")
def test_many_steps_in_single_precision(name):
    """Finite, by a key and nothing else, also where there is nothing to carry."""
    cell = bptt.elman(3, 4)
    params, init, xs = problem(cell, 2_000, dtype=jnp.float32)

    @jax.jit
    def gradient(key, params, init, xs):
        def loss(params):
            return jnp.sum(bptt.forward_scan(cell, params, init, xs, influence=INFLUENCES[name], key=key)[1] ** 2)

        return jax.grad(loss)(params)

    first, again, other = (gradient(jax.random.key(seed), params, init, xs) for seed in (0, 0, 1))
    assert_close(again, first, rtol=0)
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True):
        assert one.dtype == jnp.float32
        assert jnp.isfinite(one).all()
        assert (one.ndim == 1 and name != "uoro()") != bool((abs(one - two) > 1e-3).any())
    nothing = gradient(KEY, *jax.tree.map(jnp.zeros_like, (params, init, xs)))
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(nothing))


@pytest.mark.slow
def test_variances_in_order():
    """Mean squared error over keys, of all weights."""
    cell = bptt.elman(3, 16, dtype=float)
    params, init = cell.init(KEY), cell.initial_carry()
    xs = random_like(jax.ShapeDtypeStruct((30, 3), float), 0)

    def gradient(scan):
        return jax.flatten_util.ravel_pytree(jax.grad(lambda params: total(*scan(cell, params, init, xs)))(params))[0]

    def error(influence):
        def of_key(key):
            return jnp.sum((gradient(partial(bptt.forward_scan, influence=influence, key=key)) - exact) ** 2)

        return jax.jit(jax.vmap(of_key))(jax.random.split(KEY, 100)).mean()

    exact = gradient(bptt.scan)
    names = "low_rank(8)", "low_rank(2)", "kf_rtrl()", "uoro()"
    made = INFLUENCES | {"low_rank(8)": bptt.influences.low_rank(8)}
    errors = [error(made[name]) for name in names]
    assert errors[0] < 0.5 * errors[1]
    assert errors[1] < 0.9 * errors[2]
    assert errors[2] < 0.2 * errors[3]


@cases("name", {name: name for name in INFLUENCES}, "kf_rtrl()")
def test_memory(name):
    """It does not depend on time; and a layer of n units takes O(n²) numbers."""

    def bytes_of(steps):
        cell = bptt.gru(3, 8)
        shapes = jax.eval_shape(cell.init, KEY), jax.ShapeDtypeStruct((steps, 2, 3), jnp.float32)

        def loss(params, xs):
            scan = partial(bptt.forward_scan, influence=INFLUENCES[name], key=KEY)
            return jnp.sum(scan(cell, params, cell.initial_carry((2,)), xs)[0] ** 2)

        return jax.jit(jax.grad(loss)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    def numbers(hidden):
        cell = bptt.gru(3, hidden)
        M = INFLUENCES[name].init(cell.step, cell.init(KEY), cell.initial_carry(), jnp.zeros(3))
        return sum(leaf.size for leaf in jax.tree.leaves(M))

    with jax.enable_x64(False):
        assert bytes_of(100_000) <= bytes_of(100) + 64
        assert 3.5 < numbers(64) / numbers(32) < 4.1


def test_wrong_rank():
    with pytest.raises(ValueError, match=r"rank is 0, but it counts products: pass a whole number of at least 1\."):
        bptt.influences.low_rank(0)
