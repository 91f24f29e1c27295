"""Wrong arguments are refused before compilation, in words that name the leaf, what was expected, and the way out."""

from functools import partial, wraps

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import EXACT

import jaxbptt as bptt

STRATEGIES = EXACT | {"forward_scan": bptt.forward_scan}
strategies = pytest.mark.parametrize("strategy", STRATEGIES.values(), ids=STRATEGIES)
keep = lambda p, h, x: (h, x)


@strategies
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, r"Neither xs nor length was given: pass xs .* or length=T"),
        ({"length": -1}, r"length is -1, but it counts time steps: pass a whole number of at least 0"),
        ({"xs": {"a": jnp.ones(())}}, r"xs\['a'\] has no axis to scan over: its shape is \(\)"),
        (
            {"xs": {"a": jnp.ones((3, 2)), "b": jnp.ones((4, 2))}},
            r"xs\['a'\] says 3 time steps \(\(3, 2\)\), but xs\['b'\] has 4 \(shape \(4, 2\)\).*cut or pad",
        ),
        ({"xs": jnp.ones((3, 2)), "length": 4}, r"length says 4 time steps \(4\), but xs has 3 \(shape \(3, 2\)\)"),
    ],
)
def test_lengths(strategy, kwargs, message):
    with pytest.raises(ValueError, match=message):
        strategy(keep, None, jnp.zeros(2), **kwargs)


def of_lax(h, x):
    """A step as `lax.scan` takes it."""
    return jnp.tanh(h + x), h


class OfLax(eqx.Module):
    w: float

    def __call__(self, h, x):
        return self.w * h + x, h

    def method(self, h, x):
        return self(h, x)


AS_LAX_TAKES_THEM = {
    "function": of_lax,
    "jitted": jax.jit(of_lax),
    "checkpointed": jax.checkpoint(of_lax),
    "with params": partial(lambda params, h, x: (params * h, x), 2.0),
    "module": OfLax(0.5),
    "method": OfLax(0.5).method,
    "filter_jit": eqx.filter_jit(of_lax),
}


@strategies
@pytest.mark.parametrize("f", AS_LAX_TAKES_THEM.values(), ids=AS_LAX_TAKES_THEM)
def test_called_as_lax_scan(strategy, f):
    """Without params, and with a step of two arguments."""
    message = (
        r"takes two arguments, \(carry, x\), as lax\.scan's does.*as_lax\(adjoint_scan\)\(f, init, xs\)"
        r".*adjoint_scan\(lambda params, carry, x: f\(carry, x\), None, init, xs\)"
    )
    for args, options in (
        ((jnp.zeros(2), jnp.ones((3, 2))), {}),
        ((0.0, jnp.ones(3)), {}),
        ((jnp.zeros(2), None), {"length": 3}),
        ((None, jnp.zeros(2), jnp.ones((3, 2))), {}),
        ((None, 0.0, jnp.ones(3)), {}),
    ):
        with pytest.raises(TypeError, match=message):
            strategy(f, *args, **options)


def with_any(*args):
    return args[-2], args[-1]


@wraps(of_lax)
def wrapping(params, carry, x):
    return of_lax(params * carry, x)


class Called:
    def __call__(self, params, carry, x, scale=1.0):
        return scale * carry, x


# Steps that one could take for a step of two arguments.
NO_STEPS_OF_TWO = {
    "*args": with_any,
    "a lambda with *args": lambda params, *args: (args[0], args[1]),
    "partial": partial(lambda a, params, carry, x: (carry, x), 1),
    "partial with keyword": partial(lambda params, carry, x, a: (carry, x), a=1),
    "a default": lambda params, carry, x, a=1: (carry, x),
    "wrapping one of two": wrapping,
    "jitted": jax.jit(lambda params, carry, x: (carry, x)),
    "jitted *args": jax.jit(with_any),
    "an object": Called(),
    "without signature": np.frompyfunc(lambda params, carry, x: (carry, x), 3, 2),
}


@pytest.mark.parametrize("step", NO_STEPS_OF_TWO.values(), ids=NO_STEPS_OF_TWO)
def test_not_called_as_lax_scan(step):
    with pytest.raises(ValueError, match=r"Neither xs nor length was given.*go to as_lax\(strategy\)"):
        bptt.adjoint_scan(step, 0.5, jnp.ones(3))
    if not isinstance(step, np.ufunc):
        for strategy in (bptt.scan, bptt.adjoint_scan):
            strategy(step, 0.5, jnp.array(1.0), jnp.ones(3))


def test_an_error_inside_a_step_of_three_is_its_own():
    for step in (lambda params, h, x: of_lax(params, h, x), wraps(of_lax)(lambda params, h, x: of_lax(params, h, x))):
        with pytest.raises(TypeError, match=r"^of_lax\(\) takes 2 positional arguments but 3 were given"):
            bptt.adjoint_scan(step, None, jnp.zeros(2), jnp.ones((3, 2)))

    @wraps(of_lax)
    def of_any(*args):
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine"):
        bptt.adjoint_scan(of_any, None, jnp.zeros(2), jnp.ones((3, 2)))


@strategies
@pytest.mark.parametrize("reverse", [None, "yes", 1, np.ones(2, bool)], ids=str)
def test_reverse_that_is_neither_true_nor_false(strategy, reverse):
    with pytest.raises(TypeError, match=r"reverse is .*, but it says whether .*: pass True or False"):
        strategy(keep, None, jnp.zeros(2), jnp.ones((3, 2)), reverse=reverse)


@strategies
@pytest.mark.parametrize(
    ("step", "error", "message"),
    [
        (
            lambda p, c, x: ({"h": c["h"] + x}, None),
            ValueError,
            r"carry\['h'\] changed its shape across a step: it went in as \(2,\) and came out as \(5, 2\)"
            r".*start from a carry that has them too, \(5, 2\)",
        ),
        (
            lambda p, c, x: ({"h": c["h"].astype(jnp.bfloat16)}, None),
            TypeError,
            r"carry\['h'\] changed its dtype across a step: it went in as float32 and came out as bfloat16"
            r".*Start from a carry of bfloat16, or cast in the step with \.astype\('float32'\)",
        ),
        (lambda p, c, x: (c["h"], None), TypeError, r"carry changed its structure across a step: .*belong in y"),
        (
            lambda p, c, x: c["h"],
            TypeError,
            r"returns a pair \(carry, y\), but this one returned one array of shape \(2,\)",
        ),
        (lambda p, c, x: None, TypeError, r"returns a pair \(carry, y\), but this one returned NoneType"),
        (
            lambda p, c, x: ({"h": c["h"][:-1]}, None),
            ValueError,
            r"went in as \(2,\) and came out as \(1,\).*keep its shape: return one of shape \(2,\) from the step, and what else",
        ),
        (lambda p, c, x: (c, x, x), TypeError, r"returns a pair \(carry, y\), but this one returned a tuple of 3"),
    ],
)
def test_carry_that_changes(strategy, step, error, message):
    with pytest.raises(error, match=message):
        strategy(step, None, {"h": jnp.zeros(2, jnp.float32)}, jnp.ones((3, 5, 2), jnp.float32))


@strategies
def test_what_a_step_returns_is_named_for_python_numbers_too(strategy):
    with pytest.raises(TypeError, match="carry changed its structure"):
        strategy(lambda p, c, x: ((c, c), None), None, 0.0, length=2)
    with pytest.raises(TypeError, match=r"returns a pair \(carry, y\)"):
        strategy(lambda p, c, x: c, None, 0.0, length=2)


@strategies
def test_traced_length(strategy):
    with pytest.raises(
        ValueError,
        match=r"length is .*, but it counts time steps: a traced one is not known yet, name it in static_argnames",
    ):
        jax.jit(lambda length: strategy(keep, None, 0.0, length=length))(3)


@strategies
@pytest.mark.parametrize("name", ["elman", "gru", "lstm"])
@pytest.mark.costly
def test_input_that_does_not_fit_the_carry(strategy, name):
    cell = getattr(bptt, name)(3, 4)
    params = cell.init(jax.random.key(0))
    message = rf"{name}: x has shape \(5, 3\) at one time step, but \(3,\) is expected.*initial_carry\(batch_shape\)"
    with pytest.raises(ValueError, match=message):
        strategy(cell, params, cell.initial_carry(), jnp.ones((7, 5, 3), jnp.float32))
    with pytest.raises(ValueError, match=rf"{name}: x has shape \(2,\) at one time step, but \(3,\) is expected"):
        strategy(cell, params, cell.initial_carry(), jnp.ones((7, 2), jnp.float32))


@pytest.mark.parametrize("adjoint", ["auto", True, lambda *args: None, bptt.elman(2, 2)])
@pytest.mark.parametrize("name", ["adjoint_scan", "checkpointed_scan", "truncated_scan", "windowed_scan"])
def test_adjoint_that_is_none(name, adjoint):
    options = {"truncated_scan": {"truncation_length": 2}, "windowed_scan": {"window": 2}}.get(name, {})
    with pytest.raises(
        TypeError, match=r"adjoint is .*: pass jaxbptt\.Adjoint\(forward, backward, contract\), a Cell as"
    ):
        getattr(bptt, name)(keep, None, jnp.zeros(2), jnp.ones((3, 2)), adjoint=adjoint, **options)


@pytest.mark.parametrize("sizes", [(0, 4), (3, -1)])
@pytest.mark.parametrize("make", [bptt.elman, bptt.gru, bptt.lstm])
def test_sizes(make, sizes):
    with pytest.raises(ValueError, match=r"_size is .*: pass a whole number of at least 1"):
        make(*sizes)


def test_empty_stack():
    with pytest.raises(ValueError, match=r"stack\(\) got no cells"):
        bptt.stack()


def test_errors_of_the_step_come_through():
    def step(p, h, x):
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        bptt.adjoint_scan(step, None, jnp.zeros(2), length=3)


def test_what_is_no_adjoint():
    with pytest.raises(TypeError, match="adjoint is function, but it holds the backward of one step"):
        bptt.certify(keep, None, jnp.ones(2), jnp.ones(3), lambda h, ys: ys.sum(), adjoint=lambda *args: None)
