r"""Array types that say more than shape and dtype: sharding on an Explicit mesh, devices of a `shard_map`, weak types.

JAX checks the first two at every operation, so zeros, and shapes to trace with, are made here with the whole type of the
array that they are added to or stand for.
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
        return aval  # 64-bit under `jax.enable_x64` where it is off: a ShapeDtypeStruct would make it 32-bit
    return jax.ShapeDtypeStruct(
        aval.shape,
        aval.dtype,
        weak_type=aval.weak_type,
        sharding=None if aval.sharding.mesh.empty else aval.sharding,
        manual_axis_type=aval.manual_axis_type,
    )


def type_at_one_step(leaf: Any) -> Any:
    """The type of an array `[time, ...]`, or of a type, at one time step."""
    aval = type_of(leaf)
    return as_type(aval.update(shape=aval.shape[1:], sharding=aval.sharding.update(spec=aval.sharding.spec[1:])))


def type_over_time(leaf: Any, *lengths: Any) -> Any:
    """The type of arrays like this one, stacked on leading axes of these lengths."""
    aval = type_of(leaf)
    spec = jax.P(*(None,) * len(lengths), *aval.sharding.spec)
    return as_type(aval.update(shape=(*lengths, *aval.shape), sharding=aval.sharding.update(spec=spec)))


def zeros(leaf: Any) -> Any:
    """Zeros (or a random key) of the type of `leaf`."""
    aval = type_of(leaf)
    with jax.enable_x64(True):
        array = jnp.zeros(aval.shape, aval.dtype)
    return varying_over(_resharded(array, aval.sharding), varying(leaf))


def type_of(leaf: Any) -> Any:
    """The type of an array, or of what stands for one."""
    if isinstance(leaf, ShapedArray):
        return leaf
    with jax.enable_x64(True):  # otherwise 64-bit arrays of a step that enables x64 itself would be read as 32-bit
        return jax.typeof(leaf)


def varying(*leaves: Any) -> tuple[str, ...]:
    """The mesh axes of a `shard_map` that any of these varies over."""
    axes = frozenset().union(*(type_of(leaf).manual_axis_type.varying for leaf in leaves))
    return tuple(sorted(axes))


def is_explicit(mesh: Any) -> bool:
    """Whether a mesh has Explicit axes, whose sharding is part of an array's type."""
    return AxisType.Explicit in mesh.axis_types


def varying_over(leaf: Any, axes: tuple[str, ...]) -> Any:
    """An array that varies over these axes as well."""
    return jax.lax.pcast(leaf, tuple(axis for axis in axes if axis not in varying(leaf)), to="varying")


def is_on_devices(leaf: Any) -> bool:
    """Whether an array's type says anything about devices."""
    return bool(varying(leaf)) or is_explicit(jax.typeof(leaf).sharding.mesh)


def sharded_like(leaf: Any, like: Any) -> Any:
    """An array that varies over the devices that `like` varies over, and on an Explicit mesh is sharded like it."""
    return _resharded(varying_over(leaf, varying(like)), jax.typeof(like).sharding)


def sharded_by_rows(leaf: Any, flags: Any) -> Any:
    """An array whose rows vary, and on an Explicit mesh are sharded, like those of flags `[time, *rows]`."""
    leaf, sharding = varying_over(leaf, varying(flags)), jax.typeof(flags).sharding
    if not is_explicit(sharding.mesh) or leaf.shape[: flags.ndim - 1] != flags.shape[1:]:
        return leaf
    rest = (None,) * (leaf.ndim - flags.ndim + 1)
    return _resharded(
        leaf, sharding.update(spec=_first_given(jax.typeof(leaf).sharding.spec, (*sharding.spec[1:], *rest)))
    )


def sharded_alike(*leaves: Any) -> Any:
    """Arrays of one shape, on an Explicit mesh with one sharding: on each axis that of the first that is sharded there."""
    shardings = [jax.typeof(leaf).sharding for leaf in leaves]
    explicit = [sharding for sharding in shardings if is_explicit(sharding.mesh)]
    if not explicit:
        return leaves
    joint = explicit[0].update(spec=_first_given(*(sharding.spec for sharding in shardings)))
    return [_resharded(leaf, joint) for leaf in leaves]


def varying_alike(tree: Any) -> Any:
    """Floating-point leaves of a tree, made to vary over all devices of a `shard_map` that any leaf varies over.

    A backward by hand returns the gradient of what each device computes; for leaves that vary over fewer axes JAX sums it.
    """
    axes = varying(*filter(is_array, jax.tree.leaves(tree)))
    return jax.tree.map(lambda leaf: varying_over(leaf, axes) if is_differentiable(leaf) else leaf, tree)


def under_auto_axes(fn: Callable[[Any], Any], args: Any, likes: Any) -> Any:
    """`fn(args)`; on an Explicit mesh, where operations must know their result's sharding, the compiler chooses inside `fn`.

    The results are sharded like `likes`, a tree of the same structure.
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


def _first_given(*specs: Any) -> Any:
    return jax.P(*(next((axes for axes in along if axes is not None), None) for along in zip(*specs, strict=True)))


def _resharded(leaf: Any, sharding: Any) -> Any:
    if not is_explicit(sharding.mesh) or jax.typeof(leaf).sharding == sharding:
        return leaf
    return jax.sharding.reshard(leaf, sharding)


def is_weak(leaf: Any) -> bool:
    """Whether a leaf has the weak dtype of a Python number, which any other dtype overrides."""
    return getattr(leaf, "weak_type", False)


def as_weak_as(array: Any, like: Any) -> Any:
    """An array with the weak type of `like`, which writing into an array loses."""
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
