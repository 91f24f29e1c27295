"""Exact gradients of long sequences in little memory: bytes, seconds and compile time, against `lax.scan` and equinox.

One elman layer, n = 128, 32 inputs, batch 1, float32, value and gradient with respect to the weights of a loss of the last
state. Seconds are medians of runs that take turns; ratios are of medians.

    python benchmarks/long_sequences.py [--quick]
"""

import argparse
from functools import partial

import equinox
import equinox.internal
import harness
import jax
import jax.numpy as jnp

import jaxbptt as bptt

CELL = bptt.elman(32, 128)


def nested(step, params, init, xs):
    """Two levels of `lax.scan` with `jax.checkpoint` on the inner one, segments of √T, as written by hand."""
    steps = len(xs)
    segment = next(s for s in range(int(steps**0.5), 0, -1) if steps % s == 0)

    @jax.checkpoint
    def inner(carry, xs):
        return jax.lax.scan(partial(CELL.step, params), carry, xs)

    return jax.lax.scan(inner, init, xs.reshape(-1, segment, xs.shape[-1]))


def by_equinox(step, params, init, xs, *, checkpoints):
    return equinox.internal.scan(partial(CELL.step, params), init, xs, kind="checkpointed", checkpoints=checkpoints)


def value_and_gradient(scan, **options):
    return jax.value_and_grad(lambda params, init, xs: jnp.sum(scan(CELL, params, init, xs, **options)[0] ** 2))


def arguments(steps):
    xs = jax.random.normal(jax.random.key(1), (steps, 32))
    return CELL.init(jax.random.key(0)), CELL.initial_carry(), xs


def against_scan(steps, repeats):
    strategies = {
        "lax.scan + jax.grad": value_and_gradient(bptt.scan),
        "nested jax.checkpoint": value_and_gradient(nested),
        "adjoint_scan": value_and_gradient(bptt.adjoint_scan),
        "checkpointed_scan": value_and_gradient(bptt.checkpointed_scan),
        "checkpointed_scan(checkpoints=100)": value_and_gradient(bptt.checkpointed_scan, checkpoints=100),
        "truncated_scan(truncation_length=100), biased": value_and_gradient(bptt.truncated_scan, truncation_length=100),
    }
    found = harness.measure(strategies, arguments(steps), repeats)
    base_cost, base = found["lax.scan + jax.grad"]
    rows = [
        (
            name,
            f"{cost.temporary_bytes:,}",
            f"{100 * cost.temporary_bytes / base_cost.temporary_bytes:.2f} %",
            f"{seconds * 1e3:.0f}",
            f"{seconds / base:.2f}",
        )
        for name, (cost, seconds) in found.items()
    ]
    return harness.table((f"T = {steps:,}", "temporary bytes", "of lax.scan's", "ms", "of lax.scan's"), rows)


def against_equinox(steps, counts, repeats):
    rows = []
    for count in counts:
        contenders = {
            "equinox": value_and_gradient(by_equinox, checkpoints=count),
            "ours": value_and_gradient(bptt.checkpointed_scan, checkpoints=count),
        }
        found = harness.measure(contenders, arguments(steps), repeats)
        (theirs, their_seconds), (ours, seconds) = found["equinox"], found["ours"]
        rows.append(
            (
                count,
                f"{theirs.temporary_bytes:,}",
                f"{ours.temporary_bytes:,}",
                f"{their_seconds * 1e3:.0f}",
                f"{seconds * 1e3:.0f}",
                f"{their_seconds / seconds:.1f}",
            )
        )
    head = (f"checkpoints, T = {steps:,}", "equinox bytes", "our bytes", "equinox ms", "our ms", "times faster")
    return harness.table(head, rows)


def compile_times(short, long, repeats):
    rows = []
    for name, scan, options in (
        ("scan", bptt.scan, {}),
        ("adjoint_scan", bptt.adjoint_scan, {}),
        ("checkpointed_scan", bptt.checkpointed_scan, {}),
        ("checkpointed_scan(checkpoints=100)", bptt.checkpointed_scan, {"checkpoints": 100}),
        ("truncated_scan(truncation_length=100)", bptt.truncated_scan, {"truncation_length": 100}),
        ("windowed_scan(window=100)", bptt.windowed_scan, {"window": 100}),
    ):
        seconds = {
            steps: sorted(
                harness.compile_and_cost(value_and_gradient(scan, **options), *arguments(steps))[1].compile_seconds
                for _ in range(repeats)
            )[repeats // 2]
            for steps in (short, long)
        }
        rows.append((name, f"{seconds[short]:.2f}", f"{seconds[long]:.2f}", f"{seconds[long] / seconds[short]:.2f}"))
    return harness.table(("compile seconds", f"T = {short:,}", f"T = {long:,}", "ratio"), rows)


def million(steps):
    found = harness.measure({"": value_and_gradient(bptt.checkpointed_scan)}, arguments(steps), 1)
    cost, seconds = found[""]
    return (
        f"checkpointed_scan at T = {steps:,}: {cost.temporary_bytes / 2**20:.2f} MiB of temporaries beyond xs, "
        f"{seconds:.1f} s."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it runs; writes nothing")
    quick = parser.parse_args().quick
    size = 100 if quick else 1
    sections = [
        f"# Long sequences, measured\n\n{harness.machine(f'equinox {equinox.__version__}')}",
        "One elman layer, n = 128, 32 inputs, batch 1, float32, value and gradient of a loss of the last state.",
        against_scan(100_000 // size, 2 if quick else 9),
        against_equinox(10_000 // size, (16, 64, 140 // min(size, 2)), 2 if quick else 15),
        compile_times(1_000 // min(size, 5), 100_000 // size, 1 if quick else 5),
        million(1_000_000 // size),
    ]
    text = "\n\n".join(sections) + "\n"
    print(text)
    if not quick:
        harness.RESULTS.mkdir(exist_ok=True)
        (harness.RESULTS / f"long_sequences_jax_{jax.__version__}.md").write_text(text)


if __name__ == "__main__":
    main()
