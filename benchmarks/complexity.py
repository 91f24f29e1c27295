"""The textbook's cost table, measured: flops, bytes and seconds of BPTT against T and H, and the exponents fitted.

The table says O(T·H²) time forward and backward and O(T·H) memory. Operations are counted in the traced program, each loop
as often as it runs (the compiler's own figure counts a loop's body once, whatever T is); bytes are the compiler's; seconds
are medians of runs that take turns. Exponents are slopes of least squares in the logarithms, over the whole range.

    python benchmarks/complexity.py [--quick]
"""

import argparse
from functools import partial

import harness
import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jaxbptt as bptt
from jaxbptt.plots import COLOURS

INPUTS = 8
STRATEGIES = {"scan": bptt.scan, "adjoint_scan": bptt.adjoint_scan, "checkpointed_scan": bptt.checkpointed_scan}
EXPECTED = {  # exponents of T and H for each quantity, by strategy where they differ
    "flops": (1, 2),
    "seconds": (1, 2),
    "bytes": (1, 1),
    "bytes of checkpointed_scan": (0.5, 1),
}


def problem(steps, hidden):
    cell = bptt.elman(INPUTS, hidden)
    xs = jax.random.normal(jax.random.key(0), (steps, INPUTS))
    return cell, (cell.init(jax.random.key(1)), cell.initial_carry(), xs)


def loss(scan, cell, params, init, xs):
    """A loss of the last state alone: outputs that a loss needs would take T·H bytes whatever the strategy."""
    return jnp.sum(scan(cell, params, init, xs)[0] ** 2)


def measured(steps, hidden, repeats):
    """{(strategy, phase): {quantity: value}} at one size."""
    cell, args = problem(steps, hidden)
    functions = {("all", "forward"): partial(loss, bptt.scan, cell)}
    for name, scan in STRATEGIES.items():
        functions[name, "total"] = jax.value_and_grad(partial(loss, scan, cell))
    found = {
        key: {"flops": cost.flops, "compiler's flops": cost.compiler_flops, "bytes": cost.temporary_bytes, "seconds": s}
        for key, (cost, s) in harness.measure(functions, args, repeats).items()
    }
    forward = found["all", "forward"]
    for name in STRATEGIES:
        total = found[name, "total"]
        found[name, "backward"] = {q: total[q] - forward[q] for q in total} | {"bytes": total["bytes"]}
    return found


def exponent(sizes, values):
    values = np.asarray(values, float)
    if not (values > 0).all():
        return float("nan")
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it runs; writes nothing")
    quick = parser.parse_args().quick
    steps = [64, 256] if quick else [64, 256, 1024, 4096, 16384, 65536]
    hidden = [16, 64] if quick else [32, 64, 128, 256, 512, 1024]
    fixed_hidden, fixed_steps, repeats = (32, 64, 2) if quick else (64, 512, 7)

    over_steps = {T: measured(T, fixed_hidden, repeats) for T in steps}
    over_hidden = {H: measured(fixed_steps, H, repeats) for H in hidden}
    rows = []
    for key in sorted(over_steps[steps[0]]):
        strategy, phase = key
        for quantity in ("flops", "seconds", "bytes"):
            if quantity == "bytes" and phase != "total":
                continue  # a forward pass alone saves nothing; what it saves for the backward pass is in the total
            T, H = EXPECTED.get(f"{quantity} of {strategy}", EXPECTED[quantity])
            rows.append(
                (
                    strategy,
                    phase,
                    quantity,
                    f"T^{exponent(steps, [over_steps[s][key][quantity] for s in steps]):.2f}",
                    f"H^{exponent(hidden, [over_hidden[h][key][quantity] for h in hidden]):.2f}",
                    f"O({'√T' if T == 0.5 else 'T'}·{'H²' if H == 2 else 'H'})",
                )
            )
    head = ("strategy", "phase", "quantity", "against T", "against H", "expected")
    sizes = (
        f"T from {steps[0]:,} to {steps[-1]:,} at H = {fixed_hidden}; H from {hidden[0]:,} to {hidden[-1]:,} at "
        f"T = {fixed_steps}; elman, {INPUTS} inputs, batch 1, float32, loss of the last state."
    )
    text = f"# Cost of BPTT, measured\n\n{harness.machine()}\n\n{sizes}\n\n{harness.table(head, rows)}\n"
    compiler = [over_steps[s]["scan", "total"]["compiler's flops"] for s in steps]
    growth = exponent(steps, compiler)
    text += f"\nThe compiler's own count of flops grows as T^{growth:.2f}: it counts a loop's body once.\n"
    text += """
Expected is the textbook's table, with the square root of T for the bytes of checkpointed_scan. The exponents are not whole
for three reasons. Flops: the product with the inputs, T·H·8. Seconds: fixed costs at small sizes. Bytes: the gradient of
the weights is added up in one more array of H² numbers, which is larger than the states that checkpointed_scan keeps, and
at large H than those of adjoint_scan; and the segment of time that adjoint_scan contracts at once is half of a short
sequence.
"""
    print(text)
    if not quick:
        harness.RESULTS.mkdir(exist_ok=True)
        (harness.RESULTS / "complexity.md").write_text(text)
        draw(over_steps, over_hidden).savefig(harness.RESULTS / "complexity.png", dpi=110)


def draw(over_steps, over_hidden):
    figure = Figure(figsize=(11, 6.5), layout="constrained")
    panels = figure.subplots(2, 3, sharex="row")
    for row, (sizes, axis) in enumerate(((over_steps, "time steps T"), (over_hidden, "hidden size H"))):
        for axes, quantity in zip(panels[row], ("flops", "seconds", "bytes"), strict=True):
            x = np.array(list(sizes))
            for colour, mark, name in zip(COLOURS, "os^", STRATEGIES, strict=False):
                values = np.array([sizes[size][name, "total"][quantity] for size in sizes])
                axes.plot(x, values, color=colour, marker=mark, label=name)
            T, H = EXPECTED[quantity]
            reference = np.array([sizes[size]["scan", "total"][quantity] for size in sizes])
            power = H if row else T
            axes.plot(x, 2 * reference[-1] * (x / x[-1]) ** power, "k:", label="slope of the textbook's table")
            axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=f"{quantity}, value and gradient")
            axes.set_xticks(x, [f"{size:,}" for size in x], fontsize=8)
            axes.minorticks_off()
            axes.grid(alpha=0.25)
    handles = panels[0][0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False)
    return figure


if __name__ == "__main__":
    main()
