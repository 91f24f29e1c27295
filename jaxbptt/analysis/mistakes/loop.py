r"""The backward loop as one writes it by hand, with every place where it can go wrong as a number.

A mistake is a `Loop` that differs from the right one in a few numbers: which step's loss a step reads, what it passes on,
how often it counts. So one compiled program runs all mistakes, and a new one is a line in a table.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.analysis.backward_passes import Unrolled, unroll
from jaxbptt.arrays import scalar_loss
from jaxbptt.programs.perturbed import fit
from jaxbptt.scans.flags import Flags
from jaxbptt.trees import combine, is_differentiable, is_key, partition

# What step t may take for its ∂L/∂yₜ, each a table over time; `Loop.loss_from` counts through all of them.
LOSS_TABLES = "right", "target_before", "target_after", "no_softmax", "no_target", "input_as_target"


class Loop(NamedTuple):
    """What the backward loop does at each of T time steps; `right_loop` is without a mistake.

    Attributes:
        order: the time steps as the loop visits them, `[T]`.
        loss_from: where step t reads ∂L/∂yₜ, in the tables named in `LOSS_TABLES`, `[T]`.
        loss_weight: how often it is added to what comes through the carry, `[T]`.
        last_weight: the same for ∂L/∂c_T.
        passed: weight of what the step passes on to the one before it, `[T]`.
        kept: weight of what came to the step, beside it, `[T]`.
        counted: how often step t counts in the weight gradient, `[T]`.
        xs_from: the step whose input stands in it; T is an input of zeros, `[T]`.
        states_from: the state that stands for cₜ₋₁ in it: 0 to T, and T + 1 for zeros, `[T]`.
        deltas_from: the step whose deltas stand in it, `[T]`.
        clip: bound of each number that is passed on.
        clip_norm: bound of the norm of all of them.
        rows: weight of each row of the batch, `[rows]`.
        transposed: the number of the leaf of params that the recursion reads transposed, block by block, or −1.
        init_from: 1 where the gradient of the first carry is that of the carry after the first step.
    """

    order: Any
    loss_from: Any
    loss_weight: Any
    last_weight: Any
    passed: Any
    kept: Any
    counted: Any
    xs_from: Any
    states_from: Any
    deltas_from: Any
    clip: Any
    clip_norm: Any
    rows: Any
    transposed: Any
    init_from: Any


class Problem(NamedTuple):
    """What the loop works on, and the equations of one step of it.

    Attributes:
        backward: `(equations, params, residuals, x, carry_bar, y_bar) -> (carry_bar, deltas)`.
        contract: `(equations, params, residuals, xs, ys_bar, deltas) -> gradient of params`, like the user's.
        arriving: `(equations, carry_bar, y_bar)`, ∂L/∂cₜ as the loop has it.
        transposed: `(leaf)`, the params with that leaf transposed.
        params: θ.
        init: c₀.
        xs: the inputs.
        states: c₀ to c_T and a state of zeros, leaves `[T + 2, ...]`.
        residuals: `[T, ...]`.
        last_bar: ∂L/∂c_T.
        losses: ∂L/∂yₜ, the tables of `LOSS_TABLES` one after the other.
        side_by_side: loops run at once, or `None` for one after the other.
    """

    backward: Callable[..., Any]
    contract: Callable[..., Any]
    arriving: Callable[..., Any]
    transposed: Callable[..., Any]
    params: Any
    init: Any
    xs: Any
    states: Any
    residuals: Any
    last_bar: Any
    losses: Any
    side_by_side: int | None = 16


def right_loop(steps: int, rows: int) -> Loop:
    """The loop without a mistake."""
    t, one = np.arange(steps), np.ones(steps)
    weights = {"loss_weight": one, "last_weight": 1.0, "passed": one, "kept": 0 * one, "counted": one}
    sources = {"loss_from": t, "xs_from": t, "states_from": t, "deltas_from": t}
    bounds = {"clip": np.inf, "clip_norm": np.inf}
    loop = Loop(order=t[::-1], rows=np.ones(rows), transposed=-1, init_from=0, **weights, **sources, **bounds)
    return Loop(*map(np.asarray, loop))


def gradient(problem: Problem, loop: Loop, equations: Any) -> tuple[Any, Any]:
    """The gradient of params and init that the loop gives."""
    p = problem
    params = p.transposed(loop.transposed)
    ys_bar = jax.tree.map(lambda leaf: leaf[loop.loss_from], p.losses)
    ys_bar = _weighted(_weighted(ys_bar, loop.loss_weight), loop.rows, axis=1)
    last_bar = _weighted(_weighted(p.last_bar, loop.last_weight), loop.rows)

    def body(carry_bar, t):
        residuals, x, y_bar = jax.tree.map(lambda leaf: leaf[t], (p.residuals, p.xs, ys_bar))
        before, deltas = p.backward(equations, params, residuals, x, carry_bar, y_bar)
        arriving = p.arriving(equations, carry_bar, y_bar)
        passed = _weighted(before, loop.passed[t]), _weighted(carry_bar, loop.kept[t])
        return _clipped(jax.tree.map(jnp.add, *passed), loop), (deltas, before, arriving)

    _, (deltas, before, arriving) = jax.lax.scan(body, last_bar, loop.order)
    deltas = jax.tree.map(lambda leaf: leaf[jnp.argsort(loop.order)][loop.deltas_from], deltas)
    init_bar = jax.tree.map(lambda a, b: jnp.where(loop.init_from == 1, b[-1], a[-1]), before, arriving)
    xs = jax.tree.map(lambda leaf: jnp.concatenate([leaf, _nothing(leaf[:1])])[loop.xs_from], p.xs)
    residuals = _with_states(p, loop.states_from)
    bars = _weighted((ys_bar, deltas), loop.counted)
    return p.contract(equations, p.params, residuals, xs, *bars), init_bar


def of_any_step(step: Any, params: Any, init: Any, xs: Any, loss: Any, length: int | None, flags: Flags) -> Problem:
    """The problem with the `Adjoint` of a cell, or one derived from the step."""
    u = unroll(step, params, init, xs, loss, length, flags)
    adjoint = u.over_time.adjoint
    # Inside a trace a leaf of the user's params is known by identity among those that the derived adjoint takes.
    numbers = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(params))}

    def transposed(number):
        def leaf_or_transposed(leaf):
            i = numbers.get(id(leaf))
            other = None if i is None else blocks_transposed(leaf)
            return leaf if other is None else jnp.where(number == i, other, leaf)

        return jax.tree.map(leaf_or_transposed, u.params)

    def contract(_, params, *stacked):
        return u.params_gradient(adjoint.contract(params, *stacked)[0])

    states = _states(u.over_time.step.step, u.params, init, u.xs, u.length)
    last_bar, _ = u.bars
    return Problem(
        backward=lambda _, *args: adjoint.backward(*args),
        contract=contract,
        arriving=lambda _, carry_bar, y_bar: carry_bar,
        transposed=transposed,
        params=u.params,
        init=init,
        xs=u.xs,
        states=states,
        residuals=u.residuals,
        last_bar=last_bar,
        losses=_loss_tables(u, loss, xs),
        side_by_side=None if u.over_time.step.one_at_a_time else 16,
    )


def init_gradient(init_bar: Any, init: Any) -> Any:
    """The gradient of the first carry, with `None` for leaves without one."""
    flags = jax.tree.map(lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact), init)
    return fit(init_bar, init, flags, "init")


def blocks_transposed(leaf: Any) -> Any:
    """A matrix `[k · n, n]` with each of its k square blocks transposed, or `None` for another array."""
    if jnp.ndim(leaf) != 2 or leaf.shape[1] < 2 or leaf.shape[0] % leaf.shape[1]:
        return None
    n = leaf.shape[1]
    return leaf.reshape(-1, n, n).transpose(0, 2, 1).reshape(leaf.shape)


def _states(step: Any, params: Any, init: Any, xs: Any, length: int) -> Any:
    def body(carry, x):
        return (step(params, carry, x)[0],) * 2

    _, after = jax.lax.scan(body, init, xs, length=length)
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b, _nothing(b[:1])]), init, after)


def _with_states(p: Problem, states_from: Any) -> Any:
    """The residuals with other states in the place of cₜ₋₁, wherever a residual is just that."""

    def replaced(residual):
        for states in jax.tree.leaves(p.states):
            before = states[:-2]
            if before.shape == residual.shape and before.dtype == residual.dtype and is_differentiable(residual):
                # Rounded differently where the two loops are compiled differently.
                bound = float(jnp.finfo(before.dtype).eps) ** 0.6 * jnp.max(jnp.abs(before))
                same = jnp.max(jnp.abs(residual - before)) <= bound
                residual = jnp.where(same, states[states_from], residual)
        return residual

    return jax.tree.map(replaced, p.residuals)


def _loss_tables(u: Unrolled, loss: Any, xs: Any) -> Any:
    """∂L/∂yₜ in each of the ways of `LOSS_TABLES`.

    The loss holds the targets, so outputs are moved against it: the loss of yₜ₊₁ at step t is one with the target before.
    """
    loss = scalar_loss(loss)
    last, ys = combine(u.outputs, u.nondiff)

    def moved(by):
        diff, nondiff = partition((last, jax.tree.map(lambda leaf: jnp.roll(leaf, -by, 0), ys)))
        _, ys_bar = jax.grad(lambda diff: loss(*combine(diff, nondiff)))(diff)
        return jax.tree.map(lambda leaf: jnp.roll(leaf, by, 0), ys_bar)

    _, right = u.bars
    tables = right, moved(1), moved(-1), *_of_softmax(u.outputs[1], right, xs)
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *tables)


def _of_softmax(ys: Any, ys_bar: Any, xs: Any) -> tuple[Any, Any, Any]:
    """Dy = w (softmax(y) − target), without the softmax, without the target, with the input as target."""
    leaves = jax.tree.leaves(ys_bar)
    if len(leaves) != 1 or leaves[0].ndim < 2 or jnp.iscomplexobj(leaves[0]):
        return (ys_bar,) * 3
    (bar,), (y,), treedef = leaves, jax.tree.leaves(ys), jax.tree.structure(ys_bar)
    likely = jax.nn.softmax(y)
    # Of every class but the target it is w times the probability, and of the target it is negative.
    weighted = jnp.max(bar / likely, axis=-1, keepdims=True)
    no_target = weighted * likely
    inputs = jax.tree.leaves(xs)
    like = len(inputs) == 1 and inputs[0].shape == bar.shape and inputs[0].dtype == bar.dtype
    as_target = no_target - weighted * inputs[0] if like else bar
    return tuple(map(treedef.unflatten, ([bar - no_target + weighted * y], [no_target], [as_target])))


def _nothing(leaf: Any) -> Any:
    return leaf if is_key(leaf) else jnp.zeros_like(leaf)


def _weighted(tree: Any, weight: Any, axis: int = 0) -> Any:
    """Leaves times a weight along an axis; 0 · inf is 0. Leaves without the axis stay as they are."""

    def leaf_weighted(leaf):
        if jnp.ndim(weight) and leaf.shape[axis : axis + 1] != jnp.shape(weight):
            return leaf
        w = jnp.reshape(weight, (*[1] * (axis if jnp.ndim(weight) else 0), -1, *[1] * (leaf.ndim - axis - 1)))
        w = w if jnp.ndim(weight) else weight
        return jnp.where(w == 0, 0, leaf * w.astype(leaf.dtype)).astype(leaf.dtype)

    return jax.tree.map(leaf_weighted, tree)


def _clipped(bar: Any, loop: Loop) -> Any:
    leaves = jax.tree.leaves(bar)
    if any(map(jnp.iscomplexobj, leaves)):
        return bar
    norm = jnp.sqrt(sum(jnp.sum(jnp.square(leaf)).astype(loop.clip_norm.dtype) for leaf in leaves))
    factor = jnp.where(norm > loop.clip_norm, loop.clip_norm / jnp.where(norm > 0, norm, 1), 1)

    def leaf_clipped(leaf):
        bound = loop.clip.astype(leaf.dtype)
        return jnp.clip(leaf, -bound, bound) * factor.astype(leaf.dtype)

    return jax.tree.map(leaf_clipped, bar)
