"""The certificate measures what it says, and finds a wrong gradient."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import make_cell, problem

import jaxbptt as bptt
from jaxbptt.analysis import certificate as certificates
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
        "parallel_adjoint_scan",
        "newton_scan",
    ]
    assert [row.name for row in certificate.rows] == names == seen
    assert certificate.dtype == "float64"
    assert certificate.tolerance == pytest.approx(np.finfo(float).eps ** 0.6)
    for row in certificate.rows:
        assert row.agrees
        assert set(row.errors) == {"params.W_xh", "params.W_hh", "params.b", "init.h", "init.c", "xs"}
        assert row.largest_error == max(row.errors.values()) < 1e-12
        assert row.temporary_bytes > 0
        assert row.flops > 0 or row.name == "newton_scan"  # whose iterations are counted as it runs
        assert row.seconds > 0
        assert row.compile_seconds > 0
    assert certificate.rows[0].largest_error == 0
    lines = str(certificate).splitlines()
    assert len(lines) == 1 + len(certificate.rows)
    assert lines[0].split() == ["method", "relative", "error", "temporary", "KiB", "Mflop", "ms", "agrees"]


def test_strategies_parallel_in_time_where_they_apply():
    """One for an affine step, none where Jacobians are too large, and no Jacobian of a custom_vjp."""

    def names(step, size=2, length=3):
        rows = certificates._parallel_strategies(step, 0.5, jnp.ones(size), None, length)
        return [name for name, _ in rows]

    def affine(w, h, x):
        return w * h + 1, h

    def nonlinear(w, h, x):
        return jnp.tanh(w * h[::-1]), h

    @jax.custom_vjp
    def own(h):
        return jnp.tanh(h)

    own.defvjp(lambda h: (jnp.tanh(h), h), lambda h, bar: ((1 - jnp.tanh(h) ** 2) * bar,))

    def by_own(w, h, x):
        return jax.jit(own)(w * h[::-1]), h

    assert names(affine) == ["parallel_scan"]
    assert names(by_own) == ["parallel_adjoint_scan"]
    assert names(lambda w, h, x: (jnp.tanh(w * h[::-1] + own(w)), h)) == ["parallel_adjoint_scan", "newton_scan"]
    assert names(nonlinear) == ["parallel_adjoint_scan", "newton_scan"]
    assert names(nonlinear, size=2_000) == names(affine, length=0) == []


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


def test_parts_of_a_right_adjoint():
    """A student's own for a bare step, and the cell's for the cell, with flags and nan in the padding."""

    def step(w, h, x):
        h = jnp.tanh(w * h + x)
        return h, h

    def backward(w, residuals, x, h_bar, y_bar):
        _, h = residuals
        delta = (h_bar + y_bar) * (1 - h**2)
        return w * delta, delta

    by_hand = bptt.Adjoint(
        forward=lambda w, h, x: (step(w, h, x), (h, step(w, h, x)[0])),
        backward=backward,
        contract=lambda w, residuals, xs, ys_bar, deltas: (jnp.vdot(deltas, residuals[0]), deltas),
    )
    xs = jnp.linspace(-1, 1, 10).reshape(5, 2)
    certificate = bptt.certify(step, 0.5, jnp.ones(2), xs, loss, scans=[], adjoint=by_hand, repeats=1)
    assert [row.name for row in certificate.rows] == ["scan", "adjoint_scan (given)"]
    assert certificate.rows[1].agrees
    names = ["forward", "backward", "contract"]
    assert [part.name for part in certificate.parts] == names
    assert all(part.agrees for part in certificate.parts)
    assert [[leaf.leaf for leaf in part.comparison.leaves] for part in certificate.parts] == [
        ["carry", "y"],
        ["carry"],
        ["params", "xs"],
    ]
    assert str(certificate).splitlines()[-3:] == [f"{name}: agrees" for name in names]

    valid = jnp.array([[1, 1], [1, 0], [0, 1], [0, 0]], bool)
    flags = {"valid": valid, "is_first": jnp.array([[0, 0], [1, 1], [0, 0], [0, 0]], bool)}
    cell = make_cell("lstm")
    params, init, xs = problem(cell, 4, (2,))
    spoilt = jnp.where(valid[..., None], xs, jnp.nan)
    certificate = bptt.certify(cell, params, init, spoilt, loss, scans=[], adjoint=cell.adjoint, repeats=1, **flags)
    assert all(part.agrees for part in certificate.parts)
    assert [leaf.leaf for leaf in certificate.parts[2].comparison.leaves] == [
        "params.W_xh",
        "params.W_hh",
        "params.b",
        "xs",
    ]


def wrong_forward(right):
    def forward(*args):
        (h, y), residuals = right.forward(*args)
        return (h, 2 * y), residuals

    return right._replace(forward=forward)


def wrong_backward(right):
    def backward(*args):
        carry_bar, delta = right.backward(*args)
        return -carry_bar, delta

    return right._replace(backward=backward)


def wrong_contract(right):
    def contract(*args):
        params_bar, xs_bar = right.contract(*args)
        return params_bar._replace(W_hh=params_bar.W_hh.T), xs_bar

    return right._replace(contract=contract)


def mean_over_time(right):
    def contract(params, residuals, xs, ys_bar, deltas):
        params_bar, xs_bar = right.contract(params, residuals, xs, ys_bar, deltas)
        return params_bar._replace(b=params_bar.b * len(xs) / 6), xs_bar

    return right._replace(contract=contract)


WRONG_PARTS = {
    "forward": (wrong_forward, "forward", {"y": "it is 2 times the reference"}),
    "backward": (wrong_backward, "backward", {"carry": "it has the wrong sign"}),
    "contract": (wrong_contract, "contract", {"params.W_hh": "it is the transpose"}),
    "segments": (mean_over_time, "contract in two segments", {"params.b": "it is 1/2 of the reference"}),
}


@pytest.mark.parametrize("case", WRONG_PARTS)
def test_which_part_is_wrong(case):
    wrong, name, causes = WRONG_PARTS[case]
    cell = make_cell("elman")
    args = problem(cell, 6, (2,))
    certificate = bptt.certify(cell, *args, loss, scans=[], adjoint=wrong(cell.adjoint), repeats=1)
    parts = [part for part in certificate.parts if not part.agrees]
    assert [part.name for part in parts] == [name]
    found = {leaf.leaf: leaf.cause for leaf in parts[0].comparison.leaves if not leaf.agrees}
    assert found.keys() == causes.keys()
    for leaf, cause in causes.items():
        assert re.search(cause, found[leaf])
        assert f"{name}: {leaf}: {found[leaf]}" in str(certificate).splitlines()


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
