r"""Rows of unequal length: sequences that begin anew in the middle, and steps that are padding.

Every strategy takes `is_first` and `valid`, and turns them here into another step, whose input has the flags of its time
step beside x. What is cut or left out is selected, in both directions, never multiplied by 0: 0·∞ is no number.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt.cells.cell import Adjoint
from jaxbptt.scans.backward import StepWithAdjoint, fit
from jaxbptt.scans.recurrence import Recurrence, as_arrays, differentiable, is_key, name


def with_flags(
    step: StepWithAdjoint, r: Recurrence, is_first: Any, valid: Any, reset_carry: Any
) -> tuple[StepWithAdjoint, Any]:
    r"""The step whose input is (x, is_first, valid) at a time step, and all its inputs; as it was, without flags.

    cₜ₋₁ becomes the reset carry where xₜ is the first of a sequence, and cₜ = cₜ₋₁ where `valid` says that there is no
    xₜ. The reset carry becomes a part of the params and gets its gradient.
    """
    if not _flagged(is_first, valid, reset_carry):
        return step, r.xs
    xs, *carries = _check(r, is_first, valid, reset_carry)
    params = step.params, *carries
    return step._replace(step=_flagged_step(step.step), params=params, adjoint=_flagged_adjoint(step.adjoint)), xs


def without_adjoint(r: Recurrence, is_first: Any, valid: Any, reset_carry: Any) -> Recurrence:
    """The same for a strategy that leaves the derivative to JAX."""
    if not _flagged(is_first, valid, reset_carry):
        return r
    xs, *carries = _check(r, is_first, valid, reset_carry)
    return r._replace(step=_flagged_step(r.step), params=(r.params, *carries), xs=xs)


def _flagged(is_first: Any, valid: Any, reset_carry: Any) -> bool:
    if is_first is None and reset_carry is not None:
        raise ValueError("reset_carry says what is_first resets to: pass is_first as well, or leave it out.")
    return is_first is not None or valid is not None


def _check(r: Recurrence, is_first: Any, valid: Any, reset_carry: Any) -> tuple[Any, Any, Any]:
    """The inputs with their flags, the carry to reset to, and the one that padded steps run on."""
    if valid is not None:
        valid = _check_flags("valid", valid, r)
    if is_first is not None:
        is_first = _check_flags("is_first", is_first, r)
        reset_carry = _check_reset_carry(reset_carry, r.init)
        if valid is not None:
            if is_first.shape != valid.shape:
                raise ValueError(
                    f"is_first has shape {is_first.shape}, but valid has {valid.shape}: both are [time, *batch], the same."
                )
            is_first &= valid  # a step that is not taken begins nothing
    xs, padding_carry = r.xs, r.init
    if valid is not None and r.length:
        xs, padding_carry = _defined_everywhere(r, is_first, valid, reset_carry)
    return (xs, is_first, valid), reset_carry, padding_carry


def _flagged_step(step: Any) -> Any:
    def flagged_step(params, carry, x_and_flags):
        x, first, valid = x_and_flags
        params, carry, runs_on = _start(params, carry, first, valid)
        new_carry, y = step(params, runs_on, x)
        return _taken(valid, new_carry, carry), _present(valid, y)

    return flagged_step


def _flagged_adjoint(adjoint: Adjoint) -> Adjoint:
    def forward(params, carry, x_and_flags):
        x, first, valid = x_and_flags
        params, carry, runs_on = _start(params, carry, first, valid)
        (new_carry, y), residuals = adjoint.forward(params, runs_on, x)
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
        params, _, padding_carry = params
        xs, _, valid = xs_and_flags
        deltas, reset_bars = deltas
        params_bar, xs_bar = adjoint.contract(params, residuals, xs, _present(valid, ys_bar), deltas)
        params_bar, xs_bar = fit(params_bar, params, "params"), fit(xs_bar, xs, "xs")
        reset_bar = jax.tree.map(lambda leaf: leaf.sum(axis=0), reset_bars)
        # Nothing is computed from what padded steps compute.
        no_bar = jax.tree.map(jnp.zeros_like, differentiable(padding_carry))
        return (params_bar, reset_bar, no_bar), (xs_bar, None, None)

    return Adjoint(forward, backward, contract)


def _start(params: Any, carry: Any, first: Any, valid: Any) -> tuple[Any, Any, Any]:
    """The params, the carry as it stands before a step, and the one that the step runs on: another one in padded rows."""
    params, reset_carry, padding_carry = params
    carry = carry if first is None else _select(first, reset_carry, carry)
    return params, carry, carry if valid is None else _select(valid, carry, padding_carry)


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
        leaf = jnp.asarray(leaf)
        if leaf.shape[: valid.ndim] != valid.shape:
            raise ValueError(
                f"{name('y', path)} has shape {leaf.shape} at a time step, but valid has {valid.shape} there: let every leaf "
                "of y begin with the batch axes, or pass valid as [time]."
            )
        if is_key(leaf):
            return leaf
        return _select(valid, leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _defined_everywhere(r: Recurrence, is_first: Any, valid: Any, reset_carry: Any) -> tuple[Any, Any]:
    """The inputs, and a carry, with which padded steps do what some valid step does.

    The step runs on padding too, and its results are dropped; but where it is not defined there, at a pair of carry and
    input that never meet, its derivative is nan, and nan times the 0 that comes back is nan. So a padded row runs its own
    first valid step once more, or another row's if it has none; where there are none at all, on zeros.
    """
    rows = valid.any(axis=0)
    first_step = jnp.argmax(valid, axis=0)
    first_row = jnp.argmax(rows.reshape(-1))

    def at_first_step(leaf):
        index = first_step.reshape((1, *rows.shape) + (1,) * (leaf.ndim - valid.ndim))
        return jnp.take_along_axis(leaf, index, axis=0)[0]

    def or_zeros(leaf):
        if is_key(leaf):
            return leaf
        return jnp.where(rows.any(), leaf, jnp.zeros_like(leaf))

    def in_every_row(leaf):
        other = or_zeros(leaf.reshape(-1, *leaf.shape[rows.ndim :])[first_row])
        return _select(rows, leaf, jnp.broadcast_to(other, leaf.shape))

    def filled(x):
        if x.shape[: valid.ndim] != valid.shape:  # shared by all rows
            some = valid.any(axis=range(1, valid.ndim))
            other = or_zeros(x[first_step.reshape(-1)[first_row]])
            return _select(some, x, jnp.broadcast_to(other, x.shape))
        return _select(valid, x, jnp.broadcast_to(in_every_row(at_first_step(x)), x.shape))

    carry = r.init if is_first is None else _select(at_first_step(is_first), reset_carry, r.init)
    return jax.tree.map(filled, r.xs), jax.lax.stop_gradient(jax.tree.map(in_every_row, carry))


def _check_flags(flags_name: str, flags: Any, r: Recurrence) -> Any:
    """`is_first` or `valid` as an array of flags `[time, *batch]`, or an error that says what it should be."""
    flags = as_arrays(flags_name, flags)
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
                f"shape {leaf.shape}: its first axes must be the same, one flag for each row and time step. Where rows are mapped with "
                "jax.vmap, map the step and not the scan."
            )
    return flags


def _check_reset_carry(reset_carry: Any, init: Any) -> Any:
    """The carry to reset to, in the shapes of `init`: zeros by default."""
    if reset_carry is None:
        for path, leaf in jax.tree_util.tree_leaves_with_path(init):
            if is_key(leaf):
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
