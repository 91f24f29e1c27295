"""The pattern of F and J: found from the program, whatever its numbers, and never too small."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from reference import make_cell, problem, random_like

from jaxbptt.programs.pattern import patterns, reached_entries
from jaxbptt.programs.terms import terms_of


def found_in(step, params, carry, x):
    """(F `[n, p]`, J) as flags, where all arrays are traced."""
    found = []

    @jax.jit
    def run(params, carry, x):
        F, J = patterns(step, params, carry, x)
        found.append((np.concatenate([leaf.reshape(len(J), -1) for leaf in F], axis=1), J))
        return 0

    jax.eval_shape(run, params, carry, x)
    return found[0]


def by_numbers(step, params, carry, x):
    """Where the Jacobians are not zero."""
    (flat, unflattened), (v, unravelled) = ravel_pytree(params), ravel_pytree(carry)

    @jax.jit
    @jax.jacrev
    def of(both):
        return ravel_pytree(step(unflattened(both[0]), unravelled(both[1]), x)[0])[0]

    return [np.asarray(leaf) != 0 for leaf in of((flat, v))]


def check(step, params, carry, x):
    for mine, other in zip(found_in(step, params, carry, x), by_numbers(step, params, carry, x), strict=True):
        np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "lstm" else pytest.mark.slow)
        for name in ("elman", "gru", "lstm", "stack", "lru", "min_gru", "min_lstm", "rg_lru", "rate", "layer_norm")
    ],
)
def test_cells(name):
    cell = make_cell(name)
    params, init, xs = problem(cell, 1)
    check(cell.step, params, init, xs[0])


def test_constants_keep_their_zeros():
    """Masks and permutations, and what is computed from them alone; the same among the params are numbers like others."""
    n = 5
    mask, order = np.tril(np.ones((n, n))), np.array([2, 0, 1, 4, 3])

    def step(params, h, x):
        W = params["W"] * jnp.where(jnp.asarray(mask) > 0, jnp.asarray(mask), 0.0) * (1 - jnp.eye(n))
        return jnp.tanh(W @ h + params["b"])[order] + x * jax.nn.relu(h[::-1]), ()

    params = random_like({"W": jnp.zeros((n, n)), "b": jnp.zeros(n)}, 0)
    check(step, params, jnp.ones(n), 1.0)
    _, J = found_in(lambda mask, h, x: (mask * params["W"] @ h, ()), mask, jnp.ones(n), 1.0)
    assert J.all()


def test_numbers_do_not_matter():
    """Where all of them are zero, where tanh is flat, where relu is off, in a case that is not taken."""

    def step(params, h, x):
        a = jax.nn.relu(params["W"] @ h + params["b"])
        return jnp.where(x > 0, jnp.tanh(100 * a), a * params["c"]) + jnp.minimum(h, 0), ()

    zeros = {"W": jnp.zeros((3, 3)), "b": jnp.zeros(3), "c": jnp.zeros(3)}
    F, J = found_in(step, zeros, jnp.zeros(3), 1.0)
    unit = np.eye(3, dtype=bool)
    np.testing.assert_array_equal(F, np.concatenate([np.repeat(unit, 3, axis=1), unit, unit], axis=1))
    assert J.all()


def of_a_custom_vjp(h):
    double = jax.custom_vjp(lambda h: 2 * h)
    double.defvjp(lambda h: (2 * h, None), lambda _, bar: (2 * bar,))
    return double(h)


UNKNOWN = {
    "a branch": lambda h, x: jax.lax.cond(x > 0, lambda h: h, lambda h: 2 * h, h),
    "a loop": lambda h, x: jax.lax.fori_loop(0, 2, lambda _, h: 2 * h, h),
    "order of the values": lambda h, x: jnp.sort(h),
    "a place that is not constant": lambda h, x: jnp.roll(h, x.astype(int)),
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.slow] * (k != "a loop")) for k in UNKNOWN])
def test_what_is_not_known_reaches_everything(kind):
    h = jnp.arange(1.0, 4.0)
    _, J = found_in(lambda w, h, x: (UNKNOWN[kind](w * h, x), ()), jnp.ones(3), h, jnp.array(1.0))
    assert J.all()


def test_a_derivative_of_its_own_is_followed():
    step = lambda w, h, x: (of_a_custom_vjp(w * h), ())
    F, J = found_in(step, jnp.ones(3), jnp.ones(3), 0.0)
    assert (np.eye(3) == F).all()
    assert (np.eye(3) == J).all()
    assert all(found.lost for found in terms_of(lambda leaves: [step(1.0, leaves[0], 0.0)[0]], [jnp.ones(3)]))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.bfloat16])
def test_the_one_entry_that_is_reached(dtype):
    """In 300 units, more than bfloat16 can count; rows of a table are the same for any token."""
    n = 300
    params = {"W": jnp.zeros((2, n), dtype), "table": jnp.zeros((7, n), dtype)}
    order = np.random.default_rng(0).permutation(n)

    def step(params, c, x):
        token, key = x
        noise = jax.random.normal(key, (n,), dtype)
        h = jnp.tanh((params["W"][0] * c["h"])[order] + params["table"][token] + params["W"][1] + noise)
        return {"h": h, "mean": jnp.mean(h * c["h"])}, ()

    carry, x = {"h": jnp.zeros(n, dtype), "mean": jnp.zeros((), dtype)}, (jnp.array(3), jax.random.key(0))
    of_params, of_carry = reached_entries(step, params, carry, x)
    table, W = (of_params[0][i] for i in (1, 0))
    np.testing.assert_array_equal(table, np.broadcast_to(np.arange(n), (7, n)))
    np.testing.assert_array_equal(W, [np.argsort(order), np.arange(n)])
    np.testing.assert_array_equal(of_carry[0][0], np.argsort(order))
    assert (of_carry[0][1] == -1).all()
    assert (of_params[1][0] == 0).all()


def test_several_entries():
    cell = make_cell("lstm")
    params, init, xs = problem(cell, 1)
    of_params, of_carry = reached_entries(cell.step, params, init, xs[0])
    assert of_carry[0][0] is None
    np.testing.assert_array_equal(of_carry[1][1], np.arange(4))
    np.testing.assert_array_equal(of_params[0][2], np.tile(np.arange(4), 4))
    # The output gate does not lead to c.
    np.testing.assert_array_equal(of_params[1][2], [*np.tile(np.arange(4), 3), -1, -1, -1, -1])


def concatenated(params, h, x):
    """One product for x and h, with a slice, a scalar state and a complex number on the way."""
    a = params["W"] @ jnp.concatenate([x, h])
    z, n = jax.nn.sigmoid(a[:3]), jnp.tanh(a[3:])
    turned = jax.lax.complex(h, n) * (0.5 + 0.25j)
    return z * n + (1 - z) * h + jnp.real(jax.lax.complex(h, 2 * h) * 1j) + 0 * turned.real[::-1]


def moved_about(params, h, x):
    a = jnp.tanh(params["W"][:3, :3].T @ h[jnp.array([2, 0, 1])])
    return jnp.stack([a, h])[0] + jnp.pad(h[1:], (1, 0)) + jnp.where(x[0] > 0, h, 2 * h)


@pytest.mark.parametrize("step", [concatenated, moved_about])
def test_terms_of_a_tangent(step):
    """The derivative of each entry with respect to any one entry, without the Jacobian."""
    params, h, x = random_like({"W": jnp.zeros((6, 5))}, 0), random_like(jnp.zeros(3), 1), jnp.ones(2)

    def new(leaves):
        return [step(params, leaves[0], x)]

    J = jax.jacobian(lambda h: new([h])[0])(h)
    (found,) = terms_of(new, [h])
    at = np.array([1, 2, 0])
    for entries in (np.arange(3), at):
        read_off = found.entries(0, entries)
        if step is moved_about:
            assert read_off is not None
        if read_off is not None:
            np.testing.assert_allclose(read_off, J[np.arange(3), entries], atol=1e-14)


@pytest.mark.parametrize(
    "name", ["lstm", pytest.param("gru", marks=pytest.mark.slow), pytest.param("rate", marks=pytest.mark.slow)]
)
def test_terms_of_cells(name):
    """Read off all of them; a fallback would take the whole of J."""
    cell = make_cell(name)
    params, init, xs = problem(cell, 1)
    leaves, treedef = jax.tree.flatten(init)

    def new(leaves):
        return jax.tree.leaves(cell.step(params, treedef.unflatten(leaves), xs[0])[0])

    J = jax.jacobian(new)(leaves)
    for k, found in enumerate(terms_of(new, leaves)):
        for j in range(len(leaves)):
            read_off = jnp.broadcast_to(found.entries(j, np.arange(4)), (4,))
            np.testing.assert_allclose(read_off, jnp.diagonal(J[k][j]), atol=1e-14)
