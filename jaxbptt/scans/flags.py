r"""Rows of unequal length: sequences that begin in the middle of a row, and steps that are padding.

Every strategy takes `is_first` and `valid`, and turns them here into another step, whose input has the flags of its time
step beside x. Values and cotangents are selected, never multiplied by a flag: 0·∞ is nan.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import jaxpr_as_fun

from jaxbptt.array_types import lie_alike, lie_like
from jaxbptt.cells.cell import Adjoint
from jaxbptt.programs.derived import DifferentiableStep
from jaxbptt.programs.perturbed import Perturbed, PerturbedAdjoint, fit, of_outputs
from jaxbptt.scans.recurrence import Recurrence, as_arrays
from jaxbptt.trees import combine, differentiable, is_array, is_differentiable, is_key, name, partition, select
from jaxbptt.words import counted

_LARGER_FLAGS = {"broadcast_in_dim", "reshape", "convert_element_type"}


class Flags(NamedTuple):
    """What a strategy was told of its rows: `is_first`, `valid` and `reset_carry`, each `None` where it was not given."""

    is_first: Any = None
    valid: Any = None
    reset_carry: Any = None

    @property
    def given(self) -> bool:
        """Whether there is anything to select."""
        if self.is_first is None and self.reset_carry is not None:
            raise ValueError("reset_carry says what is_first resets to: pass is_first as well, or leave it out.")
        return self.is_first is not None or self.valid is not None


def with_flags(step: DifferentiableStep, r: Recurrence, flags: Flags) -> tuple[DifferentiableStep, Recurrence]:
    r"""The step whose input is (x, is_first, valid) at a time step, and its params and inputs; as it was, without flags.

    cₜ₋₁ becomes the reset carry where xₜ is the first of a sequence, and cₜ = cₜ₋₁ where `valid` says that there is no
    xₜ. The reset carry becomes a part of the params and gets its gradient.
    """
    if not flags.given:
        return step, r
    xs, *carries = _check(r, flags)
    adjoint_of, like_params = step.adjoint, step.like_params

    def adjoint_for(perturbed):
        (of_params, reset, *padding), init, (of_x, *of_flags) = perturbed
        # A carry that is reset to what is perturbed is perturbed.
        carry = init if reset is None else jax.tree.map(lambda a, b: a or bool(b), init, reset)

        def flagged(inner):
            carry = inner.perturbed.carry
            resets = None if reset is None else jax.tree.map(lambda a, b: a and bool(b), carry, reset)
            perturbed = Perturbed((inner.perturbed.params, resets, *padding), carry, (of_x, *of_flags))
            adjoint = inner._replace(**_flagged_adjoint(inner, resets)._asdict(), perturbed=perturbed)
            return of_outputs(adjoint, inner, flagged)

        return flagged(adjoint_of(Perturbed(of_params, carry, of_x)))

    step = step._replace(
        step=_flagged_step(step.step), adjoint=adjoint_for, like_params=lambda params: like_params(params[0])
    )
    return step, r._replace(params=(r.params, *carries), xs=xs)


def without_adjoint(r: Recurrence, flags: Flags) -> Recurrence:
    """The same for a strategy that leaves the derivative to JAX."""
    if not flags.given:
        return r
    xs, *carries = _check(r, flags)
    return r._replace(step=_selecting_again(_flagged_step(r.step)), params=(r.params, *carries), xs=xs)


def _check(r: Recurrence, flags: Flags) -> tuple[Any, Any, Any]:
    """The inputs with their flags, the carry to reset to, and the pair of carry and input for padded steps."""
    is_first, valid, reset_carry = flags
    if valid is not None:
        valid = _check_flags("valid", valid, r)
    if is_first is not None:
        is_first = _check_flags("is_first", is_first, r)
        reset_carry = _check_reset_carry(reset_carry, r.init, is_first.shape[1:])
        if valid is not None and is_first.shape != valid.shape:
            raise ValueError(
                f"is_first has shape {is_first.shape}, but valid has {valid.shape}: both are [time, *batch], the same."
            )
    if any(flags is not None and 0 in flags.shape for flags in (is_first, valid)):
        return (r.xs, None, None), None, None  # no step or no row to flag
    padding = None if valid is None else _padding(r, is_first, valid, reset_carry)
    return (r.xs, is_first, valid), reset_carry, padding


def _flagged_step(step: Any) -> Any:
    def flagged_step(params, carry, x_and_flags):
        x, first, valid = x_and_flags
        params, carry, runs_on = _start(params, carry, x, first, valid)
        new_carry, y = step(params, *runs_on)
        return _taken(valid, new_carry, carry), _present(valid, y)

    return flagged_step


def _selecting_again(step: Any) -> Any:
    """The same step, with what `_select` makes rematerialised: JAX would save a copy of all inputs as residuals."""

    def selecting_step(params, carry, x):
        arrays, others = partition((params, carry, x), is_array)
        closed, shapes = jax.make_jaxpr(lambda arrays: step(*combine(arrays, others)), return_shape=True)(arrays)
        run = jaxpr_as_fun(closed)
        if not closed.effects:  # an effect would happen twice
            run = jax.checkpoint(run, prevent_cse=False, policy=_is_saved)
        return jax.tree.unflatten(jax.tree.structure(shapes), run(*jax.tree.leaves(arrays)))

    return selecting_step


def _is_saved(primitive: Any, *operands: Any, **_: Any) -> bool:
    """Whether JAX saves the result of an operation: not the arrays that `_select` makes, nor larger copies of flags."""
    if primitive is jax.lax.select_n_p:
        return operands[0].dtype == jnp.bool_
    return not operands or operands[0].dtype != jnp.bool_ or primitive.name not in _LARGER_FLAGS


def _flagged_adjoint(adjoint: PerturbedAdjoint, reset: Any) -> Adjoint:
    """The same of the flagged step; `reset` flags the leaves of the reset carry that get a gradient."""

    def forward(params, carry, x_and_flags):
        x, first, valid = x_and_flags
        params, carry, runs_on = _start(params, carry, x, first, valid)
        (new_carry, y), residuals = adjoint.forward(params, *runs_on)
        return (_taken(valid, new_carry, carry), _present(valid, y)), residuals

    def backward(params, residuals, x_and_flags, carry_bar, y_bar):
        params, _, padding = params
        x, first, valid = x_and_flags
        bars = _present(valid, carry_bar), _present(valid, y_bar)
        previous_bar, delta = adjoint.backward(params, residuals, _inputs(valid, x, padding), *bars)
        previous_bar = fit(previous_bar, carry_bar, adjoint.perturbed.carry, "init")
        carry_bar = _taken(valid, previous_bar, carry_bar)
        if first is None:
            return carry_bar, (delta, None)
        zeros = jax.tree.map(jnp.zeros_like, carry_bar)
        first = _begins(first, valid)
        return _select(first, zeros, carry_bar), (delta, select(_select(first, carry_bar, zeros), reset))

    def contract(params, residuals, xs_and_flags, ys_bar, deltas):
        params, _, padding = params
        xs, _, valid = xs_and_flags
        deltas, reset_bars = deltas
        ran_on = _inputs(valid, xs, padding)
        params_bar, xs_bar = adjoint.contract(params, residuals, ran_on, _present(valid, ys_bar), deltas)
        params_bar = fit(params_bar, params, adjoint.perturbed.params, "params")
        xs_bar = fit(xs_bar, xs, adjoint.perturbed.x, "xs")
        if valid is not None:
            xs_bar = _taken(valid, xs_bar, jax.tree.map(lambda leaf: jnp.zeros_like(leaf[0]), xs_bar))
        reset_bar = jax.tree.map(lambda leaf: leaf.sum(axis=0), reset_bars)
        # The results of padded steps are dropped, so what they run on has no gradient.
        no_bar = jax.tree.map(jnp.zeros_like, differentiable(padding))
        return (params_bar, reset_bar, no_bar), (xs_bar, None, None)

    return Adjoint(forward, backward, contract)


def _start(params: Any, carry: Any, x: Any, first: Any, valid: Any) -> tuple[Any, Any, tuple[Any, Any]]:
    """The params, the carry as it stands before a step, and the carry and input that the step runs on."""
    params, reset_carry, padding = params
    carry = carry if first is None else _select(_begins(first, valid), reset_carry, carry)
    return params, carry, (carry, x) if valid is None else _select(valid, (carry, x), padding)


def _inputs(valid: Any, xs: Any, padding: Any) -> Any:
    """The input that a step ran on, or those of a segment."""
    return xs if valid is None else _select(valid, xs, padding[1])


def _begins(first: Any, valid: Any) -> Any:
    return first if valid is None else first & valid  # a padded step resets nothing


def _select(flag: Any, yes: Any, no: Any) -> Any:
    """`yes` in the rows whose flag is set, `no` in the others; of what all rows share, `yes` where any flag is set.

    `no` may be one for all rows, or that of one step for a segment. Where either is `None`, the other one.
    """

    def leaf(yes, no):
        if yes is None or no is None:
            return no if yes is None else yes
        here = flag if _of_rows(yes, flag.shape) else flag.any(axis=range(yes.ndim - no.ndim, flag.ndim))
        here = here.reshape(here.shape + (1,) * (yes.ndim - here.ndim))
        here, yes, no = jnp.broadcast_arrays(here, yes, no.reshape((1,) * (yes.ndim - no.ndim) + no.shape))
        # No booleans: `_is_saved` tells it by this from what the user selects.
        return jax.lax.select_n(*lie_alike(here.astype(jnp.int32), no, yes))

    return jax.tree.map(leaf, yes, no, is_leaf=lambda leaf: leaf is None)


def _taken(valid: Any, new: Any, old: Any) -> Any:
    return new if valid is None else _select(valid, new, old)


def _present(valid: Any, tree: Any) -> Any:
    """0 in rows that have no such step."""
    if valid is None:
        return tree

    def leaf(path, leaf):
        if is_key(leaf):
            return leaf
        leaf = jnp.asarray(leaf)
        if not _of_rows(leaf, valid.shape):
            raise ValueError(
                f"{name('y', path)} has shape {leaf.shape} at a time step, but valid has {valid.shape} there: let every leaf "
                "of y begin with the batch axes, or pass valid as [time]."
            )
        return _select(valid, leaf, jnp.zeros_like(leaf))

    return jax.tree_util.tree_map_with_path(leaf, tree)


def _padding(r: Recurrence, is_first: Any, valid: Any, reset_carry: Any) -> tuple[Any, Any]:
    """A carry and an input for padded steps to run on, those of some valid step; `None` for keys, of which any will do.

    The step runs on padding too, and its results are dropped. But if its derivative is not finite there, at a carry and an
    input that never occur together, then nan times the cotangent 0 is nan. So a padded row repeats its own first valid
    step, or another row's if it has none; where no row has one, it runs on zeros.
    """
    rows = valid.any(axis=0)
    first_step = jnp.argmax(valid, axis=0)
    number = jnp.where(rows, jnp.arange(rows.size).reshape(rows.shape), rows.size)
    first_row = rows & (number == number.min())

    def at_first_step(leaf):
        index = first_step.reshape((1, *rows.shape) + (1,) * (leaf.ndim - valid.ndim))
        return jnp.take_along_axis(leaf, index, axis=0)[0]

    def in_every_row(leaf):
        if is_key(leaf):
            return None
        # Not by its index: the rows may be on several devices.
        other = _select(first_row, leaf, jnp.zeros_like(leaf)).sum(axis=range(rows.ndim), dtype=leaf.dtype)
        return _select(rows, leaf, other)

    def of_a_step(xs):
        if is_key(xs):
            return None
        if not _of_rows(xs, valid.shape):  # shared by all rows
            x = xs[jnp.where(first_row, first_step, 0).sum()]
            return jnp.where(rows.any(), x, jnp.zeros_like(x))
        return in_every_row(at_first_step(xs))

    carry = r.init if is_first is None else _select(at_first_step(is_first), reset_carry, r.init)
    return jax.lax.stop_gradient((jax.tree.map(in_every_row, carry), jax.tree.map(of_a_step, r.xs)))


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
            f"{flags_name} has shape {flags.shape}, but the sequence has {counted(r.length, 'time step')}: time is its first axis."
        )
    batch = flags.shape[1:]
    for path, leaf in jax.tree_util.tree_leaves_with_path(r.init):
        if _of_rows(leaf, batch) or is_key(leaf):
            continue
        way_out = "Where rows are mapped with jax.vmap, map the step and not the scan."
        if not is_differentiable(leaf):
            way_out = (
                "What all rows share can't be reset or held for one of them: let a counter be an input, one "
                "number for each time step, and a raw random key a typed one, jax.random.wrap_key_data(key)."
            )
        raise ValueError(
            f"{flags_name} has shape {flags.shape}, that is [time, *batch] with batch {batch}, but {name('init', path)} has "
            f"shape {leaf.shape}: its first axes must be the same, one flag for each row and time step. {way_out}"
        )
    return flags


def _of_rows(leaf: Any, axes: tuple[int, ...]) -> bool:
    """Whether each row has its own."""
    return leaf.shape[: len(axes)] == axes


def _check_reset_carry(reset_carry: Any, init: Any, batch: tuple[int, ...]) -> Any:
    """The carry to reset to, in the shapes of `init`: zeros by default; `None` for keys that are not reset."""
    if reset_carry is None:
        return jax.tree_util.tree_map_with_path(_zeros, init)
    if jax.tree.structure(reset_carry) != jax.tree.structure(init):
        raise TypeError(
            f"reset_carry has structure {jax.tree.structure(reset_carry)}, but init has {jax.tree.structure(init)}: pass a "
            "carry like init."
        )

    def like(path, leaf, target):
        if hasattr(leaf, "dtype"):
            leaf = as_arrays(name("reset_carry", path), leaf)
        if is_key(target) and not _of_rows(target, batch):
            return None
        # A Python number has no dtype of its own.
        leaf = jnp.asarray(leaf) if hasattr(leaf, "dtype") else jnp.asarray(leaf, target.dtype)
        if leaf.dtype != target.dtype:
            raise TypeError(
                f"{name('reset_carry', path)} has dtype {leaf.dtype}, but that of init is {target.dtype}: cast it."
            )
        try:
            whole, _ = jnp.broadcast_arrays(leaf, target)
        except ValueError:
            whole = leaf
        if whole.shape != target.shape:
            raise ValueError(
                f"{name('reset_carry', path)} has shape {leaf.shape}, which does not fit that of init, {target.shape}: pass a "
                "carry like init, or one row of it."
            )
        return lie_like(whole, target)

    return jax.tree_util.tree_map_with_path(like, reset_carry, init)


def _zeros(path: Any, leaf: Any) -> Any:
    if is_key(leaf):
        return None
    if leaf.dtype == jnp.uint32 and leaf.shape[-1:] in ((2,), (4,)):
        raise ValueError(
            f"{name('init', path)} has dtype uint32 and shape {leaf.shape}, as a raw random key has, which has no zero: pass a "
            "typed key, jax.random.wrap_key_data(key), which is not reset; or reset_carry, the carry to reset to."
        )
    return jnp.zeros_like(leaf)
