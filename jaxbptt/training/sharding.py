r"""A training run on many devices: the rows of a batch are sharded, everything else is replicated.

JAX does the rest: an `update` compiled for arrays with this sharding computes each row on its own device and adds the
gradients up. With `jax.shard_map`, or on an Explicit mesh, the strategies are called as on one device.
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
    r"""A `TrainState` on a mesh: the carry's rows sharded over the mesh's first axis, the rest replicated.

    Args:
        state: as `init` returns it; leaves of its carry are `[batch, ...]`. Every process passes the same.
        mesh: of devices, of this process or of several.

    Returns:
        The same values, on the mesh.

    Raises:
        ValueError: a carry whose rows can't be shared out evenly.
        TypeError: not a `TrainState`, or not a mesh.

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
    r"""A `Chunk` on a mesh, its rows sharded over the mesh's first axis.

    Args:
        chunk: leaves `[time, batch, ...]`. Every process passes the whole chunk; each of its devices gets its rows.
        mesh: of devices, of this process or of several.

    Returns:
        The same values, on the mesh.

    Raises:
        ValueError: rows that can't be shared out evenly.
        TypeError: not a `Chunk`, or not a mesh.

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
            raise TypeError(f"Got a {type(given).__name__}, but a {kind.__name__} is expected: pass one.")


def _automatic(mesh: Mesh) -> Mesh:
    """The same devices with axes of type Auto: the compiler chooses how intermediate values are sharded."""
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
    """A leaf on the mesh; each process provides what its own devices need. Random keys are placed by their data."""
    if not is_array(leaf):
        return leaf
    if is_key(leaf):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
