"""The checkpointed strategy: exact under every legal option, at the cost the schedule says, in the memory it promises."""

import collections
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, make_cell, problem, python_loop, random_like

import jaxbptt as bptt
from jaxbptt.programs.perturbed import everything
from jaxbptt.scans.checkpointed import layout
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.passes import one_pass
from jaxbptt.scans.recurrence import prepare
from jaxbptt.scans.schedule import forward_steps


def legal_options(steps):
    yield {}
    for s in sorted({1, 3, steps // 2, steps, 2 * steps} - {0}):
        yield {"segment_length": s}
    for c in sorted({1, 2, 5, steps}):
        if c <= steps:
            yield {"checkpoints": c}


@pytest.mark.parametrize("own", [True, False], ids=["own adjoint", "derived"])
@pytest.mark.parametrize("steps", [1, 2, 7, 64, 100])
@pytest.mark.costly
def test_equals_scan_under_every_option(steps, own):
    cell = make_cell("gru" if own else "elman")
    args = problem(cell, steps, (2,))
    out, pull = jax.vjp(partial(bptt.scan, cell), *args)
    cotangent = random_like(out, 3)
    expected = out, pull(cotangent)

    @jax.jit
    def every_option(args, cotangent):
        for options in legal_options(steps):
            out, pull = jax.vjp(partial(bptt.checkpointed_scan, cell if own else cell.step, **options), *args)
            yield_to.append((out, pull(cotangent)))
        return tuple(yield_to)

    yield_to = []
    results = every_option(args, cotangent)
    assert len(results) == len(list(legal_options(steps))) >= (3 if steps > 1 else 2)
    for result in results:
        assert_close(result, expected)


def cut_of(cell, args, **options):
    over_time, r = one_pass(cell, None, prepare(cell, *args, None), Flags(), unroll=1)
    over_time = over_time.differentiated(everything(*args))
    return layout(over_time, *args, r.length, options.get("segment_length"), options.get("checkpoints"))


def test_both_kinds_of_segment_are_covered():
    """The options above reach weight gradients step by step and once a segment, and schedules that compute again."""
    cell = make_cell("gru")
    args = problem(cell, 100, (2,))
    cuts = [cut_of(cell, args, checkpoints=c) for c in (1, 2, 5, 100)]
    assert {cut.lean for cut in cuts} == {True, False}
    assert {cut.all_kept for cut in cuts} == {True, False}
    assert {cut_of(cell, problem(cell, steps)).left_over > 0 for steps in (64, 97)} == {True, False}


def test_lean_segments_of_several_steps():
    """Residuals that are the carry before or after a step are put together again in the right order."""
    cell = make_cell("elman")
    args = problem(cell, 100)
    cut = cut_of(cell, args, checkpoints=6)
    assert cut.lean
    assert cut.segment > 1

    def gradients(scan):
        return jax.jit(jax.grad(lambda *args: jnp.sum(scan(cell, *args)[1] ** 2), argnums=(0, 1, 2)))(*args)

    assert_close(gradients(partial(bptt.checkpointed_scan, checkpoints=6)), gradients(bptt.scan))


def test_a_segment_takes_less_than_half_of_the_states():
    cell = make_cell("elman")
    args = problem(cell, 10_000)
    for checkpoints in (6, 60):
        cut = cut_of(cell, args, checkpoints=checkpoints)
        kept_of_a_step = 1 if cut.lean else 3  # the carry; or that before, that after, and δ
        assert 0.3 * checkpoints <= cut.segment * kept_of_a_step <= 0.5 * checkpoints


@pytest.mark.parametrize(
    "options", [{"checkpoints": 1}, {"checkpoints": 4}, {"checkpoints": 12}, {"segment_length": 9}]
)
@pytest.mark.costly
def test_number_of_steps_computed(options):
    """Counted as they run: the forward steps are as many as the schedule says, and each step is reversed once."""
    cell, count = make_cell("elman"), collections.Counter()

    def counted(kind, fn):
        def call(*args):
            jax.debug.callback(lambda: count.update([kind]))
            return fn(*args)

        return call

    adjoint = cell.adjoint._replace(
        forward=counted("forward", cell.adjoint.forward), backward=counted("back", cell.adjoint.backward)
    )
    watched = cell._replace(step=counted("forward", cell.step), adjoint=adjoint)
    args = problem(cell, 60)
    jax.jit(jax.grad(lambda params: jnp.sum(bptt.checkpointed_scan(watched, params, *args[1:], **options)[0])))(args[0])
    jax.effects_barrier()
    assert count == {"forward": cut_of(cell, args, **options).forward_steps, "back": 60}


def test_the_same_steps_as_the_written_schedule():
    """With segments of one step: the schedule's, whose first sweep is a part of the forward pass."""
    cell = make_cell("elman")
    for checkpoints in (1, 2):
        cut = cut_of(cell, problem(cell, 50), checkpoints=checkpoints)
        assert cut.segment == 1
        assert cut.forward_steps == bptt.checkpoint_schedule(50, checkpoints).forward_steps + 50 - cut.kept[-1]


@pytest.fixture(scope="module")
def fewest_forward_steps():
    """By dynamic programming over where to keep the next state: entries [length, checkpoints]."""
    lengths, most = 200, 20
    fewest = np.full((lengths + 1, most + 1), np.iinfo(int).max // 4)
    fewest[1, 1:] = 1
    fewest[:, 1] = np.arange(lengths + 1) * np.arange(1, lengths + 2) // 2
    for checkpoints in range(2, most + 1):
        for length in range(2, lengths + 1):
            first = np.arange(1, length)
            choices = first + fewest[length - first, checkpoints - 1] + fewest[first, checkpoints]
            fewest[length, checkpoints] = choices.min()
    return fewest


def test_schedule_is_optimal(fewest_forward_steps):
    for checkpoints in range(1, 21):
        for length in range(checkpoints, 201):
            schedule = bptt.checkpoint_schedule(length, checkpoints)
            best = fewest_forward_steps[length, checkpoints]
            assert schedule.forward_steps == forward_steps(length, checkpoints) == best, (length, checkpoints)


def test_schedule_can_be_carried_out():
    """Every move starts from a state that is kept, no more are kept than allowed, and steps are reversed in order."""
    for length, checkpoints in ((1, 1), (10, 3), (57, 4), (60, 60)):
        schedule = bptt.checkpoint_schedule(length, checkpoints)
        kept, computed, back = {0}, 0, []
        for start, stop, keep in schedule.moves.tolist():
            assert start in kept
            computed += stop - start + (not keep)
            if keep:
                kept.add(stop)
            else:
                back.append(stop)
                kept.discard(stop)
            assert len(kept) <= checkpoints
        assert back == list(reversed(range(length)))
        assert computed == schedule.forward_steps


@pytest.mark.parametrize(("length", "checkpoints", "steps"), [(10, 3, 25), (100, 5, 416), (1000, 10, 4636)])
def test_published_forward_steps(length, checkpoints, steps):
    assert bptt.checkpoint_schedule(length, checkpoints).forward_steps == steps


def lower(scan, steps, hidden, inputs, **options):
    cell = bptt.elman(inputs, hidden)
    shapes = jax.eval_shape(cell.init, jax.random.key(0)), jax.eval_shape(cell.initial_carry)
    xs = jax.ShapeDtypeStruct((steps, inputs), jnp.float32)
    loss = lambda params, init, xs: jnp.sum(scan(cell, params, init, xs, **options)[0] ** 2)
    return jax.jit(jax.grad(loss)).lower(*shapes, xs)


def temporary_bytes(*args, **options):
    return lower(*args, **options).compile().memory_analysis().temp_size_in_bytes


def test_long_sequences_in_little_memory():
    reference = temporary_bytes(bptt.scan, 100_000, 128, 32)
    assert temporary_bytes(bptt.checkpointed_scan, 100_000, 128, 32) < 0.006 * reference
    assert temporary_bytes(bptt.checkpointed_scan, 1_000_000, 128, 32) < 4 * 2**20
    few, more = (temporary_bytes(bptt.checkpointed_scan, 100_000, 128, 32, checkpoints=c) for c in (20, 40))
    assert few < more < 2e-3 * reference


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        (bptt.adjoint_scan, [{}, {}]),
        (bptt.checkpointed_scan, [{}, {}]),
        (bptt.checkpointed_scan, [{"checkpoints": 8}, {"checkpoints": 80}]),
        (bptt.truncated_scan, [{"truncation_length": 50}] * 2),
        (bptt.windowed_scan, [{"window": 5}, {"window": 500}]),
    ],
    ids=["adjoint", "sqrt", "schedule", "truncated", "windowed"],
)
def test_program_does_not_grow(strategy, options):
    """As many operations for T = 1,000,000 as for T = 10,000, whatever is asked for."""
    short, long = (
        lower(strategy, steps, 8, 4, **option).as_text().count(" = stablehlo.")
        for steps, option in zip((10_000, 1_000_000), options, strict=True)
    )
    assert long <= 1.02 * short


def test_illegal_options():
    cell = make_cell("elman")
    args = problem(cell, 5)
    for options, message in (
        (
            {"segment_length": 2, "checkpoints": 2},
            r"Both segment_length=2 and checkpoints=2 were given: pass the first",
        ),
        ({"segment_length": 0}, r"segment_length is 0, but it counts time steps: pass a whole number of at least 1"),
        ({"segment_length": 2.0}, r"segment_length is 2\.0"),
        ({"checkpoints": 0}, r"checkpoints is 0, but it counts the states that are kept"),
        ({"checkpoints": 6}, r"checkpoints is 6, more than the 5 time steps.*checkpoints=5, and adjoint_scan does"),
    ):
        with pytest.raises(ValueError, match=message):
            bptt.checkpointed_scan(cell, *args, **options)
    for length, checkpoints, message in ((0, 1, "length is 0"), (3, 4, "checkpoints is 4, more than the 3 time steps")):
        with pytest.raises(ValueError, match=message):
            bptt.checkpoint_schedule(length, checkpoints)


def test_half_precision_adds_up_in_single():
    """Weight gradients of many segments are added up in float32, so that cutting time costs no accuracy."""
    cell = bptt.elman(3, 4, dtype=jnp.bfloat16)
    params, init, xs = problem(cell, 400, (2,), jnp.bfloat16)
    gradient = lambda scan, **options: jax.jit(
        jax.grad(lambda p: jnp.sum(scan(cell, p, init, xs, **options)[1].astype(jnp.float32)))
    )(params)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), gradient(bptt.adjoint_scan))
    cut = gradient(bptt.checkpointed_scan, segment_length=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(cut)} == {jnp.dtype(jnp.bfloat16)}
    assert_close(jax.tree.map(lambda leaf: leaf.astype(jnp.float32), cut), exact, rtol=0.02)


def test_python_loop_agrees_where_init_has_its_own_gradient():
    """A step of which nothing but init moves, in a dictionary: gradients of init through every segment."""
    step = lambda _, c, x: ({"a": 1.01 * c["a"] * x, "n": c["n"] + 1}, c["a"])
    init, xs = {"a": jnp.array(0.3), "n": jnp.array(0)}, jnp.linspace(0.9, 1.1, 11)
    loss = lambda scan, a: scan(step, None, init | {"a": a}, xs)[0]["a"]
    expected = jax.grad(partial(loss, python_loop))(init["a"])
    for options in ({"segment_length": 4}, {"checkpoints": 2}):
        mine = jax.grad(partial(loss, partial(bptt.checkpointed_scan, **options)))(init["a"])
        np.testing.assert_allclose(mine, expected, rtol=1e-12)
