"""The cells whose recurrence is affine and diagonal: their equations, gradients, starts, and what float32 keeps of them."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import DIAGONAL, assert_close, make_cell, problem

import jaxbptt as bptt


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def lru_by_numpy(p, state, xs):
    """With numpy's complex numbers."""
    h, ys = state.re + 1j * state.im, []
    eigenvalues = np.exp(-np.exp(p.nu_log) + 1j * np.exp(p.theta_log))
    B, C = p.B_re + 1j * p.B_im, p.C_re + 1j * p.C_im
    for x in xs:
        h = eigenvalues * h + np.exp(p.gamma_log) * (B @ x)
        ys.append((C @ h).real + p.D * x)
    return bptt.LRUState(h.real, h.imag), ys


def gated(update):
    """`h ↦ update(p, h, x)` over all x, with y = h."""

    def by_numpy(p, h, xs):
        ys = []
        for x in xs:
            h = update(p, h, x)
            ys.append(h)
        return h, ys

    return by_numpy


def min_gru_update(p, h, x):
    (W_z, W_h), (b_z, b_h) = np.split(p.W_xh, 2), np.split(p.b, 2)
    z = sigmoid(W_z @ x + b_z)
    return (1 - z) * h + z * (W_h @ x + b_h)


def min_lstm_update(p, h, x):
    (W_f, W_i, W_h), (b_f, b_i, b_h) = np.split(p.W_xh, 3), np.split(p.b, 3)
    f, i = sigmoid(W_f @ x + b_f), sigmoid(W_i @ x + b_i)
    return f / (f + i) * h + i / (f + i) * (W_h @ x + b_h)


def rg_lru_update(p, h, x):
    (W_r, W_i, W_x), (b_r, b_i) = np.split(p.W_xh, 3), np.split(p.b, 2)
    r, i = sigmoid(W_r @ x + b_r), sigmoid(W_i @ x + b_i)
    a = np.exp(-8 * np.log1p(np.exp(p.decay)) * r)
    return a * h + np.sqrt(1 - a**2) * (i * (W_x @ x))


BY_NUMPY = {
    "lru": lru_by_numpy,
    "min_gru": gated(min_gru_update),
    "min_lstm": gated(min_lstm_update),
    "rg_lru": gated(rg_lru_update),
}


@pytest.mark.parametrize("name", DIAGONAL)
def test_equations(name):
    cell = make_cell(name)
    params, carry, xs = problem(cell, 5)
    carry, ys = BY_NUMPY[name](*jax.tree.map(np.asarray, (params, carry, xs)))
    assert_close(bptt.scan(cell, *problem(cell, 5)), (carry, np.array(ys)))


def gradients(scan, cell, params, carry, xs):
    def loss(params, carry, xs):
        carry, ys = scan(cell, params, carry, xs)
        return jnp.sum(jnp.sin(ys)) + sum(jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(carry))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(params, carry, xs)


@pytest.mark.parametrize(("name", "batch"), [(name, ()) for name in DIAGONAL] + [("lru", (2, 3)), ("rg_lru", (2, 3))])
def test_adjoints(name, batch):
    """By hand and derived, they give the gradient of `lax.scan`."""
    cell = make_cell(name)
    args = problem(cell, 7, batch)

    @jax.jit
    def all_gradients(*args):
        by_hand, derived = (gradients(bptt.adjoint_scan, step, *args) for step in (cell, cell.step))
        return by_hand, derived, gradients(bptt.scan, cell, *args)

    by_hand, derived, expected = all_gradients(*args)
    assert_close(by_hand, expected)
    assert_close(derived, expected)


@pytest.mark.parametrize("name", DIAGONAL)
def test_the_state_enters_linearly(name):
    """A step of a sum of states is the sum of the steps, and no unit's state reaches another's."""
    cell = make_cell(name)
    params, carry, xs = problem(cell, 1)
    other = problem(cell, 1, seed=9)[1]
    new, twice, both, none = (
        cell.step(params, state, xs[0])[0]
        for state in (carry, other, jax.tree.map(jnp.add, carry, other), jax.tree.map(jnp.zeros_like, carry))
    )
    assert_close(jax.tree.map(lambda a, b, c: a + b - c, new, twice, none), both)
    jacobian = jax.jacobian(lambda carry: cell.step(params, carry, xs[0])[0])(carry)
    for block in jax.tree.leaves(jacobian):
        np.testing.assert_array_equal(block, np.diag(np.diag(block)))


@pytest.mark.parametrize("name", ["min_gru", "min_lstm", "rg_lru"])
def test_gates_that_are_shut_or_open(name):
    """Arguments of the gates of ±200 in float32, where f + i, 1 − a² and a sigmoid are 0: no nan in values or gradients."""
    cell = make_cell(name, jnp.float32)
    params, carry, xs = problem(cell, 3, dtype=jnp.float32)
    gates = params.b.size - (4 if name != "rg_lru" else 0)
    for signs in (np.ones(gates), -np.ones(gates), np.resize([1, -1], gates)):
        b = jnp.asarray(np.resize(200 * signs, params.b.shape), jnp.float32).at[gates:].set(0)
        found = [gradients(bptt.adjoint_scan, s, params._replace(b=b), carry, xs) for s in (cell, cell.step)]
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
        assert_close(*found)
    if name == "min_lstm":  # both gates shut: what is kept is e^{a_f} / (e^{a_f} + e^{a_i})
        params = params._replace(b=jnp.asarray([-200, -200, -200, -200, -201, -201, -201, -201] + [0] * 4, jnp.float32))
        kept = jax.jacobian(lambda h: cell.step(params._replace(W_xh=0 * params.W_xh), h, xs[0])[0])(carry)
        np.testing.assert_allclose(np.diag(kept), sigmoid(1.0), rtol=1e-6)
        # And what is written is not one minus what is kept, which here is 1.
        params = params._replace(b=jnp.asarray([9] * 4 + [-20] * 4 + [1] * 4, jnp.float32), W_xh=0 * params.W_xh)
        np.testing.assert_allclose(cell.step(params, 0 * carry, xs[0])[0], sigmoid(-20) / sigmoid(9), rtol=1e-5)


NEAR_ONE = {
    "lru": lambda p: p._replace(nu_log=jnp.full(4, jnp.log(1e-6)), gamma_log=jnp.full(4, 0.5 * jnp.log(2e-6))),
    "min_gru": lambda p: p._replace(b=p.b.at[:4].set(-14)),
    "min_lstm": lambda p: p._replace(b=p.b.at[:4].set(7).at[4:8].set(-7)),
    "rg_lru": lambda p: p._replace(decay=jnp.full(4, jnp.log(jnp.expm1(1e-7)))),
}


@pytest.mark.parametrize("name", DIAGONAL)
@pytest.mark.costly
def test_float32_near_a_decay_of_1(name):
    """Over 10,000 steps with 1 − a of about 1e-6 float32 keeps three digits of states and gradients.

    1 − a² has two digits there in float32, so that a root taken of it fails this.
    """
    cells = {dtype: make_cell(name, dtype) for dtype in (jnp.float32, jnp.float64)}
    exact = problem(cells[jnp.float64], 10_000)
    exact = NEAR_ONE[name](exact[0]), exact[1], exact[2]
    # The same numbers in both.
    single = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), exact)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), single)

    def values_and_gradients(cell, args):
        def loss(params, carry, xs):
            carry, ys = bptt.adjoint_scan(cell, params, carry, xs)
            return jnp.mean(jnp.sin(ys)), ys[-1]

        (_, y), found = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*args)
        return y, found

    found, expected = values_and_gradients(cells[jnp.float32], single), values_and_gradients(cells[jnp.float64], exact)
    for pair in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        mine, leaf = (np.asarray(leaf, float) for leaf in pair)
        assert np.linalg.norm(mine - leaf) < 2e-3 * np.linalg.norm(leaf)


def test_starts():
    """As in the papers, over 20,000 units."""
    key, many = jax.random.key(0), 20_000
    p = bptt.lru(4, many, r_min=0.5, r_max=0.9, max_phase=1.5, output_size=4).init(key)
    radius = np.exp(-np.exp(np.asarray(p.nu_log, float)))
    assert 0.5 <= radius.min() < 0.51 < 0.89 < radius.max() <= 0.9
    assert np.mean(radius**2) == pytest.approx((0.25 + 0.81) / 2, rel=0.01)  # uniform over the area of the ring
    np.testing.assert_allclose(np.exp(p.gamma_log), np.sqrt(1 - radius**2), rtol=1e-5)
    assert 0 < np.exp(p.theta_log).min() < 0.01
    assert np.exp(p.theta_log).mean() == pytest.approx(0.75, rel=0.02)
    assert np.std(p.B_re) == pytest.approx(1 / np.sqrt(8), rel=0.02)
    assert np.std(p.C_im) == pytest.approx(1 / np.sqrt(many), rel=0.02)

    p = bptt.rg_lru(4, many).init(key)
    decay = np.exp(-8 * np.log1p(np.exp(np.asarray(p.decay, float))))
    assert 0.9 <= decay.min() < 0.901 < 0.998 < decay.max() <= 0.9991
    assert decay.mean() == pytest.approx(0.9495, rel=1e-3)
    assert not p.b.any()

    for name, keeps in (("min_gru", lambda b: sigmoid(-b[:many])), ("min_lstm", lambda b: sigmoid(b[:many]))):
        b = np.asarray(getattr(bptt, name)(4, many).init(key).b)
        assert not b.any()
        length = 1 / (1 - keeps(np.asarray(getattr(bptt, name)(4, many, chrono_length=100).init(key).b, float)))
        assert 1.9 < length.min() < 2.1
        assert 99 < length.max() < 100.1
    assert np.unique(bptt.min_gru(3, 2, update_bias=-1.0).init(key).b[:2]).tolist() == [-1]
    assert np.unique(bptt.min_lstm(3, 2, forget_bias=2.0).init(key).b).tolist() == [0, 2]


def test_sizes_of_an_lru():
    """Y has the size of the state, for `stack` and `network`, unless one is given; D is there where y has the size of x."""
    key = jax.random.key(0)
    assert bptt.lru(3, 5).init(key).D is None
    assert bptt.lru(5, 5).init(key).D.shape == bptt.lru(5, 7, output_size=5).init(key).D.shape == (5,)
    cell = bptt.stack(bptt.lru(3, 5), bptt.lru(5, 7, output_size=2), bptt.min_gru(2, 4))
    net = bptt.network(bptt.lru(3, 5, output_size=2), 6)
    for apply, params, carry in (
        (lambda p, c, xs: bptt.adjoint_scan(cell, p, c, xs), cell.init(key), cell.initial_carry((2,))),
        (net.apply, net.init(key), bptt.lru(3, 5).initial_carry((2,))),
    ):
        _, ys = apply(params, carry, jnp.ones((4, 2, 3), jnp.float32))
        assert ys.shape in ((4, 2, 4), (4, 2, 6))
    with pytest.raises(ValueError, match="Layer 1 of the stack reads 5 features, but layer 0 below it gives 2"):
        bptt.stack(bptt.lru(3, 5, output_size=2), bptt.lru(5, 5))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lru", {"r_min": 1.0}, r"r_min is 1.0 and r_max 1.0, but .* pass 0 ≤ r_min < r_max ≤ 1"),
        ("lru", {"r_max": 1.1}, r"r_min is 0.0 and r_max 1.1"),
        ("lru", {"max_phase": 0}, "max_phase is 0, but it is the largest angle, in radians"),
        ("lru", {"output_size": 0}, "output_size is 0"),
        ("rg_lru", {"c": 0}, "c is 0, but it scales the decay"),
        ("rg_lru", {"a_max": 1.0}, "a_min is 0.9 and a_max 1.0, but a decay is drawn between them"),
        ("min_gru", {"update_bias": "x"}, "update_bias is 'x', but it is a bias to start with"),
        ("min_lstm", {"forget_bias": np.nan}, "forget_bias is nan, but it is a bias to start with"),
        ("min_lstm", {"chrono_length": 2}, "chrono_length is 2"),
        ("min_gru", {"dtype": int}, "dtype is <class 'int'>"),
        ("rg_lru", {"compute_dtype": int}, "compute_dtype is <class 'int'>"),
    ],
)
def test_options_that_do_not_fit(name, options, message):
    with pytest.raises(ValueError, match=message):
        inspect.unwrap(getattr(bptt, name))(3, 4, **options)


@pytest.mark.parametrize("name", DIAGONAL)
def test_arguments_of_a_step_that_do_not_fit(name):
    cell = make_cell(name)
    params, carry, xs = problem(cell, 1)
    with pytest.raises(ValueError, match=rf"{name}: x has shape \(2,\) at one time step, but \(3,\) is expected"):
        cell.step(params, carry, xs[0, :2])
    with pytest.raises(ValueError, match=rf"{name}: .* has shape \(5,\) at one time step, but .*hidden_size=4"):
        cell.step(params, jax.tree.map(lambda leaf: jnp.ones(5), carry), xs[0])
    with pytest.raises(TypeError, match=rf"{name}: params are a NetworkParams without"):
        cell.step(bptt.NetworkParams(None, jnp.ones((1, 1))), carry, xs[0])
    if name == "lru":
        with pytest.raises(
            TypeError, match=r"lru: the carry is an array \(4,\), but an LRUState\(re, im\) is expected"
        ):
            cell.step(params, carry.re, xs[0])
        with pytest.raises(ValueError, match=r"lru: D has shape None, but \(3,\) is expected"):
            cell.step(params._replace(D=None), carry, xs[0])
