"""What `lax.scan` runs, every strategy runs: a table of steps and a list of transformations, each against `lax.scan`."""

from collections import Counter
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from equinox.internal import nondifferentiable, nondifferentiable_backward
from jax import lax
from jax.experimental import checkify, io_callback
from jax.experimental.ode import odeint
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.extend.core import Primitive
from jax.interpreters import mlir
from reference import assert_close, cases, gradient_of, make_cell, problem

import jaxbptt as bptt

STEPS = 23  # several segments wherever time is cut, and a shorter one left over


def lax_scan(step, params, init, xs=None, **options):
    return lax.scan(partial(getattr(step, "step", step), params), init, xs, **options)


STRATEGIES = {
    "scan": bptt.scan,
    "adjoint_scan": bptt.adjoint_scan,
    "checkpointed_scan": bptt.checkpointed_scan,
    "checkpointed_scan, segment_length": partial(bptt.checkpointed_scan, segment_length=4),
    "checkpointed_scan, checkpoints": partial(bptt.checkpointed_scan, checkpoints=3),
    "checkpointed_scan, 1 checkpoint": partial(bptt.checkpointed_scan, checkpoints=1),
    "parallel_adjoint_scan": bptt.parallel_adjoint_scan,
    "truncated_scan": partial(bptt.truncated_scan, truncation_length=10**6),
    "windowed_scan": partial(bptt.windowed_scan, window=10**6),
}
# With a Cell, and with its step alone, whose backward is then derived.
WITH_CELL = STRATEGIES | {
    f"{name}, derived": lambda cell, *args, scan=STRATEGIES[name], **options: scan(cell.step, *args, **options)
    for name in ("adjoint_scan", "checkpointed_scan, checkpoints")
}


def assert_all_like_lax_scan(run, strategies=STRATEGIES, *, jit=True):
    """`run(scan)` is the same for every strategy as for `lax.scan`; whatever fails is told by name, all of it."""
    transform = jax.jit if jit else lambda f: f
    expected, errors = transform(lambda: run(lax_scan))(), []
    for name, strategy in strategies.items():
        try:
            assert_close(transform(lambda strategy=strategy: run(strategy))(), expected)
        except Exception as error:
            error.add_note(f"by {name}")
            errors.append(error)
    if errors:
        raise ExceptionGroup(f"not like lax.scan: {len(errors)} of {len(strategies)} strategies", errors)


def total(tree):
    """A number that everything with a derivative in a tree goes into, each entry otherwise."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact) and leaf.size]
    return sum(jnp.sum(jnp.sin(leaf.real + leaf.imag + 0.3 * i)) for i, leaf in enumerate(leaves))


class Case(NamedTuple):
    """A step `(closed, params, carry, x)`, which closes over `closed`, and the leaves that its loss is differentiated by.

    None of `params`, `carry`, `x` and `closed` reaches an operation without derivative where it is differentiated.
    """

    step: Any
    wrt: tuple[str, ...] = ("params", "init", "xs")
    params: Any = 0.5
    init: Any = 0.3
    xs: Any = None
    closed: Any = None
    read: Any = lambda carry, ys: (carry, ys)

    def run(self, scan, *, gradient=True):
        xs = np.linspace(-1.0, 1.2, STEPS) if self.xs is None else self.xs
        args = {"closed": self.closed, "params": self.params, "init": self.init, "xs": xs}
        # Python numbers are weakly typed.
        args = jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else jnp.asarray(np.asarray(leaf)), args)
        args = jax.tree.map(jnp.asarray, args)

        def loss(closed, params, init, xs):
            return total(self.read(*scan(partial(self.step, closed), params, init, xs)))

        return gradient_of(loss, args, self.wrt) if gradient else loss(**args)


# What has no derivative, or none in reverse mode, of a number.


def in_a_while_loop(x):
    return lax.while_loop(lambda state: state[0] < 3, lambda state: (state[0] + 1, jnp.sin(state[1])), (0, x))[1]


def in_a_callback(x):
    return io_callback(lambda x: np.asarray(2 * x), jax.ShapeDtypeStruct(x.shape, x.dtype), x)


def in_a_pure_callback(x):
    return jax.pure_callback(lambda x: np.asarray(2 * x), jax.ShapeDtypeStruct(x.shape, x.dtype), x)


without_derivative_p = Primitive("without_derivative")
without_derivative_p.def_impl(jnp.cos)
without_derivative_p.def_abstract_eval(lambda aval: aval)
mlir.register_lowering(without_derivative_p, mlir.lower_fun(jnp.cos, multiple_results=False))


@jax.custom_jvp
def not_to_be_differentiated(x):
    return 2 * x


@not_to_be_differentiated.defjvp
def _(primals, tangents):
    raise AssertionError("a derivative was asked for")


def with_vectors(factorize):
    """Of a 2 × 2 matrix around x; its derivative is not implemented."""
    return lambda x: jnp.abs(factorize(jnp.array([[1.0, 0.2], [0.3, 2.0]]) + x * jnp.eye(2))).sum()


NO_DERIVATIVE = {
    "while": in_a_while_loop,
    "io_callback": in_a_callback,
    "pure_callback": in_a_pure_callback,
    "nextafter": lambda x: jnp.nextafter(x, 3.0),
    "primitive": without_derivative_p.bind,
    "custom_jvp": not_to_be_differentiated,
    "svd": with_vectors(lambda a: jnp.linalg.svd(a[:, :1], full_matrices=True)[0]),
    "schur": with_vectors(lambda a: jax.scipy.linalg.schur(a)[0]),
}


@cases("function", NO_DERIVATIVE)
def test_values_need_no_derivative(function):
    """Of x, of the carry and of the params, where nothing is differentiated."""
    step = lambda v, w, h, x: (jnp.tanh(function(h) + w * function(x) + function(w) + function(v)), h)
    assert_all_like_lax_scan(partial(Case(step, closed=0.2).run, gradient=False))


@cases("function", NO_DERIVATIVE)
def test_derivatives_by_the_params_need_none_of_the_inputs(function):
    step = lambda v, w, h, x: (jnp.tanh(w * h + function(x) + h * function(v)), h * x)
    assert_all_like_lax_scan(Case(step, wrt=("params",), closed=0.2).run)


PARTS = {
    "only init": Case(lambda v, w, h, x: (h * jnp.cos(in_a_while_loop(x) + in_a_while_loop(w)), h), wrt=("init",)),
    "only xs": Case(lambda v, w, h, x: (jnp.tanh(in_a_while_loop(w) * h + x), h), wrt=("xs",)),
    "only what is closed over": Case(
        lambda v, w, h, x: (jnp.tanh(v * h + in_a_while_loop(w) + in_a_while_loop(x)), h), wrt=("closed",), closed=0.4
    ),
    "init and what is closed over": Case(
        lambda v, w, h, x: (jnp.tanh(v * h + in_a_while_loop(w) + in_a_while_loop(x)), h),
        wrt=("closed", "init"),
        closed=0.4,
    ),
    "only one leaf of the params": Case(
        lambda v, p, h, x: (jnp.tanh(p["W"] * h + in_a_while_loop(p["frozen"]) * x), h),
        wrt=("W",),
        params={"W": 0.5, "frozen": 0.7},
    ),
    "only one leaf of the inputs": Case(
        lambda v, w, h, x: (jnp.tanh(w * h + x["a"] + in_a_while_loop(x["b"])), h),
        wrt=("a",),
        xs={"a": np.linspace(-1.0, 1.2, STEPS), "b": np.linspace(1.0, -0.3, STEPS)},
    ),
    "a carry leaf that nothing differentiated reaches": Case(
        lambda v, w, c, x: ({"h": jnp.tanh(w * c["h"] + c["s"]), "s": in_a_while_loop(c["s"]) + 0.1 * x}, c["h"]),
        wrt=("params", "h"),
        init={"h": 0.3, "s": 0.2},
    ),
    "a carry leaf that is reached after two steps": Case(
        lambda v, w, c, x: ({"a": jnp.sin(c["b"]), "b": jnp.sin(c["c"] + x), "c": 0.5 * c["c"] + w}, c["a"]),
        wrt=("params",),
        init={"a": 0.3, "b": 0.2, "c": 0.1},
    ),
    "a carry leaf that ends what is differentiated": Case(
        lambda v, w, c, x: ({"h": x, "s": 0.5 * c["s"] + c["h"] * w}, c["s"]), init={"h": 0.3, "s": 0.2}
    ),
    "a carry leaf that leads nowhere": Case(
        lambda v, w, c, x: ({"h": jnp.tanh(w * c["h"] + x), "s": in_a_while_loop(c["s"])}, c["h"]),
        wrt=("params", "init"),
        init={"h": 0.3, "s": 0.2},
        read=lambda carry, ys: ys,
    ),
    "what goes past symbolic zeros": Case(
        lambda v, w, c, x: (
            {"h": jnp.tanh(in_a_while_loop(c["s"]) * w) + 0.1 * sum(of_symbolic_zeros(w, c["h"])), "s": c["s"]},
            x,
        ),
        wrt=("params", "h"),
        init={"h": 0.3, "s": 0.2},
    ),
    "stopped on the way": Case(
        lambda v, w, h, x: (jnp.tanh(w * h + in_a_while_loop(lax.stop_gradient(h + w)) * x), h),
    ),
    "an output that is not differentiated": Case(
        lambda v, w, h, x: (jnp.tanh(w * h + x), {"y": h, "z": in_a_while_loop(x)}), wrt=("params",)
    ),
    "nothing depends on it": Case(lambda v, w, h, x: (jnp.sin(h), x), wrt=("params", "closed"), closed=0.2),
    "nothing is differentiable": Case(lambda v, w, h, x: (h + 1, in_a_while_loop(x)), wrt=("params",), init=0),
}


@cases(
    "case",
    PARTS,
    "only one leaf of the params",
    "only what is closed over",
    "a carry leaf that nothing differentiated reaches",
    "what goes past symbolic zeros",
)
def test_derivatives_by_some_leaves(case):
    assert_all_like_lax_scan(case.run)


def test_a_loss_that_nothing_differentiated_leads_to():
    """Nor is there anything along time: no inputs, and a sum keeps nothing for its derivative."""

    def run(scan):
        step = lambda w, c, x: ({"h": jnp.tanh(c["h"]), "s": c["s"] + w}, c["s"])
        return jax.grad(lambda w: scan(step, w, {"h": 0.3, "s": 0.2}, None, length=STEPS)[0]["h"])(0.5)

    assert_all_like_lax_scan(run)


def custom_vjp(function, pull, **options):
    """Of a function with a backward `(args, bar)`."""
    result = jax.custom_vjp(function)
    result.defvjp(lambda *args: (function(*args), args), pull, **options)
    return result


def closing_over(array):
    """A custom derivative that reads an array which is no argument of it."""
    return custom_vjp(lambda h: jnp.sin(h) * array[0], lambda args, bar: (bar * jnp.cos(args[0]) * array[0],))


@cases("kind", {"jnp": jnp.array, "numpy": np.array})
@cases("jit", {"jit": True, "eager": False})
def test_custom_vjp_that_closes_over_an_array(kind, jit):
    """An array that is not differentiated, beside all that is."""
    f = closing_over(kind([0.7]))
    step = lambda v, w, h, x: (jnp.tanh(w * f(h) + f(x)), h)
    for wrt in (("params",), ("params", "init", "xs")):
        assert_all_like_lax_scan(Case(step, wrt=wrt).run, jit=jit)


def test_custom_vjp_that_closes_over_an_argument():
    """Of a function that is compiled: what it is a function of is not differentiated, else JAX itself can't."""

    def run(scan, array, gradient):
        f = closing_over(array)
        step = lambda v, w, h, x: (jnp.tanh(w * h + f(x)), h * f(v))
        return Case(step, wrt=("params", "init"), closed=0.2).run(scan, gradient=gradient)

    for gradient in (False, True):
        assert_all_like_lax_scan(lambda scan, g=gradient: jax.jit(partial(run, scan, gradient=g))(jnp.array([0.7])))


@eqx.filter_custom_vjp
def by_a_number(h, number):
    """h times a number, which equinox refuses to differentiate by."""
    return h * number


@by_a_number.def_fwd
def _(perturbed, h, number):
    return h * number, None


@by_a_number.def_bwd
def _(saved, bar, perturbed, h, number):
    return bar * number


EQUINOX = {
    "nondifferentiable": lambda v, w, h, x: (jnp.tanh(w * h + nondifferentiable(x) + nondifferentiable(v)), h),
    "nondifferentiable_backward": lambda v, w, h, x: (jnp.tanh(w * h + nondifferentiable_backward(x)), h),
    "filter_custom_vjp": lambda v, w, h, x: (jnp.tanh(w * by_a_number(h, x) + by_a_number(h, v)), h),
}


@cases("step", EQUINOX)
def test_marks_of_equinox(step):
    """What is not to be differentiated, and is not, raises nothing."""
    assert_all_like_lax_scan(partial(Case(step, closed=0.2).run, gradient=False))
    assert_all_like_lax_scan(Case(step, closed=0.2, wrt=("params",)).run)


def of_symbolic_zeros(w, h):
    """w · h, whose backward asks what is differentiated and what has a gradient."""

    @jax.custom_vjp
    def f(w, h):
        return w * h, jnp.sin(w)

    def forward(w, h):
        return f(w.value, h.value), (w.value, h.value, w.perturbed, h.perturbed)

    def backward(saved, bars):
        w, h, of_w, of_h = saved
        product_bar, sine_bar = (0.0 if isinstance(bar, jax.custom_derivatives.SymbolicZero) else bar for bar in bars)
        return product_bar * h + sine_bar * jnp.cos(w) if of_w else None, product_bar * w if of_h else None

    f.defvjp(forward, backward, symbolic_zeros=True)
    return f(w, h)


def that_saves_what_is_needed(w, h):
    """w · h, whose forward keeps a factor only where the other one is differentiated."""

    @jax.custom_vjp
    def f(w, h):
        return w * h

    def forward(w, h):
        kept = {"w": w.value if h.perturbed else None, "h": h.value if w.perturbed else None}
        return w.value * h.value, {name: value for name, value in kept.items() if value is not None}

    f.defvjp(
        forward,
        lambda saved, bar: tuple(bar * saved[name] if name in saved else None for name in ("h", "w")),
        symbolic_zeros=True,
    )
    return f(w, h)


SYMBOLIC = {
    "saved as needed": lambda v, w, h, x: (jnp.tanh(that_saves_what_is_needed(w, h) + x), h),
    "saved as needed, of carry and inputs": lambda v, w, h, x: (w * jnp.tanh(that_saves_what_is_needed(x, h)), h),
    "saved as needed, in a scan": lambda v, w, h, x: (
        lax.scan(lambda s, z: (jnp.tanh(that_saves_what_is_needed(w, s) + z), s), h, jnp.stack([x, x]))[0],
        h,
    ),
    "of params and carry": lambda v, w, h, x: (jnp.tanh(of_symbolic_zeros(w, h)[0] + x), h),
    "of a number and params": lambda v, w, h, x: (jnp.tanh(of_symbolic_zeros(2.0, w)[0] * h + x), h),
    "of carry and inputs": lambda v, w, h, x: (w * jnp.tanh(of_symbolic_zeros(x, h)[0]), of_symbolic_zeros(h, x)[1]),
    "of all, twice": lambda v, w, h, x: (
        jnp.tanh(sum(of_symbolic_zeros(of_symbolic_zeros(x, w)[0], h))),
        of_symbolic_zeros(x, x)[0],
    ),
}


@cases("step", SYMBOLIC)
@cases("wrt", {"+".join(names): names for names in (("params", "init", "xs"), ("params",), ("init", "xs"))})
def test_custom_vjp_with_symbolic_zeros(step, wrt):
    assert_all_like_lax_scan(Case(step, wrt=wrt).run)


# h, of which a custom backward says that its gradient is 2, or whatever else.
OWN_BACKWARD = {
    "python number": lambda args, bar: (2.0,),
    "numpy number": lambda args, bar: (np.float64(2.0),),
    "numpy array": lambda args, bar: (np.full((), 2.0),),
    "none": lambda args, bar: (None,),
    "not linear": lambda args, bar: (bar**2,),
}


@cases("backward", OWN_BACKWARD)
def test_custom_vjp_that_returns_no_array(backward):
    """And that is not linear: then the sum over lags is another gradient, and `windowed_scan` says so."""
    f = custom_vjp(lambda h: 0.5 * h, backward)
    step = lambda v, w, h, x: (jnp.tanh(w * f(h) + f(x)), h)
    exact = {name: strategy for name, strategy in STRATEGIES.items() if name != "windowed_scan"}
    assert_all_like_lax_scan(Case(step).run, exact)
    assert_all_like_lax_scan(Case(step, wrt=("params",)).run, exact)
    # Of what stands outside the recursion there is nothing to sum over lags.
    outside = lambda v, w, h, x: (0.5 * h, w * f(x) * h)
    assert_all_like_lax_scan(Case(outside, wrt=("xs",)).run)


# What is not finite, beside what the loss reads: 0 times its infinite derivative must not reach the gradient.
BESIDE = {
    "a carry that overflows": lambda w, c, x: ({"h": c["h"], "acc": c["acc"] * 1e200 * (1 + c["h"] ** 2)}, {}),
    "a carry that overflows by x": lambda w, c, x: ({"h": c["h"], "acc": c["acc"] * jnp.exp(900 * (x + 2))}, {}),
    "a logarithm of 0 in the outputs": lambda w, c, x: (c, {"log": jnp.log(0 * c["h"] * w * x)}),
    "a carry that overflows, and a custom_vjp with symbolic zeros": lambda w, c, x: (
        {"h": sum(of_symbolic_zeros(w, c["h"])), "acc": c["acc"] * 1e200 * (1 + c["h"] ** 2)},
        {},
    ),
    "a root of 0 in both": lambda w, c, x: (c | {"acc": jnp.sqrt(0 * c["h"])}, {"root": jnp.sqrt(0 * c["acc"] * w)}),
}
BESIDE_FLAGS = {
    "no flags": lambda t: {},
    "flags": lambda t: {"valid": t % 3 > 0, "is_first": t % 5 == 2},
}


@cases("flags", BESIDE_FLAGS)
@cases("beside", BESIDE, "a carry that overflows", "a carry that overflows, and a custom_vjp with symbolic zeros")
def test_what_the_loss_does_not_read_does_not_reach_the_gradient(beside, flags):
    def step(w, c, x):
        c, y = beside(w, c, x)
        h = jnp.tanh(w * c["h"] + x)
        return c | {"h": h}, y | {"h": h}

    init = {"h": jnp.array(0.3), "acc": jnp.array(1.0)}
    args = {"params": jnp.array(0.5), "init": init, "xs": jnp.linspace(-1.0, 1.2, STEPS)}
    options = flags(jnp.arange(STEPS))

    def run(scan):
        scan = bptt.scan if options and scan is lax_scan else scan

        def losses(params, init, xs):
            carry, ys = scan(step, params, init, xs, **options)
            return total(ys["h"]), total(carry["h"])

        return [gradient_of(lambda i=i, **args: losses(**args)[i], args, ("params", "init", "xs")) for i in (0, 1)]

    expected = jax.jit(lambda: run(lax_scan))()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(expected))
    assert_all_like_lax_scan(run)


# An array that is written to in place.


def counting_into(ref, w, h, x):
    """Adds up h on the side."""
    ref[...] = ref[...] + lax.stop_gradient(h)
    return jnp.tanh(w * h + x), h * ref[...]


@cases("jit", {"jit": True, "eager": False})
def test_mutable_arrays_in_values(jit):
    """Closed over, one of the params, and made inside the step."""

    def closed_over(scan):
        ref = jax.new_ref(jnp.array(0.25))
        out = scan(lambda w, h, x: counting_into(ref, w, h, x), 0.5, 0.3, jnp.linspace(-1.0, 1.2, STEPS))
        return out, ref[...]

    def among_the_params(scan):
        ref = jax.new_ref(jnp.array(0.25))
        step = lambda p, h, x: counting_into(p["ref"], p["w"], h, x)
        return scan(step, {"w": 0.5, "ref": ref}, 0.3, jnp.linspace(-1.0, 1.2, STEPS)), ref[...]

    for run in (closed_over, among_the_params):
        assert_all_like_lax_scan(run, jit=jit)


def test_mutable_arrays_inside_a_step():
    def step(v, w, h, x):
        ref = jax.new_ref(w * h)
        ref[...] += x
        return jnp.tanh(ref[...]), h

    # Refs can't be mapped over the time steps of a backward pass.
    in_sequence = {name: strategy for name, strategy in STRATEGIES.items() if name != "parallel_adjoint_scan"}
    assert_all_like_lax_scan(Case(step).run, in_sequence)


def test_mutable_arrays_beside_a_gradient():
    """Each step is run once, so what it writes is written once; `lax.scan` takes them as well."""

    def run(scan):
        ref = jax.new_ref(jnp.array(0.25))

        def step(w, h, x):
            ref[...] = ref[...] + 1.0
            return jnp.tanh(w * h + x), h

        loss = lambda w: total(scan(step, w, 0.3, jnp.linspace(-1.0, 1.2, STEPS)))
        return jax.value_and_grad(loss)(0.5), ref[...]

    once = {name: STRATEGIES[name] for name in ("scan", "adjoint_scan", "windowed_scan", "parallel_adjoint_scan")}
    assert_all_like_lax_scan(run, once)
    for name, strategy in STRATEGIES.items():
        if name not in once:
            with pytest.raises((TypeError, ValueError), match=r"jaxbptt\.scan"):
                run(strategy)


# What a step does on the side.


def test_side_effects_of_values_are_run_once():
    for name, strategy in STRATEGIES.items():
        count = Counter()

        def step(w, h, x, count=count):
            jax.debug.callback(lambda _: count.update(["debug"]), h)
            x = io_callback(lambda x: (count.update(["io"]), x)[1], jax.typeof(x), x)
            return jnp.tanh(w * h + x), h

        value, h = jax.jit(partial(strategy, step))(0.5, 0.3, jnp.linspace(-1.0, 1.2, STEPS))
        jax.block_until_ready((value, h))
        jax.effects_barrier()
        assert count == {"debug": STEPS, "io": STEPS}, name


@pytest.mark.slow
def test_side_effects_of_gradients():
    """Once for each time that a step is computed: `adjoint_scan` computes each once, others recompute it."""
    again = {"checkpointed_scan, segment_length": 2, "truncated_scan": 2}
    for name, strategy in STRATEGIES.items():
        count = Counter()

        def step(w, h, x, count=count):
            # Of h: what depends on nothing is moved out of the loop.
            jax.debug.callback(lambda _: count.update(["debug"]), h)
            return jnp.tanh(w * h + x), h

        loss = lambda w, strategy=strategy, step=step: total(strategy(step, w, 0.3, jnp.linspace(-1.0, 1.2, STEPS)))
        jax.block_until_ready(jax.jit(jax.grad(loss))(0.5))
        jax.effects_barrier()
        if name in ("scan", "adjoint_scan", "windowed_scan") or name in again:
            assert count == {"debug": again.get(name, 1) * STEPS}, name
        assert count["debug"] >= STEPS, name


# What can be put around a recurrence.

cell = make_cell("elman")


@pytest.fixture(scope="module")
def args():
    with jax.enable_x64(True):
        return problem(cell, STEPS)


def gradients(scan, *args, step=cell):
    return jax.value_and_grad(lambda *args: total(scan(step, *args)), argnums=(0, 1, 2))(*args)


@pytest.mark.parametrize("name", ["adjoint_scan", "checkpointed_scan, checkpoints, derived"])
def test_no_tracer_is_kept(name, args):
    """Over several segments; tests/test_modes.py has all strategies over one."""
    with jax.checking_leaks():
        jax.jit(partial(gradients, WITH_CELL[name]))(*args)
        valid = jnp.arange(STEPS) > 3
        jax.jit(partial(gradients, partial(WITH_CELL[name], valid=valid, is_first=~valid)))(*args)


# Every pair of axes: those of init and xs with each other, and each of them with params mapped and not mapped.
AXES = [((0, None)[(i + j) % 2], b, c) for i, b in enumerate((None, 0, 1)) for j, c in enumerate((None, 0, 1, 2))]


@pytest.mark.slow
@pytest.mark.parametrize("in_axes", AXES, ids=str)
def test_vmap_over_every_axis(in_axes):
    """Over params, first carry and inputs, with one batch axis or none inside."""
    params, init, xs = problem(cell, STEPS, (2,))

    def mapped(leaf, axis, scale):
        return leaf if axis is None else jnp.stack([leaf, scale * leaf, -leaf], axis)

    args = [
        jax.tree.map(lambda leaf, axis=axis: mapped(leaf, axis, 0.5), arg)
        for arg, axis in zip((params, init, xs), in_axes, strict=True)
    ]

    def run(scan):
        of_each = jax.vmap(partial(gradients, scan, step=cell), in_axes)(*args)

        def of_all(args):
            outs = jax.vmap(lambda *args: scan(cell, *args), in_axes)(*args)
            return total(outs), outs

        return of_each, jax.value_and_grad(of_all, has_aux=True)(tuple(args))

    # Half of the strategies in turn: each meets every axis of each argument.
    i, j = divmod(AXES.index(in_axes), 4)
    assert_all_like_lax_scan(run, dict(list(WITH_CELL.items())[(i + j // 2) % 2 :: 2]))


@pytest.mark.slow
def test_vmap_of_some_leaves():
    """Of the leaves of a dictionary one is mapped, and outputs are stacked on another axis."""
    step = lambda p, c, x: ({"a": jnp.tanh(p["u"] * c["a"] + x["k"]), "b": c["b"] * 0.9 + x["l"]}, c["a"] * c["b"])
    params, init = {"u": jnp.array(0.4), "v": jnp.array(1.0)}, {"a": jnp.array([0.1, 0.2]), "b": jnp.array(0.3)}
    xs = {"k": jnp.linspace(-1.0, 1.0, STEPS), "l": jnp.linspace(1.0, 0.0, 2 * STEPS).reshape(STEPS, 2)}
    in_axes = None, {"a": 0, "b": None}, {"k": None, "l": 1}

    def run(scan):
        outs = jax.vmap(partial(scan, step), in_axes, ({"a": 0, "b": 0}, 1))(params, init, xs)
        loss = lambda *args: total(jax.vmap(partial(scan, step), in_axes)(*args))
        with_spmd_name = jax.vmap(partial(gradients, scan, step=step), in_axes, axis_name="rows")
        return outs, jax.grad(loss, argnums=(0, 1, 2))(params, init, xs), with_spmd_name(params, init, xs)

    assert_all_like_lax_scan(run)


@pytest.mark.slow
def test_collectives_of_a_mapped_axis():
    """A step that looks at the other rows."""
    step = lambda v, w, h, x: (jnp.tanh(w * h + lax.pmean(h, "rows") + x), lax.psum(h, "rows"))
    inits = jnp.array([0.1, -0.3])
    assert_all_like_lax_scan(
        lambda scan: jax.vmap(lambda init: Case(step, init=init).run(scan), axis_name="rows")(inits)
    )


@pytest.mark.slow
def test_nested_both_ways():
    """A strategy in a step of `lax.scan`, `lax.scan` in a step of a strategy, and a strategy in a step of its own."""
    inner = lambda u, s, z: (jnp.tanh(u * s + z), s)

    def outer(scan, p, h, x):
        h, ys = scan(inner, p["u"], p["w"] * h, x)
        return h + jnp.sum(ys), ys

    params, xs = {"u": jnp.array(0.4), "w": jnp.array(0.8)}, jnp.linspace(-1.0, 1.2, 20).reshape(5, 4)

    def run(scan):
        pairs = (scan, lax_scan), (lax_scan, scan), (scan, scan)
        return [gradients(a, params, jnp.array(0.3), xs, step=partial(outer, b)) for a, b in pairs]

    assert_all_like_lax_scan(run)


@pytest.mark.slow
def test_nested_with_a_counter_and_a_key():
    """Beside what is differentiated, in the carry that `lax.scan` hands over."""

    def step(w, c, x):
        key, subkey = jax.random.split(c["key"])
        h = jnp.tanh(w * c["h"] + x + 0.1 * jax.random.normal(subkey))
        return {"h": h, "key": key, "n": c["n"] + 1}, h * c["n"].astype(float)

    init = {"h": jnp.array(0.3), "key": jax.random.key(0), "n": jnp.array(0)}

    def run(scan):
        def loss(h, w):
            outer = lambda c, _: scan(step, w, c, jnp.linspace(-1.0, 1.2, STEPS))
            return total(lax.scan(outer, init | {"h": h}, None, length=2))

        return jax.grad(loss, argnums=(0, 1))(0.3, 0.5)

    assert_all_like_lax_scan(run)


@pytest.mark.slow
def test_a_reset_carry_that_the_loss_does_not_read():
    """A leaf of it, at least; its gradient is 0."""
    step = lambda w, c, x: ({"a": jnp.tanh(w * c["a"] + x), "b": 0.5 * c["b"]}, c["a"])
    init, xs, is_first = (
        {"a": jnp.array(0.3), "b": jnp.array(0.2)},
        jnp.linspace(-1.0, 1.2, STEPS),
        jnp.arange(STEPS) == 3,
    )

    def run(scan):
        scan = bptt.scan if scan is lax_scan else scan
        return jax.grad(lambda to: total(scan(step, 0.5, init, xs, is_first=is_first, reset_carry=to)[1]))(init)

    assert_all_like_lax_scan(run)


def test_no_time_steps_with_flags():
    step = lambda w, h, x: (w * h + x, h)
    xs, flags = jnp.zeros((0, 2)), {"valid": jnp.ones((0, 2), bool), "is_first": jnp.ones((0, 2), bool)}

    def run(scan):
        scan = bptt.scan if scan is lax_scan else scan
        return jax.grad(lambda *args: total(scan(step, *args, **flags)), argnums=(0, 1, 2))(
            0.5, jnp.array([0.3, 0.4]), xs
        )

    at_least_one = {name: strategy for name, strategy in STRATEGIES.items() if "checkpoints" not in name}
    assert_all_like_lax_scan(run, at_least_one)


@pytest.mark.slow
def test_donation(args):
    expected_values = lax_scan(cell, *args)
    expected = jax.tree.map(jnp.subtract, args, gradients(lax_scan, *args)[1])
    for name, strategy in WITH_CELL.items():
        params, init, xs = jax.tree.map(jnp.copy, args)
        run = jax.jit(lambda params, init, xs, scan=strategy: scan(cell, params, init, xs), donate_argnums=1)
        assert_close(run(params, init, xs), expected_values)
        assert init.is_deleted(), name
        update = jax.jit(
            lambda *args, scan=strategy: jax.tree.map(jnp.subtract, args, gradients(scan, *args)[1]),
            donate_argnums=(0, 1, 2),
        )
        old = jax.tree.map(jnp.copy, args)
        assert_close(update(*old), expected)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old)), name


def test_shapes_alone(args):
    shapes = jax.eval_shape(lambda: args)
    for name, strategy in WITH_CELL.items():
        for run in (lambda scan, *args: scan(cell, *args), gradients):
            mine, expected = (jax.eval_shape(partial(run, scan), *shapes) for scan in (strategy, lax_scan))
            assert mine == expected, name


@pytest.mark.slow
def test_traced_evaluated_and_traced_again(args):
    """The trace is closed: evaluated, differentiated and traced once more it is the same function."""

    def run(scan):
        traced = jax.make_jaxpr(lambda *args: scan(cell, *args))(*args)
        evaluate = lambda *args: jax.core.eval_jaxpr(traced.jaxpr, traced.consts, *jax.tree.leaves(args))
        traced_gradient = jax.make_jaxpr(partial(gradients, scan))(*args)
        of_gradient = jax.core.eval_jaxpr(traced_gradient.jaxpr, traced_gradient.consts, *jax.tree.leaves(args))
        closed = jax.closure_convert(lambda *args: total(scan(cell, *args)), *args)
        converted = jax.grad(lambda args: closed[0](*args, *closed[1]))(args)
        return evaluate(*args), jax.grad(lambda args: total(evaluate(*args)))(args), of_gradient, converted

    assert_all_like_lax_scan(run, WITH_CELL)


@pytest.mark.slow
def test_compiled_ahead_of_time(args):
    expected = gradients(lax_scan, *args)
    shapes = jax.eval_shape(lambda: args)
    for name, strategy in WITH_CELL.items():
        compiled = jax.jit(partial(gradients, strategy)).trace(*shapes).lower().compile()
        assert_close(compiled(*args), expected)
        assert_close(deserialize_and_load(*serialize(compiled))(*args), expected), name


@pytest.mark.slow
def test_exported_to_a_file(args):
    """The gradient itself, and a value whose gradient is taken after it was exported."""
    pytest.importorskip("flatbuffers")
    treedef = jax.tree.structure(args)
    leaves, shapes = jax.tree.leaves(args), jax.tree.leaves(jax.eval_shape(lambda: args))
    expected_values, expected = lax_scan(cell, *args), gradients(lax_scan, *args)
    passed = lambda program: jax.export.deserialize(program.serialize(vjp_order=1))
    for strategy in WITH_CELL.values():
        # Leaves in, leaves out: a file knows no trees of ours.
        values = jax.jit(lambda *leaves, scan=strategy: scan(cell, *treedef.unflatten(leaves)))
        of_gradients = jax.jit(
            lambda *leaves, scan=strategy: jax.tree.leaves(gradients(scan, *treedef.unflatten(leaves)))
        )
        loaded = passed(jax.export.export(values)(*shapes))
        assert_close(loaded.call(*leaves), expected_values)
        pulled = jax.grad(lambda *leaves, call=loaded.call: total(call(*leaves)), tuple(range(len(leaves))))(*leaves)
        assert_close(list(pulled), jax.tree.leaves(expected[1]))
        assert_close(passed(jax.export.export(of_gradients)(*shapes)).call(*leaves), jax.tree.leaves(expected))


@pytest.mark.slow
def test_checkify():
    """Checks inside a step, and those of numbers and indices, are found as `lax.scan` finds them."""

    def step(p, h, x):
        checkify.check(x < 0.9, "x is {x}", x=x)
        h = jnp.tanh(p["w"] * h + p["table"][(10 * x).astype(int)])
        return h, jnp.log(h + 1)

    params = {"w": jnp.array(0.5), "table": jnp.arange(12.0)}
    problems = {
        "fine": (checkify.all_checks, np.linspace(0.1, 0.8, STEPS)),
        "a user's check": (checkify.user_checks, np.linspace(0.1, 1.0, STEPS)),
        "out of bounds": (checkify.index_checks, np.linspace(0.1, 1.4, STEPS)),
        "not a number": (checkify.nan_checks, np.where(np.arange(STEPS) == 5, -np.nan, 0.2)),
    }
    for i, (errors, xs) in enumerate(problems.values()):
        for derive in (False, True):
            # JAX's own checks of indices do not run under strict promotion.
            @jax.numpy_dtype_promotion("standard")
            def run(scan, errors=errors, xs=xs, derive=derive):
                value = lambda params: total(scan(step, params, jnp.array(0.3), jnp.asarray(xs)))
                function = jax.value_and_grad(value) if derive else value
                error, out = jax.jit(checkify.checkify(function, errors))(params)
                return (error.get() or "").split(" (")[0], out

            expected = run(lax_scan)
            # All of them under a gradient; without it they differ less, and half of them take turns.
            for name, strategy in STRATEGIES.items() if derive else list(STRATEGIES.items())[i % 2 :: 2]:
                mine = run(strategy)
                # Under a gradient lax.scan loses a check that no result depends on; what it finds is found.
                assert mine[0] == expected[0] or (derive and not expected[0]), name
                assert_close(mine[1], expected[1])


@pytest.mark.slow
@pytest.mark.parametrize("new_key", [jax.random.key, jax.random.PRNGKey], ids=["typed", "raw"])
def test_keys(new_key):
    """In the carry, among params and inputs, closed over, and as outputs."""

    def step(v, p, c, x):
        key, subkey = jax.random.split(c["key"])
        noise = sum(jax.random.normal(k, ()) for k in (subkey, x["key"], jax.random.fold_in(p["key"], 1), v))
        h = jnp.tanh(p["w"] * c["h"] + 0.1 * noise + x["x"])
        return {"key": key, "h": h}, {"h": h, "key": subkey}

    case = Case(
        step,
        wrt=("w", "h", "x"),
        params={"w": 0.5, "key": new_key(0)},
        init={"h": 0.3, "key": new_key(1)},
        xs={"x": np.linspace(-1.0, 1.2, STEPS), "key": jax.random.split(new_key(2), STEPS)},
        closed=new_key(3),
    )
    assert_all_like_lax_scan(case.run)
    if new_key is jax.random.key:  # a raw key is an array of integers, which other tests have as outputs
        assert_all_like_lax_scan(lambda scan: scan(partial(case.step, case.closed), case.params, case.init, case.xs))


# What is solved inside a step.


def root(w, h, x):
    """Of z + w sin(z) = h + x, by Newton's method."""
    f = lambda z: z + w * jnp.sin(z) - h - x
    newton = lambda f, z: lax.fori_loop(0, 20, lambda _, z: z - f(z) / jax.grad(f)(z), z)
    return lax.custom_root(f, h, newton, lambda g, y: y / g(1.0))


def linear_system(w, h, x):
    A = jnp.array([[2.0, 0.3], [0.3, 1.0]]) + w * jnp.eye(2)
    return jax.scipy.sparse.linalg.cg(lambda z: A @ z, jnp.stack([h, x]), tol=1e-14)[0].sum()


def fixed_point(w, h, x):
    """By an own derivative, as the textbooks do it."""

    @partial(jax.custom_vjp, nondiff_argnums=(0,))
    def solve(f, a):
        return lax.fori_loop(0, 60, lambda _, z: f(a, z), jnp.zeros_like(a[1]))

    def forward(f, a):
        z = solve(f, a)
        return z, (a, z)

    def backward(f, saved, bar):
        a, z = saved
        _, by_z = jax.vjp(partial(f, a), z)
        total_bar = lax.fori_loop(0, 60, lambda _, u: bar + by_z(u)[0], bar)
        return jax.vjp(lambda a: f(a, z), a)[1](total_bar)

    solve.defvjp(forward, backward)
    return solve(lambda a, z: 0.3 * jnp.cos(a[0] * z + a[1] + a[2]), (w, h, x))


SOLVED = {
    "custom_root": root,
    "cg": linear_system,
    "fixed point": fixed_point,
    "odeint": lambda w, h, x: odeint(lambda h, t, w, x: -w * h + jnp.sin(x + t), h, jnp.array([0.0, 0.3]), w, x)[-1],
    "solve": lambda w, h, x: jnp.linalg.solve(jnp.array([[2.0, 0.3], [0.1, 1.0]]) + w, jnp.stack([h, x])).sum(),
}


@pytest.mark.slow
@pytest.mark.parametrize("solve", SOLVED.values(), ids=SOLVED)
def test_solvers_inside_a_step(solve):
    step = lambda v, w, h, x: (jnp.tanh(solve(w, h, x)), h * w)
    strategies = dict(STRATEGIES)
    if solve is SOLVED["odeint"]:
        # Its own backward pass chooses its steps by the cotangent, so it is linear only to its tolerance.
        del strategies["windowed_scan"]
    assert_all_like_lax_scan(Case(step, init=jnp.array(0.3)).run, strategies)
    if solve is not SOLVED["odeint"]:  # which alone takes as long to compile as the others
        assert_all_like_lax_scan(Case(step, init=jnp.array(0.3), wrt=("init",)).run, strategies)
