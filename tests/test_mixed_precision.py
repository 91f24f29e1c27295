"""Products of bfloat16 factors with float32 weights, carry and sums: what is rounded, and that nothing drifts."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import DIAGONAL, SEQUENTIAL, random_like

import jaxbptt as bptt

CELLS = ("elman", "gru", "lstm")


def make(name, inputs=3, hidden=8, **options):
    if name == "layer_norm":
        return bptt.lstm(inputs, hidden, layer_norm=True, **options)
    return getattr(bptt, name)(inputs, hidden, **options)


def products(jaxpr):
    """The dot_general equations of a program and of what it calls."""
    found = [eqn for eqn in jaxpr.eqns if eqn.primitive.name == "dot_general"]
    for eqn in jaxpr.eqns:
        for value in jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda v: hasattr(v, "eqns") or hasattr(v, "jaxpr")
        ):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                found += products(inner)
    return found


@pytest.mark.parametrize("name", [*CELLS, *DIAGONAL, "layer_norm"])
def test_factors_are_rounded_and_nothing_else(name):
    """Every product, forward and back, has bfloat16 factors and a float32 sum; what comes out is float32."""
    cell = make(name, compute_dtype=jnp.bfloat16)
    params, xs = cell.init(jax.random.key(0)), jnp.ones((5, 2, 3), jnp.float32)
    loss = lambda params, xs: jnp.sum(bptt.adjoint_scan(cell, params, cell.initial_carry((2,)), xs)[1] ** 2)
    program = jax.make_jaxpr(jax.value_and_grad(loss, argnums=(0, 1)))(params, xs)
    found = products(program.jaxpr)
    assert len(found) >= 5
    for eqn in found:
        assert {v.aval.dtype for v in eqn.invars} == {jnp.dtype(jnp.bfloat16)}
        assert eqn.outvars[0].aval.dtype == jnp.float32
    assert {v.aval.dtype for v in program.jaxpr.outvars} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", [*CELLS, *DIAGONAL, "layer_norm"])
@pytest.mark.costly
def test_gradients_are_those_of_float32_up_to_the_rounding(name):
    cell, full = make(name, compute_dtype=jnp.bfloat16), make(name)
    params = random_like(jax.eval_shape(full.init, jax.random.key(0)), 0, 0.5)
    xs, init = random_like(jax.ShapeDtypeStruct((12, 2, 3), jnp.float32), 1), full.initial_carry((2,))

    @jax.jit
    def gradients(params, xs):
        strategies = {name: (scan, cell) for name, scan in SEQUENTIAL.items()} | {"float32": (bptt.scan, full)}
        loss = lambda params, xs, scan, cell: jnp.mean(scan(cell, params, init, xs)[1] ** 2)
        return {name: jax.grad(loss, argnums=(0, 1))(params, xs, *pair) for name, pair in strategies.items()}

    found = gradients(params, xs)
    for strategy, gradient in found.items():
        for mine, exact in zip(jax.tree.leaves(gradient), jax.tree.leaves(found["float32"]), strict=True):
            error = np.linalg.norm(mine - exact) / np.linalg.norm(exact)
            assert error < 0.02, (strategy, error)
            assert error > 1e-4 or strategy == "float32", "rounded factors leave a trace"


@pytest.mark.parametrize("name", CELLS)
def test_the_carry_does_not_drift(name):
    """Over 10,000 steps the state stays as near to that of float32 as in the first thousand, under bfloat16's rounding."""
    mixed, full = make(name, 4, 32, compute_dtype=jnp.bfloat16), make(name, 4, 32)
    params = full.init(jax.random.key(0))
    xs = 0.5 * jax.random.normal(jax.random.key(1), (10_000, 4), jnp.float32)
    hs, exact = (bptt.scan(cell, params, cell.initial_carry(), xs)[1] for cell in (mixed, full))
    assert hs.dtype == jnp.float32
    errors = np.linalg.norm(hs - exact, axis=-1) / np.sqrt(32)
    assert 0 < errors[-1_000:].mean() < 1.2 * errors[:1_000].mean() < 2.0**-8


def test_small_increments_are_not_lost():
    """A memory that adds up 10,000 steps of 0.001: in bfloat16 it stops where 0.001 is below its resolution."""
    open_gate, steps = 30.0, 10_000

    def total(dtype, **options):
        cell = bptt.lstm(1, 1, dtype=dtype, **options)
        params = bptt.LSTMParams(
            W_xh=jnp.array([[0], [0], [1], [0]], dtype),
            W_hh=jnp.zeros((4, 1), dtype),
            b=jnp.array([open_gate, open_gate, 0, open_gate], dtype),
        )
        return float(bptt.scan(cell, params, cell.initial_carry(), jnp.full((steps, 1), 1e-3, dtype))[0].c[0])

    np.testing.assert_allclose(total(jnp.float32), 10, rtol=1e-3)
    np.testing.assert_allclose(total(jnp.float32, compute_dtype=jnp.bfloat16), 10, rtol=2.0**-9)
    assert total(jnp.bfloat16) < 1


def test_network_and_illegal_dtypes():
    cell = make("gru", compute_dtype=jnp.bfloat16)
    net = bptt.network(cell, 2, compute_dtype=jnp.bfloat16)
    params = net.init(jax.random.key(0))
    run = partial(net.apply, scan=partial(bptt.adjoint_scan, unroll=1))  # otherwise for each platform
    program = jax.make_jaxpr(run)(params, cell.initial_carry((2,)), jnp.ones((5, 2, 3), jnp.float32))
    assert len(products(program.jaxpr)) == 3
    assert all(eqn.invars[0].aval.dtype == jnp.bfloat16 for eqn in products(program.jaxpr))
    with pytest.raises(
        ValueError, match=r"compute_dtype is .*int32.*: pass a floating-point dtype, such as jnp\.bfloat16"
    ):
        make("elman", compute_dtype=jnp.int32)
