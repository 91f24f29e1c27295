r"""What is summed over time: the gradient of params, added up stretch by stretch, and checked.

Entries are moved to their places, as by a transpose or a concatenation, once after the last stretch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt.along_time import at_one_step, filled
from jaxbptt.array_types import as_type, type_over_time, zeros
from jaxbptt.programs.parts import arrays_of, before_moves, evaluate, program, used
from jaxbptt.programs.perturbed import PerturbedAdjoint
from jaxbptt.programs.trace import read
from jaxbptt.trees import is_array, name, select


class WeightGradient(NamedTuple):
    """How the gradient of params is added up over stretches of time.

    Attributes:
        zeros: sums to start with, in single precision at least.
        add: `(params, sums, residuals, xs, ys_bar, deltas, length=...)`, the sums with a stretch of so many steps added,
            and the gradient of xs there.
        finish: `(sums)`, the gradient of params.
    """

    zeros: Any
    add: Callable[..., tuple[Any, Any]]
    finish: Callable[[Any], Any]


def weight_gradient(
    adjoint: PerturbedAdjoint,
    params: Any,
    carry: Any,
    xs: Any,
    carry_bar: Any,
    ys_bar: Any,
    lengths: set[int],
    *,
    in_place: bool = False,
) -> WeightGradient:
    """The sums of an adjoint for stretches of these lengths; checks what it returns, for arguments of these shapes.

    With `in_place` entries are moved at every stretch: this takes more time, and no second array like the params. So they
    are where the adjoint moves them otherwise for one length than for another.
    """
    flags = adjoint.perturbed
    # What is kept until the sums are finished knows shapes alone: JAX would keep arrays alive with it.
    like = shapes(params)

    def step(params, carry, x, carry_bar, y_bar):
        _, residuals = adjoint.forward(params, carry, x)
        previous_bar, deltas = adjoint.backward(params, residuals, x, carry_bar, filled(y_bar))
        return residuals, deltas, fit(previous_bar, carry, flags.carry, "init")

    def contraction(length, params, residuals, xs, ys_bar, deltas):
        def contract(params, residuals, xs, ys_bar, deltas):
            params_bar, xs_bar = adjoint.contract(params, residuals, xs, filled(ys_bar, length), deltas)
            params_bar = fit(params_bar, like, flags.params, "params", cast=False)
            return params_bar, fit(xs_bar, xs, flags.x, "xs")

        traced = program(contract, params, residuals, xs, ys_bar, deltas)
        trees = traced.out_tree.children()
        return traced, trees, before_moves(traced, trees[0].num_leaves)

    def moved(params_tree, moves, sums):
        return fit(params_tree.unflatten(moves(sums)), like, flags.params, "params")

    def add(params, sums, *args, length):
        traced, (params_tree, xs_tree), moves = contraction(length, params, *args)
        xs_results = traced.results[params_tree.num_leaves :]
        inputs = dict(zip(traced.inputs, arrays_of((params, *args)), strict=True))
        env = evaluate(used(traced.eqns, [*moves.parts, *xs_results]), traced.consts | inputs)
        more, xs_bar = read(env, moves.parts), xs_tree.unflatten(read(env, xs_results))
        return add_up(sums, moved(params_tree, moves, more) if in_place else more), xs_bar

    x, y_bar = at_one_step((xs, ys_bar))
    one_step = program(step, params, carry, x, carry_bar, y_bar)
    residuals, deltas, _ = one_step.out_tree.unflatten([as_type(var.aval) for var in one_step.results])
    kinds = []
    for length in sorted(lengths):
        stacked = jax.tree.map(lambda leaf, length=length: type_over_time(leaf, length), (residuals, x, y_bar, deltas))
        _, (params_tree, _), moves = contraction(length, params, *stacked)
        parts = [as_type(var.aval) for var in moves.parts]
        finish = partial(moved, params_tree, moves)
        jax.eval_shape(finish, parts)
        kinds.append((moves.form, parts, finish))
    form, parts, finish = kinds[0]
    in_place = in_place or any(other != form for other, *_ in kinds)
    if in_place:
        return WeightGradient(
            totals(select(like, flags.params)), add, lambda sums: fit(sums, like, flags.params, "params")
        )
    return WeightGradient(totals(parts), add, finish)


def fit(bar: Any, primal: Any, flags: Any, root: str, *, cast: bool = True) -> Any:
    """Check a result of an `Adjoint` against what it is the derivative of, and give it that dtype.

    What it has for leaves that are not flagged is left out.
    """

    def leaf(path, flag, primal, bar):
        if not flag:
            return None
        aval = jax.typeof(primal)
        if bar is None:
            raise ValueError(
                f"The adjoint has no gradient of {name(root, path)}: return one for each leaf, None for those without a derivative."
            )
        bar = jnp.asarray(bar)
        if bar.shape != aval.shape:
            raise ValueError(
                f"The adjoint's gradient of {name(root, path)} has shape {bar.shape}, but {name(root, path)} has "
                f"{aval.shape}: sum over time and batch what it does not have, and check the order of its axes."
            )
        return bar.astype(aval.dtype) if cast else bar

    treedef = jax.tree.structure(flags)
    try:
        bars = treedef.flatten_up_to(bar)
    except ValueError:
        raise ValueError(
            f"The adjoint's gradient of {root} has structure {jax.tree.structure(bar)}, but {root} has "
            f"{jax.tree.structure(primal)}: return one gradient for each leaf, None for those without a derivative."
        ) from None
    return jax.tree_util.tree_map_with_path(leaf, flags, primal, treedef.unflatten(bars))


def totals(tree: Any) -> Any:
    """Zeros to add up gradients of these shapes in, in single precision at least."""

    def total(leaf):
        aval = jax.typeof(leaf)
        return zeros(as_type(aval if jnp.finfo(aval.dtype).bits >= 32 else aval.update(dtype=jnp.dtype(jnp.float32))))

    return jax.tree.map(total, tree)


def shapes(tree: Any) -> Any:
    """The types of arrays; what is no array, such as a flag among params, stays."""
    return jax.tree.map(lambda leaf: as_type(jax.typeof(leaf)) if is_array(leaf) else leaf, tree)


def add_up(totals: Any, more: Any) -> Any:
    """`totals` and what one more stretch adds to them."""
    return jax.tree.map(lambda total, leaf: total + leaf.astype(total.dtype), totals, more)
