"""Principal components and the participation ratio against numpy and closed forms; departure from normality."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbptt as bptt


def states(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape) @ rng.standard_normal((shape[-1], shape[-1])) + rng.standard_normal(shape[-1])


@pytest.mark.costly
@pytest.mark.parametrize("shape", [(30, 5), (6, 4, 3), (4, 9)], ids=str)
def test_against_the_eigenvectors_of_the_covariance(shape):
    hs = states(*shape)
    found = jax.jit(bptt.principal_components)(jnp.asarray(hs))
    flat = hs.reshape(-1, shape[-1])
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    k = min(len(flat), shape[-1])
    np.testing.assert_allclose(found.explained_variance, np.maximum(values, 0)[::-1][:k], atol=1e-12)
    np.testing.assert_allclose(found.explained_variance_ratio.sum(), 1)
    real = min(k, len(flat) - 1)
    cosines = np.sum(found.components[:real] * vectors.T[::-1][:real], axis=1)
    np.testing.assert_allclose(np.abs(cosines), 1, atol=1e-9)
    largest = np.abs(found.components).argmax(axis=1)
    assert (np.asarray(found.components)[np.arange(k), largest] > 0).all()
    np.testing.assert_allclose(found.projections @ found.components + found.mean, hs, atol=1e-10)
    np.testing.assert_allclose(found.project(jnp.asarray(hs)), found.projections, atol=1e-12)
    assert f"float64[{', '.join(map(str, shape[:-1]))}, {k}]" in found._repr_html_()
    ratio = jax.jit(bptt.participation_ratio)(jnp.asarray(hs))
    np.testing.assert_allclose(ratio, values.sum() ** 2 / np.sum(values**2), rtol=1e-10)


def test_padding_does_not_count():
    hs = states(8, 3, 4)
    valid = np.arange(24).reshape(8, 3) % 3 > 0
    padded = jnp.where(valid[..., None], hs, jnp.nan)
    components, ratio = (
        jax.jit(lambda hs, valid=None: bptt.principal_components(hs, valid=valid, num_components=2)),
        jax.jit(lambda hs, valid=None: bptt.participation_ratio(hs, valid=valid)),
    )
    found, alone = components(padded, valid), components(jnp.asarray(hs[valid]))
    for name in ("components", "explained_variance", "explained_variance_ratio", "mean"):
        np.testing.assert_allclose(getattr(found, name), getattr(alone, name), atol=1e-12, err_msg=name)
    np.testing.assert_allclose(np.asarray(found.projections)[valid], alone.projections, atol=1e-12)
    np.testing.assert_allclose(ratio(padded, valid), ratio(jnp.asarray(hs[valid])))


def test_leaves_of_a_carry_are_put_together():
    hs = jnp.asarray(states(9, 5))
    carry = {"h": hs[:, :2], "n": jnp.arange(9), "z": hs[:, 2:]}
    of = jax.jit(lambda states: bptt.principal_components(states).components)
    np.testing.assert_allclose(of(carry), of(hs))


def test_participation_ratio_of_equal_variances_and_of_small_numbers():
    corners = np.concatenate([np.eye(6), -np.eye(6)])
    line = np.linspace(0, 1, 12)[:, None] * np.ones(6)
    # The mean of twelve numbers 0.3 is not 0.3.
    cases = np.stack([corners, corners * 1e-120, line, np.full((12, 6), 0.3)])
    ratios = jax.jit(jax.vmap(bptt.participation_ratio))(jnp.asarray(cases))
    np.testing.assert_allclose(ratios, [6, 6, 1, np.nan])
    valid = np.arange(12) > 0
    assert np.isnan(bptt.participation_ratio(jnp.full((12, 6), 0.3).at[0].set(jnp.inf), valid=valid))


def test_gradient_of_the_participation_ratio():
    hs, direction = jnp.asarray(states(7, 3)), states(7, 3, seed=1)
    ratio = jax.jit(jax.value_and_grad(bptt.participation_ratio))
    along = np.vdot(ratio(hs)[1], direction)
    difference = ratio(hs + 1e-6 * direction)[0] - ratio(hs - 1e-6 * direction)[0]
    np.testing.assert_allclose(along, difference / 2e-6, rtol=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e200])
def test_normal_matrices(scale):
    rng = np.random.default_rng(0)
    A = rng.standard_normal((6, 6))
    orthogonal = np.linalg.qr(A)[0]
    circulant = np.stack([np.roll(A[0], i) for i in range(6)])
    matrices = np.stack([A + A.T, A - A.T, orthogonal, circulant, np.eye(6), 0 * A]) * scale
    absolute, relative = jax.jit(bptt.departure_from_normality)(jnp.asarray(matrices))
    np.testing.assert_allclose(relative, 0, atol=1e-14)
    np.testing.assert_allclose(absolute / scale, 0, atol=1e-13)


def test_departure_by_hand_and_by_eigenvalues():
    """[[a, b], [0, d]] departs by |b|; and any matrix by what its eigenvalues leave of its norm."""
    A = np.array([[2.0, 3.0], [0.0, -1.0]])
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((2, 2)))[0]
    found = bptt.departure_from_normality(jnp.asarray(turn @ A @ turn.T))
    np.testing.assert_allclose(found, [3, 3 / np.sqrt(14)], rtol=1e-12)
    matrices = np.random.default_rng(1).standard_normal((2, 3, 5, 5))
    squares = np.sum(matrices**2, axis=(2, 3)) - np.sum(np.abs(np.linalg.eigvals(matrices)) ** 2, axis=2)
    found = bptt.departure_from_normality(jnp.asarray(matrices))
    np.testing.assert_allclose(found.absolute, np.sqrt(squares), rtol=1e-9)
    assert found.relative.shape == (2, 3)
    np.testing.assert_allclose(bptt.departure_from_normality(jnp.asarray([[0.0, 1e-9], [0.0, 0.5]])).absolute, 1e-9)


def test_wrong_arguments():
    three = jax.jit(bptt.principal_components)(jnp.asarray(states(5, 3)))
    cases = {
        r"states has shape \(3,\), but \[\*states, n\]": lambda: bptt.principal_components(jnp.ones(3)),
        r"states\['b'\] has shape \(4, 2\), but the first leaf": lambda: bptt.participation_ratio(
            {"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))}
        ),
        "states hold 1 state, but a variance takes two": lambda: bptt.principal_components(jnp.ones((1, 3))),
        "num_components is 4, but 9 states of 3 numbers have 1 to 3": lambda: bptt.principal_components(
            jnp.ones((9, 3)), num_components=4
        ),
        r"valid is bool\[3\], but the states are \[4\]": lambda: bptt.participation_ratio(
            jnp.ones((4, 2)), valid=jnp.ones(3, bool)
        ),
        "The states have 2 numbers, but the components are of 3": lambda: three.project(jnp.ones((4, 2))),
        r"A has shape \(2, 3\), but square matrices": lambda: bptt.departure_from_normality(jnp.ones((2, 3))),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message):
            call()
