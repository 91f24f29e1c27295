r"""The backward of one step: the `Adjoint` given, the `Cell`'s own, or else one derived from the step.

Derived by sorting its linearisation, and by `jax.vjp` where that can't be sorted.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax

from jaxbptt.array_types import under_auto_axes
from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.programs.linearized import linearized
from jaxbptt.programs.perturbed import (
    Perturbed,
    PerturbedAdjoint,
    every_leaf,
    fit,
    leading_by_trace,
    leading_to,
    spread,
)
from jaxbptt.programs.trace import TracedStep, map_over_time, trace
from jaxbptt.trees import combine, name, partition, select


class DifferentiableStep(NamedTuple):
    """A step and its backward.

    Attributes:
        step: `(params, carry, x) -> (carry, y)`.
        adjoint: `(perturbed)`, the adjoint for the leaves of (params, init, xs) that are flagged. Nothing is differentiated
            before it is called.
        one_at_a_time: whether the step must not be mapped over time: it branches (`lax.cond`), or writes to a mutable array.
        by_hand: whether the adjoint was given, and not derived.
        mutable: name of a mutable array that it reads or writes, or "".
        like_params: puts a gradient of the params that go with it into the structure of the user's.
        linear_backward: whether the backward is sure to be linear in the cotangents: one by hand, or a `jax.custom_vjp` in the
            step, may clip them.
    """

    step: Callable[..., Any]
    adjoint: Callable[[Perturbed], PerturbedAdjoint]
    one_at_a_time: bool
    by_hand: bool = False
    mutable: str = ""
    like_params: Callable[[Any], Any] = lambda params: params
    linear_backward: bool = False


def differentiable_step(
    user_step: Any, adjoint: Adjoint | None, step: Callable[..., Any], params: Any, init: Any, xs: Any
) -> tuple[DifferentiableStep, Any]:
    """Choose the backward of a step, and the params to call it with; `step` is `user_step`, checked."""
    if adjoint is None and isinstance(user_step, Cell):
        adjoint = user_step.adjoint
    if adjoint is None:
        traced = trace(step, params, init, xs)
        mutable = next((_name_of(ref, params) for ref in traced.refs.values()), "")
        # Without the params: JAX keeps a custom derivative, and would keep the arrays with it.
        derive = _derivation(traced._replace(params=None))
        linear = not any(name.startswith("custom_vjp_call") for name in traced.primitives)
        found = DifferentiableStep(
            traced.step, derive, traced.one_at_a_time, False, mutable, traced.like_params, linear_backward=linear
        )
        return found, traced.params
    if not isinstance(adjoint, Adjoint):
        raise TypeError(
            f"adjoint is {type(adjoint).__name__}, but it holds the backward of one step: pass "
            "jaxbptt.Adjoint(forward, backward, contract), a Cell as the step, or leave it out to have it derived."
        )
    carry = every_leaf(init)

    def for_leaves(perturbed):
        perturbed = perturbed._replace(carry=carry)
        return _on_any_mesh(PerturbedAdjoint(*adjoint, perturbed))

    return DifferentiableStep(step, for_leaves, one_at_a_time=False, by_hand=True), params


def _name_of(ref: Any, params: Any) -> str:
    named = {id(leaf): name("params", path) for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    return named.get(id(ref), "an array that the step closes over")


def _on_any_mesh(adjoint: PerturbedAdjoint) -> PerturbedAdjoint:
    """An adjoint by hand, whose contraction may sum over axes that are sharded over several devices."""
    flags = adjoint.perturbed

    def contract(params, residuals, xs, ys_bar, deltas):
        def bars(args):
            params_bar, xs_bar = adjoint.contract(*args)
            params_bar = fit(params_bar, args[0], flags.params, "params", cast=False)
            return params_bar, fit(xs_bar, args[2], flags.x, "xs", cast=False)

        likes = select(params, flags.params), select(xs, flags.x)
        return under_auto_axes(bars, (params, residuals, xs, ys_bar, deltas), likes)

    return adjoint._replace(contract=contract)


def _derivation(traced: TracedStep) -> Callable[[Perturbed], PerturbedAdjoint]:
    """The adjoint of a traced step for given leaves, derived once."""
    derived: dict[Any, PerturbedAdjoint] = {}
    # What a custom_vjp with symbolic zeros saves may depend on what is perturbed, as for a strategy inside the step, and JAX
    # remembers the structure that was traced last: so it is differentiated with respect to the same leaves throughout.
    together = "symbolic_zeros" in traced.primitives
    first = len(traced.shapes[0].leaves)

    def derive(perturbed):
        key = tuple(jax.tree.leaves(perturbed))
        if key not in derived:
            perturbed = spread(traced.step, perturbed, traced.shapes)
            adjoint = None if together else linearized(traced, perturbed)
            derived[key] = narrowing(adjoint or _by_vjp(traced, perturbed, together=together))
        return derived[key]

    def narrowing(adjoint):
        """The adjoint, which for fewer outputs keeps the leaves of the carry that lead to them."""

        def for_outputs(carry_used, ys_used):
            flags = adjoint.perturbed
            if together:
                leading = leading_by_trace(traced.jaxpr, first, flags.carry, carry_used, ys_used)
            else:
                leading = leading_to(traced.step, flags, traced.shapes, carry_used, ys_used)
            return narrowing(adjoint.for_outputs(leading, ys_used))

        return adjoint._replace(mutates="new_ref" in traced.primitives, for_outputs=for_outputs)

    return derive


def _by_vjp(traced: TracedStep, perturbed: Perturbed, *, together: bool) -> PerturbedAdjoint:
    """For a step that can't be sorted: backward and contract by `jax.vjp`, both of which recompute the step from its carry.

    With `together` both differentiate with respect to all that is perturbed, and take of it what they need.
    """
    steps = map_over_time(traced.step, one_at_a_time=traced.one_at_a_time)

    def forward(params, carry, x):
        return traced.step(params, carry, x), carry

    def for_outputs(carry_used, ys_used):
        flags = perturbed._replace(carry=carry_used)

        def pull(step, primals, of_primals, bars):
            diff, nondiff = partition(primals, flags=of_primals)

            def outputs(*diff):
                new_carry, y = step(*combine(diff, nondiff))
                return select(new_carry, carry_used), select(y, ys_used)

            _, vjp = jax.vjp(outputs, *diff)
            return vjp(bars)

        def backward(params, carry, x, carry_bar, y_bar):
            if together:
                _, previous_bar, _ = pull(traced.step, (params, carry, x), tuple(perturbed), (carry_bar, y_bar))
                return select(previous_bar, carry_used), carry_bar
            at_t = partial(traced.step, params, x=x)
            (previous_bar,) = pull(at_t, (carry,), (carry_used,), (carry_bar, y_bar))
            return previous_bar, carry_bar

        def contract(params, carries, xs, ys_bar, carry_bars):
            if together:
                params_bar, _, xs_bar = pull(steps, (params, carries, xs), tuple(perturbed), (carry_bars, ys_bar))
                return params_bar, xs_bar

            def over_time(params, xs):
                return steps(params, carries, xs)

            return pull(over_time, (params, xs), (flags.params, flags.x), (carry_bars, ys_bar))

        return PerturbedAdjoint(forward, backward, contract, flags, by_vjp=True, for_outputs=for_outputs)

    _, y = traced.out_tree.unflatten([var.aval for var in traced.jaxpr.outvars])
    return for_outputs(perturbed.carry, every_leaf(y))
