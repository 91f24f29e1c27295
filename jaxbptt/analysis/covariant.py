r"""Covariant Lyapunov vectors: the directions that belong to each Lyapunov exponent, carried into each other by the Jacobians.

The orthonormal frame behind the exponents shows how fast volumes grow, but its vectors, all but the first, depend on the
inner product. Ginelli's method finds the covariant ones in the frame: its triangular matrices are solved backwards.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jaxtyping import Array, Bool, Float, Int

from jaxbptt.analysis.lyapunov import check_time_step
from jaxbptt.analysis.norms import norm
from jaxbptt.analysis.sweep import LOST, RESOLUTION, random_frame, rounding_error
from jaxbptt.analysis.trajectory import prepare_state, state_size, state_vector, step_and_push
from jaxbptt.arrays import check_count, check_key
from jaxbptt.cells.cell import Cell
from jaxbptt.html_table import columns_table, in_words
from jaxbptt.words import counted


class CovariantVectors(NamedTuple):
    """Covariant Lyapunov vectors along a trajectory, largest exponent first. The window is what lies between the burn-ins.

    Attributes:
        vectors: v_t of norm 1 at the state after each step of the window, `[window, n, k]`.
        growth_rates: log‖Jₜ v_{t−1}‖ of each step, in nats per unit of time, `[window, k]`.
        exponents: their means over the window: the Lyapunov exponents, `[k]`.
        angles: between the unstable and the stable subspace, the least angle, in radians, `[window]`; nan where one of the
            two is empty.
        num_unstable: how many vectors span the unstable one.
        states: the states at which the vectors stand, `[window, n]`.
        resolved: False where a vector is lost to rounding, or depends on where the backward recursion began, `[k]`.
    """

    vectors: Float[Array, "window n k"]
    growth_rates: Float[Array, "window k"]
    exponents: Float[Array, " k"]
    angles: Float[Array, " window"]
    num_unstable: Int[Array, ""]
    states: Float[Array, "window n"]
    resolved: Bool[Array, " k"]

    def _repr_html_(self) -> str:
        columns = {"exponent": self.exponents, "resolved": self.resolved}
        notes = (
            f"Unstable vectors: {in_words(self.num_unstable)}. Their least angle to the others, in radians: "
            f"{in_words(self.angles)}.",
            f"Vectors at each step: {in_words(self.vectors)}.",
        )
        return columns_table(self, {"i": range(1, self.exponents.shape[-1] + 1)} | columns, notes=notes)


def covariant_lyapunov_vectors(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    num_vectors: int | None = None,
    burn_in: int = 0,
    burn_out: int = 0,
    num_unstable: int | None = None,
    time_step: float = 1.0,
    key: Array | None = None,
) -> CovariantVectors:
    r"""Covariant Lyapunov vectors of a recurrence, driven by inputs or autonomous.

    Jₜ v_{t−1,i} ∥ v_{t,i},  v_t = Q_t C_t,  Jₜ Q_{t−1} = Q_t R_t,  C_{t−1} ∝ R_t⁻¹ C_t,  Jₜ = ∂cₜ/∂cₜ₋₁

    (Ginelli). A perturbation along v_i grows at the rate λᵢ, forward and backward in time, whatever the inner product. Where
    all Jacobians are the same, the vectors are its eigenvectors (real ones, of distinct moduli). Where the angle between the
    unstable and the stable subspace comes close to 0, the dynamics are not hyperbolic: a small change of the weights may
    change what they do. No Jacobian is formed. Pure, to be jitted; `jax.vmap` for a batch. Time O(T (n² k + n k²)), memory
    O(T k (n + k)): every frame is kept.

    There is no `is_first` and no `valid`, as for `lyapunov_exponents`: pass one sequence, without padding.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`, differentiable in forward mode: no `jax.custom_vjp` in it.
        params: any pytree, passed to every step.
        init: c₀ without batch axis; its differentiable leaves together are the state.
        xs: inputs, leaves `[time, features]`, or `None` with `length`.
        length: T, needed where `xs` is `None`. Both burn-ins included.
        num_vectors: k, those of the largest exponents; all n by default.
        burn_in: steps at the start that are left out of the results. In the first half only the state settles, in the
            second half the frame too.
        burn_out: steps at the end that are left out, in which the vectors settle from their start at the end of the
            sequence. Neighbours separate by e^(λᵢ − λᵢ₊₁) a step, so where gaps are narrow both take long.
        num_unstable: how many vectors to count as unstable for `angles`; by default those of positive exponents.
        time_step: Δt, the time that one step stands for where it integrates a system in continuous time.
        key: of the random first frame; a fixed one by default.

    Returns:
        `CovariantVectors` of the T − burn_in − burn_out steps of the window. A direction that a Jacobian takes to 0 cannot be
        followed back: its vector and the later ones are noise, may be nan, and are not `resolved`.

    Raises:
        ValueError: `num_vectors` outside 1 … n, `num_unstable` outside 0 … k, burn-ins that leave no step, a `time_step` not
            above 0, batch axes in the carry of a `Cell`; as for `jacobian_operators`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> W = jnp.array([[2.0, 1.0], [0.0, 0.5]])  # eigenvectors (1, 0) and (2, −3)/√13
        >>> clv = bptt.covariant_lyapunov_vectors(
        ...     lambda W, h, x: (W @ h, None), W, jnp.ones(2), length=90, burn_in=60, burn_out=20
        ... )
        >>> print(abs(clv.vectors[-1]).round(3), clv.exponents.round(3), f"{clv.angles[-1]:.3f}")  # arctan 3/2
        [[1.    0.555]
         [0.    0.832]] [ 0.693 -0.693] 0.983

    References:
        Ginelli, Poggi, Turchi, Chaté, Livi and Politi, Characterizing dynamics with covariant Lyapunov vectors, 2007,
        doi:10.1103/PhysRevLett.99.130601; Ginelli, Chaté, Livi and Politi, 2013, doi:10.1088/1751-8113/46/25/254005.
    """
    r = prepare_state(step, params, init, xs, length)
    size, dtype = state_size(r.init)
    k = size if num_vectors is None else num_vectors
    check_count("num_vectors", k, f"a state of {counted(size, 'number')} has 1 to {size} vectors", most=size)
    if num_unstable is not None:
        check_count("num_unstable", num_unstable, f"of {counted(k, 'vector')}", least=0, most=k)
    check_time_step(time_step)
    if r.length == 0:
        raise ValueError("A sequence without time steps has no vectors: pass at least one step.")
    meaning = f"of {counted(r.length, 'time step')} at least one has to be left"
    check_count("burn_in", burn_in, meaning, least=0, most=r.length - 1)
    check_count("burn_out", burn_out, f"{meaning} after burn_in", least=0, most=r.length - burn_in - 1)
    if key is not None:
        check_key(key)
    settled, end = burn_in // 2, r.length - burn_out

    def inputs(start, stop):
        return jax.tree.map(lambda leaf: leaf[start:stop], r.xs)

    def advance(state, start, stop, keep):
        """State and frame from one step to another, with what is kept of each step's R, Q and state."""

        def body(state, x):
            carry, V = step_and_push(r, state[0], x, state[1])
            Q, R = jnp.linalg.qr(V)
            return (carry, Q), keep(R, Q, state_vector(carry)[0])

        return jax.lax.scan(body, state, inputs(start, stop), stop - start)

    carry = r.init
    # lax.scan takes no length of 0 under jax.disable_jit.
    if settled:
        carry, _ = jax.lax.scan(
            lambda carry, x: (r.step(r.params, carry, x)[0], None), carry, inputs(0, settled), settled
        )
    state = carry, random_frame(size, k, dtype, key)
    if burn_in > settled:
        state, _ = advance(state, settled, burn_in, lambda *_: None)
    state, (R, Q, states) = advance(state, burn_in, end, lambda *kept: kept)

    # The backward recursion runs from two starts: a vector that still tells them apart at the end of the window is not the
    # one that all starts lead to.
    signs = jnp.triu(jax.random.rademacher(jax.random.key(0), (k, k), dtype), 1)
    C, other = (
        start / norm(start, (0,))[None] for start in (jnp.eye(k, dtype=dtype) + signs, jnp.eye(k, dtype=dtype) - signs)
    )
    if burn_out:
        _, R_after = advance(state, end, r.length, lambda R, *_: R)
        (C, other), _ = jax.lax.scan(
            lambda pair, R: (tuple(_backward(C, R)[0] for C in pair), None), (C, other), R_after, reverse=True
        )

    def body(C, R):
        C_before, growth = _backward(C, R)
        return C_before, (C, growth)

    _, (Cs, growth) = jax.lax.scan(body, C, R, reverse=True)
    exponents = growth.mean(axis=0) / time_step
    unstable = jnp.sum(exponents > 0) if num_unstable is None else jnp.asarray(num_unstable)
    error = jax.vmap(lambda R: rounding_error(R, jnp.abs(jnp.diagonal(R))))(R)
    found = (error.mean(axis=0) < RESOLUTION) & (error.max(axis=0) < LOST) & (_sines(C, other) < RESOLUTION)
    return CovariantVectors(
        vectors=Q @ Cs,
        growth_rates=growth / time_step,
        exponents=exponents,
        angles=jax.lax.map(lambda C: _least_angle(C, unstable), Cs),
        num_unstable=unstable,
        states=states,
        # Each vector has a part in every later one.
        resolved=jax.lax.cummin(found.astype(jnp.int8)).astype(bool),
    )


def _backward(C: Float[Array, "k k"], R: Float[Array, "k k"]) -> tuple[Array, Array]:
    """The coefficients before a step, in columns of norm 1, from those after it; and the logarithms of their growth."""
    info = jnp.finfo(R.dtype)
    diagonal = jnp.diagonal(R)
    floor = jnp.maximum(info.eps**2 * norm(R), info.tiny)
    lost = jnp.where(jnp.abs(diagonal) < floor, floor - diagonal, 0)
    C = jnp.triu(solve_triangular(R + jnp.diag(lost), C))
    size = norm(C, (0,))
    return C / size[None], -jnp.log(size)


def _sines(A: Float[Array, "k k"], B: Float[Array, "k k"]) -> Float[Array, " k"]:
    """Of the angles between the columns of two matrices, each of norm 1."""
    along = jnp.sum(A * B, axis=0)
    return norm(B - along[None] * A, (0,))


def _least_angle(C: Float[Array, "k k"], j: Int[Array, ""]) -> Float[Array, ""]:
    """Between the span of the first j columns and that of the others; C is upper triangular, so the former are e₁ … eⱼ.

    In reverse, the first k − j columns of an orthonormal basis span what the last k − j columns of C do. Their parts within
    e₁ … eⱼ and outside have the cosines and the sines of the angles for singular values.
    """
    k = len(C)
    orthonormal = jnp.linalg.qr(C[:, ::-1])[0]
    row, column = jnp.arange(k)[:, None], jnp.arange(k)[None]
    basis = jnp.where(column < k - j, orthonormal, 0)
    inside = jnp.where(row < j, basis, 0)
    # With ones in the place of what is left out, which are singular values of no account: no sine is above 1.
    outside = jnp.where(row < j, jnp.asarray(column == row + (k - j), C.dtype), basis)
    sine = jnp.min(jnp.linalg.svd(outside, compute_uv=False))
    cosine = jnp.max(jnp.linalg.svd(inside, compute_uv=False))
    return jnp.where((j > 0) & (j < k), jnp.arctan2(sine, cosine), jnp.nan)
