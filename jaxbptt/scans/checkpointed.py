r"""The exact gradient in little memory: the forward pass keeps a few states, the backward pass recomputes the others.

Time is cut into segments. The backward pass takes one segment at a time: from the state before it, it runs forward once more
and saves residuals, then runs the same backward pass as `adjoint_scan` does over the whole sequence. Which states are
kept is decided inside the compiled loop, so that its size depends neither on the length nor on the number of states.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from jaxbptt.along_time import at_one_step, filled
from jaxbptt.array_types import byte_count
from jaxbptt.arrays import check_count
from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.programs.program import program
from jaxbptt.scans import schedule, segments
from jaxbptt.scans.derivative import with_derivative
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.passes import Pass, one_pass
from jaxbptt.scans.recurrence import check_known_length, prepare
from jaxbptt.trees import combine, differentiable, differentiated_as, partition, select


def checkpointed_scan(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    segment_length: int | None = None,
    checkpoints: int | None = None,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
    reverse: bool = False,
    adjoint: Adjoint | None = None,
    unroll: int | bool | None = None,
) -> tuple[Any, Any]:
    r"""`scan` with a reverse-mode derivative that keeps few states and recomputes the others.

    Exact: values and gradients are those of `scan`. Memory beyond xs, ys and their gradients:

    - `segment_length=s`: T/s states, and the residuals of s steps; 2 T forward steps in all.
    - `checkpoints=c`: c states, and the residuals of a segment, which take less than half as many bytes as they do. The
      segments are reversed in the order of Griewank and Walther (`checkpoint_schedule`): with N segments of b steps,
      about b·(r·N − C(c+r, r−1) + N) forward steps, where r is the least with C(c+r, c) ≥ N.
    - neither: the s of the first that needs the least memory, near √T.

    Size of the program and compile time do not grow with T, s or c. Outputs are returned in full: a step whose y is as large
    as its state still returns T of them. For a long sequence, let y be what the loss needs of a step.

    Side effects of a step, such as `jax.debug.print` or a callback, happen each time it is computed: in a gradient twice
    with segments, and as often as the schedule says with `checkpoints`.

    Args:
        step: as `scan`, like params, init, xs, length, is_first, valid, reset_carry and reverse.
        params: θ; arrays that `step` closes over get their gradient as well.
        segment_length: s, time steps, at least 1; from T on, all of them are one segment.
        checkpoints: c, states kept at the same time, the first included, from 1 to T.
        adjoint: the backward of one step. By default the `Cell`'s own, or else derived from `step`.
        unroll: time steps in one iteration of the compiled loops, as for `lax.scan`. `None` for 8 on CUDA,
            from 32 steps on, and 1 elsewhere.

    Returns:
        The last carry, and the yₜ stacked on a leading time axis.

    Raises:
        ValueError: both `segment_length` and `checkpoints`, `segment_length` below 1, `checkpoints` outside 1 … T; and as
            `adjoint_scan`.
        TypeError: a step that writes to a mutable array (`jax.new_ref`) from outside, in a gradient; and as
            `adjoint_scan`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.elman(3, 8)
        >>> params, h_0, xs = cell.init(jax.random.key(0)), cell.initial_carry(), jnp.ones((10_000, 3))
        >>> def temporary_bytes(scan, **options):
        ...     last_state = lambda params: jnp.sum(scan(cell, params, h_0, xs, **options)[0])
        ...     return jax.jit(jax.grad(last_state)).lower(params).compile().memory_analysis().temp_size_in_bytes
        >>> temporary_bytes(bptt.checkpointed_scan) < 0.05 * temporary_bytes(bptt.scan)
        True

    References:
        Griewank and Walther, Algorithm 799: revolve, 2000, doi:10.1145/347837.347846. Chen, Xu, Zhang and Guestrin,
        Training deep nets with sublinear memory cost, 2016, arXiv:1604.06174.
    """
    r = prepare(step, params, init, xs, length, is_first, valid, reverse=reverse)
    over_time, r = one_pass(step, adjoint, r, Flags(is_first, valid, reset_carry), unroll)
    length = r.length
    check_known_length("checkpointed_scan", length)
    check_options(length, segment_length, checkpoints)
    if length == 0:
        return over_time.run(r.params, r.init, r.xs, 0)

    def run_by(over_time, params, init, xs):
        # Not a plain scan: under a vmap inside a scan, JAX assumes that both forwards put the mapped axis in one place.
        return segments.forward(over_time, params, init, xs, _nothing_kept(length))[0]

    run, in_sequence = partial(run_by, over_time), partial(run_by, over_time.plain())

    def forward(over_time, params, init, xs):
        over_time.check_recomputable("checkpointed_scan")
        cut = layout(over_time, params, init, xs, length, segment_length, checkpoints)
        outputs, states = segments.forward(over_time, params, init, xs, cut)
        return outputs, (cut, states)

    def backward(over_time, params, init, xs, saved, carry_bar, ys_bar):
        cut, states = saved

        def gradients(params, init, xs, carry_bar, ys_bar, states):
            return segments.backward(over_time, params, states, xs, (carry_bar, ys_bar), cut)

        if not cut.all_kept and not over_time.adjoint.mutates:
            # Loops of a length known only when they run have no reverse mode: a second derivative goes through `scan`.
            gradients = differentiated_as(_gradients_by_scan(over_time, length), gradients)
        return gradients(params, init, xs, carry_bar, ys_bar, states)

    return with_derivative("checkpointed_scan", over_time, run, forward, backward, in_sequence=in_sequence)(r)


def _gradients_by_scan(over_time: Pass, length: int) -> Callable[..., Any]:
    """The same gradients by `jax.vjp` of a plain scan."""
    flags = over_time.adjoint.perturbed

    def gradients(params, init, xs, carry_bar, ys_bar, states):
        diff, nondiff = partition((params, init, xs), flags=tuple(flags))

        def outputs(*diff):
            params, init, xs = combine(diff, nondiff)
            carry, ys = over_time.run(params, init, xs, length)
            # `None` where no gradient comes back
            ys = jax.tree.map(lambda leaf, bar: None if bar is None else leaf, ys, ys_bar)
            return select(carry, flags.carry), ys

        _, vjp = jax.vjp(outputs, *diff)
        return vjp((carry_bar, filled(ys_bar, length)))

    return gradients


def check_options(length: int, segment_length: Any, checkpoints: Any) -> None:
    """Raise where the options make no sense."""
    if segment_length is not None and checkpoints is not None:
        raise ValueError(
            f"Both segment_length={segment_length} and checkpoints={checkpoints} were given: pass the first to keep one "
            "state in so many steps, the second to keep so many states, or neither."
        )
    if checkpoints is not None:
        schedule.check_checkpoints(checkpoints, length or checkpoints)
    if segment_length is not None:
        check_count("segment_length", segment_length, "it counts time steps")


def layout(
    over_time: Pass, params: Any, init: Any, xs: Any, length: int, segment_length: int | None, checkpoints: int | None
) -> segments.Layout:
    """Cut `length` time steps as the options say."""
    longest = max(length, 1)
    carry_bytes = max(byte_count(init), 1)
    lean = False
    if segment_length is not None:
        segment = min(int(segment_length), longest)
    else:
        step_bytes, lean_bytes = _bytes_of_a_step(over_time, params, init, xs)
        if checkpoints is None:
            # The sum of T/s states and s steps is least near √T.
            segment = schedule.divisor_near(longest, math.sqrt(longest * carry_bytes / step_bytes))
        else:
            share = 0.4 * checkpoints * carry_bytes
            lean = checkpoints * carry_bytes < byte_count(params)
            most = -(-longest // checkpoints)
            segment = max(1, min(int(share / (lean_bytes if lean else step_bytes)), most))
    whole, left_over = divmod(length, segment)
    slots = whole if checkpoints is None else min(int(checkpoints), whole)
    kept = range(whole) if slots == whole else schedule.first_sweep(whole, slots)
    return segments.Layout(segment, whole, left_over, slots, tuple(kept), lean)


def _nothing_kept(length: int) -> segments.Layout:
    """For values without a gradient."""
    segment = schedule.divisor_near(length, math.sqrt(length))
    return segments.Layout(segment, *divmod(length, segment), slots=0, kept=(), lean=False)


def _bytes_of_a_step(over_time: Pass, params: Any, init: Any, xs: Any) -> tuple[int, int]:
    """What a segment stores of each of its steps, with one contraction for all of it and with one at every step."""
    adjoint = over_time.adjoint

    def one_step(params, carry, x):
        (new_carry, y), residuals = adjoint.forward(params, carry, x)
        bars = select(new_carry, adjoint.perturbed.carry), differentiable(y)
        # Known without differentiating what the loss may not use.
        deltas = bars[0] if adjoint.by_vjp else adjoint.backward(params, residuals, x, *bars)[1]
        return new_carry, residuals, deltas

    traced = program(one_step, params, init, at_one_step(xs))
    new_carry, residuals, deltas = traced.outputs
    stored = segments.stored_beside_carries(traced.arguments[1], new_carry, residuals).store(residuals)
    at_once, lean = ([var.aval for var in jax.tree.leaves(tree)] for tree in ((residuals, deltas), stored))
    return max(byte_count(at_once), 1), max(byte_count((init, lean)), 1)
