r"""The backward pass over a stretch of time, as every strategy with a derivative of its own runs it.

Forward, keeping what the backward of each step will need; then the recursion d̄ₜ ↦ d̄ₜ₋₁ alone in a loop; then one
contraction over the stretch. `adjoint_scan` takes the whole sequence as one stretch, the others cut it into several.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.export import is_symbolic_dim

from jaxbptt.along_time import at, at_one_step, filled, room, window
from jaxbptt.array_types import assumed_size
from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.programs.linearized import linearized
from jaxbptt.programs.parts import arrays_of, in_loop
from jaxbptt.programs.perturbed import Perturbed, PerturbedAdjoint, every_leaf, leading_by_trace, leading_to, spread
from jaxbptt.programs.trace import TracedStep, map_over_time, trace
from jaxbptt.scans.contraction import fit, weight_gradient
from jaxbptt.scans.devices import on_any_mesh
from jaxbptt.scans.recurrence import Recurrence, length_for_scan
from jaxbptt.scans.residuals import Residuals, places
from jaxbptt.scans.schedule import divisor_near
from jaxbptt.trees import combine, differentiable, name, partition, select


class StepWithAdjoint(NamedTuple):
    """A step and its backward.

    Attributes:
        step: `(params, carry, x) -> (carry, y)`.
        params: to call both with.
        adjoint: `(perturbed)`, the `Adjoint` given, or the `Cell`'s own, or else one derived from the step, for the leaves
            of (params, init, xs) that are flagged. Nothing is differentiated before it is called.
        in_turn: whether the step must not be mapped over time: it branches (`lax.cond`), or writes to a mutable array.
        by_hand: whether the adjoint was given, and not derived.
        mutable: name of a mutable array that it reads or writes, or "".
        like_params: puts a gradient of `params` into the structure of the user's.
    """

    step: Callable[..., Any]
    params: Any
    adjoint: Callable[[Perturbed], PerturbedAdjoint]
    in_turn: bool
    by_hand: bool = False
    mutable: str = ""
    like_params: Callable[[Any], Any] = lambda params: params


def step_with_adjoint(step: Callable[..., Any] | Cell, adjoint: Adjoint | None, r: Recurrence) -> StepWithAdjoint:
    """Settle which backward a step gets; `r` is the same step, prepared."""
    if adjoint is None and isinstance(step, Cell):
        adjoint = step.adjoint
    if adjoint is None:
        traced = trace(r)
        derive = _derivation(traced._replace(params=None))  # JAX keeps it, and would keep the arrays with it
        mutable = next((_name_of(ref, r.params) for ref in traced.refs.values()), "")
        return StepWithAdjoint(traced.step, traced.params, derive, traced.in_turn, False, mutable, traced.like_params)
    if not isinstance(adjoint, Adjoint):
        raise TypeError(
            f"adjoint is {type(adjoint).__name__}, but it holds the backward of one step: pass "
            "jaxbptt.Adjoint(forward, backward, contract), a Cell as the step, or leave it out to have it derived."
        )
    carry = every_leaf(r.init)

    def for_leaves(perturbed):
        perturbed = perturbed._replace(carry=carry)
        return on_any_mesh(PerturbedAdjoint(*adjoint, perturbed))

    return StepWithAdjoint(r.step, r.params, for_leaves, in_turn=False, by_hand=True)


def _name_of(ref: Any, params: Any) -> str:
    named = {id(leaf): name("params", path) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return named.get(id(ref), "an array that the step closes over")


def check_recomputed(strategy: str, mutable: str) -> None:
    """Raise where a strategy that computes steps again in its backward pass would write to a mutable array once more."""
    if mutable:
        raise TypeError(
            f"{mutable} is mutable (a Ref), and {strategy} computes each step again in its backward pass, so that it would be "
            "written to twice: take the gradient with adjoint_scan or jaxbptt.scan, which run each step once."
        )


def unroll_forward(
    adjoint: PerturbedAdjoint, params: Any, init: Any, xs: Any, *, length: int, unroll: int | bool
) -> tuple[tuple[Any, Any], Residuals]:
    """`lax.scan` that keeps residuals: ((c_T, ys), residuals)."""
    forward = in_loop(adjoint.forward, params, init, at_one_step(xs))
    (new_carry, y), residuals = forward.program.out_tree.unflatten(forward.program.results)
    carry = forward.program.inputs[len(arrays_of(params)) :][: len(jax.tree.leaves(init))]
    kept, read, where = places(*map(jax.tree.leaves, (residuals, y, carry, new_carry)))

    def body(carry, x):
        (carry, y), residuals = forward(carry, x)
        leaves = jax.tree.leaves(residuals)
        return carry, (y, [leaves[i] for i in kept])

    carry, (ys, stacked) = jax.lax.scan(body, init, xs, length=length_for_scan(length), unroll=unroll)
    outputs, first = jax.tree.leaves(ys), jax.tree.leaves(init)
    shared = [outputs[i] for i in read[0]], [first[i] for i in read[1]]
    return (carry, ys), Residuals(stacked, *shared, where, jax.tree.structure(residuals))


def unroll_backward(
    adjoint: PerturbedAdjoint,
    params: Any,
    init: Any,
    residuals: Residuals,
    xs: Any,
    carry_bar: Any,
    ys_bar: Any,
    *,
    length: int,
    unroll: int | bool,
) -> tuple[Any, Any, Any]:
    """Gradients of params, init and xs, from those of c_T and ys, which may have `Zeros` for leaves."""
    total = weight_gradient(adjoint, params, init, xs, carry_bar, ys_bar, stretches(init, length))
    sums, carry_bar, xs_bar = _back(
        adjoint,
        total.add,
        params,
        total.zeros,
        residuals,
        xs,
        carry_bar,
        ys_bar,
        length=length,
        segment=segment_length(init, length),
        unroll=unroll,
    )
    return total.finish(sums), fit(carry_bar, init, adjoint.perturbed.carry, "init"), xs_bar


def back_over(
    adjoint: PerturbedAdjoint,
    add: Callable[..., tuple[Any, Any]],
    params: Any,
    sums: Any,
    carry: Any,
    xs: Any,
    carry_bar: Any,
    ys_bar: Any,
    *,
    start: Any,
    length: int,
    unroll: int | bool,
) -> tuple[Any, tuple[Any, Any, Any]]:
    """Forward over `length` steps of xs from the `carry` before step `start`, and back.

    `add` is that of `weight_gradient`. Returns the carry after them, and (`sums` with these steps added, gradient of the
    first carry, gradient of xs).
    """
    inputs = window(xs, start, length)
    (after, _), residuals = unroll_forward(adjoint, params, carry, inputs, length=length, unroll=unroll)
    sums, carry_bar, xs_bar = _back(
        adjoint,
        add,
        params,
        sums,
        residuals,
        inputs,
        carry_bar,
        window(ys_bar, start, length),
        length=length,
        segment=segment_length(carry, length),
        unroll=unroll,
    )
    return after, (sums, fit(carry_bar, carry, adjoint.perturbed.carry, "init"), xs_bar)


def _back(
    adjoint: PerturbedAdjoint,
    add: Callable[..., tuple[Any, Any]],
    params: Any,
    sums: Any,
    residuals: Residuals,
    xs: Any,
    carry_bar: Any,
    ys_bar: Any,
    *,
    length: int,
    segment: int,
    unroll: int | bool,
) -> tuple[Any, Any, Any]:
    """The recursion over a stretch of time: `sums` with it added, and the gradients of its first carry and of xs."""

    def loop(params, residuals, xs, carry_bar, ys_bar):
        """The recursion over one step, and how to put the deltas together from the distinct ones, which it returns."""

        def step_back(params, residuals, x, carry_bar, y_bar):
            return adjoint.backward(params, residuals, x, carry_bar, filled(y_bar))

        examples = at_one_step((jax.eval_shape(residuals.stacked), xs, ys_bar))
        backward = in_loop(step_back, params, *examples[:2], carry_bar, examples[2])
        _, deltas = backward.program.out_tree.unflatten(backward.program.results)
        names, treedef = jax.tree.flatten(deltas)
        names = list(map(id, names))
        distinct = [i for i, var in enumerate(names) if var not in names[:i]]
        place = [[names[i] for i in distinct].index(var) for var in names]

        def body(carry_bar, inputs):
            residuals, x, y_bar = inputs
            carry_bar, deltas = backward(residuals, x, carry_bar, y_bar)
            leaves = jax.tree.leaves(deltas)
            return carry_bar, [leaves[i] for i in distinct]

        return body, lambda leaves: treedef.unflatten([leaves[i] for i in place])

    def at_once(params, sums, residuals, xs, carry_bar, ys_bar):
        body, restore = loop(params, residuals, xs, carry_bar, ys_bar)
        residuals = residuals.stacked()
        carry_bar, deltas = jax.lax.scan(
            body, carry_bar, (residuals, xs, ys_bar), length=length_for_scan(length), reverse=True, unroll=unroll
        )
        sums, xs_bar = add(params, sums, residuals, xs, ys_bar, restore(deltas), length=length)
        return sums, carry_bar, xs_bar

    def in_segments(params, sums, residuals, xs, carry_bar, ys_bar):
        body, restore = loop(params, residuals, xs, carry_bar, ys_bar)

        def back(sums, carry_bar, start, length):
            def at_t(state, _):
                t, carry_bar = state
                carry_bar, deltas = body(carry_bar, (residuals.at(t), at(xs, t), at(ys_bar, t)))
                return (t - 1, carry_bar), deltas

            state = start + length - 1, carry_bar
            (_, carry_bar), deltas = jax.lax.scan(at_t, state, None, length=length, reverse=True, unroll=unroll)
            some, some_bar = window((xs, ys_bar), start, length)
            stretch = residuals.window(start, length), some, some_bar, restore(deltas)
            sums, xs_bar = add(params, sums, *stretch, length=length)
            return sums, carry_bar, xs_bar

        def one_more(state, _):
            start, sums, carry_bar = state
            sums, carry_bar, xs_bar = back(sums, carry_bar, start, segment)
            return (start - segment, sums, carry_bar), xs_bar

        segments, left_over = divmod(length, segment)
        start, ends = jnp.array(segments * segment, jnp.int32), []
        if left_over:
            sums, carry_bar, some = back(sums, carry_bar, start, left_over)
            ends = [some]
        state = start - segment, sums, carry_bar
        (_, sums, carry_bar), xs_bar = jax.lax.scan(one_more, state, None, length=segments, reverse=True)
        xs_bar = jax.tree.map(lambda leaf: leaf.reshape(segments * segment, *leaf.shape[2:]), xs_bar)
        xs_bar = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), xs_bar, *ends) if ends else xs_bar
        return sums, carry_bar, xs_bar

    # Derivatives of reads at computed positions would be written to as many arrays: those of the plain loop are not.
    run = at_once if segment >= length or adjoint.mutates else differentiated_as(at_once, in_segments)
    return run(params, sums, residuals, xs, carry_bar, ys_bar)


def stretches(carry: Any, *lengths: int) -> set[int]:
    """The lengths, in time steps, that weight gradients are added up over on the way back over these lengths."""
    found = set()
    for length in lengths:
        segment = segment_length(carry, length)
        found |= {segment, length % segment} if segment < length else {length}
    return found - {0} or {1}


def segment_length(carry: Any, length: Any) -> Any:
    """Time steps after which the weight gradient is added to, so that what a product reads is still in the cache.

    On CPU about as many as have 1,024 rows, but at least 8, half of the steps at most, and rather a divisor of them.
    Measured against one product for all time steps, with 32 and 64 rows a step: 0.71 to 0.97 of the time for gru and
    lstm, 0.81 to 1.2 for elman, and 0.67 of the bytes; 512 and 2,048 rows take up to 1.1 and 1.2 times as long. Not
    measured on other backends, where few large products are the rule: all steps. So it is for a symbolic number of them.
    """
    if is_symbolic_dim(length):
        return length
    if jax.default_backend() != "cpu":
        return max(length, 1)
    leaves = jax.tree.leaves(differentiable(carry))
    rows = max((math.prod(map(assumed_size, leaf.shape[:-1])) for leaf in leaves), default=1)
    return divisor_near(length, max(min(1024 / max(rows, 1), length / 2), 8), within=4) if length else 1


def differentiated_as(plain: Callable[..., Any], fast: Callable[..., Any]) -> Callable[..., Any]:
    """`fast`, with the derivative of `plain`, which is the same function."""

    def run(*args):
        leaves, treedef = jax.tree.flatten(args)

        @jax.custom_jvp
        def both(*leaves):
            return fast(*treedef.unflatten(leaves))

        def jvp(primals, tangents):
            perturbed = [not isinstance(tangent, SymbolicZero) for tangent in tangents]
            diff, nondiff = partition(list(primals), flags=perturbed)

            def of_diff(diff):
                return plain(*treedef.unflatten(combine(diff, nondiff)))

            return jax.jvp(of_diff, (diff,), (select(list(tangents), perturbed),))

        both.defjvp(jvp, symbolic_zeros=True)
        return both(*leaves)

    return run


def back_one_lag(
    adjoint: PerturbedAdjoint, params: Any, residuals: Any, xs: Any, bars: Any, ys_bar: Any, *, in_turn: bool
) -> tuple[Any, Any, Any]:
    """All time steps one step back at once: the gradients of the carries after each step, moved to those before it.

    Returns them as gradients of the carries after each step again, so one place earlier, that of init, and the deltas.
    """
    before, deltas = map_over_time(adjoint.backward, in_turn=in_turn)(params, residuals, xs, bars, ys_bar)
    after = jax.tree.map(lambda leaf: jnp.concatenate([leaf[1:], jnp.zeros_like(leaf[:1])]), before)
    return after, jax.tree.map(lambda leaf: leaf[0], before), deltas


def at_last_step(bar: Any, length: int) -> Any:
    """The gradient of the last carry as one of the carries after every step."""
    before = room(bar, length - 1)
    return jax.tree.map(lambda zeros, leaf: jnp.concatenate([zeros, leaf[None]]), before, bar)


def _derivation(traced: TracedStep) -> Callable[[Perturbed], PerturbedAdjoint]:
    """The adjoint of a traced step for given leaves, derived once."""
    assumed_size: dict[Any, PerturbedAdjoint] = {}
    # What a custom_vjp with symbolic zeros keeps may differ by what is perturbed, as it does of a strategy inside the step, and
    # JAX remembers the structure that was traced last: so it is differentiated with respect to the same leaves throughout.
    together = "symbolic_zeros" in traced.primitives
    first = len(traced.shapes[0].leaves)

    def derive(perturbed):
        key = tuple(jax.tree.leaves(perturbed))
        if key not in assumed_size:
            perturbed = spread(traced.step, perturbed, traced.shapes)
            adjoint = None if together else linearized(traced, perturbed)
            assumed_size[key] = found(adjoint or _pulled(traced, perturbed, together=together))
        return assumed_size[key]

    def found(adjoint):
        def for_outputs(carry_used, ys_used):
            flags = adjoint.perturbed
            if together:
                leading = leading_by_trace(traced.jaxpr, first, flags.carry, carry_used, ys_used)
            else:
                leading = leading_to(traced.step, flags, traced.shapes, carry_used, ys_used)
            return found(adjoint.for_outputs(leading, ys_used))

        return adjoint._replace(mutates="new_ref" in traced.primitives, for_outputs=for_outputs)

    return derive


def _pulled(traced: TracedStep, perturbed: Perturbed, *, together: bool = False) -> PerturbedAdjoint:
    """For a step that can't be linearised: the three parts by `jax.vjp`, which compute it again, from the carries.

    With `together` each part differentiates with respect to all that is perturbed, and takes of it what it needs.
    """

    def forward(params, carry, x):
        return traced.step(params, carry, x), carry

    def for_outputs(carry_used, ys_used):
        flags, diff_flags = perturbed._replace(carry=carry_used), tuple(perturbed)

        def pull(step, primals, of_primals, bars):
            diff, nondiff = partition(primals, flags=of_primals)

            def outputs(*diff):
                new_carry, y = step(*combine(diff, nondiff))
                return select(new_carry, carry_used), select(y, ys_used)

            _, vjp = jax.vjp(outputs, *diff)
            return vjp(bars)

        def backward(params, carry, x, carry_bar, y_bar):
            at_t = partial(traced.step, params, x=x)
            if together:
                _, previous_bar, _ = pull(traced.step, (params, carry, x), diff_flags, (carry_bar, y_bar))
                previous_bar = select(previous_bar, carry_used)
            else:
                (previous_bar,) = pull(at_t, (carry,), (carry_used,), (carry_bar, y_bar))
            return previous_bar, carry_bar

        def contract(params, carries, xs, ys_bar, carry_bars):
            def over_time(params, xs):
                return map_over_time(traced.step, in_turn=traced.in_turn)(params, carries, xs)

            if together:
                steps = map_over_time(traced.step, in_turn=traced.in_turn)
                params_bar, _, xs_bar = pull(steps, (params, carries, xs), diff_flags, (carry_bars, ys_bar))
                return params_bar, xs_bar
            return pull(over_time, (params, xs), (flags.params, flags.x), (carry_bars, ys_bar))

        return PerturbedAdjoint(forward, backward, contract, flags, pulled=True, for_outputs=for_outputs)

    _, y = traced.out_tree.unflatten([var.aval for var in traced.jaxpr.outvars])
    return for_outputs(perturbed.carry, every_leaf(y))


def without(residuals: Any, outputs: Any) -> tuple[list[Any], Callable[..., Any]]:
    """The residuals that are not outputs as well, and how to put them all together: what is returned is kept once."""
    leaves, treedef = jax.tree.flatten(residuals)
    ids = [id(leaf) for leaf in jax.tree.leaves(outputs)]
    places = [ids.index(id(leaf)) if id(leaf) in ids else None for leaf in leaves]

    def restore(kept: list[Any], outputs: Any) -> Any:
        rest, returned = iter(kept), jax.tree.leaves(outputs)
        return treedef.unflatten([next(rest) if place is None else returned[place] for place in places])

    return [leaf for leaf, place in zip(leaves, places, strict=True) if place is None], restore
