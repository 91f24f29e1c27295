r"""Truncated BPTT in segments: the state passes from segment to segment, the gradient does not.

So the backward pass of a segment needs nothing from the segments after it. It runs in order of time: forward over a segment,
back over it, on to the next. The residuals of one segment are stored at any time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt.along_time import at_one_step, put_window, room
from jaxbptt.array_types import byte_count
from jaxbptt.arrays import check_count
from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.scans.derivative import with_derivative
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.passes import Bars, Pass, lengths_to_contract, one_pass
from jaxbptt.scans.recurrence import check_known_length, prepare
from jaxbptt.trees import combine, partition, select


def truncated_scan(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    truncation_length: int,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
    reverse: bool = False,
    adjoint: Adjoint | None = None,
    unroll: int | bool | None = None,
) -> tuple[Any, Any]:
    r"""`scan` whose gradient is cut every K steps: truncated BPTT over consecutive segments.

    ∂cₜ₊₁/∂cₜ and ∂yₜ₊₁/∂cₜ count as 0 where t ≡ 0 (mod K), t > 0

    Biased: a loss at step t reaches back to the start of its segment, (t − 1) mod K steps; `windowed_scan` reaches equally
    far from every step. The values are those of `scan`. For K ≥ T the gradient is exact. The caller's `init` is never
    cut. A second derivative is that of a loop with `stop_gradient` at the cuts. Time O(T) steps, each computed twice (four
    times where `adjoint_scan` falls back to `jax.vjp`); memory beyond xs, ys and their gradients is that of K steps,
    however long the sequence.

    Side effects of a step, such as `jax.debug.print` or a callback, happen twice in a gradient, since it is computed twice.

    Args:
        step: as `scan`, like params, init, xs, length, is_first, valid, reset_carry and reverse.
        params: θ; arrays that `step` closes over get their gradient as well.
        truncation_length: K, time steps; it need not divide T.
        adjoint: the backward of one step. By default the `Cell`'s own, or else derived from `step`.
        unroll: time steps in one iteration of the compiled loops, as for `lax.scan`. `None` for 8 on CUDA,
            from 32 steps on, and 1 elsewhere.

    Returns:
        The last carry, and the yₜ stacked on a leading time axis.

    Raises:
        ValueError: `truncation_length` below 1; and as `adjoint_scan`.
        TypeError: a step that writes to a mutable array (`jax.new_ref`) from outside, in a gradient; and as
            `adjoint_scan`.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> power = lambda w, h, x: (w * h, w * h)
        >>> last = lambda w, K: bptt.truncated_scan(power, w, 0.9, length=3, truncation_length=K)[0]
        >>> print(f"{jax.grad(last)(0.2, 3):.3f} {jax.grad(last)(0.2, 2):.3f}")  # 3 w² h₀, and w² h₀
        0.108 0.036

    References:
        Williams and Peng, An efficient gradient-based algorithm for on-line training of recurrent network trajectories,
        1990, doi:10.1162/neco.1990.2.4.490.
    """
    check_count("truncation_length", truncation_length, "it counts time steps")
    r = prepare(step, params, init, xs, length, is_first, valid, reverse=reverse)
    over_time, r = one_pass(step, adjoint, r, Flags(is_first, valid, reset_carry), unroll)
    length = r.length
    check_known_length("truncated_scan", length)
    segment = max(min(int(truncation_length), length), 1)

    def run_by(over_time, params, init, xs):
        # Cut here too, by a select: for a second derivative JAX differentiates this loop.
        def body(carry, at_t):
            t, x = at_t
            diff, nondiff = partition(carry)
            cut = (t > 0) & (t % segment == 0)
            diff = jax.tree.map(lambda leaf: jnp.where(cut, jax.lax.stop_gradient(leaf), leaf), diff)
            return over_time.step.step(params, combine(diff, nondiff), x)

        return over_time.loop(body, init, (jnp.arange(length), xs), length)

    run, in_sequence = partial(run_by, over_time), partial(run_by, over_time.plain())

    def forward(over_time, params, init, xs):
        over_time.check_recomputable("truncated_scan")
        return run_by(over_time, params, init, xs), None

    def backward(over_time, params, init, xs, _, last_bar, ys_bar):
        return _backward(over_time, params, init, xs, (last_bar, ys_bar), length, segment)

    return with_derivative("truncated_scan", over_time, run, forward, backward, in_sequence=in_sequence)(r)


def _backward(
    over_time: Pass, params: Any, init: Any, xs: Any, bars: Bars, length: int, segment: int
) -> tuple[Any, Any, Any]:
    """Segment by segment in order of time: forward over it, and back over it with nothing coming in from later ones."""
    last_bar, ys_bar = bars
    segments, left_over = divmod(length, segment)
    # Where the params are larger than what is saved, a second array like them would be most of the memory.
    move_each = segment * byte_count(init) < byte_count(params)
    lengths = lengths_to_contract(init, segment, left_over)
    over_time = over_time.prepared(params, init, xs, bars, lengths, move_each=move_each)
    no_bar = jax.tree.map(jnp.zeros_like, last_bar)

    def over_segment(state, start, length_here):
        carry, init_bar, sums, xs_bar = state
        carry_bar = jax.tree.map(partial(jnp.where, start + length_here == length), last_bar, no_bar)
        next_carry, ((carry_bar, sums), xs_bar_here) = over_time.forward_and_back(
            params, (carry_bar, sums), carry, xs, ys_bar, start, length_here
        )
        # Segments run in order of time, so init's cotangent is that of the first.
        init_bar = jax.tree.map(partial(jnp.where, start == 0), carry_bar, init_bar)
        # The incoming carry is a constant of the next segment's gradient: this is the truncation.
        return jax.lax.stop_gradient(next_carry), init_bar, sums, put_window(xs_bar, xs_bar_here, start)

    init_bar = no_bar if length else last_bar
    xs_bar = room(at_one_step(select(xs, over_time.adjoint.perturbed.x)), length)
    state = init, init_bar, over_time.weights.zeros(), xs_bar
    if segments:
        state = jax.lax.fori_loop(0, segments, lambda i, state: over_segment(state, i * segment, segment), state)
    if left_over:
        state = over_segment(state, segments * segment, left_over)
    _, init_bar, sums, xs_bar = state
    return over_time.weights.finish(sums), init_bar, xs_bar
