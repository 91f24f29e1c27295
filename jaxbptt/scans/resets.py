r"""Sequences that begin anew in the middle: the carry is reset before the input that comes first is consumed."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt.cells.cell import Adjoint
from jaxbptt.scans.backward import StepWithAdjoint, fit
from jaxbptt.scans.recurrence import Recurrence, name


def check_is_first(is_first: Any, r: Recurrence) -> Any:
    """`is_first` as an array of flags `[time, *batch]`, or an error that says what it should be."""
    is_first = jnp.asarray(is_first)
    if is_first.dtype != jnp.bool_:
        raise TypeError(
            f"is_first has dtype {is_first.dtype}, but it says yes or no for each step: pass booleans, "
            "such as is_first.astype(bool), or episode_number[1:] != episode_number[:-1] with True put in front."
        )
    if not is_first.ndim or is_first.shape[0] != r.length:
        raise ValueError(
            f"is_first has shape {is_first.shape}, but there are {r.length} time steps: time is its first axis."
        )
    batch = is_first.shape[1:]
    for path, leaf in jax.tree_util.tree_leaves_with_path(r.init):
        if leaf.shape[: len(batch)] != batch:
            raise ValueError(
                f"is_first has shape {is_first.shape}, that is [time, *batch] with batch {batch}, but {name('init', path)} has "
                f"shape {leaf.shape}: its first axes must be the same, one flag for each row and time step."
            )
    return is_first


def check_reset_carry(reset_carry: Any, init: Any) -> Any:
    """The carry to reset to, in the shapes of `init`: zeros by default."""
    if reset_carry is None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(init):
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                raise ValueError(
                    f"{name('init', path)} is a random key, which has no zero: pass reset_carry, the carry to start again from."
                )
        return jax.tree.map(jnp.zeros_like, init)
    if jax.tree.structure(reset_carry) != jax.tree.structure(init):
        raise TypeError(
            f"reset_carry has structure {jax.tree.structure(reset_carry)}, but init has {jax.tree.structure(init)}: pass a "
            "carry like init."
        )

    def like(path, leaf, target):
        # A Python number has no dtype of its own.
        leaf = jnp.asarray(leaf) if hasattr(leaf, "dtype") else jnp.asarray(leaf, target.dtype)
        if leaf.dtype != target.dtype:
            raise TypeError(
                f"{name('reset_carry', path)} has dtype {leaf.dtype}, but that of init is {target.dtype}: cast it."
            )
        try:
            return jnp.broadcast_to(leaf, target.shape)
        except ValueError:
            raise ValueError(
                f"{name('reset_carry', path)} has shape {leaf.shape}, which does not fit that of init, {target.shape}: pass a "
                "carry like init, or one row of it."
            ) from None

    return jax.tree_util.tree_map_with_path(like, reset_carry, init)


def with_resets(step: StepWithAdjoint, reset_carry: Any) -> StepWithAdjoint:
    r"""The step whose input is (x, is_first): cₜ₋₁ is the reset carry where the flag is set, and no gradient passes there.

    A select in both directions: what is cut may be infinite, and 0·∞ is no number. The reset carry becomes a part of the
    params and gets its gradient.
    """

    def reset(first, carry, to):
        def leaf(old, new):
            return jnp.where(first.reshape(first.shape + (1,) * (old.ndim - first.ndim)), new, old)

        return jax.tree.map(leaf, carry, to)

    def reset_step(params, carry, x_and_first):
        x, first = x_and_first
        params, to = params
        return step.step(params, reset(first, carry, to), x)

    def forward(params, carry, x_and_first):
        x, first = x_and_first
        params, to = params
        return step.adjoint.forward(params, reset(first, carry, to), x)

    def backward(params, residuals, x_and_first, carry_bar, y_bar):
        x, first = x_and_first
        carry_bar, delta = step.adjoint.backward(params[0], residuals, x, carry_bar, y_bar)
        zeros = jax.tree.map(jnp.zeros_like, carry_bar)
        return reset(first, carry_bar, zeros), (delta, reset(first, zeros, carry_bar))

    def contract(params, residuals, xs_and_first, ys_bar, deltas):
        deltas, to_bars = deltas
        params, xs = params[0], xs_and_first[0]
        params_bar, xs_bar = step.adjoint.contract(params, residuals, xs, ys_bar, deltas)
        params_bar, xs_bar = fit(params_bar, params, "params"), fit(xs_bar, xs, "xs")
        to_bar = jax.tree.map(lambda leaf: leaf.sum(axis=0), to_bars)
        return (params_bar, to_bar), (xs_bar, None)

    return StepWithAdjoint(reset_step, (step.params, reset_carry), Adjoint(forward, backward, contract), step.branches)
