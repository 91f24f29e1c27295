"""Sequential depth: of programs whose longest chain is counted by hand."""

import math

import jax
import jax.numpy as jnp
from reference import cases

from jaxbptt.analysis.cost import count_flops
from jaxbptt.analysis.depth import count_depth

X = jnp.ones((16, 3))


def until(x):
    return jax.lax.while_loop(lambda h: h[0] < 9, lambda h: 2 * h + 1, x[0])


def branches(x):
    return jax.lax.cond(x[0, 0] > 0, lambda x: jnp.exp(jnp.sin(x + 1)), lambda x: x + 1, x)


PROGRAMS = {
    "a chain": (lambda x: jnp.tanh(2 * x + 1), 3),
    "beside each other": (lambda x: jnp.sin(x) + jnp.cos(x) + jnp.exp(x), 3),
    "moved": (lambda x: jnp.concatenate([x, x[::-1].reshape(x.shape)])[2:].T, 0),
    "not used": (lambda x: (jnp.sin(jnp.sin(x)), 2 * x)[1], 1),
    "a product": (lambda x: (x @ x.T) @ x, 2),
    "in a call": (lambda x: jax.jit(lambda x, y: (jnp.sin(x), 2 * y))(x, jnp.sin(jnp.sin(x)))[0], 1),
    "branches": (branches, 4),
    "nothing": (lambda x: x, 0),
}


@cases("program", PROGRAMS, *PROGRAMS)
def test_chains(program):
    fn, depth = program
    assert count_depth(jax.make_jaxpr(fn)(X).jaxpr) == depth


def test_loops_count_as_often_as_they_run():
    def depth(times, after=lambda h: h, **options):
        def fn(x):
            return after(jax.lax.scan(lambda h, _: (jnp.tanh(2 * h + 1), None), x, None, length=times)[0])

        return count_depth(jax.make_jaxpr(fn)(X).jaxpr, **options)

    assert (depth(0), depth(1), depth(100)) == (0, 3, 300)
    assert (depth(0, loops=False), depth(100, jnp.sin, loops=False)) == (0, 1)


def test_loops_of_unknown_length():
    jaxpr = jax.make_jaxpr(lambda x: jnp.sin(until(x)))(X).jaxpr
    assert math.isnan(count_depth(jaxpr))
    assert math.isnan(count_flops(jaxpr))
    assert count_depth(jaxpr, 5) == 2 * 5 + 1
    assert count_flops(jaxpr, 5) == 2 * 3 * 5


def test_an_associative_scan_has_the_depth_of_a_tree():
    """A product and an addition up the tree and again down, and one addition that puts even and odd entries together."""

    def affine(a, b):
        def then(first, last):
            return last[0] * first[0], last[0] * first[1] + last[1]

        return jax.lax.associative_scan(then, (a, b))[1]

    depths = {steps: count_depth(jax.make_jaxpr(affine)(*jnp.ones((2, steps))).jaxpr) for steps in (2**10, 2**16)}
    assert depths[2**10] == 5 * 10
    assert depths[2**16] == 5 * 16
