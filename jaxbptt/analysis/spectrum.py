r"""Long products of state Jacobians in numbers that can be trusted: singular values, norms between all pairs of steps.

A stored product knows its small singular values only down to eps of the largest. Here the product is never stored: it is
kept as Q · diag(e^d) · U, with Q orthogonal, d logarithms and the rows of U of norm 1, brought up to date by one QR
factorisation a step (Benettin's sweep). Singular values of diag(e^d) · U then come from Jacobi rotations of its rows, which
are accurate for each value relative to itself, however far apart they are.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Complex, Float

from jaxbptt.analysis.jacobians import LogSingularValues
from jaxbptt.analysis.norms import norm
from jaxbptt.analysis.operators import JacobianOperators, as_operators

# An estimated rounding error of a logarithm beyond this, and the value counts as unresolved.
RESOLUTION = 0.01
_MAX_ROTATIONS = 30


def singular_values(
    J: JacobianOperators | Float[ArrayLike, "time n n"], *, start: int | Sequence[int] = 0
) -> LogSingularValues:
    r"""All singular values of long products of Jacobians, as logarithms, by a QR sweep.

    log σᵢ(∂h_T/∂hₛ),  ∂h_T/∂hₛ = J_T J_{T−1} … J_{s+1},  i = 1 … n

    Backwards in time, Jₜᵀ Q = Q′ R: the diagonals of R are summed as logarithms, so neither length nor condition number
    is limited by the range of floats. One sweep serves every s. Time O(T n³), memory O(n²) for each s beyond J, or beyond
    the O(T n) of `JacobianOperators`. Not to be differentiated; `lyapunov_exponents` can be.

    `resolved` rests on two estimates of how rounding adds up: at each step, of eps · ‖Jₜ‖ against what is left of a
    direction; and between directions, where one grows past another that was larger before.

    Args:
        J: Jacobians in order of time, `[time, n, n]`, or `jacobian_operators` of a step.
        start: s, how many steps come before the product: 0 for all of J. Or several.

    Returns:
        `LogSingularValues(values [n], resolved [n])`, largest first, or `[s, n]` for several s; always finite. Where not
        resolved, the value is noise: the true one is below it as a rule.

    Raises:
        ValueError: J not `[time, n, n]`; a start that is no whole number in 0 … T − 1.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> J = jnp.tile(jnp.array([[2.0, 1.0], [0.0, 0.5]]), (1_000, 1, 1))
        >>> values, resolved = bptt.singular_values(J)
        >>> print((values / 1_000 / jnp.log(2)).round(2), resolved)  # 2 and 1/2 to the power of 1,000: never in float range
        [ 1. -1.] [ True  True]

    References:
        Stewart, On graded QR decompositions of products of matrices, 1995, Electronic Transactions on Numerical Analysis 3;
        Demmel and Veselić, Jacobi's method is more accurate than QR, 1992, doi:10.1137/0613074.
    """
    J = as_operators(J)
    starts = np.atleast_1d(np.asarray(start))
    if (
        not np.issubdtype(starts.dtype, np.integer)
        or starts.ndim > 1
        or not ((starts >= 0) & (starts < J.length)).all()
    ):
        raise ValueError(
            f"start is {start!r}, but with T = {J.length} Jacobians a product starts after 0 to {J.length - 1} steps."
        )
    chosen, places = np.unique(starts, return_inverse=True)
    slots = np.full(J.length, len(chosen))
    slots[chosen] = range(len(chosen))

    def body(state, inputs):
        sweep, kept = state
        sweep = _multiply(sweep, lambda Q: J.pull(inputs[0], Q))
        kept = jax.tree.map(lambda all, one: all.at[inputs[1]].set(one, mode="drop"), kept, sweep)
        return (sweep, kept), None

    first = _Sweep.start(J.size, J.dtype)
    room = jax.tree.map(lambda leaf: jnp.zeros((len(chosen), *leaf.shape), leaf.dtype), first)
    (_, kept), _ = jax.lax.scan(body, (first, room), (J.at, jnp.asarray(slots)), reverse=True)
    values, resolved = jax.lax.map(_finish, kept)
    shape = (*np.shape(start), J.size)
    return LogSingularValues(values[places].reshape(shape), resolved[places].reshape(shape))


def log_norms(
    J: JacobianOperators | Float[ArrayLike, "time n n"], *, probes: int | None = None, key: Array | None = None
) -> Float[Array, "time time"]:
    r"""How much of each state is left in each later one: the norms of all products of Jacobians, as logarithms.

    log ‖∂hₜ/∂hₛ‖_F,  s ≤ t;  −∞ for s > t

    in the Frobenius norm, √Σσᵢ²: it is between σ₁ and √n σ₁. Scaled as it goes, so that any T is safe. Exact by default, in
    time O(T² n³) and memory O(T n²). With r `probes`, orthonormal random directions in place of all n, it is an estimate,
    √(n/r) times the norm of what becomes of them: in time O(T² n² r) and memory O(T n r), with a standard error of at
    most 1/√(2r) in the logarithm.

    Args:
        J: Jacobians in order of time, `[time, n, n]`, or `jacobian_operators` of a step, which can be pushed.
        probes: r, from 1 to n; `None` for all n directions.
        key: of the random directions; a fixed one by default.

    Returns:
        `[time, time]`: entry [t, s] for the states after those steps, as in `surviving_paths`.

    Raises:
        ValueError: J not `[time, n, n]`, `probes` outside of 1 … n, a key without `probes`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> print(bptt.log_norms(jnp.full((3, 1, 1), jnp.exp(-1.0))))
        [[  0. -inf -inf]
         [ -1.   0. -inf]
         [ -2.  -1.   0.]]
    """
    J = as_operators(J)
    if key is not None and probes is None:
        raise ValueError("key draws the random probes: pass probes as well, or leave it out.")
    if probes is not None and not (hasattr(probes, "__index__") and 1 <= probes <= J.size):
        raise ValueError(
            f"probes is {probes!r}, but there are 1 to {J.size} directions to probe: leave it out for all of them."
        )
    basis = jnp.eye(J.size, dtype=J.dtype)
    if probes is not None:
        basis = random_frame(J.size, int(probes), J.dtype, key) * jnp.sqrt(jnp.asarray(J.size / probes, J.dtype))
    columns = basis.shape[1]

    def body(state, inputs):
        V, logs = state  # V [n, from, columns] of norm 1 for each step it comes from
        at_t, t = inputs
        V = J.push(at_t, V.reshape(J.size, -1)).reshape(V.shape)
        size = norm(V, (0, 2))
        V, logs = V / jnp.where(size > 0, size, 1)[:, None], logs + jnp.log(size)
        size = norm(basis)
        V, logs = V.at[:, t].set(basis / size), logs.at[t].set(jnp.log(size))
        return (V, logs), logs

    state = jnp.zeros((J.size, J.length, columns), J.dtype), jnp.full(J.length, -jnp.inf, J.dtype)
    return jax.lax.scan(body, state, (J.at, jnp.arange(J.length)))[1]


def jacobian_eigenvalues(J: JacobianOperators | Float[ArrayLike, "time n n"]) -> Complex[Array, "time n"]:
    r"""Eigenvalues of the Jacobian of each single step.

    μᵢ(Jₜ),  i = 1 … n

    They tell growth over many steps only where the Jacobians share their eigenvectors: `lyapunov_exponents` does so always.
    Time O(T n³), one matrix at a time. On devices other than the CPU only where JAX has the decomposition.

    Args:
        J: Jacobians in order of time, `[time, n, n]`, or `jacobian_operators` of a step, which can be pushed.

    Returns:
        Complex `[time, n]`, in no particular order.

    Raises:
        ValueError: J not `[time, n, n]`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> quarter_turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])
        >>> print(abs(bptt.jacobian_eigenvalues(quarter_turn[None])).round(3))
        [[1. 1.]]
    """
    J = as_operators(J)
    return jax.lax.map(lambda at_t: jnp.linalg.eigvals(J.push(at_t, jnp.eye(J.size, dtype=J.dtype))), J.at)


def random_frame(size: int, columns: int, dtype: jnp.dtype, key: Array | None = None) -> Float[Array, "n k"]:
    """Orthonormal random columns; the same ones each time without a key.

    A frame of unit vectors would never leave the subspaces that a diagonal or triangular Jacobian keeps to itself.
    """
    key = jax.random.key(0) if key is None else key
    return jnp.linalg.qr(jax.random.normal(key, (size, columns), dtype))[0]


def rounding_error(R: Float[Array, "k k"], diagonal: Float[Array, " k"]) -> Float[Array, " k"]:
    """Estimated relative error of the diagonal of R in one QR factorisation, from rounding at the size of all of R."""
    info = jnp.finfo(R.dtype)
    size = info.eps * jnp.sqrt(jnp.asarray(len(R), R.dtype)) * norm(R)
    return jnp.maximum(size, info.tiny) / jnp.maximum(diagonal, info.tiny)


class _Sweep(NamedTuple):
    """A product of matrices as Q · diag(e^d) · U, and what rounding may have done to it.

    Attributes:
        Q: orthogonal.
        d: logarithms of the norms of rows.
        U: upper triangular, rows of norm 1.
        growth: Σ log|Rᵢᵢ|.
        own_error: variance of it from each step's rounding.
        lowest: the least that growthᵢ − growthⱼ has been, i > j.
        overtaken: the most that it has risen again since: rounding in direction i is amplified by that much in j.
    """

    Q: Array
    d: Array
    U: Array
    growth: Array
    own_error: Array
    lowest: Array
    overtaken: Array

    @classmethod
    def start(cls, n: int, dtype: Any) -> "_Sweep":
        nothing, pairs = jnp.zeros(n, dtype), jnp.zeros((n, n), dtype)
        return cls(random_frame(n, n, dtype), nothing, jnp.eye(n, dtype=dtype), nothing, nothing, pairs, pairs)


def _multiply(sweep: _Sweep, matrix: Callable[[Array], Array]) -> _Sweep:
    """The sweep of (matrix · product)."""
    Q, R = jnp.linalg.qr(matrix(sweep.Q))
    info = jnp.finfo(R.dtype)
    # Under the floor there is nothing but noise, and no logarithm of 0.
    floor = jnp.maximum(info.eps**2 * norm(R), info.tiny)
    diagonal = jnp.maximum(jnp.abs(jnp.diagonal(R)), floor)
    logs = jnp.log(diagonal)
    growth = sweep.growth + logs
    # R diag(e^d) = diag(e^(d + logs)) M. With the largest directions first no entry of M is large; where rounding has let
    # one overtake another, the estimates below say so, and the bound keeps M finite.
    limit = math.log(info.max) / 4
    M = R / diagonal[:, None] * jnp.exp(jnp.minimum(sweep.d - sweep.d[:, None], limit))
    U = jnp.triu(M) @ sweep.U
    size = jnp.maximum(norm(U, (1,)), info.tiny)
    difference = jnp.tril(growth[:, None] - growth, -1)
    lowest = jnp.minimum(sweep.lowest, difference)
    return _Sweep(
        Q=Q,
        d=sweep.d + logs + jnp.log(size),
        U=U / size[:, None],
        growth=growth,
        own_error=sweep.own_error + rounding_error(R, diagonal) ** 2,
        lowest=lowest,
        overtaken=jnp.maximum(sweep.overtaken, difference - lowest),
    )


def _finish(sweep: _Sweep) -> tuple[Array, Array]:
    """Logarithms of the singular values of diag(e^d) U, largest first, and which are resolved."""
    n, dtype = len(sweep.d), sweep.d.dtype
    eps = jnp.finfo(dtype).eps

    def rotate(pairs, state):
        """Make the rows of each pair orthogonal; the pairs have no row in common."""
        d, U, off = state
        i, j = jnp.where(d[pairs[0]] >= d[pairs[1]], pairs, pairs[::-1])
        ratio = jnp.exp(2 * (d[j] - d[i]))
        cosine = jnp.sum(U[i] * U[j], axis=1)
        below = 1 - ratio + jnp.sqrt((1 - ratio) ** 2 + 4 * ratio * cosine**2)
        # The tangent of the angle, over e^(dⱼ − dᵢ): it stays finite where the rows are far apart in size.
        slope = jnp.where(cosine == 0, 0, 2 * cosine / jnp.where(below == 0, 1, below))
        c = 1 / jnp.sqrt(1 + ratio * slope**2)
        turned = jnp.stack([U[i] + (ratio * slope)[:, None] * U[j], U[j] - slope[:, None] * U[i]]) * c[:, None]
        size = jnp.maximum(norm(turned, (2,)), jnp.finfo(dtype).tiny)
        both = jnp.stack([i, j])
        off = jnp.maximum(off, jnp.max(jnp.abs(cosine), initial=0))
        return d.at[both].add(jnp.log(size)), U.at[both].set(turned / size[..., None]), off

    def over_all_pairs(state):
        d, U, _, count = state
        rounds = jnp.asarray(_rounds(n))
        d, U, off = jax.lax.fori_loop(0, len(rounds), lambda k, s: rotate(rounds[k], s), (d, U, jnp.zeros((), dtype)))
        return d, U, off, count + 1

    def turning(state):
        return (state[2] > n * eps) & (state[3] < _MAX_ROTATIONS)

    d, _, off, _ = jax.lax.while_loop(turning, over_all_pairs, (sweep.d, sweep.U, jnp.ones((), dtype), 0))
    overtaken = jnp.maximum(sweep.overtaken.max(axis=0), sweep.overtaken.max(axis=1))
    error = jnp.sqrt(sweep.own_error) + n * eps * jnp.exp(jnp.minimum(overtaken, 80))
    order = jnp.argsort(-d)
    return d[order], (error < RESOLUTION)[order] & (off <= n * eps)


def _rounds(n: int) -> np.ndarray:
    """All pairs of n rows, as rounds of pairs without a row in common: `[round, 2, pair]`, as in a round-robin tournament."""
    players = n + n % 2
    rounds = []
    for k in range(players - 1):
        circle = np.roll(np.arange(1, players), k)
        first, second = np.concatenate([[0], circle[: players // 2 - 1]]), circle[players // 2 - 1 :][::-1]
        present = (first < n) & (second < n)
        rounds.append([first[present], second[present]])
    return np.asarray(rounds, int).reshape(players - 1, 2, -1)
