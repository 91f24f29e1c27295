r"""Why a gradient vanished, exploded or is no number: the causes told apart, in numbers and in one sentence.

The rate at which a gradient changes on its way back is split in three, and the parts add up to what was observed: what the
weights would do with every tanh and σ at its steepest, what their flatness takes away, and what is left to how the
gradient lies to the direction that lasts longest.
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

from jaxbptt.analysis.activations import opened, relative_slopes
from jaxbptt.analysis.finite import BadEntry, first_bad_backward, first_bad_forward
from jaxbptt.analysis.flow import gradient_flow
from jaxbptt.analysis.lyapunov import lyapunov_exponents
from jaxbptt.analysis.norms import norm
from jaxbptt.analysis.operators import (
    JacobianOperators,
    jacobian_operators,
    prepare_state,
    state_size,
    step_and_push,
    unroll,
)
from jaxbptt.analysis.sweep import random_frame
from jaxbptt.arrays import check_callable, check_concrete, check_count
from jaxbptt.cells.cell import Cell, step_of
from jaxbptt.programs.trace import trace
from jaxbptt.scans.recurrence import Recurrence
from jaxbptt.trees import combine, is_array, partition
from jaxbptt.words import counted

# Over the whole sequence a gradient may shrink or grow by this factor and still count as steady.
_STEADY = 100.0
_POWER_ITERATIONS = 30


class GradientRates(NamedTuple):
    """What a gradient grows by at each step back, in nats, and its parts: `observed = weights + saturation + alignment`.

    Attributes:
        observed: mean of log(‖Jₜᵀ dₜ‖ / ‖dₜ‖).
        weights: leading Lyapunov exponent with the slope of every tanh and σ at its largest.
        saturation: the leading Lyapunov exponent, less that.
        alignment: what was observed, less the leading Lyapunov exponent: below 0 where the gradient has little in the
            direction that lasts longest.
    """

    observed: float
    weights: float
    saturation: float
    alignment: float


class GradientDiagnosis(NamedTuple):
    """What happened to a gradient on its way back, and why.

    Attributes:
        sentence: all of it in plain words.
        cause: "weights", "saturation" or "alignment" of a gradient that vanishes; "explosion"; "steady"; "cut" where a step
            takes it to exactly 0, "no gradient" where none passes at all; "forward" or "backward" where it is not finite,
            by the pass in which that began.
        rates: how much the gradient grows a step, and the parts of it.
        exponents: the leading Lyapunov exponents of the state, driven by the inputs, `[k]`.
        standard_errors: of the exponents, `[k]`.
        slopes: by tanh and σ in the order of the step, so by layer and gate: the mean slope over units and time, as a part
            of its largest value; 0 is saturated.
        alignment: |cos| of dₜ and the direction in which the past has grown most, `[time]`; 1/√n is that of a random one, nan
            where dₜ is 0.
        bound_rate: γσ: no gradient can grow faster than (γσ)^lag. The geometric mean over time of the largest singular
            value of the Jacobian with every slope at its largest: σ_max(W_hh) for an Elman cell.
        forward: where the forward pass, or what goes into it, stops being finite, or `None`.
        backward: where the backward pass does, coming from the end, or `None`.
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


def diagnose_gradient(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any,
    loss: Callable[..., Any],
    *,
    length: int | None = None,
    num_exponents: int = 8,
) -> GradientDiagnosis:
    r"""Say why a gradient vanishes, explodes or is not finite.

    mean log(‖Jₜᵀ dₜ‖/‖dₜ‖) = λ₁° + (λ₁ − λ₁°) + rest

    with dₜ = ∂L/∂hₜ, λ₁ the leading Lyapunov exponent and λ₁° the same with every slope of tanh and σ at its largest: weights,
    saturation, alignment. Compiled once for a step and a loss, so pass the same functions again; not to be called inside of
    `jit`. Time O(T) steps and Lyapunov exponents of a few directions, memory O(T n).

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`, differentiable in forward mode: no `jax.custom_vjp` in it.
        params: θ, any pytree.
        init: c₀, without batch axis: diagnose one row of a batch.
        xs: inputs, leaves `[time, features]`, or `None` with `length`.
        loss: `loss(carry, ys) -> scalar`, of the last carry and all outputs.
        length: T, needed where `xs` is `None`.
        num_exponents: how many Lyapunov exponents to report, at most n.

    Returns:
        A `GradientDiagnosis` of numbers; those that don't exist for a gradient that is 0 or not finite are nan.

    Raises:
        ValueError: as for `jacobian_operators`; a sequence without time steps, `num_exponents` below 1.
        TypeError: as for `jacobian_operators`; traced arguments, a loss that is no function.

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
    check_concrete("diagnose_gradient", params=params, init=init, xs=xs)
    check_callable("loss", loss, "loss(carry, ys) -> scalar")
    check_count("num_exponents", num_exponents, "it counts Lyapunov exponents")
    r = prepare_state(step, params, init, xs, length)
    if r.length == 0:
        raise ValueError("A sequence without time steps has no gradient through time: pass at least one step.")
    arrays, others = partition((r.params, r.init, r.xs), by=is_array)
    leaves, treedef = jax.tree.flatten(others)
    static = step_of(step), loss, num_exponents, r.length, treedef, tuple(leaves)
    try:
        hash(static)
        found = _compiled(*static, arrays)
    except TypeError:
        found = jax.jit(partial(_numbers, *static))(arrays)
    numbers = jax.tree.map(np.asarray, found)
    forward = first_bad_forward(r, numbers.carries, numbers.ys, numbers.flow.loss)
    backward = first_bad_backward(numbers.flow)
    rates, bound_rate = _rates(numbers)
    cut_at = _cut_at(numbers)
    cause = _cause(numbers, rates, forward, backward, cut_at)
    in_order = sorted(numbers.slopes.items(), key=lambda item: int(item[0].split()[1]))
    slopes = {kind: float(np.mean(values, dtype=float)) for kind, values in in_order}
    diagnosis = GradientDiagnosis(
        sentence="",
        cause=cause,
        rates=rates,
        exponents=numbers.exponents,
        standard_errors=numbers.standard_errors,
        slopes=slopes,
        alignment=numbers.alignment,
        bound_rate=bound_rate,
        forward=forward,
        backward=backward,
    )
    underflows = int(np.argmax(numbers.flow.norms > 0))
    return diagnosis._replace(sentence=_sentence(diagnosis, r.length, cut_at, underflows))


class _Numbers(NamedTuple):
    """All that is computed, before it is interpreted."""

    carries: Any
    ys: Any
    flow: Any
    passed_on: Any
    leading: Any
    leading_opened: Any
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
    others: tuple[Any, ...],
    arrays: Any,
) -> _Numbers:
    """Params, init and xs come apart: arrays, and what is none and part of the program."""
    params, init, xs = combine(arrays, treedef.unflatten(others))
    r = prepare_state(step, params, init, xs, length)
    arguments: dict[str, Any] = {"length": length}
    traced = trace(r.step, r.params, r.init, r.xs)
    without_saturation = r._replace(step=opened(traced), params=traced.params)
    jacobians = jacobian_operators(r.step, r.params, r.init, r.xs, **arguments)
    at_steepest = jacobian_operators(*without_saturation[:4], **arguments)
    _, new_carries, ys = unroll(r)
    flow = gradient_flow(r.step, r.params, r.init, r.xs, loss, **arguments)
    d = jax.vmap(lambda adjoint: ravel_pytree(adjoint)[0])(flow.adjoints).astype(jacobians.dtype)
    passed_on = jax.lax.map(lambda at: jacobians.pull(at[0], at[1][:, None])[:, 0], (jacobians.at, d))
    leading, direction = _leading(r)
    leading_opened, _ = _leading(without_saturation)
    spectrum = lyapunov_exponents(
        r.step, r.params, r.init, r.xs, num_exponents=min(num_exponents, jacobians.size), **arguments
    )

    def slopes(at_t):
        return relative_slopes(traced)(traced.params, *at_t)

    return _Numbers(
        carries=new_carries,
        ys=ys,
        flow=flow,
        passed_on=norm(passed_on, (1,)),
        leading=leading,
        leading_opened=leading_opened,
        largest=jax.lax.map(partial(_largest_singular_value, at_steepest), jacobians.at),
        alignment=jnp.abs(jnp.sum(direction * (d / norm(d, (1,))[:, None]), axis=1)),
        exponents=spectrum.exponents,
        standard_errors=spectrum.standard_errors,
        slopes=jax.lax.map(slopes, jacobians.at),
    )


# Compiled once for a step and a loss, and not at each call.
_compiled = jax.jit(_numbers, static_argnums=range(6))


def _leading(r: Recurrence) -> tuple[Array, Array]:
    """Growth of the leading direction at each step, a factor, and the direction after it, of norm 1."""

    def body(state, x):
        carry, v = step_and_push(r, state[0], x, state[1])
        grown = norm(v)
        v = jnp.where(grown > 0, v / jnp.where(grown > 0, grown, 1), first)  # what was taken to 0 starts again
        return (carry, v), (grown, v[:, 0])

    size, dtype = state_size(r.init)
    first = random_frame(size, 1, dtype)
    return jax.lax.scan(body, (r.init, first), r.xs, length=r.length)[1]


def _largest_singular_value(J: JacobianOperators, at_t: Any) -> Array:
    """By power iteration: ‖J v‖ with v ∝ (Jᵀ J)^k v₀."""

    def body(_, v):
        v = J.pull(at_t, J.push(at_t, v))
        size = norm(v)
        return v / jnp.where(size > 0, size, 1)

    v = jax.lax.fori_loop(0, _POWER_ITERATIONS, body, random_frame(J.size, 1, J.dtype))
    return norm(J.push(at_t, v))


def _rates(numbers: _Numbers) -> tuple[GradientRates, float]:
    """Means over the same steps: those where a gradient arrives, is passed on, and no direction is taken to 0."""
    d, passed_on = np.asarray(numbers.flow.norms, float), np.asarray(numbers.passed_on, float)
    counted = (d > 0) & (passed_on > 0) & (numbers.leading > 0) & (numbers.leading_opened > 0)

    def mean_log(values):
        return float(np.log(np.asarray(values, float)[counted]).mean()) if counted.any() else math.nan

    observed = mean_log(passed_on) - mean_log(d)
    leading, steepest = mean_log(numbers.leading), mean_log(numbers.leading_opened)
    rates = GradientRates(observed, steepest, leading - steepest, observed - leading)
    return rates, math.exp(mean_log(numbers.largest))


def _cut_at(numbers: _Numbers) -> int | None:
    """The last step which takes the gradient to exactly 0, and not for want of range."""
    tiny = max(float(jnp.finfo(leaf.dtype).tiny) for leaf in jax.tree.leaves(numbers.flow.adjoints))
    cuts = np.flatnonzero((numbers.flow.norms > tiny**0.5) & (numbers.passed_on == 0))
    return int(cuts[-1]) if cuts.size else None


def _cause(
    numbers: _Numbers, rates: GradientRates, forward: BadEntry | None, backward: BadEntry | None, cut_at: int | None
) -> str:
    if forward is not None:
        return "forward"
    if backward is not None:
        return "backward"
    if not numbers.passed_on.any():
        return "no gradient"
    if cut_at is not None:
        return "cut"
    if abs(rates.observed) * len(numbers.passed_on) < math.log(_STEADY):
        return "steady"
    if rates.observed > 0:
        return "explosion"
    parts = rates._asdict()
    return min(("weights", "saturation", "alignment"), key=lambda part: parts[part])


def _sentence(found: GradientDiagnosis, length: int, cut_at: int | None, underflows: int) -> str:
    """In plain words; the first `underflows` steps have a gradient of exactly 0."""
    bad = found.forward or found.backward
    if bad is not None:
        at = bad.time_index
        where = "" if at is None else f"[{at}], at time step {at + 1} of {length}"
        if found.cause == "forward":
            return f"The forward pass is not finite: the first {bad.value} is in {bad.leaf}{where}."
        return (
            f"The forward pass is finite, the backward pass is not: coming from the end, the first {bad.value} is in "
            f"{bad.leaf}{where}."
        )
    if found.cause == "no gradient":
        return f"No gradient passes from step to step: the loss does not depend on any earlier state of the {counted(length, 'step')}."
    if found.cause == "cut" and cut_at is not None:
        return (
            f"Time step {cut_at + 1} of {length} passes nothing on: its Jacobian takes the gradient to exactly 0, as a reset "
            "or a unit that is switched off does. Nothing before it can be learned from what comes after."
        )
    rates = found.rates
    flat = min(found.slopes.items(), key=lambda item: item[1], default=None)
    flattest = "" if flat is None else f", the flattest is {flat[0]} at {flat[1]:.2f} of its steepest"
    verb = {"steady": "stays within a factor of 100", "explosion": "explodes"}.get(found.cause, "vanishes")
    because = {
        "weights": ", mostly for its weights and gates, which shrink it without any saturation",
        "saturation": ", mostly for saturation",
        "alignment": ", mostly since it lies across the direction that lasts",
    }.get(found.cause, "")
    lost = f" It is exactly 0 before time step {underflows + 1}." if underflows else ""
    return (
        f"Over {counted(length, 'step')} the gradient {verb}{because}: it changes by {rates.observed:+.3f} nats a step; weights and gates "
        f"alone would give {rates.weights:+.3f}, saturation {rates.saturation:+.3f}{flattest}, alignment "
        f"{rates.alignment:+.3f}. Along the direction that lasts longest it would be {rates.weights + rates.saturation:+.3f}, "
        f"and by the bound of the weights at most {math.log(found.bound_rate):+.3f}.{lost}"
    )
