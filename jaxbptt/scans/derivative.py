r"""A recurrence with a derivative of its own, in both modes.

The tangents of its outputs are a `LinearMap` of those of params, init and xs. Reverse mode transposes it: that runs the
strategy's backward pass, which is told what the loss does not use. Forward mode computes it: that differentiates the plain
loop forward, which keeps nothing. Where a backward pass is not the transpose of that, as for a window or a clipped cotangent,
there is no forward mode.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from jaxbptt.along_time import Zeros, flipped
from jaxbptt.array_types import as_type, type_at_one_step, varying_alike, zeros
from jaxbptt.programs.perturbed import Perturbed
from jaxbptt.scans.linear_map import LinearMap
from jaxbptt.scans.passes import Pass
from jaxbptt.trees import (
    combine,
    differentiable,
    differentiated_as,
    is_array,
    is_differentiable,
    partition,
    same_keys,
    select,
)


def with_derivative(
    strategy: str,
    over_time: Pass,
    run: Callable[..., Any],
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    *,
    forward_mode: bool = True,
    in_sequence: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """`run` with a derivative, as a function of the `Recurrence` that `one_pass` returned.

    In reverse the ys are flipped back.

    Args:
        strategy: name of what the user called.
        over_time: the pass, not differentiated.
        run: `(params, init, xs) -> (carry, ys)`.
        forward: `(over_time, params, init, xs) -> ((carry, ys), saved)`, with the pass differentiated.
        backward: `(over_time, params, init, xs, saved, carry_bar, ys_bar) -> (params_bar, init_bar, xs_bar)`. `carry_bar`
            has the perturbed leaves. `ys_bar` has `None` for outputs without a derivative and, with a derived adjoint, for
            outputs that the loss does not use; an adjoint by hand gets `Zeros` for those, which stand for an array of zeros.
        forward_mode: whether `backward` is the transpose of the derivative of `run`.
        in_sequence: what forward mode differentiates in the place of `run`: the same function, as a plain loop.
    """

    def differentiated(r):
        carry, ys = of_arguments(r.params, r.init, r.xs)
        return carry, flipped(ys) if r.reverse else ys

    def of_arguments(params, init, xs):
        primals = varying_alike((params, init, xs)) if over_time.step.by_hand else (params, init, xs)
        # Flat lists: with symbolic zeros, JAX replaces leaves by its own objects, which the user's containers may refuse.
        primals, treedef = jax.tree.flatten(primals)

        @jax.custom_jvp
        def flat(*primals):
            return run(*treedef.unflatten(primals))

        def differentiated_forward(moving, primals):
            """The pass for these leaves, what it returns, and what it saves."""
            here = over_time.differentiated(Perturbed(*treedef.unflatten(moving)))
            run_forward = partial(forward, here)
            if not (here.adjoint.mutates or here.step.mutable):
                # Where all is known, JAX calls a function with a derivative of its own as it is. A plain loop it would sort
                # into what is known and what is not, and move out of it, with prints and all, what is the same at each step.
                run_forward = differentiated_as(partial(forward, here.plain()), run_forward)
            return here, *run_forward(*treedef.unflatten(primals))

        def flat_jvp(primals, tangents):
            # In a loop JAX calls integers perturbed as well.
            moving = [not isinstance(tangent, SymbolicZero) for tangent in tangents]
            moving = [flag and is_differentiable(primal) for flag, primal in zip(moving, primals, strict=True)]
            here, outputs, saved = differentiated_forward(moving, primals)
            leaves, out_tree = jax.tree.flatten(outputs)
            types = [jax.typeof(leaf).strip_weak_type().to_tangent_aval() for leaf in leaves]
            with_tangent = [is_differentiable(leaf) for leaf in leaves]
            known, static = partition((primals, saved), is_array)  # flags and sizes stay Python values
            known, known_tree = jax.tree.flatten(known)

            def push(known, tangents):
                if not forward_mode:
                    raise TypeError(
                        f"{strategy} has no forward-mode derivative (jvp, jacfwd, linearize), since its gradient is not that "
                        "of the outputs: use jaxbptt.scan, which has both. Forward over reverse, as in jax.hessian, works "
                        "through either."
                    )
                primals, _ = combine(known_tree.unflatten(known), static)

                def of_moving(*values):
                    outputs = (in_sequence or run)(*treedef.unflatten(_merged(values, primals, moving)))
                    return _chosen(jax.tree.leaves(outputs), with_tangent)

                return jax.jvp(of_moving, _chosen(primals, moving), tangents)[1]

            def pull(known, bars):
                primals, saved = same_keys(combine(known_tree.unflatten(known), static))
                bars = _merged(bars, [None] * len(types), with_tangent)
                bars = [SymbolicZero(t) if bar is None else bar for t, bar in zip(types, bars, strict=True)]
                found = _pulled(here, backward, treedef.unflatten(primals), saved, out_tree.unflatten(bars))
                return [None] * sum(moving) if found is None else _chosen(treedef.flatten_up_to(found), moving)

            linear_map = LinearMap(push, pull, tuple(_chosen(types, with_tangent)))
            found = linear_map(known, _chosen(tangents, moving)) if any(moving) else []
            found = _merged(found, map(SymbolicZero, types), with_tangent if found else [False] * len(types))
            return outputs, out_tree.unflatten(found)

        flat.defjvp(flat_jvp, symbolic_zeros=True)
        if not over_time.step.mutable:
            return flat(*primals)

        # JAX has no program for a mutable array inside of a `jax.custom_jvp`: so this one has no forward mode.
        @jax.custom_vjp
        def with_refs(*primals):
            return run(*treedef.unflatten(primals))

        def with_refs_forward(*primals):
            moving = tuple(primal.perturbed and is_differentiable(primal.value) for primal in primals)
            primals = [primal.value for primal in primals]
            _, outputs, saved = differentiated_forward(moving, primals)
            return outputs, _Saved(primals, saved, moving)

        def with_refs_backward(saved, bars):
            here = over_time.differentiated(Perturbed(*treedef.unflatten(saved.moving)))
            found = _pulled(here, backward, treedef.unflatten(saved.primals), saved.saved, bars)
            return (None,) * len(saved.moving) if found is None else tuple(treedef.flatten_up_to(found))

        with_refs.defvjp(with_refs_forward, with_refs_backward, symbolic_zeros=True)
        return with_refs(*primals)

    return differentiated


@partial(jax.tree_util.register_dataclass, data_fields=("primals", "saved"), meta_fields=("moving",))
@dataclass(frozen=True)
class _Saved:
    """What the forward pass leaves for the backward pass, and a flag for each primal, in order."""

    primals: list[Any]
    saved: Any
    moving: tuple[bool, ...]


def _chosen(values: Iterable[Any], flags: list[bool]) -> list[Any]:
    return [value for value, flag in zip(values, flags, strict=True) if flag]


def _merged(chosen: Iterable[Any], others: Iterable[Any], flags: list[bool]) -> list[Any]:
    """`others`, with what was chosen by flags put in."""
    chosen = iter(chosen)
    return [next(chosen) if flag else other for other, flag in zip(others, flags, strict=True)]


def _pulled(over_time: Pass, backward: Callable[..., Any], primals: Any, saved: Any, bars: Any) -> Any:
    """The gradients of (params, init, xs), or `None` if the loss uses nothing that a tangent reaches."""
    adjoint = over_time.adjoint
    if adjoint.for_outputs is not None:
        adjoint = adjoint.for_outputs(*jax.tree.map(_is_used, bars))
        bars = bars[0], select(bars[1], jax.tree.map(_is_used, bars[1]))
    carry_bar, ys_bar = bars[0], differentiable(bars[1])
    carry_bar = jax.tree.map(partial(_or_else, zeros), select(carry_bar, adjoint.perturbed.carry))
    ys_bar = jax.tree.map(partial(_or_else, _at_every_step), ys_bar)
    if not jax.tree.leaves((carry_bar, ys_bar)):
        return None
    return backward(replace(over_time, adjoint=adjoint), *primals, saved, carry_bar, ys_bar)


def _is_used(bar: Any) -> bool:
    return is_differentiable(bar) and not isinstance(bar, SymbolicZero)


def _or_else(make: Callable[[Any], Any], bar: Any) -> Any:
    """A gradient, or what is made of its type where the loss does not use the output."""
    return make(as_type(bar.aval)) if isinstance(bar, SymbolicZero) else bar


def _at_every_step(bars: Any) -> Zeros:
    return Zeros(type_at_one_step(bars))
