r"""Recurrences that are affine in the carry, in log T rounds: values and gradient as associative scans."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxbptt.along_time import at_one_step
from jaxbptt.arrays import check_count
from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.programs.structure import Group, has_forward_mode
from jaxbptt.scans import all_at_once
from jaxbptt.scans.affine import solve
from jaxbptt.scans.flags import NO_FLAGS, Flags
from jaxbptt.scans.passes import one_pass
from jaxbptt.scans.recurrence import Recurrence, check_known_length, prepare
from jaxbptt.trees import is_differentiable, name


def parallel_scan(
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
    chunk_length: int | None = None,
) -> tuple[Any, Any]:
    r"""`scan` of a step that is affine in the carry, parallel in time.

    cₜ = Aₜ cₜ₋₁ + bₜ as an associative scan of (A′, b′) ∘ (A, b) = (A′A, A′b + b′), and yₜ from cₜ₋₁ for all t at once;
    c̄ₜ₋₁ = Aₜᵀ c̄ₜ + (∂yₜ/∂cₜ₋₁)ᵀ ȳₜ likewise, in reverse

    Exact: values and gradients are those of `scan`. Depth 2 log₂ T instead of T; work O(T n) where Aₜ is diagonal, O(T n³)
    where it is dense; memory of as many numbers as all Aₜ have, or those of `chunk_length` steps.

    What Aₜ is, is read off the traced step: a leaf whose entries each depend on the entry at the same place alone is
    diagonal, several that depend on each other so are blocks, and the rest is dense but for its batch axes. Leaves are solved one
    after the other as far as they depend on each other, so Aₜ of one layer may depend on the states of the layers below it: a
    `stack` of `lru`, `min_gru`, `min_lstm` and `rg_lru` is a chain of such recurrences. What is no number, a counter or
    a random key, runs in sequence. Flags need no more: at a reset Aₜ is 0, at padding it is 1.

    It pays on accelerators, where a loop over time waits at each step. On a CPU the loop is faster (`adjoint_scan`).
    Derivatives of second order and forward mode run the loop over time. A step that branches (`lax.cond`) is linearised one
    step at a time.

    Args:
        step: as `scan`, like params, init, xs, length, is_first, valid, reset_carry and reverse.
        adjoint: the backward of one step. By default the `Cell`'s own, or else derived from `step`.
        chunk_length: time steps whose coefficients exist at a time: the chunks run in sequence, each in parallel. `None` for
            all at once in the forward pass, and for the backward pass as `parallel_adjoint_scan`.

    Returns:
        The last carry, and the yₜ stacked on a leading time axis.

    Raises:
        ValueError: a step that is not affine in the carry: the message says which leaf's coefficient depends on which;
            and as `adjoint_scan`.
        TypeError: a step that writes to a mutable array; and as `adjoint_scan`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> decay = lambda a, h, x: (a * h + x, h)
        >>> h_T, hs = bptt.parallel_scan(decay, 0.5, jnp.ones(()), jnp.ones(1000))
        >>> print(h_T, jax.grad(lambda a: bptt.parallel_scan(decay, a, 1.0, jnp.zeros(3))[0])(0.5))  # a³, 3 a²
        2.0 0.75

    References:
        Blelloch, Prefix sums and their applications, 1990, CMU-CS-90-190. Martin and Cundy, Parallelizing linear
        recurrent neural nets over sequence length, 2018, arXiv:1709.04057.
    """
    r = prepare(step, params, init, xs, length, is_first, valid, reverse=reverse)
    check_known_length("parallel_scan", r.length)
    if chunk_length is not None:
        check_count("chunk_length", chunk_length, "it counts time steps")
    over_time, r = one_pass(step, adjoint, r, Flags(is_first, valid, reset_carry), 1)
    over_time.check_recomputable("parallel_scan")
    length = r.length
    on_leaves = all_at_once.AllAtOnce.of(over_time, r.init)
    groups = _affine_groups(on_leaves, r.params, r.init, r.xs)

    def before(params, init, xs):
        found, _ = solve(
            lambda parts, x: on_leaves.step(parts, (params, x)),
            groups,
            on_leaves.leaves.split(init),
            xs,
            length,
            chunk_length=chunk_length,
            one_at_a_time=over_time.step.one_at_a_time,
        )
        return on_leaves.leaves.joined(found)

    return all_at_once.strategy("parallel_scan", over_time, before, length, chunk_length)(r)


class Coefficients(NamedTuple):
    """What is known of Aₜ before anything is computed.

    Attributes:
        affine: whether the step is affine in the carry.
        numbers: of Aₜ at one time step.
        forward_mode: whether Aₜ can be computed, so that `parallel_scan` or `newton_scan` can be called.
    """

    affine: bool
    numbers: int
    forward_mode: bool


def coefficients_of(step: Callable[..., Any] | Cell, r: Recurrence) -> Coefficients:
    """The `Coefficients` of a recurrence."""
    over_time, r = one_pass(step, None, r, NO_FLAGS, 1)
    on_leaves = all_at_once.AllAtOnce.of(over_time, r.init)
    groups = _groups(on_leaves, r.params, r.init, r.xs)
    leaves = on_leaves.leaves.split(r.init)
    return Coefficients(
        affine=not any(group.clashes for group in groups),
        numbers=sum(all_at_once.coefficients(group, leaves) for group in groups),
        forward_mode=has_forward_mode(on_leaves.step, leaves, (r.params, at_one_step(r.xs))),
    )


def _groups(on_leaves: all_at_once.AllAtOnce, params: Any, init: Any, xs: Any) -> list[Group]:
    """The groups of the carry's real leaves, and in each the pairs that keep it from being affine."""
    leaves = on_leaves.leaves.split(init)
    # What is no number runs in sequence, whatever it depends on.
    return [
        group if any(is_differentiable(leaves[i]) for i in group.leaves) else group._replace(clashes=())
        for group in on_leaves.groups(params, init, xs)
    ]


def _affine_groups(on_leaves: all_at_once.AllAtOnce, params: Any, init: Any, xs: Any) -> list[Group]:
    """The groups; raises for a step that is not affine in one of them."""
    groups = _groups(on_leaves, params, init, xs)
    paths = [name("carry", path) for path, _ in jax.tree_util.tree_leaves_with_path(init)]
    named = [
        path for path, flag in zip(paths, on_leaves.leaves.is_complex, strict=True) for path in [path] * (1 + flag)
    ]
    for group in groups:
        if group.clashes:
            i, k = group.clashes[0]
            raise ValueError(
                f"parallel_scan needs a step that is affine in the carry, cₜ = Aₜ cₜ₋₁ + bₜ, but the coefficient of {named[i]} "
                f"depends on {named[k]}: use newton_scan, which solves any recurrence in parallel by Newton's method, or "
                "parallel_adjoint_scan, which runs in sequence and is parallel in its backward pass alone."
            )
    return groups
