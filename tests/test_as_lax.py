"""`as_lax(strategy)` is `lax.scan`: a table of recurrences, each under the transformations of JAX's own scan tests."""

from contextlib import nullcontext
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from reference import assert_close, cases, gradient_of

import jaxbptt as bptt

STEPS = 7
STRATEGIES = {
    "adjoint_scan": bptt.adjoint_scan,
    "checkpointed_scan": bptt.checkpointed_scan,
    "checkpointed_scan, segment_length": partial(bptt.checkpointed_scan, segment_length=3),
    "scan": bptt.scan,
}
strategies = cases("strategy", STRATEGIES, "adjoint_scan", "checkpointed_scan")


class Case(NamedTuple):
    """A call `scan(partial(f, w), init, xs, **options)`."""

    f: Any
    init: Any = 0.3
    xs: Any = None
    options: Any = MappingProxyType({})

    def run(self, scan, w, init, xs):
        return scan(lambda carry, x: self.f(w, carry, x), init, xs, **self.options)

    @property
    def args(self):
        args = {"w": 0.5, "init": self.init, "xs": self.xs}
        return jax.tree.map(lambda leaf: leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf), args)


def tanh(w, h, x):
    return jnp.tanh(w * h + (0.2 if x is None else x)), w * h


def counted(w, carry, x):
    h, count = carry
    return (jnp.tanh(w * h + x * count.astype(h.dtype)), count + 1), {"h": h, "count": count}


def with_key(w, carry, x):
    key, use = jax.random.split(carry["key"])
    return {"key": key, "h": jnp.tanh(w * carry["h"] + jax.random.normal(use))}, jax.random.bits(use)


line = np.linspace(-1.0, 1.2, STEPS)
RECURRENCES = {
    "array": Case(tanh, xs=line),
    "pytrees": Case(
        lambda w, c, x: ((jnp.tanh(w * c[0] + x["a"]), {"b": c[1]["b"] @ x["b"]}), (c[0], None, {"y": c[1]["b"]})),
        init=(0.1, {"b": np.eye(2)}),
        xs={"a": line, "b": np.full((STEPS, 2, 2), 0.4), "none": None},
    ),
    "length": Case(tanh, options={"length": STEPS}),
    "length and xs": Case(tanh, xs=line, options={"length": STEPS}),
    "reverse": Case(tanh, xs=line, options={"reverse": True}),
    "reverse, length": Case(tanh, options={"length": STEPS, "reverse": True}),
    "reverse, pytrees": Case(counted, (0.2, 1), line, {"reverse": True}),
    "reverse, unroll": Case(tanh, xs=line, options={"reverse": True, "unroll": 2}),
    "unroll": Case(tanh, xs=line, options={"unroll": 2}),
    "unroll all": Case(tanh, xs=line, options={"unroll": True}),
    "no steps": Case(tanh, xs=line[:0]),
    "one step": Case(tanh, xs=line[:1]),
    "integers": Case(lambda w, n, x: (n + x, 2 * n), init=np.array(3), xs=np.arange(STEPS)),
    "an integer beside": Case(counted, init=(0.2, 1), xs=line),
    "a key": Case(with_key, {"key": jax.random.key(0), "h": 0.2}, options={"length": STEPS}),
    "a key, reversed": Case(
        lambda w, h, x: (jnp.tanh(w * h + jax.random.normal(x)), x),
        xs=jax.random.split(jax.random.key(1), STEPS),
        options={"reverse": True},
    ),
    "no outputs": Case(lambda w, h, x: (jnp.sin(w * h + x), None), xs=line),
    "no carry": Case(lambda w, c, x: (c, w * x), init=(), xs=line),
    "a branch": Case(lambda w, h, x: (lax.cond(x > 0, jnp.tanh, jnp.sin, w * h + x), h), xs=line),
    "a loop": Case(lambda w, h, x: lax.scan(partial(tanh, w), h, jnp.stack([x, -x])), xs=line),
}


def loss(case, scan, w, init, xs):
    leaves = jax.tree.leaves(case.run(scan, w, init, xs))
    leaves = [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return sum((jnp.sum(jnp.sin(leaf + 0.3 * i)) for i, leaf in enumerate(leaves)), 0.0)


def gradient(case, scan, w=0.5):
    return gradient_of(partial(loss, case, scan), case.args | {"w": jnp.asarray(w)}, ("w", "init", "xs"))


def loss_of_w(case, scan, w):
    return loss(case, scan, **case.args | {"w": w})


def nested(case, scan):
    """In a step of its own, and in one of `lax.scan`."""

    def outer(w, carry, x):
        return carry * w, loss(case, scan, w + x, *(case.args[name] for name in ("init", "xs")))

    return [gradient(Case(outer, xs=line[:2]), each) for each in (scan, lax.scan)]


TRANSFORMED = {
    "value": lambda case, scan: case.run(scan, **case.args),
    "gradient": gradient,
    "vmap": lambda case, scan: jax.vmap(lambda w: (case.run(scan, **case.args | {"w": w}), gradient(case, scan, w)))(
        jnp.array([0.5, -0.3])
    ),
    "nested": nested,
    "jvp": lambda case, scan: jax.jvp(partial(loss_of_w, case, scan), (0.5,), (1.0,)),
    "linearize": lambda case, scan: jax.linearize(partial(loss_of_w, case, scan), 0.5)[1](1.0),
    "jacfwd": lambda case, scan: jax.jacfwd(partial(loss_of_w, case, scan))(0.5),
    "hessian": lambda case, scan: jax.hessian(partial(loss_of_w, case, scan))(0.5),
}


FEW = "array", "reverse", "an integer beside"


def results(transformed, scan, chosen=tuple(RECURRENCES), *, jit=True):
    """Of all these recurrences, in one program."""
    run = lambda: {name: transformed(RECURRENCES[name], scan) for name in chosen}
    return jax.jit(run)() if jit else run()


PAIRS = {f"{name}, {by}": (name, strategy) for name in TRANSFORMED for by, strategy in STRATEGIES.items()}
QUICK = "value, checkpointed_scan", "gradient, adjoint_scan"


@cases("pair", PAIRS, *QUICK, "vmap, adjoint_scan", "nested, adjoint_scan")
def test_equals_lax_scan(pair):
    name, strategy = pair
    chosen = tuple(RECURRENCES)
    if name in ("vmap", "nested"):  # slow to compile
        chosen = FEW if name == "nested" else (*FEW, "a key", "a branch")
    transformed = partial(results, TRANSFORMED[name], chosen=chosen)
    assert_close(transformed(bptt.as_lax(strategy)), transformed(lax.scan))


MODES = {
    "disable_jit": jax.disable_jit,
    "debug_nans": lambda: jax.debug_nans(True),
    "checking_leaks": jax.checking_leaks,
    "float32": lambda: jax.enable_x64(False),
    "no mode, eager": nullcontext,
}


@strategies
@cases("mode", MODES, "debug_nans")
def test_in_a_mode(mode, strategy):
    with mode():
        jit = mode is not nullcontext
        expected = results(gradient, lax.scan, FEW, jit=jit)
        assert_close(results(gradient, bptt.as_lax(strategy), FEW, jit=jit), expected)


def test_debug_nans_finds_what_is_not_a_number():
    with jax.debug_nans(True), pytest.raises(FloatingPointError):
        jax.block_until_ready(bptt.as_lax(bptt.adjoint_scan)(lambda h, x: (h, jnp.log(x)), 0.0, jnp.array([-1.0])))


# A Python number has the dtype of what it meets.
WEAK = {
    "float": (lambda h, x: (0.5 * h + x, h), 0.0, np.ones(3, np.float32)),
    "int": (lambda n, x: (n + 1, n), 0, np.ones(3, np.float32)),
    "int that becomes a float": (lambda h, x: (h + x, h), 0, np.ones(3, np.float32)),
    "stays weak": (lambda h, x: (2 * h, 1.0), 1.0, np.ones(3, np.float32)),
}


@strategies
@pytest.mark.parametrize("name", WEAK)
def test_weak_types(name, strategy):
    """Shapes, dtypes and whether they are weak."""
    f, init, xs = WEAK[name]
    run = lambda scan: jax.eval_shape(lambda: scan(f, init, xs))
    for with_promotion in ("standard", "strict"):
        with jax.numpy_dtype_promotion(with_promotion):
            assert run(bptt.as_lax(strategy)) == run(lax.scan)


def test_options_of_a_partial_stand():
    """Those at the defaults of `lax.scan` are left to the strategy."""
    seen = []

    def strategy(step, params, init, xs=None, **options):
        seen.append(options)
        return bptt.adjoint_scan(step, params, init, xs, **options)

    valid = jnp.arange(STEPS) < 3
    scan = bptt.as_lax(partial(strategy, unroll=4, valid=valid, reverse=True))
    args = partial(tanh, 0.5), jnp.array(0.3), jnp.asarray(line)
    assert_close(scan(*args), bptt.scan(lambda _, h, x: tanh(0.5, h, x), None, *args[1:], valid=valid, reverse=True))
    scan(*args, unroll=2)
    scan(*args, unroll=True)
    assert [options.get("unroll") for options in seen] == [4, 2, True]
    assert [options.get("reverse") for options in seen] == [True] * 3


def test_a_truncated_gradient_is_one():
    """The strategy's gradient and not that of `lax.scan`."""
    scan = bptt.as_lax(partial(bptt.truncated_scan, truncation_length=2))
    last = lambda w: scan(lambda h, _: (w * h, None), 0.9, length=3)[0]
    np.testing.assert_allclose(jax.grad(last)(0.2), 0.2**2 * 0.9)


@strategies
def test_errors(strategy):
    scan = bptt.as_lax(strategy)
    keep = lambda h, x: (h, x)
    for call, error, message in (
        (lambda: scan(keep, 0.0), ValueError, "Neither xs nor length was given"),
        (lambda: scan(keep, 0.0, jnp.ones(3), length=4), ValueError, "length says 4 time steps"),
        (lambda: scan(3, 0.0, jnp.ones(3)), TypeError, r"f is a int, .*: pass f\(carry, x\) -> \(carry, y\)"),
        (lambda: scan(lambda h, x: h, 0.0, jnp.ones(3)), TypeError, r"returns a pair \(carry, y\)"),
        (lambda: scan(lambda h, x: ((h, h), x), 0.0, jnp.ones(3)), TypeError, "carry changed its structure"),
        (lambda: scan(keep, 0.0, jnp.ones(3), reverse="yes"), TypeError, "reverse is 'yes'.*: pass True or False"),
        (lambda: scan(keep, 0.0, jnp.ones(3), _split_transpose=True), ValueError, "_split_transpose.*leave it out"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_a_strategy_that_is_none():
    with pytest.raises(TypeError, match="strategy is a NoneType, but a function is expected"):
        bptt.as_lax(None)
