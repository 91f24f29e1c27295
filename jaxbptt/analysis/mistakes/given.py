r"""The problem that a gradient is of: checked, its rows counted, and its weights found if it is an Elman network's."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbptt.analysis.mistakes import elman
from jaxbptt.analysis.mistakes.loop import Problem, of_any_step
from jaxbptt.cells.cell import Cell, step_of
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.recurrence import prepare
from jaxbptt.trees import differentiable, is_array, partition


class Given(NamedTuple):
    """The problem that a gradient is of.

    Attributes:
        step: a function or a `Cell`.
        params: θ.
        init: c₀.
        xs: the inputs.
        loss: `loss(carry, ys) -> scalar`.
        length: T, or `None`.
        flags: `is_first`, `valid`, `reset_carry`.
    """

    step: Any
    params: Any
    init: Any
    xs: Any
    loss: Callable[..., Any]
    length: int | None
    flags: Flags


class Prepared(NamedTuple):
    """A problem with its time steps, rows and roles."""

    given: Given
    steps: int
    rows: int
    roles: elman.Roles | None
    with_init: bool


def prepared(given: Given, reference: Any) -> Prepared:
    """Check that a gradient is one of this problem's params, or of (params, init)."""
    r = prepare(given.step, given.params, given.init, given.xs, given.length, *given.flags[:2])
    if r.length == 0:
        raise ValueError("A sequence without time steps has no backward loop: pass at least one step.")
    given = given._replace(init=r.init, xs=r.xs)
    of_params, of_both = (jax.tree.structure(differentiable(tree)) for tree in (given.params, (given.params, r.init)))
    structure = jax.tree.structure(reference)
    if structure not in (of_params, of_both):
        raise ValueError(
            f"The gradients have structure {structure}, but params have {of_params}: pass gradients of params, or of the "
            "pair (params, init)."
        )
    flagged = given.flags.given
    roles = None if flagged else elman.find(step_of(given.step), given.params, r.init, r.xs)
    return Prepared(given, r.length, _rows(given), roles, structure == of_both and structure != of_params)


def problem_of(p: Prepared, params: Any, init: Any, xs: Any, flags: Flags) -> Problem:
    """The problem of arrays that may be traced."""
    general = of_any_step(p.given.step, params, init, xs, p.given.loss, p.given.length, flags)
    return general if p.roles is None else elman.problem(p.roles, general, params)


def counts_of(p: Prepared) -> dict[int, str]:
    """The numbers of time steps and of rows, that a sum and a mean differ by."""
    steps, rows = p.steps, p.rows
    found = {steps * rows: f"the {steps} time steps and {rows} rows", rows: f"the {rows} rows"}
    found |= {steps: f"the {steps} time steps" if steps != rows else f"the {steps} time steps (or rows)"}
    return {count: words for count, words in found.items() if count > 1}


def arrays_of(given: Given) -> tuple[Any, Any]:
    """The arrays of a problem, and what else is among its leaves."""
    return partition((given.params, given.init, given.xs, given.flags), by=is_array)


def _rows(given: Given) -> int:
    """Rows of the batch, as far as can be seen: a cell says so, and of another step the shapes."""
    leaves = jax.tree.leaves(given.init)
    if isinstance(given.step, Cell):
        one = jax.tree.leaves(jax.eval_shape(given.step.initial_carry))
        added = {leaf.shape[: leaf.ndim - row.ndim] for leaf, row in zip(leaves, one, strict=False)}
        return int(np.prod(added.pop())) if len(added) == 1 else 1
    sizes = {leaf.shape[0] if leaf.ndim > 1 else 1 for leaf in leaves}
    sizes |= {leaf.shape[1] if leaf.ndim > 2 else 1 for leaf in jax.tree.leaves(given.xs)}
    return sizes.pop() if len(sizes) == 1 else 1
