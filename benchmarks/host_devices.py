"""The batch sharded over several host devices: what gradients of whole sequences gain on a CPU with many cores.

The loop over time runs on one core, except for its larger products. Split into several devices, the CPU runs as many loops
at once, each over its own rows of the batch. Value and gradient of mean((hs - target)^2) with respect to the weights, in one
process: on one device, and with the batch over all of them by `jax.shard_map` (the weights' gradients are added up once,
at the end) and by `jax.jit` with sharded arguments (the compiler decides where to add them up).

    python benchmarks/host_devices.py [--quick] [--devices 2] [--repeats 7]
"""

import argparse
import os
from functools import partial


def compare(kind, size, repeats):
    cell = layers.CELLS[kind](size.D, size.H)
    params = cell.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (size.T, size.B, size.D))
    targets = jax.random.normal(jax.random.key(2), (size.T, size.B, size.H))
    mesh = jax.make_mesh((len(jax.devices()),), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = P(None, "batch")

    def gradient(scan, params, xs, targets):
        def loss(params):
            _, hs = scan(cell, params, cell.initial_carry(xs.shape[1:2]), xs)
            return jnp.sum((hs - targets) ** 2) / (size.T * size.B * size.H)

        return jax.value_and_grad(loss)(params)

    def by_shard_map(scan):
        def summed(*args):
            return jax.lax.psum(gradient(scan, *args), "batch")

        # check_vma=False, so that gradients are added up here, once: otherwise JAX does it at every step of `lax.scan`.
        return jax.shard_map(summed, mesh=mesh, in_specs=(P(), rows, rows), out_specs=P(), check_vma=False)

    def place(spec):
        return jax.device_put(params, jax.NamedSharding(mesh, P())), *(
            jax.device_put(array, jax.NamedSharding(mesh, spec)) for array in (xs, targets)
        )

    alone, sharded = (params, xs, targets), place(rows)
    runs = {}
    for name, scan in (("lax.scan + jax.grad", bptt.scan), ("adjoint_scan", bptt.adjoint_scan)):
        runs[name, "one device"] = jax.jit(partial(gradient, scan)), alone
        runs[name, "shard_map"] = jax.jit(by_shard_map(scan)), sharded
        runs[name, "jit, sharded"] = jax.jit(partial(gradient, scan)), sharded
    reference = runs["lax.scan + jax.grad", "one device"][0](*alone)
    for fn, args in runs.values():
        assert bptt.compare_gradients(jax.device_get(fn(*args)), jax.device_get(reference)).agrees
    seconds = harness.median_seconds([partial(fn, *args) for fn, args in runs.values()], repeats)
    found = dict(zip(runs, seconds, strict=True))
    return [
        (kind, size, name, *(f"{found[name, where] * 1e3:,.1f}" for where in ("one device", "shard_map", "jit, sharded")),
         f"{found[name, 'one device'] / found[name, 'shard_map']:.2f}")
        for name in ("lax.scan + jax.grad", "adjoint_scan")
    ]  # fmt: skip


def main(options):
    sizes = [(256, 32, 32, 128), (128, 32, 64, 512), (256, 64, 128, 256), (4096, 8, 16, 64)]
    kinds = ("elman", "gru", "lstm")
    if options.quick:
        sizes, kinds = [(16, 4, 3, 8)], ("elman",)
    rows = [row for kind in kinds for size in sizes for row in compare(kind, layers.Size(*size), options.repeats)]
    head = ("cell", "T/B/D/H", "strategy", "one device, ms", "shard_map, ms", "jit, ms", "shard_map to one device")
    text = "\n\n".join(
        (
            "# The batch over host devices, measured",
            f"{harness.machine()}; {len(jax.devices())} host devices; float32; medians of runs that take turns.",
            harness.table(head, rows),
        )
    )
    print(text)
    if not options.quick:
        (harness.RESULTS / f"host_devices_jax_{jax.__version__}.md").write_text(text + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it runs; writes nothing")
    parser.add_argument("--repeats", type=int, default=7, help="rounds")
    parser.add_argument("--devices", type=int, default=2, help="host devices, at best as many as cores")
    options = parser.parse_args()
    # Set before jax is imported, which reads it.
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={options.devices}".strip()

    import harness
    import jax
    import jax.numpy as jnp
    import layers
    from jax.sharding import PartitionSpec as P

    import jaxbptt as bptt

    main(options)
