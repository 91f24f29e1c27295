r"""What a compiled function costs: floating-point operations, temporary bytes, seconds.

Bytes are the compiler's. So are operations, but XLA counts the body of a loop once, whatever the number of iterations
(measured: T = 64 and T = 1,024 differ by the outermost operations only), which for a scan says nothing. `count_flops`
therefore counts on the traced program, each loop as often as it runs; the compiler's own figure stands beside it.
"""

import math
import time
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.interpreters.partial_eval import dce_jaxpr

from jaxbptt.analysis.depth import count_depth, iterations
from jaxbptt.programs.evaluate import subjaxprs

_ONE_PER_ELEMENT = {"add", "sub", "mul", "div", "neg", "max", "min", "add_any", "integer_pow", "square", "abs", "sign"}
_ONE_PER_INPUT = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "cumsum", "cumprod", "cummax"}
_NOT_COUNTED = {"conv_general_dilated", "pallas_call", "ffi_call", "pure_callback", "io_callback"}
_NOT_COUNTED |= {"qr", "svd", "eigh", "eig", "lu", "cholesky", "triangular_solve", "householder_product", "fft"}


class Cost(NamedTuple):
    """What one call of a compiled function costs.

    Attributes:
        flops: floating-point operations, loops counted as often as they run; nan where an operation can't be counted.
        depth: the longest chain of operations that wait for one another, as `count_depth` has it.
        depth_outside_loops: the same where loops over a known number of steps count nothing.
        compiler_flops: the compiler's figure, which counts the body of every loop once.
        temporary_bytes: the compiler's peak of memory beyond arguments and results.
        compile_seconds: from tracing to executable.
    """

    flops: float
    depth: float
    depth_outside_loops: float
    compiler_flops: float
    temporary_bytes: int
    compile_seconds: float


def compile_and_cost(fn: Callable[..., Any], *args: Any, runs: int | None = None) -> tuple[Callable[..., Any], Cost]:
    """Compile `fn` for `args`; the compiled function and its `Cost`, by everything but the clock of a run.

    `runs` are the iterations of each loop that runs until something holds, for what is counted.
    """
    start = time.perf_counter()
    with jax.disable_jit(False):  # what is measured is the compiled program
        traced = jax.jit(fn).trace(*args)
        compiled = traced.lower().compile()
    seconds = time.perf_counter() - start
    analysis = compiled.cost_analysis() or {}
    memory = compiled.memory_analysis()
    cost = Cost(
        flops=count_flops(traced.jaxpr.jaxpr, runs),
        depth=count_depth(traced.jaxpr.jaxpr, runs),
        depth_outside_loops=count_depth(traced.jaxpr.jaxpr, runs, loops=False),
        compiler_flops=float(analysis.get("flops", math.nan)),
        temporary_bytes=0 if memory is None else int(memory.temp_size_in_bytes),
        compile_seconds=seconds,
    )

    def call(*args):
        with jax.disable_jit(False):
            return compiled(*args)

    return call, cost


def median_seconds(calls: Iterable[Callable[[], Any]], repeats: int) -> list[float]:
    """Median wall-clock time of each call. They take turns, so that a slow spell of the machine falls on all of them."""
    calls = list(calls)
    for call in calls:
        jax.block_until_ready(call())
    seconds = np.zeros((repeats, len(calls)))
    for round_ in range(repeats):
        for i, call in enumerate(calls):
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[round_, i] = time.perf_counter() - start
    return np.median(seconds, axis=0).tolist()


def count_flops(jaxpr: Any, runs: int | None = None) -> float:
    """Operations of a traced program: 2 for each multiply-add of a product, 1 for each element of arithmetic.

    As in the compiler's count, transcendental functions and data movement are free. Results nobody uses do not count. Of
    a branch, the dearest side does. Loops that run until something holds count `runs` times, and without it can't be
    counted, but for those of `checkpointed_scan`: how often they run is in its schedule.
    """
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return float(sum(_flops(eqn, runs) for eqn in jaxpr.eqns))


def _flops(eqn: Any, runs: int | None) -> float:
    kind = eqn.primitive.name
    if kind in _NOT_COUNTED:
        return math.nan
    if kind == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(shape[axis] for axis in contracted)
    if kind in _ONE_PER_ELEMENT | _ONE_PER_INPUT:
        counted = eqn.outvars[0].aval if kind in _ONE_PER_ELEMENT else eqn.invars[0].aval
        return math.prod(counted.shape) if jnp.issubdtype(counted.dtype, jnp.inexact) else 0
    inside = [count_flops(jaxpr, runs) for jaxpr, _ in subjaxprs(eqn)]
    if kind == "cond":
        return max(inside)
    if kind in ("scan", "while"):
        return float(iterations(eqn, runs) * sum(inside))
    return sum(inside)
