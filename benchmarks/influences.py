r"""What an influence costs, and how far the gradients that it gives are from the true ones.

- `rtrl` beside the products J M + F that it can't do without;
- every influence beside BPTT by `adjoint_scan`, a step of one row; bytes at 100 and at 10,000 time steps;
- `rtrl` of cells whose units don't read each other, in the closed form;
- cosines with the true gradient on chaotic series, after training with the true one, beside those that were published.

Milliseconds are medians of calls that take turns; ratios are of medians, and say little where the load of the machine was well above 1. float32, one row, four features, and the mean of all
squared outputs for a loss.

    python benchmarks/influences.py [--quick] [--only products cells diagonal bytes cosines]
"""

import os
import time
from functools import partial
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbptt as bptt
from jaxbptt import influences, losses, tasks
from jaxbptt.analysis.cost import compile_and_cost

FEATURES = 4
INFLUENCES = {
    "rtrl": influences.rtrl,
    "snap(1)": partial(influences.snap, 1),
    "uoro": influences.uoro,
    "kf_rtrl": influences.kf_rtrl,
    "low_rank(4)": partial(influences.low_rank, 4),
    "rflo": influences.rflo,
    "eprop": influences.eprop,
}
RANDOM = {"uoro", "kf_rtrl", "low_rank(4)"}
DIAGONAL = {
    "min_gru": bptt.min_gru,
    "lru": partial(bptt.lru, output_size=FEATURES, r_min=0.9, r_max=0.999),
    "rg_lru": bptt.rg_lru,
}


class Problem(NamedTuple):
    """A cell, its params, first carry and inputs."""

    cell: bptt.Cell
    params: Any
    init: Any
    xs: Any


def problem(make, n, steps):
    cell = make(FEATURES, n)
    return Problem(
        cell,
        cell.init(jax.random.key(0)),
        cell.initial_carry(),
        jax.random.normal(jax.random.key(1), (steps, FEATURES)),
    )


def mean_square(p, scan):
    """A function of params, init and inputs."""
    return lambda params, init, xs: jnp.mean(scan(p.cell, params, init, xs)[1] ** 2)


def forward(influence):
    return partial(bptt.forward_scan, influence=influence, key=jax.random.key(2))


def products(n, steps, repeats):
    """A step of `rtrl`, and what is left of it when J and F are given."""
    p = problem(bptt.gru, n, steps)
    influence = influences.rtrl()
    step = p.cell.step
    M = influence.init(step, p.params, p.init, p.xs[0])
    J = jax.jacfwd(lambda h: step(p.params, h, p.xs[0])[0])(p.init)
    F = jax.jacfwd(lambda params: step(params, p.init, p.xs[0])[0])(p.params)

    def whole(params, init, xs, M, J, F):
        def body(state, x):
            h, M = state
            return (step(params, h, x)[0], influence.advance(step, params, h, x, M, None)), None

        return jax.lax.scan(body, (init, M), xs)[0]

    def alone(params, init, xs, M, J, F):
        def body(M, _):
            return jax.tree.map(lambda leaf, new: (J @ leaf.reshape(n, -1)).reshape(leaf.shape) + new, M, F), None

        return jax.lax.scan(body, M, length=steps)[0]

    args = p.params, p.init, p.xs, M, J, F
    gradient = jax.value_and_grad(mean_square(p, bptt.forward_scan))
    functions = {
        "J M + F alone": alone,
        "rtrl, with the step itself": whole,
        "value and gradient by forward_scan": lambda params, init, xs, *_: gradient(params, init, xs),
    }
    found = harness.measure(functions, args, repeats)
    base = found["J M + F alone"][1]
    numbers = sum(leaf.size for leaf in jax.tree.leaves(M))
    rows = [(name, f"{1e6 * s / steps:.1f}", f"{s / base:.2f}") for name, (_, s) in found.items()]
    return (
        f"A gru, n = {n}, {steps} steps in one compiled loop; M has {numbers:,} numbers, and the products are "
        f"{2 * n * numbers / 1e6:.1f} million operations a step.\n\n"
        + harness.table(("a step", "µs", "of the products'"), rows)
    )


def contenders(p, names):
    """Gradients by BPTT and by each influence."""
    found = {"adjoint_scan": bptt.adjoint_scan} | {name: forward(INFLUENCES[name]()) for name in names}
    return {name: jax.value_and_grad(mean_square(p, scan)) for name, scan in found.items()}


def beside_bptt(makes, sizes, names, steps, repeats):
    """Microseconds a step, and how many times BPTT's."""
    rows = []
    for kind, make in makes.items():
        for n in sizes:
            p = problem(make, n, steps)
            functions = {"forward pass": mean_square(p, bptt.scan), **contenders(p, names)}
            found = {name: s for name, (_, s) in harness.measure(functions, p[1:], repeats).items()}
            base = found["adjoint_scan"]
            ratios = [f"{1e6 * s / steps:.1f} ({s / base:.2f})" for s in found.values()]
            rows.append((kind, n, *ratios))
            print(*rows[-1], flush=True)
            head = ("cell", "n", *found)
    return harness.table(head, rows)


def kibibytes(makes, n, names, lengths):
    """Temporaries of a gradient whose cotangents of the outputs are given, so that these and the outputs are not among them."""
    scans = {"adjoint_scan": bptt.adjoint_scan} | {name: forward(INFLUENCES[name]()) for name in names}
    rows = []
    for kind, make in makes.items():
        p = problem(make, n, 1)
        found = {name: [temporary(p, scan, length) for length in lengths] for name, scan in scans.items()}
        rows.append((kind, n, *(" / ".join(f"{b / 1024:,.0f}" for b in of_lengths) for of_lengths in found.values())))
        print(*rows[-1], flush=True)
    return harness.table(("cell", "n", *scans), rows)


def temporary(p, scan, length):
    def pulled(params, init, xs, ys_bar):
        return jax.vjp(lambda params: scan(p.cell, params, init, xs)[1], params)[1](ys_bar)

    xs = jax.ShapeDtypeStruct((length, FEATURES), jnp.float32)
    _, ys = jax.eval_shape(partial(bptt.scan, p.cell), p.params, p.init, xs)
    _, cost = compile_and_cost(pulled, p.params, p.init, xs, ys)
    return cost.temporary_bytes


# Cosines on chaotic series


ROWS = 8
WINDOW = 200
# Means over ten seeds, github.com/sonaradarcn/sketched-rtrl, results/round1/STATS_gradcos.md at commit bb6055e.
PUBLISHED = {
    "hénon": {"snap(1)": 0.76, "kf_rtrl": 0.63, "rflo": 0.31, "uoro": 0.05},
    "mackey_glass": {"snap(1)": 0.40, "kf_rtrl": 0.43, "rflo": 0.34, "uoro": 0.06},
    "lorenz": {"snap(1)": 0.35, "kf_rtrl": 0.48, "rflo": 0.21, "uoro": 0.05},
}


ABOUT_COSINES = """
elman, n = {n}, reading the present value of one chaotic number, {rows} rows, windows of {window} steps from a carry of zeros; mean
squared error of the next value; means ± standard deviations over {seeds} seeds. Weights after {updates:,} updates of Adam at
0.001, each by the exact gradient of one window. Cosines are those of the recurrent weights' gradient, W_hh, W_xh and b together,
with the exact one, in a window that follows those of training: of the window's gradient, as `score_gradients` has it, the mean over
{draws} draws where the estimate is random; and of single steps' gradients, that of one step's error with respect to all weights
before, averaged over the steps of the window. The latter is what was published.

Published: github.com/sonaradarcn/sketched-rtrl, results/round1/STATS_gradcos.md, means over ten seeds. Alike: the cell and how its
weights start (uniform in ±1/√n), n, 8 rows, one number in and one out, resets every 200 steps, Adam at 0.001, `rflo` with a leak
of 0.9 a step that the cell itself does not have, float32. Different there: each method trains its own network, with an update at
every step, so the influence is carried across changing weights, exact one included, and weights are those that the method leads to;
15,000 steps, cosines of the last 200 of every 500 of the last 2,500; Lorenz and Mackey–Glass by Euler's method (dt = 0.01, every
second state; dt = 1), here by Runge and Kutta's; the read-out's bias does not start at 0.
"""


def henon(key, steps):
    """The first number of Hénon's map, x ↦ 1 − 1.4 x² + y, y ↦ 0.3 x, after 100 steps."""
    start = jax.random.uniform(key, (2, ROWS), minval=-0.1, maxval=0.1)

    def one(state, _):
        x, y = state
        return (1 - 1.4 * x**2 + y, 0.3 * x), x

    return jax.lax.scan(one, tuple(start), length=steps + 100)[1][100:]


def lorenz(key, steps):
    """The first number of Lorenz's equations, 0.02 units of time a step."""
    near = jnp.array([0.0, 0.0, 25.0]) + 8 * jax.random.normal(key, (ROWS, 3))
    return tasks.lorenz_series(steps, dt=0.02, initial=near, transient=50.0)[..., 0]


def mackey_glass(key, steps):
    """One unit of time a step."""
    first, start = jax.random.split(key)
    initial = jax.random.uniform(first, (ROWS,), minval=0.2, maxval=1.4)
    series = tasks.mackey_glass_series(steps + 500, initial=initial, transient=500)[..., 0]
    starts = jax.random.randint(start, (ROWS,), 0, 500)
    return series[starts + jnp.arange(steps)[:, None], jnp.arange(ROWS)]


SYSTEM_NAMES = {"hénon": "Hénon", "mackey_glass": "Mackey–Glass", "lorenz": "Lorenz"}
SYSTEMS = {"hénon": henon, "mackey_glass": mackey_glass, "lorenz": lorenz}


class Trained(NamedTuple):
    """A network after exact training, and a window it has not seen."""

    params: Any
    xs: Any
    ys: Any
    error: Any


class Forecaster(NamedTuple):
    """A network that says the next number."""

    cell: bptt.Cell
    net: bptt.Network

    def loss(self, params, carry, chunk, *, scan, key):
        carry, outputs = self.net.apply(params, carry, chunk.xs, scan=scan)
        return losses.mean_squared_error(outputs, chunk.targets), carry

    def trained(self, draw, updates, key):
        """After updates on windows that follow each other, each from a carry of zeros."""
        keys = jax.random.split(key)
        series = draw(keys[0], (updates + 1) * WINDOW + 1)
        series = ((series - series.mean(0)) / series.std(0))[..., None]
        xs, ys = (part.reshape(updates + 1, WINDOW, ROWS, 1) for part in (series[:-1], series[1:]))
        init, update = bptt.tbptt(self.loss, optax.adam(1e-3))
        zeros = self.cell.initial_carry((ROWS,))

        def one(state, chunk):
            state, metrics = update(state._replace(carry=zeros), chunk)
            return state, metrics.loss

        chunks = bptt.streams.Chunk(xs[:-1], ys[:-1])
        state, errors = jax.lax.scan(one, init(self.net.init(keys[1]), zeros, key), chunks)
        return Trained(state.params, xs[-1], ys[-1], errors[-50:].mean())


def forecaster(n):
    """The cell and the start of the published comparison."""
    uniform = jax.nn.initializers.uniform(2 / np.sqrt(n))
    centred = lambda key, shape, dtype: uniform(key, shape, dtype) - 1 / np.sqrt(n)  # noqa: E731
    cell = bptt.elman(1, n, recurrent_init=centred, input_init=centred)
    return Forecaster(cell, bptt.network(cell, 1, bias=True, output_init=centred))


def cosine(a, b):
    a, b = (jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(tree)]) for tree in (a, b))
    return jnp.vdot(a, b) / (jnp.linalg.norm(a) * jnp.linalg.norm(b))


def step_cosines(net, estimates, trained, key):
    """For each influence the mean over a window of the cosines of single steps' gradients: of the error of a step, with respect to
    the weights of all steps before."""  # noqa: D205, D209
    step, params, W = net.cell.step, trained.params.cell, trained.params
    kinds = {"exact": influences.rtrl(), **estimates}
    init = net.cell.initial_carry()

    def one(state, at_t):
        hs, Ms = state
        x, y, key = at_t
        keys = jax.random.split(key, ROWS)
        for name, kind in kinds.items():
            advance = lambda M, h, x, key, kind=kind: kind.advance(step, params, h, x, M, key)  # noqa: E731
            Ms = Ms | {name: jax.vmap(advance)(Ms[name], hs, x, keys)}
        hs, _ = step(params, hs, x)
        bars = jax.grad(lambda hs: losses.mean_squared_error((hs @ W.W_hy.T + W.b_y)[None], y[None]))(hs)
        found = {
            name: jax.tree.map(lambda leaf: leaf.sum(0), jax.vmap(kind.pull)(Ms[name], bars))
            for name, kind in kinds.items()
        }
        return (hs, Ms), {name: cosine(found[name], found["exact"]) for name in estimates}

    start = {name: kind.init(step, params, init, trained.xs[0, 0]) for name, kind in kinds.items()}
    hs, Ms = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (ROWS, *leaf.shape)), (init, start))
    keys = jax.random.split(key, WINDOW)
    return jax.tree.map(jnp.mean, jax.lax.scan(one, (hs, Ms), (trained.xs, trained.ys, keys))[1])


def window(net, trained):
    """What `score_gradients` takes: the cell, its params, first carry and inputs, and the loss of a window."""
    W = trained.params

    def loss(carry, ys):
        return losses.mean_squared_error(ys @ W.W_hy.T + W.b_y, trained.ys)

    return net.cell, W.cell, net.cell.initial_carry((ROWS,)), trained.xs, loss


def window_cosines(net, scans, trained, keys):
    """The cosine of the whole window's gradient by each strategy, the mean over keys; compiled once for all seeds and systems."""
    cell, params, init, xs, loss = window(net, trained)

    def gradient(scan, **options):
        return jax.grad(lambda params: loss(*scan(cell, params, init, xs, **options)))(params)

    exact = gradient(bptt.adjoint_scan)
    found = {}
    for name, scan in scans.items():
        if name in RANDOM:
            found[name] = jax.lax.map(lambda key, scan=scan: cosine(gradient(scan, key=key), exact), keys).mean()
        else:
            found[name] = cosine(gradient(scan), exact)
    return found


def board(net, scans, trained, keys):
    """The scoreboard of one network."""
    rows = bptt.score_gradients(*window(net, trained), scans=scans, keys=keys, repeats=1).rows
    head = ("estimate", "cosine", "relative error", "norm ratio", "bias", "± of it", "variance")
    cells = [
        (row.name, f"{row.cosine:.3f}", *(f"{value:.2g}" for value in row[2:5]), f"{row[5]:.1g}", f"{row[6]:.2g}")
        for row in rows
    ]
    return harness.table(head, cells)


def cosines(n, updates, seeds, draws, systems, names):
    """Tables for each system, with the published numbers."""
    net = forecaster(n)
    estimates = {name: influences.rflo(leak=0.9) if name == "rflo" else INFLUENCES[name]() for name in names}
    scans = {f"truncated at {K}": partial(bptt.truncated_scan, truncation_length=K) for K in (1, 10, 50)}
    scans |= {name: partial(bptt.forward_scan, influence=influence) for name, influence in estimates.items()}
    of_steps = jax.jit(partial(step_cosines, net, estimates))
    of_windows = jax.jit(partial(window_cosines, net, scans))
    texts = [
        ABOUT_COSINES.format(n=n, rows=ROWS, window=WINDOW, seeds=len(seeds), updates=updates, draws=draws).strip()
    ]
    for system in systems:
        windows, steps, errors = [], [], []
        train = jax.jit(partial(net.trained, SYSTEMS[system], updates))
        for seed in seeds:
            start = time.perf_counter()
            trained = train(jax.random.key(seed))
            keys = jax.random.split(jax.random.key(seed + 100), draws)
            errors.append(float(trained.error))
            steps.append(jax.device_get(of_steps(trained, keys[0])))
            windows.append(jax.device_get(of_windows(trained, keys)))
            print(system, seed, f"error {errors[-1]:.4f}", f"{time.perf_counter() - start:.0f} s", flush=True)
        rows = []
        for name in scans:
            of_step = spread([found[name] for found in steps]) if name in estimates else ""
            published = PUBLISHED[system].get(name)
            rows.append(
                (name, spread([w[name] for w in windows]), of_step, "" if published is None else f"{published:.2f}")
            )
        head = ("estimate", "cosine, a window's gradient", "cosine, a step's gradient", "published")
        texts.append(
            f"### {SYSTEM_NAMES[system]}\n\nSquared error {spread(errors, 4)} of the variance.\n\n{harness.table(head, rows)}\n\n"
            f"`score_gradients` for the last seed:\n\n{board(net, scans, trained, keys)}"
        )
        print(texts[-1], flush=True)
    return "\n\n".join(texts)


def spread(values, digits=2):
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.{digits}f} ± {np.std(values):.{digits}f}"


def sections(quick):
    """Functions without arguments, by name, that return Markdown."""
    if quick:
        gated = {"gru": bptt.gru}
        return {
            "products": partial(products, 4, 10, 2),
            "cells": partial(beside_bptt, gated, (4,), ["snap(1)"], 10, 2),
            "diagonal": partial(beside_bptt, {"min_gru": bptt.min_gru}, (4,), ["rtrl"], 10, 2),
            "bytes": partial(kibibytes, gated, 4, ["uoro"], (10,)),
            "cosines": partial(cosines, 4, 2, (0,), 2, ["lorenz"], ["uoro"]),
        }
    dense = {"elman": bptt.elman, "gru": bptt.gru, "lstm": bptt.lstm}
    return {
        "products": partial(products, 32, 200, 31),
        "cells": partial(beside_bptt, dense, (64, 128), list(INFLUENCES)[1:], 200, 15),
        "diagonal": partial(beside_bptt, DIAGONAL, (64, 256), ["rtrl"], 1_000, 31),
        "bytes": lambda: (
            "KiB of temporaries for T = 100 / 10,000.\n\n"
            + kibibytes({**dense, **DIAGONAL}, 64, list(INFLUENCES), (100, 10_000))
        ),
        "cosines": partial(cosines, 64, 1_000, range(5), 16, list(SYSTEMS), list(INFLUENCES)[1:]),
    }


TITLES = {
    "products": "`rtrl` and its products",
    "cells": "A step beside BPTT's",
    "diagonal": "`rtrl` where units don't read each other",
    "bytes": "Temporary bytes",
    "cosines": "Cosines on chaotic series",
}


def main():
    options = harness.section_options(__doc__ or "", TITLES)
    method = " ".join((__doc__ or "").split("\n\n")[2].split())
    head = f"# Influences: what they cost and what they are worth, measured\n\n{method}"
    path = harness.RESULTS / f"influences_{jax.default_backend()}_jax_{jax.__version__}.md"
    for name, measure in sections(options.quick).items():
        if name in options.only:
            measured = measure()
            text = f"{harness.machine(f'load {os.getloadavg()[0]:.1f}')}\n\n{measured}"
            print(f"## {TITLES[name]}\n\n{text}\n", flush=True)
            if not options.quick:
                harness.write_sections(path, head, list(TITLES.values()), {TITLES[name]: text})


if __name__ == "__main__":
    main()
