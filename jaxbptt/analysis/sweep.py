r"""A long product of matrices in a form that keeps all its singular values: QR sweep and Jacobi rotations.

A product stored as a matrix resolves singular values only down to eps of the largest. So it is stored as
Q · diag(e^d) · U, with Q orthogonal, d logarithms and the rows of U of norm 1, updated by one QR factorisation a step
(Benettin's sweep). The singular values of diag(e^d) · U then come from Jacobi rotations of its rows, which are accurate for
each value relative to itself, however far apart the values are. A second sweep, from another frame and with noise above
rounding added at each step, shows what rounding has done to them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxbptt.analysis.norms import norm

# A value whose logarithm has a larger rounding error than this counts as unresolved.
RESOLUTION = 0.01
# A direction with a larger rounding error than this in a single factorisation is lost: it may be nothing but rounding, and
# that stays so however many other steps errors are summed or averaged over.
LOST = 0.1
# Four digits of a logarithm are enough, also of one in the thousands.
_DIGITS = 1e-4
_MAX_ROTATIONS = 30


def random_frame(size: int, columns: int, dtype: jnp.dtype, key: Array | None = None) -> Float[Array, "n k"]:
    """Orthonormal random columns; without a key always the same ones.

    A frame of unit vectors would never leave the invariant subspaces of a diagonal or triangular Jacobian.
    """
    key = jax.random.key(0) if key is None else key
    return jnp.linalg.qr(jax.random.normal(key, (size, columns), dtype))[0]


def rounding_error(R: Float[Array, "k k"], diagonal: Float[Array, " k"]) -> Float[Array, " k"]:
    """Estimated relative error of the diagonal of R in one QR factorisation, from rounding at the size of all of R."""
    info = jnp.finfo(R.dtype)
    size = info.eps * jnp.sqrt(jnp.asarray(len(R), R.dtype)) * norm(R)
    return jnp.maximum(size, info.tiny) / jnp.maximum(diagonal, info.tiny)


def tolerance(log_values: Array) -> Array:
    """The error at which the logarithm of a singular value counts as unresolved."""
    return RESOLUTION + _DIGITS * jnp.abs(log_values)


class Sweep(NamedTuple):
    """A product of matrices as Q · diag(e^d) · U, and what rounding may have done to it.

    Attributes:
        Q: orthonormal columns, n of them or fewer; with fewer, it is the product with as many vectors.
        d: logarithms of the norms of rows, each as a sum and its rounding error, `[2, n]`.
        U: upper triangular, rows of norm 1.
        variance: of each d, from the rounding of every factorisation; infinite where one has lost the direction.
    """

    Q: Array
    d: Array
    U: Array
    variance: Array

    @classmethod
    def start(cls, frame: Float[Array, "n k"]) -> "Sweep":
        """The product of no matrices with a frame."""
        k, dtype = frame.shape[1], frame.dtype
        return cls(Q=frame, d=jnp.zeros((2, k), dtype), U=jnp.eye(k, dtype=dtype), variance=jnp.zeros(k, dtype))


def multiply(sweep: Sweep, matrix: Callable[[Array], Array], noise: Float[Array, "n k"]) -> Sweep:
    """The sweep of (matrix · product), with `noise` added to matrix · Q, relative to its largest entry."""
    product = matrix(sweep.Q)
    Q, R = jnp.linalg.qr(product + jnp.max(jnp.abs(product), initial=0) * noise)
    info = jnp.finfo(R.dtype)
    # Below the floor there is only noise; it also avoids the logarithm of 0.
    floor = jnp.maximum(info.eps**2 * norm(R), info.tiny)
    diagonal = jnp.maximum(jnp.abs(jnp.diagonal(R)), floor)
    logs = jnp.log(diagonal)
    # R diag(e^d) = diag(e^(d + logs)) M. With the largest directions first, no entry of M is large. Where one
    # direction overtakes another by more than floats can hold, rounding has drowned both, and the limit keeps M finite.
    limit = math.log(info.max) / 4
    M = R / diagonal[:, None] * jnp.exp(jnp.minimum(_differences(sweep.d).T, limit))
    U = jnp.triu(M) @ sweep.U
    size = jnp.maximum(norm(U, (1,)), info.tiny)
    error = rounding_error(R, diagonal)
    return Sweep(
        Q=Q,
        d=_add(sweep.d, logs + jnp.log(size)),
        U=U / size[:, None],
        variance=sweep.variance + jnp.where(error < LOST, error**2, jnp.inf),
    )


def _add(total: Array, term: Array) -> Array:
    """Kahan's sum: over thousands of steps, a plain sum would lose the digits in which the logarithms differ."""
    term = term - total[1]
    new = total[0] + term
    return jnp.stack([new, (new - total[0]) - term])


def _differences(total: Array) -> Array:
    """Entry [i, j]: total i less total j."""
    return (total[0][:, None] - total[0][None]) - (total[1][:, None] - total[1][None])


def decompose(sweep: Sweep) -> tuple[Array, Array]:
    """Logarithms of the singular values of diag(e^d) U, largest first, and the rounding error of the sweep in each."""
    n, dtype = sweep.d.shape[1], sweep.d.dtype
    eps = jnp.finfo(dtype).eps

    def rotate(pairs, state):
        """Make the rows of each pair orthogonal; no two pairs share a row."""
        d, U, off = state
        i, j = jnp.where(d[pairs[0]] >= d[pairs[1]], pairs, pairs[::-1])
        ratio = jnp.exp(2 * (d[j] - d[i]))
        cosine = jnp.sum(U[i] * U[j], axis=1)
        below = 1 - ratio + jnp.sqrt((1 - ratio) ** 2 + 4 * ratio * cosine**2)
        # The tangent of the angle divided by e^(dⱼ − dᵢ): finite even where the rows differ greatly in size.
        slope = jnp.where(cosine == 0, 0, 2 * cosine / jnp.where(below == 0, 1, below))
        c = 1 / jnp.sqrt(1 + ratio * slope**2)
        turned = jnp.stack([U[i] + (ratio * slope)[:, None] * U[j], U[j] - slope[:, None] * U[i]]) * c[None, :, None]
        size = jnp.maximum(norm(turned, (2,)), jnp.finfo(dtype).tiny)
        rows = jnp.stack([i, j])
        off = jnp.maximum(off, jnp.max(jnp.abs(cosine), initial=0))
        return d.at[rows].add(jnp.log(size)), U.at[rows].set(turned / size[..., None]), off

    def over_all_pairs(state):
        d, U, _, count = state
        rounds = jnp.asarray(_rounds(n))
        d, U, off = jax.lax.fori_loop(0, len(rounds), lambda k, s: rotate(rounds[k], s), (d, U, jnp.zeros((), dtype)))
        return d, U, off, count + 1

    def not_orthogonal(state):
        return (state[2] > n * eps) & (state[3] < _MAX_ROTATIONS)

    d, _, off, _ = jax.lax.while_loop(
        not_orthogonal, over_all_pairs, (_differences(sweep.d)[:, 0], sweep.U, jnp.ones((), dtype), 0)
    )
    order = jnp.argsort(-d)
    error = jnp.where(off <= n * eps, jnp.sqrt(sweep.variance), jnp.inf)
    return (d + (sweep.d[0, 0] - sweep.d[1, 0]))[order], error[order]


def _rounds(n: int) -> np.ndarray:
    """All pairs of n rows, in rounds of disjoint pairs, as in a round-robin tournament: `[round, 2, pair]`."""
    players = n + n % 2
    rounds = []
    for k in range(players - 1):
        circle = np.roll(np.arange(1, players), k)
        first, second = np.concatenate([[0], circle[: players // 2 - 1]]), circle[players // 2 - 1 :][::-1]
        present = (first < n) & (second < n)
        rounds.append([first[present], second[present]])
    return np.asarray(rounds, int).reshape(players - 1, 2, -1)
