"""The biased strategies against the brute-force set of surviving paths: a Python loop with the cuts written out."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, make_cell, problem, random_like

import jaxbptt as bptt


def loop_with_cuts(step, params, init, xs, *, truncation_length, is_first=None, reset_carry=None):
    """What truncated BPTT means."""
    carry, ys = init, []
    for t in range(len(xs)):
        if t > 0 and t % truncation_length == 0:
            carry = jax.lax.stop_gradient(carry)
        if is_first is not None:
            carry = jax.tree.map(lambda leaf, to, t=t: jnp.where(is_first[t][:, None], to, leaf), carry, reset_carry)
        carry, y = step(params, carry, xs[jnp.array(t)])
        ys.append(y)
    return carry, jnp.stack(ys)


def loop_with_window(step, params, init, xs, *, window):
    """What a window means: the output of each step from a start of its own, W steps before, with the state as it was."""
    states, ys = [init], []
    for x in xs:
        states.append(step(params, states[-1], x)[0])
    for t in range(len(xs)):
        start = max(t + 1 - window, 0)
        carry = init if start == 0 else jax.lax.stop_gradient(states[start])
        for s in range(start, t + 1):
            carry, y = step(params, carry, xs[jnp.array(s)])
        ys.append(y)
    return carry, jnp.stack(ys)


def both(strategy, loop, cell, args, options):
    """Value and vjp under one random cotangent, of a strategy with a cell and with a bare step, and of the loop."""
    out, pull = jax.vjp(partial(loop, jax.jit(cell.step), **options), *args)
    cotangent = random_like(out, 3)

    @jax.jit
    def mine(args, cotangent):
        ways = [jax.vjp(partial(strategy, step, **options), *args) for step in (cell, cell.step)]
        return [(out, pull(cotangent)) for out, pull in ways]

    return mine(args, cotangent), (out, pull(cotangent))


@pytest.mark.parametrize(
    ("name", "steps", "K"),
    [
        ("elman", 1, 1),
        ("gru", 2, 1),
        ("elman", 7, 1),
        ("lstm", 7, 3),
        ("stack", 7, 7),
        ("gru", 12, 4),
        ("elman", 12, 50),
    ],
)
@pytest.mark.costly
def test_truncated_equals_a_loop_with_cuts(name, steps, K):
    cell = make_cell(name)
    args = problem(cell, steps, (2,))
    mine, expected = both(bptt.truncated_scan, loop_with_cuts, cell, args, {"truncation_length": K})
    for result in mine:
        assert_close(result, expected)


@pytest.mark.parametrize(
    ("name", "steps", "W"), [("gru", 6, 3), ("elman", 1, 1), ("lstm", 6, 1), ("stack", 6, 6), ("elman", 6, 9)]
)
@pytest.mark.costly
def test_windowed_equals_a_loop_from_every_start(name, steps, W):
    cell = make_cell(name)
    args = problem(cell, steps, (2,))
    mine, expected = both(bptt.windowed_scan, loop_with_window, cell, args, {"window": W})
    for result in mine:
        assert_close(result, expected)


@pytest.mark.parametrize("K", [2, 5])
@pytest.mark.costly
def test_second_derivatives_of_a_truncated_gradient(K):
    """What the cut keeps apart stays apart in the derivative of the gradient, and `init` is not cut there either."""
    cell = make_cell("elman")
    params, init, xs = problem(cell, 5)

    def gradient(scan, W_and_h):
        loss = lambda W, h: jnp.sum(jnp.sin(scan(cell.step, params._replace(W_hh=W), h, xs, truncation_length=K)[1]))
        return jax.grad(loss, argnums=(0, 1))(*W_and_h)

    at = params.W_hh, init
    expected = jax.jit(jax.jacrev(partial(gradient, loop_with_cuts)))(at)
    assert_close(jax.jit(jax.jacrev(partial(gradient, bptt.truncated_scan)))(at), expected)
    assert_close(jax.jit(jax.jacfwd(partial(gradient, bptt.truncated_scan)))(at), expected)


@pytest.mark.parametrize("W", [4, 1, 9])
@pytest.mark.costly
def test_windowed_is_the_sum_of_lags(W):
    cell = make_cell("gru")
    params, init, xs = problem(cell, 9, (2,))
    loss = lambda carry, ys: jnp.sum(jnp.sin(ys)) + jnp.sum(carry**2)
    lags = jax.jit(lambda params: bptt.lag_contributions(cell, params, init, xs, loss))(params)
    mine = jax.jit(jax.grad(lambda params: loss(*bptt.windowed_scan(cell, params, init, xs, window=W))))(params)
    assert_close(mine, jax.tree.map(lambda leaf: leaf[:W].sum(axis=0), lags.contributions))


@pytest.mark.parametrize(
    "strategy", [partial(bptt.truncated_scan, truncation_length=3), partial(bptt.windowed_scan, window=3)]
)
def test_what_is_cut_is_missing(strategy):
    """Biased, and not by a little: the gradient differs from the exact one, the values do not."""
    cell = make_cell("elman")
    params, init, xs = problem(cell, 7)
    loss = lambda scan, params: jnp.sum(scan(cell, params, init, xs)[1] ** 2)
    (value, mine), (expected_value, exact) = (
        jax.value_and_grad(partial(loss, s))(params) for s in (strategy, bptt.scan)
    )
    np.testing.assert_allclose(value, expected_value, rtol=1e-12)
    assert all(leaf.relative_error > 0.01 for leaf in bptt.compare_gradients(mine, exact).leaves)


def test_known_gradient_with_a_cut():
    """h₃ = w³ h₀ at w = 0.2, h₀ = 0.9: 3 w² h₀ = 0.108, and w² h₀ = 0.036 with a cut before the last step."""
    last = lambda w, h, K: bptt.truncated_scan(lambda w, h, x: (w * h, None), w, h, length=3, truncation_length=K)[0]
    np.testing.assert_allclose(jax.grad(last, argnums=(0, 1))(0.2, 0.9, 2), (0.036, 0.0), rtol=1e-12)
    np.testing.assert_allclose(jax.grad(last, argnums=(0, 1))(0.2, 0.9, 3), (0.108, 0.008), rtol=1e-12)


@pytest.mark.parametrize("name", ["elman", "lstm"])
@pytest.mark.parametrize("K", [3, 20])
@pytest.mark.costly
def test_resets_equal_a_loop(name, K):
    """Rows are reset at different steps; the reset carry gets its gradient, the state before it none."""
    cell = make_cell(name)
    args = problem(cell, 9, (2,))
    is_first = jnp.array([[0, 1], [0, 0], [1, 0], [0, 0], [0, 1], [1, 1], [0, 0], [0, 0], [0, 1]], bool)
    to = random_like(args[1], 7)
    loops = lambda *args: loop_with_cuts(
        jax.jit(cell.step), *args[:3], truncation_length=K, is_first=is_first, reset_carry=args[3]
    )
    out, pull = jax.vjp(loops, *args, to)
    cotangent = random_like(out, 3)
    for step in (cell, cell.step):

        @jax.jit
        def mine(args, to, cotangent, step=step):
            scan = lambda *args: bptt.truncated_scan(
                step, *args[:3], truncation_length=K, is_first=is_first, reset_carry=args[3]
            )
            out, pull = jax.vjp(scan, *args, to)
            return out, pull(cotangent)

        assert_close(mine(args, to, cotangent), (out, pull(cotangent)))


def test_resets_with_integer_inputs_and_plain_numbers():
    """One-hot integers have no gradient; a reset carry written as a number takes the dtype of init."""
    cell = make_cell("elman")
    params, init, _ = problem(cell, 5)
    xs, is_first = np.eye(3, dtype=int)[[0, 2, 1, 1, 0]], np.arange(5) == 3
    with jax.numpy_dtype_promotion("standard"):
        loss = lambda params, step: jnp.sum(
            bptt.truncated_scan(step, params, init, xs, truncation_length=9, is_first=is_first, reset_carry=0)[1] ** 2
        )
        assert_close(jax.grad(loss)(params, cell), jax.grad(loss)(params, cell.step))


def test_reset_is_a_sequence_of_its_own():
    """What follows a reset to zeros is what the rest of the sequence gives alone."""
    cell = make_cell("gru")
    params, init, xs = problem(cell, 8)
    is_first = jnp.arange(8) == 3
    carry, ys = bptt.truncated_scan(cell, params, init, xs, truncation_length=8, is_first=is_first)
    first, rest = bptt.scan(cell, params, init, xs[:3]), bptt.scan(cell, params, cell.initial_carry(), xs[3:])
    assert_close((carry, ys), (rest[0], jnp.concatenate([first[1], rest[1]])))


def test_cut_is_a_select():
    """Behind the cut the derivative is infinite: a product with 0 would be nan, and nothing of it must come through."""
    step = lambda w, h, x: (jnp.sqrt(h) * w + x, h)

    def loss(w, scan):
        return jnp.sum(scan(step, w, jnp.zeros(()), jnp.ones(4))[0])

    for scan in (
        partial(bptt.truncated_scan, truncation_length=1),
        partial(bptt.truncated_scan, truncation_length=4, is_first=jnp.array([False, True, False, False])),
    ):
        assert np.isfinite(jax.grad(loss)(0.5, scan))
    infinite = jax.grad(lambda h: bptt.truncated_scan(step, 0.5, h, jnp.ones(4), truncation_length=4)[0])(0.0)
    assert not np.isfinite(infinite)


def test_keys_and_counters_are_reset_too():
    init = {"h": jnp.array(0.5), "key": jax.random.key(0), "n": jnp.array(0)}

    def step(w, carry, x):
        key, use = jax.random.split(carry["key"])
        h = jnp.tanh(w * carry["h"] + 0.1 * jax.random.normal(use))
        return {"h": h, "key": key, "n": carry["n"] + 1}, h

    is_first = jnp.array([False, False, True, False])
    scan = partial(bptt.truncated_scan, step, truncation_length=2, is_first=is_first, length=4)
    carry, ys = scan(0.7, init, reset_carry=init)
    assert carry["n"] == 2
    np.testing.assert_allclose(ys[2:], ys[:2])
    # Without one, a key goes on: the noise of the second sequence is another.
    carry, ys = scan(0.7, init)
    assert carry["n"] == 2
    plain = bptt.scan(step, 0.7, init, length=4)[0]
    assert jax.random.key_data(carry["key"]).tolist() == jax.random.key_data(plain["key"]).tolist()
    raw = init | {"key": jax.random.PRNGKey(0)}
    with pytest.raises(ValueError, match=r"init\['key'\] has dtype uint32.*wrap_key_data.*or reset_carry"):
        scan(0.7, raw)
    assert scan(0.7, raw, reset_carry=raw)[0]["n"] == 2


def test_illegal_options():
    cell = make_cell("elman")
    args = problem(cell, 5, (2,))
    flags = jnp.zeros((5, 2), bool)
    cut = partial(bptt.truncated_scan, cell, *args)
    for call, error, message in (
        (
            partial(cut, truncation_length=0),
            ValueError,
            r"truncation_length is 0, but it counts time steps: pass a whole",
        ),
        (partial(cut, truncation_length=2.5), ValueError, r"truncation_length is 2\.5"),
        (partial(cut, truncation_length=jnp.array(2.5)), ValueError, r"truncation_length is Array\(2\.5"),
        (partial(cut, truncation_length=True), ValueError, r"truncation_length is True"),
        (partial(bptt.windowed_scan, cell, *args, window=0), ValueError, r"window is 0, but it counts time steps"),
        (
            partial(cut, truncation_length=2, is_first=flags.astype(int)),
            TypeError,
            r"is_first has dtype int64.*\.astype\(bool\)",
        ),
        (
            partial(cut, truncation_length=2, is_first=flags[:4]),
            ValueError,
            r"is_first has shape \(4, 2\), but the sequence has 5 time steps",
        ),
        (
            partial(cut, truncation_length=2, is_first=flags[:, :1]),
            ValueError,
            r"batch \(1,\), but init has shape \(2, 4\)",
        ),
        (
            partial(cut, truncation_length=2, reset_carry=args[1]),
            ValueError,
            r"reset_carry says what is_first resets to",
        ),
        (
            partial(cut, truncation_length=2, is_first=flags, reset_carry=(args[1],)),
            TypeError,
            r"reset_carry has structure .*pass a carry like init",
        ),
        (
            partial(cut, truncation_length=2, is_first=flags, reset_carry=jnp.zeros((3, 4))),
            ValueError,
            r"reset_carry has shape \(3, 4\), which does not fit that of init, \(2, 4\)",
        ),
        (
            partial(cut, truncation_length=2, is_first=flags, reset_carry=jnp.zeros(4, jnp.float32)),
            TypeError,
            r"reset_carry has dtype float32, but that of init is float64",
        ),
    ):
        with pytest.raises(error, match=message):
            call()


def test_memory_of_a_chunk_however_long_the_sequence():
    cell = bptt.elman(4, 32)
    shapes = jax.eval_shape(cell.init, jax.random.key(0)), jax.eval_shape(cell.initial_carry)

    def temporary_bytes(steps):
        loss = lambda params, init, xs: jnp.sum(bptt.truncated_scan(cell, params, init, xs, truncation_length=20)[0])
        xs = jax.ShapeDtypeStruct((steps, 4), jnp.float32)
        return jax.jit(jax.grad(loss)).lower(*shapes, xs).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(200_000) <= temporary_bytes(200) + 1024


def test_memory_of_training_does_not_grow_with_the_number_of_chunks():
    """The carry threaded through many updates, as a training loop does it: nothing of a chunk outlives it."""
    cell = bptt.elman(4, 32)
    shapes = jax.eval_shape(cell.init, jax.random.key(0)), jax.eval_shape(cell.initial_carry)

    def train(params, carry, chunks):
        def update(state, xs):
            params, carry = state

            def loss(params):
                last, ys = bptt.truncated_scan(cell, params, carry, xs, truncation_length=10)
                return jnp.mean(ys**2), last

            gradients, carry = jax.grad(loss, has_aux=True)(params)
            return (jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), carry), None

        return jax.lax.scan(update, (params, carry), chunks)[0]

    def temporary_bytes(chunks):
        xs = jax.ShapeDtypeStruct((chunks, 20, 4), jnp.float32)
        return jax.jit(train).lower(*shapes, xs).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(1000) <= temporary_bytes(10) + 1024


@pytest.mark.parametrize("length", [1, 12])
@pytest.mark.costly
def test_surviving_paths(length):
    t, s = np.mgrid[:length, :length]
    below = s <= t
    flags = np.arange(length) % 5 == 4
    for strategy, options, expected in (
        (bptt.scan, {}, below),
        (bptt.checkpointed_scan, {"checkpoints": 1}, below),
        (bptt.truncated_scan, {"truncation_length": 5}, below & (t // 5 == s // 5)),
        (bptt.windowed_scan, {"window": 5}, below & (t - s < 5)),
        (
            bptt.truncated_scan,
            {"truncation_length": 99, "is_first": flags},
            below & (np.cumsum(flags)[t] == np.cumsum(flags)[s]),
        ),
    ):
        np.testing.assert_array_equal(bptt.surviving_paths(strategy, length, **options), expected)


def test_surviving_paths_needs_a_length():
    with pytest.raises(ValueError, match="length is 0, but it counts time steps"):
        bptt.surviving_paths(bptt.scan, 0)
