r"""A linear map as one operation of JAX, with a transpose that is given: what `jax.custom_vjp` has and `jax.custom_jvp` lacks.

`jax.custom_derivatives.linear_call` is nearly this, but can't be mapped (`jax.vmap`) in every version that we run on, and
does not say which cotangents are zero.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxbptt.array_types import is_explicit


@dataclass(frozen=True, eq=False)
class LinearMap:
    """A map that is linear in its last arguments, for known values of the first.

    Attributes:
        push: `(known, tangents)`, lists of arrays, to a list of arrays.
        pull: `(known, cotangents)`, those of the results of `push` with `None` where one is zero, to the cotangents of the
            tangents, with `None` likewise.
        types: of the results.
    """

    push: Callable[[list[Any], list[Any]], list[Any]]
    pull: Callable[[list[Any], list[Any]], list[Any]]
    types: tuple[Any, ...]

    def __call__(self, known: Sequence[Any], tangents: Sequence[Any]) -> list[Any]:
        """The results."""
        return _linear_map_p.bind(*map(jnp.asarray, known), *tangents, linear_map=self, num_known=len(known))


def _apply(*args: Any, linear_map: LinearMap, num_known: int) -> list[Any]:
    return linear_map.push(_arrays(args[:num_known]), list(args[num_known:]))


def _arrays(args: Sequence[Any]) -> list[Any]:
    """What is known; a number in a traced program is a float or an integer that has a dtype and no shape."""
    return [arg if hasattr(arg, "shape") else jnp.asarray(arg, getattr(arg, "dtype", None)) for arg in args]


def _types(*_: Any, linear_map: LinearMap, num_known: int) -> list[Any]:
    return list(linear_map.types)


def _transpose(cotangents: list[Any], *args: Any, linear_map: LinearMap, num_known: int) -> list[Any]:
    bars = [None if isinstance(bar, ad.Zero) else bar for bar in cotangents]
    found = linear_map.pull(_arrays(args[:num_known]), bars)
    linear = zip(args[num_known:], found, strict=True)
    return [None] * num_known + [bar if ad.is_undefined_primal(arg) else None for arg, bar in linear]


def _jvp(args: Sequence[Any], tangents: Sequence[Any], **params: Any) -> tuple[list[Any], list[Any]]:
    """The derivative with respect to known values as well, by JAX."""
    moving = [
        i
        for i, tangent in enumerate(tangents)
        if not isinstance(tangent, ad.Zero) and tangent.dtype != jax.dtypes.float0
    ]

    def of_moving(*values):
        whole = list(args)
        for i, value in zip(moving, values, strict=True):
            whole[i] = value
        return _apply(*whole, **params)

    return jax.jvp(of_moving, [args[i] for i in moving], [tangents[i] for i in moving])


def _batch(axis: Any, args: Sequence[Any], dims: Sequence[Any], *, linear_map: LinearMap, num_known: int) -> Any:
    """Mapped over one axis, the first of all tangents."""
    if all(dim is None for dim in dims):
        found = linear_map(args[:num_known], args[num_known:])
        return found, [None] * len(found)
    of_known, known, linear = list(dims[:num_known]), args[:num_known], []
    for tangent, dim in zip(args[num_known:], dims[num_known:], strict=True):
        linear.append(batching.bdim_at_front(tangent, dim, axis.size))

    def mapped(function):
        return jax.vmap(
            function, (of_known, 0), axis_name=axis.name, axis_size=axis.size, spmd_axis_name=axis.spmd_name
        )

    push = mapped(linear_map.push)
    if any(is_explicit(t.sharding.mesh) for t in linear_map.types):
        types = [jax.typeof(leaf) for leaf in jax.eval_shape(push, list(known), linear)]
    else:
        types = [ShapedArray((axis.size, *t.shape), t.dtype) for t in linear_map.types]
    outer = LinearMap(push, mapped(linear_map.pull), tuple(types))
    return outer(known, linear), [0] * len(types)


_linear_map_p = Primitive("linear_map")
_linear_map_p.multiple_results = True
_linear_map_p.def_impl(_apply)
_linear_map_p.def_abstract_eval(_types)
mlir.register_lowering(_linear_map_p, mlir.lower_fun(_apply, multiple_results=True))
ad.primitive_jvps[_linear_map_p] = _jvp
ad.primitive_transposes[_linear_map_p] = _transpose
batching.fancy_primitive_batchers[_linear_map_p] = _batch
