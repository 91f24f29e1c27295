"""What `gpu.py` measures, part by part: each is a function that gives rows, run in a process of its own.

python benchmarks/gpu_parts.py NAME RESULTS.jsonl [--quick]
"""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import gpu_suite
import harness
import jax
import jax.numpy as jnp
import kernels
import layers
import long_sequences
import numpy as np
import peers
import spectra
from layers import CELLS, Size

import jaxbptt as bptt
from jaxbptt import platforms

# Compiling for a GPU takes seconds, and one program takes one core.
COMPILING = ThreadPoolExecutor(min(os.cpu_count() or 1, 16))


def in_order(function, cases):
    """`(case, function(case) or what it raised)`, several computed at once, in the order of the cases."""

    def found(case):
        try:
            return function(case)
        except Exception as error:  # a row says so, and the others are measured
            return error

    yield from zip(cases, COMPILING.map(found, cases), strict=True)


def said(error):
    """The first words of an error."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}" if str(error) else repr(error)


def seconds_of(call, enough=0.5):
    """Median seconds of a call: of as many runs as take `enough` seconds, 3 at least and 20 at most."""
    jax.block_until_ready(call())
    runs = []
    while len(runs) < 3 or (sum(runs) < enough and len(runs) < 20):
        start = time.perf_counter()
        jax.block_until_ready(call())
        runs.append(time.perf_counter() - start)
    return float(np.median(runs))


# --- the device


def device(quick):
    """Its name and memory, and the speeds that all others are compared with."""
    here = jax.devices()[0]
    memory = here.memory_stats() or {}
    yield "", {"": "machine", "value": harness.machine(*peers.versions(), f"jaxlib {jax.lib.__version__}")}
    yield "", {"": "backend", "value": here.client.platform_version.replace("\n", " ")[:80]}
    yield "", {"": "memory", "value": f"{memory.get('bytes_limit', 0) / 2**30:.1f} GiB for JAX"}
    steps = 100 if quick else 10_000
    for name, function in (("an addition", lambda _, h: h + 1), ("a 128 × 128 product", lambda _, h: h @ h)):
        loop = jax.jit(lambda h, function=function: jax.lax.fori_loop(0, steps, function, h))
        microseconds = 1e6 * seconds_of(lambda loop=loop: loop(jnp.eye(128))) / steps
        yield "", {"": f"one iteration of a loop with {name}", "value": f"{microseconds:.2f} µs"}
    size = 256 if quick else 1024 if here.platform == "cpu" else 4096
    a, moved = jnp.ones(16 * size**2), jax.jit(lambda a: a + 1)
    speed = 2 * a.nbytes / seconds_of(lambda: moved(a))
    yield "", {"": f"copy of {a.nbytes / 2**20:.0f} MiB", "value": f"{speed / 1e9:.1f} GB/s"}
    # What XLA tries out for a product takes seconds.
    for dtype, precision in ((jnp.float32, "default"), (jnp.bfloat16, "default"), (jnp.float32, "highest")):
        a = jnp.ones((size, size), dtype)
        product = jax.jit(partial(jnp.matmul, precision=precision))
        speed = 2 * size**3 / seconds_of(lambda product=product, a=a: product(a, a))
        name = f"{size} × {size} product, {jnp.dtype(dtype).name}, precision {precision}"
        yield "", {"": name, "value": f"{speed / 1e12:.2f} TFLOP/s"}


# --- exactness


# What each strategy is tried on. The variants of one differ in what they run, and not in what a step computes.
EVERY, SOME, ONE, AFFINE = (*layers.STEPS, "stack"), ("elman", "stack"), ("lstm",), ("lru", "min_gru")
CELLS_OF = {
    "cudnn_scan": ONE,
    "scan": EVERY,
    "adjoint_scan": EVERY,
    "adjoint_scan (derived)": SOME,
    "checkpointed_scan": SOME,
    "parallel_adjoint_scan": SOME,
    "parallel_scan": AFFINE,
    "newton_scan": ("gru",),
}


def strategies(steps):
    """Each as it is called with a cell."""
    return {
        "scan": bptt.scan,
        "adjoint_scan": bptt.adjoint_scan,
        "adjoint_scan (derived)": lambda cell, *args, **kw: bptt.adjoint_scan(cell.step, *args, **kw),
        "cudnn_scan": bptt.cudnn_scan,
        "checkpointed_scan": bptt.checkpointed_scan,
        "checkpointed_scan(checkpoints=3)": partial(bptt.checkpointed_scan, checkpoints=3),
        "truncated_scan that cuts nothing": partial(bptt.truncated_scan, truncation_length=steps),
        "windowed_scan that cuts nothing": partial(bptt.windowed_scan, window=steps),
        "truncated_scan(truncation_length=4)": partial(bptt.truncated_scan, truncation_length=4),
        "windowed_scan(window=4)": partial(bptt.windowed_scan, window=4),
        "parallel_adjoint_scan": bptt.parallel_adjoint_scan,
        "parallel_scan": bptt.parallel_scan,
        "newton_scan": bptt.newton_scan,
    }


class Setting(NamedTuple):
    """What gradients are compared for."""

    dtype: str
    flags: str
    cell: str


def problem(setting, steps, rows):
    """A cell, params, first carry, inputs and flags, from numpy.

    The weights are small: an elman layer with larger ones is chaotic, so that gradients in float32 differ with each rounding.
    """
    random = np.random.default_rng(0)
    if setting.cell == "stack":
        lower, upper = bptt.lstm(5, 24, dtype=setting.dtype), bptt.gru(24, 40, dtype=setting.dtype)
        cell = bptt.stack(lower, upper)
    else:
        cell = CELLS[setting.cell](5, 40, dtype=setting.dtype)

    def like(tree, scale):
        return jax.tree.map(lambda leaf: (scale * random.standard_normal(leaf.shape)).astype(leaf.dtype), tree)

    params = like(jax.eval_shape(cell.init, jax.random.key(0)), 0.15)
    init = like(jax.eval_shape(lambda: cell.initial_carry((rows,))), 1.0)
    xs = random.standard_normal((steps, rows, 5)).astype(setting.dtype)
    flags = {}
    if setting.flags != "none":
        flags["valid"] = np.arange(steps)[:, None] < random.integers(1, steps + 1, rows)
    if setting.flags == "resets and padding":
        flags |= {"is_first": random.random((steps, rows)) < 0.1, "reset_carry": like(init, 1.0)}
    return cell, params, init, xs, flags


def gradient_on(device, scan, setting, size):
    """Value and gradients of params, first carry and inputs, computed on a device, as numpy arrays."""
    # Set in each thread. TF32 would hide what is wrong by less than 1e-3.
    with jax.enable_x64(setting.dtype == "float64"), jax.default_matmul_precision("highest"):
        cell, params, init, xs, flags = problem(setting, *size)

        def loss(params, init, xs):
            carry, ys = scan(cell, params, init, xs, **flags)
            return jnp.mean(ys**2) + sum(jnp.mean(leaf**2) for leaf in jax.tree.leaves(carry))

        with jax.default_device(device):
            return jax.device_get(jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(params, init, xs))


def exactness(quick):
    """The largest relative error of a leaf of value and gradients, for each cell and reference."""
    size = (9, 3) if quick else (60, 16)
    here, cpu = jax.devices()[0], jax.devices("cpu")[0]
    scans = strategies(size[0])
    flagged = "resets and padding"
    settings = [("float64", flagged), ("float32", flagged), ("float32", "none")]
    # With flags is what can go wrong; without any, only what runs other programs then.
    plain = ("scan", "adjoint_scan", "checkpointed_scan")
    rows = [
        (*setting, name)
        for setting in (settings[1:2] if quick else settings)
        for name in scans
        if name != "cudnn_scan" and (name in plain or setting[1] == flagged)
    ]
    if here.platform == "gpu":
        rows = [("float32", flags, "cudnn_scan") for flags in ("none", "padding")] + rows

    def cells_of(name):
        found = CELLS_OF.get(name, ONE)
        return found[:1] if quick else found

    needed = dict.fromkeys(Setting(*setting, cell) for *setting, name in rows for cell in cells_of(name))
    # Before all others in the queue, so who waits for one of these does not wait for himself.
    references = {
        (setting, device): COMPILING.submit(gradient_on, device, bptt.scan, setting, size)
        for setting in needed
        for device in (here, cpu)
    }

    def compared(row):
        *setting, name = row
        found = {}
        for cell in cells_of(name):
            of_cell = Setting(*setting, cell)
            if name == "scan":
                mine = references[of_cell, here].result()
                found[cell, "CPU"] = bptt.compare_gradients(mine, references[of_cell, cpu].result())
                continue
            mine = gradient_on(here, scans[name], of_cell, size)
            if name.endswith("=4)"):  # biased, so by the same strategy
                found[cell, "CPU"] = bptt.compare_gradients(mine, gradient_on(cpu, scans[name], of_cell, size))
                continue
            found[cell, "CPU"] = bptt.compare_gradients(mine, references[of_cell, cpu].result())
            found[cell, "scan"] = bptt.compare_gradients(mine, references[of_cell, here].result())
        return found

    wrong = 0
    for (dtype, flags, name), found in in_order(compared, rows):
        row = {"dtype": dtype, "flags": flags, "strategy": name}
        if isinstance(found, Exception):
            agrees, row["agrees"] = False, said(found)
        else:
            agrees = all(comparison.agrees for comparison in found.values())
            row["agrees"] = "yes" if agrees else "NO"
            for (cell, where), comparison in found.items():
                row[f"{cell}, {where}"] = f"{max(leaf.relative_error for leaf in comparison.leaves):.0e}"
        wrong += not agrees
        yield "", row
    if wrong:
        raise AssertionError(f"{wrong} of {len(rows)} rows do not agree.")


# --- one layer in every library


def peer_sizes(quick):
    """The few that matter, T/B/D/H: many units, a single row, a long sequence, and what fills the device."""
    if quick:
        return [Size(16, 4, 8, 16)]
    return [Size(256, 64, 64, 512), Size(256, 1, 64, 128), Size(4096, 8, 64, 256), Size(1024, 64, 128, 1024)]


def contenders_of(kind, size):
    """Those of `peers.py`, but for `scan`, which is `lax.scan` once compiled, and `cudnn_scan`."""
    found = layers.in_jax(kind, size)
    found.pop("scan")
    if kind == "lstm" and jax.default_backend() == "gpu":
        cell = CELLS[kind](size.D, size.H)
        run = lambda params, xs: bptt.cudnn_scan(cell, params, cell.initial_carry((size.B,)), xs)[1]  # noqa: E731
        found["cudnn_scan"] = layers.Layer(run, found[peers.BASE].params)
    return found


def compiled_layer(contender, args):
    gradient = jax.value_and_grad(partial(peers.loss, contender.run))
    return harness.compile_and_cost(gradient, contender.params, *args)


def fits(cost, args):
    """Whether arguments, results and temporaries have room in the device's memory."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    return limit is None or cost.temporary_bytes + sum(leaf.nbytes for leaf in jax.tree.leaves(args)) < 0.95 * limit


def milliseconds_or_error(call):
    """For a table: one contender that runs out of memory leaves the times of the others."""
    try:
        return f"{1e3 * seconds_of(call):.2f}"
    except Exception as error:
        return said(error)


def peer_rows(kind, size):
    """The rows of one size, one for each quantity."""
    args = peers.arguments(size)
    contenders = contenders_of(kind, size)
    calls, costs, absent = {}, {}, {}
    for name, found in in_order(lambda name: compiled_layer(contenders[name], args), list(contenders)):
        if isinstance(found, Exception):
            absent[name] = said(found)
        elif not fits(found[1], args):
            absent[name] = "too large"
        else:
            call, costs[name] = found
            calls[name] = partial(call, contenders[name].params, *args)
    try:
        products, matrices = layers.dense_products(kind, size)
        calls[peers.FLOOR] = partial(jax.jit(products), *matrices)
    except Exception as error:  # no room for its matrices
        absent[peers.FLOOR] = said(error)
    try:
        by_torch = layers.by_torch(kind, size, contenders[peers.BASE].params, *args)
        if by_torch:
            by_torch()
            calls[peers.TORCH] = by_torch
    except Exception as error:
        absent[peers.TORCH] = said(error)
    where = {"cell": kind, "T/B/D/H": str(size)}
    try:
        peers.check(f"{kind} {size}", calls, costs, {*layers.ours(kind, size), "cudnn_scan"})
    except Exception as error:
        yield "not comparable", where | {"because": said(error)}
    yield "milliseconds", where | {name: milliseconds_or_error(call) for name, call in calls.items()} | absent
    yield "temporary MiB", where | {name: f"{cost.temporary_bytes / 2**20:.1f}" for name, cost in costs.items()}


def peers_part(quick):
    """Value and gradient of mean((hs - target)²) with respect to the parameters, float32 as each library takes it by default."""
    sizes = peer_sizes(quick)
    kinds = ("lstm",) if quick else ("lstm", "gru", "elman")
    for i, size in enumerate(sizes):
        for kind in kinds:
            try:
                yield from peer_rows(kind, size)
            except Exception as error:
                yield "milliseconds", {"cell": kind, "T/B/D/H": str(size), peers.BASE: said(error)}
        if i == 0:  # one at a time, as a user waits for it
            kind, args = kinds[0], jax.eval_shape(partial(peers.arguments, size))
            contenders = contenders_of(kind, size)
            row = {"cell": kind, "T/B/D/H": str(size)}
            for name in (peers.BASE, peers.DERIVED, peers.BEST, "checkpointed_scan"):
                jax.clear_caches()
                row[name] = f"{compiled_layer(contenders[name], args)[1].compile_seconds:.2f}"
            yield "compile seconds, where XLA has tried out the products before", row


# --- long sequences


def long(quick):
    """One elman layer, n = 128, batch 1, a loss of the last state: each run once."""
    many = 1_000 if quick else 100_000
    cases = [
        ("checkpointed_scan", bptt.checkpointed_scan, {}, many),
        ("adjoint_scan", bptt.adjoint_scan, {}, many),
        ("lax.scan + jax.grad", bptt.scan, {}, many),
        ("lax.scan + jax.grad, unroll=8", bptt.scan, {"unroll": 8}, many),
        ("checkpointed_scan", bptt.checkpointed_scan, {}, 10 * many),
        ("checkpointed_scan(checkpoints=100)", bptt.checkpointed_scan, {"checkpoints": 100}, many),
    ]
    for name, scan, options, steps in cases:
        args = long_sequences.arguments(steps)
        call, cost = harness.compile_and_cost(long_sequences.value_and_gradient(scan, **options), *args)
        start = time.perf_counter()
        jax.block_until_ready(call(*args))
        seconds = time.perf_counter() - start
        yield (
            "",
            {
                "strategy": name,
                "T": f"{steps:,}",
                "seconds": f"{seconds:.2f}",
                "µs a step": f"{1e6 * seconds / steps:.1f}",
                "temporary MiB": f"{cost.temporary_bytes / 2**20:.2f}",
                "compile seconds": f"{cost.compile_seconds:.1f}",
            },
        )


def parallel(quick):
    """The program of that name, whose tables are its own."""
    command = [sys.executable, Path(__file__).with_name("parallel.py"), *["--quick"] * quick]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            yield "", {"output": line.rstrip().replace("|", "¦")}
    if process.returncode:
        raise SystemExit(process.returncode)


# --- choices


# The loops of a program as graphs of the device: those with few kernels as well, and whole loops.
GRAPHS = {
    "5 kernels or more": None,
    "2 kernels or more": {"xla_gpu_graph_min_graph_size": 2},
    "whole loops": {"xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,WHILE"},
}


def choices(quick):
    """Value and gradient with other choices for this platform: what the entries of `platforms.CHOICES` are made from.

    A row more tells what XLA's options for graphs would bring.
    """
    sizes = [Size(16, 4, 8, 16)] if quick else [Size(1024, 1, 64, 128), Size(256, 64, 64, 512)]
    on_gpu = jax.default_backend() == "gpu"
    names = ("cuda", "rocm") if on_gpu else (jax.default_backend(),)
    default = "5 kernels or more"
    cases = [("adjoint_scan", None, unroll, default) for unroll in (1, 4, 8, 16)]
    cases += [("lax.scan", None, unroll, default) for unroll in (1, 8)]
    in_segments = [("adjoint_scan", rows, 8, default) for rows in (1024, 8192)]
    other_graphs = [("adjoint_scan", None, 1, "2 kernels or more")]
    other_graphs += [(name, None, unroll, "whole loops") for name in ("adjoint_scan", "lax.scan") for unroll in (1, 8)]
    scans = {"adjoint_scan": bptt.adjoint_scan, "lax.scan": bptt.scan}
    scans["cudnn_scan"] = lambda *args, unroll: bptt.cudnn_scan(*args)

    def chosen(size, kind, unusual):
        if unusual:
            return other_graphs if on_gpu else []
        first = [("cudnn_scan", None, None, default)] if on_gpu and kind == "lstm" else []
        return first + cases + in_segments * (size.B > 1)

    before = dict(platforms.CHOICES)
    for size, unusual, kind in itertools.product(sizes, (False, True), ("elman", "lstm")):
        cell = CELLS[kind](size.D, size.H)
        params, args = cell.init(jax.random.key(0)), peers.arguments(size)

        def traced(case, cell=cell, size=size, params=params, args=args):
            name, rows, unroll, _ = case
            platforms.CHOICES.update(dict.fromkeys(names, platforms.Choices(segment_rows=rows, unroll=unroll or 1)))

            def run(params, xs):
                return scans[name](cell, params, cell.initial_carry((size.B,)), xs, unroll=unroll)[1]

            return jax.jit(jax.value_and_grad(partial(peers.loss, run))).lower(params, *args)

        def compiled(case_and_program):
            (*_, graphs), program = case_and_program
            return program.compile(compiler_options=GRAPHS[graphs])

        # All compiled before any is timed: compiling takes all cores.
        programs = [(case, traced(case)) for case in chosen(size, kind, unusual)]
        for ((name, rows, unroll, graphs), _), call in list(in_order(compiled, programs)):
            row = {"cell": kind, "T/B/D/H": str(size), "strategy": name, "segment_rows": str(rows)}
            row |= {"unroll": unroll or "–", "graphs of": graphs}
            try:
                if isinstance(call, Exception):
                    raise call
                row["µs a step"] = f"{1e6 * seconds_of(partial(call, params, *args), 0.3) / size.T:.2f}"
                row["temporary MiB"] = f"{call.memory_analysis().temp_size_in_bytes / 2**20:.1f}"
            except Exception as error:
                row["µs a step"] = said(error)
            yield "", row
    platforms.CHOICES.clear()
    platforms.CHOICES.update(before)


def kernels_part(quick):
    """What a time step starts in the program compiled for this device."""
    for row in kernels.counted(*((32, 4, 8) if quick else (256, 64, 256))):
        yield "", dict(zip(kernels.HEAD, row, strict=True))


# --- analysis and tests


def analysis(quick):
    """Spectra against the QR factorisations and products that they need."""
    for steps, hidden in [(10, 16)] if quick else [(200, 128), (100, 1024)]:
        for name, seconds, ratio in spectra.spectra(steps, hidden, 1):
            yield "", {"": name, "T": steps, "n": hidden, "seconds": seconds, "ratio": ratio}


# What needs the device most, before all others.
FIRST_TESTS = "tests/test_cudnn.py", "tests/test_scans.py", "tests/test_cells.py"


def suite(quick):
    """The quick tests on this device: each that fails and why, and how many passed until now."""
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "gpu_suite", "-p", "no:cacheprovider", "--tb=no", "-s"]
    # A package that a file needs may be absent here; and pytest-benchmark, where it is, warns about xdist.
    command += ["--continue-on-collection-errors", "-p", "no:benchmark"]
    command += (
        ["tests/test_package.py", "-k", "names", "-n", "0"]
        if quick
        else ["-n", str(min(os.cpu_count() or 1, 12)), *FIRST_TESTS, "tests"]
    )
    counts, line = {}, ""
    paths = [str(Path(__file__).parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    # In TF32, the default on a GPU, single precision would be too coarse for the tests.
    env = os.environ | {"JAX_DEFAULT_MATMUL_PRECISION": "highest", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=root, env=env, **pipes) as process:
        for line in process.stdout:
            if line.startswith(gpu_suite.MARK):
                outcome, test, because = json.loads(line.removeprefix(gpu_suite.MARK))
                counts[outcome] = counts.get(outcome, 0) + 1
                if outcome == "failed":
                    yield "did not pass", {"test": test, "because": because}
                elif sum(counts.values()) % 50 == 0:
                    yield "so far", dict(counts)
    yield "so far", counts
    if process.returncode not in (0, 1):  # not even tests that fail
        raise SystemExit(f"pytest ended with {process.returncode}: {line}")


PARTS = {
    "device": device,
    "exactness": exactness,
    "peers": peers_part,
    "long": long,
    "parallel": parallel,
    "choices": choices,
    "kernels": kernels_part,
    "analysis": analysis,
    "suite": suite,
}


def end_with(parent):
    """End this process, and what it started, when its parent has ended, however that did."""
    while os.getppid() == parent:
        time.sleep(0.5)
    if os.getpgrp() == os.getpid():  # as `gpu.py` starts it
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("results", type=Path)
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it runs")
    options = parser.parse_args()
    parent = int(os.environ.get("GPU_COMMAND", os.getppid()))  # it may have ended while this process imported jax
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    with options.results.open("a") as results:
        for table, row in PARTS[options.part](options.quick):
            results.write(json.dumps({"part": options.part, "table": table, "row": row}) + "\n")
            results.flush()
    # Threads may still be compiling what nobody waits for.
    os._exit(0)


if __name__ == "__main__":
    main()
