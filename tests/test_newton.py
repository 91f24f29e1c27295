"""`newton_scan` and `newton_states`: right whatever happens, in as many iterations as there should be, and honest about it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from reference import assert_close, cases, make_cell, problem, random_like

import jaxbptt as bptt
from jaxbptt.programs.diagonal import _by_entries, _read_off

T = 13
OPTIONS = {
    "full": {},
    "diagonal": {"jacobian": "diagonal"},
    "windows": {"chunk_length": 4},
    "diagonal, windows": {"jacobian": "diagonal", "chunk_length": 5},
    "damped": {"damping": 0.3},
    "one iteration": {"max_iterations": 1},
    "guess": {"guess": "random"},
    "one iteration, windows": {"max_iterations": 1, "chunk_length": 4},
}
FLAGS = {
    "is_first": np.arange(2 * T).reshape(T, 2) % 5 == 2,
    "valid": np.arange(2 * T).reshape(T, 2) % 7 != 3,
}


def outputs_and_gradients(scan, cell, args, bars):
    def both(args, bars):
        outputs, pull = jax.vjp(partial(scan, cell), *args)
        return outputs, pull(bars)

    return jax.jit(both)(args, bars)


def bars_of(cell, args):
    return random_like(jax.eval_shape(partial(bptt.scan, cell), *args), 7)


@cases("options", OPTIONS, "diagonal, windows", "one iteration")
def test_values_and_gradients(options):
    cell = make_cell("lstm")
    args = problem(cell, T, (2,))
    reset = random_like(args[1], 5)
    if "guess" in options:
        options = {"guess": random_like(jax.tree.map(lambda leaf: jnp.zeros((T, *leaf.shape)), args[1]), 6)}
    for flags in ({}, FLAGS | {"reverse": True, "reset_carry": reset}):
        bars = bars_of(cell, args)
        expected = outputs_and_gradients(partial(bptt.scan, **flags), cell, args, bars)
        assert_close(outputs_and_gradients(partial(bptt.newton_scan, **flags, **options), cell, args, bars), expected)


@pytest.mark.costly
@pytest.mark.parametrize("name", ["stack", "gru", "elman", "rate"])
@pytest.mark.parametrize("steps", [1, 2, 0])
def test_cells_and_lengths(name, steps):
    cell = make_cell(name)
    args = problem(cell, steps)
    bars = bars_of(cell, args)
    expected = outputs_and_gradients(bptt.scan, cell, args, bars)
    assert_close(outputs_and_gradients(bptt.newton_scan, cell, args, bars), expected)
    found = jax.jit(partial(bptt.newton_states, cell))(*args)
    assert_close(found.ys, expected[0][1])
    assert (bool(found.converged), int(found.first_bad_step)) == (True, steps)


# Full and diagonal, from a guess of zeros to a change below 1e-10, over inputs from N(0, 1).
COUNTS = {
    "elman, n = 16": ("elman", 16, 1_000, 1.0, 7, 56),
    "gru, n = 2": ("gru", 2, 10_000, 1.0, 6, 29),
    "gru, n = 32": ("gru", 32, 1_000, 1.0, 6, 25),
    "lstm, n = 8": ("lstm", 8, 1_000, 1.0, 6, 50),
    "elman, n = 16, 1.5 W_hh": ("elman", 16, 1_000, 1.5, 14, 161),
}


def network(kind, size, steps, gain=1.0):
    options = {"update_bias": 0.0} if kind == "gru" else {}
    cell = getattr(bptt, kind)(4, size, dtype=jnp.float64, **options)
    params = cell.init(jax.random.key(1))
    xs = jnp.asarray(np.random.default_rng(1).standard_normal((steps, 4)))
    return cell, params._replace(W_hh=gain * params.W_hh), cell.initial_carry(), xs


@cases("case", COUNTS)
def test_counts_of_iterations(case):
    kind, size, steps, gain, full, diagonal = case
    args = network(kind, size, steps, gain)
    for jacobian, count, off, error in (("full", full, 1, 1e-14), ("diagonal", diagonal, 2, 2e-10)):
        found = jax.jit(partial(bptt.newton_states, args[0], jacobian=jacobian, max_iterations=200))(*args[1:])
        assert found.converged
        assert abs(found.iterations - count) <= off
        assert_close(found.ys, bptt.scan(*args)[1], rtol=error)


@pytest.mark.parametrize("jacobian", ["full", "diagonal"])
def test_chaos_does_not_converge_and_the_scan_is_right(jacobian):
    args = network("elman", 64, 500, 2.5)
    states = jax.jit(partial(bptt.newton_states, args[0], jacobian=jacobian, max_iterations=20))
    found = states(*args[1:])
    assert not found.converged
    assert 19 <= found.first_bad_step < 200
    assert found.residual > 0.1
    assert found.iterations == 20
    scan = jax.jit(partial(bptt.newton_scan, args[0], jacobian=jacobian, max_iterations=20))
    assert_close(scan(*args[1:]), bptt.scan(*args))


def test_a_gradient_with_the_diagonal_in_the_backward_would_be_another():
    args = cell, params, init, xs = network("elman", 16, 100)

    def loss(scan, params):
        return jnp.sum(scan(cell, params, init, xs)[1] ** 2)

    def uncoupled(params, h, x):
        """The same states; the tangent of h goes through the diagonal of W_hh alone."""
        stopped = jax.lax.stop_gradient(h)
        new, y = cell.step(params, stopped, x)
        own = (1 - new**2) * jnp.diag(params.W_hh) * (h - stopped)
        return new + own, y + own

    exact, found = (
        jax.jit(jax.grad(partial(loss, scan)))(params)
        for scan in (bptt.scan, partial(bptt.newton_scan, jacobian="diagonal"))
    )
    biased = jax.grad(lambda params: jnp.sum(bptt.scan(uncoupled, params, *args[2:])[1] ** 2))(params)
    assert_close(found, exact, rtol=1e-8)
    assert jnp.linalg.norm(biased.W_hh - exact.W_hh) > 0.1 * jnp.linalg.norm(exact.W_hh)


def test_steps_before_the_first_bad_one_are_right_and_it_moves_on():
    cell, *args = network("elman", 16, 60, 1.5)

    def states(guess=None, args=args, **options):
        return jax.jit(lambda args, guess: bptt.newton_states(cell, *args, guess=guess, **options))(args, guess)

    right = bptt.scan(cell, *args)[1]
    before = 0
    for most in (2, 20):
        found = states(jacobian="diagonal", max_iterations=most, tolerance=1e-12)
        bad = int(found.first_bad_step)
        assert not found.converged
        assert bad >= max(most - 1, before + 1)
        assert jnp.abs(found.carries - right)[:bad].max() < 1e-10
        assert jnp.abs(found.carries - right)[bad:].max() > 1e-10
        before = bad
    guess = right.at[30].set(0)
    assert states(guess, max_iterations=1).first_bad_step == 30
    flipped = states(right[::-1], [*args[:2], args[2][::-1]], reverse=True)
    assert flipped.iterations == 1
    assert_close(flipped.carries, right[::-1])


def test_rows_have_their_own_counts_under_vmap():
    cell, params, init, xs = network("elman", 8, 50)
    scales = jnp.array([0.0, 0.1, 3.0])
    states = partial(bptt.newton_states, cell, params, init)
    mapped = jax.jit(jax.vmap(states))(scales[:, None, None] * xs)
    alone = [int(one.iterations) for one in map(jax.jit(states), scales[:, None, None] * xs)]
    assert mapped.iterations.tolist() == alone
    assert len(set(alone)) > 1
    assert mapped.converged.all()
    ys = jax.vmap(lambda xs: bptt.newton_scan(cell, params, init, xs, max_iterations=2, chunk_length=7)[1])
    assert_close(jax.jit(ys)(scales[:, None, None] * xs), mapped.ys, rtol=1e-9)


OVERFLOWING = {
    "guess": (lambda _, h, x: (h - 0.1 * h**3 + 0.1 * x, h), 0.5, {"guess": np.full(20, 1e200)}),
    "step at zero": (lambda _, h, x: (jnp.log(h) + 2 + 0.1 * x, h), 1.5, {}),
    "jacobian": (lambda _, h, x: (jnp.sqrt(h), h), 0.5, {}),
    "products": (lambda _, h, x: (jnp.where(h > 0, 0.5 * h, 1e200 * h) + 1, h), 1.0, {"guess": np.full(20, -1.0)}),
    "nan": (lambda _, h, x: (0.5 * jnp.sin(h) + 1, h), 1.0, {"guess": np.full(20, jnp.nan)}),
}


@cases("case", OVERFLOWING, *OVERFLOWING)
def test_what_is_not_finite_on_the_way_is_not_returned(case):
    step, init, options = case
    xs = random_like(jnp.zeros(20), 3)
    for most in (1, 100):
        found = jax.jit(lambda xs, most=most: bptt.newton_states(step, None, init, xs, max_iterations=most, **options))(
            xs
        )
        assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((found.carries, found.ys)))
    assert found.converged
    scan = jax.jit(lambda xs: bptt.newton_scan(step, None, init, xs, **options))
    assert_close(scan(xs), bptt.scan(step, None, init, xs), rtol=1e-9)


def test_states_that_overflow_are_those_of_scan():
    args = lambda _, h, x: (h * h, h), None, 1.5
    assert_close(bptt.newton_scan(*args, length=20), bptt.scan(*args, length=20))
    found = bptt.newton_states(*args, length=20)
    assert not found.converged
    assert jnp.isfinite(found.carries).all()
    assert 1e308 > found.carries[int(found.first_bad_step) - 1] > 1e150


def test_leaves_without_a_derivative():
    def firing(w, carry, x):
        h, fired, key = carry
        key, noise = jax.random.split(key)
        new = jnp.tanh(w @ h + x + 0.1 * jax.random.normal(noise, h.shape))
        return (new, fired + jnp.sum(h > 0), key), new * fired

    def counting(w, carry, x):  # the count and the state need each other
        h, count = carry
        new = jnp.tanh(w @ h + x * (count % 2))
        return (new, count + jnp.sum(new > 0)), new

    w, xs = random_like(jnp.zeros((3, 3)), 1), random_like(jnp.zeros((T, 3)), 2)
    for step, carry in (
        (firing, (jnp.ones(3), jnp.array(0), jax.random.key(3))),
        (counting, (jnp.ones(3), jnp.array(0))),
    ):

        def value_and_gradient(scan, w, step=step, carry=carry):
            def loss(w):
                carry_and_ys = scan(step, w, carry, xs)
                return jnp.sum(carry_and_ys[1] ** 2) + carry_and_ys[0][0].sum(), carry_and_ys

            return jax.value_and_grad(loss, has_aux=True)(w)

        found, expected = jax.jit(lambda w, f=value_and_gradient: (f(bptt.newton_scan, w), f(bptt.scan, w)))(w)
        assert_close(found, expected)
        states = jax.jit(lambda w, step=step, carry=carry: bptt.newton_states(step, w, carry, xs))(w)
        assert_close(jax.tree.map(lambda leaf: leaf[-1], states.carries), expected[0][1][0])


def test_complex_states_branches_and_mutable_arrays():
    def complex_step(w, z, x):
        return w * z / (1 + jnp.abs(z) ** 2) + x, z

    def branching(w, h, x):
        return jax.lax.cond(x > 0, lambda: jnp.tanh(w * h), lambda: w * h + x), h

    def mutating(w, h, x):
        ref = jax.new_ref(w * h)
        ref[...] += x
        return jnp.tanh(ref[...]), h

    xs = random_like(jnp.zeros(T), 2)
    real = jnp.array(0.3)
    for step, w, init in ((complex_step, 0.9 + 0.2j, real - 0.1j), (branching, 0.7, real), (mutating, 0.7, real)):
        inputs = xs.astype(init.dtype) if step is complex_step else xs
        bars = bars_of(step, (w, init, inputs))
        found = outputs_and_gradients(bptt.newton_scan, step, (w, init, inputs), bars)
        assert_close(found, outputs_and_gradients(bptt.scan, step, (w, init, inputs), bars), rtol=1e-9)


@jax.custom_vjp
def squashed(a):
    return jnp.tanh(a)


squashed.defvjp(lambda a: (jnp.tanh(a), jnp.tanh(a)), lambda y, bar: (bar * (1 - y**2),))


def test_a_step_without_forward_mode():
    args = random_like(jnp.zeros((3, 3)), 1), jnp.ones(3), random_like(jnp.zeros((T, 3)), 2)

    def step(W, h, x):
        h = squashed(W @ h + x)
        return h, h

    bars = bars_of(step, args)
    expected = outputs_and_gradients(bptt.scan, step, args, bars)
    for jacobian in ("full", "diagonal"):
        assert_close(outputs_and_gradients(partial(bptt.newton_scan, jacobian=jacobian), step, args, bars), expected)


# Steps of a state of four numbers, and whether the diagonal of their Jacobian can be read off.
STEPS = {
    **{name: (make_cell(name).step, True) for name in ("elman", "gru", "lstm", "rate")},
    "layer_norm": (make_cell("layer_norm").step, False),
    "two products": (lambda W, h, x: (jnp.tanh(W @ (x * (W @ h))) - h / 3, None), False),
    "of no use": (lambda W, h, x: (jnp.tanh(x), None), True),
    "transposed": (lambda W, h, x: (jnp.where(x > 0, h @ W, -(W @ h)[:4]) + h[::-1] * 0, None), False),
    "shifted": (lambda W, h, x: (jnp.where(x > 0, (W @ h)[:4] - h, jnp.split(2 * h, 1)[0]), None), True),
}


@pytest.mark.parametrize("name", STEPS)
def test_the_diagonal_is_read_off_the_equations(name):
    step, can_be_read = STEPS[name]
    batch = (2,) if name in ("gru", "layer_norm") else ()
    if name in ("elman", "gru", "lstm", "rate", "layer_norm"):
        params, carry, xs = problem(make_cell(name), 1, batch)
        x = xs[0]
    else:
        params, carry, x = (random_like(jnp.zeros(shape), seed) for seed, shape in enumerate([(4, 4), (4,), (4,)]))
    leaves, treedef = jax.tree.flatten(carry)

    def new(leaves):
        return jax.tree.leaves(step(params, treedef.unflatten(leaves), x)[0])

    _, tangent = jax.linearize(new, leaves)
    J = jax.jacfwd(new)(leaves)
    for j, leaf in enumerate(leaves):
        expected = jnp.diagonal(J[j][j].reshape(leaf.size, leaf.size)).reshape(leaf.shape)
        found = _read_off(tangent, leaves, j)
        assert (found is not None) == can_be_read
        if can_be_read:
            assert_close(found, expected)
        assert_close(_by_entries(tangent, leaves, j, len(batch)), expected)


def test_memory():
    """The diagonal never holds an [n, n] for each step, and windows hold those of C steps."""
    args = network("elman", 32, 2048)

    def temporary_bytes(**options):
        states = jax.jit(partial(bptt.newton_states, args[0], **options))
        return states.lower(*args[1:]).compile().memory_analysis().temp_size_in_bytes

    jacobians = 2048 * 32 * 32 * 8
    assert temporary_bytes() > jacobians
    assert temporary_bytes(jacobian="diagonal") < jacobians / 2
    assert temporary_bytes(chunk_length=64) < jacobians / 2


@pytest.mark.slow
def test_single_precision():
    for kind in ("gru", "lstm", "elman"):
        args = cell, *_ = network(kind, 8, 10_000)
        exact = bptt.scan(*args)[1]
        single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), args[1:])
        error = jnp.abs(bptt.scan(cell, *single)[1].astype(float) - exact).max()
        for jacobian in ("full", "diagonal"):
            found = jax.jit(partial(bptt.newton_states, cell, jacobian=jacobian))(*single)
            ys = jax.jit(partial(bptt.newton_scan, cell, jacobian=jacobian))(*single)[1]
            assert found.converged, (kind, jacobian)
            assert jnp.abs(ys.astype(float) - exact).max() < 10 * error, (kind, jacobian)


def test_it_lowers_for_every_platform():
    cell = make_cell("gru")
    args = problem(cell, T, (2,))

    def loss(*args):
        scan = partial(bptt.newton_scan, jacobian="diagonal", chunk_length=4)
        return jnp.sum(scan(cell, *args, **FLAGS)[1] ** 2)

    program = export.export(jax.jit(jax.value_and_grad(loss)), platforms=("cuda", "rocm", "tpu"))(*args)
    assert program.platforms == ("cuda", "rocm", "tpu")


def test_states_are_constants_of_a_gradient():
    args = cell, params, init, xs = network("elman", 4, 5)

    def loss(params, guess):
        found = bptt.newton_states(cell, params, init, xs, guess=guess)
        ys = bptt.newton_scan(cell, params, init, xs, guess=guess)[1]
        return jnp.sum(found.ys) + jnp.sum(ys), found.iterations

    guess = random_like(bptt.scan(*args)[1], 4)
    found, iterations = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(params, guess)
    assert iterations > 1
    assert_close(found[0], jax.grad(lambda params: jnp.sum(bptt.scan(cell, params, init, xs)[1]))(params))
    assert not found[1].any()


def test_a_guess_may_be_mapped_and_carried_on():
    cell, params, init, _ = network("elman", 3, 6)
    xs, guess = random_like(jnp.zeros((3, 6, 4)), 1), random_like(jnp.zeros((3, 6, 3)), 2)

    def mapped(params, scan):
        def loss(params, xs, guess):
            return jnp.sum(scan(cell, params, init, xs, **({} if scan is bptt.scan else {"guess": guess}))[1] ** 2)

        return jax.vmap(jax.value_and_grad(loss), (None, 0, 0))(params, xs, guess)

    def carried_on(params):
        def body(guess, xs):
            found = bptt.newton_states(cell, params, init, xs, guess=guess)
            _, ys = bptt.newton_scan(cell, params, init, xs, guess=guess)
            return found.carries, jnp.sum(ys**2)

        return jax.lax.scan(body, guess[0], xs)[1].sum()

    def found(params):
        return mapped(params, bptt.newton_scan), mapped(params, bptt.scan), jax.value_and_grad(carried_on)(params)

    ours, expected, total = jax.jit(found)(params)
    assert_close(ours, expected)
    assert_close(total, jax.tree.map(lambda leaf: leaf.sum(axis=0), expected))


WRONG = {
    "jacobian": ({"jacobian": "dense"}, ValueError, "'full' or 'diagonal'"),
    "tolerance": ({"tolerance": 0.0}, ValueError, "number above 0"),
    "damping": ({"damping": 1.0}, ValueError, "not including, 1"),
    "max_iterations": ({"max_iterations": 0}, ValueError, "max_iterations is 0"),
    "chunk_length": ({"chunk_length": 0}, ValueError, "chunk_length is 0"),
    "guess, structure": ({"guess": (jnp.zeros((5, 4)),)}, TypeError, "guess has structure"),
    "guess, shape": ({"guess": jnp.zeros((4, 4))}, ValueError, r"guess has shape \(4, 4\), but \(5, 4\)"),
    "guess, kind": ({"guess": "zeros"}, TypeError, "guess is a str"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(name):
    options, error, words = WRONG[name]
    args = network("elman", 4, 5)
    for function in (bptt.newton_scan, bptt.newton_states):
        with pytest.raises(error, match=words):
            function(*args, **options)


def test_products_are_in_full_precision_unless_the_user_says_otherwise():
    """Rounded to TF32, a step jumps where its factors hardly change, and no iteration gets nearer than that."""
    cell = make_cell("gru")
    args = problem(cell, 3)

    def precisions():
        program = jax.jit(partial(bptt.newton_states, cell.step)).lower(*args).as_text()
        products = [line for line in program.splitlines() if "dot_general" in line]
        return {line.split("precision = ")[1].split("]")[0] for line in products}

    assert precisions() == {"[HIGHEST, HIGHEST"}
    with jax.default_matmul_precision("high"):
        assert "[HIGH, HIGH" in precisions()


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_as_many_steps_are_right_as_there_were_iterations(dtype):
    """Of a chaotic map whose iterates overflow on the way."""
    logistic = lambda p, h, x: (3.9 * h * (1 - h), h)
    guess, start = jnp.full(40, 0.5, dtype), jnp.asarray(0.3, dtype)
    expected, _ = jax.lax.scan(lambda h, _: (logistic(None, h, None)[0],) * 2, start, length=40)
    for iterations in (20, 40):
        found = bptt.newton_states(logistic, None, start, length=40, guess=guess, max_iterations=iterations)
        assert found.first_bad_step >= iterations - 1
        assert np.isfinite(found.carries).all()
    assert found.converged
    np.testing.assert_allclose(found.carries[-1], expected, rtol=1e-3 if dtype == jnp.float32 else 1e-8)
