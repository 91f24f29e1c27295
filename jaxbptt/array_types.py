r"""Arrays whose types say more than a shape: how they lie on an Explicit mesh, and over which devices of a `shard_map` they vary.

JAX checks both at every operation, so what is made here, zeros and shapes to trace with, is of the type of what it is
added to or stands for.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.export import is_symbolic_dim
from jax.sharding import AxisType, NamedSharding

from jaxbptt.trees import combine, is_array, is_differentiable, partition


def as_type(aval: Any) -> Any:
    """The type of a traced variable, for functions that take an array or its type."""
    if jax.dtypes.canonicalize_dtype(aval.dtype, allow_extended_dtype=True) != aval.dtype:
        return aval  # of 64 bits, made under `jax.enable_x64` where it is off: JAX would make 32 of them
    return jax.ShapeDtypeStruct(
        aval.shape,
        aval.dtype,
        weak_type=aval.weak_type,
        sharding=None if aval.sharding.mesh.empty else aval.sharding,
        manual_axis_type=aval.manual_axis_type,
    )


def type_at_one_step(leaf: Any) -> Any:
    """The type of an array, or of what has one, at one time step."""
    aval = type_of(leaf)
    return as_type(aval.update(shape=aval.shape[1:], sharding=aval.sharding.update(spec=aval.sharding.spec[1:])))


def type_over_time(leaf: Any, *lengths: int) -> Any:
    """The type of so many arrays like this one, stacked."""
    aval = type_of(leaf)
    spec = jax.P(*(None,) * len(lengths), *aval.sharding.spec)
    return as_type(aval.update(shape=(*lengths, *aval.shape), sharding=aval.sharding.update(spec=spec)))


def zeros(leaf: Any) -> Any:
    """Zeros (or a random key) of the type of an array."""
    aval = type_of(leaf)
    with jax.enable_x64(True):
        array = jnp.zeros(aval.shape, aval.dtype)
    return varying_over(_laid(array, aval.sharding), varying(leaf))


def type_of(leaf: Any) -> Any:
    """The type of an array, or of what stands for one."""
    if isinstance(leaf, ShapedArray):
        return leaf
    with jax.enable_x64(True):  # else a step that turns it on for itself would get half of the bits
        return jax.typeof(leaf)


def varying(*leaves: Any) -> tuple[str, ...]:
    """The mesh axes of a `shard_map` that any of these varies over."""
    axes = frozenset().union(*(type_of(leaf).manual_axis_type.varying for leaf in leaves))
    return tuple(sorted(axes))


def is_explicit(mesh: Any) -> bool:
    """Whether a mesh has axes over which types say how arrays lie."""
    return AxisType.Explicit in mesh.axis_types


def varying_over(leaf: Any, axes: tuple[str, ...]) -> Any:
    """An array that varies over these axes as well."""
    return jax.lax.pcast(leaf, tuple(axis for axis in axes if axis not in varying(leaf)), to="varying")


def is_on_devices(leaf: Any) -> bool:
    """Whether an array's type says anything of devices."""
    return bool(varying(leaf)) or is_explicit(jax.typeof(leaf).sharding.mesh)


def lie_like(leaf: Any, like: Any) -> Any:
    """An array that varies over the devices that `like` varies over, and on an Explicit mesh lies like it."""
    return _laid(varying_over(leaf, varying(like)), jax.typeof(like).sharding)


def lie_by_rows(leaf: Any, flags: Any) -> Any:
    """An array whose rows vary, and on an Explicit mesh lie, like those of flags `[time, *rows]`."""
    leaf, sharding = varying_over(leaf, varying(flags)), jax.typeof(flags).sharding
    if not is_explicit(sharding.mesh) or leaf.shape[: flags.ndim - 1] != flags.shape[1:]:
        return leaf
    rest = (None,) * (leaf.ndim - flags.ndim + 1)
    return _laid(leaf, sharding.update(spec=_first(jax.typeof(leaf).sharding.spec, (*sharding.spec[1:], *rest))))


def lie_alike(*leaves: Any) -> Any:
    """Arrays of one shape that on an Explicit mesh lie in one way, along each axis as the first that is spread there."""
    shardings = [jax.typeof(leaf).sharding for leaf in leaves]
    explicit = [sharding for sharding in shardings if is_explicit(sharding.mesh)]
    if not explicit:
        return leaves
    joint = explicit[0].update(spec=_first(*(sharding.spec for sharding in shardings)))
    return [_laid(leaf, joint) for leaf in leaves]


def varying_alike(tree: Any) -> Any:
    """Floating-point leaves of a tree, made to vary over all devices of a `shard_map` that any leaf varies over.

    A backward written by hand has the gradients of what each device computes. Of what varies less, JAX adds them up.
    """
    axes = varying(*filter(is_array, jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: varying_over(leaf, axes) if is_differentiable(leaf) else leaf, tree)


def laid_out(fn: Callable[[Any], Any], args: Any, likes: Any) -> Any:
    """`fn(args)`; for arrays of an Explicit mesh, whose operations say how results lie, the compiler lays them out in `fn`.

    The results lie like `likes`, a tree of the same structure.
    """
    arrays, static = partition(args, is_array)
    meshes = [jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(arrays)]
    mesh = next(filter(is_explicit, meshes), None)
    if mesh is None:
        return fn(args)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    shardings = jax.tree.map(lambda leaf: NamedSharding(mesh, jax.typeof(leaf).sharding.spec), likes)
    automatic = jax.sharding.auto_axes(
        lambda arrays: fn(combine(arrays, static)),
        axes=tuple(axis for axis, kind in kinds if kind is AxisType.Explicit),
        out_sharding=shardings,
    )
    return automatic(arrays)


def _first(*specs: Any) -> Any:
    return jax.P(*(next((axes for axes in along if axes is not None), None) for along in zip(*specs, strict=True)))


def _laid(leaf: Any, sharding: Any) -> Any:
    if not is_explicit(sharding.mesh) or jax.typeof(leaf).sharding == sharding:
        return leaf
    return jax.sharding.reshard(leaf, sharding)


def is_weak(leaf: Any) -> bool:
    """Whether a leaf has the dtype of a Python number, which gives way to any other."""
    return getattr(leaf, "weak_type", False)


def as_weak_as(array: Any, like: Any) -> Any:
    """An array with the weak type of `like`, which writing into it has taken away."""
    if not is_weak(like) or is_weak(array):
        return array
    # Every function of jax.lax that converts makes a strong type.
    return jax.lax.convert_element_type_p.bind(array, new_dtype=array.dtype, weak_type=True, sharding=None)


def byte_count(tree: Any) -> int:
    """Bytes of all arrays."""
    avals = map(type_of, jax.tree.leaves(tree))
    return sum(math.prod(map(assumed_size, aval.shape)) * aval.dtype.itemsize for aval in avals)


def assumed_size(size: Any) -> int:
    """A size, for a choice that depends on it: one that `jax.export` leaves symbolic counts as 32."""
    return 32 if is_symbolic_dim(size) else size
