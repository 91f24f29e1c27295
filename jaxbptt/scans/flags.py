r"""Rows of unequal length: sequences that begin in the middle of a row, and steps that are padding.

Every strategy takes `is_first` and `valid`, which are checked here and make another step, whose input has the flags of its
time step beside x (`programs.flagged`).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, ArrayLike, Bool, Int

from jaxbptt.along_time import flipped
from jaxbptt.array_types import sharded_like
from jaxbptt.arrays import as_array, check_count
from jaxbptt.programs.derived import DifferentiableStep
from jaxbptt.programs.flagged import (
    adjoint_with_flagged_input,
    has_rows,
    rematerialised_selects,
    select_rows,
    with_flagged_input,
)
from jaxbptt.programs.perturbed import Perturbed, wrapping_for_outputs
from jaxbptt.scans.recurrence import Recurrence, as_arrays
from jaxbptt.trees import is_differentiable, is_key, is_ref, name
from jaxbptt.words import counted


class Flags(NamedTuple):
    """What a strategy was told of its rows: `is_first`, `valid` and `reset_carry`, each `None` where it was not given."""

    is_first: Any = None
    valid: Any = None
    reset_carry: Any = None

    @property
    def given(self) -> bool:
        """Whether there is anything to select."""
        return self.is_first is not None or self.valid is not None

    @property
    def options(self) -> dict[str, Any]:
        """Those that were given, as keyword arguments of a strategy."""
        return {word: option for word, option in self._asdict().items() if option is not None}


NO_FLAGS = Flags()


def with_flags(step: DifferentiableStep, r: Recurrence, flags: Flags) -> tuple[DifferentiableStep, Recurrence]:
    r"""The step whose input is (x, is_first, valid) at a time step, and its params and inputs; as it was, without flags.

    cₜ₋₁ becomes the reset carry where xₜ is the first of a sequence, and cₜ = cₜ₋₁ where `valid` says that there is no
    xₜ. The reset carry becomes a part of the params and gets its gradient.
    """
    _check_reset_has_flags(flags)
    if not flags.given:
        return step, r
    xs, *carries = _check(r, flags)
    unflagged, like_params = step.adjoint, step.like_params

    def adjoint_for(perturbed):
        (of_params, reset, *padding), init, (of_x, *of_flags) = perturbed
        # A carry that is reset to what is perturbed is perturbed.
        carry = init if reset is None else jax.tree.map(lambda a, b: a or bool(b), init, reset)

        def flagged(inner):
            carry = inner.perturbed.carry
            resets = None if reset is None else jax.tree.map(lambda a, b: a and bool(b), carry, reset)
            perturbed = Perturbed((inner.perturbed.params, resets, *padding), carry, (of_x, *of_flags))
            adjoint = inner._replace(**adjoint_with_flagged_input(inner, resets)._asdict(), perturbed=perturbed)
            return wrapping_for_outputs(adjoint, inner, flagged)

        return flagged(unflagged(Perturbed(of_params, carry, of_x)))

    step = step._replace(
        step=with_flagged_input(step.step), adjoint=adjoint_for, like_params=lambda params: like_params(params[0])
    )
    return step, r._replace(params=(r.params, *carries), xs=xs)


def without_adjoint(r: Recurrence, flags: Flags) -> Recurrence:
    """The same for a strategy that leaves the derivative to JAX."""
    r_with_flags = beside_input(r, flags)
    return r_with_flags if flags.given else r


def beside_input(r: Recurrence, flags: Flags) -> Recurrence:
    """The same in one form, flags given or not: params (params, reset carry, padding), xs (xs, is_first, valid)."""
    _check_reset_has_flags(flags)
    step = with_flagged_input(r.step)
    if not flags.given:
        return r._replace(step=step, params=(r.params, None, None), xs=(r.xs, None, None))
    xs, *carries = _check(r, flags)
    return r._replace(step=rematerialised_selects(step), params=(r.params, *carries), xs=xs)


def _check_reset_has_flags(flags: Flags) -> None:
    if flags.is_first is None and flags.reset_carry is not None:
        raise ValueError("reset_carry says what is_first resets to: pass is_first as well, or leave it out.")


def _check(r: Recurrence, flags: Flags) -> tuple[Any, Any, Any]:
    """The inputs with their flags, the carry to reset to, and the pair of carry and input for padded steps."""
    is_first, valid, reset_carry = flags
    if valid is not None:
        valid = check_flags("valid", valid, r)
    if is_first is not None:
        is_first = check_flags("is_first", is_first, r)
        reset_carry = _check_reset_carry(reset_carry, r.init, is_first.shape[1:])
        if valid is not None and is_first.shape != valid.shape:
            raise ValueError(
                f"is_first has shape {is_first.shape}, but valid has {valid.shape}: both are [time, *batch], the same."
            )
    if any(flags is not None and 0 in flags.shape for flags in (is_first, valid)):
        return (r.xs, None, None), None, None  # no step or no row to flag
    padding = None if valid is None else _padding(r, is_first, valid, reset_carry)
    return (r.xs, is_first, valid), reset_carry, padding


def _padding(r: Recurrence, is_first: Any, valid: Any, reset_carry: Any) -> tuple[Any, Any]:
    """A carry and an input for padded steps to run on, those of some valid step; `None` for keys, of which any will do.

    The step runs on padding too, and its results are dropped. But if its derivative is not finite there, at a carry and an
    input that never occur together, then nan times the cotangent 0 is nan. So a padded row repeats its own first valid
    step, or another row's if it has none; where no row has one, it runs on zeros.
    """
    rows = valid.any(axis=0)
    # In the order of running: the first carry meets that step's input.
    first_step = valid.shape[0] - 1 - jnp.argmax(flipped(valid), axis=0) if r.reverse else jnp.argmax(valid, axis=0)
    number = jnp.where(rows, jnp.arange(rows.size).reshape(rows.shape), rows.size)
    first_row = rows & (number == number.min())

    def at_first_step(leaf):
        index = first_step.reshape((1, *rows.shape) + (1,) * (leaf.ndim - valid.ndim))
        return jnp.take_along_axis(leaf, index, axis=0)[0]

    def in_every_row(leaf):
        if is_key(leaf):
            return None
        # Not by its index: the rows may be on several devices.
        other = select_rows(first_row, leaf, jnp.zeros_like(leaf)).sum(axis=range(rows.ndim), dtype=leaf.dtype)
        return select_rows(rows, leaf, other)

    def of_a_step(xs):
        if is_key(xs):
            return None
        if not has_rows(xs, valid.shape):  # shared by all rows
            x = xs[jnp.where(first_row, first_step, 0).sum()]
            return jnp.where(rows.any(), x, jnp.zeros_like(x))
        return in_every_row(at_first_step(xs))

    carry = r.init if is_first is None else select_rows(at_first_step(is_first), reset_carry, r.init)
    return jax.lax.stop_gradient((jax.tree.map(in_every_row, carry), jax.tree.map(of_a_step, r.xs)))


def valid_from_lengths(
    lengths: Int[ArrayLike, " *batch"] | Sequence[int], time_steps: int
) -> Bool[Array, " time *batch"]:
    r"""Which steps of padded rows are steps, for `valid`, from the number of steps of each row.

    validₜ = t < length,  t = 0 … time_steps − 1

    Args:
        lengths: whole numbers `[*batch]`, from 0 to `time_steps`; checked where they are known, and not where they are traced.
        time_steps: T, those of the padded arrays.

    Returns:
        Booleans `[time, *batch]`: each row begins with `length` times True, and the rest is padding.

    Raises:
        ValueError: a length below 0 or above `time_steps`; `time_steps` that are no whole number of at least 0.
        TypeError: lengths that are not whole numbers.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> print(bptt.valid_from_lengths(jnp.array([2, 3]), 3))
        [[ True  True]
         [ True  True]
         [False  True]]

    References:
        torch's `pad_sequence` and `pack_padded_sequence` describe padded rows by such lengths.
    """
    check_count("time_steps", time_steps, "it counts time steps", least=0)
    lengths = as_array("lengths", lengths, "[*batch] of whole numbers")
    if not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"lengths has dtype {lengths.dtype}, but it counts time steps: pass whole numbers.")
    if not isinstance(lengths, Tracer):
        wrong = [int(length) for length in np.unique(lengths) if not 0 <= length <= time_steps]
        if wrong:
            raise ValueError(
                f"lengths has {wrong[0]}, but rows have {counted(time_steps, 'time step')}: pass numbers from 0 to "
                f"{time_steps}, or more time_steps."
            )
    t = jnp.arange(time_steps).reshape(-1, *(1,) * lengths.ndim)
    return t < lengths[None].astype(t.dtype)  # which int8 may be too small for


def ends_of_sequences(is_first: Any, valid: Any) -> Any:
    """Where sequences begin if they are run from the last step to the first: where the next valid step is a first one."""
    is_first = _as_flags("is_first", is_first)
    valid = jnp.ones_like(is_first) if valid is None else _as_flags("valid", valid)

    def step_back(next_begins, at_t):
        first, valid = at_t
        return jnp.where(valid, first, next_begins), next_begins

    nothing_follows = sharded_like(jnp.zeros(is_first.shape[1:], bool), (is_first & valid).any(axis=0))
    return jax.lax.scan(step_back, nothing_follows, (is_first, valid), reverse=True)[1]


def check_flags(flags_name: str, flags: Any, r: Recurrence) -> Any:
    """`is_first` or `valid` as an array of flags `[time, *batch]`, or an error that says what it should be."""
    flags = _as_flags(flags_name, flags)
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
            f"{flags_name} has shape {flags.shape}, but the sequence has {counted(r.length, 'time step')}: time is its "
            "first axis."
        )
    batch = flags.shape[1:]
    for path, leaf in jax.tree_util.tree_leaves_with_path(r.init):
        if has_rows(leaf, batch) or is_key(leaf):
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


def _as_flags(flags_name: str, flags: Any) -> Any:
    flags = as_arrays(flags_name, flags) if is_ref(flags) else flags
    return as_array(flags_name, flags, "[time, *batch] of booleans")


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
        if is_key(target) and not has_rows(target, batch):
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
                f"{name('reset_carry', path)} has shape {leaf.shape}, which does not fit that of init, {target.shape}: pass "
                "a carry like init, or one row of it."
            )
        return sharded_like(whole, target)

    return jax.tree_util.tree_map_with_path(like, reset_carry, init)


def _zeros(path: Any, leaf: Any) -> Any:
    if is_key(leaf):
        return None
    if leaf.dtype == jnp.uint32 and leaf.shape[-1:] in ((2,), (4,)):
        raise ValueError(
            f"{name('init', path)} has dtype uint32 and shape {leaf.shape}, as a raw random key has, which has no zero: "
            "pass a typed key, jax.random.wrap_key_data(key), which is not reset; or reset_carry, the carry to reset to."
        )
    return jnp.zeros_like(leaf)
