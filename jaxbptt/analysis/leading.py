r"""The largest singular values of a long product alone: subspace iteration, and a bound on what it may have missed.

A few vectors are swept back and forth through the product, Pᵀ then P, with a QR factorisation at every step. After a round
trip their singular values under P are those of P, but for what the random first vectors held too little of. How much that
can be follows from how fast the values fall within the block; where they fall too slowly, the whole product is swept.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.analysis.operators import JacobianOperators
from jaxbptt.analysis.sweep import Sweep, decompose, multiply, random_frame, tolerance

# Vectors beyond those asked for. The block converges by the gap behind it, not by the gaps between the values asked for.
_SPARE = 10


def leading_columns(J: JacobianOperators, top: int) -> int:
    """How many vectors to sweep for the `top` largest values: all n where a block would cost no less."""
    columns = top + _SPARE
    return columns if 2 * columns < J.size else J.size


def sweep_through(
    J: JacobianOperators, frame: Float[Array, "n k"], start: Array, key: Array, noise: Array, *, backwards: bool
) -> Sweep:
    """The product from step `start` to the last with a frame, or its transpose; with random signs times `noise` added."""

    def body(i, sweep):
        t = J.length - 1 - i if backwards else start + i
        at_t = jax.tree.map(lambda leaf: leaf[t], J.at)
        signs = jax.random.rademacher(jax.random.fold_in(key, t), frame.shape, frame.dtype)
        return multiply(sweep, lambda Q: (J.pull if backwards else J.push)(at_t, Q), noise * signs)

    return jax.lax.fori_loop(0, J.length - start, body, Sweep.start(frame))


def all_values(J: JacobianOperators, start: Array, key: Array, noise: Array) -> tuple[Array, Array]:
    """All n values of one product and their rounding errors, from one sweep."""
    return decompose(sweep_through(J, random_frame(J.size, J.size, J.dtype, key), start, key, noise, backwards=True))


def leading_values(
    J: JacobianOperators, top: int, columns: int, start: Array, key: Array, noise: Array
) -> tuple[Array, Array, Array]:
    """The `top` largest values of one product from a block, their rounding errors, and whether the block has converged."""
    n = J.size
    # A round trip costs 2 columns / n of a sweep of all: beyond that, all of them come cheaper.
    most = max(n // (2 * columns), 2)
    # Of a random block, no combination that leads by index `split` is likely to hold less than 1/weight of its direction,
    # compared with all directions behind it: the smallest and largest singular values of Gaussian matrices.
    split = top + (columns - top) // 2
    weight = ((math.sqrt(n) + math.sqrt(columns)) / (math.sqrt(columns) - math.sqrt(split))) ** 2

    def round_trip(state):
        frame, count, *_ = state
        there, back = jax.random.split(jax.random.fold_in(key, count))
        frame = sweep_through(J, frame, start, there, noise, backwards=True).Q
        sweep = sweep_through(J, frame, start, back, noise, backwards=False)
        log_values, errors = decompose(sweep)
        # What is behind `split` shrinks by its distance at each passage but the last. That distance is known only as that
        # of values which are themselves too low: hence the weight squared.
        passages = 2 * count + 1
        distance = log_values[:top] - log_values[split]
        missed = jnp.logaddexp(0, 2 * math.log(weight) - 2 * passages * distance) / 2
        sure = (missed < tolerance(log_values[:top]) / 2).all()
        return sweep.Q, count + 1, log_values[:top], errors[:top], sure

    def not_sure(state):
        return (state[1] < most) & ~state[4]

    nothing = jnp.zeros(top, J.dtype)
    first = random_frame(n, columns, J.dtype, key), 0, nothing, nothing, jnp.asarray(False)
    return jax.lax.while_loop(not_sure, round_trip, first)[2:]
