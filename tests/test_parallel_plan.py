"""Sequential or parallel: what is advised where, and that each number of the forecast is what it says."""

import math
import re
from functools import cache, partial
from html import escape

import jax
import jax.numpy as jnp
import pytest

import jaxbptt as bptt
from jaxbptt.analysis import parallel_plan
from jaxbptt.analysis.parallel_plan import FIGURES, DeviceFigures

STEPS = 32


def decay(a, h, x):
    return a * h + x, h


AFFINE = decay, 0.5, jnp.zeros(3), jnp.ones((256, 3))


@cache
def on_a_gpu():
    return bptt.plan_parallel(*AFFINE, platform="cuda")


def problem(scale=1.0, steps=STEPS, size=2):
    """An elman layer whose states settle, or with larger weights do not."""
    cell = bptt.elman(2, size, dtype=jnp.float64)
    params = cell.init(jax.random.key(1))
    params = params._replace(W_hh=scale * params.W_hh)
    return cell, params, cell.initial_carry(), jax.random.normal(jax.random.key(2), (steps, 2))


def test_an_affine_step():
    plan = on_a_gpu()
    assert (plan.name, plan.scan, plan.options, plan.affine) == ("parallel_scan", bptt.parallel_scan, {}, True)
    assert [row.name for row in plan.rows] == ["adjoint_scan", "parallel_adjoint_scan", "parallel_scan"]
    assert math.isnan(plan.exponent)
    sequential, _, parallel = plan.rows
    assert sequential.depth > 4 * 256
    assert parallel.depth < 256
    assert parallel.flops > sequential.flops
    assert f"against {sequential.depth:,.0f} and" in plan.reason
    assert "affine in the carry, so one associative scan solves it" in str(plan)


def test_on_a_cpu_it_runs_in_sequence():
    plan = bptt.plan_parallel(*AFFINE, platform="cpu")
    assert (plan.name, plan.scan) == ("adjoint_scan", bptt.adjoint_scan)
    assert "on two cores the associative scan" in plan.reason
    assert all(math.isnan(row.seconds) for row in plan.rows)
    # Somebody who has measured a processor is believed.
    fast = DeviceFigures(
        loop_operation_seconds=1.0, operation_seconds=1.0, flops_per_second=1e12, bytes_per_second=1e12
    )
    assert bptt.plan_parallel(*AFFINE, platform="cpu", figures=fast).name == "parallel_scan"


def test_seconds_are_those_of_the_figures():
    figures = DeviceFigures(2.0, 7.0, flops_per_second=3.0, bytes_per_second=5.0)
    sequential, _, parallel = bptt.plan_parallel(*AFFINE, platform="tpu", figures=figures).rows
    work = sequential.flops / 3 + 4 * sequential.temporary_bytes / 5
    # All but a few operations of the one are in loops, and none of the other.
    assert sequential.seconds == pytest.approx(2 * sequential.depth + work, rel=0.05)
    work = parallel.flops / 3 + 4 * parallel.temporary_bytes / 5
    assert parallel.seconds == pytest.approx(7 * parallel.depth + work)


def test_a_budget():
    plan = on_a_gpu()
    sequential, _, parallel = plan.rows
    assert sequential.temporary_bytes < parallel.temporary_bytes
    within = partial(parallel_plan._chosen, plan, FIGURES["cuda"])
    assert within(parallel.temporary_bytes).name == "parallel_scan"
    assert within(sequential.temporary_bytes).name == "adjoint_scan"
    nothing = within(1)
    assert nothing.name == min(plan.rows, key=lambda row: row.temporary_bytes).name
    assert re.search(r"It needs .* of 1 bytes: plan\(\.\.\.\) finds what fits\.", nothing.reason)


@pytest.mark.slow
def test_states_that_settle():
    """Newton's iterations are counted, and the exponent is the library's own."""
    args = problem(steps=256)
    plan = bptt.plan_parallel(*args, platform="cuda", figures=DeviceFigures(1.0, 1.0, 1e12, 1e12))
    spectrum = bptt.lyapunov_exponents(*args, num_exponents=1, burn_in=25)
    assert plan.exponent == pytest.approx(spectrum.exponents[0])
    assert plan.standard_error == pytest.approx(spectrum.standard_errors[0])
    *_, full, diagonal = plan.rows
    for row in (full, diagonal):
        assert row.iterations == int(bptt.newton_states(*args, **row.options).iterations)
    assert full.iterations < diagonal.iterations
    assert (plan.name, plan.options) == ("newton_scan", {"jacobian": "full"})
    carry, _ = plan.scan(*args)
    assert jnp.allclose(carry, bptt.scan(*args)[0])
    assert "is below 0: small errors shrink" in plan.reason
    assert plan.reason in str(plan)
    assert escape(plan.reason) in plan._repr_html_()


@pytest.mark.slow
def test_a_batch_and_a_prefix():
    cell, params, _, xs = problem()
    xs = jnp.stack([xs, 2 * xs], axis=1)
    plan = bptt.plan_parallel(cell, params, cell.initial_carry((2,)), xs, platform="cuda", prefix=8)
    assert plan.rows[-2].note.endswith("on the first 8 steps")
    on_prefix = int(bptt.newton_states(cell, params, cell.initial_carry((2,)), xs[:8]).iterations)
    assert plan.rows[-2].iterations >= on_prefix


@pytest.mark.slow
def test_chaos():
    """λ₁ > 0: Newton does not converge, and it is said."""
    plan = bptt.plan_parallel(*problem(scale=4.0, steps=400, size=32), platform="cuda", prefix=400)
    assert plan.exponent > 2 * plan.standard_error
    *_, full, diagonal = plan.rows
    assert full.iterations == diagonal.iterations == full.seconds == math.inf
    assert plan.name != "newton_scan"
    assert "small errors grow, and Newton's iterations grow exponentially with T" in plan.reason
    assert "does not converge on the first 400 steps" in str(plan)


def test_extrapolated_iterations():
    extrapolated = partial(parallel_plan._extrapolated, 6.0, 100)
    assert extrapolated(50, 9.0, 0.0) == 6  # counted on all of them
    assert extrapolated(10_000, -0.2, 0.01) == 12  # log T
    assert extrapolated(200, 0.001, math.nan) == math.ceil(6 * math.exp(0.1))
    assert extrapolated(10_000, 0.1, 0.0) == 10_000  # by causality
    assert extrapolated(200, -0.01, 0.01) == math.ceil(6 * math.exp(0.01 * 100))  # perhaps not below 0
    assert parallel_plan._extrapolated(math.inf, 100, 200, -1.0, 0.0) == math.inf


def test_figures_reproduce_what_they_were_made_from():
    """Milliseconds on an H200, of chains of so many operations in loops and outside: adjoint_scan, and parallel_scan."""
    figures = FIGURES["cuda"]
    for depth, milliseconds in ((65_587, 56.7), (278_611, 231.57), (4_457_731, 3_838.31)):
        assert 1e3 * depth * figures.loop_operation_seconds == pytest.approx(milliseconds, rel=0.15)
    for depth, milliseconds in ((209, 0.53), (265, 0.88), (265, 1.05)):
        assert 1e3 * depth * figures.operation_seconds == pytest.approx(milliseconds, rel=0.3)


def test_wrong_arguments():
    own = jax.custom_vjp(jnp.tanh)
    own.defvjp(lambda h: (jnp.tanh(h), h), lambda h, bar: ((1 - jnp.tanh(h) ** 2) * bar,))
    with pytest.raises(TypeError, match=r"custom_vjp that reads the carry.*use adjoint_scan or parallel_adjoint_scan"):
        bptt.plan_parallel(lambda w, h, x: (own(w * h), h), 0.5, jnp.zeros(3), jnp.ones((4, 3)))
    with pytest.raises(ValueError, match=r"no figures for the platform 'tpu': pass figures=.*'cpu', 'cuda'"):
        bptt.plan_parallel(*AFFINE, platform="tpu")
    with pytest.raises(ValueError, match="prefix is 1"):
        bptt.plan_parallel(*AFFINE, prefix=1)
    with pytest.raises(ValueError, match="without time steps has nothing to run in parallel"):
        bptt.plan_parallel(decay, 0.5, jnp.zeros(3), jnp.ones((0, 3)))
