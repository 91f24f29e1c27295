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
from jaxbptt.trees import differentiable, is_array, is_key, name
from jaxbptt.words import counted


def shard_state(state: TrainState, mesh: Mesh, *, influence: str = "batch") -> TrainState:
    r"""A `TrainState` on a mesh: the carry's rows sharded over the mesh's first axis, the rest replicated.

    An influence is sharded as well, since it is the largest part of a state: by its rows, or, for a few rows on many devices,
    along the params. No device then holds more than its share; each step moves the Jacobians, which are small beside it.

    Args:
        state: as `init` returns it; leaves of its carry are `[batch, ...]`. Every process passes the same.
        mesh: of devices, of this process or of several.
        influence: "batch" for its rows over the mesh's first axis. "params" for an axis of the params over the mesh's last axis,
            the first that can be shared out evenly, in those of its leaves that end with the shape of a leaf of the params; where
            the mesh has another axis before that, for the rows over the first as well. The compiler then shards the params and the
            optimiser's state after an update in the same way, unless `out_shardings` of `jax.jit` says otherwise.

    Returns:
        The same values, on the mesh.

    Raises:
        ValueError: a carry or an influence whose rows can't be shared out evenly; an `influence` that is neither word.
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
    if influence not in ("batch", "params"):
        raise ValueError(
            f"influence is {influence!r}, but it is sharded along one of two axes: pass 'batch' or 'params'."
        )
    carry = _place(state.carry, mesh, 0, "carry")
    by_rows = influence == "batch"
    moved = _place(state.influence, mesh, 0, "influence") if by_rows else _along_params(state, mesh)
    rest = jax.tree.map(
        lambda leaf: _put(leaf, NamedSharding(_automatic(mesh), PartitionSpec())),
        state._replace(carry=None, influence=None),
    )
    return rest._replace(carry=carry, influence=moved)


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


def _along_params(state: TrainState, mesh: Mesh) -> Any:
    """The influence, where a leaf ends with the axes of a leaf of the params, sharded along one of them."""
    mesh, (*rows, devices) = _automatic(mesh), mesh.axis_names
    shapes = {leaf.shape for leaf in jax.tree.leaves(differentiable(state.params)) if leaf.ndim}

    def leaf(leaf):
        first = next((axis for axis in range(1, leaf.ndim) if leaf.shape[axis:] in shapes), leaf.ndim)
        axes: list[Any] = [None] * leaf.ndim
        if rows and leaf.ndim and leaf.shape[0] % mesh.shape[rows[0]] == 0:
            axes[0] = rows[0]
        even = [axis for axis in range(first, leaf.ndim) if leaf.shape[axis] % mesh.shape[devices] == 0]
        if even:
            axes[even[0]] = devices
        return _put(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree.map(leaf, state.influence)


def _put(leaf: Any, sharding: NamedSharding) -> Any:
    """A leaf on the mesh; each process provides what its own devices need. Random keys are placed by their data."""
    if not is_array(leaf):
        return leaf
    if is_key(leaf):
        data = _put(jax.random.key_data(leaf), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
