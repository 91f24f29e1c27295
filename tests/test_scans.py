"""Every exact strategy is the Python loop: in value, and in its vjp under a random cotangent."""

import inspect
import warnings
from functools import cache, partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import (
    CELLS,
    DIAGONAL,
    EXACT,
    UNCUT,
    assert_close,
    exact_for,
    make_cell,
    problem,
    python_loop,
    random_like,
)

import jaxbptt as bptt

ALL = EXACT | UNCUT
strategies = pytest.mark.parametrize("strategy", ALL.values(), ids=ALL)
# Where there is nothing to test in lax.scan itself.
own_strategies = pytest.mark.parametrize("strategy", list(ALL.values())[1:], ids=list(ALL)[1:])


CASES = [("elman", 1, (5,), jnp.float64), ("gru", 64, (5,), jnp.float64), ("stack", 7, (), jnp.float64)]
CASES += [("lstm", 7, (1,), jnp.float64), ("lstm", 7, (5,), jnp.float32)]
CASES += [("rate", 7, (5,), jnp.float64), ("layer_norm", 7, (5,), jnp.float64)]
MORE = [(name, steps, (5,), jnp.float64) for name in ("elman", "gru", "lstm") for steps in (1, 2, 64)]
MORE += [(name, 7, batch, jnp.float64) for name in CELLS for batch in ((), (1,), (5,))]
MORE += [(name, 7, (5,), jnp.float32) for name in CELLS]
MORE += [(name, 7, batch, jnp.float64) for name in DIAGONAL for batch in ((), (5,))]
CASES += [pytest.param(*case, marks=pytest.mark.slow) for case in MORE if case not in CASES]


@pytest.mark.parametrize(("name", "steps", "batch", "dtype"), CASES)
@pytest.mark.costly
def test_equals_python_loop(name, steps, batch, dtype):
    cell = make_cell(name, dtype)
    args = problem(cell, steps, batch, dtype)
    # The loop is Python's; its step is compiled, which changes nothing but the time this test takes.
    out, pull = jax.vjp(partial(python_loop, jax.jit(cell.step)), *args)
    every_step = random_like(out, 9)
    # The last step only: in the outputs, and nothing through the carry.
    last_step = (jax.tree.map(jnp.zeros_like, out[0]), jnp.zeros_like(out[1]).at[-1].set(every_step[1][-1]))

    @jax.jit
    def every_way(args, cotangent):
        outs_and_pulls = [jax.vjp(partial(strategy, cell), *args) for strategy in exact_for(name).values()]
        return [(out, pull(cotangent)) for out, pull in outs_and_pulls]

    for cotangent in (every_step, last_step):
        expected = out, pull(cotangent)
        for value_and_gradients in every_way(args, cotangent):
            assert_close(value_and_gradients, expected)


@strategies
@pytest.mark.parametrize("name", ["elman", "stack"])
@pytest.mark.costly
def test_no_time_steps(strategy, name):
    cell = make_cell(name)
    params, init, xs = problem(cell, 0, (2,))

    @jax.jit
    def run(*args):
        (carry, ys), pull = jax.vjp(partial(strategy, cell), *args)
        return carry, ys, pull((args[1], ys))

    carry, ys, (params_bar, init_bar, xs_bar) = run(params, init, xs)
    assert_close(carry, init)
    assert ys.shape[0] == 0
    assert_close(init_bar, init)
    assert all(not leaf.any() for leaf in jax.tree.leaves(params_bar))
    assert xs_bar.shape == xs.shape


@strategies
def test_known_gradient(strategy):
    """h₃ = w³ h₀, so dh₃/dw = 3 w² h₀ = 0.108 at w = 0.2, h₀ = 0.9."""

    def last(w, h):
        return strategy(lambda w, h, x: (w * h, None), w, h, length=3)[0]

    gradients = jax.grad(last, argnums=(0, 1))(0.2, 0.9)
    np.testing.assert_allclose(gradients, (0.108, 0.008), rtol=1e-12)


def counting_step(params, carry, x):
    """A step with everything that has no derivative: a counter and a key in the carry, integers, keys and None in x."""
    h, key, count = carry["h"], carry["key"], carry["count"]
    key, subkey = jax.random.split(key)
    noise = jax.random.normal(subkey) + jax.random.normal(x["key"])
    h = jnp.tanh(params["w"] * h + params["embedding"][x["token"]] + 0.1 * noise)
    y = {"h": h, "count": count, "half": h * params["shift"].astype(h.dtype), "nothing": None}
    return {"h": h, "key": key, "count": count + 1}, y


def counting_problem(steps=5):
    params = {"w": jnp.array(0.3), "embedding": jnp.arange(4.0), "shift": jnp.array(2)}
    carry = {"h": jnp.array(0.5), "key": jax.random.key(0), "count": jnp.array(0)}
    xs = {"token": jnp.arange(steps) % 4, "key": jax.random.split(jax.random.key(1), steps), "none": None}
    return params, carry, xs


def run_counting(scan, *, jit):
    def loss(params, carry, xs):
        carry, ys = scan(counting_step, params, carry, xs)
        return jnp.sum(ys["half"] ** 2) + carry["h"], carry["count"]

    f = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True, allow_int=True)
    return (jax.jit(f) if jit else f)(*counting_problem())


counted_by_the_loop = cache(partial(run_counting, python_loop, jit=True))


@strategies
@pytest.mark.parametrize("jit", [pytest.param(False, marks=pytest.mark.slow), True], ids=["eager", "jit"])
@pytest.mark.costly
def test_leaves_without_derivative(strategy, jit):
    (value, count), gradients = run_counting(strategy, jit=jit)
    (expected, _), expected_gradients = counted_by_the_loop()
    assert count == 5
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    for mine, theirs in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients), strict=True):
        assert mine.dtype == theirs.dtype
        if mine.dtype == jnp.float64:
            np.testing.assert_allclose(mine, theirs, rtol=1e-10)


def gradient_of_what_is_closed_over(scan, transform):
    xs = jax.random.normal(jax.random.key(0), (6, 3))

    def loss(W, b):
        step = jax.jit(lambda scale, h, x: (jnp.tanh(W @ h + x + scale * b), h))
        return jnp.sum(scan(step, 0.7, jnp.ones(3), xs)[1] ** 2)

    return transform(jax.grad(loss, argnums=(0, 1)))(0.5 * jnp.eye(3), jnp.arange(3.0))


of_the_loop = cache(partial(gradient_of_what_is_closed_over, python_loop, jax.jit))


@strategies
@pytest.mark.costly
def test_gradient_reaches_what_a_step_closes_over(strategy):
    for transform in (lambda f: f, jax.jit):
        assert_close(gradient_of_what_is_closed_over(strategy, transform), of_the_loop())


@strategies
@pytest.mark.costly
def test_params_that_are_no_arrays(strategy):
    """Models keep functions and names among their leaves."""
    xs = jax.random.normal(jax.random.key(0), (6, 3))

    def loss(scan, W):
        params = {"W": W, "activation": jnp.tanh, "name": "layer"}
        step = lambda p, h, x: (p["activation"](p["W"] @ h + x), h)
        return jnp.sum(scan(step, params, jnp.ones(3), xs)[0])

    assert_close(jax.grad(partial(loss, strategy))(jnp.eye(3)), jax.grad(partial(loss, python_loop))(jnp.eye(3)))


def vmapped_and_nested(scan):
    cell = make_cell("gru")
    params, _, xs = problem(cell, 4, (3,))
    inits = random_like(cell.initial_carry((3,)), 5)

    def outer_loss(params, init, xs):
        def outer_step(h, x):
            h, ys = scan(cell, params, h, x)
            return h, ys

        h, ys = jax.lax.scan(outer_step, init, xs.reshape(2, 2, 3))
        return jnp.sum(ys**2) + jnp.sum(h)

    @jax.jit
    def run(params, inits, xs):
        rows = jax.vmap(jax.grad(outer_loss, argnums=(0, 1, 2)), in_axes=(None, 0, 1))(params, inits, xs)
        mean = lambda params: jax.vmap(outer_loss, in_axes=(None, 0, 1))(params, inits, xs).mean()
        return rows, jax.grad(mean)(params)

    return run(params, inits, xs)


vmapped_loop = cache(partial(vmapped_and_nested, python_loop))


@own_strategies
@pytest.mark.costly
def test_vmap_and_nesting(strategy):
    """Under vmap on either side of grad, and inside another scan."""
    assert_close(vmapped_and_nested(strategy), vmapped_loop())


def second_derivatives(scan, *ways):
    cell = make_cell("elman")
    params, init, xs = problem(cell, 5)

    def loss(W_and_h):
        W, h = W_and_h
        return jnp.sum(jnp.sin(scan(cell, params._replace(W_hh=W), h, xs)[1]))

    return jax.jit(lambda at: [way(loss)(at) for way in ways])((params.W_hh, init))


second_derivatives_of_the_loop = cache(partial(second_derivatives, python_loop, jax.hessian))


@own_strategies
@pytest.mark.costly
def test_second_derivatives(strategy):
    """Forward over reverse, and reverse over reverse, with respect to weights and first state."""
    (expected,) = second_derivatives_of_the_loop()
    for mine in second_derivatives(strategy, jax.hessian, lambda loss: jax.jacrev(jax.grad(loss))):
        assert_close(mine, expected)


@own_strategies
@pytest.mark.costly
def test_branches_do_not_leak_nan(strategy):
    """The branch not taken has the gradient nan: a strategy that computes both sides would return it."""

    def step(w, h, x):
        h = jax.lax.cond(x > 0, lambda: jnp.sqrt(x) * w * h, lambda: -h * w)
        return h, h

    def loss(scan, w, xs):
        return jnp.sum(scan(step, w, 1.0, xs)[1])

    args = 2.0, jnp.array([1.0, -1.0, 0.0, 3.0])
    mine = jax.grad(partial(loss, strategy), argnums=(0, 1))(*args)
    np.testing.assert_allclose(mine[1][2], 0)
    assert_close(mine, jax.grad(partial(loss, python_loop), argnums=(0, 1))(*args))


@pytest.mark.parametrize("name", [name for name in ALL if name not in ("scan", "newton_scan")])
@pytest.mark.costly
def test_unroll_changes_nothing(name):
    strategy = ALL[name]
    cell = make_cell("lstm")
    args = problem(cell, 7, (2,))
    loss = lambda params, unroll: jnp.sum(strategy(cell, params, *args[1:], unroll=unroll)[1] ** 2)
    once, *others = jax.jit(lambda params: [jax.grad(loss)(params, unroll) for unroll in (1, 3, True)])(args[0])
    for other in others:
        assert_close(other, once)


@strategies
def test_python_numbers_take_the_dtype_of_the_step(strategy):
    carry, ys = strategy(lambda w, h, x: (w * h + x, h), jnp.float32(0.5), 1, jnp.ones(4, jnp.float32))
    assert carry.dtype == ys.dtype == jnp.float32
    assert carry == pytest.approx(0.5**4 + 1.875)
    with pytest.raises(TypeError, match="it went in as float64 and came out as int32"):
        strategy(lambda p, h, x: (jnp.int32(3), h), None, 0.7, length=3)


def test_length_may_be_a_numpy_number():
    scan = inspect.unwrap(bptt.scan)
    assert scan(lambda p, h, x: (h, h), None, jnp.ones(2), length=np.int64(3))[1].shape == (3, 2)


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.costly
def test_integer_and_boolean_inputs_of_a_cell(name):
    """One-hot vectors are often integers: they have no gradient, and the weights have theirs."""
    cell = make_cell(name)
    params, init, _ = problem(cell, 5)
    for dtype in (int, bool):
        xs = np.eye(3, dtype=dtype)[[0, 2, 1, 1, 0]]
        with jax.numpy_dtype_promotion("standard"):
            mine, expected = (
                jax.grad(lambda p, scan=scan, xs=xs: jnp.sum(scan(cell, p, init, xs)[1] ** 2))(params)
                for scan in (bptt.adjoint_scan, bptt.scan)
            )
        assert_close(mine, expected)


@strategies
@pytest.mark.costly
def test_flags_and_sizes_among_the_params_stay_python_numbers(strategy):
    def step(p, h, x):
        h = jnp.tanh(p["w"] * h.reshape(p["n"], -1).reshape(-1)) if p["flag"] else h
        return h, h

    loss = lambda w, scan: jnp.sum(scan(step, {"w": w, "n": 2, "flag": True}, jnp.ones(4), length=3)[1])
    np.testing.assert_allclose(jax.grad(loss)(0.5, strategy), jax.grad(loss)(0.5, python_loop), rtol=1e-12)


@strategies
@pytest.mark.costly
def test_step_is_traced_once(strategy):
    cell = make_cell("elman")
    params, init, xs = problem(cell, 6)

    def counted():
        chex.clear_trace_counter()
        return chex.assert_max_traces(lambda *args: cell.step(*args), n=1)

    step = counted()
    jax.jit(lambda params: strategy(step, params, init, xs))(params)
    step = counted()
    jax.jit(jax.grad(lambda params: jnp.sum(strategy(step, params, init, xs)[1])))(params)


def test_trace_count_can_fail():
    """The check above is real: chex counts the calls of a function, and a second one raises."""
    chex.clear_trace_counter()
    traces = chex.assert_max_traces(lambda p, h, x: (h, h), n=1)
    bptt.scan(traces, None, jnp.zeros(2), length=2)
    with pytest.raises(AssertionError, match="traced > 1 times"):
        bptt.scan(traces, None, jnp.zeros(2), length=3)


def test_forward_mode_gradient_equals_reverse():
    """jacfwd through scan is the same full BPTT."""
    cell = make_cell("lstm")
    params, init, xs = problem(cell, 5)
    loss = lambda scan, params: jnp.sum(scan(cell, params, init, xs)[1] ** 2)
    assert_close(jax.jacfwd(partial(loss, bptt.scan))(params), jax.grad(partial(loss, bptt.adjoint_scan))(params))


@pytest.mark.slow
def test_adjoint_scan_saves_memory():
    """The hand-derived adjoint stores less than autodiff does, the derived one no more."""
    for name, hidden in (("elman", 64), ("gru", 64), ("lstm", 64)):
        cell = getattr(bptt, name)(32, hidden)
        params = cell.init(jax.random.key(0))
        init, xs = cell.initial_carry((8,)), jnp.zeros((128, 8, 32), jnp.float32)

        def temporary_bytes(scan, cell=cell, init=init, xs=xs, params=params):
            loss = lambda p, xs: jnp.mean(scan(cell, p, init, xs)[1] ** 2)
            return jax.jit(jax.value_and_grad(loss)).lower(params, xs).compile().memory_analysis().temp_size_in_bytes

        reference = temporary_bytes(bptt.scan)
        assert temporary_bytes(bptt.adjoint_scan) < reference
        assert temporary_bytes(EXACT["adjoint_scan (derived)"]) < 1.02 * reference


def test_own_adjoint():
    """A hand-written adjoint for a user's step is used, and a wrong one shows."""

    def step(w, h, x):
        return w * h + x, h

    right = bptt.Adjoint(
        forward=lambda w, h, x: ((w * h + x, h), h),
        backward=lambda w, h, x, h_bar, y_bar: (w * h_bar + y_bar, h_bar),
        contract=lambda w, hs, xs, ys_bar, deltas: (jnp.sum(deltas * hs), deltas),
    )
    xs = jnp.arange(1.0, 6.0)
    loss = lambda w, adjoint: jnp.sum(jnp.sin(bptt.adjoint_scan(step, w, 0.3, xs, adjoint=adjoint)[1]))
    reference = jax.grad(loss)(0.9, None)
    np.testing.assert_allclose(jax.grad(loss)(0.9, right), reference, rtol=1e-12)
    wrong = right._replace(backward=lambda w, h, x, h_bar, y_bar: (w * h_bar - y_bar, h_bar))
    assert abs(jax.grad(loss)(0.9, wrong) - reference) > 0.1


def test_own_adjoint_of_wrong_shape():
    cell = make_cell("elman")
    params, init, xs = problem(cell, 4)

    def gradient(contract):
        adjoint = cell.adjoint._replace(contract=contract)
        loss = lambda params: jnp.sum(bptt.adjoint_scan(cell, params, init, xs, adjoint=adjoint)[1])
        return jax.grad(loss)(params)

    def transposed(*args):
        params_bar, xs_bar = cell.adjoint.contract(*args)
        return params_bar._replace(W_xh=params_bar.W_xh.T), xs_bar

    with pytest.raises(ValueError, match=r"gradient of params\.W_xh has shape \(3, 4\), but params\.W_xh has \(4, 3\)"):
        gradient(transposed)
    with pytest.raises(ValueError, match="gradient of params has structure"):
        gradient(lambda *args: (tuple(cell.adjoint.contract(*args)[0]), cell.adjoint.contract(*args)[1]))


def test_stack_without_an_adjoint_in_one_layer():
    plain = make_cell("elman")._replace(adjoint=None)
    cell = bptt.stack(plain, bptt.gru(4, 5, dtype=jnp.float64))
    assert cell.adjoint is None
    args = problem(cell, 5)
    loss = lambda scan, params: jnp.sum(scan(cell, params, *args[1:])[1] ** 2)
    assert_close(jax.grad(partial(loss, bptt.adjoint_scan))(args[0]), jax.grad(partial(loss, python_loop))(args[0]))


def test_layers_of_different_precision():
    with jax.numpy_dtype_promotion("standard"):
        cell = bptt.stack(bptt.lstm(3, 4, dtype=jnp.float32), bptt.gru(4, 5, dtype=jnp.float64))
        params, init, xs = problem(cell, 6, (2,))
        xs = xs.astype(jnp.float32)
        loss = lambda scan, params, xs: jnp.sum(scan(cell, params, init, xs)[1] ** 2)
        mine = jax.grad(partial(loss, bptt.adjoint_scan), argnums=(0, 1))(params, xs)
        assert_close(mine, jax.grad(partial(loss, bptt.scan), argnums=(0, 1))(params, xs), rtol=1e-5)


def test_bfloat16_is_kept():
    cell = make_cell("elman", jnp.bfloat16)
    params, init, xs = problem(cell, 5, (2,), jnp.bfloat16)
    (carry, ys), pull = jax.vjp(partial(bptt.adjoint_scan, cell), params, init, xs)
    bars = pull((carry, ys))
    assert {leaf.dtype for leaf in jax.tree.leaves((carry, ys, bars))} == {jnp.dtype(jnp.bfloat16)}


def test_no_warnings_and_no_config_at_import():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert bptt.scan(lambda p, h, x: (h, h), None, jnp.zeros(2), length=3)[1].shape == (3, 2)
