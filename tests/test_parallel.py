"""`parallel_scan` and the backward pass that all strategies parallel in time share."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from reference import assert_close, cases, make_cell, problem, random_like

import jaxbptt as bptt
from jaxbptt.programs.evaluate import subjaxprs

UNITS = 4


def diagonal(params, h, x):
    a = jax.nn.sigmoid(x * params["gate"])
    h = a * h + params["input"] * x
    return h, h**2


def dense(params, h, x):
    h = h @ params["matrix"].T + params["input"] * x
    return h, jnp.tanh(h)


def rotation(params, carry, x):
    """Two leaves in blocks of two: a complex number as a pair of real ones."""
    angle = params["gate"] * x
    re, im = carry["re"], carry["im"]
    re, im = jnp.cos(angle) * re - jnp.sin(angle) * im + x, jnp.sin(angle) * re + jnp.cos(angle) * im
    return {"re": re, "im": im}, re * params["input"]


def complex_rotation(params, z, x):
    """Linear over the real numbers alone: the conjugate of z enters."""
    angle, strength = params["gate"] * x, jnp.broadcast_to(params["input"], x.shape)
    z = jax.lax.complex(jnp.cos(angle), jnp.sin(angle)) * z + jax.lax.complex(0.2 * strength, x / 9) * z.conj()
    z = z + jax.lax.complex(x, strength)
    return z, z.real * z.imag


def layers(params, carry, x):
    """Gates of each layer read the states below: the second is dense, the third diagonal."""
    first, below = diagonal(params, carry[0], x)
    second = jax.nn.sigmoid(below.sum(-1, keepdims=True)) * (carry[1] @ params["matrix"]) + below
    third = jnp.tanh(second) * carry[2] + carry[0]
    return (first, second, third), third + x


def with_counter(params, carry, x):
    count, h = carry
    return (count + 1, h / (1 + count) + params["input"] * x), h * count


def with_branch(params, h, x):
    """The branch that is not taken has no finite derivative there."""
    a = jax.lax.cond(x.sum() > 0, lambda x: jnp.sqrt(x.sum()), lambda x: jnp.zeros_like(x.sum()), x)
    return a * h + params["input"], h


def leaf(*batch):
    return jnp.zeros((*batch, UNITS))


# A step, and its carry for rows of any number.
STEPS = {
    "diagonal": (diagonal, leaf),
    "dense": (dense, leaf),
    "rotation": (rotation, lambda *batch: {"re": leaf(*batch), "im": leaf(*batch)}),
    "complex": (complex_rotation, lambda *batch: leaf(*batch).astype(jnp.complex128)),
    "layers": (layers, lambda *batch: (leaf(*batch), leaf(*batch), leaf(*batch))),
}
PARALLEL = {
    "parallel_scan": bptt.parallel_scan,
    "parallel_scan (chunks)": partial(bptt.parallel_scan, chunk_length=5),
    "parallel_adjoint_scan (chunks)": partial(bptt.parallel_adjoint_scan, chunk_length=3),
}


def arguments(carry, steps, batch, seed=0):
    rng = np.random.default_rng(seed)
    params = {name: jnp.asarray(rng.uniform(0.2, 0.9, UNITS)) for name in ("gate", "input")}
    params["matrix"] = jnp.asarray(rng.standard_normal((UNITS, UNITS)) / 4)
    return params, random_like(carry(*batch), seed + 1), jnp.asarray(rng.standard_normal((steps, *batch, UNITS)))


def random_flags(carry, steps, batch):
    rng = np.random.default_rng(5)
    return {
        "is_first": rng.random((steps, *batch)) < 0.2,
        "valid": rng.random((steps, *batch)) < 0.7,
        "reset_carry": random_like(carry(*batch), 6),
    }


def gradient(scan, step, params, init, xs, flags):
    """Outputs, and the gradients of all that can have one, under random cotangents."""
    reset = flags.get("reset_carry")

    def loss(params, init, xs, reset):
        options = flags | ({} if reset is None else {"reset_carry": reset})
        outputs = scan(step, params, init, xs, **options)
        terms = jax.tree.map(lambda w, out: jnp.sum((w * out).real), random_like(outputs, 7), outputs)
        return sum(jax.tree.leaves(terms)), outputs

    wrt = (0, 1, 2) if reset is None else (0, 1, 2, 3)
    return jax.jit(jax.value_and_grad(loss, argnums=wrt, has_aux=True))(params, init, xs, reset)


def compare(name, steps, batch, flagged, strategies=PARALLEL, rtol=1e-9, **options):
    step, carry = STEPS[name]
    args = arguments(carry, steps, batch)
    flags = random_flags(carry, steps, batch) if flagged else {}
    # With flags `scan` uses jax.checkpoint, which JAX can't differentiate for complex numbers ("reduce_precision").
    reference = bptt.adjoint_scan if name == "complex" and flagged else bptt.scan
    expected = gradient(partial(reference, **options), step, *args, flags)
    for scan in strategies.values():
        assert_close(gradient(partial(scan, **options), step, *args, flags), expected, rtol=rtol)


SIZES = [(7, (2,), True), (64, (), False), (0, (2,), False), (1, (2,), True), (2, (), True), (7, (3, 2), True)]


@pytest.mark.parametrize(("steps", "batch", "flagged"), SIZES, ids=str)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.costly
def test_equals_scan(name, steps, batch, flagged):
    compare(name, steps, batch, flagged)


@pytest.mark.slow
@pytest.mark.parametrize("name", STEPS)
def test_equals_scan_over_many_steps(name):
    compare(name, 1003, (2,), True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rotation", "layers"])
def test_equals_scan_in_reverse(name):
    compare(name, 7, (2,), True, reverse=True)


@pytest.mark.parametrize("by_hand", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_stack_of_diagonal_cells(by_hand):
    """A gate of an upper layer depends on the states below, so each layer is affine once these are known."""
    cell = bptt.stack(*(make_cell(name) for name in ("lru", "min_lstm")), bptt.rg_lru(UNITS, UNITS, dtype=jnp.float64))
    args, flags = problem(cell, 12, (2,)), random_flags(lambda *batch: cell.initial_carry(batch), 12, (2,))
    step = cell if by_hand else cell.step
    assert_close(gradient(bptt.parallel_scan, step, *args, flags), gradient(bptt.scan, step, *args, flags), rtol=1e-9)


def test_what_is_no_number_runs_in_sequence():
    def carry(*batch):
        return jnp.zeros(batch, int), leaf(*batch)

    params, (_, h), xs = arguments(carry, 9, ())
    init = jnp.array(0), h

    def last(scan, h):
        return jnp.sum(scan(with_counter, params, (init[0], h), xs)[1])

    for scan in PARALLEL.values():
        assert_close(jax.value_and_grad(partial(last, scan))(h), jax.value_and_grad(partial(last, bptt.scan))(h))


@pytest.mark.parametrize("mixing", [None, 0.5])
def test_products_that_overflow_do_not_leak_nan(mixing):
    """Coefficients of 1e20 at steps whose state is 0, or whose cotangent is 0 for a reset after them."""

    def step(p, h, x):
        h = p * (h if mixing is None else h + mixing * h[::-1]) + x
        return h, h

    xs = jnp.zeros((40, UNITS)).at[-3:].set(1.0)
    flags = {"is_first": np.arange(40) == 38}

    def value_and_gradients(scan):
        def loss(p, h, xs):
            last, ys = scan(step, p, h, xs, **flags)
            return jnp.sum(last), ys

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(1e20, leaf(), xs)

    expected = value_and_gradients(bptt.scan)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    for scan in (bptt.parallel_scan, bptt.parallel_adjoint_scan):
        assert_close(value_and_gradients(scan), expected)
    # Nor does a state that overflowed get past a reset.
    args = step, 1e20, leaf() + 1, xs
    assert_close(bptt.parallel_scan(*args, **flags)[0], bptt.scan(*args, **flags)[0])


@pytest.mark.slow
def test_a_branch_does_not_leak_nan():
    params, init, xs = arguments(leaf, 6, ())
    expected = gradient(bptt.scan, with_branch, params, init, xs, {})
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    for scan in PARALLEL.values():
        assert_close(gradient(scan, with_branch, params, init, xs, {}), expected)


@jax.custom_vjp
def clipped(h):
    return h


clipped.defvjp(lambda h: (h, None), lambda _, bar: (jnp.clip(bar, -0.1, 0.1),))


def test_a_backward_that_is_not_linear_runs_in_sequence():
    """Gradients clipped at every step, inside of the step or in an adjoint by hand: no affine recursion."""
    args = arguments(leaf, 7, ())
    cell = make_cell("gru")
    forward, backward, contract = cell.adjoint

    def clipping(params, residuals, x, h_bar, y_bar):
        return backward(params, residuals, x, jnp.clip(h_bar, -0.1, 0.1), y_bar)

    def step(params, h, x):
        return diagonal(params, clipped(h), x)

    by_hand = bptt.Adjoint(forward, clipping, contract)
    for scan in (bptt.parallel_adjoint_scan, PARALLEL["parallel_adjoint_scan (chunks)"]):
        expected = gradient(bptt.scan, step, *args, {})
        assert_close(gradient(scan, step, *args, {}), expected)
        of_cell = cell, *problem(cell, 7), {}
        expected = gradient(partial(bptt.adjoint_scan, adjoint=by_hand), *of_cell)
        assert_close(gradient(partial(scan, adjoint=by_hand), *of_cell), expected)


NOT_AFFINE = {
    "carry depends on carry": (lambda p, h, x: (h * h, h), leaf()),
    "carry['h'] depends on carry['h']": (lambda p, c, x: ({"h": jnp.tanh(c["h"])}, x), {"h": leaf()}),
    "carry[0] depends on carry[1]": (lambda p, c, x: ((c[0] * c[1], c[0]), x), (leaf(), leaf())),
    "carry[1] depends on carry[1]": (
        lambda p, c, x: ((c[0], c[0] * jnp.where(c[1] > 0, 1.0, 2.0)), x),
        (leaf(), leaf()),
    ),
}


@pytest.mark.parametrize("what", NOT_AFFINE)
def test_names_what_is_not_affine(what):
    step, init = NOT_AFFINE[what]
    with pytest.raises(ValueError, match=re.escape(f"but the coefficient of {what}: use newton_scan")):
        bptt.parallel_scan(step, None, init, leaf(3))


def test_refuses_a_mutable_array():
    ref = jax.new_ref(jnp.zeros(()))

    def step(p, h, x):
        ref[...] += 1
        return h + x, h

    with pytest.raises(TypeError, match=r"is mutable \(a Ref\), and parallel_scan computes each step more than once"):
        bptt.parallel_scan(step, None, leaf(), leaf(3))


@pytest.mark.parametrize("chunk_length", [0, 2.5])
def test_chunk_length_is_checked(chunk_length):
    for scan in (bptt.parallel_scan, bptt.parallel_adjoint_scan):
        with pytest.raises(ValueError, match=r"chunk_length is .*, but it counts time steps"):
            scan(diagonal, *arguments(leaf, 3, ()), chunk_length=chunk_length)


def loops(jaxpr):
    """Iterations of every loop in a traced program."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("scan", "while"):
            yield eqn.params.get("length", np.inf)
        for inner, _ in subjaxprs(eqn):
            yield from loops(inner)


def traced(scan, name, steps):
    step, carry = STEPS[name]
    args = jax.eval_shape(lambda: arguments(carry, 2, ()))[:2]
    xs = jax.ShapeDtypeStruct((steps, UNITS), jnp.float64)

    def gradients(params, init, xs):
        def loss(params, init, xs):
            return jnp.sum(scan(step, params, init, xs)[1] ** 2)

        return jax.grad(loss, argnums=(0, 1, 2))(params, init, xs)

    return jax.make_jaxpr(gradients)(*args, xs).jaxpr


@pytest.mark.parametrize("name", STEPS)
def test_no_step_waits_for_the_one_before(name):
    assert max(loops(traced(bptt.parallel_scan, name, 1003)), default=0) <= 64
    assert max(loops(traced(bptt.scan, name, 1003))) == 1003  # so this can fail


def test_program_grows_with_the_logarithm_of_time():
    def equations(steps):
        return str(traced(bptt.parallel_scan, "layers", steps)).count("\n")

    assert equations(2**16) < 2 * equations(2**10)


def test_no_associative_scan_of_complex_numbers():
    def complex_slices(steps):
        text = str(traced(bptt.parallel_scan, "complex", steps))
        return sum("c128" in line for line in text.splitlines())

    assert complex_slices(2**12) == complex_slices(2**6)


def temporary_bytes(steps, **options):
    cell = bptt.elman(3, 32)
    params, init = cell.init(jax.random.key(0)), cell.initial_carry()

    def loss(params, xs):
        return jnp.sum(bptt.parallel_adjoint_scan(cell, params, init, xs, **options)[1] ** 2)

    xs = jax.ShapeDtypeStruct((steps, 3), jnp.float32)
    return jax.jit(jax.grad(loss)).lower(params, xs).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_chunks_bound_the_memory():
    """For fixed chunks only what has one entry for each unit and step grows with T: a few arrays of T n numbers."""
    short, long = (temporary_bytes(steps, chunk_length=16) for steps in (256, 2048))
    assert long - short < 8 * (2048 - 256) * 32 * 4
    whole = temporary_bytes(2048, chunk_length=2048)
    assert whole > 2048 * 32 * 32 * 4
    assert temporary_bytes(2048) < whole / 2  # the default is such a chunk


@pytest.mark.slow
def test_float32_is_as_near_to_float64_as_the_loop():
    def run(scan, dtype):
        rng = np.random.default_rng(0)
        args = (
            {"gate": 0.1 * rng.random(UNITS), "input": rng.random(UNITS)},
            np.zeros(UNITS),
            rng.random((10_000, UNITS)),
        )
        args = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), args)

        def loss(params, init, xs):
            return jnp.mean(scan(diagonal, params, init, xs)[1])

        return jax.device_get(jax.value_and_grad(loss, argnums=(0, 1, 2))(*args))

    exact = jax.tree.leaves(run(bptt.scan, jnp.float64))
    strategies = bptt.scan, bptt.parallel_scan, bptt.parallel_adjoint_scan
    in_sequence, *others = (
        [
            np.max(np.abs(a - b)) / np.max(np.abs(b))
            for a, b in zip(jax.tree.leaves(run(s, jnp.float32)), exact, strict=True)
        ]
        for s in strategies
    )
    for errors in others:
        assert max(errors) < 10 * max(in_sequence)


def test_half_precision_is_summed_in_single():
    ones = jnp.ones((400,), jnp.bfloat16)
    h, _ = bptt.parallel_scan(lambda p, h, x: (h + x, h), None, jnp.zeros((), jnp.bfloat16), ones)
    assert h.dtype == jnp.bfloat16
    assert abs(float(h) - 400) <= 2  # in bfloat16 the sum stops at 256


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diagonal", "complex", "layers"])
def test_derivatives_of_second_order_and_forward_mode(name):
    step, carry = STEPS[name]
    params, init, xs = arguments(carry, 6, ())

    def loss(scan, params):
        return jnp.sum(jnp.sin(scan(step, params, init, xs)[1]))

    tangent = random_like(params, 3)
    for way in (jax.hessian, lambda f: jax.jacrev(jax.jacrev(f)), lambda f: lambda p: jax.jvp(f, (p,), (tangent,))):
        expected = jax.jit(way(partial(loss, bptt.scan)))(params)
        for scan in (bptt.parallel_scan, bptt.parallel_adjoint_scan):
            assert_close(jax.jit(way(partial(loss, scan)))(params), expected, rtol=1e-9)


@pytest.mark.slow
def test_vmap():
    step, carry = STEPS["layers"]
    args = arguments(carry, 7, (3,))
    rows = 0, jax.tree.map(lambda _: 0, args[1]), 1

    def by_row(scan, params, init, xs):
        return jax.value_and_grad(lambda *args: jnp.sum(scan(step, *args)[1] ** 2), argnums=(0, 1, 2))(params, init, xs)

    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf, -leaf]), args[0])
    mapped = [jax.vmap(partial(by_row, scan), rows)(many, *args[1:]) for scan in (bptt.scan, bptt.parallel_scan)]
    assert_close(mapped[1], mapped[0], rtol=1e-9)


@cases("platform", {"cuda": "cuda", "tpu": "tpu"})
def test_lowers_for_accelerators(platform):
    step, carry = STEPS["layers"]
    args = arguments(carry, 20, (2,))

    def loss(scan, *args):
        return jnp.sum(scan(step, *args)[1] ** 2)

    for scan in (bptt.parallel_scan, bptt.parallel_adjoint_scan):
        export.export(jax.jit(jax.grad(partial(loss, scan))), platforms=[platform])(*args)
