r"""How far back is far enough: the lag beyond which contributions are negligible, measured or extrapolated."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.analysis.credit import LagContributions
from jaxbptt.analysis.norms import norm, tree_norm
from jaxbptt.arrays import at_least_float32, check_concrete, check_count, is_number
from jaxbptt.html_table import fields_table
from jaxbptt.words import counted


class AdaptiveTruncation(NamedTuple):
    """The window that keeps the bias small, where the contributions decay with the lag.

    Attributes:
        window: K, time steps, for `windowed_scan(window=K)`; `None` where there is no bound.
        decay_rate: β, the fitted factor by which contributions fall from lag to lag; nan where there are too few to fit.
        bound: on the relative bias at K; infinite where there is none.
        reason: in one sentence.
    """

    window: int | None
    decay_rate: float
    bound: float
    reason: str

    _repr_html_ = fields_table


def effective_horizon(lags: LagContributions, eps: float | None = None) -> Any:
    r"""The smallest window that misses less than a fraction ε of the gradient, for each leaf of the params.

    min { K : ‖∂L/∂θ − Σ_{l<k} G⁽ˡ⁾‖ < ε ‖∂L/∂θ‖ for all k ≥ K }

    By default ε is the machine epsilon of the leaf's dtype: longer lags change no digit of the gradient, so nothing can be
    learned from them. Time and memory O(L p).

    Args:
        lags: from `lag_contributions`.
        eps: ε, between 0 and 1; machine epsilon of each leaf by default.

    Returns:
        Whole numbers, like the params: windows from 1 on, one more than there are lags where those do not suffice; 0 for a
        gradient of 0.

    Raises:
        ValueError: ε not between 0 and 1.

    Example:
        >>> import jaxbptt as bptt
        >>> halves = lambda w, h, x: (w["in"] + 0.5 * h, None)  # each step back counts half as much
        >>> lags = bptt.lag_contributions(halves, {"in": 1.0}, 0.0, None, lambda h, ys: h, length=40)
        >>> print(bptt.effective_horizon(lags, 0.01)["in"], bptt.effective_horizon(lags)["in"])
        7 23
    """
    _check_lags(lags)
    if eps is not None and not is_number(eps, 0, 1):
        raise ValueError(f"eps is {eps!r}, but it is a fraction of the gradient: pass a number between 0 and 1.")

    def horizon(contributions, gradient):
        own_eps = float(jnp.finfo(gradient.dtype).eps)
        contributions, gradient = _wide(contributions), _wide(gradient)
        # Summed from the longest lag, where terms are small: the difference of two large sums would be rounding.
        beyond = gradient - contributions.sum(axis=0)
        noise = 8 * own_eps * (norm(gradient) + norm(contributions))
        beyond = jnp.where(norm(beyond) > noise, beyond, jnp.zeros_like(beyond))
        rest = beyond[None] + jax.lax.cumsum(contributions, reverse=True)
        sizes = jax.lax.map(norm, jnp.concatenate([rest, beyond[None]]))
        large = sizes >= (own_eps if eps is None else eps) * norm(gradient)
        # The first lag after which none is large: tails need not fall monotonically.
        last = len(large) - jnp.argmax(large[::-1])
        return jnp.where(jnp.any(large) & (norm(gradient) > 0), last, 0)

    return jax.tree.map(horizon, lags.contributions, lags.gradient)


def adaptive_truncation_length(
    lags: LagContributions, *, relative_bias: float = 0.1, fit_from: int | None = None
) -> AdaptiveTruncation:
    r"""The `window=` of `windowed_scan` for a relative bias of at most δ, from the first lags alone.

    K = min { K : B(K) ≤ δ · maxⱼ (‖Σ_{l<j} G⁽ˡ⁾‖ − B(j)) },  B(K) = Σ_{K≤l<L} ‖G⁽ˡ⁾‖ + C βᴸ/(1 − β)

    B(K) bounds the bias ‖g_K − g‖ by the triangle inequality, and the difference on the right bounds ‖g‖ from below. The L
    lags that were computed are used as they are. Longer ones are assumed to fall geometrically: β by least squares to
    log‖G⁽ˡ⁾‖ over lags l ≥ τ, C the least for which C βˡ is above all of those. With β ≥ 1 nothing bounds the longer lags,
    and there is no window.

    Args:
        lags: from `lag_contributions`, with a `max_lag` well below T: the longer the lag, the fewer of the T steps have it.
            Concrete arrays: not inside `jit`.
        relative_bias: δ, of ‖g_K − g‖ / ‖g‖.
        fit_from: τ, the lag from which the decay is assumed geometric; half of the lags by default.

    Returns:
        `AdaptiveTruncation`; K may lie beyond the lags that were computed.

    Raises:
        ValueError: δ not above 0, τ that leaves fewer than two lags to fit.

    Example:
        >>> import jaxbptt as bptt
        >>> halves = lambda w, h, x: (w + 0.5 * h, None)
        >>> lags = bptt.lag_contributions(halves, 1.0, 0.0, None, lambda h, ys: h, max_lag=8, length=1_000)
        >>> bptt.adaptive_truncation_length(lags, relative_bias=0.01).window  # 0.5⁷ = 0.008
        7
        >>> sums = lambda w, h, x: (w + h, None)
        >>> lags = bptt.lag_contributions(sums, 1.0, 0.0, None, lambda h, ys: h, max_lag=8, length=1_000)
        >>> print(bptt.adaptive_truncation_length(lags).window)  # nothing is ever forgotten
        None

    References:
        Aicher, Foti and Fox, Adaptively truncating backpropagation through time to control gradient bias, UAI 2019,
        arXiv:1905.07473.
    """
    _check_lags(lags)
    check_concrete("adaptive_truncation_length", lags=lags)
    if not is_number(relative_bias, 0):
        raise ValueError(f"relative_bias is {relative_bias!r}, but it bounds a relative error: pass a number above 0.")
    norms = np.asarray(lags.norms, float)
    count = len(norms)
    tau = count // 2 if fit_from is None else fit_from
    check_count(
        "fit_from",
        tau,
        f"of {counted(count, 'lag')} at least two are needed to fit a decay",
        least=0,
        most=count - 2,
        way_out=f"pass at most {count - 2}, or compute more lags",
    )
    if not np.isfinite(norms).all():
        return AdaptiveTruncation(None, math.nan, math.inf, "No bound: the gradient is not finite.")
    beta, scale = _decay(norms, tau)
    if math.isnan(beta):
        reason = (
            f"No bound: from lag {tau} on only one lag contributes, and fitting a decay takes two. Compute more lags."
        )
        return AdaptiveTruncation(None, beta, math.inf, reason)
    if beta >= 1:
        reason = (
            f"No bound: from lag {tau} on the contributions do not fall, they go with {beta:.4g} to the power of the lag, "
            "and nothing bounds longer lags."
        )
        return AdaptiveTruncation(None, beta, math.inf, reason)

    beyond = scale * beta**count / (1 - beta)
    rest = np.append(np.cumsum(norms[::-1])[::-1], 0.0) + beyond  # B(0) … B(L)
    partial_sums = jax.tree.map(lambda leaf: jnp.cumsum(_wide(leaf), axis=0), lags.contributions)
    reached = np.append(0.0, np.asarray(jax.lax.map(tree_norm, partial_sums), float))
    at_least = float(np.max(reached - rest))  # ‖g‖ is not smaller than that
    if not at_least > 0:
        reason = (
            f"No bound: what may lie beyond lag {count - 1} is as large as all up to it. Compute more than {count}."
        )
        return AdaptiveTruncation(None, beta, math.inf, reason)
    enough = np.flatnonzero(rest[1:] <= relative_bias * at_least)
    if enough.size:
        K = int(enough[0]) + 1
        bound = rest[K] / at_least
    else:
        K = count + math.ceil(math.log(relative_bias * at_least / beyond) / math.log(beta))
        bound = beyond * beta ** (K - count) / at_least
    beyond_computed = "" if enough.size else f", beyond the {counted(count, 'lag')} that were computed"
    reason = (
        f"A window of {counted(K, 'step')}{beyond_computed} has a relative bias of at most {bound:.2g}, if the decay by "
        f"{beta:.4g} a lag continues."
    )
    return AdaptiveTruncation(K, beta, bound, reason)


def _check_lags(lags: Any) -> None:
    if not isinstance(lags, LagContributions):
        raise TypeError(f"lags are a {type(lags).__name__}: pass what lag_contributions(...) returned.")


def _wide(leaf: Any) -> Any:
    """In float32 at least, to be summed over lags."""
    return leaf.astype(at_least_float32(leaf.dtype))


def _decay(norms: np.ndarray, tau: int) -> tuple[float, float]:
    """β and C with ‖G⁽ˡ⁾‖ ≤ C βˡ for l ≥ τ: the slope by least squares, the factor large enough for all of them."""
    lags = np.flatnonzero(norms > 0)
    lags = lags[lags >= tau]
    if not lags.size:
        return 0.0, 0.0  # no contribution in the whole range, so nothing to extrapolate
    if lags.size == 1:
        return math.nan, math.nan
    logs = np.log(norms[lags])
    slope = float(np.polyfit(lags, logs, 1)[0])
    return math.exp(slope), math.exp(float(np.max(logs - slope * lags)))
