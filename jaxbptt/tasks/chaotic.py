r"""Chaotic series to predict one step ahead: Lorenz's three equations, and Mackey and Glass's with a delay.

Their true Lyapunov exponents are known, and a network that predicts them has to have them. Both are integrated when
they are asked for, so there is no file to load and no limit on the length.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxbptt.arrays import as_array, is_number
from jaxbptt.tasks.task import Sequences, Task, check_size, checked

LORENZ_STEP = 0.01
MACKEY_GLASS_STEPS = 10  # per unit of time


def lorenz_series(length: int, *, dt: float = 0.01, initial: Any = None, transient: float = 10.0) -> Array:
    r"""Lorenz's equations of 1963, in his units.

    dx/dt = σ(y − x),  dy/dt = x(ρ − z) − y,  dz/dt = xy − βz;  σ = 10, ρ = 28, β = 8/3

    By the classical Runge–Kutta method of order 4 with equal steps of at most 0.01, so that `dt` can be chosen freely.

    Args:
        length: number of states, `dt` apart.
        dt: time from one state to the next.
        initial: (x, y, z), `[*batch, 3]`; (1, 1, 1) in float32 by default. Its dtype is that of the computation.
        transient: time that is left out at the start. The distance to the attractor shrinks like exp(−13.7 t).

    Returns:
        States, `[length, *batch, 3]`.

    Raises:
        ValueError: a length below 1, a dt that is not positive, a negative transient.
        TypeError: a length that is not an integer.

    Example:
        >>> from jaxbptt import tasks
        >>> series = tasks.lorenz_series(10_000)
        >>> print(series.shape, abs(series[:, 0]).max() < 20)
        (10000, 3) True

    References:
        Lorenz, Deterministic nonperiodic flow, 1963, doi:10.1175/1520-0469(1963)020<0130:DNF>2.0.CO;2.
    """
    check_size("length", length, 1, "a series has a first state")
    if not is_number(dt, 0):
        raise ValueError(f"dt={dt!r}, but it is the time from one state to the next: pass a positive number.")
    dt = float(dt)  # a numpy number would determine the dtype of the computation
    if not is_number(transient, -math.ulp(0)):
        raise ValueError(f"transient={transient!r}, but it is a time that is left out: pass 0 or more.")
    state = jnp.ones(3, jnp.float32) if initial is None else _as_float(initial)
    if state.shape[-1:] != (3,):
        raise ValueError(f"initial has shape {state.shape}, but x, y and z are needed: pass [*batch, 3].")
    substeps = math.ceil(dt / LORENZ_STEP)

    def advance(state, count, step):
        return jax.lax.fori_loop(0, count, lambda _, s: _runge_kutta(_lorenz_rate, s, step), state)

    state = advance(state, math.ceil(transient / LORENZ_STEP), LORENZ_STEP)
    return jax.lax.scan(lambda s, _: (advance(s, substeps, dt / substeps), s), state, length=length)[1]


def mackey_glass_series(length: int, *, tau: int = 17, initial: Any = None, transient: int = 1_000) -> Array:
    r"""Mackey and Glass's equation for the number of blood cells, once per unit of time.

    dx/dt = β x(t − τ) / (1 + x(t − τ)ⁿ) − γ x(t);  β = 0.2, γ = 0.1, n = 10

    By the classical Runge–Kutta method with steps of 0.1. x(t − τ) half-way between two steps is
    their mean, so the error is of order 2 in the step.

    Args:
        length: number of values.
        tau: the delay τ. At rest below 4.7, periodic at first above it, chaotic from about 17.
        initial: x before t = 0, a constant, `[*batch]`; 1.2 in float32 by default. Its dtype is that of the computation.
        transient: units of time that are left out at the start.

    Returns:
        Values, `[length, *batch, 1]`.

    Raises:
        ValueError: a length or tau below 1, a negative transient.
        TypeError: one of them is not an integer.

    Example:
        >>> from jaxbptt import tasks
        >>> series = tasks.mackey_glass_series(2_000)
        >>> print(series.shape, series.min() > 0.2, series.max() < 1.4)
        (2000, 1) True True

    References:
        Mackey and Glass, Oscillation and chaos in physiological control systems, 1977, doi:10.1126/science.267326.
    """
    check_size("length", length, 1, "a series has a first value")
    check_size("tau", tau, 1, "the delay is of one unit of time at least")
    check_size("transient", transient, 0, "it is a time that is left out")
    x = jnp.float32(1.2) if initial is None else _as_float(initial)

    def substep(x, ends):
        start, stop = ends

        def rate(x, fraction):
            delayed = start + fraction * (stop - start)
            return 0.2 * delayed / (1 + delayed**10) - 0.1 * x

        x = _runge_kutta(rate, x, 1 / MACKEY_GLASS_STEPS)
        return x, x

    def interval(past, _):
        """The method of steps: on an interval of length τ, x(t − τ) is the solution on the interval before."""
        now = jnp.concatenate([past[-1:], jax.lax.scan(substep, past[-1], (past[:-1], past[1:]))[1]])
        return now, now[:-1:MACKEY_GLASS_STEPS]

    past = jnp.broadcast_to(x, (MACKEY_GLASS_STEPS * tau + 1, *x.shape))
    series = jax.lax.scan(interval, past, length=-(-(transient + length) // tau))[1]
    return series.reshape(-1, *x.shape)[transient : transient + length, ..., None]


def lorenz(*, steps: int, dt: float = 0.01) -> Task:
    r"""Predict the next state of Lorenz's equations, `dt` ahead.

    xs[t] = s(t),  ys[t] = s(t + dt);  s = (x, y, z), each with mean 0 and variance 1 on the attractor

    Each sequence starts elsewhere on the attractor: from a random point near it, 50 units of time later. Every step
    counts. See `lorenz_series` for the equations and their source.

    Baseline: persistence, that the next state is the present one. Its squared error, like the means and deviations, is
    measured once for each dt, over 512 trajectories of 20 units of time from a fixed key, to about 1 %. For small dt it
    is dt² mean_f E[(ds_f/dt)²], 55 dt².

    Args:
        steps: length of the sequences.
        dt: time from one step to the next, 0.001 to 1.

    Returns:
        A task with mean squared error, 3 inputs and 3 outputs.

    Raises:
        ValueError: fewer than 1 step, a dt out of range.
        TypeError: steps that are not an integer.

    Example:
        >>> import jax
        >>> from jaxbptt import tasks
        >>> task = tasks.lorenz(steps=50)
        >>> task.sample(jax.random.key(0), 4).xs.shape, f"{task.baseline:.3f}"
        ((50, 4, 3), '0.006')
    """
    if not 1e-3 <= dt <= 1:
        raise ValueError(f"dt={dt}, but the persistence baseline is measured for 0.001 to 1: choose dt in that range.")
    return _next_step_task(_draw_lorenz, steps, dt, math.ceil(20 / dt))


def mackey_glass(*, steps: int, tau: int = 17) -> Task:
    r"""Predict Mackey and Glass's series one unit of time ahead.

    xs[t] = s(t),  ys[t] = s(t + 1);  s is x with mean 0 and variance 1 on the attractor

    A single number is seen, but the state is all that happened in the last τ, so memory is needed. Each sequence starts
    elsewhere on the attractor: from a random history, 500 to 1,000 units of time later. Every step counts.
    See `mackey_glass_series` for the equation and its source.

    Baseline: persistence, that the next value is the present one. Its squared error, 2(1 − r) for the series'
    correlation r at lag 1, is measured like mean and deviation once for each τ, over 512 series of 500 units of time
    from a fixed key.

    Args:
        steps: length of the sequences.
        tau: the delay τ, at least 5: below 4.7 the series comes to rest.

    Returns:
        A task with mean squared error, 1 input and 1 output.

    Raises:
        ValueError: fewer than 1 step, a tau below 5.
        TypeError: one of them is not an integer.

    Example:
        >>> import jax
        >>> from jaxbptt import tasks
        >>> task = tasks.mackey_glass(steps=50)
        >>> task.sample(jax.random.key(0), 4).xs.shape, f"{task.baseline:.3f}"
        ((50, 4, 1), '0.021')
    """
    check_size("tau", tau, 5, "below 4.7 the series comes to rest")
    return _next_step_task(_draw_mackey_glass, steps, tau, 500)


def _draw_lorenz(key, batch, length, dt):
    # States near one of the two unstable fixed points take long to leave them: exp(0.094 t).
    near = jnp.array([[0, 0, 25]], jnp.float32) + 8 * jax.random.normal(key, (batch, 3), jnp.float32)
    return lorenz_series(length, dt=dt, initial=near, transient=50.0)


def _draw_mackey_glass(key, batch, length, tau):
    # Rows forget their phase slowly, or never if the series is periodic: each starts at a random time.
    history_key, start_key = jax.random.split(key)
    history = jax.random.uniform(history_key, (batch,), jnp.float32, 0.2, 1.4)
    starts = jax.random.randint(start_key, (batch,), 0, 500, jnp.int32)
    series = mackey_glass_series(length + 500, tau=tau, initial=history, transient=500)
    return series[starts[None] + jnp.arange(length, dtype=jnp.int32)[:, None], jnp.arange(batch, dtype=jnp.int32)[None]]


def _next_step_task(draw: Callable[..., Array], steps: int, option: Any, length: int) -> Task:
    check_size("steps", steps, 1, "there must be a step to predict")
    mean, deviation, baseline = _statistics(draw, option, length)

    def sample(key, batch):
        series = (draw(key, batch, steps + 1, option) - mean[None, None]) / deviation[None, None]
        return Sequences(series[:-1], series[1:], jnp.ones((steps, batch), bool))

    return Task(checked(sample), "mean_squared_error", baseline, len(mean), len(mean))


@functools.cache
def _statistics(draw: Callable[..., Array], option: Any, length: int) -> tuple[np.ndarray, np.ndarray, float]:
    """Mean and deviation of each feature, and the persistence error of what they standardise, from a fixed key."""
    with jax.ensure_compile_time_eval():
        series = np.asarray(draw(jax.random.key(0), 512, length, option))
    mean = series.mean((0, 1), dtype=np.float64)
    deviation = np.sqrt(np.mean((series - mean) ** 2, (0, 1)))
    baseline = np.mean((np.diff(series, axis=0) / deviation) ** 2)
    return mean.astype(np.float32), deviation.astype(np.float32), float(baseline)


def _lorenz_rate(state, _):
    x, y, z = state[..., 0], state[..., 1], state[..., 2]
    return jnp.stack([10 * (y - x), x * (28 - z) - y, x * y - 8 / 3 * z], axis=-1)


def _runge_kutta(rate, state, step):
    """One step of the classical method; `rate(state, fraction)` at a fraction of the step."""
    first = rate(state, 0.0)
    second = rate(state + step / 2 * first, 0.5)
    third = rate(state + step / 2 * second, 0.5)
    return state + step / 6 * (first + 2 * second + 2 * third + rate(state + step * third, 1.0))


def _as_float(initial: Any) -> Array:
    array = as_array("initial", initial, "a first state")
    if jnp.iscomplexobj(array):
        raise TypeError(f"initial has dtype {array.dtype}, but the states are real numbers.")
    return array if jnp.issubdtype(array.dtype, jnp.floating) else array.astype(jnp.float32)
