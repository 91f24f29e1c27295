r"""Why a gradient vanishes, explodes or is not finite: the possible causes separated, in numbers and in one sentence.

The rate at which a gradient changes in the backward pass is split into three terms, which add up to the observed rate:
what the weights would do with every tanh and σ at its steepest, what saturation takes away, and the rest, due to
misalignment with the leading Lyapunov direction.
"""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from jaxbptt.analysis.activations import relative_slopes, without_saturation
from jaxbptt.analysis.finite import BadEntry, first_bad_backward, first_bad_forward
from jaxbptt.analysis.flow import flow_and_trajectory
from jaxbptt.analysis.lyapunov import spectrum_along
from jaxbptt.analysis.norms import norm
from jaxbptt.analysis.operators import JacobianOperators, operators_along
from jaxbptt.analysis.sweep import random_frame
from jaxbptt.analysis.trajectory import prepare_state
from jaxbptt.arrays import check_callable, check_concrete, check_count
from jaxbptt.cells.cell import Cell, step_of
from jaxbptt.html_table import fields_table
from jaxbptt.programs.trace import trace
from jaxbptt.scans.flags import Flags, check_flags
from jaxbptt.scans.recurrence import Recurrence
from jaxbptt.trees import combine, differentiable, is_array, partition
from jaxbptt.words import counted

# A gradient that shrinks or grows by less than this factor over the whole sequence counts as steady.
_STEADY = 100.0
_POWER_ITERATIONS = 30


class GradientRates(NamedTuple):
    """Growth of a gradient per backward step, in nats, and its terms: `observed = weights + saturation + alignment`.

    Attributes:
        observed: mean of log(‖Jₜᵀ dₜ‖ / ‖dₜ‖).
        weights: leading Lyapunov exponent with the slope of every tanh and σ at its largest.
        saturation: the leading Lyapunov exponent, less `weights`.
        alignment: `observed`, less the leading Lyapunov exponent: below 0 where the gradient is misaligned with the leading
            Lyapunov direction.
    """

    observed: float
    weights: float
    saturation: float
    alignment: float

    _repr_html_ = fields_table


class GradientDiagnosis(NamedTuple):
    """What happened to a gradient in the backward pass, and why.

    Attributes:
        sentence: the diagnosis in plain words.
        cause: "weights", "saturation" or "alignment" for a gradient that vanishes; "explosion"; "steady"; "cut" where
            one step takes it to exactly 0; "no gradient" where no step passes any back; "forward" or
            "backward", the pass in which the first value that is not finite appears.
        rates: the growth of the gradient per step, and its terms.
        exponents: the leading Lyapunov exponents of the state, driven by the inputs, `[k]`; over steps that are neither
            padding nor the first of a sequence, as are all rates.
        standard_errors: of the exponents, `[k]`.
        slopes: for each tanh and σ in the order of the step, so by layer and gate: the mean slope over units and time,
            relative to its largest value; 0 is saturated.
        alignment: |cos| of dₜ and the leading Lyapunov direction at step t, `[time]`; about 1/√n for a random direction, nan
            where dₜ is 0, in the padding and at the first step of a sequence.
        bound_rate: γσ, where no gradient can grow faster than (γσ)^lag. The geometric mean over time of the largest singular
            value of the Jacobian with every slope at its largest: σ_max(W_hh) for an Elman cell.
        forward: the first value that is not finite in the forward pass or its arguments, or `None`.
        backward: the first one in the backward pass, which starts at the end of the sequence, or `None`.
    """

    sentence: str
    cause: str
    rates: GradientRates
    exponents: Float[np.ndarray, " k"]
    standard_errors: Float[np.ndarray, " k"]
    slopes: Mapping[str, float]
    alignment: Float[np.ndarray, " time"]
    bound_rate: float
    forward: BadEntry | None
    backward: BadEntry | None

    _repr_html_ = fields_table


def diagnose_gradient(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any,
    loss: Callable[..., Any],
    *,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
    num_exponents: int = 8,
) -> GradientDiagnosis:
    r"""Say why a gradient vanishes, explodes or is not finite.

    mean log(‖Jₜᵀ dₜ‖/‖dₜ‖) = λ₁° + (λ₁ − λ₁°) + rest

    with dₜ = ∂L/∂hₜ, λ₁ the leading Lyapunov exponent and λ₁° the same with every slope of tanh and σ at its largest. The
    three terms are those of weights, saturation and alignment. Unlike most functions here it compiles what it computes, one
    program for each step and loss, reused when the same functions are passed again; don't call it inside `jit`. Time O(T)
    steps, one forward pass for all of it, and Lyapunov exponents of a few directions; memory O(T n).

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`, differentiable in forward mode: no `jax.custom_vjp` in it.
        params: θ, any pytree.
        init: c₀, without batch axis: diagnose one row of a batch.
        xs: inputs, leaves `[time, features]`, or `None` with `length`.
        loss: `loss(carry, ys) -> scalar`, of the last carry and all outputs.
        length: T, needed where `xs` is `None`.
        is_first: booleans `[time]`, as for `scan`. What the gradient does inside of sequences is diagnosed: that it does not
            pass from one to the one before is no "cut".
        valid: booleans `[time]`, as for `scan`: padded steps count for nothing.
        reset_carry: what `is_first` resets to, as for `scan`.
        num_exponents: how many Lyapunov exponents to report, at most n.

    Returns:
        A `GradientDiagnosis` in numpy; numbers that a gradient of 0, or one that is not finite, does not have are nan.

    Raises:
        ValueError: as for `jacobian_operators`; a sequence without time steps, flags that leave none of them to pass a
            gradient back, `num_exponents` below 1.
        TypeError: as for `jacobian_operators`; traced arguments, a loss that is not a function.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.elman(3, 16)
        >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (100, 3))
        >>> loss = lambda h, ys: jnp.sum(h)
        >>> bptt.diagnose_gradient(cell, params, cell.initial_carry(), 5 * xs, loss).cause
        'saturation'
        >>> small = params._replace(W_hh=params.W_hh / 3)
        >>> bptt.diagnose_gradient(cell, small, cell.initial_carry(), 0.1 * xs, loss).cause
        'weights'

    References:
        Pascanu, Mikolov and Bengio, On the difficulty of training recurrent neural networks, 2013, arXiv:1211.5063.
    """
    flags = Flags(is_first, valid, reset_carry)
    check_concrete("diagnose_gradient", params=params, init=init, xs=xs, **flags._asdict())
    check_callable("loss", loss, "loss(carry, ys) -> scalar")
    check_count("num_exponents", num_exponents, "it counts Lyapunov exponents")
    r = prepare_state(step, params, init, xs, length, flags)
    if r.length == 0:
        raise ValueError("A sequence without time steps has no gradient through time: pass at least one step.")
    rows = _Rows.of(r, flags)
    steps = np.flatnonzero(rows.passes) if flags.given else None
    arrays, not_arrays = partition((r.params, r.init, r.xs, flags, steps), by=is_array)
    leaves, treedef = jax.tree.flatten(not_arrays)
    static = step_of(step), loss, num_exponents, r.length, treedef, tuple(leaves)
    try:
        hash(static)
        results = _compiled(*static, arrays)
    except TypeError:
        results = jax.jit(partial(_numbers, *static))(arrays)
    numbers = jax.tree.map(np.asarray, results)
    forward = first_bad_forward(r, numbers.carries, numbers.ys, numbers.flow.loss, rows.valid)
    backward = first_bad_backward(numbers.flow)
    rates, bound_rate = _rates(numbers, rows)
    cut_at = _cut_at(numbers, rows)
    cause = _cause(numbers, rows, rates, forward, backward, cut_at)
    in_order = sorted(numbers.slopes.items(), key=lambda item: int(item[0].split()[1]))
    slopes = {kind: float(np.mean(values[rows.valid], dtype=float)) for kind, values in in_order}
    diagnosis = GradientDiagnosis(
        sentence="",
        cause=cause,
        rates=rates,
        exponents=numbers.exponents,
        standard_errors=numbers.standard_errors,
        slopes=slopes,
        alignment=np.where(rows.passes, numbers.alignment, np.asarray(np.nan, numbers.alignment.dtype)),
        bound_rate=bound_rate,
        forward=forward,
        backward=backward,
    )
    underflows = int(np.argmax(numbers.flow.norms > 0))
    if rows.first[underflows]:
        underflows = 0  # nothing comes back to the sequences before
    return diagnosis._replace(sentence=_sentence(diagnosis, r.length, rows.longest, cut_at, underflows))


class _Rows(NamedTuple):
    """What the flags say of the time steps of the row.

    Attributes:
        first: where a sequence begins, `[time]`.
        valid: where a step is none of padding, `[time]`.
        passes: where a step could pass a gradient back, `[time]`.
        longest: how many of those the longest sequence has.
    """

    first: np.ndarray
    valid: np.ndarray
    passes: np.ndarray
    longest: int

    @classmethod
    def of(cls, r: Recurrence, flags: Flags) -> "_Rows":
        valid = np.ones(r.length, bool) if flags.valid is None else np.array(check_flags("valid", flags.valid, r))
        first = np.zeros(r.length, bool)
        if flags.is_first is not None:
            first = np.array(check_flags("is_first", flags.is_first, r)) & valid
        passes = valid & ~first
        if not passes.any():
            raise ValueError(
                "is_first and valid leave no step that passes a gradient back: each is padding or the first of a sequence."
            )
        return cls(first, valid, passes, int(np.bincount(np.cumsum(first)[passes]).max()))


class _Numbers(NamedTuple):
    """All that is computed, before it is interpreted.

    Attributes:
        carries: after every step, differentiable leaves.
        ys: the outputs, differentiable leaves.
        flow: the `GradientFlow`.
        passed_on: ‖Jₜᵀ dₜ‖, `[time]`.
        leading: growth of the leading direction at each step, a factor, `[time]`.
        leading_unsaturated: the same with every slope at its largest.
        largest: the largest singular value of each Jacobian with every slope at its largest, `[time]`.
        alignment: |cos| of dₜ and the leading direction, `[time]`.
        exponents: Lyapunov exponents, `[k]`.
        standard_errors: of the exponents.
        slopes: relative slopes by tanh and σ, each `[time]`.
    """

    carries: Any
    ys: Any
    flow: Any
    passed_on: Any
    leading: Any
    leading_unsaturated: Any
    largest: Any
    alignment: Any
    exponents: Any
    standard_errors: Any
    slopes: Any


def _numbers(
    step: Callable[..., Any],
    loss: Callable[..., Any],
    num_exponents: int,
    length: int,
    treedef: Any,
    static_leaves: tuple[Any, ...],
    arrays: Any,
) -> _Numbers:
    """One forward pass, that of the gradient flow; all the rest is taken at its states.

    Params, init, xs, flags and the steps to average over come in two halves: arrays, and leaves that are no arrays and
    belong to the compiled program.
    """
    params, init, xs, flags, steps = combine(arrays, treedef.unflatten(static_leaves))
    flow, trajectory = flow_and_trajectory(prepare_state(step, params, init, xs, length), loss, flags)
    r = trajectory.recurrence
    traced = trace(r.step, r.params, r.init, r.xs)
    J = operators_along(trajectory)
    # The step with every slope at its largest computes the same states: only its derivatives differ.
    unsaturated = r._replace(step=without_saturation(traced), params=traced.params)
    J_unsaturated = operators_along(trajectory._replace(recurrence=unsaturated))
    d = jax.vmap(lambda adjoint: ravel_pytree(adjoint)[0])(flow.adjoints).astype(J.dtype)
    passed_on = jax.lax.map(lambda at: J.pull(at[0], at[1][:, None])[:, 0], (J.at, d))
    leading, direction = _leading(J)
    spectrum = spectrum_along(J, min(num_exponents, J.size), flags.is_first, steps)
    return _Numbers(
        carries=differentiable(trajectory.new_carries),
        ys=differentiable(trajectory.ys),
        flow=flow,
        passed_on=norm(passed_on, (1,)),
        leading=leading,
        leading_unsaturated=_leading(J_unsaturated)[0],
        largest=jax.lax.map(partial(_largest_singular_value, J_unsaturated), J.at),
        alignment=jnp.abs(jnp.sum(direction * (d / norm(d, (1,))[:, None]), axis=1)),
        exponents=spectrum.exponents,
        standard_errors=spectrum.standard_errors,
        slopes=jax.lax.map(lambda at_t: relative_slopes(traced)(traced.params, *at_t), J.at),
    )


# Compiled once for each step and loss, not at each call.
_compiled = jax.jit(_numbers, static_argnums=range(6))


def _leading(J: JacobianOperators) -> tuple[Array, Array]:
    """Growth of the leading direction at each step, a factor, and the direction after it, of norm 1."""

    def body(v, at_t):
        v = J.push(at_t, v)
        growth = norm(v)
        v = jnp.where(growth > 0, v / jnp.where(growth > 0, growth, 1), first)  # restarted where J takes it to 0
        return v, (growth, v[:, 0])

    first = random_frame(J.size, 1, J.dtype)
    return jax.lax.scan(body, first, J.at)[1]


def _largest_singular_value(J: JacobianOperators, at_t: Any) -> Array:
    """By power iteration: ‖J v‖ with v ∝ (Jᵀ J)^k v₀."""

    def body(_, v):
        v = J.pull(at_t, J.push(at_t, v))
        size = norm(v)
        return v / jnp.where(size > 0, size, 1)

    v = jax.lax.fori_loop(0, _POWER_ITERATIONS, body, random_frame(J.size, 1, J.dtype))
    return norm(J.push(at_t, v))


def _rates(numbers: _Numbers, rows: _Rows) -> tuple[GradientRates, float]:
    """Means over the same steps: those which a gradient reaches and passes, and where no leading direction is taken to 0."""
    d, passed_on = np.asarray(numbers.flow.norms, float), np.asarray(numbers.passed_on, float)
    counted = rows.passes & (d > 0) & (passed_on > 0) & (numbers.leading > 0) & (numbers.leading_unsaturated > 0)

    def mean_log(values):
        return float(np.log(np.asarray(values, float)[counted]).mean()) if counted.any() else math.nan

    observed = mean_log(passed_on) - mean_log(d)
    leading, steepest = mean_log(numbers.leading), mean_log(numbers.leading_unsaturated)
    rates = GradientRates(observed, steepest, leading - steepest, observed - leading)
    return rates, math.exp(mean_log(numbers.largest))


def _cut_at(numbers: _Numbers, rows: _Rows) -> int | None:
    """The last step that takes the gradient to exactly 0, underflow and the first step of a sequence excepted."""
    tiny = max(float(jnp.finfo(leaf.dtype).tiny) for leaf in jax.tree.leaves(numbers.flow.adjoints))
    cuts = np.flatnonzero(rows.passes & (numbers.flow.norms > tiny**0.5) & (numbers.passed_on == 0))
    return int(cuts[-1]) if cuts.size else None


def _cause(
    numbers: _Numbers,
    rows: _Rows,
    rates: GradientRates,
    forward: BadEntry | None,
    backward: BadEntry | None,
    cut_at: int | None,
) -> str:
    if forward is not None:
        return "forward"
    if backward is not None:
        return "backward"
    if not numbers.passed_on[rows.passes].any():
        return "no gradient"
    if cut_at is not None:
        return "cut"
    if abs(rates.observed) * rows.longest < math.log(_STEADY):
        return "steady"
    if rates.observed > 0:
        return "explosion"
    terms = rates._asdict()
    return min(("weights", "saturation", "alignment"), key=lambda term: terms[term])


def _sentence(diagnosis: GradientDiagnosis, length: int, longest: int, cut_at: int | None, underflows: int) -> str:
    """The diagnosis in plain words; the first `underflows` steps have a gradient of exactly 0.

    `longest` is the number of steps in the longest sequence of a row with `length`.
    """
    bad = diagnosis.forward or diagnosis.backward
    if bad is not None:
        at = bad.time_index
        where = "" if at is None else f"[{at}], at time step {at + 1} of {length}"
        if diagnosis.cause == "forward":
            return f"The forward pass is not finite: the first {bad.value} is in {bad.leaf}{where}."
        return (
            f"The forward pass is finite, the backward pass is not: it starts at the end, and the first {bad.value} is in "
            f"{bad.leaf}{where}."
        )
    if diagnosis.cause == "no gradient":
        return (
            "No gradient passes from step to step: the loss does not depend on any earlier state of the "
            f"{counted(length, 'step')}."
        )
    if diagnosis.cause == "cut" and cut_at is not None:
        return (
            f"Time step {cut_at + 1} of {length} passes no gradient back: its Jacobian takes it to exactly 0, as a reset or "
            "a unit that is switched off does. From losses after it, nothing before it can be learned."
        )
    rates = diagnosis.rates
    flat = min(diagnosis.slopes.items(), key=lambda item: item[1], default=None)
    flattest = "" if flat is None else f" (most saturated: {flat[0]}, at {flat[1]:.2f} of its largest slope)"
    verb = {"steady": "stays within a factor of 100", "explosion": "explodes"}.get(diagnosis.cause, "vanishes")
    because = {
        "weights": ", mainly because of its weights and gates, which shrink it even without saturation",
        "saturation": ", mainly because of saturation",
        "alignment": ", mainly because it is misaligned with the leading Lyapunov direction",
    }.get(diagnosis.cause, "")
    underflow = f" It is exactly 0 before time step {underflows + 1}." if underflows else ""
    return (
        f"Over {counted(longest, 'step')} the gradient {verb}{because}: it changes by {rates.observed:+.3f} nats a step, of "
        f"which weights and gates give {rates.weights:+.3f}, saturation {rates.saturation:+.3f}{flattest}, and alignment "
        f"{rates.alignment:+.3f}. Along the leading Lyapunov direction it would change by "
        f"{rates.weights + rates.saturation:+.3f}; its upper bound, set by the weights, is "
        f"{math.log(diagnosis.bound_rate):+.3f}.{underflow}"
    )
