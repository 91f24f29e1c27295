r"""Where and why two gradients differ: leaf by leaf, with the likely cause in words."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbptt.analysis.causes import UNKNOWN, cause_of, relative_error, tolerance, wide
from jaxbptt.analysis.credit import LagContributions
from jaxbptt.analysis.jacobians import TemporalContributions
from jaxbptt.analysis.mistakes.given import Given, Prepared, counts_of, prepared
from jaxbptt.analysis.mistakes.intermediates import first_difference
from jaxbptt.analysis.mistakes.search import Search, search
from jaxbptt.arrays import check_callable, check_concrete
from jaxbptt.cells import dense
from jaxbptt.cells.cell import Cell
from jaxbptt.html_table import fields_table, html_table
from jaxbptt.scans.flags import Flags
from jaxbptt.trees import differentiable, name


class LeafComparison(NamedTuple):
    """One leaf of a gradient, compared with the reference.

    Attributes:
        leaf: its name.
        agrees: whether it is within the tolerance.
        relative_error: max|g − g_ref| / max|g_ref|; nan where the shapes differ.
        cosine: of the angle between the two; nan where the shapes differ or one is 0.
        ratio: the real factor c for which c · g_ref is nearest to g.
        cause: the likely cause, in words; "agrees" where the leaf agrees.
    """

    leaf: str
    agrees: bool
    relative_error: float
    cosine: float
    ratio: float
    cause: str

    _repr_html_ = fields_table


class GradientComparison(NamedTuple):
    """Two gradients compared. Prints as a table.

    Attributes:
        leaves: a `LeafComparison` for each.
        agrees: whether all leaves do.
        cause: the likely causes for the leaves that do not.
        mistakes: the known mistakes that give just this gradient, where the problem was given and one of them does.
        first_difference: the first intermediate result that differs, in words, where they were given; "" if none does.
    """

    leaves: tuple[LeafComparison, ...]
    agrees: bool
    cause: str
    mistakes: tuple[str, ...] = ()
    first_difference: str = ""

    def __str__(self) -> str:
        width = max((len(leaf.leaf) for leaf in self.leaves), default=0)
        return "\n".join(
            f"{leaf.leaf:{width}}  relative error {leaf.relative_error:.1e}  cosine {leaf.cosine:+.4f}  {leaf.cause}"
            for leaf in self.leaves
        )

    def _repr_html_(self) -> str:
        rows = [
            (leaf.leaf, f"{leaf.relative_error:.1e}", f"{leaf.cosine:+.4f}", f"{leaf.ratio:.4g}", leaf.cause)
            for leaf in self.leaves
        ]
        head = "leaf", "relative error", "cosine", "ratio", "cause"
        return html_table(head, rows, title="GradientComparison", words=True)


def compare_gradients(
    mine: Any,
    reference: Any,
    *,
    step: Callable[..., Any] | Cell | None = None,
    params: Any = None,
    init: Any = None,
    xs: Any = None,
    loss: Callable[..., Any] | None = None,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
    intermediates: Any = None,
    temporal: TemporalContributions | None = None,
    lags: LagContributions | None = None,
) -> GradientComparison:
    r"""Compare a gradient with a reference, leaf by leaf, and name the mistake where they differ.

    **The two gradients alone** show nan, all zero, the wrong sign, a constant factor, a transpose, a clipped gradient, a sum
    over rows or time that is missing. With `temporal` also which time step is missing or counted twice, with `lags` after
    how many lags the paths are cut.

    **With the problem**, `step`, `params`, `init`, `xs` and `loss`, the backward loop is run with each mistake that people
    make in it, and the one that gives `mine` is named. Tried are, for any step: nothing carried back, or added up; a loop
    forward in time; a cut every K steps; dh clipped at each step; each time step left out, or twice, in the loop, in the
    sums, or in the loss; targets, losses, inputs, states or deltas of another step; the softmax or the target missing in
    dy; `=` for `+=`; a mean for a sum over time or rows, and the sign; one row of the batch; a square matrix of params not
    transposed. For an Elman network, with a read-out or without, in params of any structure: tanh' missing, at the wrong
    place or of the wrong step, dh carried back before it, W_hh missing or not transposed, W_hy too, and more. Where no one
    mistake fits, one for each leaf and two at once are tried, of single time steps the first and the last.

    A mistake is named if it gives **all numbers** of all leaves, up to twice the tolerance below, and if the chance that
    any of the candidates comes so close is below one in a million. An error that is 1/1000 of the difference from the
    reference counts as a chance of 1/1000, once for each number that the term of a single time step has of its own.
    Mistakes that give the same gradient here are named together, "either … or …". Otherwise the cause says that none was
    found.

    A target is inside the loss, so that other targets are tried by moving the outputs against it: right for a loss that
    is a sum or mean over time of what each step's output says.

    Compiles one program, and takes 1 to 3 seconds of one core for a network of few units; 6 for a GRU of 64 units over 300
    steps and 8 rows. Of more than 64 time steps, single ones are tried at the ends, 32 at each; two mistakes at once are
    left out where they would take long, and for a single time step.

    Args:
        mine: the gradient in question, a pytree of arrays.
        reference: the gradient to compare it with, of the same structure.
        step: the step that the gradient goes through, or a `Cell`. With params of a `network`, its cell is enough: the
            read-out is added.
        params: what both are the gradients of; or they are those of the pair (params, init).
        init: c₀, batch axes as in the loop.
        xs: inputs, leaves `[time, ...]`, or `None` with `length`.
        loss: `loss(carry, ys) -> scalar`, of the last carry and all outputs; a target belongs to the output of its step.
        length: T, needed where `xs` is `None`.
        is_first: as for `scan`.
        valid: as for `scan`.
        reset_carry: as for `scan`.
        intermediates: what the loop computed on its way, time first: a mapping with some of hs, ys, dy, dh and dh_raw, or
            what `bptt` returned. The first that differs is named, in the order of the computation.
        temporal: from `temporal_contributions`, of the reference.
        lags: from `lag_contributions`, of the reference.

    Returns:
        A `GradientComparison`. A leaf agrees up to a relative error of eps^0.6 of its dtype: 7e-5 in float32, 4e-10 in
        float64.

    Raises:
        ValueError: trees of different structure; a reference that is not the gradient of the problem; intermediates of the
            wrong shape.
        TypeError: traced arguments, contributions of the wrong type, only a part of the problem.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.elman(2, 3)
        >>> params, xs = cell.init(jax.random.key(0)), jnp.sin(jnp.arange(8.0)).reshape(4, 2)
        >>> problem = {"step": cell, "params": params, "init": cell.initial_carry(), "xs": xs}
        >>> loss = lambda h, hs: jnp.sum(hs**2)
        >>> reference = jax.grad(lambda p: loss(*bptt.scan(cell, p, cell.initial_carry(), xs)))(params)
        >>> mine = jax.tree.map(lambda leaf: -leaf, reference)
        >>> bptt.compare_gradients(mine, reference, loss=loss, **problem).cause
        'the sign is wrong'
    """
    check_concrete("compare_gradients", mine=mine, reference=reference, temporal=temporal, lags=lags)
    if temporal is not None and not isinstance(temporal, TemporalContributions):
        raise TypeError(f"temporal is a {type(temporal).__name__}: pass what temporal_contributions(...) returned.")
    if lags is not None and not isinstance(lags, LagContributions):
        raise TypeError(f"lags are a {type(lags).__name__}: pass what lag_contributions(...) returned.")
    mine, reference = differentiable(mine), differentiable(reference)
    if jax.tree.structure(mine) != jax.tree.structure(reference):
        raise ValueError(
            f"The gradients differ in structure: {jax.tree.structure(mine)} against {jax.tree.structure(reference)}. "
            "Put yours into the containers of the reference."
        )
    problem = None
    if not (step is None and loss is None):
        needed = {"step": step, "params": params, "init": init, "loss": loss}
        missing = [word for word, value in needed.items() if value is None]
        if loss is None or missing:
            raise TypeError(
                f"A part of the problem is given, but no {missing[0]}: pass step, params, init, xs and loss."
            )
        given = Given(step, params, init, xs, loss, length, Flags(is_first, valid, reset_carry))
        problem = prepared(_checked(given), reference)
    elif any(arg is not None for arg in (params, init, xs, length, is_first, valid, reset_carry, intermediates)):
        raise TypeError(
            "A part of the problem is given, but not its step and loss: pass step, params, init, xs and loss."
        )
    by_step = None if temporal is None else temporal.contributions
    by_lag = None if lags is None else lags.contributions
    counts = None if problem is None else counts_of(problem)
    found = _summary(_compared("gradient", mine, reference, by_step, by_lag, counts=counts))
    if problem is not None:
        return _explained(found, problem, mine, reference, intermediates)
    hint = ": pass step, params, init, xs and loss to have the known mistakes tried"
    return found._replace(cause=UNKNOWN + hint) if found.cause == UNKNOWN else found


def _checked(given: Given) -> Given:
    """The problem, with the read-out of a network in its step."""
    check_callable("loss", given.loss, "loss(carry, ys) -> scalar")
    arrays = {"params": given.params, "init": given.init, "xs": given.xs}
    check_concrete("compare_gradients", **arrays)
    cell = given.step
    if not isinstance(cell, Cell) or getattr(given.params, "_fields", ()) != ("cell", "W_hy", "b_y"):
        return given

    def step(params, carry, x):
        carry, h = cell.step(params.cell, carry, x)
        y = h @ params.W_hy.T
        return carry, y if params.b_y is None else dense.add_bias(y, params.b_y)

    return given._replace(step=step)


def _explained(
    found: GradientComparison, problem: Prepared, mine: Any, reference: Any, intermediates: Any
) -> GradientComparison:
    """The comparison with the known mistake that gives this gradient, and the first difference on the way."""
    first = "" if intermediates is None else first_difference(problem, intermediates)
    found = found._replace(first_difference=first)
    leaves = [jax.tree.leaves(tree) for tree in (mine, reference)]
    if found.agrees or any(np.shape(a) != np.shape(b) for a, b in zip(*leaves, strict=True)):
        return found._replace(cause="; ".join(filter(None, (found.cause, first))))
    bounds = [tolerance(a, b) for a, b in zip(*leaves, strict=True)]
    mine, reference = ([wide(leaf) for leaf in side] for side in leaves)
    result = search(problem, mine, reference, bounds)
    return _with_names(found, result)


def _with_names(found: GradientComparison, result: Search) -> GradientComparison:
    wrong = [leaf for leaf in found.leaves if not leaf.agrees]
    by_leaf = dict(zip((leaf.leaf for leaf in wrong), result.by_leaf or [result.names] * len(wrong), strict=True))
    leaves_of: dict[str, list[str]] = {}
    for leaf, names in by_leaf.items():
        if names:
            leaves_of.setdefault(_either(names), []).append(leaf)
    if result.names:
        causes = list(leaves_of)
    else:
        causes = [f"in {', '.join(leaves)}: {cause}" for cause, leaves in leaves_of.items()]
    if not causes:
        causes = list(dict.fromkeys(leaf.cause for leaf in wrong))
        if any(cause.startswith(UNKNOWN) for cause in causes):
            causes = [f"{UNKNOWN}: none of the {result.tried:,} candidates that were run gives this gradient"]
    leaves = [
        leaf._replace(cause=_either(by_leaf[leaf.leaf])) if by_leaf.get(leaf.leaf) else leaf for leaf in found.leaves
    ]
    mistakes = tuple(dict.fromkeys(name for names in by_leaf.values() for name in names))
    cause = "; ".join(filter(None, (*causes, found.first_difference)))
    return found._replace(leaves=tuple(leaves), cause=cause, mistakes=mistakes)


def _either(names: Sequence[str]) -> str:
    """All that would explain it; of many, three."""
    if len(names) == 1:
        return names[0]
    more = f", or {len(names) - 3} more" if len(names) > 3 else ""
    return "either " + ", or ".join(names[:3]) + more


def comparison(mine: Any, reference: Any, *, low_rank: bool) -> GradientComparison:
    """Two mappings of the same trees by name, compared; without the cause that shows in a difference of low rank, or with."""
    roots = [_compared(root, mine[root], reference[root], low_rank=low_rank) for root in reference]
    return _summary(sum(roots, ()))


def _compared(
    root: str,
    mine: Any,
    reference: Any,
    by_step: Any = None,
    by_lag: Any = None,
    *,
    counts: dict[int, str] | None = None,
    low_rank: bool = True,
) -> tuple[LeafComparison, ...]:
    """Each leaf of two trees of one structure; contributions like them, if there are any."""
    by_step, by_lag = _leaves_or_none(by_step, reference), _leaves_or_none(by_lag, reference)
    paths = jax.tree_util.tree_leaves_with_path(reference)
    return tuple(
        _compare_leaf(name(root, path), wide(a), wide(b), tolerance(a, b), steps, lag, counts, low_rank)
        for (path, b), a, steps, lag in zip(paths, jax.tree.leaves(mine), by_step, by_lag, strict=True)
    )


def _summary(leaves: tuple[LeafComparison, ...]) -> GradientComparison:
    causes = dict.fromkeys(leaf.cause for leaf in leaves if not leaf.agrees)
    named = [cause for cause in causes if not cause.startswith(UNKNOWN)]
    return GradientComparison(leaves, not causes, "; ".join(named) or (UNKNOWN if causes else "agrees"))


def _compare_leaf(
    leaf: str,
    mine: np.ndarray,
    reference: np.ndarray,
    bound: float,
    by_step: Any,
    by_lag: Any,
    counts: dict[int, str] | None,
    low_rank: bool,
) -> LeafComparison:
    if mine.shape != reference.shape:
        cause = f"it has shape {mine.shape}, not {reference.shape}"
        if mine.T.shape == reference.shape and relative_error(mine.T, reference) <= bound:
            cause = "it is the transpose"
        added = tuple(range(mine.ndim - reference.ndim))
        rows_of_it = added and mine.shape[len(added) :] == reference.shape
        if rows_of_it and relative_error(mine.sum(added), reference) <= bound:
            cause += f": it is not summed over its first {'axis' if len(added) == 1 else f'{len(added)} axes'}"
        return LeafComparison(leaf, False, np.nan, np.nan, np.nan, cause)
    error = relative_error(mine, reference)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        product, mine_norm, norm = np.vdot(reference, mine).real, np.linalg.norm(mine), np.linalg.norm(reference)
        cosine, ratio = float(product / norm / mine_norm), float(product / norm**2)
    agrees = error <= bound
    cause = "agrees" if agrees else cause_of(mine, reference, ratio, bound, by_step, by_lag, counts, low_rank)
    return LeafComparison(leaf, agrees, error, cosine, ratio, cause)


def _leaves_or_none(contributions: Any, reference: Any) -> Sequence[Any]:
    if contributions is None:
        return [None] * len(jax.tree.leaves(reference))
    return [wide(leaf) for leaf in jax.tree.leaves(contributions)]
