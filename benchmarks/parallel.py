"""Sequential and parallel in time: what value and gradient cost by every strategy, over T and n, on whatever device there is.

Depth is the longest chain of operations of the traced program that wait for one another, a loop counted as often as it
runs; operations are counted the same way. Both of Newton's are for the iterations that it took here. Bytes are the
compiler's. The loss is the mean of all squared outputs, float32, one sequence, four inputs, weights as the library starts
them. Calls of less than a second take turns, and the figure is their median; longer ones run once.

    python benchmarks/parallel.py [--minutes 20] [--seconds 20] [--quick]

The most telling sizes come first, and each row is printed as soon as it is measured: `--minutes` is when no other size is
begun. What would not fit in memory, or take more than `--seconds` a call by what it took on a shorter sequence, is skipped.
"""

import argparse
import itertools
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import isnan
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import numpy as np

import jaxbptt as bptt
from jaxbptt.analysis.cost import Cost, median_seconds

FEATURES = 4
CHUNK = 1024
# Of the memory that is free, for the temporaries of one program.
SHARE = 0.8
# Programs compiled at a time: one takes a core and a little more.
WORKERS = max((os.cpu_count() or 1) // 2, 1)

LENGTHS = (1_024, 16_384, 262_144)
SIZES = [("affine", 16), ("affine", 64), ("gru", 16), ("elman", 16), ("min_gru", 64), ("gru", 64), ("elman", 64)]
SIZES += [("affine", 1), ("gru", 1), ("elman", 1)]

HEAD = ("cell", "n", "T", "strategy", "depth", "operations", "temporary MiB", "compile s", "ms")
HEAD += ("times lax.scan's speed", "error", "notes")
WIDTHS = (7, 2, 7, 40, 9, 10, 13, 9, 9, 22, 7, 5)


def affine_step(params, h, ab):
    """H ↦ aₜ h + bₜ, with all coefficients given: nothing but the recurrence."""
    a, b = ab
    h = a * h + b
    return h, h


class Problem(NamedTuple):
    """What is differentiated: `arguments` are params, init and inputs."""

    cell: str
    n: int
    length: int

    def step(self) -> Any:
        """A bare step or a cell."""
        return affine_step if self.cell == "affine" else getattr(bptt, self.cell)(FEATURES, self.n)

    def arguments(self):
        """From numpy: nothing is compiled for them."""
        random = np.random.default_rng(1)
        normal = lambda *shape: random.standard_normal(shape).astype(np.float32)  # noqa: E731
        if self.cell == "affine":
            a = random.uniform(0.5, 1, (self.length, self.n)).astype(np.float32)
            return jax.device_put(((), np.zeros(self.n, np.float32), (a, normal(self.length, self.n))))
        cell = self.step()
        return cell.init(jax.random.key(1)), cell.initial_carry(), jax.device_put(normal(self.length, FEATURES))

    def differentiated(self):
        """Whether params, or for the affine step the coefficients, have the gradient."""
        return 2 if self.cell == "affine" else 0


def strategies(cell):
    """Each by its name; the first is the one that the others are compared with."""
    found = {
        "lax.scan + jax.grad": bptt.scan,
        "adjoint_scan": bptt.adjoint_scan,
        "parallel_scan": bptt.parallel_scan,
        "parallel_adjoint_scan": bptt.parallel_adjoint_scan,
        f"parallel_adjoint_scan, chunk_length={CHUNK}": partial(bptt.parallel_adjoint_scan, chunk_length=CHUNK),
        "newton_scan, full": bptt.newton_scan,
        "newton_scan, diagonal": partial(bptt.newton_scan, jacobian="diagonal"),
    }
    if cell in ("affine", "min_gru"):  # Newton's method is done after one iteration
        return {name: scan for name, scan in found.items() if not name.startswith("newton")}
    return {name: scan for name, scan in found.items() if name != "parallel_scan"}


class Program(NamedTuple):
    """A strategy's value and gradient, compiled; for Newton with its iterations, beside what it says of itself."""

    call: Any
    cost: Cost
    notes: str = ""


def compiled(problem, scan):
    """Its `Program`."""
    step, args = problem.step(), problem.arguments()

    def loss(*args):
        return jnp.mean(scan(step, *args)[1] ** 2)

    runs, notes = newton(problem, scan, args)
    gradient = jax.value_and_grad(loss, argnums=problem.differentiated())
    return Program(*harness.compile_and_cost(gradient, *args, runs=runs), notes)


def newton(problem, scan, args):
    """Iterations of Newton's method and what became of them, in words."""
    scan, options = (scan.func, scan.keywords) if isinstance(scan, partial) else (scan, {})
    if scan is not bptt.newton_scan:
        return None, ""

    def happened(*args):
        states = bptt.newton_states(problem.step(), *args, **options)
        return states.iterations, states.converged, states.first_bad_step

    iterations, converged, bad = map(int, jax.jit(happened)(*args))
    words = f"{iterations} iterations"
    if converged:
        return iterations, words
    return None, f"{words}, then in sequence from step {bad:,}"


def free_bytes():
    """Of the memory that programs run in."""
    stats = jax.devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float("inf")


def errors(found, reference):
    """The largest relative error of a leaf of the gradient."""
    comparison = bptt.compare_gradients(*(jax.device_get(gradient) for _, gradient in (found, reference)))
    return max(leaf.relative_error for leaf in comparison.leaves)


def rows(problem, limit, before):
    """A row for each strategy. `before` has the length and seconds of the last run of each cell, size and strategy."""
    found = strategies(problem.cell)
    key = {name: (problem.cell, problem.n, name) for name in found}
    skipped = {}
    for name in found:
        length, seconds = before.get(key[name], (1, 0))
        if seconds * problem.length / length > limit:
            skipped[name] = f"skipped: {seconds:.1f} s at T = {length:,}, so more than {limit:g} s here"

    def build(name):
        try:
            return compiled(problem, found[name])
        except Exception as error:  # a row says so, and the others are measured
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"

    todo = [name for name in found if name not in skipped]
    with ThreadPoolExecutor(WORKERS) as pool:
        programs: dict[str, Any] = dict(zip(todo, pool.map(build, todo), strict=True))
    skipped |= {name: program for name, program in programs.items() if isinstance(program, str)}
    args, first, results = problem.arguments(), {}, {}
    for name in todo:
        if name in skipped:
            continue
        need, have = programs[name].cost.temporary_bytes, SHARE * free_bytes()
        if need > have:
            skipped[name] = f"skipped: needs {need / 2**30:.1f} GiB of {have / 2**30:.1f}"
            continue
        start = time.perf_counter()
        try:
            results[name] = jax.block_until_ready(programs[name].call(*args))
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100]}"
            continue
        first[name] = time.perf_counter() - start
        before[key[name]] = problem.length, first[name]
    short = [name for name, seconds in first.items() if seconds < 1]
    repeats = int(min(max(2 / sum(first[name] for name in short), 3), 20)) if short else 0
    calls = [partial(programs[name].call, *args) for name in short]
    seconds = first | dict(zip(short, median_seconds(calls, repeats) if short else [], strict=True))

    base, *_ = found
    for name in found:
        row = {"cell": problem.cell, "n": problem.n, "T": f"{problem.length:,}", "strategy": name}
        if isinstance(program := programs.get(name), Program):
            row |= {
                "depth": "" if isnan(program.cost.depth) else f"{program.cost.depth:,.0f}",
                "operations": "" if isnan(program.cost.flops) else f"{program.cost.flops:.2e}",
                "temporary MiB": f"{program.cost.temporary_bytes / 2**20:,.1f}",
                "compile s": f"{program.cost.compile_seconds:.2f}",
                "notes": program.notes,
            }
        if name in seconds:
            row["ms"] = f"{1e3 * seconds[name]:,.2f}"
            if base in seconds:
                row["times lax.scan's speed"] = f"{seconds[base] / seconds[name]:.3g}"
                row["error"] = f"{errors(results[name], results[base]):.0e}"
        yield row | ({"notes": skipped[name]} if name in skipped else {})


def line(cells):
    """A row of a Markdown table whose later rows are not known yet."""
    cells = [
        cell.ljust(w) if i in (0, 3, 11) else cell.rjust(w)
        for i, (cell, w) in enumerate(zip(cells, WIDTHS, strict=True))
    ]
    return f"| {' | '.join(cells)} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20, help="when no other size is begun")
    parser.add_argument("--seconds", type=float, default=20, help="what one call may take")
    parser.add_argument("--quick", action="store_true", help="two sizes, to check that it runs; writes nothing")
    options = parser.parse_args()
    problems = [Problem(*size, length) for size, length in itertools.product(SIZES, LENGTHS)]
    if options.quick:
        problems = [Problem(cell, 2, 2 * CHUNK) for cell in ("affine", "gru")]
    path = harness.RESULTS / f"parallel_{jax.default_backend()}_jax_{jax.__version__}.md"
    lines = []

    def say(text):
        print(text, flush=True)
        lines.append(text)
        if not options.quick:
            path.write_text("\n".join(lines) + "\n")

    method = " ".join((__doc__ or "").split("\n\n")[1].split())
    at_once = (
        f"{WORKERS} programs are compiled at a time" if WORKERS > 1 else "Programs are compiled one after the other"
    )
    say(f"# Sequential and parallel in time\n\n{harness.machine()}\n\n{method} {at_once}.\n")
    say(line(HEAD))
    say(f"| {' | '.join('-' * w if i in (0, 3, 11) else '-' * (w - 1) + ':' for i, w in enumerate(WIDTHS))} |")
    end, before = time.monotonic() + 60 * options.minutes, {}
    for i, problem in enumerate(problems):
        if time.monotonic() > end:
            left = ", ".join(f"{cell} n = {n} T = {length:,}" for cell, n, length in problems[i:])
            say(f"\nNot begun after {options.minutes:g} minutes: {left}.")
            break
        for row in rows(problem, options.seconds, before):
            say(line([str(row.get(column, "")) or "–" for column in HEAD]))


if __name__ == "__main__":
    main()
