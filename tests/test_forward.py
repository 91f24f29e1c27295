"""`forward_scan`: the gradient accumulated forward in time is that of `scan`, in memory that does not depend on T."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CELLS, DIAGONAL, assert_close, make_cell, problem, random_like

import jaxbptt as bptt

SCANS = (bptt.scan, bptt.forward_scan)


def total(carry, ys):
    """Of the last carry and of all outputs, each with weights of its own."""
    leaves = [leaf for leaf in jax.tree.leaves((carry, ys)) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    weights = random_like(leaves, 9)
    return sum(jnp.sum(jnp.real(w * jnp.sin(leaf))) for w, leaf in zip(weights, leaves, strict=True))


def by_each(function, *args, scans=SCANS):
    """Value and gradient with respect to all arguments of `function(scan, *args)`, by each scan, compiled together."""
    numbers = tuple(range(1, len(args) + 1))

    def all_of_them(*args):
        return [jax.value_and_grad(function, argnums=numbers, allow_int=True)(scan, *args) for scan in scans]

    return jax.jit(all_of_them)(*args)


def check_exact(step, params, init, xs, **options):
    """Value, and gradient of params and init."""

    def loss(scan, params, init):
        return total(*scan(step, params, init, xs, **options))

    reference, forward = by_each(loss, params, init)
    assert_close(forward, reference)


def slow(names, *quick):
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("batch", [(), (2,)], ids=["one row", "batch"])
@pytest.mark.parametrize("name", slow([*CELLS, *DIAGONAL, "rate", "layer_norm"], "stack", "lru"))
def test_equals_scan(name, batch):
    cell = make_cell(name)
    check_exact(cell, *problem(cell, 6, batch))


def in_a_dict(p, c, x):
    """Of several leaves, one of them complex and one a counter; the output reads the old carry and the params as well."""
    h = p["W"] @ c["h"] + x
    h = h / (1 + jnp.abs(h)).astype(complex)
    g = jnp.tanh(c["g"] * p["b"] + jnp.abs(h).sum())
    return {"h": h, "g": g, "n": c["n"] + 1}, jnp.abs(h) * c["n"] + p["b"] * c["g"] + g


def test_a_carry_of_several_leaves():
    W = random_like(jax.ShapeDtypeStruct((2, 3, 3), float), 0, 0.4)
    params = {"W": jax.lax.complex(*W), "b": jnp.array(0.9), "size": jnp.array(3)}
    init = {"h": jnp.ones(3, complex), "g": jnp.array(0.3), "n": jnp.array(0)}
    check_exact(in_a_dict, params, init, random_like(jax.ShapeDtypeStruct((5, 3), float), 1).astype(complex))


def test_arrays_that_the_step_closes_over():
    cell = make_cell("elman")
    params, init, xs = problem(cell, 5)

    def loss(scan, params):
        return total(*scan(lambda b, h, x: cell.step(params._replace(b=b), h, x), params.b, init, xs))

    reference, forward = by_each(loss, params)
    assert_close(forward, reference)


@pytest.mark.parametrize("reverse", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["", "reverse"])
@pytest.mark.parametrize("words", slow(["is_first", "valid", "both"], "both"))
def test_resets_and_padding(words, reverse):
    """With nan in the padding; the carry after a reset gets its gradient as well."""
    cell = make_cell("stack")
    params, init, xs = problem(cell, 9, (4,))
    rng = np.random.default_rng(0)
    flags = {"is_first": jnp.asarray(rng.random((9, 4)) < 0.3), "valid": jnp.asarray(rng.random((9, 4)) < 0.7)}
    flags = flags if words == "both" else {words: flags[words]}
    if "valid" in flags:
        xs = jnp.where(flags["valid"][..., None], xs, jnp.nan)
    resets = {"reset_carry": random_like(init, 5)} if "is_first" in flags else {}

    def loss(scan, params, init, resets):
        return total(*scan(cell, params, init, xs, reverse=reverse, **flags, **resets))

    reference, forward = by_each(loss, params, init, resets)
    assert_close(forward, reference)


def test_the_gradient_of_init_alone():
    cell = make_cell("elman")
    params, init, xs = problem(cell, 4, (2,))
    reference, forward = by_each(lambda scan, init: total(*scan(cell, params, init, xs)), init)
    assert_close(forward, reference)


def test_flags_that_all_rows_share():
    cell = make_cell("elman")
    params, init, xs = problem(cell, 6, (2,))
    check_exact(cell, params, init, xs, is_first=jnp.arange(6) == 3, valid=jnp.arange(6) != 1)


@pytest.mark.parametrize("length", [0, 1])
def test_few_steps(length):
    check_exact(lambda w, h, x: (w * h, h + w), jnp.array(1.5), jnp.array(2.0), None, length=length)


@pytest.mark.parametrize(
    "used",
    {
        "the last carry": lambda h, ys: jnp.sum(h**2),
        "an output": lambda h, ys: ys[0][2],
        "the old carry": lambda h, ys: jnp.sum(ys[1] ** 2),
        "the params": lambda h, ys: jnp.sum(ys[2] ** 2),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_the_loss_uses(used):
    """Each of the ways from a loss to the weights, alone."""

    def step(w, h, x):
        new = jnp.tanh(w * h + x)
        return new, (new.sum(), h, w)

    w, init, xs = (random_like(jax.ShapeDtypeStruct(shape, float), i) for i, shape in enumerate(((3,), (3,), (5, 3))))
    reference, forward = by_each(lambda scan, *args: used[1](*scan(step, *args, xs)), w, init)
    assert_close(forward, reference)


def first_order(M):
    """An influence that forgets all but the last step, so that what it gives is biased."""
    exact = bptt.influences.rtrl()

    def advance(step, params, carry, x, M, key):
        return exact.advance(step, params, carry, x, jax.tree.map(jnp.zeros_like, M), key)

    return exact._replace(advance=advance)


def test_a_biased_influence_gives_another_gradient():
    """That of BPTT in windows of one step; the gradient of init does not depend on it."""
    cell = make_cell("gru")
    params, init, xs = problem(cell, 6, (2,))
    scans = (
        partial(bptt.windowed_scan, window=1),
        partial(bptt.forward_scan, influence=first_order(None)),
        bptt.scan,
    )
    windowed, biased, exact = by_each(lambda scan, *args: total(*scan(cell, *args, xs)), params, init, scans=scans)
    assert_close(biased[1][0], windowed[1][0])
    assert_close(biased[1][1], exact[1][1])
    assert abs(biased[1][0].W_hh / exact[1][0].W_hh - 1).max() > 0.1


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_gradients_have_the_dtype_of_the_params(dtype):
    cell = make_cell("elman", dtype)
    params, init, xs = problem(cell, 20, (2,), dtype)
    found = by_each(lambda scan, *args: total(*scan(cell, *args, xs)).astype(float), params, init)
    assert {leaf.dtype for leaf in jax.tree.leaves(found[1][1])} == {jnp.dtype(dtype)}
    reference, forward = jax.tree.map(lambda leaf: leaf.astype(float), found)
    assert_close(forward, reference, rtol=1e-5 if dtype == jnp.float32 else 0.05)


def test_second_derivatives_and_forward_mode():
    cell = make_cell("elman")
    params, init, xs = problem(cell, 3)
    size = jax.flatten_util.ravel_pytree(params)[1]

    def loss(scan, flat):
        return total(*scan(cell, size(flat), init, xs))

    flat = jax.flatten_util.ravel_pytree(params)[0]

    @jax.jit
    def derivatives(flat):
        return [(jax.hessian(f)(flat), jax.jvp(f, (flat,), (flat,))) for f in (partial(loss, scan) for scan in SCANS)]

    reference, forward = derivatives(flat)
    assert_close(forward, reference)


def test_under_vmap():
    """Over rows that are mapped outside, with weights of their own."""
    cell = make_cell("elman")
    params, init, xs = problem(cell, 5)
    params = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), params)

    def loss(scan, params):
        return jax.vmap(lambda params: total(*scan(cell, params, init, xs)))(params).sum()

    reference, forward = by_each(loss, params)
    assert_close(forward, reference)


def temporary_bytes(scan, steps, loss):
    cell = bptt.gru(3, 8)
    shapes = jax.eval_shape(cell.init, jax.random.key(0)), jax.ShapeDtypeStruct((steps, 2, 3), jnp.float32)

    def value(params, xs):
        return loss(*scan(cell, params, cell.initial_carry((2,)), xs))

    return jax.jit(jax.grad(value)).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


def test_memory_does_not_depend_on_time():
    with jax.enable_x64(False):

        def last(h, ys):
            return jnp.sum(h**2)

        short, long = (temporary_bytes(bptt.forward_scan, steps, last) for steps in (100, 100_000))
        assert long <= short + 64
        assert temporary_bytes(bptt.scan, 1_000, last) > 4 * long
        # The loss keeps ys and makes their gradient: two arrays of 2 · 8 floats a step.
        short, long = (
            temporary_bytes(bptt.forward_scan, steps, lambda h, ys: jnp.sum(ys**2)) for steps in (100, 100_000)
        )
        assert long - short <= 2 * 99_900 * 16 * 4


def test_no_gradient_of_inputs():
    cell = make_cell("elman")
    params, init, xs = problem(cell, 4)

    def loss(xs, scan):
        return total(*scan(cell, params, init, xs))

    with pytest.raises(TypeError, match=r"forward_scan has no gradient of xs.*adjoint_scan"):
        jax.grad(loss)(xs, bptt.forward_scan)
    assert_close(
        jax.jvp(partial(loss, scan=bptt.forward_scan), (xs,), (xs,)),
        jax.jvp(partial(loss, scan=bptt.scan), (xs,), (xs,)),
    )
    stopped = jax.grad(lambda xs: loss(jax.lax.stop_gradient(xs), bptt.forward_scan))(xs)
    assert not stopped.any()


def test_called_as_lax_scan():
    cell = make_cell("elman")
    params, init, xs = problem(cell, 4)

    def loss(scan, params):
        return total(*scan(lambda h, x: cell.step(params, h, x), init, xs))

    reference, forward = by_each(loss, params, scans=(jax.lax.scan, bptt.as_lax(bptt.forward_scan)))
    assert_close(forward, reference)


def test_a_step_that_branches():
    def step(w, h, x):
        return jax.lax.cond(x > 0, lambda h: jnp.sqrt(w * h), lambda h: w * h + x, h), h

    check_exact(step, jnp.array(0.7), jnp.array(0.5), jnp.array([1.0, -0.1, 2.0, 1.0]))


def test_a_key_of_its_own_for_each_row_and_step():
    """An influence that counts nothing but its keys: the sum of what all of them draw."""

    def init(step, params, carry, x):
        return jax.tree.map(jnp.zeros_like, params)

    def advance(step, params, carry, x, M, key):
        return jax.tree.map(lambda leaf: jax.random.uniform(key, leaf.shape, leaf.dtype), M)

    def pull(M, carry_bar):
        return jax.tree.map(lambda leaf: leaf * carry_bar, M)

    def drawn(key, steps, batch):
        influence = bptt.Influence(init, advance, pull)

        def loss(w):
            ys = bptt.forward_scan(
                lambda w, h, x: (h + w, h + w), w, jnp.zeros(batch), length=steps, influence=influence, key=key
            )[1]
            return jnp.sum(ys * jnp.asarray(2.0 ** -np.arange(steps * batch).reshape(steps, batch)))

        return jax.grad(loss)(jnp.array(1.0))

    one, other = (drawn(jax.random.key(seed), 3, 2) for seed in (0, 1))
    assert one == drawn(jax.random.key(0), 3, 2)
    assert one != other
    # If rows or steps shared a draw u, this would be the sum of fewer numbers: u Σ 2⁻ⁱ.
    assert abs(one - drawn(jax.random.key(0), 3, 1)) > 1e-3


MODES = {
    "disable_jit": jax.disable_jit,
    "checking_leaks": jax.checking_leaks,
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
}


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.slow
def test_modes(mode):
    cell = make_cell("elman")
    params, init, xs = problem(cell, 4, (2,))
    flags = {"is_first": jnp.arange(8).reshape(4, 2) == 3, "valid": jnp.arange(8).reshape(4, 2) != 4}

    def gradients(scan):
        return jax.grad(lambda params, init: total(*scan(cell, params, init, xs, **flags)), argnums=(0, 1))(
            params, init
        )

    expected = gradients(bptt.scan)
    with mode():
        assert_close(gradients(bptt.forward_scan), expected)


def test_wrong_arguments():
    cell = make_cell("elman")
    params, init, xs = problem(cell, 4)
    with pytest.raises(TypeError, match="influence is a function, but it says how dc/dθ is carried forward"):
        bptt.forward_scan(cell, params, init, xs, influence=bptt.influences.rtrl)
    with pytest.raises(TypeError, match="key"):
        bptt.forward_scan(cell, params, init, xs, key=0)
    ref = jax.new_ref(jnp.zeros(()))

    def writes(w, h, x):
        ref[...] += 1.0
        return w * h, h

    with pytest.raises(TypeError, match=r"is mutable \(a Ref\), and forward_scan computes each step more than once"):
        jax.grad(lambda w: bptt.forward_scan(writes, w, jnp.array(1.0), length=2)[0])(jnp.array(2.0))
