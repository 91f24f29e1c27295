"""`snap`: equal to the influence with all else masked, by a plain loop, and not the exact gradient where it must not be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from reference import DIAGONAL, assert_close, make_cell, problem, random_like

import jaxbptt as bptt
from jaxbptt.influences import rtrl, snap


def visible(step):
    """The step with all of its carry as its output, so that the loss sees each state."""

    def visible_step(params, carry, x):
        new, _ = getattr(step, "step", step)(params, carry, x)
        return new, ravel_pytree(new)[0]

    return visible_step


def value(ys):
    return jnp.sum(random_like(ys, 9) * jnp.sin(ys))


def gradients(step, params, init, xs, *influences):
    """The exact gradient, then those by each influence, compiled together."""

    def all_of_them(params):
        def loss(params, scan, **options):
            return value(scan(visible(step), params, init, xs, **options)[1])

        exact = jax.grad(loss)(params, bptt.scan)
        return [exact, *(jax.grad(loss)(params, bptt.forward_scan, influence=each) for each in influences)]

    return jax.jit(all_of_them)(params)


def masked(step, params, init, xs, order):
    """The gradient by a dense influence of which the rest is set to zero at each step."""
    v, unravelled = ravel_pytree(init)
    flat, unflattened = ravel_pytree(params)

    def moved(flat, v, x):
        return ravel_pytree(getattr(step, "step", step)(unflattened(flat), unravelled(v), x)[0])[0]

    F_of, J_of = (jax.jit(jax.jacfwd(moved, argnum)) for argnum in (0, 1))
    # No entry is zero by chance at random params; whatever a saturated one would hide, the last step shows as well.
    pattern_F, pattern_J = (np.asarray(of(flat, v, xs[0])) != 0 for of in (F_of, J_of))
    mask = pattern_F
    for _ in range(order - 1):
        mask = (pattern_J.astype(int) @ mask.astype(int) > 0) | pattern_F
    M, carries, influences = np.zeros((v.size, flat.size)), [], []
    for x in xs:
        M = mask * (np.asarray(J_of(flat, v, x)) @ M + np.asarray(F_of(flat, v, x)))
        v = jax.jit(moved)(flat, v, x)
        carries.append(v)
        influences.append(M)
    bars = np.asarray(jax.grad(value)(jnp.stack(carries)))
    return unflattened(jnp.asarray(sum(bar @ M for bar, M in zip(bars, influences, strict=True))))


def differs(a, b):
    a, b = ravel_pytree(a)[0], ravel_pytree(b)[0]
    return jnp.linalg.norm(a - b) > 0.05 * jnp.linalg.norm(b)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "lstm" else pytest.mark.slow)
        for name in ("elman", "gru", "lstm", "rate", "stack")
    ],
)
def test_equals_a_masked_influence(name):
    cell = make_cell(name)
    params, init, xs = problem(cell, 5)
    exact, found, all_of_it = gradients(cell, params, init, xs, snap(1), snap(2))
    assert_close(found, masked(cell, params, init, xs, 1))
    assert differs(found, exact)
    assert_close(all_of_it, exact)


def masked_by(mask):
    """A network whose recurrent weights are multiplied by constants."""

    def step(params, h, x):
        h = jnp.tanh((mask * params["W"]) @ h + params["U"] @ x + params["b"])
        return h, h

    return step


def sparse_problem(n=6):
    params = {"W": (n, n), "U": (n, 2), "b": (n,)}
    params = {name: jax.ShapeDtypeStruct(shape, float) for name, shape in params.items()}
    init, xs = jax.ShapeDtypeStruct((n,), float), jax.ShapeDtypeStruct((7, 2), float)
    return random_like(params, 0, 0.8), random_like(init, 1), random_like(xs, 2)


def test_orders_of_a_sparse_network():
    """In a ring each unit reads itself and the one before it, so that order k + 1 reaches k units on."""
    n = 6
    step = masked_by(np.eye(n) + np.roll(np.eye(n), 1, axis=0))
    params, init, xs = sparse_problem(n)
    exact, first, second, third, whole = gradients(step, params, init, xs, snap(1), snap(2), snap(3), snap(n))
    for order, found in ((1, first), (2, second), (3, third)):
        assert_close(found, masked(step, params, init, xs, order))
    errors = [float(jnp.abs(found["W"] - exact["W"]).max()) for found in (first, second, third)]
    assert errors[0] > 1.5 * errors[1] > 1e-3
    assert errors[2] > 1e-8
    assert_close(whole, exact)


@pytest.mark.parametrize("name", [pytest.param("gru", marks=pytest.mark.slow), "lstm"])
def test_units_stored_in_another_order(name):
    """Each leaf of the carry in its own."""
    cell = make_cell(name)
    params, init, xs = problem(cell, 5)
    leaves, treedef = jax.tree.flatten(init)
    orders = [np.random.default_rng(i).permutation(len(leaf)) for i, leaf in enumerate(leaves)]
    stored = treedef.unflatten([leaf[order] for leaf, order in zip(leaves, orders, strict=True)])

    def plain(carry):
        parts = zip(jax.tree.leaves(carry), orders, strict=True)
        return treedef.unflatten([leaf[np.argsort(order)] for leaf, order in parts])

    def permuted(params, carry, x):
        new, _ = cell.step(params, plain(carry), x)
        new = treedef.unflatten([leaf[order] for leaf, order in zip(jax.tree.leaves(new), orders, strict=True)])
        return new, ravel_pytree(plain(new))[0]

    @jax.jit
    def both(params):
        def loss(params, step, init):
            return value(bptt.forward_scan(step, params, init, xs, influence=snap(1))[1])

        return [jax.grad(loss)(params, *case) for case in ((permuted, stored), (visible(cell), init))]

    found, expected = both(params)
    assert_close(found, expected)


def test_units_mixed_in_another_order():
    """Rows of the weights that belong to other units than their own numbers say."""
    cell = make_cell("elman")
    params, init, xs = problem(cell, 6)
    order = np.array([2, 0, 3, 1])

    def permuted(params, h, x):
        h = jnp.tanh((params.W_xh @ x + params.W_hh @ h + params.b)[order])
        return h, h

    @jax.jit
    def both(params):
        def loss(params, step):
            return value(bptt.forward_scan(step, params, init, xs, influence=snap(1))[1])

        rows = jax.tree.map(lambda leaf: leaf[order], params)
        return jax.grad(loss)(params, permuted), jax.grad(loss)(rows, cell)

    found, plain = both(params)
    assert_close(jax.tree.map(lambda leaf: leaf[order], found), plain)


@pytest.mark.parametrize("name", ["lru", *(pytest.param(name, marks=pytest.mark.slow) for name in DIAGONAL[1:])])
def test_exact_where_no_unit_reads_another(name):
    """In storage of the size of the params."""
    cell = make_cell(name)
    params, init, xs = problem(cell, 5)
    exact, *found = gradients(cell, params, init, xs, snap(1), snap(3), rtrl())
    for each in found:
        assert_close(each, exact)
    for influence in (snap(1), rtrl()):
        M = jax.eval_shape(lambda influence=influence: influence.init(cell.step, params, init, xs[0]))
        sizes = [leaf.size for leaf in jax.tree.leaves(params)]
        assert sum(leaf.size for leaf in jax.tree.leaves(M)) <= len(jax.tree.leaves(init)) * sum(sizes)


def test_rows_resets_and_padding():
    """The gradient of a batch is that of its sequences, each on its own."""
    cell = make_cell("lstm")
    params, init, xs = problem(cell, 7, (2,))
    reset = random_like(init, 5)
    is_first = jnp.zeros((7, 2), bool).at[3, 1].set(True)
    valid = jnp.ones((7, 2), bool).at[2, 0].set(False)
    padded = jnp.where(valid[..., None], xs, jnp.nan)
    weights = random_like(jax.ShapeDtypeStruct((7, 2, 4), float), 8)

    @jax.jit
    def both(params):
        def loss(params, init, xs, weights, **flags):
            scan = bptt.forward_scan
            return jnp.sum(jnp.sin(scan(cell, params, init, xs, influence=snap(1), **flags)[1]) * weights)

        def row(tree, i):
            return jax.tree.map(lambda leaf: leaf[i], tree)

        def apart(params):
            kept = np.array([0, 1, 3, 4, 5, 6])
            return (
                loss(params, row(init, 0), xs[kept, 0], weights[kept, 0])
                + loss(params, row(init, 1), xs[:3, 1], weights[:3, 1])
                + loss(params, row(reset, 1), xs[3:, 1], weights[3:, 1])
            )

        used = jnp.where(valid[..., None], weights, 0)
        together = jax.grad(loss)(params, init, padded, used, is_first=is_first, valid=valid, reset_carry=reset)
        return together, jax.grad(apart)(params)

    assert_close(*both(params))


def test_a_closure_and_a_carry_in_a_dict():
    """Units of two states, one of which reads the other, with a counter beside them; the weights are closed over."""
    params = random_like({"W": jax.ShapeDtypeStruct((3, 3), float), "a": jax.ShapeDtypeStruct((3,), float)}, 0, 0.7)
    init = {"fast": jnp.linspace(0.1, 0.5, 3), "slow": jnp.ones(3)}
    xs = random_like(jax.ShapeDtypeStruct((6, 3), float), 3)

    def moved(params, c, x):
        fast = jnp.tanh(params["W"] @ c["fast"] + x - 0.5 * c["slow"])
        return {"fast": fast, "slow": params["a"] * c["slow"] + fast}, ()

    @jax.jit
    def found(params):
        def loss(params):
            def step(_, c, x):
                new, _ = moved(params, {"fast": c["fast"], "slow": c["slow"]}, x)
                return {**new, "t": c["t"] + 1}, ravel_pytree(new)[0]

            start = {**init, "t": jnp.array(0)}
            return value(bptt.forward_scan(step, None, start, xs, influence=snap(1))[1])

        return jax.grad(loss)(params)

    assert_close(found(params), masked(moved, params, init, xs, 1))


def test_wrong_arguments():
    for order in (0, 1.5, None):
        with pytest.raises(ValueError, match=r"order is .*pass a whole number of at least 1"):
            snap(order)
