"""Wrong arguments are refused before compilation, in words that name the leaf, what was expected, and the way out."""

import jax
import jax.numpy as jnp
import pytest
from reference import EXACT

import jaxbptt as bptt

strategies = pytest.mark.parametrize("strategy", EXACT.values(), ids=EXACT)
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
