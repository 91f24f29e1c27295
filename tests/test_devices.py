"""The same update on eight devices as on one, in a process of its own: the number of devices is settled when JAX starts."""

import os
import subprocess
import sys

import pytest

ON_EIGHT_DEVICES = """
from functools import partial
import jax, numpy as np, optax
import jaxbptt as bptt

cell = bptt.lstm(3, 8)
net = bptt.network(cell, 3)

def loss(params, carry, chunk, *, scan, key):
    carry, outputs = net.apply(params, carry, chunk.xs, scan=scan)
    return bptt.losses.mean_squared_error(outputs, chunk.targets, mask=chunk.mask), carry

assert len(jax.devices()) == 8
series = np.random.default_rng(0).standard_normal((500, 3)).astype(np.float32)
stream = bptt.streams.rows(series, batch=16, chunk_length=9)
strategies = {
    "adjoint_scan": bptt.adjoint_scan,
    "truncated_scan": partial(bptt.truncated_scan, truncation_length=4),
    "checkpointed_scan": partial(bptt.checkpointed_scan, checkpoints=2),
}
for name, scan in strategies.items():
    init, update = bptt.tbptt(loss, optax.adam(1e-2), scan=scan, clip=optax.clip_by_global_norm(0.1))
    alone = init(net.init(jax.random.key(0)), cell.initial_carry((16,)), jax.random.key(1))
    update = jax.jit(update)
    meshes = [jax.sharding.Mesh(np.array(jax.devices()), ("batch",))]
    if name == "adjoint_scan":  # a mesh of more axes, whose layout JAX expects to be written out
        meshes.append(jax.make_mesh((4, 2), ("rows", "other")))
    spread = [bptt.sharding.shard_state(alone, mesh) for mesh in meshes]
    for chunk in stream:
        alone, metrics = update(alone, chunk)
        for i, mesh in enumerate(meshes):
            spread[i], found = update(spread[i], bptt.sharding.shard_chunk(chunk, mesh))
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), found, metrics)
    for mesh, state in zip(meshes, spread, strict=True):
        for a, b in zip(jax.tree.leaves(alone[:4]), jax.tree.leaves(state[:4]), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-6)
        h = jax.tree.leaves(state.carry)[0]
        assert h.sharding.shard_shape(h.shape)[0] == 16 // mesh.devices.shape[0], h.sharding
        assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.params))
    print(name)

# An influence is shared out by rows, or along the params, and stays so.
for how, axes in (("batch", (8, 1)), ("params", (2, 4))):
    mesh = jax.make_mesh(axes, ("rows", "params"))
    init, update = bptt.tbptt(loss, optax.adam(1e-2), influence=bptt.influences.rtrl())
    few = bptt.streams.rows(series, batch=16, chunk_length=2)
    alone = init(net.init(jax.random.key(0)), cell.initial_carry((16,)), jax.random.key(1), few.at(0))
    spread, update = bptt.sharding.shard_state(alone, mesh, influence=how), jax.jit(update)
    for position in range(3):
        alone, metrics = update(alone, few.at(position))
        spread, found = update(spread, bptt.sharding.shard_chunk(few.at(position), mesh))
        jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), found, metrics)
    for a, b in zip(jax.tree.leaves(alone.influence), jax.tree.leaves(spread.influence), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)
        shared = b.sharding.shard_shape(b.shape)
        assert shared == ((2, *a.shape[1:]) if how == "batch" else (8, a.shape[1], a.shape[2] // 4, *a.shape[3:])), shared
    assert how == "params" or all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(spread.params))
    print("influence by", how)

# Written out: each device takes the gradient of its own rows, and they are averaged.
from jax.sharding import PartitionSpec as P
xs = series[:144].reshape(9, 16, 3)
row_loss = lambda params, xs: (bptt.adjoint_scan(cell, params, cell.initial_carry((xs.shape[1],)), xs)[1] ** 2).mean()
average = lambda params, xs: jax.lax.pmean(row_loss(params, xs), "batch")
mapped = jax.shard_map(average, mesh=meshes[0], in_specs=(P(), P(None, "batch")), out_specs=P())
gradients = (jax.jit(jax.grad(way))(alone.params.cell, xs) for way in (row_loss, mapped))
jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), *gradients)

try:
    bptt.sharding.shard_chunk(bptt.Chunk(np.zeros((5, 12))), meshes[0])
except ValueError as error:
    print(error)
"""


@pytest.mark.slow
def test_eight_devices_equal_one():
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    run = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    *names, error = run.stdout.splitlines()
    assert names == ["adjoint_scan", "truncated_scan", "checkpointed_scan", "influence by batch", "influence by params"]
    assert "chunk.xs has shape (5, 12), whose axis 1 can't be shared out evenly over the 8 devices" in error
