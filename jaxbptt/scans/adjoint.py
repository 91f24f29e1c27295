r"""The hand-written backward scan: the adjoint recursion in a loop, one contraction over time outside it.

What autodiff does to a scan is add one step's weight gradient to a running sum at every step. Here the loop runs only
what must run in sequence, c̄ₜ ↦ c̄ₜ₋₁, and the sum Σₜ is taken outside it, for many steps at once, as one matrix product.
Both are in `passes`.
"""

from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.programs.perturbed import PerturbedAdjoint, wrapping_for_outputs
from jaxbptt.scans.derivative import with_derivative
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.passes import lengths_to_contract, one_pass
from jaxbptt.scans.recurrence import prepare


def adjoint_scan(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
    reverse: bool = False,
    adjoint: Adjoint | None = None,
    clip_adjoint: float | Callable[[Any], Any] | None = None,
    unroll: int | bool | None = None,
) -> tuple[Any, Any]:
    r"""`scan` with a hand-written reverse-mode derivative: full BPTT as a backward scan.

    c̄ₜ₋₁ = (∂cₜ/∂cₜ₋₁)ᵀ c̄ₜ + (∂yₜ/∂cₜ₋₁)ᵀ ȳₜ,  t = T … 1    (in the loop)
    θ̄ = Σₜ (∂⁺cₜ/∂θ)ᵀ c̄ₜ + (∂⁺yₜ/∂θ)ᵀ ȳₜ,  x̄ₜ likewise      (outside it, many t at once)

    Exact: values and gradients are those of `scan`, in less time and memory (benchmarks/results/peers_*.md). Time O(T)
    steps, each computed once. A residual that is also this or the previous step's output is read from ys, not stored again,
    and outputs that the loss does not use have no gradient array. On CPU the sum over time is taken in segments whose δₜ
    are still in the cache, and all δₜ never exist at once. This takes one more array like the params, so
    it saves memory only where time steps times rows exceed the hidden size.

    A derived adjoint is the step's linearisation, sorted: what the tangent of the carry goes through is transposed in the
    loop, the rest outside it, for many t at once. A `jax.checkpoint` inside the step has no effect: the residuals are chosen
    here. If the differentiated path contains a loop, a branch or a `jax.custom_vjp`, or builds a large table of params at
    each step, we fall back to `jax.vjp` and recompute the step twice. A step that branches (`lax.cond`) is contracted one
    step at a time: mapped over time, both branches would run.

    Only what is differentiated and leads to what the loss uses needs a derivative; for the rest nothing is computed, so
    there is no 0 · inf. Inside the step of an outer `lax.scan` every leaf of the carry counts as differentiated and as used:
    JAX does not tell a custom derivative there which are.

    With `clip_adjoint` the recursion itself is clipped, c̄ₜ₋₁ ← clip(c̄ₜ₋₁) at each step, and not the sum at the end: an
    explosion is stopped where it begins. The gradient is then biased, and exact again where nothing is clipped.

    Args:
        step: as `scan`, like params, init, xs, length, is_first, valid, reset_carry and reverse.
        params: θ; arrays that `step` closes over get their gradient as well.
        adjoint: the backward of one step. By default the `Cell`'s own, or else derived from `step`.
        clip_adjoint: the largest magnitude that an entry of c̄ may have as it passes from step to step, or a function of c̄
            that returns it clipped. `None` for the exact gradient.
        unroll: time steps in one iteration of the compiled loops, as for `lax.scan`. `None` for 8 on CUDA,
            from 32 steps on, and 1 elsewhere.

    Returns:
        The last carry, and the yₜ stacked on a leading time axis.

    Raises:
        ValueError: an `Adjoint` whose results do not fit what they are the derivative of, a `clip_adjoint` that is not
            above 0; and as `scan`.
        TypeError: forward mode with `clip_adjoint`, whose gradient is not that of the values; and as `scan`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.gru(3, 4)
        >>> params, h_0, xs = cell.init(jax.random.key(0)), cell.initial_carry(), jnp.ones((50, 3))
        >>> loss = lambda scan, params: jnp.mean(scan(cell, params, h_0, xs)[1] ** 2)
        >>> ours = jax.grad(loss, argnums=1)(bptt.adjoint_scan, params)
        >>> bptt.compare_gradients(ours, jax.grad(loss, argnums=1)(bptt.scan, params)).agrees
        True

    References:
        Werbos, Backpropagation through time: what it does and how to do it, 1990, doi:10.1109/5.58337. Clipping in the
        recursion: Graves, Generating sequences with recurrent neural networks, 2013, arXiv:1308.0850.
    """
    r = prepare(step, params, init, xs, length, is_first, valid, reverse=reverse)
    over_time, r = one_pass(step, adjoint, r, Flags(is_first, valid, reset_carry), unroll)
    if clip_adjoint is not None:
        over_time = over_time.wrapped(_clipping(clip_adjoint))
    length = r.length

    def run(params, init, xs):
        return over_time.run(params, init, xs, length)

    def forward(over_time, params, init, xs):
        return over_time.forward(params, init, xs, length)

    def backward(over_time, params, init, xs, residuals, carry_bar, ys_bar):
        # Barrier: otherwise XLA sinks constant cotangents, such as those of a sum, into the segment loop and
        # rematerialises them every iteration.
        xs, ys_bar = jax.tree.map(jax.lax.optimization_barrier, (xs, ys_bar))
        over_time = over_time.prepared(params, init, xs, (carry_bar, ys_bar), lengths_to_contract(init, length))
        bar_and_sums = carry_bar, over_time.weights.zeros()
        (init_bar, sums), xs_bar = over_time.back(params, bar_and_sums, residuals, xs, ys_bar, init, length)
        return over_time.weights.finish(sums), init_bar, xs_bar

    return with_derivative("adjoint_scan", over_time, run, forward, backward, forward_mode=clip_adjoint is None)(r)


def _clipping(clip: float | Callable[[Any], Any]) -> Callable[[PerturbedAdjoint], PerturbedAdjoint]:
    """A wrapper of adjoints that clips the carry's cotangent as it leaves each step."""
    if callable(clip):
        function = clip
    elif isinstance(clip, bool) or not isinstance(clip, Real | jax.Array) or jnp.ndim(clip) or not clip > 0:
        raise ValueError(f"clip_adjoint is {clip!r}, but it bounds a magnitude: pass a number above 0, or a function.")
    else:
        function = partial(jax.tree.map, lambda leaf: jnp.clip(leaf, -clip, clip))

    def clipped(adjoint):
        def backward(params, residuals, x, carry_bar, y_bar):
            carry_bar, delta = adjoint.backward(params, residuals, x, carry_bar, y_bar)
            return function(carry_bar), delta

        return wrapping_for_outputs(adjoint._replace(backward=backward), adjoint, clipped)

    return clipped
