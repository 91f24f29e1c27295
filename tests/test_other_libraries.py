"""Cells of Flax and Equinox, wrapped as a step, work in every strategy and in the analysis."""

from functools import partial
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from flax.nnx.transforms import iteration
from reference import EXACT, assert_close

import jaxbptt as bptt

strategies = pytest.mark.parametrize("strategy", EXACT.values(), ids=EXACT)


def nnx_lstm():
    cell = nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64, dtype=jnp.float64)
    graph, state = nnx.split(cell)

    def step(state, carry, x):
        return nnx.merge(graph, state)(carry, x)

    return step, state, (jnp.ones(4), jnp.ones(4))


def nnx_gru():
    cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64, dtype=jnp.float64)
    graph, state = nnx.split(cell)
    return lambda state, carry, x: nnx.merge(graph, state)(carry, x), state, jnp.ones(4)


def equinox_gru():
    cell = eqx.nn.GRUCell(3, 4, key=jax.random.key(0), dtype=jnp.float64)

    def step(cell, h, x):
        h = cell(x, h)
        return h, h

    return step, cell, jnp.ones(4)


def equinox_with_functions():
    """A model with functions among its leaves, as most Equinox models have."""
    model = eqx.nn.MLP(7, 4, 8, 2, key=jax.random.key(0), dtype=jnp.float64)

    def step(model, h, x):
        h = model(jnp.concatenate([h, x]))
        return h, h

    return step, model, jnp.ones(4)


@pytest.mark.parametrize("make", [nnx_lstm, nnx_gru, equinox_gru, equinox_with_functions])
@pytest.mark.costly
def test_step_of_another_library(make):
    step, params, init = make()
    xs = jax.random.normal(jax.random.key(1), (6, 3))

    @eqx.filter_jit
    def every_way(params):
        plain = lambda step, params, init, xs: jax.lax.scan(partial(step, params), init, xs)
        return {
            name: eqx.filter_value_and_grad(lambda params, scan=scan: jnp.sum(scan(step, params, init, xs)[1] ** 2))(
                params
            )
            for name, scan in {"lax.scan": plain, **EXACT}.items()
        }

    expected, *others = every_way(params).values()
    for mine in others:
        assert_close(mine, expected)


@strategies
@pytest.mark.costly
def test_flax_scan_runs_on_a_strategy(monkeypatch, strategy):
    """`nnx.RNN`, and any `nnx.scan`, pass a carry of queues that the step empties and fills again."""
    rnn = nnx.RNN(nnx.SimpleCell(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64, dtype=jnp.float64))
    x = jax.random.normal(jax.random.key(1), (2, 5, 3))
    value_and_gradient = nnx.value_and_grad(lambda rnn: jnp.sum(rnn(x) ** 2))
    expected = value_and_gradient(rnn)
    calls = []

    def scan(f, init, xs, *, reverse, _split_transpose, **options):
        calls.append(f)
        return strategy(lambda _, carry, x: f(carry, x), None, init, xs, **options)

    lax = SimpleNamespace(**vars(jax.lax) | {"scan": scan})
    monkeypatch.setattr(iteration, "jax", SimpleNamespace(**vars(jax) | {"lax": lax}))
    assert_close(value_and_gradient(rnn), expected)
    assert len(calls) == 1


def test_analysis_of_another_library():
    step, params, init = nnx_lstm()
    xs = jax.random.normal(jax.random.key(1), (6, 3))
    flow = bptt.gradient_flow(step, params, init, xs, lambda carry, ys: jnp.sum(ys[-1]))
    expected = jax.grad(lambda params: jnp.sum(bptt.scan(step, params, init, xs)[1][-1]))(params)
    assert_close(flow.param_gradients, expected)
    assert flow.norms.shape == (6,)
    assert bptt.state_jacobians(step, params, init, xs)[1].shape == (6, 8, 8)


def test_equals_flax_lstm():
    """Flax orders the gates i, f, g, o as well: the same weights give the same numbers."""
    step, state, _ = nnx_lstm()
    dense_i, dense_h = state["dense_i"], state["dense_h"]
    params = bptt.LSTMParams(dense_i["kernel"][...].T, dense_h["kernel"][...].T, dense_h["bias"][...])
    carry, xs = (jnp.full(4, 0.3), jnp.full(4, 0.2)), jax.random.normal(jax.random.key(1), (6, 3))
    _, theirs = bptt.scan(step, state, carry, xs)
    cell = bptt.lstm(3, 4, dtype=jnp.float64)
    # Flax's carry is (c, h).
    _, ours = bptt.scan(cell, params, bptt.LSTMState(h=carry[1], c=carry[0]), xs)
    assert_close(ours, theirs)
