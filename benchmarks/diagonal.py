"""Diagonal recurrences on a CPU: value and gradient by `adjoint_scan`, against `lax.scan` + `jax.grad`.

The four diagonal cells with their own adjoints, and the bare step h ↦ a ⊙ h + b with a and b for inputs, whose adjoint is
derived. A cell reads 4 features, so that the recurrence is what takes the time; an lru also gives 4. One row, float32; the
gradient is that of the mean square of all outputs, which adds little time of its own, with respect to params, first carry and
inputs.
Both run one time step in an iteration of their loops: more steps were slower for both. Milliseconds are medians of runs that
take turns; ratios are of medians.

    python benchmarks/diagonal.py [--quick]
"""

import argparse
import math

import harness
import jax
import jax.numpy as jnp

import jaxbptt as bptt

FEATURES = 4
SIZES = ((4096, 256), (4096, 1024), (65536, 16), (1024, 8192))
CELLS = {
    "lru": lambda n: bptt.lru(FEATURES, n, output_size=FEATURES, r_min=0.9, r_max=0.999),
    "min_gru": lambda n: bptt.min_gru(FEATURES, n),
    "min_lstm": lambda n: bptt.min_lstm(FEATURES, n),
    "rg_lru": lambda n: bptt.rg_lru(FEATURES, n),
}


def affine(_, h, x):
    a, b = x
    h = a * h + b
    return h, h


def problem(name, steps, units):
    """The step or cell, and (params, init, xs)."""
    keys = jax.random.split(jax.random.key(0), 3)
    if name == "a ⊙ h + b":
        a, b = (jax.random.normal(key, (steps, units)) for key in keys[:2])
        return affine, (None, jnp.ones(units), (jax.nn.sigmoid(a + 2), b))
    cell = CELLS[name](units)
    init = jax.tree.map(lambda leaf: leaf + 0.5, cell.initial_carry())
    return cell, (cell.init(keys[0]), init, jax.random.normal(keys[1], (steps, FEATURES)))


def gradient(scan, step):
    """A function of params, init and xs."""

    def loss(params, init, xs):
        return jnp.mean(scan(step, params, init, xs)[1] ** 2)

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def measured(name, steps, units, repeats):
    step, args = problem(name, steps, units)
    contenders = {"lax.scan": bptt.scan, "adjoint_scan": bptt.adjoint_scan}
    found = harness.measure({kind: gradient(scan, step) for kind, scan in contenders.items()}, args, repeats)
    (their_cost, theirs), (our_cost, ours) = found.values()
    return theirs, ours, our_cost.temporary_bytes / max(their_cost.temporary_bytes, 1)


def rows(sizes, repeats):
    table = []
    for name in ("a ⊙ h + b", *CELLS):
        ratios = []
        for steps, units in sizes:
            theirs, ours, share = measured(name, steps, units, repeats)
            ratios.append(ours / theirs)
            numbers = f"{1e3 * theirs:.2f}", f"{1e3 * ours:.2f}", f"{ratios[-1]:.2f}", f"{share:.2f}"
            table.append((name, f"{steps:,} / {units:,}", *numbers))
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        table.append((name, "geometric mean", "", "", f"{mean:.2f}", ""))
    return table


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it runs; writes nothing")
    quick = parser.parse_args().quick
    sizes = [(64, 8), (128, 4)] if quick else SIZES
    head = ("step", "time steps / units", "lax.scan, ms", "adjoint_scan, ms", "of its time", "of its bytes")
    text = "\n\n".join(
        [
            f"# Diagonal recurrences, measured\n\n{harness.machine()}",
            f"Value and gradient of the mean square of the outputs, one row, float32. Cells read {FEATURES} features; an lru gives as many.",
            harness.table(head, rows(sizes, 2 if quick else 9)),
        ]
    )
    print(text)
    if not quick:
        harness.RESULTS.mkdir(exist_ok=True)
        (harness.RESULTS / f"diagonal_cpu_jax_{jax.__version__}.md").write_text(text + "\n")


if __name__ == "__main__":
    main()
