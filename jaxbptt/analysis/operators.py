r"""State Jacobians as linear maps: J V and Jᵀ U by differentiating the step, without forming a matrix.

A dense J for every step takes O(T n²) memory. Whatever only multiplies by Jacobians takes the two functions here, and dense
Jacobians too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Float

from jaxbptt.analysis.trajectory import Trajectory, prepare_state, state_size, trajectory_of
from jaxbptt.arrays import as_array, at_least_float32
from jaxbptt.cells.cell import Cell
from jaxbptt.html_table import fields_table
from jaxbptt.scans.flags import Flags


class JacobianOperators(NamedTuple):
    """J₁ … J_T as linear maps of n-vectors, the columns of a matrix all at once. Make it inside the `jit` that uses it.

    Attributes:
        push: `(at_t, V [n, k]) -> Jₜ V`, in forward mode.
        pull: `(at_t, U [n, k]) -> Jₜᵀ U`, in reverse mode.
        at: what the two need of each step, leaves `[time, ...]`.
        length: T, time steps.
        size: n, numbers in the state.
        dtype: of the products: that of the state vector, float32 at least.
    """

    push: Callable[[Any, Array], Array]
    pull: Callable[[Any, Array], Array]
    at: Any
    length: int
    size: int
    dtype: Any

    _repr_html_ = fields_table


def jacobian_operators(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
) -> JacobianOperators:
    r"""Unroll a recurrence, with the Jacobian of every step as a linear map: `state_jacobians` without the matrices.

    V ↦ Jₜ V,  U ↦ Jₜᵀ U,  Jₜ = ∂cₜ/∂cₜ₋₁

    Time O(T) steps and memory O(T n) here; a product with k columns costs about k steps. The carry counts as one state
    vector, its leaves flattened in order, and should have no batch axis.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`. A step with a `jax.custom_vjp` in it can be pulled, not
            pushed.
        params: any pytree, passed to every step.
        init: c₀; non-differentiable leaves are carried along but are no part of the state vector.
        xs: inputs, leaves `[time, features]`, or `None`.
        length: T, needed where `xs` is `None`.
        is_first: booleans `[time]`, as for `scan`: where a new sequence begins, the carry before it counts for nothing,
            and Jₜ is 0.
        valid: booleans `[time]`, as for `scan`: a padded step holds the carry, and Jₜ is the identity.
        reset_carry: what `is_first` resets to, as for `scan`.

    Returns:
        `JacobianOperators`, which `singular_values`, `log_norms` and `jacobian_eigenvalues` take in place of J
        `[time, n, n]`.

    Raises:
        ValueError: batch axes in the carry of a `Cell`, a carry without differentiable numbers; as for `scan`.
        TypeError: a complex carry; as for `scan`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.gru(3, 5)
        >>> args = cell.init(jax.random.key(0)), cell.initial_carry(), jnp.ones((2_000, 3))
        >>> values = jax.jit(lambda *args: bptt.singular_values(bptt.jacobian_operators(cell, *args)).log_values)(*args)
        >>> values.shape, bool(jnp.isfinite(values).all())
        ((5,), True)
    """
    flags = Flags(is_first, valid, reset_carry)
    return operators_along(trajectory_of(prepare_state(step, params, init, xs, length, flags), flags))


def operators_along(trajectory: Trajectory) -> JacobianOperators:
    """The Jacobians of every step of a trajectory as linear maps."""
    r = trajectory.recurrence
    size, dtype = state_size(r.init)
    return JacobianOperators(trajectory.push, trajectory.pull, trajectory.at, r.length, size, dtype)


def as_operators(J: JacobianOperators | Float[ArrayLike, "time n n"]) -> JacobianOperators:
    """Dense Jacobians as linear maps; `JacobianOperators` are returned as they are."""
    if isinstance(J, JacobianOperators):
        return J
    J = dense_jacobians(J)
    return JacobianOperators(lambda J, V: J @ V, lambda J, U: J.T @ U, J, len(J), J.shape[1], J.dtype)


def dense_jacobians(J: Any) -> Array:
    """J `[time, n, n]`, real, in float32 at least: QR factorisations have no half precision."""
    J = as_array("J", J, "[time, n, n]")
    if J.ndim != 3 or J.shape[1] != J.shape[2] or not J.shape[1]:
        raise ValueError(
            f"J has shape {J.shape}, but [time, n, n] is expected: one square Jacobian for each time step."
        )
    if jnp.iscomplexobj(J):
        raise TypeError(
            f"J has dtype {J.dtype}: pass real Jacobians, of a state with real and imaginary parts as separate numbers."
        )
    return J.astype(at_least_float32(J.dtype))
