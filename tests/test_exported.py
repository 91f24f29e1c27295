"""Programs exported with sizes left open, as a model is served."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import pytest
from jax import export
from reference import EXACT, assert_close, make_cell, problem

import jaxbptt as bptt

CELL = make_cell("elman")
SIZES = 7, 3
OTHERS = {
    "checkpointed_scan (segments)": partial(bptt.checkpointed_scan, segment_length=3),
    "checkpointed_scan (4 states)": partial(bptt.checkpointed_scan, checkpoints=4),
    "truncated_scan": partial(bptt.truncated_scan, truncation_length=7),
    "windowed_scan": partial(bptt.windowed_scan, window=7),
}
ALL = EXACT | OTHERS
OPEN_TIME = "scan", "adjoint_scan", "adjoint_scan (derived)", "windowed_scan"
WITH_FLAGS = "scan", "adjoint_scan", "checkpointed_scan", "truncated_scan"


def bidirectional(cell, params, init, xs, *, scan=bptt.adjoint_scan, **flags):
    """The backward direction, once alone and once beside the forward one."""
    _, alone = scan(cell, params, init, xs, reverse=True)
    layer = bptt.bidirectional(cell, cell)
    carry, ys = layer.apply((params, params), (init, init), xs, scan=scan, **flags)
    return carry, ys.sum() + alone


def loss(strategy, flags, weights, xs, is_first):
    init = CELL.initial_carry(xs.shape[1:-1])
    options = {"is_first": is_first, "valid": ~is_first} if flags else {}
    carry, ys = strategy(CELL, bptt.ElmanParams(*weights), init, xs, **options)
    return jnp.sum(ys**2) + sum(map(jnp.sum, jax.tree.leaves(carry)))


def arguments(steps, batch):
    params, _, xs = problem(CELL, steps, (batch,))
    return tuple(params), xs, jnp.arange(steps * batch).reshape(steps, batch) % 5 == 3


@cache
def expected(flags):
    return jax.jit(jax.value_and_grad(partial(loss, bptt.scan, flags)))(*arguments(*SIZES))


def exported(function, sizes):
    weights, xs, is_first = jax.eval_shape(partial(arguments, 2, 2))
    sizes = export.symbolic_shape(sizes)
    xs, is_first = (jax.ShapeDtypeStruct((*sizes, *leaf.shape[2:]), leaf.dtype) for leaf in (xs, is_first))
    return export.export(jax.jit(function))(weights, xs, is_first)


CASES = [(name, False) for name in ALL] + [(name, True) for name in WITH_FLAGS]


@pytest.mark.parametrize(("name", "flags"), CASES)
@pytest.mark.costly
def test_open_sizes(name, flags):
    function = jax.value_and_grad(partial(loss, ALL[name], flags))
    program = exported(function, "t, b" if name in OPEN_TIME else "7, b")
    assert_close(program.call(*arguments(*SIZES)), expected(flags))


@pytest.mark.slow
def test_open_sizes_in_reverse():
    by_scan = partial(bidirectional, scan=bptt.scan)
    program = exported(jax.value_and_grad(partial(loss, bidirectional, True)), "t, b")
    args = arguments(*SIZES)
    assert_close(program.call(*args), jax.value_and_grad(partial(loss, by_scan, True))(*args))


@pytest.mark.parametrize("name", ["scan", "adjoint_scan", "checkpointed_scan"])
@pytest.mark.costly
def test_exported_program_is_differentiated_after_it_is_loaded(name):
    pytest.importorskip("flatbuffers", reason="jax.export saves with it")
    program = exported(partial(loss, ALL[name], False), "t, b" if name in OPEN_TIME else "7, b")
    program = export.deserialize(program.serialize(vjp_order=1))
    assert_close(jax.value_and_grad(program.call)(*arguments(*SIZES)), expected(False))


@pytest.mark.parametrize("name", [name for name in ALL if name not in OPEN_TIME])
def test_time_that_is_cut_must_be_known(name):
    message = (
        r"_scan cuts time into segments, but the number of time steps is symbolic, t: export it with a fixed number"
    )
    with pytest.raises(ValueError, match=message):
        exported(partial(loss, ALL[name], False), "t, b")


@pytest.mark.parametrize("name", EXACT)
def test_open_length_without_inputs(name):
    (length,) = export.symbolic_shape("t")
    with pytest.raises(ValueError, match=r"length is symbolic, t, and there are no xs to take it from"):
        EXACT[name](lambda w, h, x: (w * h, None), 0.5, 1.0, length=length)
