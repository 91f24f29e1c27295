"""The third road: Jacobians by forward mode, their products at any length, and the gradient put together from them."""

import inspect
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from reference import CELLS, assert_close, make_cell, problem, python_loop

import jaxbptt as bptt
from jaxbptt.analysis import jacobians


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.costly
def test_state_jacobians_are_those_of_each_step(name):
    cell = make_cell(name)
    params, carry, xs = problem(cell, 4)
    carries, J = jax.jit(lambda *args: bptt.state_jacobians(cell, *args))(params, carry, xs)

    @jax.jit
    def step_and_jacobian(carry, x):
        vector, unflatten = ravel_pytree(carry)
        jacobian = jax.jacrev(lambda v: ravel_pytree(cell.step(params, unflatten(v), x)[0])[0])(vector)
        return cell.step(params, carry, x)[0], jacobian

    for t in range(4):
        carry, expected = step_and_jacobian(carry, xs[t])
        np.testing.assert_allclose(J[t], expected, atol=1e-14)
        assert_close(jax.tree.map(lambda leaf, t=t: leaf[t], carries), carry)


def test_elman_closed_form():
    cell = make_cell("elman")
    params, h_0, xs = problem(cell, 20)
    hs, J = bptt.state_jacobians(cell, params, h_0, xs)
    expected = np.stack([np.diag(1 - h**2) @ params.W_hh for h in np.asarray(hs)])
    assert_close(bptt.elman_state_jacobians(params, hs), expected)
    assert_close(J, expected)


def test_state_without_derivative_is_carried_along():
    def step(p, carry, x):
        h, count = carry
        return (p * h * count.astype(h.dtype), count + 1), None

    carries, J = bptt.state_jacobians(step, 2.0, (jnp.ones(1), jnp.array(1)), length=3)
    np.testing.assert_allclose(J[:, 0, 0], [2, 4, 6])
    assert carries[1].tolist() == [2, 3, 4]


def test_jacobians_a_few_steps_at_a_time(monkeypatch):
    """The same Jacobians and the same derivative, also where the steps are no multiple."""
    cell = make_cell("gru")
    args = problem(cell, 11)
    squares = lambda *args: (lambda J: (jnp.sum(jnp.sin(J)), J))(bptt.state_jacobians(cell, *args)[1])
    differentiated = lambda: jax.jit(jax.value_and_grad(squares, argnums=(0, 1, 2), has_aux=True))(*args)
    expected = differentiated()
    monkeypatch.setattr(jacobians, "_AT_ONCE", 4 * 4**2)
    assert "dynamic_update_slice" in str(jax.make_jaxpr(squares)(*args))
    assert_close(differentiated(), expected)


def test_normalised_states_at_many_steps_at_once():
    """In float32 as in float64: what compilers make of a batch of such Jacobians has been wrong."""
    cell = bptt.lstm(3, 24, layer_norm=True)
    xs = jax.random.normal(jax.random.key(1), (128, 3), jnp.float32)
    args = cell.init(jax.random.key(0)), cell.initial_carry(), xs
    jacobians_of = jax.jit(lambda *args: bptt.state_jacobians(cell, *args)[1])
    expected = jacobians_of(*jax.tree.map(lambda leaf: leaf.astype(float), args))
    np.testing.assert_allclose(jacobians_of(*args), expected, rtol=1e-3, atol=1e-2)


def test_memory_is_that_of_the_jacobians():
    """T n² numbers, and a tenth of that beyond them, as the docstring says."""
    cell, steps = bptt.lstm(3, 64, dtype=jnp.float32), 701
    shapes = jax.eval_shape(cell.init, jax.random.key(0)), jax.eval_shape(cell.initial_carry)
    xs = jax.ShapeDtypeStruct((steps, 3), jnp.float32)
    compiled = jax.jit(lambda *args: bptt.state_jacobians(cell, *args)).lower(*shapes, xs).compile()
    memory = compiled.memory_analysis()
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes < 1.5 * 4 * steps * 128**2


def test_products_of_jacobians_that_do_not_commute():
    J = jax.random.normal(jax.random.key(0), (5, 3, 3))
    products = bptt.jacobian_products(J)
    unscaled = products.matrices * jnp.exp(products.log_scales)[:, None, None]
    for t in range(5):
        expected = np.eye(3)
        for k in range(t + 1, 5):
            expected = J[k] @ expected
        np.testing.assert_allclose(unscaled[t], expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(jnp.linalg.norm(products.matrices, axis=(1, 2)), 1)


def test_products_are_dh_T_dh_t():
    """Against the derivative of the rest of the sequence, started from hₜ."""
    cell = make_cell("gru")
    params, h_0, xs = problem(cell, 6)
    hs, J = bptt.state_jacobians(cell, params, h_0, xs)
    products = bptt.jacobian_products(J)
    for t in range(5):
        rest = jax.jacrev(lambda h, t=t: python_loop(cell, params, h, xs[t + 1 :])[0])(hs[t])
        np.testing.assert_allclose(products.matrices[t] * np.exp(products.log_scales[t]), rest, rtol=1e-10, atol=1e-14)
    whole = jax.jacrev(lambda h: python_loop(cell, params, h, xs)[0])(h_0)
    np.testing.assert_allclose(
        products.matrices[0] * np.exp(products.log_scales[0]) @ J[0], whole, rtol=1e-10, atol=1e-14
    )


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0, 1e-30, 1e30])
def test_ten_thousand_steps(scale, dtype):
    """A rotation times a factor: every product is known, and its size is far outside the range of floats."""
    angle = 0.01
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    J = jnp.tile(jnp.asarray(scale * rotation, dtype), (10_000, 1, 1))
    matrices, log_scales = bptt.jacobian_products(J)
    assert np.isfinite(matrices).all()
    assert np.isfinite(log_scales).all()
    steps = np.arange(9_999, -1, -1)
    factor = float(jnp.asarray(scale, dtype))
    eps = float(jnp.finfo(dtype).eps)
    expected = steps * np.log(factor) + np.log(2) / 2
    np.testing.assert_allclose(log_scales, expected, rtol=30 * eps, atol=10_000 * eps)
    turned = angle * steps[0]
    np.testing.assert_allclose(
        np.asarray(matrices[0]) * np.sqrt(2),
        [[np.cos(turned), -np.sin(turned)], [np.sin(turned), np.cos(turned)]],
        atol=10_000 * eps,
    )


def test_zero_jacobian_gives_zero_and_no_nan():
    J = jnp.ones((4, 2, 2)).at[2].set(0)
    matrices, log_scales = bptt.jacobian_products(J)
    assert not matrices[:2].any()
    assert np.isfinite(log_scales).all()
    values = bptt.product_log_singular_values(bptt.analysis.ScaledProducts(matrices, log_scales))
    assert np.all(values.log_values[0] == -np.inf)
    assert not values.resolved[0].any()


def test_singular_values_of_a_linear_network_are_powers():
    W = jnp.diag(jnp.array([1.1, 0.9, 0.5]))
    J = jnp.tile(W, (60, 1, 1))
    values, resolved = bptt.product_log_singular_values(bptt.jacobian_products(J))
    lags = np.arange(59, -1, -1)[:, None]
    expected = lags * np.log([1.1, 0.9, 0.5])
    np.testing.assert_allclose(np.where(resolved, values, expected), expected, rtol=1e-2, atol=1e-9)
    assert resolved[:, 0].all()
    # 0.5/1.1 falls under eps of the largest after 45 steps or so: below that the value is noise, and said to be.
    assert not resolved[0, 2]
    assert resolved[30, 2]


def test_a_value_once_lost_stays_lost():
    """A direction that vanishes under rounding and grows back: its noise grows with it, and must not pass for a value."""
    rng = np.random.default_rng(0)
    Q = np.linalg.qr(rng.standard_normal((2, 2)))[0]
    shrink, grow = Q @ np.diag([1, 0.01]) @ Q.T, Q @ np.diag([1, 100]) @ Q.T
    J = np.concatenate([np.tile(grow, (12, 1, 1)), np.tile(shrink, (13, 1, 1))])
    values, resolved = bptt.product_log_singular_values(bptt.jacobian_products(J))
    assert abs(values[0, 1] - math.log(0.01**2)) > 1
    assert not resolved[0, 1]
    assert resolved[20, 1]


def test_wrong_shape():
    with pytest.raises(ValueError, match=r"J has shape \(5, 3, 2\), but \[time, n, n\] is expected"):
        inspect.unwrap(bptt.jacobian_products)(jnp.ones((5, 3, 2)))


LOSSES = {
    "every step": lambda carry, ys: jnp.sum(jnp.sin(ys)),
    "last step": lambda carry, ys: jnp.sum(jnp.sin(ys[-1])),
    "last carry": lambda carry, ys: sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(carry)),
    "both": lambda carry, ys: jnp.sum(ys**2) + sum(jnp.sum(leaf**3) for leaf in jax.tree.leaves(carry)),
}


@pytest.mark.parametrize(
    ("name", "loss"), [(n, loss) for n in CELLS for k, loss in LOSSES.items() if n in ("elman", "lstm") or k == "both"]
)
@pytest.mark.costly
def test_temporal_contributions_sum_to_the_gradient(name, loss):
    cell = make_cell(name)
    args = problem(cell, 6)
    terms = jax.jit(lambda *args: bptt.temporal_contributions(cell, *args, loss))(*args)
    expected = jax.jit(jax.grad(lambda params: loss(*python_loop(cell, params, *args[1:]))))(args[0])
    assert_close(jax.tree.map(lambda leaf: leaf.sum(axis=0), terms.contributions), expected)


def test_temporal_contributions_are_the_formula():
    """For a loss at T each term is dL_T/dh_T · ∂h_T/∂hₜ · ∂⁺hₜ/∂W, with the products of `jacobian_products`."""
    cell = make_cell("elman")
    params, h_0, xs = problem(cell, 5)
    loss = lambda h, ys: jnp.sum(jnp.sin(h))
    hs, J = bptt.state_jacobians(cell, params, h_0, xs)
    products = bptt.jacobian_products(J)
    terms = bptt.temporal_contributions(cell, params, h_0, xs, loss)
    for t, before in enumerate([h_0, *hs[:-1]]):
        row = jnp.cos(hs[-1]) @ products.matrices[t] * jnp.exp(products.log_scales[t])
        np.testing.assert_allclose(terms.adjoints[t], row, rtol=1e-10)
        immediate = jax.jacrev(lambda W, h=before, t=t: cell.step(params._replace(W_hh=W), h, xs[t])[0])(params.W_hh)
        np.testing.assert_allclose(terms.contributions.W_hh[t], jnp.einsum("i,ijk->jk", row, immediate), rtol=1e-10)


def test_output_read_from_the_state_before():
    """An output may depend on hₜ₋₁ past hₜ; integers among the parameters have no derivative."""

    def step(params, h, x):
        return jnp.tanh(params["w"] * h + x), h * params["n"].astype(h.dtype)

    params, xs = {"w": jnp.array(0.7), "n": jnp.array(3)}, jnp.arange(1.0, 5.0)
    h_0 = jnp.array(0.2)
    loss = lambda h, ys: jnp.sum(jnp.sin(ys)) + h
    terms = bptt.temporal_contributions(step, params, h_0, xs, loss)
    expected = jax.grad(lambda w: loss(*python_loop(step, params | {"w": w}, h_0, xs)))(params["w"])
    assert terms.contributions["n"] is None
    np.testing.assert_allclose(terms.contributions["w"].sum(), expected, rtol=1e-12)
