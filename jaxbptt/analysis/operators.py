r"""State Jacobians as linear maps: J V and Jᵀ U by differentiating the step, without ever forming a matrix.

A dense J for every step takes O(T n²) memory. Everything that only multiplies by Jacobians is written against the two
functions here, and runs on dense ones too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, ArrayLike, Float

from jaxbptt.arrays import as_array, at_least_float32
from jaxbptt.cells.cell import Cell
from jaxbptt.scans.recurrence import Recurrence, prepare
from jaxbptt.trees import combine, differentiable, name, partition


class JacobianOperators(NamedTuple):
    """J₁ … J_T as linear maps of n-vectors, the columns of a matrix all at once. Make it where you use it, inside of `jit`.

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


def jacobian_operators(
    step: Callable[..., Any] | Cell, params: Any, init: Any, xs: Any = None, *, length: int | None = None
) -> JacobianOperators:
    r"""Unroll a recurrence and hand out the Jacobian of every step as a linear map, in place of `state_jacobians`.

    V ↦ Jₜ V,  U ↦ Jₜᵀ U,  Jₜ = ∂cₜ/∂cₜ₋₁

    Time O(T) steps and memory O(T n) here; a product with k columns costs about k steps. The carry counts as one state
    vector, its leaves flattened in order, and should have no batch axis.

    Args:
        step: `step(params, carry, x) -> (carry, y)`, or a `Cell`. A step with a `jax.custom_vjp` in it can be pulled, not
            pushed.
        params: any pytree, handed to every step.
        init: c₀; leaves without a derivative are carried along but are no part of the state vector.
        xs: inputs, leaves `[time, features]`, or `None`.
        length: T, needed where `xs` is `None`.

    Returns:
        `JacobianOperators`, to stand wherever J `[time, n, n]` does: `singular_values`, `log_norms`,
        `jacobian_eigenvalues`.

    Raises:
        ValueError: batch axes in the carry of a `Cell`, a carry without a number that has a derivative; as for `scan`.
        TypeError: a complex carry; as for `scan`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.gru(3, 5)
        >>> args = cell.init(jax.random.key(0)), cell.initial_carry(), jnp.ones((2_000, 3))
        >>> values = jax.jit(lambda *args: bptt.singular_values(bptt.jacobian_operators(cell, *args)).values)(*args)
        >>> values.shape, bool(jnp.isfinite(values).all())
        ((5,), True)
    """
    r = prepare_state(step, params, init, xs, length)
    carries, _, _ = unroll(r)
    size, dtype = state_size(r.init)

    def push(at_t, V):
        carry, x = at_t
        return step_and_push(r, carry, x, V)[1]

    def pull(at_t, U):
        carry, x = at_t
        flat, state_of = state_vector(carry)
        _, vjp = jax.vjp(lambda flat: state_vector(r.step(r.params, state_of(flat), x)[0])[0], flat)
        return jax.vmap(lambda u: vjp(u)[0], 1, 1)(U.astype(flat.dtype)).astype(U.dtype)

    return JacobianOperators(push, pull, (carries, r.xs), r.length, size, dtype)


def as_operators(J: JacobianOperators | Float[ArrayLike, "time n n"]) -> JacobianOperators:
    """Dense Jacobians as linear maps; what is one already stays as it is."""
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
            f"J has dtype {J.dtype}: pass real Jacobians, with real and imaginary parts as states of their own."
        )
    return J.astype(at_least_float32(J.dtype))


def prepare_state(step: Callable[..., Any] | Cell, params: Any, init: Any, xs: Any, length: int | None) -> Recurrence:
    """`prepare`, for what takes the carry as one state vector: real, not empty, and without batch axes as far as one can see."""
    r = prepare(step, params, init, xs, length)
    for path, leaf in jax.tree_util.tree_leaves_with_path(differentiable(r.init)):
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{name('init', path)} has dtype {leaf.dtype}: a state vector is real, carry real and imaginary parts apart."
            )
    if sum(leaf.size for leaf in jax.tree.leaves(differentiable(r.init))) == 0:
        raise ValueError(
            "init has no numbers with a derivative: there is no state to follow. Start from floating-point numbers."
        )
    if isinstance(step, Cell):
        one = jax.eval_shape(step.initial_carry)
        for (path, leaf), row in zip(jax.tree_util.tree_leaves_with_path(r.init), jax.tree.leaves(one), strict=False):
            if leaf.ndim > row.ndim:
                raise ValueError(
                    f"{name('init', path)} has shape {leaf.shape}, with batch axes before {row.shape}: the state would be that of "
                    "all rows together. Pass one row of init and xs, or use jax.vmap."
                )
    return r


def state_size(carry: Any) -> tuple[int, Any]:
    """Numbers in the state vector, and the dtype to multiply Jacobians in."""
    flat, _ = state_vector(carry)
    return flat.size, at_least_float32(flat.dtype)


def unroll(r: Recurrence) -> tuple[Any, Any, Any]:
    """Carries before and after every step, and the outputs."""

    def body(carry, x):
        new_carry, y = r.step(r.params, carry, x)
        return new_carry, (carry, new_carry, y)

    return jax.lax.scan(body, r.init, r.xs, length=r.length)[1]


def state_vector(carry: Any) -> tuple[Array, Callable[[Array], Any]]:
    """The carry as one vector, and back; leaves without a derivative stay outside of it."""
    diff, nondiff = partition(carry)
    flat, unravel = ravel_pytree(diff)
    return flat, lambda flat: combine(unravel(flat), nondiff)


def step_and_push(r: Recurrence, carry: Any, x: Any, V: Array) -> tuple[Any, Array]:
    """One step, and J V at it: the new carry costs nothing beside the derivative."""
    flat, state_of = state_vector(carry)

    def next_state(flat):
        new_carry, _ = r.step(r.params, state_of(flat), x)
        return ravel_pytree(differentiable(new_carry))[0], new_carry

    _, jvp, new_carry = jax.linearize(next_state, flat, has_aux=True)
    return new_carry, jax.vmap(jvp, 1, 1)(V.astype(flat.dtype)).astype(V.dtype)
