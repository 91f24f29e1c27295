r"""Rows of unequal length: sequences that begin anew in the middle, and steps that are padding.

Every strategy takes `is_first` and `valid`, and turns them here into another step, whose input has the flags of its time
step beside x. What is cut or left out is selected, in both directions, never multiplied by 0: 0·∞ is no number.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt.cells.cell import Adjoint
from jaxbptt.scans.backward import StepWithAdjoint, fit
from jaxbptt.scans.recurrence import Recurrence, name


def with_flags(
    step: StepWithAdjoint, r: Recurrence, is_first: Any, valid: Any, reset_carry: Any
) -> tuple[StepWithAdjoint, Any]:
    r"""The step whose input is (x, is_first, valid) at a time step, and all its inputs; as it was, without flags.

    cₜ₋₁ becomes the reset carry where xₜ is the first of a sequence, and cₜ = cₜ₋₁ where `valid` says that there is no
    xₜ. The reset carry becomes a part of the params and gets its gradient.
    """
    xs, reset_carry, flagged = _check(r, is_first, valid, reset_carry)
    if not flagged:
        return step, xs
    params = step.params, reset_carry
    return step._replace(step=_flagged_step(step.step), params=params, adjoint=_flagged_adjoint(step.adjoint)), xs


def without_adjoint(r: Recurrence, is_first: Any, valid: Any, reset_carry: Any) -> Recurrence:
    """The same for a strategy that leaves the derivative to JAX."""
    xs, reset_carry, flagged = _check(r, is_first, valid, reset_carry)
    if not flagged:
        return r
    return r._replace(step=_flagged_step(r.step), params=(r.params, reset_carry), xs=xs)


def _check(r: Recurrence, is_first: Any, valid: Any, reset_carry: Any) -> tuple[Any, Any, bool]:
    """The inputs with their flags, the carry to reset to, and whether there are flags at all."""
    if is_first is None and reset_carry is not None:
        raise ValueError("reset_carry says what is_first resets to: pass is_first as well, or leave it out.")
    if is_first is None and valid is None:
        return r.xs, None, False
    xs = r.xs
    if valid is not None:
        valid = _check_flags("valid", valid, r)
        xs = _made_safe(xs, valid)
    if is_first is not None:
        is_first = _check_flags("is_first", is_first, r)
        reset_carry = _check_reset_carry(reset_carry, r.init)
        if valid is not None:
            if is_first.shape != valid.shape:
                raise ValueError(
                    f"is_first has shape {is_first.shape}, but valid has {valid.shape}: both are [time, *batch], the same."
                )
            is_first &= valid  # a step that is not taken begins nothing
    return (xs, is_first, valid), reset_carry, True


def _flagged_step(step: Any) -> Any:
    def flagged_step(params, carry, x_and_flags):
        x, first, valid = x_and_flags
        carry = _start(params[1], carry, first)
        new_carry, y = step(params[0], carry, x)
        return _taken(valid, new_carry, carry), _present(valid, y)

    return flagged_step


def _flagged_adjoint(adjoint: Adjoint) -> Adjoint:
    def forward(params, carry, x_and_flags):
        x, first, valid = x_and_flags
        carry = _start(params[1], carry, first)
        (new_carry, y), residuals = adjoint.forward(params[0], carry, x)
        return (_taken(valid, new_carry, carry), _present(valid, y)), residuals

    def backward(params, residuals, x_and_flags, carry_bar, y_bar):
        x, first, valid = x_and_flags
        bars = _present(valid, carry_bar), _present(valid, y_bar)
        previous_bar, delta = adjoint.backward(params[0], residuals, x, *bars)
        carry_bar = _taken(valid, previous_bar, carry_bar)
        if first is None:
            return carry_bar, (delta, None)
        zeros = jax.tree.map(jnp.zeros_like, carry_bar)
        return _select(first, zeros, carry_bar), (delta, _select(first, carry_bar, zeros))

    def contract(params, residuals, xs_and_flags, ys_bar, deltas):
        xs, _, valid = xs_and_flags
        deltas, reset_bars = deltas
        params_bar, xs_bar = adjoint.contract(params[0], residuals, xs, _present(valid, ys_bar), deltas)
        params_bar, xs_bar = fit(params_bar, params[0], "params"), fit(xs_bar, xs, "xs")
        reset_bar = jax.tree.map(lambda leaf: leaf.sum(axis=0), reset_bars)
        return (params_bar, reset_bar), (xs_bar, None, None)

    return Adjoint(forward, backward, contract)


def _start(reset_carry: Any, carry: Any, first: Any) -> Any:
    return carry if first is None else _select(first, reset_carry, carry)


def _select(flag: Any, yes: Any, no: Any) -> Any:
    """`yes` in the rows whose flag is set, `no` in the others."""

    def leaf(yes, no):
        return jnp.where(flag.reshape(flag.shape + (1,) * (no.ndim - flag.ndim)), yes, no)

    return jax.tree.map(leaf, yes, no)


def _taken(valid: Any, new: Any, old: Any) -> Any:
    return new if valid is None else _select(valid, new, old)


def _present(valid: Any, tree: Any) -> Any:
    """0 in rows that have no such step."""
    if valid is None:
        return tree

    def leaf(path, leaf):
        if leaf.shape[: valid.ndim] != valid.shape:
            raise ValueError(
                f"{name('y', path)} has shape {leaf.shape} at a time step, but valid has {valid.shape} there: let every leaf "
                "of y begin with the batch axes, or pass valid as [time]."
            )
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf  # a random key has no zero
        return _select(valid, leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _made_safe(xs: Any, valid: Any) -> Any:
    """What stands in the padding gives way to the row's first valid input, and to 0 in a row that has none.

    The step runs on padding too, and its results are dropped; where it is not defined there, at 0 or at nan, its
    derivative would still be nan, and nan times the 0 that comes back is nan.
    """
    if not len(valid):
        return xs
    first = jnp.argmax(valid, axis=0)[None]

    def leaf(x):
        if x.shape[: valid.ndim] != valid.shape:
            return x  # one input for all rows
        index = first.reshape(first.shape + (1,) * (x.ndim - first.ndim))
        fill = jnp.take_along_axis(x, index, axis=0)
        if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            fill = _select(valid.any(axis=0)[None], fill, jnp.zeros_like(fill))
        return _select(valid, x, jnp.broadcast_to(fill, x.shape))

    return jax.tree.map(leaf, xs)


def _check_flags(flags_name: str, flags: Any, r: Recurrence) -> Any:
    """`is_first` or `valid` as an array of flags `[time, *batch]`, or an error that says what it should be."""
    flags = jnp.asarray(flags)
    if flags.dtype != jnp.bool_:
        hint = (
            ", or episode_number[1:] != episode_number[:-1] with True put in front" if flags_name == "is_first" else ""
        )
        raise TypeError(
            f"{flags_name} has dtype {flags.dtype}, but it says yes or no for each step: pass booleans, "
            f"such as {flags_name}.astype(bool){hint}."
        )
    if not flags.ndim or flags.shape[0] != r.length:
        raise ValueError(
            f"{flags_name} has shape {flags.shape}, but there are {r.length} time steps: time is its first axis."
        )
    batch = flags.shape[1:]
    for path, leaf in jax.tree_util.tree_leaves_with_path(r.init):
        if leaf.shape[: len(batch)] != batch:
            raise ValueError(
                f"{flags_name} has shape {flags.shape}, that is [time, *batch] with batch {batch}, but {name('init', path)} has "
                f"shape {leaf.shape}: its first axes must be the same, one flag for each row and time step."
            )
    return flags


def _check_reset_carry(reset_carry: Any, init: Any) -> Any:
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
