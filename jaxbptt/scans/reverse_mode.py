r"""A recurrence with a reverse-mode derivative of its own, which is told what the loss does not use.

It has no forward mode, and JAX's message for `jax.jvp` of a custom derivative names neither the function nor what to do. The
error comes while the tangents are mapped (`jacfwd`), or when a program that holds them is compiled. The first is caught
here and reworded. For the second, inputs pass through an identity whose tangents go through a primitive that can be
transposed, which is all that reverse mode does, but not computed. One case keeps JAX's message: `jacfwd` of a function
that was jitted before, whose tangents are mapped after this code has run.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxbptt.along_time import Zeros
from jaxbptt.array_types import as_type, type_at_one_step, varying_alike, zeros
from jaxbptt.programs.perturbed import Perturbed
from jaxbptt.scans.passes import Pass
from jaxbptt.trees import differentiable, is_differentiable, same_keys, select


@partial(jax.tree_util.register_dataclass, data_fields=("primals", "saved"), meta_fields=("perturbed",))
@dataclass(frozen=True)
class _ForBackward:
    """What the forward pass leaves for the backward pass, and a flag for each primal, in order."""

    primals: Any
    saved: Any
    perturbed: tuple[bool, ...]


def reverse_mode(
    strategy: str, over_time: Pass, run: Callable[..., Any], forward: Callable[..., Any], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """`run` with a derivative, as `jax.custom_vjp` makes it, and a `TypeError` that names `scan` for forward mode.

    Args:
        strategy: name of what the user called.
        over_time: the pass, not differentiated.
        run: `(params, init, xs) -> (carry, ys)`.
        forward: `(over_time, params, init, xs) -> ((carry, ys), saved)`, with the pass differentiated.
        backward: `(over_time, params, init, xs, saved, carry_bar, ys_bar) -> (params_bar, init_bar, xs_bar)`. `carry_bar`
            has the perturbed leaves. `ys_bar` has `None` for outputs without a derivative and, with a derived adjoint, for
            outputs that the loss does not use; an adjoint by hand gets `Zeros` for those, which stand for an array of zeros.
    """

    def with_derivative(params, init, xs):
        # A flat list: with symbolic zeros, JAX replaces leaves by its own objects, which the user's containers may refuse.
        primals = varying_alike((params, init, xs)) if over_time.step.by_hand else (params, init, xs)
        primals, treedef = jax.tree.flatten(primals)

        @jax.custom_vjp
        def flat(*primals):
            return run(*treedef.unflatten(primals))

        def flat_forward(*primals):
            # In a loop JAX calls integers perturbed as well.
            perturbed = tuple(primal.perturbed and is_differentiable(primal.value) for primal in primals)
            primals = treedef.unflatten([primal.value for primal in primals])
            differentiated = over_time.differentiated(Perturbed(*treedef.unflatten(perturbed)))
            outputs, saved = forward(differentiated, *primals)
            return outputs, _ForBackward(primals, saved, perturbed)

        def flat_backward(for_backward, bars):
            differentiated = over_time.differentiated(Perturbed(*treedef.unflatten(for_backward.perturbed)))
            adjoint = differentiated.adjoint
            if adjoint.for_outputs is not None:
                adjoint = adjoint.for_outputs(*jax.tree.map(_is_used, bars))
                bars = bars[0], select(bars[1], jax.tree.map(_is_used, bars[1]))
            carry_bar, ys_bar = bars[0], differentiable(bars[1])
            carry_bar = jax.tree.map(partial(_or_else, zeros), select(carry_bar, adjoint.perturbed.carry))
            ys_bar = jax.tree.map(partial(_or_else, _at_every_step), ys_bar)
            if not jax.tree.leaves((carry_bar, ys_bar)):  # the loss uses nothing that a tangent reaches
                return (None,) * len(for_backward.perturbed)
            for_backward = same_keys(for_backward)
            narrowed = replace(differentiated, adjoint=adjoint)
            return tuple(
                treedef.flatten_up_to(backward(narrowed, *for_backward.primals, for_backward.saved, carry_bar, ys_bar))
            )

        flat.defvjp(flat_forward, flat_backward, symbolic_zeros=True)
        try:
            return flat(*(_mark(leaf, strategy) if is_differentiable(leaf) else leaf for leaf in primals))
        except TypeError as error:
            if "(jvp) to a custom_vjp function" in str(error):
                _refuse(strategy=strategy)
            raise

    return with_derivative


def _is_used(bar: Any) -> bool:
    return is_differentiable(bar) and not isinstance(bar, SymbolicZero)


def _or_else(make: Callable[[Any], Any], bar: Any) -> Any:
    """A gradient, or what is made of its type where the loss does not use the output."""
    return make(as_type(bar.aval)) if isinstance(bar, SymbolicZero) else bar


def _at_every_step(bars: Any) -> Zeros:
    return Zeros(type_at_one_step(bars))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _mark(leaf: Any, strategy: str) -> Any:
    """The identity; its tangents can be transposed and not computed."""
    return leaf


@_mark.defjvp
def _mark_jvp(strategy: str, primals: Any, tangents: Any) -> Any:
    (leaf,), (tangent,) = primals, tangents
    return leaf, _tangent_p.bind(tangent, strategy=strategy)


def _refuse(*_: Any, strategy: str, **__: Any) -> Any:
    raise TypeError(
        f"{strategy} has a hand-written backward pass and so no forward-mode derivative (jvp, jacfwd, linearize): use "
        "jaxbptt.scan, which has both. Forward over reverse, as in jax.hessian, works through either."
    )


_tangent_p = Primitive("reverse_mode_tangent")
_tangent_p.def_impl(_refuse)
_tangent_p.def_abstract_eval(lambda tangent, *, strategy: tangent)
ad.deflinear2(_tangent_p, lambda cotangent, _, *, strategy: [cotangent])
batching.defvectorized(_tangent_p)
mlir.register_lowering(_tangent_p, _refuse)
