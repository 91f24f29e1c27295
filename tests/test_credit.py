"""Gradient flow is ∂L/∂hₜ, for any step; its parts are exact, and so is the split by lag."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CELLS, assert_close, make_cell, problem, python_loop

import jaxbptt as bptt


def loss_of_all(carry, ys):
    weights = jnp.arange(1.0, len(jax.tree.leaves(ys)[0]) + 1)
    per_leaf = [jnp.sum(jnp.tensordot(weights, jnp.sin(leaf), 1)) for leaf in jax.tree.leaves(ys)]
    return sum(per_leaf) + sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(carry) if leaf.dtype == float)


def loss_of_last(carry, ys):
    return sum(jnp.sum(jnp.sin(leaf[-1])) for leaf in jax.tree.leaves(ys))


def compiled(step):
    """The step alone, compiled: the loops around it stay Python's and run faster."""
    return jax.jit(getattr(step, "step", step))


losses = pytest.mark.parametrize("loss", [loss_of_all, loss_of_last], ids=["all steps", "last step"])


def network_step(params, h, x):
    """The textbook's network as one step: what comes out is read off the new state."""
    h = jnp.tanh(params["W_hh"] @ h + x)
    return h, params["W_hy"] @ h


def wrapped_step(params, carry, x):
    """The same inside wrappers that hide it, with a counter in the carry, a custom derivative and a dictionary."""

    @jax.jit
    def inner(params, carry, x):
        h = jax.nn.relu(params["W_hh"] @ carry["h"] + x) - 0.3 * jnp.tanh(carry["h"])
        return {"h": h, "n": carry["n"] + 1}, {"o": jax.nn.logsumexp(params["W_hy"] @ h) * x[0], "n": carry["n"]}

    return jax.checkpoint(inner)(params, carry, x)


def user_problem(kind):
    params = {
        "W_hh": jax.random.normal(jax.random.key(1), (3, 3)),
        "W_hy": jax.random.normal(jax.random.key(2), (2, 3)),
    }
    xs = jax.random.normal(jax.random.key(3), (6, 3))
    if kind == "network":
        return network_step, params, jnp.full(3, 0.1), xs
    return wrapped_step, params, {"h": jnp.full(3, 0.1), "n": jnp.array(0)}, xs


def any_problem(name):
    if name in CELLS:
        cell = make_cell(name)
        return cell, *problem(cell, 6)
    return user_problem(name)


everything = pytest.mark.parametrize("name", ["elman", "lstm", "network", "wrapped"])


def perturbed_loss(step, params, init, xs, loss, epsilons):
    """The loss with εₜ added to each hₜ itself, seen by the next step and by the step's own output: by hand."""
    step = getattr(step, "step", step)
    carry, ys = init, []
    for x, epsilon in zip(xs, epsilons, strict=True):
        carry, y = step(params, carry, x)
        if step is wrapped_step:
            carry = carry | {"h": carry["h"] + epsilon}
            y = y | {"o": jax.nn.logsumexp(params["W_hy"] @ carry["h"]) * x[0]}
        else:
            carry = carry + epsilon
            y = params["W_hy"] @ carry if step is network_step else carry
        ys.append(y)
    return loss(carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys))


@losses
@pytest.mark.parametrize("name", ["elman", "gru", "network", "wrapped"])
@pytest.mark.costly
def test_adjoints_are_dL_dh(name, loss):
    step, params, init, xs = any_problem(name)
    flow = jax.jit(lambda *args: bptt.gradient_flow(step, *args, loss))(params, init, xs)
    adjoints = flow.adjoints["h"] if isinstance(init, dict) else flow.adjoints
    expected = jax.jit(jax.grad(lambda e: perturbed_loss(step, params, init, xs, loss, e)))(jnp.zeros_like(adjoints))
    np.testing.assert_allclose(adjoints, expected, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(flow.norms, jnp.linalg.norm(expected, axis=1), rtol=1e-10)


@losses
@pytest.mark.parametrize("name", ["elman", "gru", "lstm", "network"])
@pytest.mark.costly
def test_recursion_of_the_text(name, loss):
    """d_T = a_T, and dₜ = aₜ + Jₜ₊₁ᵀ dₜ₊₁ with Jacobians taken on another road."""
    step, params, init, xs = any_problem(name)
    flow = jax.jit(lambda *args: bptt.gradient_flow(step, *args, loss))(params, init, xs)
    _, J = jax.jit(lambda *args: bptt.state_jacobians(step, *args))(params, init, xs)
    d, a = (
        np.concatenate([np.asarray(leaf).reshape(6, -1) for leaf in jax.tree.leaves(part)], axis=1)
        for part in (flow.adjoints, flow.immediate)
    )
    np.testing.assert_allclose(d[-1], a[-1], rtol=1e-12)
    np.testing.assert_allclose(d[:-1], a[:-1] + np.einsum("tij,ti->tj", J[1:], d[1:]), rtol=1e-10, atol=1e-13)
    np.testing.assert_allclose(flow.immediate_norms, np.linalg.norm(a, axis=1), rtol=1e-12)


@losses
@everything
@pytest.mark.costly
def test_gradients_and_contributions(name, loss):
    step, params, init, xs = any_problem(name)
    flow = jax.jit(lambda *args: bptt.gradient_flow(step, *args, loss))(params, init, xs)
    value, gradients = jax.value_and_grad(
        lambda p, xs: loss(*python_loop(compiled(step), p, init, xs)), argnums=(0, 1)
    )(params, xs)
    assert_close((flow.loss, flow.param_gradients, flow.input_gradients), (value, *gradients))
    terms = jax.jit(lambda *args: bptt.temporal_contributions(step, *args, loss).contributions)(params, init, xs)
    norms = jax.tree.map(lambda leaf: jnp.sqrt(jnp.sum(leaf**2, axis=range(1, leaf.ndim))), terms)
    assert_close(flow.contribution_norms, norms)


@pytest.mark.slow
def test_initial_state_batch_and_no_inputs():
    cell = make_cell("lstm")
    params, init, xs = problem(cell, 5, (3,))
    flow = jax.jit(lambda *args: bptt.gradient_flow(cell, *args, loss_of_last))(params, init, xs)
    expected = jax.grad(lambda init: loss_of_last(*python_loop(compiled(cell), params, init, xs)))(init)
    assert_close(flow.init_gradients, expected)
    together = np.sqrt(np.sum(np.asarray(flow.adjoints.h) ** 2 + np.asarray(flow.adjoints.c) ** 2, axis=(1, 2)))
    np.testing.assert_allclose(flow.norms, together, rtol=1e-12)
    autonomous = bptt.gradient_flow(lambda w, h, x: (w * h, None), 0.5, 1.0, None, lambda h, ys: h, length=4)
    np.testing.assert_allclose(autonomous.adjoints, [0.125, 0.25, 0.5, 1])
    assert autonomous.input_gradients is None


def test_norms_of_vanishing_gradients_do_not_underflow():
    """In float32 a gradient of 1e-30 squared is 0; its norm must still be 1e-30."""
    flow = bptt.gradient_flow(
        lambda w, h, x: (w * h, None),
        jnp.float32(0.1),
        jnp.ones(4, jnp.float32),
        None,
        lambda h, ys: jnp.sum(h),
        length=31,
    )
    assert flow.norms.dtype == jnp.float32
    np.testing.assert_allclose(flow.norms, 2 * 10.0 ** -np.arange(30, -1, -1), rtol=1e-4)


@pytest.mark.slow
def test_memory_holds_no_weight_gradient_for_each_step():
    """Four times the time steps: temporary memory grows with T n, far from T p."""
    cell = bptt.elman(4, 128)
    params = cell.init(jax.random.key(0))

    def temporary_bytes(steps):
        xs = jnp.zeros((steps, 4), jnp.float32)
        f = jax.jit(lambda p: bptt.gradient_flow(cell, p, cell.initial_carry(), xs, lambda h, ys: jnp.sum(ys)))
        return f.lower(params).compile().memory_analysis().temp_size_in_bytes

    growth = temporary_bytes(256) - temporary_bytes(64)
    assert growth < 192 * 128 * 4 * 20
    assert growth < 192 * 128 * 128 * 4 / 4


def vector(tree):
    return np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(tree)])


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


@losses
@pytest.mark.parametrize("name", ["elman", "gru", "lstm", "stack", "network", "wrapped"])
@pytest.mark.costly
def test_lags_sum_to_the_gradient(name, loss):
    step, params, init, xs = any_problem(name)
    lags = jax.jit(lambda *args: bptt.lag_contributions(step, *args, loss))(params, init, xs)
    gradient = jax.grad(lambda params: loss(*python_loop(compiled(step), params, init, xs)))(params)
    assert_close(jax.tree.map(lambda leaf: leaf.sum(axis=0), lags.contributions), gradient)
    assert_close(lags.gradient, gradient)
    assert all(len(leaf) == 6 for leaf in jax.tree.leaves(lags.contributions))
    exact, partial_sum = vector(gradient), 0
    for lag in range(6):
        one = vector(jax.tree.map(lambda leaf, lag=lag: leaf[lag], lags.contributions))
        partial_sum = partial_sum + one
        np.testing.assert_allclose(lags.norms[lag], np.linalg.norm(one), rtol=1e-10)
        np.testing.assert_allclose(lags.cosines[lag], cosine(partial_sum, exact), rtol=1e-10)
        error = np.linalg.norm(partial_sum - exact) / np.linalg.norm(exact)
        np.testing.assert_allclose(lags.relative_errors[lag], error, rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize(
    ("name", "loss", "lengths"),
    [
        ("elman", loss_of_all, range(1, 7)),
        ("elman", loss_of_last, range(1, 7)),
        ("lstm", loss_of_all, (1, 4)),
        ("wrapped", loss_of_all, (2, 5)),
    ],
)
@pytest.mark.costly
def test_bias_is_that_of_the_truncated_strategies(name, loss, lengths):
    """At every K, both kinds of cut."""
    step, params, init, xs = any_problem(name)
    bias = jax.jit(lambda *args: bptt.truncation_bias(step, *args, loss))(params, init, xs)
    exact = vector(jax.jit(jax.grad(lambda params: loss(*bptt.scan(step, params, init, xs))))(params))
    strategies = {"windowed": (bptt.windowed_scan, "window"), "truncated": (bptt.truncated_scan, "truncation_length")}
    for kind, (scan, option) in strategies.items():
        curve = getattr(bias, kind)
        for K in lengths:
            cut = jax.grad(lambda p, scan=scan, option=option, K=K: loss(*scan(step, p, init, xs, **{option: K})))
            cut = vector(jax.jit(cut)(params))
            error = np.linalg.norm(cut - exact) / np.linalg.norm(exact)
            np.testing.assert_allclose(curve.relative_errors[K - 1], error, rtol=1e-8, atol=1e-14)
            np.testing.assert_allclose(curve.cosines[K - 1], cosine(cut, exact), rtol=1e-10)
    assert bias.lengths.tolist() == [1, 2, 3, 4, 5, 6]


def test_bias_at_chosen_lengths():
    step, params, init, xs = any_problem("elman")
    chosen, every = (
        jax.jit(
            lambda params, lengths=lengths: bptt.truncation_bias(step, params, init, xs, loss_of_all, lengths=lengths)
        )(params)
        for lengths in ([4, 1], None)
    )
    assert chosen.lengths.tolist() == [4, 1]
    for kind in ("windowed", "truncated"):
        for some, all_of_them in zip(getattr(chosen, kind), getattr(every, kind), strict=True):
            np.testing.assert_allclose(some, all_of_them[np.array([3, 0])], rtol=1e-12)


@pytest.mark.parametrize("lengths", [[0], [7], [1.5], []])
def test_wrong_lengths(lengths):
    step, params, init, xs = any_problem("elman")
    with pytest.raises(ValueError, match=r"lengths is \[.*\], but 6 time steps can be cut every 1 to 6 of them"):
        bptt.truncation_bias(step, params, init, xs, loss_of_all, lengths=lengths)


@pytest.mark.parametrize("name", ["lstm", "wrapped"])
@pytest.mark.costly
def test_saliency_is_the_norm_of_input_gradients(name):
    step, params, init, xs = any_problem(name)

    def step_losses(carry, ys):
        return sum(
            jnp.sum(jnp.sin(leaf), axis=range(1, leaf.ndim)) for leaf in jax.tree.leaves(ys) if leaf.dtype == float
        )

    saliency = jax.jit(lambda *args: bptt.input_saliency(step, *args, step_losses))(params, init, xs)
    rows = jax.jacrev(lambda xs: step_losses(*python_loop(compiled(step), params, init, xs)))(xs)
    np.testing.assert_allclose(saliency, jnp.linalg.norm(rows, axis=2), rtol=1e-10, atol=1e-14)
    assert not np.triu(saliency, 1).any()
    chosen = jax.jit(lambda *args: bptt.input_saliency(step, *args, step_losses, steps=[5, 2]))(params, init, xs)
    np.testing.assert_allclose(chosen, saliency[np.array([5, 2])], rtol=1e-12)


def test_wrong_saliency():
    cell = make_cell("elman")
    params, init, xs = problem(cell, 4)
    with pytest.raises(ValueError, match="xs has no differentiable leaf, so no gradient reaches it: pass one-hot"):
        bptt.input_saliency(lambda p, h, x: (h, h), params, init, jnp.arange(4), lambda h, ys: ys)
    with pytest.raises(ValueError, match=r"losses returned an array of shape \(4, 4\): return one loss for each step"):
        bptt.input_saliency(cell, params, init, xs, lambda h, ys: ys)
    for steps in ([4], [-1], [0.5]):
        with pytest.raises(ValueError, match=r"steps is \[.*\], but there are losses 0 to 3"):
            bptt.input_saliency(cell, params, init, xs, lambda h, ys: ys.sum(axis=1), steps=steps)


def test_no_nan_out_of_branches_not_taken():
    """Side by side both branches of a `lax.cond` would be computed, and the derivative of √0 is infinite."""
    step = lambda w, h, x: (jax.lax.cond(h > 0, lambda: jnp.sqrt(w * h), lambda: w * h), w * h + x)
    args = 0.5, 0.0, jnp.array([0.0, 0.0, 1.0])
    bias = bptt.truncation_bias(step, *args, lambda h, ys: ys.sum() + h)
    lags = bptt.lag_contributions(step, *args, lambda h, ys: ys.sum() + h)
    assert np.isfinite(lags.contributions).all()
    assert not np.isinf(bias.truncated.relative_errors).any()
    assert np.isfinite(bptt.input_saliency(step, *args, lambda h, ys: ys)).all()


@pytest.mark.slow
def test_lags_are_windows_cut_by_hand():
    """The first W lags together: each loss term alone, with the carry cut W steps before it."""
    cell = make_cell("elman")
    params, h_0, xs = problem(cell, 6)
    lags = bptt.lag_contributions(cell, params, h_0, xs, lambda h, ys: jnp.sum(jnp.sin(ys))).contributions.W_hh

    def windowed(W_hh, window):
        p, total = params._replace(W_hh=W_hh), 0.0
        for t in range(6):
            h = h_0
            for s in range(t + 1):
                h = jax.lax.stop_gradient(h) if s == t - window + 1 else h
                h, y = cell.step(p, h, xs[s])
            total += jnp.sum(jnp.sin(y))
        return total

    for window in range(1, 7):
        expected = jax.grad(windowed)(params.W_hh, window)
        np.testing.assert_allclose(lags[:window].sum(axis=0), expected, rtol=1e-10, atol=1e-14)
    short = bptt.lag_contributions(cell, params, h_0, xs, lambda h, ys: jnp.sum(jnp.sin(ys)), max_lag=2)
    np.testing.assert_allclose(short.contributions.W_hh, lags[:3], rtol=1e-12)


@pytest.mark.parametrize("max_lag", [-1, 3, 1.5, True])
def test_wrong_lag(max_lag):
    with pytest.raises(ValueError, match=rf"max_lag is {max_lag}, but a sequence of 3 time steps has lags 0 to 2"):
        bptt.lag_contributions(lambda w, h, x: (w * h, h), 0.5, 1.0, None, lambda h, ys: h, max_lag=max_lag, length=3)


def test_measures_are_of_the_params_alone():
    """Arrays that the step closes over are no params: neither in the contributions, nor in the norms."""
    W = jax.random.normal(jax.random.key(0), (3, 3))
    xs = jax.random.normal(jax.random.key(1), (5, 3))
    closing = lambda b, h, x: ((h := jnp.tanh(W @ h + x + b)), h)
    lags = bptt.lag_contributions(closing, jnp.ones(3), jnp.zeros(3), xs, loss_of_all)
    np.testing.assert_allclose(lags.norms, jnp.linalg.norm(lags.contributions, axis=1), rtol=1e-12)
    with pytest.raises(ValueError, match="params has no differentiable leaf: pass what the step learns as params"):
        bptt.lag_contributions(lambda _, h, x: (W @ h, h), None, jnp.zeros(3), xs, loss_of_all)


def test_no_time_steps_have_no_lags():
    with pytest.raises(ValueError, match="A sequence without time steps has no lags"):
        bptt.lag_contributions(lambda w, h, x: (w * h, h), 0.5, 1.0, None, lambda h, ys: h, length=0)


BRANCHES = {
    "cond": lambda f: lambda p, h, x: jax.lax.cond(x[0] > -9, lambda: f(p, h, x), lambda: (h * 0,) * 2),
    "custom_vjp": lambda f: (g := jax.custom_vjp(f), g.defvjp(lambda *a: jax.vjp(f, *a), lambda pull, b: pull(b)))[0],
    "scan": lambda f: lambda p, h, x: jax.lax.scan(lambda c, x: (f(p, c[0], x), None), (h, h), x[None])[0],
}


@pytest.mark.parametrize("wrap", BRANCHES.values(), ids=BRANCHES)
@pytest.mark.costly
def test_state_returned_twice_from_inside_a_branch_or_loop(wrap):
    """The output is the new state, also where both come out of one opaque operation."""

    def step(p, h, x):
        h = jnp.tanh(p @ h + x)
        return h, h

    args = 0.5 * jnp.eye(3), jnp.full(3, 0.1), jax.random.normal(jax.random.key(3), (6, 3)), loss_of_all
    flow, expected = bptt.gradient_flow(wrap(step), *args), bptt.gradient_flow(step, *args)
    assert_close((flow.adjoints, flow.immediate), (expected.adjoints, expected.immediate))


def test_what_an_output_reads_inside_a_branch_is_warned_of():
    step = BRANCHES["cond"](lambda p, h, x: (jnp.tanh(p * h + x), jnp.tanh(p * h + x) * 2))
    with pytest.warns(UserWarning, match="come out of one `cond`: .* Gradients are not affected"):
        bptt.gradient_flow(step, 0.5, jnp.ones(3), jnp.ones((4, 3)), loss_of_all)
