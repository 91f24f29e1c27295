r"""The exact strategy that fits a memory budget: compiled for the given shapes, so that the bytes are the compiler's."""

from collections.abc import Callable
from functools import partial
from math import isqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt.analysis.cost import Cost, compile_and_cost
from jaxbptt.arrays import check_concrete, is_number, scalar_loss
from jaxbptt.cells.cell import Cell
from jaxbptt.html_table import fields_table
from jaxbptt.programs.perturbed import everything
from jaxbptt.scans.adjoint import adjoint_scan
from jaxbptt.scans.checkpointed import checkpointed_scan, layout
from jaxbptt.scans.exact import scan
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.passes import Pass, one_pass
from jaxbptt.scans.recurrence import Recurrence, prepare
from jaxbptt.scans.segments import Layout
from jaxbptt.scans.truncated import truncated_scan
from jaxbptt.trees import combine, differentiable, is_array, partition
from jaxbptt.words import counted


class Plan(NamedTuple):
    """What to use for a gradient within a memory budget.

    Attributes:
        scan: the strategy with its options, to use in place of `scan`; `None` where nothing exact fits.
        name: of the strategy.
        options: of the strategy.
        fits: whether it fits the budget.
        predicted_bytes: temporary memory beyond arguments and results; where nothing fits, the least of all strategies.
        forward_steps: steps computed for one gradient, recomputed ones included; where nothing fits, for the
            strategy of least memory.
        reason: why this strategy, in words; where nothing fits, what would.
    """

    scan: Callable[..., Any] | None
    name: str
    options: dict[str, int]
    fits: bool
    predicted_bytes: int
    forward_steps: int
    reason: str

    _repr_html_ = fields_table


def plan(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    memory_bytes: float,
    loss: Callable[..., Any] | None = None,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
) -> Plan:
    r"""The exact strategy with the fewest forward steps that fits a memory budget.

    Tried in this order: `adjoint_scan`, unless the step can't be sorted, so that its derived adjoint recomputes it; `scan`;
    `checkpointed_scan` with the segment of least memory (every step twice); `checkpointed_scan` with as many checkpoints as
    fit. Unlike most functions here it compiles the
    gradient for each candidate, and runs none: bytes are those of the compiled gradient with respect to params and init,
    beyond arguments and results, at the full length.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`.
        params: θ, any pytree of arrays, or of their shapes (`jax.ShapeDtypeStruct`), as are `init` and `xs`.
        init: c₀.
        xs: inputs, leaves `[time, *batch, features]`, or `None` with `length`.
        memory_bytes: the budget for temporary memory, in bytes.
        loss: `loss(carry, ys) -> scalar`. By default the sum of squares of both, which needs all outputs at once; a loss of
            the last carry alone needs much less.
        length: T, needed where `xs` is `None`.
        is_first: booleans `[time, *batch]` as for `scan`, or their shape.
        valid: booleans `[time, *batch]` as for `scan`, or their shape.
        reset_carry: what `is_first` resets to, as for `scan`.

    Returns:
        A `Plan`; use `plan.scan(step, params, init, xs)`, with the flags where there are any.

    Raises:
        ValueError: a budget that is not positive; and as for `scan`.
        TypeError: as for `scan`.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell = bptt.elman(8, 64)
        >>> shapes = jax.eval_shape(cell.init, jax.random.key(0)), jax.eval_shape(cell.initial_carry)
        >>> xs = jax.ShapeDtypeStruct((10_000, 8), "float32")
        >>> best = bptt.plan(cell, *shapes, xs, memory_bytes=2**20, loss=lambda carry, ys: (carry**2).sum())
        >>> best.name, best.forward_steps, best.predicted_bytes < 2**20
        ('checkpointed_scan', 20000, True)
    """
    check_concrete("plan", params=params, init=init, xs=xs)
    if not is_number(memory_bytes, 0):
        raise ValueError(f"memory_bytes is {memory_bytes!r}, but a gradient needs some: pass the bytes there are.")
    flags = {"is_first": is_first, "valid": valid, "reset_carry": reset_carry}
    arrays, not_arrays = partition((params, init, xs, flags), by=is_array)
    case = Case(step, arrays, not_arrays, sum_of_squares if loss is None else scalar_loss(loss), length)
    steps = _look(case, lambda r, _: r.length)
    tried = []

    def attempt(strategy: Callable[..., Any], forward_steps: int, why: str, **options: int) -> Plan:
        scan = partial(strategy, **options) if options else strategy
        need = _temporary_bytes(case, scan)
        tried.append(Plan(scan, strategy.__name__, options, need <= memory_bytes, need, forward_steps, why))
        return tried[-1]

    why = _why_adjoint_scan(case)
    best = None if why is None else attempt(adjoint_scan, steps, why)
    if best is None or not best.fits:
        best = attempt(scan, steps, "every step is computed once")
    if not best.fits and steps:
        segment = _cut(case, None).segment
        best = attempt(
            checkpointed_scan,
            2 * steps,
            f"every step is computed twice, and a state kept every {counted(segment, 'step')}",
            segment_length=segment,
        )
    if not best.fits and steps:
        best = _most_checkpoints(case, attempt, steps, memory_bytes)
    if best.fits:
        return _explained(best, memory_bytes)
    least = min(tried, key=lambda plan: plan.predicted_bytes)
    return least._replace(scan=None, fits=False, reason=_what_would_fit(case, least, steps, memory_bytes))


class Case(NamedTuple):
    """The problem: params, init, xs and flags, as arrays (or their shapes) and as leaves that are no arrays."""

    step: Any
    arrays: Any
    not_arrays: Any
    loss: Callable[..., Any]
    length: Any


def _most_checkpoints(case: Case, attempt: Callable[..., Plan], steps: int, memory_bytes: float) -> Plan:
    """The largest number of checkpoints that fits, to a tenth: bracketed by doubling, then narrowed."""

    def with_checkpoints(number):
        cut = _cut(case, number)
        why = f"the states kept are as many as fit, and steps are computed {cut.forward_steps / steps:.1f} times on average"
        return attempt(checkpointed_scan, cut.forward_steps, why, checkpoints=number)

    fewest, most = 1, steps + 1
    best, above = with_checkpoints(fewest), None
    if not best.fits:
        return best
    number = max(isqrt(steps), 1)
    while most - fewest > max(1, fewest // 10):
        candidate = with_checkpoints(number)
        if candidate.fits:
            best, fewest = candidate, number
        else:
            above, most = candidate, number
        if above is None:
            number = min(2 * number, most - 1)
        else:  # bytes are nearly linear in the number of states
            share = (memory_bytes - best.predicted_bytes) / max(above.predicted_bytes - best.predicted_bytes, 1)
            number = min(max(fewest + int(share * (most - fewest)), fewest + 1), most - 1)
    return best


def _what_would_fit(case: Case, least: Plan, steps: int, memory_bytes: float) -> str:
    message = (
        f"No exact strategy fits {in_bytes(memory_bytes)}: the least is {least.name}{_options(least.options)}, which needs "
        f"{in_bytes(least.predicted_bytes)}."
    )
    if case.loss is sum_of_squares:
        message += " No loss was given, so one that reads all outputs was assumed: pass loss= if yours reads less."
    number, need = steps, memory_bytes
    while number > 1:
        number = max(number // 4, 1)
        need = _temporary_bytes(case, partial(truncated_scan, truncation_length=number))
        if need <= memory_bytes:
            return f"{message} The biased truncated_scan fits, for example with truncation_length={number}: {in_bytes(need)}."
    return (
        f"{message} Truncation does not help: with truncation_length=1 it needs {in_bytes(need)}, for one step and what the "
        "loss reads. If the loss reads the outputs of all steps, let the step return only what the loss needs."
    )


def _explained(plan: Plan, memory_bytes: float) -> Plan:
    fits = f"{plan.name}{_options(plan.options)} needs {in_bytes(plan.predicted_bytes)} of {in_bytes(memory_bytes)}"
    return plan._replace(reason=f"{fits}: {plan.reason}.")


def _options(options: dict[str, int]) -> str:
    return " with " * bool(options) + ", ".join(f"{key}={value}" for key, value in options.items())


def in_bytes(number: float) -> str:
    """A number of bytes in words."""
    for unit in ("bytes", "KiB", "MiB"):
        if number < 2**10:
            return f"{number:.4g} {unit}"
        number /= 2**10
    return f"{number:.4g} GiB"


def _temporary_bytes(case: Case, scan: Callable[..., Any]) -> int:
    return gradient_cost(case, scan).temporary_bytes


def gradient_cost(case: Case, scan: Callable[..., Any], runs: int | None = None) -> Cost:
    """Of value and gradient with respect to params and init, compiled; `runs` is for `compile_and_cost`."""

    def value_and_gradient(arrays):
        params, init, xs, flags = combine(arrays, case.not_arrays)
        diff, nondiff = partition((params, init))

        def unrolled_loss(diff):
            params, init = combine(diff, nondiff)
            return case.loss(*scan(case.step, params, init, xs, length=case.length, **flags))

        return jax.value_and_grad(unrolled_loss)(diff)

    return compile_and_cost(value_and_gradient, case.arrays, runs=runs)[1]


def _why_adjoint_scan(case: Case) -> str | None:
    """The reason for `adjoint_scan`, which is the fastest; `None` where its adjoint would compute each step three times."""
    over_time = _look(case, lambda r, flags: _differentiated(case, r, flags)[0])
    if over_time.adjoint.by_vjp:
        return None
    whose = "the cell's own" if over_time.step.by_hand else "derived, and only what depends on the carry is in its loop"
    return f"every step is computed once, and the backward pass is {whose}"


def _cut(case: Case, checkpoints: int | None) -> Layout:
    """How `checkpointed_scan` cuts time."""

    def cut(r, flags):
        over_time, r = _differentiated(case, r, flags)
        return layout(over_time, r.params, r.init, r.xs, r.length, None, checkpoints)

    return _look(case, cut)


def _differentiated(case: Case, r: Recurrence, flags: dict[str, Any]) -> tuple[Pass, Recurrence]:
    """The pass of a strategy, for a gradient with respect to params and init."""
    given = Flags(**flags)
    over_time, r = one_pass(case.step, None, r, given, unroll=1)
    perturbed = everything(r.params, r.init, r.xs)._replace(x=_nothing(r.xs))  # the inputs get no gradient
    if given.given:
        # Nor does what flags add to the params.
        params, *added = perturbed.params
        perturbed = perturbed._replace(params=(params, *map(_nothing, added)))
    return over_time.differentiated(perturbed), r


def _nothing(tree: Any) -> Any:
    return jax.tree.map(lambda _: False, tree)


def _look(case: Case, at: Callable[[Recurrence, dict[str, Any]], Any]) -> Any:
    """`at(recurrence, flags)`, where only shapes are known."""
    seen = []

    def look(arrays):
        params, init, xs, flags = combine(arrays, case.not_arrays)
        seen.append(at(prepare(case.step, params, init, xs, case.length), flags))

    jax.eval_shape(look, case.arrays)
    return seen[-1]


def sum_of_squares(carry: Any, ys: Any) -> Any:
    """A loss that needs all outputs and the last carry."""
    leaves = jax.tree.leaves(differentiable((carry, ys)))
    return sum(jnp.vdot(leaf, leaf).real.astype(jnp.float32) for leaf in leaves)
