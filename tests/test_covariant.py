"""Covariant Lyapunov vectors: eigenvectors, the Hénon map, and networks, whose Jacobians carry them into each other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import make_cell, problem

import jaxbptt as bptt


def linear(W, h, x):
    return W @ h, None


def henon(p, c, x):
    return (1 - p[0] * c[0] ** 2 + c[1], p[1] * c[0]), None


def parallel(a, b, tolerance):
    """Columns that point the same way, or the opposite one."""
    np.testing.assert_allclose(np.abs(np.sum(a * b, axis=-2)), 1, atol=tolerance)
    sign = np.sign(np.sum(a * b, axis=-2, keepdims=True))
    np.testing.assert_allclose(a, sign * b, atol=tolerance)


@pytest.mark.costly
@pytest.mark.parametrize("options", [{}, {"num_vectors": 3}, {"num_unstable": 2}], ids=str)
def test_constant_jacobian(options):
    """The eigenvectors, far from orthogonal, and the angle between the two subspaces they span."""
    rng = np.random.default_rng(0)
    values, vectors = np.array([1.7, 1.1, -0.8, 0.4]), rng.standard_normal((4, 4))
    vectors /= np.linalg.norm(vectors, axis=0)
    W = vectors @ np.diag(values) @ np.linalg.inv(vectors)
    run = lambda W: bptt.covariant_lyapunov_vectors(
        linear, W, jnp.ones(4), length=300, burn_in=200, burn_out=90, **options
    )
    clv = jax.jit(run)(jnp.asarray(W))
    k = options.get("num_vectors", 4)
    parallel(clv.vectors, vectors[:, :k], 1e-9)
    np.testing.assert_allclose(clv.growth_rates, np.tile(np.log(np.abs(values[:k])), (10, 1)), atol=1e-9)
    np.testing.assert_allclose(clv.exponents, np.log(np.abs(values[:k])), atol=1e-9)
    assert clv.resolved.all()
    j = 2
    assert clv.num_unstable == j
    assert "Unstable vectors: 2." in clv._repr_html_()
    assert "0.5306" in clv._repr_html_()
    unstable, stable = (np.linalg.qr(V)[0] for V in (vectors[:, :j], vectors[:, j:k]))
    cosine = np.linalg.svd(unstable.T @ stable, compute_uv=False)[0]
    np.testing.assert_allclose(clv.angles, np.arccos(cosine), rtol=1e-9)


def test_henon_map():
    """Carried along to 1e-8; their mean growth is the Lyapunov exponents, and each of a point's pair has an angle of its own."""
    options = {"length": 12_000, "burn_in": 1_000}
    clv = jax.jit(lambda init: bptt.covariant_lyapunov_vectors(henon, (1.4, 0.3), init, burn_out=1_000, **options))(
        (0.1, 0.1)
    )
    x = np.asarray(clv.states[:, 0])
    J = np.stack([np.stack([-2.8 * x, np.ones_like(x)], -1), np.stack([0.3 + 0 * x, 0 * x], -1)], -2)
    pushed = J[:-1] @ clv.vectors[:-1]
    sizes = np.linalg.norm(pushed, axis=1)
    np.testing.assert_allclose(pushed / sizes[:, None], clv.vectors[1:], atol=1e-8)
    np.testing.assert_allclose(clv.growth_rates[1:], np.log(sizes), atol=1e-8)
    np.testing.assert_allclose(clv.exponents, [0.419, -1.623], atol=0.02)
    spectrum = jax.jit(lambda init: bptt.lyapunov_exponents(henon, (1.4, 0.3), init, **options))((0.1, 0.1))
    np.testing.assert_allclose(clv.exponents, spectrum.exponents, atol=0.01)
    between = np.abs(np.sum(clv.vectors[..., 0] * clv.vectors[..., 1], axis=1))
    np.testing.assert_allclose(np.cos(clv.angles), between, atol=1e-12)
    assert clv.angles.min() < 0.01  # tangencies: the map is not hyperbolic
    assert clv.resolved.all()


@pytest.mark.parametrize("name", ["elman", "lstm"])
@pytest.mark.costly
def test_networks(name):
    """Covariant along a driven network, in the state vector of any carry."""
    cell = make_cell(name)
    args = problem(cell, 400)
    run = jax.jit(
        lambda *args: bptt.covariant_lyapunov_vectors(
            cell, *args, num_vectors=2, burn_in=100, burn_out=200, time_step=0.5
        )
    )
    clv = run(*args)
    carries, J = bptt.state_jacobians(cell, *args)
    window = slice(100, 200)
    flat = np.concatenate([leaf.reshape(400, -1) for leaf in jax.tree.leaves(carries)], axis=1)
    np.testing.assert_allclose(clv.states, flat[window], atol=1e-12)
    pushed = J[window][1:] @ clv.vectors[:-1]
    sizes = np.linalg.norm(pushed, axis=1)
    np.testing.assert_allclose(pushed / sizes[:, None], clv.vectors[1:], atol=1e-8)
    np.testing.assert_allclose(clv.growth_rates[1:] * 0.5, np.log(sizes), atol=1e-8)
    # All is stable: there is no angle.
    assert clv.num_unstable == 0
    assert np.isnan(clv.angles).all()


def test_vectors_that_had_no_time_to_settle_are_not_resolved():
    W = jnp.array([[1.1, 1.0], [0.0, 1.0]])

    def resolved(burn_out):
        return jax.jit(
            lambda W: bptt.covariant_lyapunov_vectors(
                linear, W, jnp.ones(2), length=600, burn_in=399, burn_out=burn_out
            )
        )(W).resolved

    assert resolved(5).tolist() == [True, False]
    assert resolved(200).tolist() == [True, True]


def test_direction_that_a_step_takes_to_zero_is_not_resolved():
    clv = jax.jit(
        lambda W: bptt.covariant_lyapunov_vectors(linear, W, jnp.ones(2), length=30, burn_in=10, burn_out=10)
    )(jnp.diag(jnp.array([0.5, 0.0])))
    assert clv.resolved.tolist() == [True, False]
    np.testing.assert_allclose(clv.exponents[0], -np.log(2), atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_vectors": 4}, "num_vectors is 4, but a state of 3 numbers has 1 to 3 vectors"),
        ({"burn_in": 5}, "burn_in is 5, but of 5 time steps at least one has to be left"),
        ({"burn_in": 2, "burn_out": 3}, "burn_out is 3, but of 5 time steps at least one has to be left after burn_in"),
        ({"num_unstable": 4}, "num_unstable is 4, but of 3 vectors"),
        ({"time_step": 0}, "time_step is 0, but it is the time that a step stands for"),
        ({"length": 0}, "A sequence without time steps has no vectors"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        bptt.covariant_lyapunov_vectors(linear, jnp.eye(3), jnp.ones(3), **({"length": 5} | options))
