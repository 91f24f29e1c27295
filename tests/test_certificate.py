"""The certificate measures what it says, and finds a wrong gradient."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import make_cell, problem

import jaxbptt as bptt
from jaxbptt.analysis.cost import compile_and_cost, count_flops


def loss(carry, ys):
    return jnp.mean(ys**2)


def test_rows_of_a_cell():
    cell = make_cell("lstm")
    seen = []
    certificate = bptt.certify(cell, *problem(cell, 8, (2,)), loss, progress=seen.append, repeats=1)
    names = [
        "scan",
        "adjoint_scan (derived)",
        "adjoint_scan",
        "checkpointed_scan",
        "checkpointed_scan (schedule)",
    ]
    assert [row.name for row in certificate.rows] == names == seen
    assert certificate.dtype == "float64"
    assert certificate.tolerance == pytest.approx(np.finfo(float).eps ** 0.6)
    for row in certificate.rows:
        assert row.agrees
        assert set(row.errors) == {"params.W_xh", "params.W_hh", "params.b", "init.h", "init.c", "xs"}
        assert row.largest_error == max(row.errors.values()) < 1e-12
        assert row.temporary_bytes > 0
        assert row.flops > 0
        assert row.seconds > 0
        assert row.compile_seconds > 0
    assert certificate.rows[0].largest_error == 0
    lines = str(certificate).splitlines()
    assert len(lines) == 1 + len(certificate.rows)
    assert lines[0].split() == ["method", "relative", "error", "temporary", "KiB", "Mflop", "ms", "agrees"]


@pytest.mark.slow
def test_rows_with_flags():
    """Every way is given the flags, nan in the padding or not; what they leave out shows in the value."""
    cell = make_cell("elman")
    params, init, xs = problem(cell, 4, (2,))
    valid = jnp.array([[1, 1], [1, 0], [0, 1], [0, 0]], bool)
    flags = {"valid": valid, "is_first": jnp.array([[0, 0], [1, 1], [0, 0], [0, 0]], bool), "reset_carry": init[:1]}
    spoilt = jnp.where(valid[..., None], xs, jnp.nan)
    certificate = bptt.certify(cell, params, init, spoilt, loss, repeats=1, **flags)
    assert all(row.agrees for row in certificate.rows)
    without = {"without": lambda *args, **flags: bptt.scan(*args)}
    assert not bptt.certify(cell, params, init, xs, loss, scans=without, repeats=1, **flags).rows[1].agrees


def test_a_wrong_gradient_does_not_agree():
    cell = make_cell("elman")
    args = problem(cell, 8)
    wrong = cell.adjoint._replace(
        contract=lambda *a: (cell.adjoint.contract(*a)[0]._replace(b=jnp.zeros(4)), cell.adjoint.contract(*a)[1])
    )
    scans = {
        "mine": lambda *a, **kw: bptt.adjoint_scan(*a, adjoint=wrong, **kw),
        "twice": lambda *a, **kw: jax.tree.map(lambda leaf: 2 * leaf, bptt.scan(*a, **kw)),
    }
    row, twice = bptt.certify(cell, *args, loss, scans=scans, repeats=1).rows[1:]
    assert not row.agrees
    assert row.value_error < 1e-12
    assert {leaf for leaf, error in row.errors.items() if error > 1e-6} == {"params.b"}
    assert row.errors["params.b"] == row.largest_error == pytest.approx(1)
    assert twice.value_error == pytest.approx(3)
    assert not twice.agrees


def test_a_nan_does_not_agree():
    cell = make_cell("elman")
    ways = {"nan": lambda params, init, xs: jax.tree.map(lambda leaf: leaf * jnp.nan, params)}
    row = bptt.certify(cell, *problem(cell, 3), loss, scans=[], gradients=ways, repeats=1).rows[1]
    assert not row.agrees


def test_any_step_with_leaves_that_have_no_derivative():
    def step(params, carry, x):
        h, count = carry
        h = params["f"](params["w"] * h + x["signal"])
        return (h, count + 1), h

    params = {"w": 0.5, "f": jnp.tanh}
    xs = {"signal": jnp.arange(5.0), "key": jax.random.split(jax.random.key(0), 5)}
    certificate = bptt.certify(step, params, (0.1, 0), xs, loss, scans=[bptt.adjoint_scan], repeats=1)
    assert [row.name for row in certificate.rows] == ["scan", "adjoint_scan"]
    assert certificate.rows[1].agrees
    assert set(certificate.rows[1].errors) == {"params['w']", "init[0]", "xs['signal']"}


def test_other_methods_and_length():
    by_hand = {"by hand": lambda w, h_0, xs: 3 * w**2 * h_0}
    step = lambda w, h, x: (w * h, None)
    certificate = bptt.certify(step, 0.2, 0.9, None, lambda h, ys: h, gradients=by_hand, length=3, repeats=1)
    row = certificate.rows[-1]
    assert row.name == "by hand"
    assert row.agrees
    assert math.isnan(row.value_error)
    assert set(row.errors) == {"params"}


def test_repeats():
    with pytest.raises(ValueError, match="repeats is 0"):
        bptt.certify(lambda w, h, x: (h, h), 1.0, 1.0, None, loss, length=2, repeats=0)


def test_flops_count_loops_as_often_as_they_run():
    """T products of [64, 64] with a vector, 2 · 64² each, and the tanh for nothing; the compiler counts one of them."""
    W, h = jnp.ones((64, 64)), jnp.ones(64)

    def cost(steps):
        return compile_and_cost(
            lambda W, h: bptt.scan(lambda W, h, x: (jnp.tanh(W @ h), None), W, h, length=steps)[0], W, h
        )[1]

    assert cost(10).flops == 10 * 2 * 64**2
    assert cost(1000).flops == 1000 * 2 * 64**2
    assert cost(1000).compiler_flops < 3 * cost(10).compiler_flops


def test_flops_of_a_schedule_are_those_of_its_steps():
    """However few states are kept, all that is added is the recomputed steps: T products [64, 64] with a vector each."""
    W, h = jnp.ones((64, 64)), jnp.ones(64)

    def flops(**options):
        step = options.pop("step", lambda W, h, x: (jnp.tanh(W @ h), None))
        gradient = jax.grad(lambda W: jnp.sum(bptt.checkpointed_scan(step, W, h, length=60, **options)[0]))
        return count_flops(jax.make_jaxpr(gradient)(W).jaxpr)

    def extra_steps(checkpoints):  # beyond the forward pass, and once more for each step that is reversed
        schedule = bptt.checkpoint_schedule(60, checkpoints)
        kept = schedule.moves[np.cumprod(schedule.moves[:, 2]) == 1, 1]
        return schedule.forward_steps - 60 - max(kept, default=0)

    every_state = flops(checkpoints=60)
    for checkpoints in (1, 2):  # few enough for segments of a single step
        assert flops(checkpoints=checkpoints) - every_state == pytest.approx(2 * 64**2 * extra_steps(checkpoints))
    until = lambda h: jax.lax.while_loop(lambda h: h[0] < 9, lambda h: h + 1, jax.lax.stop_gradient(h))
    assert math.isnan(flops(checkpoints=2, step=lambda W, h, x: (until(h) * (W @ h), None)))


def test_flops_of_branches_calls_and_what_cannot_be_counted():
    def count(f, *args):
        return count_flops(jax.make_jaxpr(f)(*args).jaxpr)

    A = jnp.ones((4, 4))
    assert count(lambda A: jax.jit(lambda A: A @ A)(A), A) == 2 * 64
    assert count(lambda A: jax.lax.cond(A[0, 0] > 0, lambda: A @ A, lambda: A), A) == 2 * 64
    assert count(lambda A: (A @ A, jnp.sum(A))[1], A) == 16  # the product is not used
    assert count(lambda A: jax.lax.fori_loop(0, 5, lambda i, A: A + A, A), A) == 5 * 16  # the counter is no float
    assert math.isnan(count(lambda A: jnp.linalg.qr(A)[0], A))
    assert math.isnan(count(lambda A: jax.lax.while_loop(lambda A: A[0, 0] < 9, lambda A: A + 1, A), A))


def test_names_are_unique_and_the_reference_is_scan():
    args = lambda w, h, x: (w * h, h), 0.5, 1.0, None, loss

    def scan(*a, **kw):
        return jax.tree.map(lambda leaf: 2 * leaf, bptt.scan(*a, **kw))

    with pytest.raises(ValueError, match="More than one method is called 'scan'"):
        bptt.certify(*args, length=3, scans=[scan])
    with pytest.raises(ValueError, match="More than one method is called '<lambda>'"):
        bptt.certify(*args, length=3, scans=[lambda *a, **kw: scan(*a, **kw), lambda *a, **kw: scan(*a, **kw)])


def test_nan_and_wrong_shapes_do_not_slip_through():
    cell = make_cell("elman")
    args = cell, *problem(cell, 3), loss
    one_nan = lambda params, *_: params._replace(b=params.b * jnp.nan)
    nan_value = {
        "nan value": lambda *a, **kw: jax.tree.map(lambda y: y + jax.lax.stop_gradient(jnp.nan), bptt.scan(*a, **kw))
    }
    certificate = bptt.certify(*args, scans=nan_value, gradients={"one nan": one_nan}, repeats=1)
    assert [row.agrees for row in certificate.rows] == [True, False, False]
    assert math.isnan(certificate.rows[2].largest_error)
    labels = [text.get_text() for text in bptt.plots.plot_certificate(certificate).axes[0].texts]
    assert labels == ["0, exactly", "not a number", "not a number"]
    with pytest.raises(
        ValueError, match=r"'wrong' returned a gradient of params with shapes .*structure and shapes of params"
    ):
        bptt.certify(*args, gradients={"wrong": lambda params, *_: jax.tree.map(lambda g: g[None], params)}, repeats=1)


def test_figure_of_a_certificate_without_errors():
    certificate = bptt.certify(lambda w, h, x: (w * h, h), 0.5, 1.0, None, loss, length=2, scans=[], repeats=1)
    assert len(bptt.plots.plot_certificate(certificate).axes) == 3
