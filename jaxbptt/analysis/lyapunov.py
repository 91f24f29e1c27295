r"""Lyapunov exponents: the rates at which perturbations of the state grow or shrink in the long run, one for each direction.

Benettin's method: a frame of orthonormal vectors is pushed along with the state, J Q = Q′ R, and the exponents are the means
of log|Rᵢᵢ|. State and frame run in one loop, and no Jacobian is formed.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxbptt.analysis.operators import JacobianOperators
from jaxbptt.analysis.sweep import LOST, RESOLUTION, random_frame, rounding_error
from jaxbptt.analysis.trajectory import prepare_state, state_size, step_and_push
from jaxbptt.arrays import check_count, check_key, is_number
from jaxbptt.cells.cell import Cell
from jaxbptt.html_table import columns_table, in_words
from jaxbptt.scans.recurrence import Recurrence
from jaxbptt.words import counted

# Standard errors come from the means of so many blocks of time; each block must be longer than the system's memory.
_BLOCKS = 20


class LyapunovSpectrum(NamedTuple):
    """Lyapunov exponents, largest first, in nats per unit of time (per step, unless `time_step` was given).

    Attributes:
        exponents: λᵢ, `[k]`.
        standard_errors: of the exponents, from the means of up to 20 blocks of time; nan with fewer than two blocks.
        resolved: False where λᵢ is so far below λ₁ that rounding drowns it between two QR factorisations, even if only once.
        running: the estimates so far, after each QR factorisation, `[factorisations, k]`.
        steps: the time steps that each of these estimates covers, `[factorisations]`.
        kaplan_yorke_dimension: j + Σ_{i≤j} λᵢ / |λⱼ₊₁| with the largest j for which the sum is not negative; nan where
            that takes more exponents than were asked for.
        entropy_rate: the sum of the positive exponents (Pesin), in nats per unit of time; nan where all those
            asked for are positive and there are more.
    """

    exponents: Float[Array, " k"]
    standard_errors: Float[Array, " k"]
    resolved: Bool[Array, " k"]
    running: Float[Array, "factorisations k"]
    steps: Int[Array, " factorisations"]
    kaplan_yorke_dimension: Float[Array, ""]
    entropy_rate: Float[Array, ""]

    def _repr_html_(self) -> str:
        columns = {"exponent": self.exponents, "standard error": self.standard_errors, "resolved": self.resolved}
        notes = (
            "Nats per unit of time: a step, unless time_step was given.",
            f"Kaplan–Yorke dimension {in_words(self.kaplan_yorke_dimension)}, entropy rate {in_words(self.entropy_rate)}.",
        )
        return columns_table(self, {"i": range(1, self.exponents.shape[-1] + 1)} | columns, notes=notes)


def lyapunov_exponents(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    num_exponents: int | None = None,
    burn_in: int = 0,
    qr_every: int = 1,
    time_step: float = 1.0,
    key: Array | None = None,
) -> LyapunovSpectrum:
    r"""Lyapunov exponents of a recurrence, driven by inputs or autonomous.

    λᵢ = 1/(N Δt) Σₜ log|Rₜ,ᵢᵢ|,  Jₜ Qₜ₋₁ = Qₜ Rₜ,  Jₜ = ∂cₜ/∂cₜ₋₁,  N = T − burn_in

    λ₁ > 0: perturbations, and gradients in the backward pass, grow by e^λ₁ a step in all but exceptional directions.
    λ₁ < 0: all of them shrink. The sum of all n is the mean of log|det Jₜ|, whatever the frame, as long as all are
    resolved. Pure, to be jitted; `jax.vmap` for a batch; differentiable in params, init and xs (the gradient keeps
    O(T n k)). Time O(T n² k + T n k²/m) for k exponents and a factorisation every m steps, memory O(n k) beyond the
    results.

    There is no `is_first` and no `valid`: a reset takes every perturbation to 0, and all exponents would be −∞. Pass one
    sequence, without padding.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`, differentiable in forward mode: no `jax.custom_vjp` in it.
        params: any pytree, passed to every step.
        init: c₀ without batch axis; its differentiable leaves together are the state.
        xs: inputs, leaves `[time, features]`, or `None` with `length`.
        length: T, needed where `xs` is `None`. Burn-in included.
        num_exponents: k, the largest ones; all n by default.
        burn_in: steps at the start that are left out of the mean. In the first half only the state settles, in the second
            half the frame too.
        qr_every: m, steps between two factorisations. A direction that shrinks against the largest by more than 1/eps in m
            steps is lost, and not `resolved`; the product of m Jacobians must stay within the range of floats.
        time_step: Δt, the time that one step stands for where it integrates a system in continuous time.
        key: of the random first frame; a fixed one by default.

    Returns:
        A `LyapunovSpectrum`. A direction that J takes to 0 has the exponent −∞, or rounding noise, and is not `resolved`.

    Raises:
        ValueError: `num_exponents` outside 1 … n, `burn_in` outside 0 … T − 1, `qr_every` below 1, a `time_step` not
            above 0, batch axes in the carry of a `Cell`; as for `jacobian_operators`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> logistic = lambda r, x, _: (r * x * (1 - x), None)
        >>> spectrum = bptt.lyapunov_exponents(logistic, 3.2, 0.3, length=1_000, burn_in=200)
        >>> print(f"{spectrum.exponents[0]:.3f}")  # a cycle of period two: ½ log|4 + 2r − r²|
        -0.916

    References:
        Benettin, Galgani, Giorgilli and Strelcyn, Lyapunov characteristic exponents, 1980, doi:10.1007/BF02128236; Vogt et
        al., On Lyapunov exponents for RNNs, 2022, doi:10.3389/fams.2022.818799; Kaplan and Yorke, 1979,
        doi:10.1007/BFb0064319.
    """
    r = prepare_state(step, params, init, xs, length)
    size, dtype = state_size(r.init)
    k = size if num_exponents is None else num_exponents
    check_count("num_exponents", k, f"a state of {counted(size, 'number')} has 1 to {size} exponents", most=size)
    check_count("qr_every", qr_every, "it counts time steps")
    check_time_step(time_step)
    if r.length == 0:
        raise ValueError("A sequence without time steps has no exponents: pass at least one step.")
    meaning = f"of {counted(r.length, 'time step')} at least one has to be left"
    check_count("burn_in", burn_in, meaning, least=0, most=r.length - 1)
    if key is not None:
        check_key(key)
    settle, measured = burn_in // 2, r.length - burn_in
    factorisations, left_over = divmod(measured, qr_every)

    carry, results = r.init, []
    # lax.scan takes no length of 0 under jax.disable_jit.
    if settle:
        carry, _ = jax.lax.scan(
            lambda carry, x: (r.step(r.params, carry, x)[0], None), carry, _inputs(r, 0, settle), settle
        )
    state = carry, random_frame(size, k, dtype, key)
    if burn_in > settle:
        state, _ = _advance(r, state, settle, 1, burn_in - settle)
    if factorisations:
        state, growth_and_error = _advance(r, state, burn_in, qr_every, factorisations)
        results.append(growth_and_error)
    if left_over:
        results.append(_advance(r, state, r.length - left_over, left_over, 1)[1])
    growth, error = map(jnp.concatenate, zip(*results, strict=True))
    return _spectrum(growth, error, size, measured, qr_every, time_step)


def spectrum_along(
    J: JacobianOperators, num_exponents: int, is_first: Any = None, steps: Any = None
) -> LyapunovSpectrum:
    """The same for a trajectory that is already there: no burn-in, a factorisation at every step, the default frame.

    A new frame is taken where `is_first`, and the growth over `steps`, their numbers, is averaged; `None` for all of them.
    """
    frame = random_frame(J.size, num_exponents, J.dtype)

    def body(Q, inputs):
        at_t, first = inputs
        Q, growth_and_error = _factorise(J.push(at_t, Q))
        return Q if first is None else jnp.where(first, frame, Q), growth_and_error

    _, (growth, error) = jax.lax.scan(body, frame, (J.at, is_first))
    if steps is not None:
        growth, error = growth[steps], error[steps]
    return _spectrum(growth, error, J.size, len(growth), 1, 1.0)


def check_time_step(time_step: Any) -> None:
    """Raise unless it is a number above 0, which may be traced."""
    if not isinstance(time_step, Tracer) and not is_number(time_step, 0):
        raise ValueError(
            f"time_step is {time_step!r}, but it is the time that a step stands for: pass a number above 0."
        )


def _factorise(V: Float[Array, "n k"]) -> tuple[Array, tuple[Array, Array]]:
    """The next frame; log|Rᵢᵢ|, and what rounding may have done to it."""
    Q, R = jnp.linalg.qr(V)
    diagonal = jnp.abs(jnp.diagonal(R))
    return Q, (jnp.log(diagonal), rounding_error(R, diagonal))


def _advance(r: Recurrence, state: Any, start: int, steps: int, times: int) -> Any:
    """State and frame through `times · steps` time steps from `start` on, with a factorisation after every `steps`."""

    def one_step(state, x):
        carry, V = state
        return step_and_push(r, carry, x, V), None

    def up_to_factorisation(state, xs):
        (carry, V), _ = jax.lax.scan(one_step, state, xs, length=steps)
        Q, growth_and_error = _factorise(V)
        return (carry, Q), growth_and_error

    xs = jax.tree.map(lambda leaf: leaf.reshape(times, steps, *leaf.shape[1:]), _inputs(r, start, times * steps))
    return jax.lax.scan(up_to_factorisation, state, xs, length=times)


def _inputs(r: Recurrence, start: int, length: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[start : start + length], r.xs)


def _spectrum(
    growth: Float[Array, "factorisations k"],
    error: Float[Array, "factorisations k"],
    size: int,
    measured: int,
    qr_every: int,
    time_step: Any,
) -> LyapunovSpectrum:
    """From log|Rᵢᵢ| and its rounding error at each factorisation, over `measured` time steps of `size` numbers each."""
    k = growth.shape[1]
    steps = jnp.minimum(jnp.arange(1, len(growth) + 1) * qr_every, measured)
    exponents = growth.sum(axis=0) / (measured * time_step)
    order = jnp.argsort(-exponents)
    growth, exponents = growth[:, order], exponents[order]
    return LyapunovSpectrum(
        exponents=exponents,
        standard_errors=_standard_errors(growth[: measured // qr_every]) / (qr_every * time_step),
        resolved=((error.mean(axis=0) < RESOLUTION) & (error.max(axis=0) < LOST))[order],
        running=jnp.cumsum(growth, axis=0) / (jnp.asarray(steps, growth.dtype)[:, None] * time_step),
        steps=steps,
        kaplan_yorke_dimension=_kaplan_yorke_dimension(exponents, size),
        entropy_rate=jnp.where((exponents[-1] > 0) & (k < size), jnp.nan, jnp.sum(jnp.maximum(exponents, 0))),
    )


def _standard_errors(growth: Float[Array, "time k"]) -> Float[Array, " k"]:
    """Standard errors of means over time, from the means of blocks; steps at the start that fill no block are left out."""
    blocks = min(_BLOCKS, len(growth))
    size = len(growth) // max(blocks, 1)
    if blocks < 2:
        return jnp.full(growth.shape[1], jnp.nan, growth.dtype)
    means = growth[len(growth) - blocks * size :].reshape(blocks, size, -1).mean(axis=1)
    return jnp.std(means, axis=0, ddof=1) / jnp.sqrt(jnp.asarray(blocks, growth.dtype))


def _kaplan_yorke_dimension(exponents: Float[Array, " k"], size: int) -> Float[Array, ""]:
    k = len(exponents)
    sums = jnp.cumsum(exponents)
    j = jnp.sum(sums >= 0)  # sums of falling numbers rise, then fall: the non-negative ones come first
    last = jnp.concatenate([jnp.zeros(1, sums.dtype), sums])[j]
    fraction = last / jnp.abs(exponents[jnp.minimum(j, k - 1)])
    return jnp.where(j < k, j.astype(sums.dtype) + fraction, jnp.asarray(k if k == size else jnp.nan, sums.dtype))
