"""The value and gradient of one recurrent layer, ours beside JAX's, flax's, equinox's, haiku's and torch's.

All contenders (`layers.py`) run in one process, on the same inputs, and differentiate mean((hs - target)²) with respect to
the parameters. Those that share our parameters have to agree in value and gradient, and all in the number of operations,
before anything is timed. They then take turns, in a new random order in each round; figures are medians over the rounds.
The floor is the same multiply-adds as three dense products without a recurrence. Steps that are not this library's, two of
them convolutional, are run by JAX alone and by our strategies for any step.

    python benchmarks/peers.py [--quick] [--repeats 15] [--cells elman,gru,lstm] [--sizes 0,1,2]
    python benchmarks/peers.py --draw benchmarks/results/NAME.json

Needs the extra `test`, and includes haiku and torch where they are installed.
"""

import argparse
import json
import math
import time
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import harness
import jax
import jax.numpy as jnp
import layers
import numpy as np
from layers import Size
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from jaxbptt.plots.figure import COLOURS, MARKERS, NEUTRAL, add_legend, label_axes

SIZES = [Size(1024, 1, 32, 128), Size(256, 32, 32, 128), Size(128, 32, 64, 512), Size(256, 64, 128, 256)]
SIZES += [Size(4096, 8, 16, 64)]
TINY, QUICK_SIZES = Size(2, 1, 2, 3), [Size(16, 32, 8, 32)]
BASE, BEST, DERIVED = "lax.scan + jax.grad", "adjoint_scan", "adjoint_scan (derived)"
TORCH, FLOOR = "torch", "dense products alone"
INSIDE_CUDNN = (layers.CUDNN, "cudnn_scan")
FASTER = "times faster than lax.scan + jax.grad"
MUTED = ("#8a8a8a", "#5f7f95", "#7fa08c", "#a88fb0", "#b59a6a", "#6b6b6b", "#a07070", "#86a8b8")
OURS = ("scan", "checkpointed_scan", BEST, DERIVED)


def loss(run, params, xs, target):
    return jnp.mean((run(params, xs) - target) ** 2)


def compiled(contenders, args, compiles):
    """Value and gradient of each contender, compiled, its cost, and the seconds that compiling took each time, in turns."""
    calls, costs, seconds = {}, {}, {name: [] for name in contenders}
    for _ in range(compiles):
        for name, layer in contenders.items():
            jax.clear_caches()
            gradient = jax.value_and_grad(partial(loss, layer.run))
            calls[name], costs[name] = harness.compile_and_cost(gradient, layer.params, *args)
            seconds[name].append(costs[name].compile_seconds)
    return calls, costs, {name: float(np.median(found)) for name, found in seconds.items()}


def arguments(size):
    shapes = (size.T, size.B, size.D), (size.T, size.B, size.H)
    keys = jax.random.split(jax.random.key(1))
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def measured(kind, size, repeats, compiles):
    """Figures of each contender at one size."""
    args = arguments(size)
    contenders = layers.in_jax(kind, size)
    calls, costs, compile_seconds = compiled(contenders, args, compiles)
    calls = {name: partial(call, contenders[name].params, *args) for name, call in calls.items()}
    products, matrices = layers.dense_products(kind, size)
    call, costs[FLOOR] = harness.compile_and_cost(products, *matrices)
    calls[FLOOR] = partial(call, *matrices)
    by_torch = layers.by_torch(kind, size, contenders[BASE].params, *args)
    if by_torch:
        calls[TORCH] = by_torch
    check(f"{kind} {size}", calls, costs, set(layers.ours(kind, size)))

    found = timed(calls, costs, compile_seconds, repeats)
    return {"cell": kind, "size": str(size), **size._asdict(), "contenders": found}


def measured_step(name, make, repeats, compiles):
    """Figures of a foreign step in each strategy; inputs and targets are random."""
    step, params, init, shape = make()
    contenders = layers.of_step(step, params, init)
    xs = jax.random.normal(jax.random.key(1), shape)
    ys = jax.eval_shape(contenders[BASE].run, params, xs)
    args = xs, jax.random.normal(jax.random.key(2), ys.shape)
    calls, costs, compile_seconds = compiled(contenders, args, compiles)
    calls = {name: partial(call, params, *args) for name, call in calls.items()}
    check(name, calls, costs, set(calls))
    return {"step": name, "contenders": timed(calls, costs, compile_seconds, repeats)}


def timed(calls, costs, compile_seconds, repeats):
    """Times of each contender, with its costs."""
    rounds = {name: 1e3 * np.array(seconds) for name, seconds in in_turns(calls, repeats).items()}
    medians = {name: float(np.median(ms)) for name, ms in rounds.items()}
    found = {}
    for name, ms in medians.items():
        found[name] = {
            "milliseconds": ms,
            "quartiles of the milliseconds": np.percentile(rounds[name], (25, 75)).tolist(),
            FASTER: medians[BASE] / ms,
        }
        if FLOOR in medians:
            found[name]["times the floor"] = ms / medians[FLOOR]
        if name in costs:
            found[name] |= {
                "compile seconds": compile_seconds.get(name, costs[name].compile_seconds),
                "temporary bytes": costs[name].temporary_bytes,
                "operations": costs[name].flops,
            }
    return found


def check(where, calls, costs, shared):
    """Raise unless contenders that share parameters agree in their results, and all in their operations."""
    tolerance = 2e-2 if jax.default_backend() == "gpu" else 1e-3  # float32 products are in TF32 on a GPU
    results = {name: call() for name, call in calls.items()}
    if TORCH in calls:
        results[TORCH] = layers.from_torch(*results[TORCH])
    expected = jax.tree.leaves(results[BASE])
    if layers.CUDNN in calls:
        results[layers.CUDNN] = layers.from_cudnn(*results[layers.CUDNN], results[BASE][1])
    for name in {*shared, TORCH, layers.CUDNN} & set(calls):
        for mine, reference in zip(jax.tree.leaves(results[name]), expected, strict=True):
            error = float(np.max(np.abs(mine - reference)) / np.max(np.abs(reference)))
            if not error <= tolerance:
                raise AssertionError(f"{where}: {name} differs from {BASE} by {error:.1e} of the largest entry.")
    for name, cost in costs.items():
        ratio = cost.flops / costs[BASE].flops
        most = 1.45 if "checkpoint" in name else 1.2  # the forward pass is a third, and is computed twice there
        # The inside of cuDNN's call can't be counted, nor can convolutions, which make a step's operations nan.
        if name not in INSIDE_CUDNN and not math.isnan(ratio) and not 0.8 <= ratio <= most:
            raise AssertionError(f"{where}: {name} has {ratio:.2f} times the operations of {BASE}.")


def in_turns(calls, repeats):
    """Seconds of each call in each round. The order changes, since some calls leave the machine busy for the next."""
    order = np.random.default_rng(0)
    seconds = {name: [] for name in calls}
    for _ in range(repeats):
        for name in order.permutation(list(calls)).tolist():
            start = time.perf_counter()
            jax.block_until_ready(calls[name]())
            seconds[name].append(time.perf_counter() - start)
            if name == TORCH:
                time.sleep(0.02)  # its threads keep spinning for some milliseconds
    return seconds


def compile_times(kind, lengths, compiles):
    """Median compile seconds of adjoint_scan and lax.scan by number of time steps."""
    found = []
    for steps in lengths:
        size = Size(steps, 1, 16, 64)
        contenders = {name: layer for name, layer in layers.ours(kind, size).items() if name in (BASE, BEST)}
        _, _, seconds = compiled(contenders, jax.eval_shape(partial(arguments, size)), compiles)
        found += [{"cell": kind, "contender": name, "T": steps, "compile seconds": seconds[name]} for name in seconds]
    return found


def over(values, worst):
    """Geometric mean and worst of values by layer, and where the worst is."""
    where = worst(values, key=values.get)
    mean = math.exp(np.mean(np.log(list(values.values()))))
    return {"layers": len(values), "geometric mean": mean, "worst": values[where], "worst at": where}


def summary(found):
    """Over all layers: each contender against lax.scan, and each adjoint against its rivals."""
    by_layer = {f"{layer['cell']} {layer['size']}": layer["contenders"] for layer in found}
    names = list(dict.fromkeys(name for contenders in by_layer.values() for name in contenders))

    def compared(name):
        def ratio(quantity, *rivals):
            """To the least of the rivals, in each layer that has one of them."""
            least = {w: min((c[n][quantity] for n in rivals if n in c), default=None) for w, c in by_layer.items()}
            return {w: by_layer[w][name][quantity] / best for w, best in least.items() if best}

        def faster(*rivals):
            return {where: 1 / value for where, value in ratio("milliseconds", *rivals).items()}

        floor = {where: value for where, value in ratio("milliseconds", FLOOR).items() if where in wide}
        found = {
            "times faster than the fastest other in JAX": (faster(*in_jax), min),
            "times faster than torch": (faster(TORCH), min),
            "times the floor, B ≥ 32": (floor, max),
            "temporary bytes, of lax.scan's": (ratio("temporary bytes", BASE), max),
            "compile seconds, of lax.scan's": (ratio("compile seconds", BASE), max),
        }
        return {quantity: over(values, worst) for quantity, (values, worst) in found.items() if values}

    each = {name: over({w: c[name][FASTER] for w, c in by_layer.items() if name in c}, min) for name in names}
    in_jax = [name for name in names if name not in (*OURS, TORCH, FLOOR)]
    wide = {f"{layer['cell']} {layer['size']}" for layer in found if layer["B"] >= 32}
    return {FASTER: each, BEST: compared(BEST), DERIVED: compared(DERIVED)}


def markdown(results):
    """All tables."""
    text = [
        f"# One recurrent layer in every library, measured\n\n{results['machine']}",
        f"Value and gradient of mean((hs - target)²) with respect to the parameters, float32; medians of "
        f"{results['rounds']} rounds, of three for compile seconds. The floor is {FLOOR}: as many multiply-adds, without a "
        "recurrence.",
    ]
    columns = {"milliseconds": 1, FASTER: 1, "times the floor": 1, "compile seconds": 1, "temporary bytes": 2**20}

    def contenders_table(title, contenders, columns):
        rows = [
            (name, *(f"{of[key] / unit:.2f}" if key in of else "–" for key, unit in columns.items()))
            for name, of in contenders.items()
        ]
        return harness.table((title, *list(columns)[:-1], "temporary MiB"), rows)

    for layer in results["layers"]:
        text.append(contenders_table(f"{layer['cell']}, T/B/D/H = {layer['size']}", layer["contenders"], columns))
    del columns["times the floor"]
    text.append("Steps that are not this library's, with respect to their parameters:")
    text += [contenders_table(of["step"], of["contenders"], columns) for of in results["steps of others"]]
    for title, of in results["summary"].items():
        head = ("layers", "geometric mean", "worst", "worst at")
        rows = [(name, *(f"{v[k]:.2f}" if isinstance(v[k], float) else v[k] for k in head)) for name, v in of.items()]
        text.append(harness.table((title, *head), rows))
    lengths = list(dict.fromkeys(of["T"] for of in results["compile seconds by time steps"]))
    rows = {}
    for of in results["compile seconds by time steps"]:
        rows.setdefault((of["cell"], of["contender"]), []).append(f"{of['compile seconds']:.3f}")
    head = ("compile seconds, B/D/H = 1/16/64", *(f"T = {steps:,}" for steps in lengths))
    text.append(harness.table(head, [(" ".join(key), *row) for key, row in rows.items()]))
    return "\n\n".join(text) + "\n"


def draw(results):
    """One panel for each cell, one row for each size, and in it a mark for each contender, always at the same height."""
    cells, sizes = (list(dict.fromkeys(layer[key] for layer in results["layers"])) for key in ("cell", "size"))
    names = list(dict.fromkeys(name for layer in results["layers"] for name in layer["contenders"]))
    muted = [name for name in names if name not in (BASE, BEST, DERIVED, FLOOR)]
    looks = {
        BEST: {"color": COLOURS[1], "marker": "o", "s": 75, "zorder": 5, "edgecolor": "white"},
        DERIVED: {"color": COLOURS[0], "marker": "D", "s": 40, "zorder": 6, "edgecolor": "white"},
    }
    for name, colour, mark in zip(muted, MUTED, (*MARKERS[1:], "X", "<", ">"), strict=False):
        looks[name] = {"color": colour, "marker": mark, "s": 26, "zorder": 3}

    height = 2.1 + 0.7 * len(sizes)
    figure = Figure(figsize=(9, height), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.6 / height))
    title = "One recurrent layer, value and gradient: speed against lax.scan + jax.grad"
    figure.text(0.01, 1 - 0.3 / height, title, size=12)
    figure.text(0.01, 1 - 0.52 / height, results["machine"], size=7.5, color="#555555")
    panels = figure.subplots(1, len(cells), sharex=True, sharey=True, squeeze=False)[0]
    for axes, cell in zip(panels, cells, strict=True):
        label_axes(axes, cell, "times faster" if len(cells) > 1 else FASTER, "")
        axes.set_xscale("log", base=2)
        axes.grid(axis="y", visible=False)
        axes.axvline(1, color="#444444", linewidth=0.8, label=BASE)
        for layer in (layer for layer in results["layers"] if layer["cell"] == cell):
            row = sizes.index(layer["size"])
            axes.axhline(row + 0.5, color="#dddddd", linewidth=0.6, zorder=0)
            floor = layer["contenders"][FLOOR][FASTER]
            axes.plot([floor, floor], [row - 0.4, row + 0.4], color=NEUTRAL, linewidth=2.5, label=FLOOR)
            for i, (name, look) in enumerate(looks.items()):
                if name in layer["contenders"]:
                    y = row + 0.8 * ((i + 0.5) / len(looks) - 0.5)
                    axes.scatter(layer["contenders"][name][FASTER], y, label=name, **look)
    panels[0].set_yticks(range(len(sizes)), sizes)
    panels[0].set_ylim(len(sizes) - 0.5, -0.5)
    panels[0].set_ylabel("T/B/D/H")
    low, high = np.log2(panels[0].get_xlim())
    step = max(1, round((high - low) / 4))
    ticks = [2.0**power for power in range(math.ceil(low), math.floor(high) + 1) if power % step == 0]
    panels[0].set_xticks(ticks, [f"{tick:.2g}" for tick in ticks])
    panels[0].xaxis.set_minor_formatter(NullFormatter())
    add_legend(panels, None)
    return figure


def versions():
    found = []
    for package in ("flax", "equinox", "dm-haiku", "torch"):
        with suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it runs; writes nothing")
    parser.add_argument("--repeats", type=int, default=15, help="rounds")
    parser.add_argument("--cells", default=",".join(layers.STEPS), help="some of them; writes nothing")
    parser.add_argument("--sizes", help="some of them, by index from 0; writes nothing")
    parser.add_argument("--draw", type=Path, metavar="FILE.json", help="only draw the figure of these results again")
    options = parser.parse_args()
    if options.draw:
        draw(json.loads(options.draw.read_text())).savefig(options.draw.with_suffix(".png"), dpi=200)
        return
    backend = jax.default_backend()
    sizes = QUICK_SIZES if options.quick else SIZES
    chosen = sizes if options.sizes is None else [sizes[int(i)] for i in options.sizes.split(",")]
    cells = options.cells.split(",")
    repeats, compiles = (2, 1) if options.quick else (options.repeats, 3)

    found, compile_seconds = [], []
    for kind in cells:
        if not options.quick:  # the first time in a process takes longer
            compiled(layers.in_jax(kind, TINY), arguments(TINY), compiles)
        found += [measured(kind, size, repeats, compiles) for size in chosen]
        compile_seconds += compile_times(kind, (16, 64) if options.quick else (256, 65_536), compiles)
    foreign = layers.QUICK_FOREIGN_STEPS if options.quick else layers.FOREIGN_STEPS
    steps = [measured_step(name, make, repeats, compiles) for name, make in foreign.items()]
    results = {
        "machine": harness.machine(*versions()),
        "backend": backend,
        "rounds": repeats,
        "layers": found,
        "steps of others": steps,
        "summary": summary(found),
        "compile seconds by time steps": compile_seconds,
    }
    text = markdown(results)
    print(text)
    if not options.quick and chosen == sizes and cells == list(layers.STEPS):
        harness.RESULTS.mkdir(exist_ok=True)
        name = f"peers_{backend}_jax_{jax.__version__}"
        (harness.RESULTS / f"{name}.md").write_text(text)
        (harness.RESULTS / f"{name}.json").write_text(json.dumps(results, indent=1) + "\n")
        draw(results).savefig(harness.RESULTS / f"{name}.png", dpi=200)


if __name__ == "__main__":
    main()
