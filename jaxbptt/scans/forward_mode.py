r"""A clear refusal of forward mode where only a reverse-mode derivative has been written.

JAX's own message for `jax.jvp` of a custom derivative names neither the function nor the way out, and it comes at one of
two moments: while the tangents are mapped (`jacfwd`), or when a program that holds them is compiled. The first is caught
and said better. For the second, inputs pass through a marked identity, whose tangents go through an operation that can be
transposed, which is all that reverse mode does, but not computed. One case keeps JAX's message: `jacfwd` of a function
that was jitted before, whose tangents are mapped after this code has run.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxbptt.scans.recurrence import is_differentiable


def reverse_mode_only(strategy: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """`run`, a `jax.custom_vjp` function, with a `TypeError` that names `scan` where forward mode is asked of it."""

    @jax.custom_jvp
    def mark(leaf):
        return leaf

    @mark.defjvp
    def mark_jvp(primals, tangents):
        (leaf,), (tangent,) = primals, tangents
        return leaf, _tangent_p.bind(tangent, strategy=strategy)

    def marked_run(*args):
        args = jax.tree.map(lambda leaf: mark(leaf) if is_differentiable(leaf) else leaf, args)
        try:
            return run(*args)
        except TypeError as error:
            if "(jvp) to a custom_vjp function" in str(error):
                _refuse(strategy=strategy)
            raise

    return marked_run


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
