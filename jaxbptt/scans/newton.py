r"""Any recurrence, parallel in time: all states at once by Newton's method, and a gradient that is exact however they were found."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxbptt.along_time import at_one_step, flipped
from jaxbptt.array_types import as_type
from jaxbptt.arrays import check_count, is_number
from jaxbptt.cells.cell import Cell
from jaxbptt.html_table import fields_table
from jaxbptt.programs.structure import Group, groups_of
from jaxbptt.scans.affine import at_all_steps
from jaxbptt.scans.all_at_once import AllAtOnce, strategy
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.newton_iteration import Options, newton
from jaxbptt.scans.passes import Pass, one_pass
from jaxbptt.scans.recurrence import Recurrence, check_known_length, prepare
from jaxbptt.trees import is_differentiable, name

# Beyond so many passes over all time steps the loop over time is likely to be faster.
_MAX_ITERATIONS = 100


class NewtonStates(NamedTuple):
    """What Newton's method made of a recurrence, and how it went.

    Attributes:
        carries: the last guess of the carries after every step, leaves `[time, ...]`, right before `first_bad_step`.
        ys: the outputs of a step from each of them.
        iterations: affine recurrences that were solved, one after the other: over all time steps, or with `chunk_length` over
            one window each.
        residual: the largest |cₜ − f(cₜ₋₁)|, relative to the largest |c| of the leaf and row up to there.
        converged: whether the last iteration changed no state by more than the tolerance, and no residual is larger.
        first_bad_step: the first step, in the order of running, at which one of them is; T where there is none.
    """

    carries: Any
    ys: Any
    iterations: Int[Array, ""]
    residual: Float[Array, ""]
    converged: Bool[Array, ""]
    first_bad_step: Int[Array, ""]

    def _repr_html_(self) -> str:
        return fields_table(self)


def newton_scan(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
    reverse: bool = False,
    jacobian: Literal["full", "diagonal"] = "full",
    tolerance: float | None = None,
    max_iterations: int | None = None,
    damping: float = 0.0,
    guess: Any = None,
    chunk_length: int | None = None,
) -> tuple[Any, Any]:
    r"""TODO."""
    solver = _Solver.of(
        "newton_scan",
        (step, params, init, xs, length, Flags(is_first, valid, reset_carry), reverse),
        (jacobian, tolerance, max_iterations, damping, guess, chunk_length),
    )

    def before(params, init, xs):
        return solver.solve(params, init, xs, finish=True)[0]

    return strategy("newton_scan", solver.over_time, before, solver.r.length, chunk_length)(solver.r)


def newton_states(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
    reverse: bool = False,
    jacobian: Literal["full", "diagonal"] = "full",
    tolerance: float | None = None,
    max_iterations: int | None = None,
    damping: float = 0.0,
    guess: Any = None,
    chunk_length: int | None = None,
) -> NewtonStates:
    r"""TODO."""
    solver = _Solver.of(
        "newton_states",
        (step, params, init, xs, length, Flags(is_first, valid, reset_carry), reverse),
        (jacobian, tolerance, max_iterations, damping, guess, chunk_length),
    )
    r, over_time = solver.r, solver.over_time
    params, init, xs = jax.tree.map(_constant, (r.params, r.init, r.xs))
    before, after, report = solver.solve(params, init, xs, finish=False)

    def y(c, x):
        return over_time.step.step(params, c, x)[1]

    ys = at_all_steps(y, r.length, one_at_a_time=over_time.step.one_at_a_time)(before, xs)
    if r.reverse:
        after, ys = flipped((after, ys))
    return NewtonStates(
        after, ys, report.iterations, report.residual, report.first_bad_step == r.length, report.first_bad_step
    )


class _Solver(NamedTuple):
    """A recurrence and how to solve it.

    Attributes:
        over_time: the pass.
        r: the recurrence with params and xs to call it with.
        on_leaves: its step on real leaves.
        groups: of the leaves.
        guess: real leaves, in the order of running, or `None`.
        options: of the iteration.
    """

    over_time: Pass
    r: Recurrence
    on_leaves: AllAtOnce
    groups: list[Group]
    guess: list[Any] | None
    options: Options

    @classmethod
    def of(cls, strategy_name: str, recurrence: tuple[Any, ...], options: tuple[Any, ...]) -> "_Solver":
        """Checked."""
        step, params, init, xs, length, flags, reverse = recurrence
        *options, guess, chunk_length = options
        _check_options(*options)
        if chunk_length is not None:
            check_count("chunk_length", chunk_length, "it counts time steps")
        r = prepare(step, params, init, xs, length, flags.is_first, flags.valid, reverse=reverse)
        check_known_length(strategy_name, r.length)
        over_time, r = one_pass(step, None, r, flags, 1)
        over_time.check_recomputable(strategy_name)
        on_leaves = AllAtOnce.of(over_time, r.init)
        guess = None if guess is None else _checked_guess(guess, r)
        groups = _groups(on_leaves, r, strategy_name)
        jacobian, tolerance, max_iterations, damping = options
        options = Options(
            diagonal=jacobian == "diagonal",
            tolerance=tolerance,
            max_iterations=max_iterations or _MAX_ITERATIONS,
            damping=damping,
            chunk_length=min(chunk_length or r.length, r.length),
        )
        return cls(over_time, r, on_leaves, groups, guess and on_leaves.leaves.split(guess), options)

    def solve(self, params: Any, init: Any, xs: Any, *, finish: bool) -> tuple[Any, Any, Any]:
        """The carries before and after every step, and the report."""
        leaves = self.on_leaves.leaves
        before, after, report = newton(
            lambda parts, x: self.on_leaves.step(parts, (params, x)),
            self.groups,
            leaves.split(init),
            xs,
            self.guess,
            self.r.length,
            self.options,
            one_at_a_time=self.over_time.step.one_at_a_time,
            finish=finish,
        )
        return leaves.joined(before), leaves.joined(after), report


def _check_options(jacobian: Any, tolerance: Any, max_iterations: Any, damping: Any) -> None:
    if jacobian not in ("full", "diagonal"):
        raise ValueError(f"jacobian is {jacobian!r}: pass 'full' or 'diagonal'.")
    if tolerance is not None and not is_number(tolerance, 0):
        raise ValueError(
            f"tolerance is {tolerance!r}, but it bounds how much a state still changes: pass a number above 0, or None."
        )
    if max_iterations is not None:
        check_count("max_iterations", max_iterations, "it counts passes over all time steps")
    if not (is_number(damping, -1, 1) and damping >= 0):
        raise ValueError(
            f"damping is {damping!r}, but 1 − damping is the factor on the Jacobian: pass a number from 0 up to, but not "
            "including, 1."
        )


def _checked_guess(guess: Any, r: Recurrence) -> Any:
    """The guess as a constant, in the dtypes of the carry and in the order of running."""
    if jax.tree.structure(guess) != jax.tree.structure(r.init):
        raise TypeError(
            f"guess has structure {jax.tree.structure(guess)}, but init has {jax.tree.structure(r.init)}: pass carries "
            "stacked on a leading time axis, such as `newton_states(...).carries`."
        )

    def checked(path, leaf, target):
        shape = (r.length, *target.shape)
        if jnp.shape(leaf) != shape:
            raise ValueError(
                f"{name('guess', path)} has shape {jnp.shape(leaf)}, but {shape} is expected: the carry after each of "
                f"{r.length} time steps."
            )
        return _constant(leaf.astype(target.dtype) if is_differentiable(target) else leaf)

    guess = jax.tree_util.tree_map_with_path(checked, guess, r.init)
    return flipped(guess) if r.reverse else guess


def _constant(leaf: Any) -> Any:
    return jax.lax.stop_gradient(leaf) if is_differentiable(leaf) else leaf


def _groups(on_leaves: AllAtOnce, r: Recurrence, strategy_name: str) -> list[Group]:
    """The groups of the leaves, each of which is differentiable or not."""
    types = [as_type(jax.typeof(leaf)) for leaf in on_leaves.leaves.split(r.init)]
    groups = groups_of(on_leaves.step, types, (r.params, at_one_step(r.xs)), look_for_clashes=False)
    paths = [path for path, leaf in jax.tree_util.tree_leaves_with_path(r.init)]
    names = [name("init", path) for path, twice in zip(paths, on_leaves.leaves.is_complex, strict=True) for _ in range(1 + twice)]
    for group in groups:
        fixed = [i for i in group.leaves if not is_differentiable(types[i])]
        if fixed and len(group.leaves) > len(fixed):
            other = next(i for i in group.leaves if i not in fixed)
            raise TypeError(
                f"{names[fixed[0]]} has dtype {types[fixed[0]].dtype}, so it has no derivative, and it and {names[other]} depend "
                f"on each other: {strategy_name} linearises the step. Use adjoint_scan or scan."
            )
    return groups
