"""Fixed points: closed forms, a grid search, and the Jacobians at them; slow points where the flow is known."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import make_cell, problem

import jaxbptt as bptt
from jaxbptt import words


def tanh_network(p, h, x):
    W, b = p
    return jnp.tanh(W @ h + b), None


def ring(omega, h, x):
    """The distance from the circle shrinks; along it the state turns by omega a step."""
    turn = jnp.array([[jnp.cos(omega), -jnp.sin(omega)], [jnp.sin(omega), jnp.cos(omega)]])
    return turn @ (h + 0.3 * h * (1 - h @ h)), None


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def test_bistable_unit():
    """h = tanh(w h) with w = 1.5: 0, where the slope is w, and ±h*, where it is w (1 − h*²)."""
    unit = lambda w, h, x: (jnp.tanh(w * h), None)
    found = bptt.fixed_points(unit, 1.5, None, jnp.linspace(-2, 2, 9))
    h = 1.0
    for _ in range(200):
        h = np.tanh(1.5 * h)
    np.testing.assert_allclose(found.points, [-h, 0, h], atol=1e-14)
    np.testing.assert_allclose(found.eigenvalues[:, 0], [1.5 * (1 - h**2), 1.5, 1.5 * (1 - h**2)], rtol=1e-12)
    assert found.fixed.all()
    assert (found.residual_norms < 1e-12).all()
    np.testing.assert_allclose(found.speeds, found.residual_norms**2 / 2)
    assert found.num_unstable.tolist() == [0, 1, 0]
    assert found.stable.tolist() == [True, False, True]
    assert np.asarray(found.found_from)[[0, 4, 8]].tolist() == [0, 1, 2]
    table = str(found).splitlines()
    assert table[2].split() == [
        "1",
        "fixed",
        *table[2].split()[2:3],
        "1.5",
        "1",
        "0",
        str(np.sum(found.found_from == 1)),
    ]
    assert table[-1] == "0 guesses led to no point."
    assert "<td style='text-align: right'>1.5</td>" in found._repr_html_()


def grid_search(F, reach, size=60):
    """Every cell of a grid in which the speed is at a minimum, searched on finer and finer grids around it."""

    def speeds(centre, reach):
        axes = [np.linspace(c - reach, c + reach, size + 1) for c in centre]
        grid = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1)
        return grid, np.linalg.norm(F(grid) - grid, axis=-1)

    grid, q = speeds((0, 0), reach)
    around = np.pad(q, 1, constant_values=np.inf)
    shifted = [around[i : i + size + 1, j : j + size + 1] for i in range(3) for j in range(3)]
    found = []
    for centre in grid[(q <= np.min(shifted, axis=0))]:
        width = 4 * reach / size
        while width > 1e-13:
            fine, q = speeds(centre, width)
            centre, least = fine[np.unravel_index(q.argmin(), q.shape)], q.min()
            width *= 0.1
        if least < 1e-10:
            found.append(centre)
    return np.array(found)


def in_order(points):
    return np.asarray(points)[np.lexsort(np.round(points, 6).T)]


@pytest.mark.costly
@pytest.mark.parametrize("case", [(3.0, -0.3, -0.5, 2.5, 0.0, 0.0, 9), (2.0, -1.0, 1.0, 2.0, 0.1, -0.2, None)], ids=str)
def test_two_units_against_a_grid_search(case):
    """Nine points where the units are bistable and nearly independent; a focus where they turn each other."""
    a, b, c, d, *bias, count = case
    W, bias = np.array([[a, b], [c, d]]), np.array(bias)
    expected = grid_search(lambda h: np.tanh(h @ W.T + bias), 1.05)
    found = bptt.fixed_points(tanh_network, (jnp.asarray(W), jnp.asarray(bias)), None, 2 * normal(80, 2))
    assert count in (None, len(expected))
    points = found.states[found.fixed]
    assert len(points) == len(expected)
    np.testing.assert_allclose(in_order(points), in_order(expected), atol=1e-9)
    assert (found.residual_norms[found.fixed] < 1e-12).all()
    slopes = 1 - np.asarray(points) ** 2
    for point, slope, values in zip(points, slopes, found.eigenvalues[found.fixed], strict=True):
        expected = np.linalg.eigvals(slope[:, None] * W)
        np.testing.assert_allclose(np.sort(values), np.sort(expected), rtol=1e-9, err_msg=str(point))


@pytest.mark.slow
def test_ring_of_fixed_points():
    """Every point of the circle is fixed: none is merged with a distant one, and along the circle μ = 1."""
    found = bptt.fixed_points(ring, 0.0, None, normal(40, 2))
    on_ring = np.linalg.norm(found.states, axis=1) > 0.5
    np.testing.assert_allclose(np.linalg.norm(found.states[on_ring], axis=1), 1, atol=1e-12)
    angles = np.sort(np.arctan2(*found.states[on_ring].T))
    assert len(angles) > 30
    assert np.diff(angles, append=angles[0] + 2 * np.pi).max() < 1.0
    assert found.num_marginal.tolist() == on_ring.astype(int).tolist()
    assert found.num_unstable.tolist() == (2 * ~on_ring).tolist()
    np.testing.assert_allclose(found.eigenvalues[on_ring], [[1, 0.4]] * on_ring.sum(), atol=1e-9)
    # Turning, and with what is slow defined more strictly, nothing of it is left.
    assert bptt.fixed_points(ring, 0.01, None, normal(40, 2), slow=1e-3).fixed.tolist() == [True]


def test_ring_of_slow_points():
    """Turning by ω a step, the circle is no longer fixed: the speed along it is ½(2 sin ω/2)², and 0 in the middle alone."""
    guesses = jnp.concatenate([jnp.array([[1.0, 0.0]]), normal(40, 2)])
    found = bptt.fixed_points(ring, 0.01, None, guesses, distance=0.1)
    assert found.found_from[0] > 0  # the first guess leads to a slow point, which comes after the fixed one
    assert found.fixed.sum() == 1
    slow = ~np.asarray(found.fixed)
    assert (np.diff(found.fixed.astype(int)) <= 0).all()
    assert slow.sum() > 8
    np.testing.assert_allclose(np.linalg.norm(found.states[slow], axis=1), 1, atol=1e-3)
    np.testing.assert_allclose(found.speeds[slow], (2 * np.sin(0.005)) ** 2 / 2, rtol=1e-3)


def test_linear_ring_attractor():
    """Cosine weights around a ring of units: a bump of activity stays where it is put, since h = P h for a projection P."""
    angles = 2 * np.pi * np.arange(12) / 12
    W = 2 / 12 * np.cos(angles[:, None] - angles)
    positions = 2 * np.pi * np.arange(8) / 8
    bumps = np.cos(angles - positions[:, None])
    found = bptt.fixed_points(lambda W, h, x: (W @ h, None), jnp.asarray(W), None, bumps + 0.1 * normal(8, 12))
    assert found.found_from.tolist() == [*range(8)]
    assert (found.residual_norms < 1e-12).all()
    np.testing.assert_allclose(found.states, (bumps + 0.1 * normal(8, 12)) @ W, atol=1e-9)
    assert found.num_marginal.tolist() == [2] * 8


def threshold_linear(p, h, x):
    W, drive = p
    return 0.5 * h + 0.5 * jax.nn.relu(W @ h + drive), None


@pytest.mark.slow
def test_threshold_linear_ring_attractor():
    """Ben-Yishai's ring of N units: bumps of one height at every angle, which a ring of many units nearly holds still."""
    n = 64
    angles = 2 * np.pi * np.arange(n) / n
    W = (-4 + 6 * np.cos(angles[:, None] - angles)) / n
    guesses = jnp.asarray(np.maximum(np.cos(angles - np.linspace(0, 2 * np.pi, 30)[:-1, None]), 0))
    found = bptt.fixed_points(threshold_linear, (jnp.asarray(W), 1.0), None, guesses)
    bumps = np.asarray(found.states) @ np.exp(1j * angles)
    np.testing.assert_allclose(np.abs(bumps), np.abs(bumps).mean(), rtol=0.01)
    assert len(bumps) > 20
    assert np.diff(np.sort(np.angle(bumps))).max() < 0.4
    assert (abs(found.eigenvalues[:, 0] - 1) < 0.03).all()
    assert (abs(found.eigenvalues[:, 1]) < 0.9).all()


@pytest.mark.parametrize("name", ["gru", "lstm"])
@pytest.mark.costly
def test_cells_with_their_input_held(name):
    cell = make_cell(name)
    params, init, xs = problem(cell, 30)
    x = xs[0]
    guesses = jax.tree.map(lambda leaf: normal(5, *leaf.shape), init)
    found = bptt.fixed_points(cell, params, x, guesses)
    assert found.fixed[0]
    assert jax.tree.structure(found.points) == jax.tree.structure(init)
    point = jax.tree.map(lambda leaf: leaf[0], found.points)
    after, J = bptt.state_jacobians(cell, params, point, x[None])
    for leaf, same in zip(jax.tree.leaves(after), jax.tree.leaves(point), strict=True):
        np.testing.assert_allclose(leaf[0], same, atol=1e-12)
    np.testing.assert_allclose(found.jacobians[0], J[0], atol=1e-12)
    expected = np.linalg.eigvals(J[0])
    np.testing.assert_allclose(np.abs(found.eigenvalues[0]), np.sort(np.abs(expected))[::-1], atol=1e-9)


def test_guesses_that_lead_nowhere():
    """h → h + 1 has no fixed point; and searches that meet nan end nowhere."""
    shift = bptt.fixed_points(lambda _, h, x: (h + x, None), None, 1.0, normal(3, 2))
    assert shift.found_from.tolist() == [-1, -1, -1]
    assert shift.states.shape == (0, 2)
    assert shift.eigenvalues.shape == (0, 2)
    assert "3 guesses led to no point" in str(shift)
    guesses = jnp.array([jnp.nan, 4.0])
    root = bptt.fixed_points(lambda _, h, x: (jnp.sqrt(h), None), None, None, guesses)
    assert root.found_from.tolist() == [-1, 0]
    np.testing.assert_allclose(root.points, [1], atol=1e-12)


@pytest.mark.slow
def test_counters_in_the_carry_are_held():
    step = lambda _, carry, x: ({"h": carry["h"] / 2 + 1, "t": carry["t"] + 1}, None)
    found = bptt.fixed_points(step, None, None, {"h": normal(3, 1), "t": jnp.arange(3)})
    np.testing.assert_allclose(found.points["h"], [[2]], atol=1e-12)
    assert found.points["t"].dtype == jnp.arange(3).dtype


@pytest.mark.slow
@pytest.mark.parametrize("x64", [False, True])
def test_in_single_precision(x64):
    """Also where the default is double precision, which the solver's own numbers then have."""
    with jax.enable_x64(x64):
        unit = lambda w, h, x: (jnp.tanh(w * h), None)
        found = bptt.fixed_points(unit, jnp.float32(1.5), None, jnp.linspace(-2, 2, 9, dtype=jnp.float32))
        assert found.fixed.tolist() == [True] * 3
        assert found.states.dtype == jnp.float32
        assert found.eigenvalues.dtype == jnp.complex64


@pytest.mark.slow
def test_many_guesses_one_group_after_the_other(monkeypatch):
    args = tanh_network, (jnp.array([[3.0, -0.3], [-0.5, 2.5]]), jnp.zeros(2)), None, normal(11, 2)
    together = bptt.fixed_points(*args)
    monkeypatch.setattr(sys.modules["jaxbptt.analysis.fixed_points"], "_AT_ONCE", 16)
    apart = bptt.fixed_points(*args)
    np.testing.assert_allclose(together.states, apart.states, atol=1e-12)
    assert together.found_from.tolist() == apart.found_from.tolist()


def test_sample_states():
    """Of valid states only, with noise in standard deviations of each number."""
    hs = jnp.arange(24.0).reshape(4, 3, 2) * jnp.array([1.0, 10.0])
    count = jnp.arange(12).reshape(4, 3)
    valid = (count % 2 == 0) & (count < 8)
    carries = {"h": hs, "t": count}
    options = {"key": jax.random.key(0), "batch_axes": 1}
    drawn = jax.jit(lambda carries: bptt.sample_states(carries, 200, valid=valid, **options))(carries)
    assert set(drawn["t"].tolist()) == set(range(0, 8, 2))
    np.testing.assert_array_equal(drawn["h"], hs.reshape(12, 2)[drawn["t"]])
    noisy = jax.jit(lambda carries: bptt.sample_states(carries, 4_000, noise=0.5, valid=valid, **options))(carries)
    deviation = np.std(noisy["h"] - hs.reshape(12, 2)[noisy["t"]], axis=0)
    np.testing.assert_allclose(deviation, 0.5 * np.std(hs.reshape(12, 2)[:8:2], axis=0), rtol=0.05)
    assert jax.eval_shape(lambda hs: bptt.sample_states(hs, 5, key=jax.random.key(0)), hs[:, 0]).shape == (5, 2)


def test_wrong_arguments():
    step = lambda _, h, x: (h, None)
    cases = {
        r"guesses\['b'\] has shape \(\), but 1 axis of states": lambda: {"b": jnp.zeros(())},
        r"guesses\['a'\] holds \(3,\) states, but guesses\['b'\] \(2,\)": lambda: {"a": jnp.ones(3), "b": jnp.ones(2)},
        "guesses have no differentiable numbers": lambda: jnp.arange(3),
        "guesses have no leaves": lambda: None,
    }
    for message, guesses in cases.items():
        with pytest.raises(ValueError, match=message):
            bptt.fixed_points(step, None, None, guesses())
    for word in ("tolerance", "slow", "distance"):
        with pytest.raises(ValueError, match=f"{word} is 0, but it is measured in units"):
            bptt.fixed_points(step, None, None, jnp.ones(3), **{word: 0})
    cell = make_cell("gru")
    params, _, xs = problem(cell, 1, (2,))
    with pytest.raises(ValueError, match=r"guesses\[0\] has shape \(2, 4\), which is \(4,\) with batch axes"):
        bptt.fixed_points(cell, params, xs[0], jnp.ones((7, 2, 4)))
    with pytest.raises(ValueError, match=r"valid is bool\[5\], but the carries have \(4,\) states"):
        bptt.sample_states(jnp.ones((4, 2)), 3, key=jax.random.key(0), valid=jnp.ones(5, bool))
    with pytest.raises(ValueError, match="valid is False everywhere, so there is no state to draw"):
        bptt.sample_states(jnp.ones((4, 2)), 3, key=jax.random.key(0), valid=jnp.zeros(4, bool))


def test_without_optimistix_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "optimistix", None)
    with pytest.raises(ImportError) as error:
        bptt.fixed_points(lambda _, h, x: (h, None), None, None, jnp.ones(2))
    assert str(error.value) == f"fixed_points needs optimistix: {words.install_command('fixed-points')}"
