r"""Arrays whose types say more than a shape: how they lie on an Explicit mesh, and over which devices of a `shard_map` they vary.

JAX checks both at every operation, so what is made here, zeros and shapes to trace with, is of the type of what it is
added to or stands for.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType


def as_type(aval: Any) -> Any:
    """The type of a traced variable, for functions that take an array or its type."""
    return jax.ShapeDtypeStruct(
        aval.shape,
        aval.dtype,
        weak_type=aval.weak_type,
        sharding=None if aval.sharding.mesh.empty else aval.sharding,
        manual_axis_type=aval.manual_axis_type,
    )


def type_at_one_step(leaf: Any) -> Any:
    """The type of an array, or of what has one, at one time step."""
    aval = jax.typeof(leaf)
    return as_type(aval.update(shape=aval.shape[1:], sharding=aval.sharding.update(spec=aval.sharding.spec[1:])))


def type_over_time(leaf: Any, *lengths: int) -> Any:
    """The type of so many arrays like this one, stacked."""
    aval = jax.typeof(leaf)
    spec = jax.P(*(None,) * len(lengths), *aval.sharding.spec)
    return as_type(aval.update(shape=(*lengths, *aval.shape), sharding=aval.sharding.update(spec=spec)))


def zeros(leaf: Any) -> Any:
    """Zeros (or a random key) of the type of an array."""
    aval = jax.typeof(leaf)
    with jax.enable_x64(True):  # else a step that turns it on for itself would get half of the bits
        array = jnp.zeros(aval.shape, aval.dtype)
    if is_explicit(aval.sharding.mesh):
        array = jax.sharding.reshard(array, aval.sharding)
    return jax.lax.pcast(array, varying(leaf), to="varying")


def varying(*leaves: Any) -> tuple[str, ...]:
    """The mesh axes of a `shard_map` that any of these varies over."""
    axes = frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves))
    return tuple(sorted(axes))


def is_explicit(mesh: Any) -> bool:
    """Whether a mesh has axes over which types say how arrays lie."""
    return AxisType.Explicit in mesh.axis_types


def is_on_devices(leaf: Any) -> bool:
    """Whether an array's type says anything of devices."""
    return bool(varying(leaf)) or is_explicit(jax.typeof(leaf).sharding.mesh)


def lie_like(leaf: Any, like: Any) -> Any:
    """An array that varies over the devices that `like` varies over, and on an Explicit mesh lies like it."""
    leaf = jax.lax.pcast(leaf, tuple(sorted({*varying(like)} - {*varying(leaf)})), to="varying")
    sharding = jax.typeof(like).sharding
    if is_explicit(sharding.mesh) and jax.typeof(leaf).sharding != sharding:
        return jax.sharding.reshard(leaf, sharding)
    return leaf
