r"""The forward pass of a recurrence, run once and kept: the states that Jacobians, spectra and the diagnosis are taken at.

With the carry as one state vector, and the Jacobian of one step as a linear map of such vectors.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array

from jaxbptt.arrays import at_least_float32
from jaxbptt.cells.cell import Cell
from jaxbptt.scans.flags import NO_FLAGS, Flags, beside_input
from jaxbptt.scans.recurrence import Recurrence, prepare
from jaxbptt.trees import combine, differentiable, name, partition


class Trajectory(NamedTuple):
    """A recurrence and the states it goes through.

    Attributes:
        recurrence: the step with its arguments and flags (`beside_input`): its params are (params, reset carry, padding),
            its xs are (xs, is_first, valid).
        carries: c₀ … c_{T−1}, before every step, leaves `[time, ...]`.
        new_carries: c₁ … c_T, after every step.
        ys: the outputs.
    """

    recurrence: Recurrence
    carries: Any
    new_carries: Any
    ys: Any

    @property
    def last_carry(self) -> Any:
        """c_T, which is c₀ for a sequence without time steps."""
        r = self.recurrence
        return jax.tree.map(lambda start, after: after[-1] if r.length else start, r.init, self.new_carries)

    @property
    def at(self) -> Any:
        """What `push` and `pull` need of each step, leaves `[time, ...]`: the carry before it, and its input."""
        return self.carries, self.recurrence.xs

    def push(self, at_t: Any, V: Array) -> Array:
        """Jₜ V, in forward mode."""
        carry, x = at_t
        return step_and_push(self.recurrence, carry, x, V)[1]

    def pull(self, at_t: Any, U: Array) -> Array:
        """Jₜᵀ U, in reverse mode."""
        carry, x = at_t
        r = self.recurrence
        flat, state_of = state_vector(carry)
        _, vjp = jax.vjp(lambda flat: state_vector(r.step(r.params, state_of(flat), x)[0])[0], flat)
        return jax.vmap(lambda u: vjp(u)[0], 1, 1)(U.astype(flat.dtype)).astype(U.dtype)


def trajectory_of(r: Recurrence, flags: Flags = NO_FLAGS) -> Trajectory:
    """Run a recurrence, and keep all carries and outputs."""
    r = beside_input(r, flags)

    def body(carry, x):
        new_carry, y = r.step(r.params, carry, x)
        return new_carry, (carry, new_carry, y)

    return Trajectory(r, *jax.lax.scan(body, r.init, r.xs, length=r.length)[1])


def prepare_state(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any,
    length: int | None,
    flags: Flags = NO_FLAGS,
    *,
    root: str = "init",
) -> Recurrence:
    """`prepare`, where the carry is one state vector: real, not empty, and, as far as can be seen, without batch axes.

    The flags are checked to be those of one row. Messages call the carry `root`.
    """
    r = prepare(step, params, init, xs, length)
    for word, flag in (("is_first", flags.is_first), ("valid", flags.valid)):
        if np.ndim(flag) > 1:
            raise ValueError(
                f"{word} has shape {np.shape(flag)}, but a state vector is one row, with flags [time]: pass those of one "
                "row, or use jax.vmap."
            )
    for path, leaf in jax.tree_util.tree_leaves_with_path(differentiable(r.init)):
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{name(root, path)} has dtype {leaf.dtype}, but a state vector is real: carry its real and imaginary "
                "parts as two leaves."
            )
    if sum(leaf.size for leaf in jax.tree.leaves(differentiable(r.init))) == 0:
        raise ValueError(
            f"{root} has no differentiable numbers, so there is no state: start from floating-point numbers."
        )
    if isinstance(step, Cell):
        one = jax.eval_shape(step.initial_carry)
        for (path, leaf), row in zip(jax.tree_util.tree_leaves_with_path(r.init), jax.tree.leaves(one), strict=False):
            if leaf.ndim > row.ndim:
                raise ValueError(
                    f"{name(root, path)} has shape {leaf.shape}, which is {row.shape} with batch axes: all rows together "
                    "would count as one state. Pass one row of it and of the input, or use jax.vmap."
                )
    return r


def state_vector(carry: Any) -> tuple[Array, Callable[[Array], Any]]:
    """The carry as one vector, and its inverse; non-differentiable leaves are no part of the vector."""
    diff, nondiff = partition(carry)
    flat, unravel = ravel_pytree(diff)
    return flat, lambda flat: combine(unravel(flat), nondiff)


def state_size(carry: Any) -> tuple[int, Any]:
    """How many numbers the state vector has, and the dtype to multiply Jacobians in."""
    flat, _ = state_vector(carry)
    return flat.size, at_least_float32(flat.dtype)


def step_and_push(r: Recurrence, carry: Any, x: Any, V: Array) -> tuple[Any, Array]:
    """One step, and J V at it: the derivative computes the new carry anyway."""
    flat, state_of = state_vector(carry)

    def next_state(flat):
        new_carry, _ = r.step(r.params, state_of(flat), x)
        return ravel_pytree(differentiable(new_carry))[0], new_carry

    _, jvp, new_carry = jax.linearize(next_state, flat, has_aux=True)
    return new_carry, jax.vmap(jvp, 1, 1)(V.astype(flat.dtype)).astype(V.dtype)
