"""Steps whose params have no gradient: that of an input is formed in the backward loop, and nothing else is stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import EXACT, assert_close, random_like

import jaxbptt as bptt


def affine(_, h, x):
    h = x["a"] * h + x["b"]
    return h, h


def nonlinear(scale, carry, x):
    """Two leaves in the carry, of which one counts; y is no state; and an input without a gradient."""
    h, count = carry
    h = jnp.tanh(scale * x["a"] * h) + jnp.where(x["flag"], x["b"], 0)
    return (h, count + 1), {"y": h * x["b"], "count": count}


def problem(steps, size=3):
    shape = jax.ShapeDtypeStruct((steps, size), float)
    xs = random_like({"a": shape, "b": shape}, 0)
    return random_like(jax.ShapeDtypeStruct((size,), float), 1), xs, random_like(shape, 2)


def gradient(scan, step, params, init, xs, weights, nondiff=None):
    def loss(init, xs):
        if nondiff is not None:
            init, xs = (init, jnp.array(0)), xs | {"flag": nondiff}
        carry, ys = scan(step, params, init, xs)
        y = ys["y"] if isinstance(ys, dict) else ys
        return jnp.sum(jnp.sin(y) * weights) + jnp.sum(jnp.cos(jax.tree.leaves(carry)[0]))

    return jax.value_and_grad(loss, argnums=(0, 1))(init, xs)


@pytest.mark.parametrize("steps", [0, 1, 2, 40])
def test_equals_scan(steps):
    init, xs, weights = problem(steps)
    flags = jnp.arange(steps) % 3 > 0

    def both(scan):
        plain = gradient(scan, affine, None, init, xs, weights)
        return plain, gradient(scan, nonlinear, 0.9, init, xs, weights, flags)

    assert_close(*(jax.jit(both, static_argnums=0)(scan) for scan in (bptt.adjoint_scan, bptt.scan)))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", EXACT.values(), ids=EXACT)
def test_every_strategy_and_vmap(strategy):
    """Also with 40 rows each on its own, and as a second derivative."""
    init, xs, weights = problem(40)
    batch = jax.tree.map(lambda leaf: jnp.stack([leaf, 0.5 * leaf]), (init, xs, weights))
    kinds = [
        jax.jit(jax.vmap(lambda i, x, w, scan=scan: gradient(scan, affine, None, i, x, w)))(*batch)
        for scan in (strategy, bptt.scan)
    ]
    assert_close(*kinds)

    def twice(scan):
        def norm(init, xs):
            _, found = gradient(scan, affine, None, init, xs, weights)
            return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(found))

        return jax.jit(jax.grad(norm, argnums=(0, 1)))(init, xs)

    assert_close(twice(strategy), twice(bptt.scan))


def compiled(scan, step, params, steps, size, wrt):
    init, xs, weights = problem(steps, size)

    def loss(params, init, xs):
        return jnp.mean((scan(step, params, init, xs)[1] - weights) ** 2)

    return jax.jit(jax.grad(loss, argnums=wrt)).lower(params, init, xs).compile()


def test_memory_and_copies():
    """No deltas and no copies of the states are stored, and no array of the size of the states is copied.

    `jax.grad` of `lax.scan` copies one for each array that a loop writes.
    """
    steps, size = 512, 64

    def copies(program):
        shape = f"f64[{steps},{size}]{{1,0}} copy("
        return sum(shape in line for line in program.as_text().splitlines())

    ours = compiled(bptt.adjoint_scan, affine, None, steps, size, (1, 2))
    reference = compiled(bptt.scan, affine, None, steps, size, (1, 2))
    assert copies(ours) == 0 < copies(reference)
    assert ours.memory_analysis().temp_size_in_bytes <= reference.memory_analysis().temp_size_in_bytes + 8 * size


def test_where_there_are_sums_or_products_the_contraction_is_outside():
    """A param with a gradient, or an input that is multiplied by a matrix, is for many steps at once."""

    def projected(W, h, x):
        h = x["a"] * h + W @ x["b"]
        return h, h

    def loops(step, params, wrt):
        init, xs, _ = problem(40)
        loss = lambda params, init, xs: jnp.sum(jnp.sin(bptt.adjoint_scan(step, params, init, xs)[1]))
        text = jax.jit(jax.grad(loss, argnums=wrt)).lower(params, init, xs).as_text()
        return text.count("stablehlo.while")

    W = jnp.asarray(np.eye(3))
    assert loops(lambda W, h, x: affine(W, h, x), None, (1, 2)) == 2
    assert loops(projected, W, (1, 2)) > 2
    assert loops(lambda s, h, x: affine(None, s * h, x), jnp.array(0.5), (0, 1, 2)) > 2


def test_flags_and_a_gradient_of_init_alone():
    init, xs, weights = problem(23)
    flags = {"is_first": jnp.arange(23) % 5 == 3, "valid": jnp.arange(23) % 4 > 0}

    def both(scan):
        def loss(init, xs):
            carry, ys = scan(affine, None, init, xs, **flags)
            return jnp.sum(jnp.sin(ys) * weights) + jnp.sum(jnp.cos(carry))

        return jax.grad(loss, argnums=(0, 1))(init, xs), jax.grad(loss)(init, xs)

    assert_close(*(jax.jit(both, static_argnums=0)(scan) for scan in (bptt.adjoint_scan, bptt.scan)))
