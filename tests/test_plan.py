"""The plan: the fewest forward steps that fit a budget, with the bytes that the compiler then reports."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest

import jaxbptt as bptt

STEPS = 2_000


def shapes(cell, steps=STEPS):
    params, init = jax.eval_shape(cell.init, jax.random.key(0)), jax.eval_shape(cell.initial_carry)
    return params, init, jax.ShapeDtypeStruct((steps, 4), jnp.float32)


def temporary_bytes(scan, step, args, loss):
    fn = lambda params, init, xs: loss(*scan(step, params, init, xs))
    return jax.jit(jax.grad(fn)).lower(*args).compile().memory_analysis().temp_size_in_bytes


last_state = lambda carry, ys: jnp.sum(carry**2)
all_outputs = lambda carry, ys: jnp.mean(ys**2)


@pytest.mark.slow
def test_smaller_budgets_cost_more_steps():
    cell = bptt.elman(4, 16)
    args = shapes(cell)
    plenty = bptt.plan(cell, *args, memory_bytes=2**30, loss=last_state)
    assert (plenty.name, plenty.options, plenty.forward_steps) == ("adjoint_scan", {}, STEPS)
    twice = bptt.plan(cell, *args, memory_bytes=plenty.predicted_bytes / 4, loss=last_state)
    assert (twice.name, list(twice.options), twice.forward_steps) == (
        "checkpointed_scan",
        ["segment_length"],
        2 * STEPS,
    )
    more = bptt.plan(cell, *args, memory_bytes=twice.predicted_bytes / 3, loss=last_state)
    assert (more.name, list(more.options)) == ("checkpointed_scan", ["checkpoints"])
    assert 2 * STEPS < more.forward_steps < 20 * STEPS
    for plan, budget in ((plenty, 2**30), (twice, plenty.predicted_bytes / 4), (more, twice.predicted_bytes / 3)):
        assert plan.fits
        assert plan.predicted_bytes <= budget
        reported = temporary_bytes(plan.scan, cell, args, last_state)
        assert reported == pytest.approx(plan.predicted_bytes, rel=0.25)
    assert "needs" in more.reason
    assert "times on average" in more.reason


@pytest.mark.slow
def test_as_many_checkpoints_as_fit():
    cell = bptt.elman(4, 16)
    budget = 7_000
    plan = bptt.plan(cell, *shapes(cell), memory_bytes=budget, loss=last_state)
    number = plan.options["checkpoints"]
    assert number > 2
    more = partial(bptt.checkpointed_scan, checkpoints=number + 1 + number // 10)
    assert plan.predicted_bytes <= budget < temporary_bytes(more, cell, shapes(cell), last_state)


@pytest.mark.parametrize("own", [True, False], ids=["own adjoint", "bare step"])
@pytest.mark.costly
def test_prediction_without_a_loss(own):
    """The default stands for losses that look at every output: bytes within a quarter of a mean square's."""
    cell = bptt.gru(4, 16)
    step, args = (cell if own else cell.step), shapes(cell)
    for budget in (2**30, 5e5):
        plan = bptt.plan(step, *args, memory_bytes=budget)
        assert plan.fits
        assert plan.name == ("adjoint_scan" if budget > 1e6 else "checkpointed_scan")
        assert temporary_bytes(plan.scan, step, args, all_outputs) == pytest.approx(plan.predicted_bytes, rel=0.25)


@pytest.mark.slow
def test_nothing_exact_fits():
    cell = bptt.elman(4, 16)
    args = shapes(cell)
    least = bptt.plan(cell, *args, memory_bytes=1, loss=last_state)
    assert (least.fits, least.scan) == (False, None)
    assert "Truncation does not help: with truncation_length=1 it needs" in least.reason
    plan = bptt.plan(cell, *args, memory_bytes=least.predicted_bytes - 1, loss=last_state)
    assert (plan.fits, plan.scan, plan.predicted_bytes) == (False, None, least.predicted_bytes)
    assert re.search(r"No exact strategy fits .*: the least is checkpointed_scan with checkpoints=1", plan.reason)
    assert re.search(r"The biased truncated_scan fits, for example with truncation_length=\d+: .* bytes", plan.reason)
    nothing = bptt.plan(cell, *args, memory_bytes=1000, loss=all_outputs)
    assert "Truncation does not help: with truncation_length=1 it needs" in nothing.reason


def test_flags_are_part_of_the_plan():
    """Resets and padding are compiled with the step, and the bytes are those of the recurrence that has them."""
    cell, rows = bptt.elman(4, 16), 4
    params, _, _ = shapes(cell)
    init = jax.eval_shape(lambda: cell.initial_carry((rows,)))
    args = params, init, jax.ShapeDtypeStruct((STEPS, rows, 4), jnp.float32)
    flags = dict.fromkeys(("is_first", "valid"), jax.ShapeDtypeStruct((STEPS, rows), bool))
    plenty = bptt.plan(cell, *args, memory_bytes=2**30, loss=last_state, **flags)
    assert (plenty.name, plenty.fits) == ("adjoint_scan", True)
    fn = lambda args, flags: last_state(*plenty.scan(cell, *args, **flags))
    compiled = jax.jit(lambda args, flags: jax.grad(lambda some: fn((*some, args[2]), flags))(args[:2]))
    memory = compiled.lower(args, flags).compile().memory_analysis()
    assert memory.temp_size_in_bytes == pytest.approx(plenty.predicted_bytes, rel=0.05)
    less = bptt.plan(cell, *args, memory_bytes=plenty.predicted_bytes / 8, loss=last_state, **flags)
    assert (less.name, less.fits, less.forward_steps) == ("checkpointed_scan", True, 2 * STEPS)
    with pytest.raises(ValueError, match=r"valid has shape \(2000, 3\).*init has shape \(4, 16\)"):
        bptt.plan(cell, *args, memory_bytes=1, valid=jax.ShapeDtypeStruct((STEPS, 3), bool))


def test_plan_on_arrays_with_leaves_of_all_kinds():
    """Values in place of shapes, params that are functions, integers in the carry, no xs."""

    def step(params, carry, x):
        h = params["activation"](params["w"] * carry["h"])
        return {"h": h, "n": carry["n"] + 1}, h

    params, init = {"w": jnp.array(0.5), "activation": jnp.tanh}, {"h": jnp.ones(3), "n": jnp.array(0)}
    plan = bptt.plan(step, params, init, memory_bytes=2**20, length=50)
    assert (plan.name, plan.forward_steps) == ("adjoint_scan", 50)
    carry, _ = plan.scan(step, params, init, length=50)
    assert carry["n"] == 50


def test_a_step_that_is_not_sorted():
    """Its derived adjoint would compute each step three times, so it is left to JAX; one that is sorted is not."""

    def looped(w, h, x):
        h = jax.lax.fori_loop(0, 2, lambda _, h: jnp.tanh(w * h), h)
        return h, h

    for step, name in ((looped, "scan"), (lambda w, h, x: (jnp.tanh(w * h), h), "adjoint_scan")):
        plan = bptt.plan(step, jnp.array(0.5), jnp.ones(3), memory_bytes=2**20, length=50)
        assert (plan.name, plan.options, plan.forward_steps) == (name, {}, 50)
        assert plan.reason.startswith(f"{name} needs ")
        assert ("derived" in plan.reason) == (name == "adjoint_scan")


def test_budget_must_be_positive():
    cell = bptt.elman(4, 16)
    with pytest.raises(ValueError, match="memory_bytes is 0, but a gradient needs some"):
        bptt.plan(cell, *shapes(cell), memory_bytes=0)
