"""`rflo` and `eprop`: equal to their formulas written out as loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from reference import assert_close, make_cell, problem, random_like

import jaxbptt as bptt
from jaxbptt.influences import eprop, rflo


def value(ys):
    return jnp.sum(random_like(ys, 9) * jnp.sin(ys))


def gradients(step, params, init, xs, *influences):
    """The exact gradient, then those by each influence, compiled together."""

    def all_of_them(params):
        def loss(params, scan, **options):
            return value(scan(step, params, init, xs, **options)[1])

        exact = jax.grad(loss)(params, bptt.scan)
        return [exact, *(jax.grad(loss)(params, bptt.forward_scan, influence=each) for each in influences)]

    return jax.jit(all_of_them)(params)


def assert_biased(found, exact):
    a, b = ravel_pytree(found)[0], ravel_pytree(exact)[0]
    assert jnp.linalg.norm(a - b) > 0.05 * jnp.linalg.norm(b)


def outer(bar, trace):
    """Σ over rows of the learning signal of each unit times the traces of its weights."""
    return np.einsum("bi,bij->ij", bar, trace)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def test_a_leaky_network():
    """p_ij ← (1 − α_i) p_ij + α_i r_j, the gradient Σ e_i p_ij: RFLO, and e-prop of the same network."""
    cell = make_cell("rate")
    params, init, xs = problem(cell, 6, (2,))
    alpha = 2.0 / np.array([2.0, 3.0, 5.0, 9.0])
    exact, *found = gradients(cell, params, init, xs, rflo(), eprop(), rflo(1 - alpha), rflo(0.5))

    def by_hand(leak):
        h, p = np.asarray(init), [np.zeros((2, 4, size)) for size in (3, 4, 1)]
        hs, traces = [], []
        for x in np.asarray(xs):
            r = np.tanh(h)
            inputs = x, r, np.ones((2, 1))
            p = [leak[:, None] * a + alpha[:, None] * v[:, None, :] for a, v in zip(p, inputs, strict=True)]
            h = (1 - alpha) * h + alpha * (r @ np.asarray(params.W_hh).T + x @ np.asarray(params.W_xh).T + params.b)
            hs.append(h)
            traces.append(p)
        bars = np.asarray(jax.grad(lambda hs: value(jnp.tanh(hs)))(jnp.stack(hs)))
        W_xh, W_hh, b = (sum(outer(bar, p[i]) for bar, p in zip(bars, traces, strict=True)) for i in range(3))
        return jax.tree.map(jnp.asarray, type(params)(W_xh, W_hh, b[:, 0]))

    for each in found[:3]:
        assert_close(each, by_hand(1 - alpha))
    assert_close(found[3], by_hand(np.full(4, 0.5)))
    assert_biased(found[0], exact)


def test_the_network_of_the_paper():
    """h ← h + (φ(u) − h)/τ with u = W h + U x, for which p ← (1 − 1/τ) p + φ′(u) h/τ: the rate is outside of the nonlinearity."""
    tau = 4.0
    params = random_like({"W": jax.ShapeDtypeStruct((3, 3), float), "U": jax.ShapeDtypeStruct((3, 2), float)}, 0)
    init, xs = random_like(jnp.zeros(3), 1), random_like(jnp.zeros((6, 2)), 2)

    def step(params, h, x):
        h = h + (jnp.tanh(params["W"] @ h + params["U"] @ x) - h) / tau
        return h, h

    exact, found = gradients(step, params, init, xs, rflo())
    W, U = np.asarray(params["W"]), np.asarray(params["U"])
    h, p, q, hs, traces = np.asarray(init), np.zeros((3, 3)), np.zeros((3, 2)), [], []
    for x in np.asarray(xs):
        slope = 1 - np.tanh(W @ h + U @ x) ** 2
        p = (1 - 1 / tau) * p + np.outer(slope, h) / tau
        q = (1 - 1 / tau) * q + np.outer(slope, x) / tau
        h = h + (np.tanh(W @ h + U @ x) - h) / tau
        hs.append(h)
        traces.append((p, q))
    bars = np.asarray(jax.grad(value)(jnp.stack(hs)))
    sums = [sum(bar[:, None] * pair[i] for bar, pair in zip(bars, traces, strict=True)) for i in range(2)]
    assert_close(found, {"W": jnp.asarray(sums[0]), "U": jnp.asarray(sums[1])})
    assert_biased(found, exact)


def test_eligibility_traces_of_an_lstm():
    """ε ← f ε + ∂c/∂θ, the trace of h is o (1 − tanh² c) ε + ∂h/∂o ∂o/∂θ, and the gradient Σ ∂L/∂h_t times it."""
    cell = make_cell("lstm")
    params, init, xs = problem(cell, 6, (2,))
    exact, found = gradients(cell, params, init, xs, eprop())
    W_xh, W_hh, b = map(np.asarray, params)
    h, c = map(np.asarray, init)
    eps, hs, traces = [np.zeros((2, 16, size)) for size in (3, 4, 1)], [], []
    for x in np.asarray(xs):
        i, f, g, o = np.split(x @ W_xh.T + h @ W_hh.T + b, 4, axis=-1)
        i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
        to_c = np.concatenate([g * i * (1 - i), c * f * (1 - f), i * (1 - g**2), 0 * o], axis=-1)
        c = f * c + i * g
        to_h = np.concatenate([0 * i, 0 * f, 0 * g, np.tanh(c) * o * (1 - o)], axis=-1)
        inputs = x, h, np.ones((2, 1))
        four = lambda unit: np.tile(unit, 4)[..., None]
        eps = [four(f) * e + to_c[..., None] * v[:, None, :] for e, v in zip(eps, inputs, strict=True)]
        traces.append(
            [
                four(o * (1 - np.tanh(c) ** 2)) * e + to_h[..., None] * v[:, None, :]
                for e, v in zip(eps, inputs, strict=True)
            ]
        )
        h = o * np.tanh(c)
        hs.append(h)
    bars = np.asarray(jax.grad(value)(jnp.stack(hs)))
    sums = [sum(outer(np.tile(bar, 4), e[i]) for bar, e in zip(bars, traces, strict=True)) for i in range(3)]
    assert_close(found, jax.tree.map(jnp.asarray, type(params)(sums[0], sums[1], sums[2][:, 0])))
    assert_biased(found, exact)


def test_a_state_that_only_its_own_unit_writes():
    """An adaptive unit: the threshold a is reached from the weights through v alone. ε_a ← ρ ε_a + ε_v, ε_v ← α ε_v + z."""
    alpha, rho = 0.8, 0.9
    W, init = random_like(jnp.zeros((3, 3)), 0), (random_like(jnp.zeros(3), 1), random_like(jnp.zeros(3), 2))
    xs = random_like(jnp.zeros((6, 3)), 3)

    def step(W, carry, x):
        v, a = carry
        carry = alpha * v + W @ jnp.tanh(v - a) + x, rho * a + v
        return carry, jnp.concatenate(carry)

    exact, found = gradients(step, W, init, xs, eprop())
    (v, a), of_v, of_a, states, traces = map(np.asarray, init), np.zeros((3, 3)), np.zeros((3, 3)), [], []
    for x in np.asarray(xs):
        of_v, of_a = alpha * of_v + np.tanh(v - a)[None], rho * of_a + of_v
        v, a = alpha * v + np.asarray(W) @ np.tanh(v - a) + x, rho * a + v
        states.append(np.concatenate([v, a]))
        traces.append(np.concatenate([of_v, of_a]))
    bars = np.asarray(jax.grad(value)(jnp.asarray(states)))
    total = sum(bar[:, None] * e for bar, e in zip(bars, traces, strict=True))
    assert_close(found, jnp.asarray(total[:3] + total[3:]))
    assert_biased(found, exact)


@pytest.mark.slow
def test_layers():
    """In a stack a weight reaches the layers above within a step: M has all entries, and J is diagonal."""
    cell = bptt.stack(
        bptt.rate(3, 4, tau=3.0, dt=1.0, dtype=jnp.float64), bptt.rate(4, 2, tau=5.0, dt=1.0, dtype=jnp.float64)
    )
    params, init, xs = problem(cell, 5)

    def step(params, carry, x):
        new, _ = cell.step(params, carry, x)
        return new, ravel_pytree(new)[0]

    exact, *found = gradients(step, params, init, xs, rflo(), eprop())
    v, unravelled = ravel_pytree(init)
    flat, unflattened = ravel_pytree(params)
    moved = jax.jit(lambda flat, v, x: step(unflattened(flat), unravelled(v), x)[1])
    F_of = jax.jit(jax.jacfwd(moved))
    leak = np.array([1 - 1 / 3] * 4 + [1 - 1 / 5] * 2)
    M, states, influences = np.zeros((6, flat.size)), [], []
    for x in xs:
        M = leak[:, None] * M + F_of(flat, v, x)
        v = moved(flat, v, x)
        states.append(v)
        influences.append(M)
    bars = jax.grad(value)(jnp.stack(states))
    expected = unflattened(sum(bar @ M for bar, M in zip(bars, influences, strict=True)))
    for each in found:
        assert_close(each, expected)
        assert_biased(each, exact)


@pytest.mark.parametrize("name", ["gru", pytest.param("elman", marks=pytest.mark.slow)])
def test_gates_that_keep(name):
    """Of a gru what the update gate keeps, h′ = z h + …; of elman nothing, so that windows of one step are left."""
    cell = make_cell(name)
    params, init, xs = problem(cell, 5)
    exact, found, by_leak = gradients(cell, params, init, xs, eprop(), rflo())
    assert_close(by_leak, found)
    flat, unflattened = ravel_pytree(params)
    F_of = jax.jit(jax.jacrev(lambda flat, h, x: cell.step(unflattened(flat), h, x)[0]))
    h, M, hs, influences = init, np.zeros((4, flat.size)), [], []
    for x in xs:
        z = np.zeros(4)
        if name == "gru":
            z = sigmoid((params.W_xh @ x + params.b)[4:8] + (params.W_hh @ h)[4:8])
        M = z[:, None] * M + F_of(flat, h, x)
        h = cell.step(params, h, x)[0]
        hs.append(h)
        influences.append(M)
    bars = jax.grad(value)(jnp.stack(hs))
    assert_close(found, unflattened(sum(bar @ M for bar, M in zip(bars, influences, strict=True))))
    assert_biased(found, exact)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["min_gru", "lru"])
def test_exact_where_no_unit_reads_another(name):
    cell = make_cell(name)
    params, init, xs = problem(cell, 5)
    exact, found = gradients(cell, params, init, xs, eprop())
    assert_close(found, exact)


def test_wrong_leaks():
    with pytest.raises(TypeError, match="leak is a str, but a number"):
        rflo("half")
    with pytest.raises(TypeError, match="leak has dtype int"):
        rflo(np.arange(3))
    cell = make_cell("rate")
    params, init, xs = problem(cell, 2)
    with pytest.raises(
        ValueError, match=r"leak has shape \(3,\), but carry.* has \(4,\) in a row of the batch: pass one"
    ):
        gradients(cell, params, init, xs, rflo(np.ones(3)))
