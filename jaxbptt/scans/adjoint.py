r"""The hand-written backward scan: the adjoint recursion in a loop, one contraction over time outside it.

What autodiff does to a scan is add one step's weight gradient to a running sum at every step. Here the loop runs only
what must run in sequence, c̄ₜ ↦ c̄ₜ₋₁, and the sum Σₜ is taken outside it, for many steps at once, as one matrix product.
"""

from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.programs.perturbed import Perturbed, PerturbedAdjoint, of_outputs
from jaxbptt.scans.backward import step_with_adjoint, unroll_backward, unroll_forward
from jaxbptt.scans.flags import with_flags
from jaxbptt.scans.recurrence import length_for_scan, prepare
from jaxbptt.scans.reverse_mode import reverse_mode


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
    adjoint: Adjoint | None = None,
    clip_adjoint: float | Callable[[Any], Any] | None = None,
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    r"""`scan` with a hand-written reverse-mode derivative: full BPTT as a backward scan.

    c̄ₜ₋₁ = (∂cₜ/∂cₜ₋₁)ᵀ c̄ₜ + (∂yₜ/∂cₜ₋₁)ᵀ ȳₜ,  t = T … 1    (in the loop)
    θ̄ = Σₜ (∂⁺cₜ/∂θ)ᵀ c̄ₜ + (∂⁺yₜ/∂θ)ᵀ ȳₜ,  x̄ₜ likewise      (outside it, many t at once)

    Exact: values and gradients are those of `scan`, in less time and memory (benchmarks/results/peers_*.md). Time O(T)
    steps, each computed once; keeps what the backward of each step needs, no number of it twice: what is an output, or was
    one a step before, is read there, and outputs that the loss does not use have no gradient array. On CPU the sum over
    time is taken in segments of time whose δₜ are still in the cache, and all δₜ never exist at once. It takes one array like
    the params, more than is saved where time steps times rows are fewer than units.

    A derived adjoint is the step's linearisation, sorted: what the tangent of the carry goes through is transposed in the
    loop, the rest outside it, for many t at once. A `jax.checkpoint` inside the step is not heeded: what is kept is decided
    here. A step can't be sorted whose tangents go through a loop, a branch or a `jax.custom_vjp`, and it does not pay for
    one that puts a large table of params together anew each time: such steps are computed twice more on the way back. One
    that branches (`lax.cond`) is contracted one step at a time: mapped over time, both branches would run.

    Only what is differentiated and leads to what the loss uses needs a derivative; for the rest nothing is computed, and so no
    0 · inf. In a step of an outer `lax.scan` all of the carry counts as both: there JAX takes a custom derivative whole.

    With `clip_adjoint` the recursion itself is clipped, c̄ₜ₋₁ ← clip(c̄ₜ₋₁) at each step, and not the sum at the end: an
    explosion is stopped where it begins. The gradient is then biased, and exact again where nothing is clipped.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`.
        params: θ, any pytree. Arrays that `step` closes over get their gradient as well.
        init: c₀, any pytree of arrays.
        xs: inputs, leaves `[time, *batch, features]`, or `None`.
        length: T, needed where `xs` is `None`.
        is_first: booleans `[time, *batch]`, where a new sequence begins: before that xₜ is consumed the row's carry is
            reset, and no gradient passes.
        valid: booleans `[time, *batch]`, False where a step is padding: it is not taken, the carry is held, yₜ is 0, and
            what stands in xₜ changes nothing. Leaves of xs that don't begin with [time, *batch] are shared by all rows.
        reset_carry: what `is_first` resets to, like `init` or one row of it; it gets its gradient. By default zeros, and
            typed random keys go on as they are. A key that all rows share always does.
        adjoint: the backward of one step. By default the `Cell`'s own, or else derived from `step`.
        clip_adjoint: the largest magnitude that an entry of c̄ may have as it passes from step to step, or a function of c̄
            that returns it clipped. `None` for the exact gradient.
        unroll: time steps in one iteration of the compiled loops, as for `lax.scan`.

    Returns:
        c_T, and the yₜ stacked on a leading time axis.

    Raises:
        ValueError: an `Adjoint` whose results do not fit what they are the derivative of, a `clip_adjoint` that is not
            above 0; and as for `scan`.
        TypeError: forward-mode differentiation; and as for `scan`.

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
    r = prepare(step, params, init, xs, length, is_first, valid)
    with_adjoint, xs = with_flags(step_with_adjoint(step, adjoint, r), r, is_first, valid, reset_carry)
    step, params, adjoint_for, _, by_hand, *_ = with_adjoint
    length = r.length
    if clip_adjoint is not None:
        adjoint_for = _clipped(adjoint_for, clip_adjoint)

    def run(params, init, xs):
        return jax.lax.scan(partial(step, params), init, xs, length=length_for_scan(length), unroll=unroll)

    def forward(adjoint, params, init, xs):
        return unroll_forward(adjoint, params, init, xs, length=length, unroll=unroll)

    def backward(adjoint, params, init, xs, residuals, carry_bar, ys_bar):
        # Else the compiler moves what is constant, such as the gradient of a sum, into the loop over segments of time, and
        # makes all of it anew in each.
        xs, ys_bar = jax.tree.map(jax.lax.optimization_barrier, (xs, ys_bar))
        return unroll_backward(adjoint, params, init, residuals, xs, carry_bar, ys_bar, length=length, unroll=unroll)

    return reverse_mode("adjoint_scan", adjoint_for, run, forward, backward, by_hand=by_hand)(params, r.init, xs)


def _clipped(
    adjoint_for: Callable[[Perturbed], PerturbedAdjoint], clip: float | Callable[[Any], Any]
) -> Callable[[Perturbed], PerturbedAdjoint]:
    """The same backward, whose carry adjoints are clipped as they leave each step."""
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

        return of_outputs(adjoint._replace(backward=backward), adjoint, clipped)

    return lambda perturbed: clipped(adjoint_for(perturbed))
