r"""Truncated BPTT with a window: every loss term reaches back equally far, wherever it is in the sequence.

The recursion runs over the lag, not over time: the adjoints of all loss terms go one step back together, W times. The deltas
of each step are summed over the lag, and since the contraction over time is linear it is taken once, of the sum.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from jaxbptt.along_time import at_last_step, filled
from jaxbptt.arrays import check_count
from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.programs.perturbed import fit
from jaxbptt.scans.derivative import with_derivative
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.passes import Pass, one_pass
from jaxbptt.scans.recurrence import prepare
from jaxbptt.trees import select


def windowed_scan(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    window: int,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
    reverse: bool = False,
    adjoint: Adjoint | None = None,
    unroll: int | bool | None = None,
) -> tuple[Any, Any]:
    r"""`scan` whose gradient reaches back exactly W steps from every loss term: truncated BPTT, the windowed kind.

    Σₗ G⁽ˡ⁾ over l < W, with G⁽ˡ⁾ = Σₜ (∂⁺hₜ₋ₗ/∂θ)ᵀ Aₗ[t],  A₀[t] = aₜ,  Aₗ₊₁[t] = Jₜ₋ₗᵀ Aₗ[t]

    Biased, and equally so at every step; `truncated_scan` is cut at fixed times instead. The values are those of `scan`.
    For W ≥ T the gradient is exact. A loss term at step t reaches the uses of params and inputs at steps t − W + 1 … t, and
    `init` where t ≤ W. Time O(W T) steps, but of the backward only W run in sequence; memory O(T n), a few times
    that of `adjoint_scan`. A step that branches (`lax.cond`) is not mapped over time: then all W T steps run in sequence.

    A `jax.export` with a symbolic T runs all W lags, however short the sequence turns out to be.

    Only first derivatives have the window: a second derivative is that of the outputs without a window.

    The sum over lags assumes that the backward pass is linear in the cotangents. A `jax.custom_vjp` in the step whose bwd is
    not linear, such as one that clips or takes a sign, gets another gradient here than from `scan`, even for W ≥ T.

    Args:
        step: as `scan`, like params, init, xs, length, is_first, valid, reset_carry and reverse.
        params: θ; arrays that `step` closes over get their gradient as well.
        window: W, time steps.
        adjoint: the backward of one step, which must allow `jax.vmap`. By default the `Cell`'s own, or else derived.
        unroll: time steps in one iteration of the compiled forward loop, as for `lax.scan`. `None` for 8 on CUDA,
            from 32 steps on, and 1 elsewhere.

    Returns:
        The last carry, and the yₜ stacked on a leading time axis.

    Raises:
        ValueError: `window` below 1; and as `adjoint_scan`.
        TypeError: as `adjoint_scan`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> power = lambda w, h, x: (w * h, w * h)
        >>> total = lambda w, W: bptt.windowed_scan(power, w, 1.0, length=3, window=W)[1].sum()  # w + w² + w³
        >>> print(jax.grad(total)(0.5, 3), jax.grad(total)(0.5, 1))  # 1 + 2w + 3w², and 1 + w + w²
        2.75 1.75

    References:
        Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent network trajectories,
        1990, doi:10.1162/neco.1990.2.4.490.
    """
    check_count("window", window, "it counts time steps")
    r = prepare(step, params, init, xs, length, is_first, valid, reverse=reverse)
    over_time, r = one_pass(step, adjoint, r, Flags(is_first, valid, reset_carry), unroll)
    length = r.length
    # More lags than time steps add zeros, and lax.scan takes no symbolic number of them.
    lags = int(window) if is_symbolic_dim(length) else min(int(window), length)

    def run(params, init, xs):
        return over_time.run(params, init, xs, length)

    def forward(over_time, params, init, xs):
        return over_time.forward(params, init, xs, length)

    def backward(over_time, params, init, xs, residuals, last_bar, ys_bar):
        if lags == 0:  # no time steps
            flags = over_time.adjoint.perturbed
            params_bar, xs_bar = jax.tree.map(jnp.zeros_like, select((params, xs), (flags.params, flags.x)))
            return params_bar, last_bar, xs_bar
        bars = at_last_step(last_bar, length), filled(ys_bar, length)
        return _backward(over_time, (params, init, xs), residuals.stacked(), bars, lags)

    return with_derivative("windowed_scan", over_time, run, forward, backward, forward_mode=False)(r)


def _backward(
    over_time: Pass, primals: tuple[Any, Any, Any], residuals: Any, bars: tuple[Any, Any], lags: int
) -> tuple[Any, Any, Any]:
    """The recursion over the lag: bars of all time steps at once, of carries and ys, moved one step back `lags` times."""
    params, init, xs = primals
    carry_bars, ys_bar = bars
    adjoint, flags = over_time.adjoint, over_time.adjoint.perturbed

    def one_lag_more(state, _):
        bars, *sums = state
        # ȳₜ enters once, at lag 0; after that everything comes through the carry.
        no_bar = jax.tree.map(jnp.zeros_like, ys_bar)
        bars, *terms = over_time.back_one_lag(params, residuals, xs, bars, no_bar)
        return (bars, *jax.tree.map(jnp.add, sums, terms)), None

    state = over_time.back_one_lag(params, residuals, xs, carry_bars, ys_bar)
    (_, init_bar, deltas), _ = jax.lax.scan(one_lag_more, state, None, length=lags - 1)
    params_bar, xs_bar = adjoint.contract(params, residuals, xs, ys_bar, deltas)
    return (
        fit(params_bar, params, flags.params, "params"),
        fit(init_bar, init, flags.carry, "init"),
        fit(xs_bar, xs, flags.x, "xs"),
    )
