r"""What the strategies that are parallel in time share: a pass over time where no step waits for the one before it.

Once the carries are known, every step is computed from its own, all of them at once. Going back, the recursion
c̄ₜ₋₁ = Jₜᵀ c̄ₜ + (∂yₜ/∂cₜ₋₁)ᵀ ȳₜ is affine for any step whatever, so it is solved as an associative scan (`affine`), and the one
contraction over time follows as in every other strategy. Only a backward given by the user may be another function of c̄ₜ,
such as one that clips it: then the recursion runs in sequence. The associative scan is never differentiated: derivatives of either
pass go through the loop in sequence.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt.along_time import at_one_step, filled
from jaxbptt.array_types import as_type, assumed_size
from jaxbptt.programs.perturbed import fit
from jaxbptt.programs.structure import Group, groups_of
from jaxbptt.scans.affine import at_all_steps, solve
from jaxbptt.scans.derivative import with_derivative
from jaxbptt.scans.passes import Pass
from jaxbptt.trees import differentiated_as, select


class RealLeaves(NamedTuple):
    """The leaves of a tree of arrays, complex ones as two real ones.

    With conjugates a step is linear over the real numbers alone, and an associative scan of complex arrays takes long to
    compile.

    Attributes:
        treedef: the structure of the tree.
        is_complex: for each leaf.
    """

    treedef: Any
    is_complex: tuple[bool, ...]

    @classmethod
    def of(cls, tree: Any) -> "RealLeaves":
        """For trees like this one, of arrays or types."""
        leaves, treedef = jax.tree.flatten(tree)
        return cls(treedef, tuple(jnp.issubdtype(leaf.dtype, jnp.complexfloating) for leaf in leaves))

    def split(self, tree: Any) -> list[Any]:
        """The real leaves of a tree."""
        leaves = zip(self.treedef.flatten_up_to(tree), self.is_complex, strict=True)
        return [part for leaf, flag in leaves for part in ((leaf.real, leaf.imag) if flag else (leaf,))]

    def joined(self, parts: list[Any]) -> Any:
        """The tree of its real leaves."""
        part = iter(parts)
        return self.treedef.unflatten(
            [jax.lax.complex(next(part), next(part)) if flag else next(part) for flag in self.is_complex]
        )


class AllAtOnce(NamedTuple):
    """The carry of a recurrence before and after a step as real leaves, and the step on them.

    Attributes:
        leaves: of the carry.
        step: `(real leaves, (params, x)) -> real leaves` of the new carry.
    """

    leaves: RealLeaves
    step: Callable[..., Any]

    @classmethod
    def of(cls, over_time: Pass, init: Any) -> "AllAtOnce":
        """Of a pass, for carries like `init`."""
        leaves = RealLeaves.of(init)

        def step(parts, params_and_x):
            params, x = params_and_x
            return leaves.split(over_time.step.step(params, leaves.joined(parts), x)[0])

        return cls(leaves, step)

    def groups(self, params: Any, init: Any, xs: Any, *, look_for_clashes: bool = True) -> list[Group]:
        """The groups of the leaves."""
        carry = [as_type(jax.typeof(leaf)) for leaf in self.leaves.split(init)]
        return groups_of(self.step, carry, (params, at_one_step(xs)), look_for_clashes=look_for_clashes)


def strategy(
    strategy_name: str,
    over_time: Pass,
    carries_before: Callable[..., Any],
    length: int,
    chunk_length: int | None = None,
) -> Callable[..., Any]:
    """A recurrence with its own derivative (`with_derivative`), from the carries before each step.

    Args:
        strategy_name: what the user called.
        over_time: the pass.
        carries_before: `(params, init, xs)`, the carries before each step, stacked; it is never differentiated.
        length: T.
        chunk_length: time steps whose Jacobians exist at a time in the backward pass; `None` for `default_chunk`.
    """

    def in_sequence(params, init, xs):
        return over_time.run(params, init, xs, length)

    def forward(over_time, params, init, xs):
        return _forward(over_time, carries_before, params, init, xs, length)

    def backward(over_time, params, init, xs, residuals, carry_bar, ys_bar):
        return back(over_time, params, init, xs, residuals, carry_bar, ys_bar, length, chunk_length)

    def run(params, init, xs):
        before = carries_before(params, init, xs)
        at_t = at_all_steps(partial(over_time.step.step, params), length, one_at_a_time=over_time.step.one_at_a_time)
        new, ys = at_t(before, xs)
        return jax.tree.map(lambda leaf: leaf[-1], new), ys

    return with_derivative(
        strategy_name, over_time, run if length else in_sequence, forward, backward, in_sequence=in_sequence
    )


def _forward(
    over_time: Pass, carries_before: Callable[..., Any], params: Any, init: Any, xs: Any, length: int
) -> tuple[tuple[Any, Any], Any]:
    """Values and the residuals of all steps, stacked: ((c_T, ys), residuals)."""

    def at_once(params, init, xs):
        at_t = partial(over_time.adjoint.forward, params)
        everywhere = at_all_steps(at_t, length, one_at_a_time=over_time.step.one_at_a_time)
        (new, ys), residuals = everywhere(carries_before(params, init, xs), xs)
        return (jax.tree.map(lambda leaf: leaf[-1], new), ys), residuals

    def in_sequence(params, init, xs):
        outputs, residuals = over_time.forward(params, init, xs, length)
        return outputs, residuals.stacked()

    return _differentiated_in_sequence(over_time, in_sequence, at_once if length else in_sequence)(params, init, xs)


def _differentiated_in_sequence(
    over_time: Pass, in_sequence: Callable[..., Any], at_once: Callable[..., Any]
) -> Callable[..., Any]:
    """`at_once` with the derivative of the loop in sequence, but for a step that makes mutable arrays (`Pass.back`)."""
    return at_once if over_time.adjoint.mutates else differentiated_as(in_sequence, at_once)


def back(
    over_time: Pass,
    params: Any,
    init: Any,
    xs: Any,
    residuals: Any,
    carry_bar: Any,
    ys_bar: Any,
    length: int,
    chunk_length: int | None = None,
) -> tuple[Any, Any, Any]:
    """The gradients of (params, init, xs), from the residuals of all steps, stacked.

    With `chunk_length` the Jacobians of so many steps exist at a time.
    """
    adjoint, flags = over_time.adjoint, over_time.adjoint.perturbed
    if length == 0:
        params_bar, xs_bar = jax.tree.map(jnp.zeros_like, select((params, xs), (flags.params, flags.x)))
        return params_bar, carry_bar, xs_bar
    over_time = over_time.prepared(params, init, xs, (carry_bar, ys_bar), {length})

    # Functions with a derivative of their own must not hold tracers.
    like_init = jax.tree.map(lambda leaf: as_type(jax.typeof(leaf)), init)

    def one_step_back(params, residuals, x, carry_bar, y_bar):
        before, deltas = adjoint.backward(params, residuals, x, carry_bar, filled(y_bar))
        return fit(before, like_init, flags.carry, "init"), deltas

    def recursion(params, carry_bar, residuals, xs, ys_bar):
        """c̄ₜ for all t."""
        leaves = RealLeaves.of(carry_bar)

        def on_leaves(parts, at_t, params=params):
            residuals, x, y_bar = at_t
            return leaves.split(one_step_back(params, residuals, x, leaves.joined(parts), y_bar)[0])

        look = not over_time.step.linear_backward
        groups = bar_groups(on_leaves, leaves.split(carry_bar), params, (residuals, xs, ys_bar), look_for_clashes=look)
        if any(group.clashes for group in groups):
            return in_sequence(params, carry_bar, residuals, xs, ys_bar)
        after, _ = solve(
            on_leaves,
            groups,
            leaves.split(carry_bar),
            (residuals, xs, ys_bar),
            length,
            chunk_length=chunk_length or default_chunk(groups, leaves.split(carry_bar), residuals),
            one_at_a_time=over_time.step.one_at_a_time,
            reverse=True,
        )
        return leaves.joined(after)

    def in_sequence(params, carry_bar, residuals, xs, ys_bar):
        def body(carry_bar, at_t):
            residuals, x, y_bar = at_t
            return one_step_back(params, residuals, x, carry_bar, y_bar)[0], carry_bar

        return jax.lax.scan(body, carry_bar, (residuals, xs, ys_bar), length=length, reverse=True)[1]

    carry_bars = _differentiated_in_sequence(over_time, in_sequence, recursion)(
        params, carry_bar, residuals, xs, ys_bar
    )

    back_at_t = partial(one_step_back, params)
    everywhere = at_all_steps(back_at_t, length, one_at_a_time=over_time.step.one_at_a_time)
    before, deltas = everywhere(residuals, xs, carry_bars, ys_bar)
    sums, xs_bar = over_time.weights.add(params, over_time.weights.zeros(), residuals, xs, ys_bar, deltas, length)
    return over_time.weights.finish(sums), jax.tree.map(lambda leaf: leaf[0], before), xs_bar


def bar_groups(
    on_leaves: Callable[..., Any], bars: list[Any], params: Any, stacked: Any, *, look_for_clashes: bool = False
) -> list[Group]:
    """The groups of the backward recursion, which is linear in the cotangents unless an adjoint by hand clips them, say."""
    types = [as_type(jax.typeof(leaf)) for leaf in bars]
    return groups_of(
        lambda parts, params, at_t: on_leaves(parts, at_t, params),
        types,
        params,
        at_one_step(stacked),
        look_for_clashes=look_for_clashes,
    )


def default_chunk(groups: list[Group], leaves: list[Any], residuals: Any) -> int:
    """Time steps whose Jacobians take at most four times the bytes of the residuals of all steps; 16 at least."""
    of_jacobians = max((coefficients(group, leaves) for group in groups), default=0)
    of_residuals = sum(map(_numbers, jax.tree.leaves(residuals)))
    return max(4 * of_residuals // max(of_jacobians, 1), 16)


def coefficients(group: Group, leaves: list[Any]) -> int:
    """The numbers of Aₜ of a group at one time step."""
    mine = [leaves[i] for i in group.leaves]
    if group.elementwise:
        return len(mine) ** 2 * _numbers(mine[0])
    rows = math.prod(map(assumed_size, mine[0].shape[: group.batch]))
    return rows * sum(_numbers(leaf, group.batch) for leaf in mine) ** 2


def _numbers(leaf: Any, first: int = 0) -> int:
    """In the axes from `first` on."""
    return math.prod(map(assumed_size, leaf.shape[first:]))
