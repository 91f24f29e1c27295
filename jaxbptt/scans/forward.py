r"""The gradient accumulated forward in time: the backward pass runs the recurrence once more, with an influence beside it.

All that it keeps of the forward pass is init and xs. What the loss says of each output, ȳₜ, is known by then, so it is used up
as the recurrence goes by.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxbptt.along_time import at_one_step
from jaxbptt.array_types import zeros
from jaxbptt.arrays import check_key
from jaxbptt.cells.cell import Cell
from jaxbptt.influences.carried import Carried, entering
from jaxbptt.influences.influence import Influence, check_influence
from jaxbptt.influences.rtrl import rtrl
from jaxbptt.programs.flagged import begins, present, select_rows, taken
from jaxbptt.programs.perturbed import fit
from jaxbptt.programs.readout import Readout
from jaxbptt.programs.rows import Rows, rows_of
from jaxbptt.programs.trace import TracedStep, trace
from jaxbptt.scans.derivative import with_derivative
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.passes import Pass, one_pass
from jaxbptt.scans.recurrence import prepare
from jaxbptt.trees import same_keys


def forward_scan(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    influence: Influence | None = None,
    key: Any = None,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
    reverse: bool = False,
    unroll: int | bool | None = None,
) -> tuple[Any, Any]:
    r"""`scan` whose gradient is accumulated forward in time, in memory that does not depend on T.

    ∂L/∂θ = Σₜ ȳₜ ∂⁺yₜ/∂θ + āₜ Mₜ,  Mₜ = dcₜ/dθ = Jₜ Mₜ₋₁ + Fₜ

    āₜ is ∂L/∂cₜ through yₜ alone, and for the last carry also what the loss says of it. Exact with `influences.rtrl()`, the
    default; any other influence estimates M. The values are those of `scan`. Time of two forward passes and T times that of the
    influence, O(n² p) for `rtrl`; memory, beyond xs, ys and their gradients, that of one step and of the influence.

    The influence is kept for each row of a batch on its own. Rows are the leading axes of the carry along which the step does
    the same to all; a step whose rows can't be told apart counts as one row of B n numbers, which takes longer: one that draws
    random numbers for all rows with one key, has a loop or a convolution inside, or keeps a key in its carry.

    A biased influence depends on how yₜ is written: computed from the new carry, what the loss says of it meets Mₜ; computed beside
    it from cₜ₋₁, it meets Mₜ₋₁ and one exact step.

    The gradient of `init` and of `reset_carry` is exact whatever the influence, and takes O(n³) a step where it is asked for.
    There is none of `xs`.

    Args:
        step: as `scan`, like params, init, xs, length, is_first, valid, reset_carry and reverse.
        params: θ; arrays that `step` closes over get their gradient as well.
        influence: an `Influence`, such as `influences.snap(1)`; `influences.rtrl()` by default.
        key: random key, for an influence that draws; the gradient is then a random one.
        unroll: time steps in one iteration of the compiled loops, as for `lax.scan`. `None` for 8 on CUDA, from 32 steps on, and
            1 elsewhere, and 1 for the loop with the influence.

    Returns:
        The last carry, and the yₜ stacked on a leading time axis.

    Raises:
        ValueError: flags for rows that can't be told apart; in a gradient, an influence that draws without a `key`; as `scan`,
            and whatever the influence raises.
        TypeError: an `influence` that is no `Influence`, a `key` that is no random key; in a gradient, one with respect to `xs`,
            or a step that writes to a mutable array (`jax.new_ref`) from outside; and as `scan`.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell = bptt.gru(3, 4)
        >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (50, 3))
        >>> loss = lambda params, scan: jax.numpy.mean(scan(cell, params, cell.initial_carry(), xs)[1] ** 2)
        >>> forward, backward = (jax.grad(loss)(params, scan) for scan in (bptt.forward_scan, bptt.adjoint_scan))
        >>> bool(jax.numpy.allclose(forward.W_hh, backward.W_hh, atol=1e-6))
        True

    References:
        Williams and Zipser, A learning algorithm for continually running fully recurrent neural networks, 1989,
        doi:10.1162/neco.1989.1.2.270.
    """
    influence = rtrl() if influence is None else influence
    check_influence(influence, "it says how dc/dθ is carried forward")
    if key is not None:
        check_key(key)
    r = prepare(step, params, init, xs, length, is_first, valid, reverse=reverse)
    traced = trace(r.step, r.params, r.init, r.xs)
    recurrent = _Recurrent(traced, rows_of(r.step, traced, r.init, r.xs), influence)
    flags = Flags(is_first, valid, reset_carry)
    over_time, r = one_pass(traced.step, None, r._replace(step=traced.step, params=traced.params), flags, unroll)
    recurrent.rows.check_flags(flags.is_first, flags.valid)
    length, flagged = r.length, flags.given

    def run(params, init, xs):
        return over_time.run(params, init, xs, length)

    def in_sequence(params, init, xs):
        return over_time.plain().run(params, init, xs, length)

    def forward(over_time, params, init, xs):
        over_time.check_recomputable("forward_scan")
        return over_time.run(params, init, xs, length), key

    def backward(over_time, params, init, xs, key, last_bar, ys_bar):
        return _backward(over_time, recurrent, params, init, xs, key, last_bar, ys_bar, length, flagged=flagged)

    return with_derivative("forward_scan", over_time, run, forward, backward, in_sequence=in_sequence)(r)


class _Recurrent(NamedTuple):
    """A step as it runs forward with an influence.

    Attributes:
        traced: the step of the whole batch.
        rows: that of one row.
        influence: what is carried for each row.
    """

    traced: TracedStep
    rows: Rows
    influence: Influence


class _Starts(NamedTuple):
    """What each row started from: dcₜ/dc of its sequence, whether that was a reset, and the cotangents of both starts so far."""

    matrix: Array
    was_reset: Array
    init_bar: Any
    reset_bar: Any

    def at_resets(self, here: Any, identity: Array) -> "_Starts":
        """Rows that are reset start anew."""
        return self._replace(matrix=select_rows(here, identity, self.matrix), was_reset=self.was_reset | here)

    def add(self, found: Any) -> "_Starts":
        """With a cotangent of what the rows started from."""
        nothing = jax.tree.map(jnp.zeros_like, found)
        of_init = select_rows(self.was_reset, nothing, found)
        of_reset = select_rows(self.was_reset, found, nothing)
        init_bar, reset_bar = jax.tree.map(jnp.add, (self.init_bar, self.reset_bar), (of_init, of_reset))
        return self._replace(init_bar=init_bar, reset_bar=reset_bar)


def _backward(
    over_time: Pass,
    recurrent: _Recurrent,
    params: Any,
    init: Any,
    xs: Any,
    key: Any,
    last_bar: Any,
    ys_bar: Any,
    length: int,
    *,
    flagged: bool,
) -> tuple[Any, Any, Any]:
    """The gradients of (params, init, xs): forward over all steps, with the influence and the bars of the outputs."""
    asked = over_time.asked
    if any(jax.tree.leaves(asked.x)):
        raise TypeError(
            "forward_scan has no gradient of xs: ∂L/∂xₜ is what all later losses say of step t, and forward in time they are not "
            "known yet. Take adjoint_scan, or checkpointed_scan where memory is short; or stop it, jax.lax.stop_gradient(xs)."
        )
    no_xs_bar = _without(xs)
    # The pass has traced what was traced before: its params are one list.
    own, own_asked = map(over_time.step.like_params, (params, asked.params))
    (as_list, reset, padding), reset_asked = (params, asked.params[1]) if flagged else ((params, None, None), None)
    init, xs = same_keys((init, xs))
    xs, first, valid = xs if flagged else (xs, None, None)
    traced, rows, influence = recurrent
    carried = Carried(influence, rows, own_asked, over_time.adjoint.perturbed.carry)
    read = Readout(traced, own_asked, carried.kept, ys_bar)
    reads = read.reads(own, init, at_one_step(xs))

    def pulled(sums, starts, M, bar):
        """With what a cotangent of the carry says of the params, and of what the rows started from."""
        sums = carried.add_pulled(sums, M, bar)
        return sums, starts and starts.add(carried.pull_start(starts.matrix, bar))

    def body(state, at_t):
        t, carry, M, starts, sums = state
        inputs, y_bar = at_t
        _, first, valid = inputs
        M, carry, old, x = entering(M, carry, inputs, (reset, padding))
        if starts and first is not None:
            starts = starts.at_resets(begins(first, valid), carried.start(carry))
        new, _ = traced.step(own, old, x)
        own_bar, old_bar, new_bar = read.pull(own, same_keys(old), same_keys(x), same_keys(new), present(valid, y_bar))
        if reads.params:
            sums = carried.add(sums, own_bar)
        if reads.old_carry:
            sums, starts = pulled(sums, starts, M, old_bar)
        step_key = None if key is None else jax.random.fold_in(key, t)
        M = taken(valid, carried.advance(own, M, same_keys(old), same_keys(x), step_key), M)
        if starts:
            matrix = carried.advance_start(own, starts.matrix, same_keys(old), same_keys(x))
            starts = starts._replace(matrix=taken(valid, matrix, starts.matrix))
        if reads.new_carry:
            sums, starts = pulled(sums, starts, M, new_bar)
        return (t + 1, taken(valid, new, carry), M, starts, sums), None

    M = carried.init(own, init, jax.tree.map(zeros, at_one_step(xs)))
    starts = None
    if any(jax.tree.leaves(carried.kept)) and any(jax.tree.leaves((asked.carry, reset_asked))):
        no_bar = jax.tree.map(jnp.zeros_like, last_bar)
        was_reset = jnp.zeros(rows.batch if first is None else first.shape[1:], bool)
        starts = _Starts(carried.start(init), was_reset, no_bar, no_bar)
    # The time is counted in the loop: as an input of it, XLA would make it for all steps.
    start = jnp.array(0), init, M, starts, carried.nothing(own)
    state, _ = over_time.plain().loop(body, start, ((xs, first, valid), ys_bar), length)
    _, _, M, starts, sums = state
    sums, starts = pulled(sums, starts, M, last_bar)
    own_bar = jax.tree.structure(own).flatten_up_to(carried.finish(sums, own))
    params_bar: Any = jax.tree.unflatten(jax.tree.structure(as_list), own_bar)
    init_bar, reset_bar = _without(init), _without(reset)
    if starts:
        init_bar = fit(starts.init_bar, init, carried.kept, "init")
        reset_bar = None if reset is None else fit(starts.reset_bar, reset, carried.kept, "reset_carry")
    return (params_bar, reset_bar, _without(padding)) if flagged else params_bar, init_bar, no_xs_bar


def _without(tree: Any) -> Any:
    """No gradient of any leaf."""
    return jax.tree.map(lambda _: None, tree)
