"""Forward mode through the strategies whose gradient is that of their values: the tangents of `scan`."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from reference import EXACT, assert_close, cases, make_cell, problem, random_like

import jaxbptt as bptt

STRATEGIES = {name: scan for name, scan in EXACT.items() if scan is not bptt.scan}
STRATEGIES["checkpointed_scan, segments of 3"] = partial(bptt.checkpointed_scan, segment_length=3)
STRATEGIES["truncated_scan, uncut"] = partial(bptt.truncated_scan, truncation_length=100)
T = 7


def of_cell(name, flags=False):
    """(step, arguments, flags)."""
    cell = make_cell(name)
    rows = jnp.arange(T * 2).reshape(T, 2)
    args = problem(cell, T, (2,))
    return cell, args, {"is_first": rows % 5 == 3, "valid": rows < 11, "reset_carry": args[1]} if flags else {}


def bare():
    """Arrays that the step closes over, a counter, and a key in the carry."""
    scale = jnp.float64(0.1)

    def step(params, carry, x):
        h, key, count = carry
        key, subkey = jax.random.split(key)
        h = jnp.tanh(params["w"] @ h + x["a"] * jax.random.normal(subkey) + scale * x["i"].astype(float))
        return (h, key, count + 1), {"h": h, "count": count}

    key = jax.random.key(0)
    xs = {"a": jnp.linspace(0.0, 1.0, T), "i": jnp.arange(T)}
    args = {"w": jnp.eye(3) - 0.3}, (jnp.ones(3), key, jnp.array(0)), xs
    return step, args, {}


# The stack has the other cells.
PROBLEMS = {"lstm": partial(of_cell, "lstm"), "stack": partial(of_cell, "stack")}
PROBLEMS |= {"flags": partial(of_cell, "lstm", True), "bare": bare}


def in_floats(step, args, flags, scan):
    """The outputs of a scan as a function of its floating-point arguments, and these arguments."""
    diff, rest = bptt.trees.partition(args)

    def outputs(diff):
        return bptt.trees.differentiable(scan(step, *bptt.trees.combine(diff, rest), **flags))

    return outputs, diff


def total(outputs):
    return lambda diff: sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(outputs(diff)))


def pushed(outputs, diff, tangents):
    return jax.jvp(outputs, (diff,), (tangents,))


def pushed_later(outputs, diff, tangents):
    values, push = jax.linearize(outputs, diff)
    return values, push(tangents)


def pushed_and_transposed(outputs, diff, tangents):
    _, push = jax.linearize(outputs, diff)
    pull = jax.linear_transpose(push, diff)
    return pull(push(tangents))


def mapped(outputs, diff, tangents):
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, -2 * leaf]), tangents)
    return jax.vmap(lambda t: jax.jvp(outputs, (diff,), (t,))[1])(many)


def hessian_product(outputs, diff, tangents):
    return jax.jvp(jax.grad(total(outputs)), (diff,), (tangents,))


def hessian_product_by_reverse(outputs, diff, tangents):
    return jax.grad(lambda diff: jax.jvp(total(outputs), (diff,), (tangents,))[1])(diff)


def pushed_twice(outputs, diff, tangents):
    return jax.jvp(lambda diff: jax.jvp(outputs, (diff,), (tangents,))[1], (diff,), (tangents,))


FIRST = {f.__name__: f for f in (pushed, pushed_later, hessian_product)}
OTHERS = {f.__name__: f for f in (pushed_and_transposed, mapped, hessian_product_by_reverse, pushed_twice)}
MODES = {f"{name}, {mode}": (PROBLEMS[name], FIRST[mode]) for name in PROBLEMS for mode in FIRST}
MODES |= {f"{name}, {mode}": (PROBLEMS[name], OTHERS[mode]) for name in ("lstm", "flags", "bare") for mode in OTHERS}


@cases("case", MODES, "lstm, pushed", "bare, pushed_later")
def test_equals_scan(case):
    """All strategies in one program, to save compiling."""
    make, mode = case
    problem = make()
    _, diff = in_floats(*problem, bptt.scan)
    tangents = random_like(diff, 3)

    def everywhere(diff, tangents):
        scans = {"scan": bptt.scan} | STRATEGIES
        return {name: mode(in_floats(*problem, scan)[0], diff, tangents) for name, scan in scans.items()}

    found = jax.jit(everywhere)(diff, tangents)
    for name in STRATEGIES:
        assert_close(found[name], found["scan"], rtol=1e-9)


TRUNCATED = partial(bptt.truncated_scan, truncation_length=9)
INSIDE_EACH_OTHER = {
    "checkpointed in adjoint": (bptt.adjoint_scan, bptt.checkpointed_scan),
    "adjoint in checkpointed": (bptt.checkpointed_scan, bptt.adjoint_scan),
    "checkpointed in truncated": (TRUNCATED, bptt.checkpointed_scan),
    "truncated in itself": (TRUNCATED, TRUNCATED),
}
TRANSFORMS = [jax.hessian, lambda f: jax.jacfwd(jax.jacfwd(f)), lambda f: jax.jacrev(jax.jacfwd(f))]


@pytest.mark.parametrize("transform", TRANSFORMS, ids=["hessian", "forward twice", "reverse over forward"])
@pytest.mark.parametrize(("outer", "inner"), INSIDE_EACH_OTHER.values(), ids=INSIDE_EACH_OTHER)
@pytest.mark.costly
def test_inside_each_other(outer, inner, transform):
    """Whole matrices of second derivatives, without `jax.jit`."""

    def step(scan, w, h, x):
        within = lambda w, h, x: (jnp.tanh(w * h + x), h)
        return scan(within, w[0], h, w[1] * jnp.arange(1.0, 4.0))[0], jnp.sum(h * x)

    def loss(outer, inner, w):
        h, ys = outer(partial(step, inner), w, jnp.float64(0.5), jnp.ones(2))
        return h**2 + jnp.sum(ys)

    w = jnp.array([0.3, -0.2])
    expected = transform(partial(loss, bptt.scan, bptt.scan))(w)
    assert_close(transform(partial(loss, outer, inner))(w), expected, rtol=1e-9)


def test_tangents_keep_nothing():
    """They are computed along with the values: of 1,000 steps no array is stored."""
    cell = make_cell("lstm")
    args = problem(cell, 1000)

    def last(*args):
        return bptt.adjoint_scan(cell, *args)[0]

    def temporary_bytes(function):
        return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes

    one_array = args[1].h.nbytes * 1000
    assert temporary_bytes(lambda *args: jax.jvp(last, args, args)) < one_array
    assert temporary_bytes(lambda *args: jax.vjp(last, *args)[1](args[1])) > one_array


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("push", [pushed, pushed_later, mapped])
@pytest.mark.parametrize(
    "scan",
    [partial(bptt.windowed_scan, window=3), partial(bptt.adjoint_scan, clip_adjoint=0.1)],
    ids=["window", "clip"],
)
@pytest.mark.costly
def test_a_gradient_that_is_not_that_of_the_values_has_no_forward_mode(scan, push, jit):
    outputs, diff = in_floats(*of_cell("elman"), scan)
    push = partial(push, outputs)
    with pytest.raises(TypeError, match=r"_scan has no forward-mode derivative \(jvp, .*: use jaxbptt\.scan"):
        (jax.jit(push) if jit else push)(diff, diff)
