"""Long products: singular values far beyond the range of floats, norms of all pairs, eigenvalues; dense and matrix-free."""

import inspect
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import make_cell, problem

import jaxbptt as bptt
from jaxbptt.analysis import pair_norms, spectrum, sweep


def orthogonal(rng, n):
    return np.linalg.qr(rng.standard_normal((n, n)))[0]


def chain(diagonals, seed=0):
    """J_t = Q_t D_t Q_{t−1}ᵀ with random orthogonal Q: the singular values of a product are products of diagonals."""
    rng = np.random.default_rng(seed)
    Q = [orthogonal(rng, diagonals.shape[1]) for _ in range(len(diagonals) + 1)]
    return np.stack([Q[t + 1] @ np.diag(d) @ Q[t].T for t, d in enumerate(diagonals)])


def test_condition_number_beyond_the_range_of_floats():
    rng = np.random.default_rng(1)
    diagonals = np.exp(rng.standard_normal((400, 5)) + np.array([3.0, 1.0, 0.0, -1.0, -3.0]))
    values, resolved = jax.jit(bptt.singular_values)(chain(diagonals))
    expected = np.log(diagonals).sum(axis=0)
    assert expected[0] - expected[-1] > 2 * 300 * math.log(10)
    np.testing.assert_allclose(values, expected, rtol=1e-12)
    assert resolved.all()


def test_close_singular_values():
    """One QR sweep alone would need hundreds of repetitions to tell these apart."""
    diagonals = np.tile(np.linspace(1.0, 1.001, 6), (30, 1))
    values, resolved = bptt.singular_values(chain(diagonals))
    np.testing.assert_allclose(values, np.sort(np.log(diagonals).sum(axis=0))[::-1], atol=1e-13)
    assert resolved.all()


@pytest.mark.parametrize("n", [1, 2, 5, 8])
def test_short_products_against_a_full_decomposition(n):
    J = np.random.default_rng(n).standard_normal((5, n, n))
    product = np.linalg.multi_dot(J[::-1])
    values, resolved = bptt.singular_values(J)
    np.testing.assert_allclose(values, np.log(np.linalg.svd(product, compute_uv=False)), rtol=1e-9, atol=1e-12)
    assert resolved.all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_ten_thousand_steps_of_a_linear_network(dtype):
    """Powers of W = Q D Qᵀ; values of 10^±10,000 and the volume, kept exactly."""
    rng = np.random.default_rng(0)
    Q = orthogonal(rng, 3)
    J = jnp.broadcast_to(jnp.asarray(Q @ np.diag([10, 1, 0.1]) @ Q.T, dtype), (10_000, 3, 3))
    values, resolved = jax.jit(bptt.singular_values)(J)
    assert values.dtype == dtype
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(values, 10_000 * np.log([10, 1, 0.1]), atol=10_000 * 30 * eps)
    assert resolved.all()


def test_several_starts_and_the_stored_products():
    J = np.random.default_rng(3).standard_normal((12, 4, 4))
    values, resolved = bptt.singular_values(J, start=[5, 0, 11, 5])
    stored = bptt.product_log_singular_values(bptt.jacobian_products(J))
    assert values.shape == resolved.shape == (4, 4)
    np.testing.assert_allclose(values[0], stored.log_values[4], rtol=1e-9)
    np.testing.assert_allclose(values[2], stored.log_values[10], rtol=1e-9)
    np.testing.assert_array_equal(values[0], values[3])
    np.testing.assert_allclose(values[1], bptt.singular_values(J).log_values, rtol=1e-12)


UNRESOLVED = {
    # One Jacobian with σ₁/σₙ = 10^300: what is left of the small one in floats is rounding.
    "one step": np.stack([orthogonal(np.random.default_rng(0), 3) @ np.diag([1e150, 1.0, 1e-150])]),
    # One direction grows and then shrinks, the other the other way round: rounding along the way is amplified 10^200 times.
    "crossing": np.concatenate([np.tile(np.diag([10, 0.1]), (100, 1, 1)), np.tile(np.diag([0.1, 10]), (100, 1, 1))]),
    "zero": np.zeros((5, 3, 3)),
    "rank one": np.tile(np.diag([1.0, 0.0, 0.0]), (5, 1, 1)),
}


@pytest.mark.parametrize(("m", "dtype"), [(15, np.float64), (20, np.float64), (7, np.float32)])
def test_rounding_amplified_over_three_directions(m, dtype):
    """No two of them show it: one is overtaken by the second, and the second later by the third."""
    Q = np.eye(3) - 2 / 3
    stages = np.array([(-1.0, 1, 0), (-1, 0, 0), (1, 0, -1)])
    J = np.stack([Q @ np.diag(4.0**rates) @ Q for rates in stages for _ in range(m)]).astype(dtype)
    values, resolved = bptt.singular_values(J)
    np.testing.assert_allclose(values[0], m * math.log(4), rtol=1e-5)
    assert np.abs(values[1:] + m * math.log(4)).min() > 0.05
    assert resolved.tolist() == [True, False, False]


def test_logarithms_are_summed_to_the_last_digit():
    """In single precision, where sums of ten thousand have no decimals left: two rates that differ by 1e-4."""
    more = np.array([2.3026, 2.3025, -1.7], np.float32)

    def body(total, _):
        return sweep._add(total, more), None

    total, _ = jax.lax.scan(body, jnp.zeros((2, 3), jnp.float32), None, length=10_000)
    exact = 10_000 * more.astype(float)
    np.testing.assert_allclose(sweep._differences(total), exact[:, None] - exact, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", UNRESOLVED)
def test_what_rounding_has_drowned_is_said_to_be(name):
    J = UNRESOLVED[name]
    values, resolved = bptt.singular_values(J)
    assert np.isfinite(values).all()
    assert not resolved[-1]
    assert resolved[0] == (name in ("one step", "rank one"))
    if name == "one step":
        np.testing.assert_allclose(values[0], 150 * math.log(10), rtol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_lost_in_one_step_stays_lost(dtype):
    """Errors add up as roots of sums, the tolerance grows with the logarithm: over many steps it could allow any error."""
    rng = np.random.default_rng(0)
    J = math.exp(-10) * np.stack([[orthogonal(rng, 2) for _ in range(2_000)]] * 4)
    J[0] = 0
    J[1, 1_500] = 0
    J[2, 1_500] = math.exp(10) * J[2, 1_500] @ np.diag([1, 0])
    J[3] *= np.finfo(dtype).tiny * math.exp(10)
    values, resolved = jax.jit(jax.vmap(lambda J: bptt.singular_values(J, start=[0, 1_600])))(J.astype(dtype))
    wanted = [[[0, 0], [0, 0]], [[0, 0], [1, 1]], [[1, 0], [1, 1]], [[0, 0], [0, 0]]]
    np.testing.assert_array_equal(resolved, np.array(wanted, bool))
    np.testing.assert_allclose(values[1:3, 1], -4_000, rtol=1e-5)


def leading_cases(n, steps):
    """Products whose largest values are known, and whether a block of vectors finds them alone."""
    rng = np.random.default_rng(0)
    rest = np.linspace(0.9, -1, n - 5)
    rates = {
        "random": (rng.standard_normal((steps, n)) * 0.3 + np.linspace(1, -1, n), True),
        "ties, also of the last one asked for": (
            np.tile(np.r_[1, 0.9999, 0.9999, 0.9999, 0.9998, rest], (steps, 1)),
            True,
        ),
        "condition number beyond floats": (np.tile(np.linspace(25, -25, n), (steps, 1)), True),
        "shrinking beyond floats": (np.tile(np.linspace(-20, -40, n), (steps, 1)), True),
        "all equal": (np.zeros((steps, n)), False),
        "one a little above many": (np.tile(np.r_[1e-3, np.zeros(n - 1)], (steps, 1)), False),
        "slowly falling": (np.tile(np.linspace(0, -0.1, n), (steps, 1)), False),
    }
    return {
        name: (chain(np.exp(each)), np.sort(each.sum(axis=0))[::-1], block) for name, (each, block) in rates.items()
    }


def test_the_largest_values_alone(monkeypatch):
    """From a block where that is sure to find them, else from all vectors; right either way, with one compilation each."""
    cases = leading_cases(n=30, steps=50)
    of_three = jax.jit(lambda J: bptt.singular_values(J, top=3))
    for J, exact, _ in cases.values():
        values, resolved = of_three(J)
        np.testing.assert_allclose(values, exact[:3], rtol=1e-11, atol=1e-11)
        assert resolved.all()
    monkeypatch.setattr(spectrum, "all_values", lambda J, *_: (jnp.full(J.size, jnp.nan), jnp.zeros(J.size)))
    of_three = jax.jit(lambda J: bptt.singular_values(J, top=3))
    for name, (J, _, block) in cases.items():
        assert np.isfinite(of_three(J).log_values).all() == block, name


def test_any_number_of_the_largest():
    J = np.random.default_rng(5).standard_normal((6, 23, 23))
    whole = bptt.singular_values(J)
    for top in (1, 2):
        values, resolved = bptt.singular_values(J, top=top)
        np.testing.assert_allclose(values, whole.log_values[:top], rtol=1e-10)
        assert resolved.shape == (top,)
        assert resolved.all()


def test_the_largest_of_several_starts_matrix_free():
    """The block needs Jacobians and their transposes in the right order: those of a network do not commute."""
    cell = bptt.elman(3, 30, dtype=jnp.float64)
    args = problem(cell, 60)

    def values(*args):
        J = bptt.jacobian_operators(cell, *args)
        return bptt.singular_values(J, start=[40, 0, 59]), bptt.singular_values(J, start=[40, 0, 59], top=2)

    whole, leading = jax.jit(values)(*args)
    np.testing.assert_allclose(leading.log_values, whole.log_values[:, :2], rtol=1e-9, atol=1e-12)
    assert leading.resolved.all()


def test_rounding_among_the_largest():
    """As with all values: two directions of which each overtakes the other, and one that a step has lost."""
    n = 30
    Q = orthogonal(np.random.default_rng(0), n)
    others = np.full(n - 2, -3.0)
    crossing = np.exp(np.repeat([[2.0, -2.0, *others], [-2.0, 2.0, *others]], 40, axis=0))
    lost = np.exp(np.tile(np.r_[1.0, 0.5, others], (80, 1)))
    lost[30, 1] = 0
    of_two = jax.jit(lambda J: bptt.singular_values(J, top=2))
    for diagonals, wanted in ((crossing, [False, False]), (lost, [True, False])):
        values, resolved = of_two(np.stack([Q @ np.diag(d) @ Q.T for d in diagonals]))
        assert np.isfinite(values).all()
        assert resolved.tolist() == wanted


@pytest.mark.parametrize("name", ["lstm"])
def test_matrix_free_equals_dense(name):
    cell = make_cell(name)
    args = problem(cell, 30)
    _, J = bptt.state_jacobians(cell, *args)

    def matrix_free(*args):
        J = bptt.jacobian_operators(cell, *args)
        return bptt.singular_values(J, start=[0, 20]), bptt.log_norms(J), bptt.jacobian_eigenvalues(J)

    values, norms, eigenvalues = jax.jit(matrix_free)(*args)
    dense = jax.jit(lambda J: bptt.singular_values(J, start=[0, 20]))(J)
    np.testing.assert_allclose(values.log_values, dense.log_values, rtol=1e-9)
    np.testing.assert_allclose(norms, bptt.log_norms(J), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(eigenvalues, bptt.jacobian_eigenvalues(J), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["elman", "lstm"])
def test_operators_are_jacobians_and_their_transposes(name):
    cell = make_cell(name)
    args = problem(cell, 3)
    _, J = bptt.state_jacobians(cell, *args)
    operators = bptt.jacobian_operators(cell, *args)
    V = np.random.default_rng(0).standard_normal((operators.size, 2))
    at_1 = jax.tree.map(lambda leaf: leaf[1], operators.at)
    np.testing.assert_allclose(operators.push(at_1, V), J[1] @ V, atol=1e-13)
    np.testing.assert_allclose(operators.pull(at_1, V), J[1].T @ V, atol=1e-13)
    assert (operators.length, operators.size) == (3, J.shape[1])


def test_matrix_free_memory():
    """T = 10,000 and n = 128: of the order of T n + n² numbers, where the dense Jacobians alone have T n²."""
    cell = bptt.elman(4, 128)
    params = jax.eval_shape(cell.init, jax.random.key(0))
    xs = jax.ShapeDtypeStruct((10_000, 4), jnp.float32)

    def values(params, xs):
        return bptt.singular_values(bptt.jacobian_operators(cell, params, cell.initial_carry(), xs))

    memory = jax.jit(values).lower(params, xs).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * (3 * 10_000 * 128 + 30 * 128**2)


def test_log_norms_of_all_pairs():
    assert bptt.log_norms(jnp.zeros((0, 3, 3))).shape == (0, 0)
    J = np.random.default_rng(0).standard_normal((6, 3, 3))
    norms = bptt.log_norms(J)
    for t in range(6):
        for s in range(6):
            product = np.eye(3)
            for k in range(s + 1, t + 1):
                product = J[k] @ product
            expected = np.log(np.linalg.norm(product)) if s <= t else -np.inf
            np.testing.assert_allclose(norms[t, s], expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("columns", [1, 7, 256])
def test_log_norms_of_some_pairs(columns, monkeypatch):
    """Forwards from a few starts, backwards from a few ends, with one group of starts and several; in any shape and order."""
    monkeypatch.setattr(pair_norms, "_COLUMNS", columns)
    J = np.random.default_rng(0).standard_normal((6, 3, 3))
    whole = np.asarray(bptt.log_norms(J))
    steps = np.stack(np.meshgrid([0, 5, 3], [4, 0], indexing="ij"), -1)
    for pairs in (
        [(5, 1), (3, 1), (1, 1), (0, 1)],
        [(5, 0), (5, 3), (5, 5)],
        steps,
        (4, 2),
        np.argwhere(whole > -np.inf),
    ):
        t, s = np.moveaxis(np.asarray(pairs), -1, 0)
        np.testing.assert_allclose(bptt.log_norms(J, pairs=pairs), whole[t, s], rtol=1e-10, atol=1e-13)


def test_some_pairs_cost_less():
    """In multiplications of a step: the walk is as long as the distances, in the cheaper of the two directions."""
    visited = []

    def times(transposed, at_t, V):
        jax.debug.callback(lambda t: visited.append((transposed, int(t))), at_t)
        return V

    J = bptt.analysis.JacobianOperators(partial(times, False), partial(times, True), jnp.arange(50), 50, 2, jnp.float64)
    for pairs, steps in (([(13, 10), (13, 10), (11, 10)], 4), ([(40, s) for s in range(30, 40)], 11)):
        visited.clear()
        jax.block_until_ready(bptt.log_norms(J, pairs=pairs))
        jax.effects_barrier()
        assert len(visited) == steps
        assert {transposed for transposed, _ in visited} == {steps == 11}


@pytest.mark.parametrize(
    "pairs", [[(0, 3)], [(-1, 0)], [(0.0, 1.0)], [0, 1, 2], 1, [], [(True, False)], [(1, 0), (2,)]]
)
def test_wrong_pairs(pairs):
    with pytest.raises(
        ValueError, match=r"pairs is .*, but with 3 Jacobians each is \(t, s\), .* from 0 to 2: pass whole"
    ):
        inspect.unwrap(bptt.log_norms)(jnp.zeros((3, 2, 2)), pairs=pairs)


def test_log_norms_beyond_the_range_of_floats():
    J = np.tile(1e-3 * np.eye(2), (500, 1, 1))
    norms = bptt.log_norms(J)
    np.testing.assert_allclose(norms[499, 0], 499 * math.log(1e-3) + 0.5 * math.log(2), rtol=1e-12)
    J[250] = 0
    norms = bptt.log_norms(J)
    assert norms[499, 249] == -np.inf
    assert np.isfinite(norms[499, 250:]).all()
    assert not np.isnan(norms).any()


def test_log_norms_by_random_probes():
    """Unbiased in the squared norm, also of products of rank one; all n directions are exact."""
    J = np.random.default_rng(0).standard_normal((4, 20, 20)) / np.sqrt(20)
    J[1] = np.outer(J[1, :, 0], J[1, 0])
    exact = bptt.log_norms(J)
    np.testing.assert_allclose(bptt.log_norms(J, probes=20), exact, rtol=1e-9, atol=1e-12)
    keys = jax.random.split(jax.random.key(0), 500)
    squares = jnp.exp(2 * jax.vmap(lambda key: bptt.log_norms(J, probes=10, key=key))(keys))
    lower = np.tril_indices(4)
    ratio = (squares.mean(axis=0) / jnp.exp(2 * exact))[lower]
    np.testing.assert_allclose(ratio, 1, atol=0.1)
    logs = 0.5 * jnp.log(squares)
    assert (logs.std(axis=0)[lower] <= 1.1 / math.sqrt(2 * 10)).all()
    low = (exact - logs.mean(axis=0))[lower]
    assert (low > -0.02).all()
    assert (low < 1.5 / (2 * 10)).all()


def test_eigenvalues():
    W = np.diag([0.5, -2.0]) + np.triu(np.ones((2, 2)), 1)
    eigenvalues = bptt.jacobian_eigenvalues(np.tile(W, (3, 1, 1)))
    np.testing.assert_allclose(np.sort(eigenvalues.real, axis=1), [[-2, 0.5]] * 3, rtol=1e-12)


@pytest.mark.parametrize("start", [3, -1, 1.5, [0, 3]])
def test_wrong_start(start):
    with pytest.raises(ValueError, match=r"start is .*, but with 3 Jacobians a product starts after 0 to 2 steps"):
        inspect.unwrap(bptt.singular_values)(jnp.zeros((3, 2, 2)), start=start)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.int32])
def test_half_precision_and_integers_are_multiplied_in_full(dtype):
    J = jnp.tile(jnp.asarray([[2, 0], [0, 1]], dtype), (5, 1, 1))
    values, _ = bptt.singular_values(J)
    assert values.dtype == (jnp.float64 if dtype == jnp.int32 else jnp.float32)
    np.testing.assert_allclose(values, [5 * math.log(2), 0], atol=1e-5)
    if dtype == jnp.int32:
        return
    W = J[0]
    step = lambda W, h, x: (W @ h, None)
    J = bptt.jacobian_operators(step, W, jnp.ones(2, dtype), length=5)
    np.testing.assert_allclose(bptt.singular_values(J).log_values, [5 * math.log(2), 0], atol=0.05)
    spectrum = bptt.lyapunov_exponents(step, W, jnp.ones(2, dtype), length=40, burn_in=30)
    assert spectrum.exponents.dtype == jnp.float32
    np.testing.assert_allclose(spectrum.exponents, [math.log(2), 0], atol=0.05)


def test_what_is_no_state_vector():
    step = lambda p, h, x: (h, None)
    for function in (bptt.jacobian_operators, bptt.lyapunov_exponents):
        with pytest.raises(TypeError, match=r"init\[0\] has dtype complex128, but a state vector is real"):
            function(step, None, (jnp.ones(2, complex),), length=3)
        with pytest.raises(ValueError, match="init has no differentiable numbers, so there is no state"):
            function(step, None, jnp.array(1), length=3)
        cell = make_cell("lstm")
        params, init, xs = problem(cell, 3, (5,))
        with pytest.raises(
            ValueError,
            match=r"init\.h has shape \(5, 4\), which is \(4,\) with batch axes: all rows together would count as one state",
        ):
            function(cell, params, init, xs)
    with pytest.raises(TypeError, match="J has dtype complex128: pass real Jacobians"):
        inspect.unwrap(bptt.singular_values)(jnp.ones((3, 2, 2), complex))


def test_wrong_arguments():
    J = jnp.zeros((3, 2, 2))
    for top in (0, 3, 1.5, True):
        with pytest.raises(
            ValueError, match=r"top is .*, but a product has 2 singular values: pass 1 to 2, or leave it out"
        ):
            inspect.unwrap(bptt.singular_values)(J, top=top)
    for function in (bptt.singular_values, bptt.log_norms, bptt.jacobian_eigenvalues):
        with pytest.raises(ValueError, match=r"J has shape \(3, 2\), but \[time, n, n\] is expected"):
            inspect.unwrap(function)(J[:, 0])
    for probes in (0, 3, 1.5, True):
        with pytest.raises(ValueError, match=r"probes is .*, but the state has 2 directions to probe: pass 1 to 2"):
            inspect.unwrap(bptt.log_norms)(J, probes=probes)
    with pytest.raises(ValueError, match="key draws the random probes: pass probes as well"):
        bptt.log_norms(J, key=jax.random.key(0))
