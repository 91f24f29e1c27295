"""`snap`: equal to the influence with all else masked, by a plain loop, and not the exact gradient where it must not be."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from reference import assert_close, make_cell, problem, random_like

import jaxbptt as bptt
from jaxbptt.influences import snap


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
