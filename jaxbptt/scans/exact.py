r"""The reference strategy: `lax.scan`, differentiated by JAX. Every other one is measured against it."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax

from jaxbptt.cells.cell import Cell, step_of
from jaxbptt.scans.flags import Flags, without_adjoint
from jaxbptt.scans.recurrence import length_for_scan, prepare
from jaxbptt.trees import is_ref


def scan(
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
    unroll: int | bool = 1,
) -> tuple[Any, Any]:
    r"""Unroll a recurrence with `lax.scan`; its gradient is full BPTT, taken by JAX.

    cₜ, yₜ = step(θ, cₜ₋₁, xₜ),  t = 1 … T

    Time O(T) steps; reverse mode saves every step's intermediate values, O(T n) for a dense layer. Forward mode
    (`jax.jvp`, `jax.jacfwd`) works and saves nothing.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`.
        params: θ, any pytree; handed to every step.
        init: c₀, any pytree of arrays; every step returns one like it.
        xs: inputs, leaves `[time, *batch, features]`, or `None`.
        length: T, needed where `xs` is `None`.
        is_first: booleans `[time, *batch]`, where a new sequence begins: before that xₜ is consumed the row's carry is
            reset, and no gradient passes.
        valid: booleans `[time, *batch]`, False where a step is padding: it is not taken, the carry is held, yₜ is 0, and
            what stands in xₜ changes nothing. Leaves of xs that don't begin with [time, *batch] are shared by all rows.
        reset_carry: what `is_first` resets to, like `init` or one row of it; it gets its gradient. By default zeros, and
            typed random keys go on as they are. A key that all rows share always does.
        reverse: whether to run from x_T to x₁, as `lax.scan` does: cₜ₋₁, yₜ = step(θ, cₜ, xₜ) from c_T = `init`, and yₜ stands
            at its own t. The same as flipping xs, is_first and valid along time, and ys back. So `is_first` marks where a
            sequence begins in the order of running, which is its last step in time. Other strategies than `scan` flip copies
            of xs and ys.
        unroll: time steps in one iteration of the compiled loop, as for `lax.scan`.

    Returns:
        The last carry, c_T (in reverse c₀), and the yₜ stacked on a leading time axis.

    Raises:
        ValueError: neither `xs` nor `length`, leaves of `xs` that disagree on T, a carry that changes shape, flags or a
            `reset_carry` that do not fit `init`, a `reset_carry` without `is_first`.
        TypeError: a step that returns no pair or takes two arguments, a carry that changes structure or dtype, flags that
            are not boolean.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> power = lambda w, h, x: (w * h, w * h)
        >>> h_3, hs = bptt.scan(power, 0.5, 1.0, length=3)
        >>> print(h_3, hs)
        0.125 [0.5   0.25  0.125]
        >>> print(jax.grad(lambda w: bptt.scan(power, w, 1.0, length=3)[0])(0.5))  # 3 w²
        0.75

    References:
        Werbos, Backpropagation through time: what it does and how to do it, 1990, doi:10.1109/5.58337.
    """
    if any(map(is_ref, jax.tree.leaves(xs))) and is_first is valid is reset_carry is None:
        # The step gets references to the entries, which only lax.scan can hand out.
        return jax.lax.scan(partial(step_of(step), params), init, xs, length=length, reverse=reverse, unroll=unroll)
    r = prepare(step, params, init, xs, length, is_first, valid, reverse=reverse)
    r = without_adjoint(r, Flags(is_first, valid, reset_carry))
    step, length = partial(r.step, r.params), length_for_scan(r.length)
    return jax.lax.scan(step, r.init, r.xs, length=length, reverse=reverse, unroll=unroll)
