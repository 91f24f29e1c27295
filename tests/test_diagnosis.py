"""Causes told apart: planted ones are found, and the parts add up."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import make_cell, problem

import jaxbptt as bptt
from jaxbptt.analysis.flow import flow_and_trajectory
from jaxbptt.analysis.lyapunov import spectrum_along
from jaxbptt.analysis.operators import operators_along
from jaxbptt.analysis.trajectory import prepare_state


def set_up(scale_weights=1.0, scale_inputs=1.0, steps=60):
    cell = bptt.elman(3, 8, dtype=jnp.float64)
    params = cell.init(jax.random.key(0))
    xs = scale_inputs * jax.random.normal(jax.random.key(1), (steps, 3), jnp.float64)
    return cell, params._replace(W_hh=scale_weights * params.W_hh), cell.initial_carry(), xs


def last(h, ys):
    return jnp.sum(h)


@pytest.mark.parametrize(
    ("scales", "cause", "words"),
    [
        (
            (0.3, 0.1),
            "weights",
            "vanishes, mainly because of its weights and gates, which shrink it even without saturation",
        ),
        ((1.0, 5.0), "saturation", "vanishes, mainly because of saturation"),
        ((1.5, 1e-15), "explosion", "explodes"),
        ((1.0, 0.01), "steady", "stays within a factor of 100"),
    ],
)
@pytest.mark.costly
def test_planted_causes(scales, cause, words):
    cell, *args = set_up(*scales)
    found = bptt.diagnose_gradient(cell, *args, last)
    assert found.cause == cause
    assert words in found.sentence
    assert found.forward is found.backward is None
    rates = found.rates
    np.testing.assert_allclose(rates.weights + rates.saturation + rates.alignment, rates.observed, atol=1e-12)
    # Of an orthogonal matrix times g all is known: with every slope at 1 the exponents are log g, and so is the bound.
    np.testing.assert_allclose(rates.weights, np.log(scales[0]), atol=1e-9)
    np.testing.assert_allclose(found.bound_rate, scales[0], rtol=1e-9)
    # What was observed, from the gradients themselves.
    flow = bptt.gradient_flow(cell, *args, last)
    first = np.linalg.norm(flow.init_gradients)
    np.testing.assert_allclose(rates.observed, np.log(first / flow.norms[-1]) / 60, rtol=1e-9, atol=1e-12)
    slopes = 1 - np.asarray(bptt.scan(cell, *args)[1]) ** 2
    assert list(found.slopes) == ["tanh 1"]
    np.testing.assert_allclose(found.slopes["tanh 1"], slopes.mean(), rtol=1e-9)
    assert found.alignment.shape == (60,)
    assert ((found.alignment >= 0) & (found.alignment <= 1 + 1e-12)).all()


def test_gradient_misaligned_with_the_leading_direction():
    """One direction is kept for ever, and the loss looks at the other."""
    W = jnp.diag(jnp.array([1.0, 0.5]))
    step = lambda W, h, x: (W @ h, None)
    found = bptt.diagnose_gradient(step, W, jnp.ones(2), None, lambda h, ys: h[1], length=40)
    assert found.cause == "alignment"
    assert "mainly because it is misaligned with the leading Lyapunov direction" in found.sentence
    np.testing.assert_allclose(found.rates.observed, np.log(0.5), rtol=1e-12)
    assert found.alignment[-1] < 1e-9
    along = bptt.diagnose_gradient(step, W, jnp.ones(2), None, lambda h, ys: h[0], length=40)
    assert along.cause == "steady"
    np.testing.assert_allclose(along.alignment[-1], 1, rtol=1e-9)


@pytest.mark.parametrize("name", ["lstm", "stack"])
@pytest.mark.costly
def test_slopes_by_gate_and_layer(name):
    """In the order of the step, from the pre-activations; the LSTM's by hand."""
    cell = make_cell(name)
    params, init, xs = problem(cell, 12)
    found = bptt.diagnose_gradient(cell, params, init, xs, lambda carry, ys: jnp.sum(ys[-1]), num_exponents=2)
    kinds = ["logistic 1", "logistic 2", "tanh 3", "logistic 4", "tanh 5"]
    if name == "stack":
        kinds += ["logistic 6", "logistic 7", "tanh 8", "tanh 9"]
    assert [kind.split()[1] for kind in found.slopes] == [str(i + 1) for i in range(len(kinds))]
    assert sorted(found.slopes) == sorted(kinds)
    assert found.exponents.shape == found.standard_errors.shape == (2,)
    if name == "stack":
        return
    forget, state = [], init
    for x in xs:
        a_f = (params.W_hh @ state.h + params.W_xh @ x + params.b)[4:8]
        forget.append(4 * jax.nn.sigmoid(a_f) * jax.nn.sigmoid(-a_f))
        state, _ = cell.step(params, state, x)
    assert any(np.isclose(slope, np.mean(forget), rtol=1e-9) for slope in found.slopes.values())


def test_slopes_that_one_minus_tanh_squared_has_lost():
    cell, params, h_0, xs = set_up(steps=5)
    found = bptt.diagnose_gradient(cell, params._replace(b=params.b + 30), h_0, xs, last)
    assert 0 < found.slopes["tanh 1"] < 1e-20
    # The gradient itself has lost them: the step computes 1 − tanh².
    assert found.cause == "no gradient"


def plant(where, cell, params, h_0, xs):
    bad = {"inf": jnp.inf, "nan": jnp.nan}
    place, kind = where
    if place == "params":
        return cell, params._replace(W_hh=params.W_hh.at[0, 1].set(bad[kind])), h_0, xs
    if place == "xs":
        return cell, params, h_0, xs.at[17, 1].set(bad[kind])
    at_17 = jnp.arange(60) == 17

    def step(params, h, inputs):
        x, here = inputs
        h, y = cell.step(params, h, x)
        return jnp.where(here, h / 0 if kind == "inf" else h * jnp.nan, h), y

    return step, params, h_0, (xs, at_17)


@pytest.mark.parametrize(
    ("where", "leaf", "index"),
    [
        (("params", "inf"), "params.W_hh", None),
        (("xs", "nan"), "xs", 17),
        (("step", "nan"), "carry", 17),
        (("step", "inf"), "carry", 17),
    ],
)
@pytest.mark.costly
def test_where_the_forward_pass_breaks(where, leaf, index):
    found = bptt.diagnose_gradient(*plant(where, *set_up()), last)
    assert found.cause == "forward"
    assert found.forward == bptt.analysis.BadEntry(leaf, index, where[1])
    assert found.sentence.startswith("The forward pass is not finite: the first " + where[1])
    assert ("time step 18 of 60" in found.sentence) == (index is not None)


def test_loss_that_breaks():
    found = bptt.diagnose_gradient(*set_up(steps=5), lambda h, ys: jnp.log(-jnp.sum(h**2)))
    assert (found.cause, found.forward) == ("forward", bptt.analysis.BadEntry("loss", None, "nan"))


@pytest.mark.slow
def test_where_the_backward_pass_breaks():
    """√ at 0 is finite, its derivative is not: in the output of step 31, in the weights of step 21."""
    cell, params, h_0, xs = set_up()
    here = jnp.where(jnp.arange(60) == 30, 0.0, 1.0)

    def through_output(params, h, inputs):
        x, scale = inputs
        h, _ = cell.step(params, h, x)
        return h, jnp.sum(jnp.sqrt(jnp.abs(scale * h)))

    found = bptt.diagnose_gradient(through_output, params, h_0, (xs, here), lambda h, ys: jnp.sum(ys))
    assert (found.cause, found.forward, found.backward.leaf, found.backward.time_index) == (
        "backward",
        None,
        "∂L/∂carry",
        30,
    )
    assert "The forward pass is finite, the backward pass is not: it starts at the end, and the first" in found.sentence
    assert "∂L/∂carry[30], at time step 31 of 60" in found.sentence

    def through_weights(params, h, inputs):
        x, scale = inputs
        cell_params, gain = params
        h, _ = cell.step(cell_params, h, x)
        return h + jnp.sqrt(gain * scale) - jnp.sqrt(scale), None

    here = jnp.where(jnp.arange(60) == 20, 0.0, 1.0)
    found = bptt.diagnose_gradient(through_weights, (params, jnp.ones(())), h_0, (xs, here), last)
    assert (found.cause, found.forward, found.backward.time_index) == ("backward", None, 20)
    assert found.backward.leaf in ("∂L/∂params[1]", "∂L/∂xs[1]")


@pytest.mark.slow
def test_underflow_is_said():
    cell, params, h_0, xs = set_up(0.01, 0.1, steps=400)
    found = bptt.diagnose_gradient(cell, params, h_0, xs, last)
    assert found.cause == "weights"
    zeros = int(np.argmax(np.asarray(bptt.gradient_flow(cell, params, h_0, xs, last).norms) > 0))
    assert zeros > 100
    assert found.sentence.endswith(f"It is exactly 0 before time step {zeros + 1}.")
    assert np.isnan(found.alignment[0])


def test_a_step_that_cuts_the_gradient():
    """A reset at step 51: before it the gradient is exactly 0, after it nothing is lost."""
    step = lambda p, h, keep: (keep * h + p, h)
    keep = jnp.ones(100).at[50].set(0)
    found = bptt.diagnose_gradient(step, 1.0, 0.0, keep, lambda h, ys: h)
    assert found.cause == "cut"
    assert found.sentence.startswith("Time step 51 of 100 passes no gradient back")
    np.testing.assert_allclose([*found.rates, np.log(found.bound_rate)], 0, atol=1e-12)


def test_compiled_once():
    """For the same functions: a training loop may ask again and again."""
    cell, params, h_0, xs = set_up(steps=6)
    traces = []

    def step(params, h, x):
        traces.append(1)
        return cell.step(params, h, x)

    first = bptt.diagnose_gradient(step, params, h_0, xs, last)
    count = len(traces)
    second = bptt.diagnose_gradient(step, params, h_0, 2 * xs, last)
    assert len(traces) == count
    assert second.rates.saturation < first.rates.saturation


def test_params_that_are_no_arrays():
    cell, params, h_0, xs = set_up(steps=6)
    step = lambda p, h, x: (p["activation"](p["cell"].W_hh @ h + p["cell"].W_xh @ x), None)
    found = bptt.diagnose_gradient(step, {"cell": params, "activation": jnp.tanh}, h_0, xs, last)
    np.testing.assert_allclose(found.rates, bptt.diagnose_gradient(cell, params, h_0, xs, last).rates, atol=1e-12)


def test_random_key_and_counter_in_the_carry():
    cell, params, h_0, xs = set_up(steps=6)

    def step(params, carry, x):
        h, key, t = carry
        h, y = cell.step(params, h, x)
        return (h, jax.random.split(key)[0], t + 1), (y, t)

    carry = h_0, jax.random.key(0), 0
    found = bptt.diagnose_gradient(step, params, carry, xs, lambda carry, ys: last(carry[0], ys[0]))
    np.testing.assert_allclose(found.rates, bptt.diagnose_gradient(cell, params, h_0, xs, last).rates, atol=1e-12)


def test_no_gradient_and_no_time_steps():
    cell, params, h_0, xs = set_up(steps=5)
    found = bptt.diagnose_gradient(cell, params, h_0, xs, lambda h, ys: 0 * jnp.sum(h))
    assert found.cause == "no gradient"
    assert "the loss does not depend on any earlier state" in found.sentence
    with pytest.raises(ValueError, match="A sequence without time steps has no gradient through time"):
        bptt.diagnose_gradient(cell, params, h_0, xs[:0], last)


def test_states_of_the_gradient_flow_are_those_of_the_step():
    """The diagnosis takes everything at the states of its one forward pass; exponents are those of `lyapunov_exponents`."""
    cell, params, h_0, xs = set_up(steps=6)
    r = prepare_state(cell, params, h_0, xs, None)
    flow, trajectory = flow_and_trajectory(r, last)
    _, hs = bptt.scan(cell, params, h_0, xs)
    np.testing.assert_allclose(trajectory.new_carries, hs, rtol=1e-12)
    np.testing.assert_allclose(trajectory.carries, jnp.concatenate([h_0[None], hs[:-1]]), rtol=1e-12)
    np.testing.assert_allclose(flow.norms, bptt.gradient_flow(cell, params, h_0, xs, last).norms, rtol=1e-12)
    spectrum = spectrum_along(operators_along(trajectory), 3)
    expected = bptt.lyapunov_exponents(cell, params, h_0, xs, num_exponents=3)
    for name, value in expected._asdict().items():
        np.testing.assert_allclose(getattr(spectrum, name), value, rtol=1e-9, err_msg=name)
