r"""Where a run's arrays lie on many devices: rows of a batch apart, everything else everywhere.

JAX does the rest: an `update` compiled for arrays that lie so runs each row where it is, and adds the gradients up. Who
writes the exchange out with `jax.shard_map`, or lays arrays out on an Explicit mesh, calls the strategies as on one device.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxbptt.training.chunks import Chunk
from jaxbptt.training.tbptt import TrainState
from jaxbptt.trees import is_array, is_key, name
from jaxbptt.words import counted


def shard_state(state: TrainState, mesh: Mesh) -> TrainState:
    r"""A `TrainState` on a mesh: the carry by rows over the mesh's first axis, the rest on every device.

    Args:
        state: as `init` returns it; leaves of its carry are `[batch, ...]`. Every process passes the same.
        mesh: of devices, of this process or of several.

    Returns:
        The same values, on the mesh.

    Raises:
        ValueError: a carry whose rows can't be shared out evenly.
        TypeError: no `TrainState`, no mesh.

    Example:
        >>> import jax, optax
        >>> import numpy as np
        >>> import jaxbptt as bptt
        >>> cell = bptt.elman(3, 8)
        >>> init, update = bptt.tbptt(lambda *args, **kwargs: None, optax.sgd(0.1))
        >>> state = init(cell.init(jax.random.key(0)), cell.initial_carry((4,)), jax.random.key(1))
        >>> mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
        >>> print(bptt.sharding.shard_state(state, mesh).carry.sharding.spec[0])
        batch
    """
    _check(state, TrainState, mesh)
    carry = _place(state.carry, mesh, 0, "carry")
    rest = jax.tree.map(
        lambda leaf: _put(leaf, NamedSharding(_automatic(mesh), PartitionSpec())), state._replace(carry=None)
    )
    return rest._replace(carry=carry)


def shard_chunk(chunk: Chunk, mesh: Mesh) -> Chunk:
    r"""A `Chunk` on a mesh, by rows over the mesh's first axis.

    Args:
        chunk: leaves `[time, batch, ...]`. Every process passes the whole chunk; each of its devices gets its rows.
        mesh: of devices, of this process or of several.

    Returns:
        The same values, on the mesh.

    Raises:
        ValueError: rows that can't be shared out evenly.
        TypeError: no `Chunk`, no mesh.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import numpy as np
        >>> import jaxbptt as bptt
        >>> mesh = jax.sharding.Mesh(np.array(jax.devices()), ("batch",))
        >>> print(bptt.sharding.shard_chunk(bptt.streams.Chunk(jnp.ones((5, 4, 3))), mesh).xs.sharding.spec[1])
        batch
    """
    _check(chunk, Chunk, mesh)
    return _place(chunk, mesh, 1, "chunk")


def _check(value: Any, expected: type, mesh: Any) -> None:
    for given, kind in ((value, expected), (mesh, Mesh)):
        if not isinstance(given, kind):
            raise TypeError(f"Got a {type(given).__name__} where a {kind.__name__} is expected.")


def _automatic(mesh: Mesh) -> Mesh:
    """The same devices, where the compiler and not the program decides how what lies between is laid out."""
    return Mesh(mesh.devices, mesh.axis_names)


def _place(tree: Any, mesh: Mesh, axis: int, root: str) -> Any:
    mesh, rows = _automatic(mesh), mesh.axis_names[0]
    sharding = NamedSharding(mesh, PartitionSpec(*(None,) * axis, rows))

    def leaf(path, leaf):
        if jnp.ndim(leaf) <= axis or leaf.shape[axis] % mesh.shape[rows]:
            raise ValueError(
                f"{name(root, path)} has shape {jnp.shape(leaf)}, whose axis {axis} can't be shared out evenly over the "
                f"{counted(mesh.shape[rows], 'device')} of mesh axis {rows!r}: make the batch a multiple of their number."
            )
        return _put(leaf, sharding)

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    """Each process hands over what its own devices need; random keys by their data."""
    if not is_array(leaf):
        return leaf
    if is_key(leaf):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
