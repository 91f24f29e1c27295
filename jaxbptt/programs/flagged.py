r"""A step whose input has flags beside x: `is_first`, where its row is reset, and `valid`, where it is a step at all.

Values and cotangents are selected by row, never multiplied by a flag: 0·∞ is nan. The params are (params of the step,
carry to reset to, carry and input that padded steps run on).
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from jaxbptt.array_types import sharded_alike
from jaxbptt.cells.cell import Adjoint
from jaxbptt.programs.perturbed import PerturbedAdjoint, fit
from jaxbptt.trees import combine, differentiable, is_array, is_key, name, partition, select

_LARGER_FLAGS = {"broadcast_in_dim", "reshape", "convert_element_type"}


def with_flagged_input(step: Any) -> Any:
    """The step whose input is (x, is_first, valid)."""

    def flagged_step(params, carry, x_and_flags):
        x, first, valid = x_and_flags
        params, carry, runs_on = start(params, carry, x, first, valid)
        new_carry, y = step(params, *runs_on)
        return taken(valid, new_carry, carry), present(valid, y)

    return flagged_step


def with_flagged_readout(step: Any, read: Any) -> Any:
    """`read(params, carry, x, new_carry) -> y` of a step, for the step whose input is (x, is_first, valid)."""

    def flagged_read(params, carry, x_and_flags, new_carry):
        x, first, valid = x_and_flags
        params, _, runs_on = start(params, carry, x, first, valid)
        if valid is not None:
            # A padded step reads its own carry, whose output is dropped, and not the one that is held.
            new_carry = select_rows(valid, new_carry, step(params, *runs_on)[0])
        return present(valid, read(params, *runs_on, new_carry))

    return flagged_read


def adjoint_with_flagged_input(adjoint: PerturbedAdjoint, reset: Any) -> Adjoint:
    """The adjoint of the flagged step; `reset` flags the leaves of the reset carry that get a gradient."""

    def forward(params, carry, x_and_flags):
        x, first, valid = x_and_flags
        params, carry, runs_on = start(params, carry, x, first, valid)
        (new_carry, y), residuals = adjoint.forward(params, *runs_on)
        return (taken(valid, new_carry, carry), present(valid, y)), residuals

    def backward(params, residuals, x_and_flags, carry_bar, y_bar):
        params, _, padding = params
        x, first, valid = x_and_flags
        bars = present(valid, carry_bar), present(valid, y_bar)
        previous_bar, delta = adjoint.backward(params, residuals, _inputs(valid, x, padding), *bars)
        previous_bar = fit(previous_bar, carry_bar, adjoint.perturbed.carry, "init")
        carry_bar = taken(valid, previous_bar, carry_bar)
        if first is None:
            return carry_bar, (delta, None)
        zeros = jax.tree.map(jnp.zeros_like, carry_bar)
        first = begins(first, valid)
        return select_rows(first, zeros, carry_bar), (delta, select(select_rows(first, carry_bar, zeros), reset))

    def contract(params, residuals, xs_and_flags, ys_bar, deltas):
        params, _, padding = params
        xs, _, valid = xs_and_flags
        deltas, reset_bars = deltas
        ran_on = _inputs(valid, xs, padding)
        params_bar, xs_bar = adjoint.contract(params, residuals, ran_on, present(valid, ys_bar), deltas)
        params_bar = fit(params_bar, params, adjoint.perturbed.params, "params")
        xs_bar = fit(xs_bar, xs, adjoint.perturbed.x, "xs")
        if valid is not None:
            xs_bar = taken(valid, xs_bar, jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), xs_bar))
        reset_bar = jax.tree.map(lambda leaf: leaf.sum(axis=0), reset_bars)
        # The results of padded steps are dropped, so what they run on has no gradient.
        no_bar = jax.tree.map(jnp.zeros_like, differentiable(padding))
        return (params_bar, reset_bar, no_bar), (xs_bar, None, None)

    return Adjoint(forward, backward, contract)


def rematerialised_selects(step: Any) -> Any:
    """The same step, with what `select_rows` makes rematerialised: JAX would save a copy of all inputs as residuals."""

    def selecting_step(params, carry, x):
        arrays, static = partition((params, carry, x), is_array)
        closed, shapes = jax.make_jaxpr(lambda arrays: step(*combine(arrays, static)), return_shape=True)(arrays)
        run = jaxpr_as_fun(closed)
        if not closed.effects:  # an effect would happen twice
            run = jax.checkpoint(run, prevent_cse=False, policy=_is_saved)
        return jax.tree.unflatten(jax.tree.structure(shapes), run(*jax.tree.leaves(arrays)))

    return selecting_step


def select_rows(flag: Any, yes: Any, no: Any) -> Any:
    """`yes` in the rows whose flag is set, `no` in the others; of what all rows share, `yes` where any flag is set.

    `no` may be one row for all, or that of one step where `yes` is a segment. Where one of them is `None`, the other is
    returned.
    """

    def leaf(yes, no):
        if yes is None or no is None:
            return no if yes is None else yes
        here = flag if has_rows(yes, flag.shape) else flag.any(axis=range(yes.ndim - no.ndim, flag.ndim))
        here = here.reshape(here.shape + (1,) * (yes.ndim - here.ndim))
        here, yes, no = jnp.broadcast_arrays(here, yes, no.reshape((1,) * (yes.ndim - no.ndim) + no.shape))
        # No booleans: `_is_saved` tells it by this from what the user selects.
        return jax.lax.select_n(*sharded_alike(here.astype(jnp.int32), no, yes))

    return jax.tree.map(leaf, yes, no, is_leaf=lambda leaf: leaf is None)


def has_rows(leaf: Any, axes: tuple[int, ...]) -> bool:
    """Whether each row has its own."""
    return leaf.shape[: len(axes)] == axes


def start(params: Any, carry: Any, x: Any, first: Any, valid: Any) -> tuple[Any, Any, tuple[Any, Any]]:
    """The params, the carry as it stands before a step, and the carry and input that the step runs on."""
    params, reset_carry, padding = params
    carry = carry if first is None else select_rows(begins(first, valid), reset_carry, carry)
    return params, carry, (carry, x) if valid is None else select_rows(valid, (carry, x), padding)


def _inputs(valid: Any, xs: Any, padding: Any) -> Any:
    """The input that a step ran on, or those of a segment."""
    return xs if valid is None else select_rows(valid, xs, padding[1])


def begins(first: Any, valid: Any) -> Any:
    """Where a row is reset: a padded step resets nothing."""
    return first if valid is None else first & valid


def taken(valid: Any, new: Any, old: Any) -> Any:
    """`new` where there is a step, and `old` in padded rows."""
    return new if valid is None else select_rows(valid, new, old)


def present(valid: Any, tree: Any) -> Any:
    """`tree` with 0 in the rows that are padding."""
    if valid is None:
        return tree

    def leaf(path, leaf):
        if is_key(leaf):
            return leaf
        leaf = jnp.asarray(leaf)
        if not has_rows(leaf, valid.shape):
            raise ValueError(
                f"{name('y', path)} has shape {leaf.shape} at a time step, but valid has {valid.shape} there: let every "
                "leaf of y begin with the batch axes, or pass valid as [time]."
            )
        return select_rows(valid, leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _is_saved(primitive: Any, *operands: Any, **_: Any) -> bool:
    """Whether JAX saves the result of an operation: not the arrays that `select_rows` makes, nor larger copies of flags."""
    if primitive is jax.lax.select_n_p:
        return operands[0].dtype == jnp.bool_
    return not operands or operands[0].dtype != jnp.bool_ or primitive.name not in _LARGER_FLAGS
