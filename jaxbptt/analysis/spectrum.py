r"""Long products of state Jacobians without loss to rounding: singular values, and norms between all pairs of steps.

And eigenvalues of single Jacobians, which give the growth over many steps only where all share their eigenvectors.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Complex, Float, Int

from jaxbptt.analysis.jacobians import LogSingularValues
from jaxbptt.analysis.leading import all_values, leading_columns, leading_values
from jaxbptt.analysis.operators import JacobianOperators, as_operators
from jaxbptt.analysis.pair_norms import norms_from
from jaxbptt.analysis.sweep import Sweep, decompose, multiply, random_frame, tolerance
from jaxbptt.arrays import as_numpy, check_concrete, check_count, check_key
from jaxbptt.words import counted

# Noise added to the second sweep to show what rounding does, in eps: above rounding, so that the two rarely agree by chance.
_NOISE = 8


def singular_values(
    J: JacobianOperators | Float[ArrayLike, "time n n"],
    *,
    start: int | Sequence[int] | Int[np.ndarray, " starts"] = 0,
    top: int | None = None,
) -> LogSingularValues:
    r"""Singular values of long products of Jacobians, as logarithms, by QR sweeps.

    log σᵢ(∂h_T/∂hₛ),  ∂h_T/∂hₛ = J_T J_{T−1} … J_{s+1},  i = 1 … n

    Backwards in time, Jₜᵀ Q = Q′ R: the diagonals of R are summed as logarithms, so the range of floats limits neither
    length nor condition number. Two sweeps serve every s. Time O(T n³), about three times that of the factorisations of
    one sweep (measured, n = 256); memory O(n²) for each s beyond J, or beyond the O(T n) of `JacobianOperators`, of which
    only `pull` is used. Don't differentiate it; `lyapunov_exponents` can be differentiated.

    A value is `resolved` if its direction is not lost to rounding at the size of ‖Jₜ‖ at any step, and if a second sweep
    finds the same value: to 0.005 + |log σᵢ|/20,000 in the logarithm. The second sweep starts from another frame, with noise
    of 8 eps added at each step: where one direction grows past another that was larger before, rounding is amplified, and
    the two sweeps differ.

    With `top`, the k largest only, each product on its own. A block of k + 10 vectors is swept back and forth, O(T n² k) in
    time for a round trip, until a bound on the error of log σᵢ is within 0.005 + |log σᵢ|/20,000. One round trip is enough
    where σₖ₊₅ is some e¹⁰ times smaller than σₖ, as in long products. Where the values fall so slowly that all n vectors
    cost less, or with fewer than 2k + 20 of them, all are swept: the values are as right, in the time of all. `push` is
    used too. `jax.vmap` always does both.

    Args:
        J: Jacobians in order of time, `[time, n, n]`, or `jacobian_operators` of a step.
        start: s, the number of steps before the product: 0 for all of J. Or several of them.
        top: k, how many of the largest ones; all n by default.

    Returns:
        `LogSingularValues(log_values [k], resolved [k])`, largest first, or `[s, k]` for several s; finite wherever
        J is. A value that is not resolved may be noise.

    Raises:
        ValueError: J not `[time, n, n]`, or empty; a start that is not a whole number in 0 … T − 1; `top` outside 1 … n.
        TypeError: a complex J.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> J = jnp.tile(jnp.array([[2.0, 1.0], [0.0, 0.5]]), (1_000, 1, 1))
        >>> log_values, resolved = bptt.singular_values(J)
        >>> print((log_values / 1_000 / jnp.log(2)).round(2), resolved)  # 2 and 1/2 to the power of 1,000
        [ 1. -1.] [ True  True]

    References:
        Stewart, On graded QR decompositions of products of matrices, 1995, Electronic Transactions on Numerical Analysis 3;
        Demmel and Veselić, Jacobi's method is more accurate than QR, 1992, doi:10.1137/0613074; Halko, Martinsson and
        Tropp, Finding structure with randomness, 2011, doi:10.1137/090771806.
    """
    J = as_operators(J)
    if not J.length:
        raise ValueError("J holds no Jacobians, so there is no product of them: pass at least one.")
    check_concrete("singular_values", start=start)
    starts = np.atleast_1d(as_numpy(start))
    if (
        not np.issubdtype(starts.dtype, np.integer)
        or starts.ndim > 1
        or not ((starts >= 0) & (starts < J.length)).all()
    ):
        raise ValueError(
            f"start is {start!r}, but with {counted(J.length, 'Jacobian')} a product starts after 0 to {J.length - 1} steps."
        )
    k = J.size if top is None else top
    meaning = f"a product has {counted(J.size, 'singular value')}"
    check_count("top", k, meaning, most=J.size, way_out=f"pass 1 to {J.size}, or leave it out for all")
    chosen, places = np.unique(starts, return_inverse=True)
    columns = leading_columns(J, k)
    of_starts = _all_of_products(J, chosen) if columns == J.size else _leading_of_products(J, k, columns, chosen)
    shape = (*np.shape(start), k)
    return LogSingularValues(*(values[places, :k].reshape(shape) for values in of_starts))


def _twice(J: JacobianOperators, sweep: Callable[[Array, Array], Any]) -> Any:
    """`sweep(key, noise)` as it is, and again from another frame, with noise that shows what rounding does."""
    keys = jax.random.split(jax.random.key(0), 2)
    noise = jnp.asarray([0, _NOISE * jnp.finfo(J.dtype).eps], J.dtype)
    return jax.lax.map(lambda inputs: sweep(*inputs), (keys, noise))


def _resolved(log_values: Array, errors: Array) -> tuple[Array, Array]:
    """The values of the first of two sweeps; whether its rounding error is small, and the second agrees."""
    allowed = tolerance(log_values[0])
    agree = jnp.abs(log_values[0] - log_values[1]) < allowed / 2
    return log_values[0], (errors[0] < allowed) & agree


def _all_of_products(J: JacobianOperators, starts: np.ndarray) -> tuple[Array, Array]:
    """All singular values of the products from each start, and which are resolved: one sweep passes all starts."""
    slots = np.full(J.length, len(starts))
    slots[starts] = range(len(starts))

    def sweep(key, size):
        def body(state, inputs):
            at_t, slot, t = inputs
            product, kept = state
            noise = size * jax.random.rademacher(jax.random.fold_in(key, t), (J.size, J.size), J.dtype)
            product = multiply(product, lambda Q: J.pull(at_t, Q), noise)
            return (
                product,
                jax.tree.map(lambda stored, leaf: stored.at[slot].set(leaf, mode="drop"), kept, product),
            ), None

        first = Sweep.start(random_frame(J.size, J.size, J.dtype, key))
        kept = jax.tree.map(lambda leaf: jnp.zeros((len(starts), *leaf.shape), leaf.dtype), first)
        steps = J.at, jnp.asarray(slots), jnp.arange(J.length)
        (_, kept), _ = jax.lax.scan(body, (first, kept), steps, reverse=True)
        return jax.lax.map(decompose, kept)

    return _resolved(*_twice(J, sweep))


def _leading_of_products(J: JacobianOperators, top: int, columns: int, starts: np.ndarray) -> tuple[Array, Array]:
    """The `top` largest ones of each product, from a block; from all n vectors where the block has not converged."""

    def of_one(start):
        def from_all():
            return tuple(part[:, :top] for part in _twice(J, lambda *args: all_values(J, start, *args)))

        log_values, errors, sure = _twice(J, lambda *args: leading_values(J, top, columns, start, *args))
        return _resolved(*jax.lax.cond(sure.all(), lambda: (log_values, errors), from_all))

    return jax.lax.map(of_one, jnp.asarray(starts))


def log_norms(
    J: JacobianOperators | Float[ArrayLike, "time n n"],
    *,
    probes: int | None = None,
    key: Array | None = None,
    pairs: Sequence[Any] | Int[np.ndarray, "*pairs 2"] | None = None,
) -> Float[Array, "*pairs"]:
    r"""How strongly each state influences each later one: the norms of products of Jacobians, as logarithms.

    log ‖∂hₜ/∂hₛ‖_F,  s ≤ t;  −∞ for s > t

    in the Frobenius norm, √Σσᵢ²: it is between σ₁ and √n σ₁. Rescaled at every step, so any T is safe. Exact by default, in
    time O(T² n³) and memory O(T²) beyond J. With r `probes`, orthonormal random directions in place of all n, it is an
    estimate, √(n/r) times the norm of their products with the Jacobians, in time O(T² n² r). Its square is
    unbiased. For a product of rank one, which long products approach, the logarithm has a standard error of about 1/√(2r)
    from ten probes on, and is low by about 1/(2r) on average; for other products both are smaller.

    With `pairs`, only those. Their cost is that of the distinct s among them, each multiplied up to its last t, or of the
    distinct t, each multiplied back to its first s, whichever is less: O(n² r) a step, or O(n³) without probes. So all
    pairs with the last state cost T steps, and a grid of every tenth step costs a tenth of all. With
    `probes`, pairs that are multiplied back are probed from the other side: an estimate may differ from that of all pairs.

    Args:
        J: Jacobians in order of time, `[time, n, n]`, or `jacobian_operators` of a step, which can be pushed.
        probes: r, from 1 to n; `None` for all n directions.
        key: of the random directions; a fixed one by default.
        pairs: whole numbers (t, s) on the last axis, each from 0 to T − 1; all pairs by default.

    Returns:
        `[time, time]`: entry [t, s] for the states after those steps, as in `surviving_paths`. With `pairs`, their shape
        without the last axis.

    Raises:
        ValueError: J not `[time, n, n]`, `probes` outside 1 … n, a key without `probes`, `pairs` that are none.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> J = jnp.full((3, 1, 1), jnp.exp(-1.0))
        >>> print(bptt.log_norms(J))
        [[  0. -inf -inf]
         [ -1.   0. -inf]
         [ -2.  -1.   0.]]
        >>> print(bptt.log_norms(J, pairs=[(2, 0), (2, 1)]))
        [-2. -1.]
    """
    J = as_operators(J)
    if key is not None and probes is None:
        raise ValueError("key draws the random probes: pass probes as well, or leave it out.")
    if key is not None:
        check_key(key)
    if probes is not None:
        meaning = f"the state has {counted(J.size, 'direction')} to probe"
        check_count("probes", probes, meaning, most=J.size, way_out=f"pass 1 to {J.size}, or leave it out for all")
    if pairs is None:
        every = np.arange(J.length)
        return norms_from(J, _directions(J, probes, key), every, np.full(J.length, J.length))
    check_concrete("log_norms", pairs=pairs)
    later, earlier = _checked_pairs(pairs, J.length)
    # From each s forwards to its last t, or from each t backwards to its first s: times as J runs, and turned round.
    forwards = _journeys(earlier, later)
    backwards = _journeys(J.length - 1 - later, J.length - 1 - earlier)
    turned = np.sum(backwards[1] - backwards[0]) < np.sum(forwards[1] - forwards[0])
    starts, ends, which = backwards if turned else forwards
    norms = norms_from(J, _directions(J, probes, key), starts, ends, turned=turned)
    return norms[J.length - 1 - earlier if turned else later, which]


def _directions(J: JacobianOperators, probes: int | None, key: Array | None) -> Float[Array, "n r"]:
    """All of them, or random ones scaled so that the square of the norm of a product with them is unbiased."""
    if probes is None:
        return jnp.eye(J.size, dtype=J.dtype)
    return random_frame(J.size, int(probes), J.dtype, key) * jnp.sqrt(jnp.asarray(J.size / probes, J.dtype))


def _checked_pairs(pairs: Any, length: int) -> tuple[np.ndarray, np.ndarray]:
    array = as_numpy(pairs)
    fits = np.issubdtype(array.dtype, np.integer) and array.ndim and array.shape[-1] == 2 and array.size
    if not fits or not ((array >= 0) & (array < length)).all():
        what = f"an array {array.dtype} {list(array.shape)}" if array.size > 8 else repr(pairs)
        raise ValueError(
            f"pairs is {what}, but with {counted(length, 'Jacobian')} each is (t, s), a later step and an earlier one from "
            f"0 to {length - 1}: pass whole numbers with the two on the last axis."
        )
    return array[..., 0], array[..., 1]


def _journeys(starts: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct starts, one past the last end of each, and for each pair the index of its start."""
    distinct, which = np.unique(starts, return_inverse=True)
    last = distinct.copy()
    which = which.reshape(starts.shape)
    np.maximum.at(last, which.ravel(), ends.ravel())
    return distinct, last + 1, which


def jacobian_eigenvalues(J: JacobianOperators | Float[ArrayLike, "time n n"]) -> Complex[Array, "time n"]:
    r"""Eigenvalues of the Jacobian of each single step.

    μᵢ(Jₜ),  i = 1 … n

    They give the growth over many steps only where the Jacobians share their eigenvectors; `lyapunov_exponents` always does.
    Time O(T n³), one matrix at a time. Beyond the CPU, only on devices for which JAX has the decomposition.

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
