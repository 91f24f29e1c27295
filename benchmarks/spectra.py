"""What spectra and lag contributions cost, compared with the least they could cost.

The full Lyapunov spectrum against the QR factorisations and matrix products alone, without a network; the gradient split by
lag against as many plain gradients; the largest singular values and the norms of some pairs of a large network against all of
them; and the compiler's bytes of matrix-free functions against those of dense Jacobians.

    python benchmarks/spectra.py [--quick]
"""

import argparse
import time
from functools import partial

import harness
import jax
import jax.numpy as jnp

import jaxbptt as bptt

INPUTS = 8


def problem(steps, hidden):
    cell = bptt.elman(INPUTS, hidden)
    xs = jax.random.normal(jax.random.key(0), (steps, INPUTS))
    return cell, (cell.init(jax.random.key(1)), cell.initial_carry(), xs)


def spectra(steps, hidden, repeats):
    cell, args = problem(steps, hidden)

    def factorisations_alone(params, init, xs):
        """T matrix products and T factorisations of the same size, which every sweep needs."""

        def body(Q, _):
            Q, R = jnp.linalg.qr(params.W_hh @ Q)
            return Q, jnp.diagonal(R)

        return jax.lax.scan(body, jnp.eye(hidden), None, length=len(xs))

    functions = {
        "QR factorisations and matrix products alone": factorisations_alone,
        "lyapunov_exponents, all n": partial(bptt.lyapunov_exponents, cell),
        "singular_values, matrix-free": lambda *args: bptt.singular_values(bptt.jacobian_operators(cell, *args)),
    }
    found = harness.measure(functions, args, repeats)
    alone = found["QR factorisations and matrix products alone"][1]
    return [(name, f"{seconds:.2f}", f"{seconds / alone:.2f}") for name, (_, seconds) in found.items()]


def lags(steps, hidden, repeats):
    cell, args = problem(steps, hidden)

    def loss(h, ys):
        return jnp.mean(ys**2)

    def gradient(scan, params, init, xs):
        return jax.grad(lambda params: loss(*scan(cell, params, init, xs)))(params)

    few = steps // 8
    functions = {
        "1 gradient, scan": partial(gradient, bptt.scan),
        "1 gradient, adjoint_scan": partial(gradient, bptt.adjoint_scan),
        f"lag_contributions, {few} lags": lambda *args: bptt.lag_contributions(cell, *args, loss, max_lag=few - 1),
        f"lag_contributions, {steps} lags": lambda *args: bptt.lag_contributions(cell, *args, loss),
        f"truncation_bias, both kinds at {steps} lengths": lambda *args: bptt.truncation_bias(cell, *args, loss),
    }
    found = harness.measure(functions, args, repeats)
    counts = [1, 1, few, steps, 2 * steps]
    plain = min(found["1 gradient, scan"][1], found["1 gradient, adjoint_scan"][1])
    return [
        (name, f"{seconds * 1e3:,.2f}", count, f"{seconds / count / plain:.3f}")
        for (name, (_, seconds)), count in zip(found.items(), counts, strict=True)
    ]


def parts(steps, hidden):
    """Processor seconds of one run, compiled before: what else the machine does counts for little."""
    cell, args = problem(steps, hidden)
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(0, steps, 10)] * 2, indexing="ij"), axis=-1)
    last = [(steps - 1, s) for s in range(steps)]

    def of(function, **options):
        return lambda *args: function(bptt.jacobian_operators(cell, *args), **options)

    functions = {
        "singular_values, top=1": of(bptt.singular_values, top=1),
        "singular_values, top=10": of(bptt.singular_values, top=10),
        "singular_values, all": of(bptt.singular_values),
        "log_norms, pairs with the last state, 10 probes": of(bptt.log_norms, probes=10, pairs=last),
        "log_norms, pairs with the last state, exact": of(bptt.log_norms, pairs=last),
        "log_norms, pairs of every tenth step, 10 probes": of(bptt.log_norms, probes=10, pairs=grid),
        "log_norms, all pairs, 10 probes": of(bptt.log_norms, probes=10),
    }
    rows = []
    for name, function in functions.items():
        compiled = jax.jit(function).lower(*args).compile()
        start = time.process_time()
        jax.block_until_ready(compiled(*args))
        rows.append((name, f"{time.process_time() - start:.1f}"))
        print(*rows[-1], flush=True)
    return rows


def memory(steps, hidden):
    cell, args = problem(steps, hidden)
    functions = {
        "state_jacobians, dense": lambda *args: bptt.state_jacobians(cell, *args)[1],
        "lyapunov_exponents, all n": partial(bptt.lyapunov_exponents, cell),
        "singular_values, matrix-free": lambda *args: bptt.singular_values(bptt.jacobian_operators(cell, *args)),
    }
    rows = []
    for name, function in functions.items():
        analysis = jax.jit(function).lower(*args).compile().memory_analysis()
        total = analysis.temp_size_in_bytes + analysis.output_size_in_bytes
        rows.append(
            (name, f"{analysis.temp_size_in_bytes:,}", f"{analysis.output_size_in_bytes:,}", f"{total / 4:,.0f}")
        )
    return rows, steps * hidden, hidden**2


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that it runs; writes nothing")
    quick = parser.parse_args().quick
    sizes = (50, 32) if quick else (2_000, 256)
    lag_sizes = (32, 16) if quick else (512, 64)
    part_sizes = (50, 32) if quick else (2_000, 500)
    memory_sizes = (100, 16) if quick else (10_000, 128)
    repeats = 2 if quick else 5

    rows, states, square = memory(*memory_sizes)
    text = f"""# Cost of spectra and lags, measured

{harness.machine()}; elman, {INPUTS} inputs, batch 1, float32; medians of {repeats} runs that take turns.

All Lyapunov exponents and all singular values, T = {sizes[0]:,}, n = {sizes[1]}:

{harness.table(("", "seconds", "ratio"), spectra(*sizes, repeats))}

The gradient by lag, T = {lag_sizes[0]}, n = {lag_sizes[1]}; the last column is the time for each lag or length, in gradients
(of the faster of the two strategies):

{harness.table(("", "ms", "lags or lengths", "gradients for each"), lags(*lag_sizes, repeats))}

Less than all of a large network, T = {part_sizes[0]:,}, n = {part_sizes[1]}, in seconds of processor time, of one run:

{harness.table(("", "seconds"), parts(*part_sizes))}

Bytes, T = {memory_sizes[0]:,}, n = {memory_sizes[1]}, where T n is {states:,} numbers and n² is {square:,}:

{harness.table(("", "temporary bytes", "bytes of the results", "numbers, in all"), rows)}
"""
    print(text)
    if not quick:
        harness.RESULTS.mkdir(exist_ok=True)
        (harness.RESULTS / "spectra.md").write_text(text)


if __name__ == "__main__":
    main()
