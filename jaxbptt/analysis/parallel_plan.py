r"""Sequential or parallel in time: a forecast of which is faster, from a step, its data and figures of a device."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax

from jaxbptt.analysis.cost import Cost
from jaxbptt.analysis.lyapunov import lyapunov_exponents
from jaxbptt.analysis.plan import Case, gradient_cost, in_bytes, sum_of_squares
from jaxbptt.arrays import check_concrete, check_count, is_number, scalar_loss
from jaxbptt.cells.cell import Cell
from jaxbptt.html_table import fields_table, html_table, text_table
from jaxbptt.scans.adjoint import adjoint_scan
from jaxbptt.scans.newton import newton_scan, newton_states
from jaxbptt.scans.parallel import coefficients_of, parallel_scan
from jaxbptt.scans.parallel_adjoint import parallel_adjoint_scan
from jaxbptt.scans.recurrence import Recurrence, prepare
from jaxbptt.trees import is_array, partition
from jaxbptt.words import counted


class DeviceFigures(NamedTuple):
    """What a forecast assumes of a device.

    Attributes:
        loop_operation_seconds: of one small operation that waits for the one before it, in a loop over time.
        operation_seconds: of one outside such loops, as in an associative scan.
        flops_per_second: of large products, float32.
        bytes_per_second: of memory.
    """

    loop_operation_seconds: float
    operation_seconds: float
    flops_per_second: float
    bytes_per_second: float

    _repr_html_ = fields_table


FIGURES = {
    # Measured on an H200, jax 0.11.2 (benchmarks/results/parallel_gpu_jax_0.11.2.md). In a loop: adjoint_scan, eight steps in an
    # iteration, 0.8 to 0.9 µs an operation for h ↦ aₜ h + bₜ and a gru (elman 0.4), 1,024 to 262,144 steps. Outside:
    # parallel_scan of h ↦ aₜ h + bₜ, 2.1 to 4.7 µs. An 8192 × 8192 product in float32: gpu_h200_jax_0.11.2.md. Memory: the
    # data sheet, not measured.
    "cuda": DeviceFigures(
        loop_operation_seconds=0.85e-6, operation_seconds=3e-6, flops_per_second=5.0e13, bytes_per_second=4.8e12
    ),
}
"""By platform. On a CPU there is nothing to forecast: see `ON_A_CPU`."""

# benchmarks/parallel.py, and by hand: h ↦ aₜ h + bₜ with T/n = 4096/256, 4096/1024, 65536/16 and 1024/8192.
ON_A_CPU = (
    "a processor's loop waits for nothing between two steps, and strategies that are parallel in time compute more: on two "
    "cores the associative scan of an element-wise affine recurrence took 1.6 to 2.4 times as long as lax.scan"
)

# How often each byte of temporary memory is moved in one pass over time, read or written: assumed, not measured.
_MOVES = 4
# Numbers of the dense Jacobians of a prefix, and iterations tried on it.
_PREFIX_NUMBERS, _MOST_ITERATIONS = 2**24, 100
# Steps that the Lyapunov exponent is taken from; a tenth of them is burn-in.
_STEPS = 4096


class StrategyForecast(NamedTuple):
    """What one strategy needs for value and gradient.

    Attributes:
        name: of the strategy.
        options: of the strategy.
        iterations: passes over time that are expected: 1 where no iteration is needed, inf where none of 100 sufficed.
        depth: the longest chain of operations that wait for one another.
        flops: floating-point operations.
        temporary_bytes: memory beyond arguments and results, by the compiler.
        seconds: a forecast of the time of value and gradient; nan where there are no figures, inf where Newton's method is not expected to converge.
        note: what the iterations stand on.
    """

    name: str
    options: dict[str, Any]
    iterations: float
    depth: float
    flops: float
    temporary_bytes: int
    seconds: float
    note: str

    _repr_html_ = fields_table


_COLUMNS = ("strategy", "iterations", "depth", "Mflop", "temporary MiB", "forecast ms")


class ParallelPlan(NamedTuple):
    """Whether to run a recurrence in sequence or parallel in time. Prints as a table and a sentence.

    Attributes:
        scan: the strategy with its options, to use in place of `scan`.
        name: of the strategy.
        options: of the strategy.
        reason: why this strategy, in words.
        rows: a `StrategyForecast` for each strategy; the first runs in sequence.
        platform: that it is planned for.
        length: T, time steps.
        affine: whether the step is affine in the carry, so that no iteration is needed.
        exponent: λ₁, the leading Lyapunov exponent in nats a step; nan for an affine step, which does not need it.
        standard_error: of λ₁; nan where the data are too short for one.
    """

    scan: Callable[..., Any]
    name: str
    options: dict[str, Any]
    reason: str
    rows: tuple[StrategyForecast, ...]
    platform: str
    length: int
    affine: bool
    exponent: float
    standard_error: float

    def __str__(self) -> str:
        return "\n".join([text_table(_COLUMNS, map(_in_words, self.rows)), *self._notes()])

    def _repr_html_(self) -> str:
        return html_table(_COLUMNS, map(_in_words, self.rows), title=f"For {self.platform}", notes=self._notes())

    def _notes(self) -> list[str]:
        return [self.reason, *(f"{_called(row)}: {row.note}." for row in self.rows if row.note)]


def plan_parallel(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    loss: Callable[..., Any] | None = None,
    platform: str | None = None,
    figures: DeviceFigures | None = None,
    memory_bytes: float | None = None,
    prefix: int = 512,
) -> ParallelPlan:
    r"""Forecast whether a recurrence is faster in sequence or parallel in time, and say why.

    seconds ≈ depth in loops · t_loop + depth outside · t + flops / f + 4 · iterations · bytes / b,  with t_loop, t, f and b of
    the device

    In sequence the depth grows with T. Parallel in time it grows with log T, at the price of more operations and more memory;
    for a step that is not affine in the carry, times the iterations of Newton's method. They are counted on the
    first steps of the data, and extrapolated by the leading Lyapunov exponent λ₁: for λ₁ < 0 they grow like log T, for
    λ₁ > 0 like e^(λ₁ T), up to T. Where λ₁ is less than two standard errors below 0, λ₁ + 2 standard errors is taken for it.

    It is a forecast and no measurement: seconds are good for an order of magnitude. Nothing runs but the first steps of the
    data, here, whatever the platform. Compiles the gradient by each strategy, for the bytes, so don't call it inside `jit`.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`.
        params: θ, any pytree.
        init: c₀.
        xs: inputs, leaves `[time, *batch, features]`, or `None` with `length`. A sequence without resets and padding.
        length: T, needed where `xs` is `None`.
        loss: `loss(carry, ys) -> scalar`; by default the sum of squares of both.
        platform: to plan for, as JAX names it: "cpu", "cuda". By default the one that JAX runs on here.
        figures: of the device; by default those of `jaxbptt.analysis.FIGURES` for the platform. On a CPU none are needed:
            measured there, parallel in time was slower.
        memory_bytes: the budget for temporary memory, in bytes; strategies that need more are not advised.
        prefix: steps on which Newton's iterations are counted; fewer where their dense Jacobians would have more than
            2²⁴ numbers.

    Returns:
        A `ParallelPlan`; use `plan.scan(step, params, init, xs)`.

    Raises:
        ValueError: a platform without figures, a prefix below 2, a budget not above 0, an empty sequence; and as `scan` and `lyapunov_exponents`.
        TypeError: traced arguments; as `scan`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> decay = lambda a, h, x: (a * h + x, h)
        >>> on_a_gpu = bptt.plan_parallel(decay, 0.5, jnp.zeros(()), jnp.ones(1000), platform="cuda")
        >>> in_sequence, *_, parallel = on_a_gpu.rows
        >>> on_a_gpu.name, in_sequence.depth > 4_000, parallel.depth < 400
        ('parallel_scan', True, True)
        >>> print(on_a_gpu.reason)  # doctest: +ELLIPSIS
        parallel_scan: a chain of ... operations and ... ms by the forecast, against 4,0... ms for adjoint_scan. The step ...

    References:
        Gonzalez et al., Predictability enables parallelization of nonlinear state space models, 2025, arXiv:2508.16817.
        Lim et al., Parallelizing non-linear sequential models over the sequence length, 2024, arXiv:2309.12252.
    """
    check_concrete("plan_parallel", params=params, init=init, xs=xs)
    check_count("prefix", prefix, "Newton's iterations are counted on so many steps", least=2)
    r = prepare(step, params, init, xs, length)
    if not r.length:
        raise ValueError("A sequence without time steps has nothing to run in parallel: pass at least one step.")
    if memory_bytes is not None and not is_number(memory_bytes, 0):
        raise ValueError(f"memory_bytes is {memory_bytes!r}: pass the bytes there are, or None for no limit.")
    if figures is not None and not isinstance(figures, DeviceFigures):
        raise TypeError(f"figures is a {type(figures).__name__}: pass jaxbptt.analysis.DeviceFigures(...), or None.")
    if platform is None:
        platform = {"gpu": "cuda"}.get(jax.default_backend(), jax.default_backend())
    if not isinstance(platform, str):
        raise TypeError(f"platform is a {type(platform).__name__}: pass its name, such as 'cuda', or None.")
    figures = FIGURES.get(platform) if figures is None else figures
    if figures is None and platform != "cpu":
        raise ValueError(
            f"There are no figures for the platform {platform!r}: pass figures=jaxbptt.analysis.DeviceFigures(...), or "
            f"one of the platforms {', '.join(map(repr, ['cpu', *FIGURES]))}."
        )
    affine, numbers, forward_mode = coefficients_of(step, r)
    if not forward_mode:
        raise TypeError(
            "The step has a jax.custom_vjp that reads the carry, so it has no derivative in forward mode, and neither its "
            "Lyapunov exponent nor a step of Newton's method can be computed: use adjoint_scan or parallel_adjoint_scan."
        )
    flags = dict.fromkeys(("is_first", "valid", "reset_carry"))
    arrays, not_arrays = partition((params, init, xs, flags), by=is_array)
    case = Case(step, arrays, not_arrays, sum_of_squares if loss is None else scalar_loss(loss), length)

    def forecast(scan: Callable[..., Any], iterations: float = 1, note: str = "", **options: Any) -> StrategyForecast:
        runs = int(iterations) if math.isfinite(iterations) else None
        cost = gradient_cost(case, partial(scan, **options) if options else scan, runs)
        seconds = _seconds(cost, iterations, figures)
        return StrategyForecast(
            scan.__name__, options, iterations, cost.depth, cost.flops, cost.temporary_bytes, seconds, note
        )

    rows = [forecast(adjoint_scan), forecast(parallel_adjoint_scan)]
    exponent = standard_error = math.nan
    if affine:
        rows.append(forecast(parallel_scan))
    else:
        exponent, standard_error = _leading_exponent(step, params, init, xs, r)
        steps = max(min(prefix, r.length, _PREFIX_NUMBERS // max(numbers, 1)), 1)
        for jacobian in ("full", "diagonal"):
            counted_here = _iterations(step, r, steps, jacobian)
            expected = _extrapolated(counted_here, steps, r.length, exponent, standard_error)
            note = f"{_number(counted_here)} on the first {counted(steps, 'step')}"
            rows.append(forecast(newton_scan, expected, note, jacobian=jacobian))
    found = ParallelPlan(
        adjoint_scan, "adjoint_scan", {}, "", tuple(rows), platform, r.length, affine, exponent, standard_error
    )
    return _chosen(found, figures, math.inf if memory_bytes is None else memory_bytes)


def _seconds(cost: Cost, iterations: float, figures: DeviceFigures | None) -> float:
    if figures is None:
        return math.nan
    if not math.isfinite(iterations):
        return math.inf
    moved = _MOVES * iterations * cost.temporary_bytes / figures.bytes_per_second
    outside = cost.depth_outside_loops
    chain = (cost.depth - outside) * figures.loop_operation_seconds + outside * figures.operation_seconds
    return chain + cost.flops / figures.flops_per_second + moved


def _leading_exponent(step: Any, params: Any, init: Any, xs: Any, r: Recurrence) -> tuple[float, float]:
    """λ₁ and its standard error, of all rows of a batch together."""
    steps = min(r.length, _STEPS)
    first = jax.tree.map(lambda leaf: leaf[:steps], xs)
    bare = step.step if isinstance(step, Cell) else step  # a Cell says which axes are a batch's, and has to have none
    spectrum = jax.jit(
        lambda arrays: lyapunov_exponents(bare, *arrays, length=steps, num_exponents=1, burn_in=steps // 10)
    )((params, init, first))
    return float(spectrum.exponents[0]), float(spectrum.standard_errors[0])


def _iterations(step: Any, r: Recurrence, steps: int, jacobian: Literal["full", "diagonal"]) -> float:
    """Of Newton's method on the first steps of the data; inf where it did not converge."""

    def happened(params, init, xs):
        states = newton_states(step, params, init, xs, length=steps, jacobian=jacobian, max_iterations=_MOST_ITERATIONS)
        return states.iterations, states.converged

    first = jax.tree.map(lambda leaf: leaf[:steps], r.xs)
    iterations, converged = jax.jit(happened)(r.params, r.init, first)
    return float(iterations) if converged else math.inf


def _extrapolated(iterations: float, steps: int, length: int, exponent: float, standard_error: float) -> float:
    """The iterations over the whole sequence. By causality T are always enough."""
    if steps >= length or not math.isfinite(iterations):
        return iterations
    worst = _at_worst(exponent, standard_error)
    growth = math.log(length) / math.log(max(steps, 2)) if worst < 0 else math.exp(min(worst * (length - steps), 700))
    return float(math.ceil(min(iterations * growth, length)))


def _at_worst(exponent: float, standard_error: float) -> float:
    """λ₁, or two standard errors more: an exponent that may not be negative counts as one that is not."""
    return exponent + (0 if math.isnan(standard_error) else 2 * standard_error)


def _chosen(plan: ParallelPlan, figures: DeviceFigures | None, memory_bytes: float) -> ParallelPlan:
    """With the strategy of the least forecast among those that fit, and the reason."""
    sequential, *others = plan.rows
    fitting = [row for row in plan.rows if row.temporary_bytes <= memory_bytes] or [
        min(plan.rows, key=lambda row: row.temporary_bytes)
    ]
    if figures is None:
        best, why = sequential, f"{ON_A_CPU}"
    else:
        best = min(fitting, key=lambda row: row.seconds)
        why = _compared(best, sequential, min(others, key=lambda row: row.seconds))
    why = f"{_called(best)}: {why}. {_about_the_step(plan)}"
    if best.temporary_bytes > memory_bytes:
        why += f" It needs {in_bytes(best.temporary_bytes)} of {in_bytes(memory_bytes)}: plan(...) finds what fits."
    strategies = {each.__name__: each for each in (adjoint_scan, parallel_adjoint_scan, parallel_scan, newton_scan)}
    scan = strategies[best.name]
    return plan._replace(
        scan=partial(scan, **best.options) if best.options else scan, name=best.name, options=best.options, reason=why
    )


def _compared(best: StrategyForecast, sequential: StrategyForecast, parallel: StrategyForecast) -> str:
    """The forecast of the best strategy beside that of the other kind."""
    other = parallel if best is sequential else sequential
    if not math.isfinite(other.seconds):
        return f"{_called(other)} is not expected to converge"
    return (
        f"a chain of {best.depth:,.0f} operations and {_time(best.seconds)} by the forecast, against {other.depth:,.0f} and "
        f"{_time(other.seconds)} for {_called(other)}"
    )


def _about_the_step(plan: ParallelPlan) -> str:
    if plan.affine:
        return "The step is affine in the carry, so one associative scan solves it, without iterations."
    known = "without an error bar" if math.isnan(plan.standard_error) else f"± {plan.standard_error:.2g}"
    exponent = f"λ₁ = {plan.exponent:.3g} {known} a step"
    if _at_worst(plan.exponent, plan.standard_error) < 0:
        return f"{exponent} is below 0: small errors shrink, and Newton's iterations grow like log T."
    if plan.exponent > 0:
        return f"{exponent}: small errors grow, and Newton's iterations grow exponentially with T."
    return f"{exponent} may not be below 0, and then Newton's iterations grow exponentially with T."


def _called(row: StrategyForecast) -> str:
    """As it is written in a program."""
    options = ", ".join(f"{key}={value!r}" for key, value in row.options.items())
    return f"{row.name}({options})" if options else row.name


def _in_words(row: StrategyForecast) -> tuple[str, ...]:
    """The cells under `_COLUMNS`."""
    return (
        _called(row),
        _number(row.iterations),
        _number(row.depth),
        _number(row.flops / 1e6, ",.2f"),
        f"{row.temporary_bytes / 2**20:,.1f}",
        _number(1e3 * row.seconds, ",.3g"),
    )


def _number(value: float, form: str = ",.0f") -> str:
    return format(value, form) if math.isfinite(value) else "–" if math.isnan(value) else "does not converge"


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
