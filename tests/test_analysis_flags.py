"""The analysis of rows with resets and padding, against JAX's derivative of the scan with the same flags."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, make_cell, problem, random_like

import jaxbptt as bptt

STEPS = 7
# A sequence that ends early, a hole, a sequence that begins in the middle, one that would begin in the padding.
IS_FIRST = np.array([0, 0, 0, 1, 0, 1, 0], bool)
VALID = np.array([1, 0, 1, 1, 1, 0, 0], bool)
ROWS = {"is_first": np.stack([IS_FIRST, np.roll(IS_FIRST, 1)], 1), "valid": np.stack([VALID, np.roll(VALID, 3)], 1)}
FLAGS = {
    "both": {"is_first": IS_FIRST, "valid": VALID},
    "is_first": {"is_first": IS_FIRST},
    "valid": {"valid": VALID},
}
flags = pytest.mark.parametrize("word", FLAGS)


def bare(params, carry, x):
    """The output is read off the new carry, and off the input."""
    h = jnp.tanh(params["W"] @ carry["h"] + params["U"] @ x)
    return {"h": h, "n": carry["n"] + 1}, {"y": params["V"] @ h * x[0]}


def bare_problem(seed=0):
    shapes = {"W": (3, 3), "U": (3, 2), "V": (2, 3)}
    params = random_like({name: jnp.zeros(shape) for name, shape in shapes.items()}, seed, 0.8)
    init = {"h": random_like(jnp.zeros(3), seed + 1), "n": jnp.array(0)}
    reset = {"h": random_like(jnp.zeros(3), seed + 2), "n": jnp.array(0)}
    return params, init, random_like(jnp.zeros((STEPS, 2)), seed + 3), reset


def lstm_problem():
    cell = make_cell("lstm")
    params, init, xs = problem(cell, STEPS)
    return params, init, xs, random_like(init, 9)


PROBLEMS = {"bare": (bare, bare_problem), "lstm": (make_cell("lstm"), lstm_problem)}


def spoilt(xs, given):
    """The inputs, with nan where a step is padding: it must change nothing."""
    valid = given.get("valid")
    if valid is None:
        return xs
    return jnp.where(valid.reshape(valid.shape + (1,) * (xs.ndim - valid.ndim)), xs, jnp.nan)


def loss(carry, ys):
    terms = [jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(carry) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return sum(terms) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(ys))


def flat(carry):
    return bptt.analysis.jacobians.state_vector(carry)


@flags
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.costly
def test_jacobians(name, word):
    """Of every step, dense and as linear maps: 0 where a sequence begins, the identity where a step is padding."""
    step, make = PROBLEMS[name]
    params, init, xs, reset = make()
    given = FLAGS[word] | ({"reset_carry": reset} if "is_first" in FLAGS[word] else {})
    xs = spoilt(xs, given)
    carries, J = jax.jit(lambda xs: bptt.state_jacobians(step, params, init, xs, **given))(xs)

    @jax.jit
    @partial(jax.jacobian, argnums=0)
    def brute_force(vector, carry, at_t):
        x, here = at_t
        carry = flat(carry)[1](vector)
        here |= {"reset_carry": reset} if "is_first" in here else {}
        return flat(bptt.scan(step, params, carry, x, **here)[0])[0]

    assert_close(jax.tree.map(lambda leaf: leaf[-1], carries), bptt.scan(step, params, init, xs, **given)[0])
    for t in range(STEPS):
        before = init if t == 0 else jax.tree.map(lambda leaf, t=t: leaf[t - 1], carries)
        here = {key: flag[t : t + 1] for key, flag in given.items() if key != "reset_carry"}
        expected = brute_force(flat(before)[0], before, (xs[t : t + 1], here))
        np.testing.assert_allclose(J[t], expected, rtol=1e-10, atol=1e-12)
        if not given.get("valid", np.ones(STEPS))[t]:
            np.testing.assert_array_equal(J[t], np.eye(len(expected)))
        elif given.get("is_first", np.zeros(STEPS))[t]:
            assert not J[t].any()

    operators = bptt.jacobian_operators(step, params, init, xs, **given)
    eye = jnp.eye(operators.size)
    pushed, pulled = jax.lax.map(lambda at_t: (operators.push(at_t, eye), operators.pull(at_t, eye)), operators.at)
    assert_close((pushed, pulled), (J, J.mT))


def step_of(step):
    return step.step if isinstance(step, bptt.Cell) else step


@cache
def gradient_by_scan(name, word, rows):
    """Value and gradient of the loss through `scan` with the flags, and what the problem is."""
    step, params, init, xs, given = flagged_problem(name, word, rows)
    diff = jax.tree.map(lambda leaf: leaf if jnp.issubdtype(leaf.dtype, jnp.inexact) else None, (params, init, xs))

    def unrolled(diff):
        whole = jax.tree.map(lambda d, leaf: leaf if d is None else d, diff, (params, init, xs), is_leaf=_is_none)
        return loss(*bptt.scan(step, *whole, **given))

    return jax.jit(jax.value_and_grad(unrolled))(diff)


def _is_none(leaf):
    return leaf is None


def flagged_problem(name, word, rows):
    step, make = PROBLEMS[name]
    params, init, xs, reset = make()
    given = FLAGS[word]
    if rows:
        given = {key: ROWS[key] for key in given}
        cell = make_cell("lstm")
        params, init, xs = problem(cell, STEPS, (2,))
        reset = jax.tree.map(lambda leaf: leaf[:1] / 2, init)
    given = given | ({"reset_carry": reset} if "is_first" in given else {})
    return step, params, init, spoilt(xs, given), given


@pytest.mark.parametrize(("name", "rows"), [("bare", False), ("lstm", True)])
@flags
@pytest.mark.costly
def test_gradient_flow(name, rows, word):
    """Gradients are those through the scan; credit by time step is that of a loop with a zero added to every state."""
    step, params, init, xs, given = flagged_problem(name, word, rows)
    flow = jax.jit(lambda xs: bptt.gradient_flow(step, params, init, xs, loss, **given))(xs)
    value, gradient = gradient_by_scan(name, word, rows)
    np.testing.assert_allclose(flow.loss, value, rtol=1e-12)
    assert_close((flow.param_gradients, flow.init_gradients, flow.input_gradients), gradient)

    def probed(probes):
        carry, ys, none = init, [], jnp.ones(np.shape(next(iter(given.values())))[1:], bool)
        for t in range(STEPS):
            here = given["valid"][t] if "valid" in given else none
            first = given["is_first"][t] & here if "is_first" in given else ~none
            to_output, to_next = (jax.tree.map(lambda leaf, t=t: leaf[t], probe) for probe in probes)
            carry = jax.tree.map(partial(where, first), given.get("reset_carry", carry), carry)
            x = jnp.where(here[..., None], xs[t], 0.0)
            new, y = step_of(step)(params, carry, x)
            if isinstance(step, bptt.Cell):
                y = y + to_output.h
            else:
                y = {"y": params["V"] @ (new["h"] + to_output["h"]) * x[0]}
            carry = jax.tree.map(partial(where, here), new, carry)
            carry = jax.tree.map(lambda c, p: c if p is None else c + p, carry, to_next, is_leaf=_is_none)
            ys.append(jax.tree.map(lambda leaf, here=here: where(here, leaf, jnp.zeros_like(leaf)), y))
        return loss(carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys))

    zeros = jax.tree.map(lambda leaf: jnp.zeros((STEPS, *leaf.shape)), flow.init_gradients)
    through_output, through_next = jax.jit(jax.grad(probed))((zeros, zeros))
    assert_close(flow.adjoints, jax.tree.map(jnp.add, through_output, through_next))
    expected = jax.tree.map(lambda a, b: a.at[-1].add(b[-1]), through_output, through_next)
    assert_close(flow.immediate, expected)


def test_outputs_that_the_padding_does_not_have():
    """The output of a padded step, which is dropped, is that of the carry it runs on: of the one held it has no derivative."""

    def grows(w, h, x):
        new = h + w * x
        return new, jnp.sqrt(new - h)

    given = {"is_first": np.array([0, 0, 1, 0, 0], bool), "valid": np.array([1, 1, 1, 0, 1], bool), "reset_carry": -9.0}
    args = jnp.array(0.5), jnp.array(0.0), jnp.arange(1.0, 6.0)
    flow = bptt.gradient_flow(grows, *args, loss, **given)
    expected = jax.grad(lambda *args: loss(*bptt.scan(grows, *args, **given)), argnums=(0, 1, 2))(*args)
    assert_close((flow.param_gradients, flow.init_gradients, flow.input_gradients), expected)
    assert np.isfinite(flow.adjoints).all()


def where(flag, yes, no):
    flag = jnp.asarray(flag)
    return jnp.where(flag.reshape(flag.shape + (1,) * (jnp.ndim(no) - flag.ndim)), yes, no)


@pytest.mark.parametrize("name", PROBLEMS)
@flags
@pytest.mark.costly
def test_contributions_of_time_steps(name, word):
    """Each is the gradient with respect to params that are used at that step alone."""
    step, params, init, xs, given = flagged_problem(name, word, False)
    terms = jax.jit(lambda xs: bptt.temporal_contributions(step, params, init, xs, loss, **given))(xs)
    every_step = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (STEPS, *leaf.shape)), params)

    def unrolled(every_step):
        at_t = lambda _, carry, inputs: step_of(step)(inputs[1], carry, inputs[0])
        return loss(*bptt.scan(at_t, None, init, (xs, every_step), **given))

    expected = jax.jit(jax.grad(unrolled))(every_step)
    assert_close(terms.contributions, expected)
    for leaf in jax.tree.leaves(terms.contributions):
        assert not leaf[~given.get("valid", np.ones(STEPS, bool))].any()
    flow = bptt.gradient_flow(step, params, init, xs, loss, **given)
    norms = jax.tree.map(lambda leaf: jnp.sqrt(jnp.sum(leaf**2, axis=range(1, leaf.ndim))), expected)
    assert_close(flow.contribution_norms, norms)


@pytest.mark.parametrize(("name", "rows"), [("bare", False), ("lstm", True)])
@flags
@pytest.mark.costly
def test_lags_and_truncation(name, rows, word):
    """Lags below K are what `windowed_scan` keeps with the same flags; the bias is that of both truncated strategies."""
    step, params, init, xs, given = flagged_problem(name, word, rows)
    lags = jax.jit(lambda xs: bptt.lag_contributions(step, params, init, xs, loss, **given))(xs)
    exact = gradient_by_scan(name, word, rows)[1][0]
    assert_close((lags.gradient, jax.tree.map(lambda leaf: leaf.sum(0), lags.contributions)), (exact, exact))
    K = 2
    scans = {
        "windowed": partial(bptt.windowed_scan, window=K),
        "truncated": partial(bptt.truncated_scan, truncation_length=K),
    }
    biased = {
        kind: jax.jit(jax.grad(lambda params, scan=scan: loss(*scan(step, params, init, xs, **given))))(params)
        for kind, scan in scans.items()
    }
    assert_close(jax.tree.map(lambda leaf: leaf[:K].sum(0), lags.contributions), biased["windowed"])
    bias = jax.jit(lambda xs: bptt.truncation_bias(step, params, init, xs, loss, lengths=[K], **given))(xs)
    for kind, gradient in biased.items():
        difference = jax.tree.map(jnp.subtract, gradient, exact)
        expected = np.sqrt(squares(difference) / squares(exact))
        np.testing.assert_allclose(getattr(bias, kind).relative_errors, [expected], rtol=1e-9, atol=1e-12)


def squares(tree):
    return sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("name", "rows"), [("bare", False), ("lstm", True)])
@flags
@pytest.mark.costly
def test_input_saliency(name, rows, word):
    """Nothing passes a reset, and an input in the padding matters not at all."""
    step, params, init, xs, given = flagged_problem(name, word, rows)
    losses = lambda carry, ys: sum(jnp.sum(leaf.reshape(STEPS, -1) ** 2, axis=1) for leaf in jax.tree.leaves(ys))
    saliency = jax.jit(lambda xs: bptt.input_saliency(step, params, init, xs, losses, **given))(xs)
    J = jax.jit(jax.jacrev(lambda xs: losses(*bptt.scan(step, params, init, xs, **given))))(xs)
    np.testing.assert_allclose(saliency, jnp.sqrt(jnp.sum(J.reshape(STEPS, STEPS, -1) ** 2, axis=2)), atol=1e-12)
    if not rows and "is_first" in given:
        assert not saliency[3:, :3].any()


@pytest.mark.slow
def test_diagnosis():
    """Padding counts for nothing, nor does the first step of a sequence: as if the rest were there alone."""
    cell = make_cell("elman")
    params, init, xs = problem(cell, 24)
    last = lambda carry, ys: jnp.sum(jnp.sin(carry))
    numbers = lambda diagnosis: (diagnosis.rates, diagnosis.exponents, diagnosis.bound_rate)
    valid, is_first = np.ones(24, bool), np.zeros(24, bool)
    valid[[5, 6, 20, 21, 22, 23]], is_first[[0, 21]] = False, True
    given = {"is_first": is_first, "valid": valid, "reset_carry": init / 2}
    flagged = bptt.diagnose_gradient(cell, params, init, spoilt(xs, given), last, **given)
    start, _ = bptt.scan(cell, params, init / 2, xs[:1])
    alone = bptt.diagnose_gradient(cell, params, start, xs[valid][1:], last)
    assert flagged.forward is None
    assert (flagged.cause, flagged.sentence) == (alone.cause, alone.sentence)
    assert_close(numbers(flagged), numbers(alone))
    np.testing.assert_allclose(flagged.alignment[valid & ~is_first], alone.alignment, rtol=1e-9)
    assert np.isnan(flagged.alignment[~valid | is_first]).all()

    is_first[10] = True
    flagged = bptt.diagnose_gradient(cell, params, init, xs, last, is_first=is_first, valid=valid)
    start, _ = bptt.scan(cell, params, jnp.zeros(4), xs[10:11])
    alone = bptt.diagnose_gradient(cell, params, start, xs[11:20], last)
    assert flagged.cause == alone.cause != "cut"
    assert_close((flagged.rates, flagged.bound_rate), (alone.rates, alone.bound_rate))
    assert "Over 9 steps the gradient" in flagged.sentence
    broken = bptt.diagnose_gradient(cell, params, init, xs.at[4].set(jnp.nan), last, is_first=is_first, valid=valid)
    assert (broken.forward.leaf, broken.forward.time_index) == ("xs", 4)


def test_wrong_flags():
    params, init, xs, reset = bare_problem()
    two = np.ones((STEPS, 2), bool)
    for function in (bptt.jacobian_operators, partial(bptt.diagnose_gradient, loss=loss)):
        with pytest.raises(
            ValueError, match=r"valid has shape \(7, 2\), but a state vector is one row, with flags \[time\]"
        ):
            function(bare, params, init, xs, valid=two)
    with pytest.raises(ValueError, match="is_first and valid leave no step that passes a gradient back"):
        bptt.diagnose_gradient(bare, params, init, xs, loss, valid=np.zeros(STEPS, bool))
    with pytest.raises(ValueError, match="reset_carry says what is_first resets to"):
        bptt.gradient_flow(bare, params, init, xs, loss, reset_carry=reset)
    with pytest.raises(TypeError, match="is_first has dtype int64, but it says yes or no"):
        bptt.lag_contributions(bare, params, init, xs, loss, is_first=np.zeros(STEPS, int))
