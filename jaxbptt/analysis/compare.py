r"""Where and why two gradients differ: leaf by leaf, with the likely cause in words."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.analysis.credit import LagContributions
from jaxbptt.analysis.jacobians import TemporalContributions
from jaxbptt.arrays import check_concrete
from jaxbptt.html_table import fields_table, html_table
from jaxbptt.trees import differentiable, name
from jaxbptt.words import counted

_UNKNOWN = "no single cause found"


class LeafComparison(NamedTuple):
    """One leaf of a gradient, compared with the reference.

    Attributes:
        leaf: its name.
        agrees: whether it is within the tolerance.
        relative_error: max|g − g_ref| / max|g_ref|; nan where the shapes differ.
        cosine: of the angle between the two; nan where the shapes differ or one is 0.
        ratio: the factor c for which c · g_ref is nearest to g.
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
    """

    leaves: tuple[LeafComparison, ...]
    agrees: bool
    cause: str

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
    temporal: TemporalContributions | None = None,
    lags: LagContributions | None = None,
) -> GradientComparison:
    r"""Compare a gradient with a reference, leaf by leaf, and name the likely cause where they differ.

    Causes that the two gradients alone show: nan, all zero, the wrong sign, a constant factor, a transpose, the term of
    one time step missing (a difference of low rank). With `temporal`, which time step is missing or counted twice, and
    whether the factor is T; with `lags`, after how many lags the paths are cut, one lag short of all included.

    Args:
        mine: the gradient in question, a pytree of arrays.
        reference: the gradient to compare it with, of the same structure.
        temporal: from `temporal_contributions`, of the reference.
        lags: from `lag_contributions`, of the reference.

    Returns:
        A `GradientComparison`. A leaf agrees up to a relative error of eps^0.6 of its dtype: 7e-5 in float32, 4e-10 in
        float64.

    Raises:
        ValueError: trees of different structure.
        TypeError: traced arguments, contributions of the wrong type.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> reference = {"W": jnp.array([[1.0, 2.0], [3.0, 4.0]])}
        >>> print(bptt.compare_gradients({"W": reference["W"].T}, reference))
        gradient['W']  relative error 2.5e-01  cosine +0.9667  it is the transpose
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
    by_step = None if temporal is None else temporal.contributions
    by_lag = None if lags is None else lags.contributions
    return _summary(_compared("gradient", mine, reference, by_step, by_lag))


def comparison(mine: Any, reference: Any, *, low_rank: bool) -> GradientComparison:
    """Two mappings of the same trees by name, compared; without the cause that shows in a difference of low rank, or with."""
    roots = [_compared(root, mine[root], reference[root], low_rank=low_rank) for root in reference]
    return _summary(sum(roots, ()))


def _compared(
    root: str, mine: Any, reference: Any, by_step: Any = None, by_lag: Any = None, *, low_rank: bool = True
) -> tuple[LeafComparison, ...]:
    """Each leaf of two trees of one structure; contributions like them, if there are any."""
    by_step, by_lag = _leaves_or_none(by_step, reference), _leaves_or_none(by_lag, reference)
    paths = jax.tree_util.tree_leaves_with_path(reference)
    return tuple(
        _compare_leaf(name(root, path), _wide(a), _wide(b), tolerance(a, b), steps, lag, low_rank)
        for (path, b), a, steps, lag in zip(paths, jax.tree.leaves(mine), by_step, by_lag, strict=True)
    )


def _summary(leaves: tuple[LeafComparison, ...]) -> GradientComparison:
    causes = dict.fromkeys(leaf.cause for leaf in leaves if not leaf.agrees)
    named = [cause for cause in causes if not cause.startswith(_UNKNOWN)]
    return GradientComparison(leaves, not causes, "; ".join(named) or (_UNKNOWN if causes else "agrees"))


def relative_error(mine: Any, reference: Any) -> float:
    """max|mine − reference| / max|reference|; 0 where both are 0."""
    mine, reference = _wide(mine), _wide(reference)
    error, scale = (np.max(np.abs(a), initial=0.0) for a in (mine - reference, reference))
    return 0.0 if error == 0 else float(error / scale) if scale > 0 else float("inf")


def tolerance(*trees: Any) -> float:
    """Relative error up to which gradients of these dtypes agree: eps^0.6, of the coarsest."""
    return max((float(jnp.finfo(leaf.dtype).eps) ** 0.6 for leaf in jax.tree.leaves(trees)), default=0.0)


def _compare_leaf(
    leaf: str, mine: np.ndarray, reference: np.ndarray, bound: float, by_step: Any, by_lag: Any, low_rank: bool
) -> LeafComparison:
    if mine.shape != reference.shape:
        cause = f"it has shape {mine.shape}, not {reference.shape}"
        if mine.T.shape == reference.shape and relative_error(mine.T, reference) <= bound:
            cause = "it is the transpose"
        return LeafComparison(leaf, False, np.nan, np.nan, np.nan, cause)
    error = relative_error(mine, reference)
    with np.errstate(invalid="ignore", divide="ignore"):
        product, mine_norm, norm = np.vdot(reference, mine), np.linalg.norm(mine), np.linalg.norm(reference)
        cosine, ratio = float(product / norm / mine_norm), float(product / norm**2)
    agrees = error <= bound
    cause = "agrees" if agrees else _cause(mine, reference, ratio, bound, by_step, by_lag, low_rank)
    return LeafComparison(leaf, agrees, error, cosine, ratio, cause)


def _cause(
    mine: np.ndarray, reference: np.ndarray, ratio: float, bound: float, by_step: Any, by_lag: Any, low_rank: bool
) -> str:
    def same(candidate: np.ndarray) -> bool:
        return relative_error(mine, candidate) <= 2 * bound

    if not np.isfinite(reference).all():
        return "the reference itself has nan or inf"
    if not np.isfinite(mine).all():
        return (
            f"it has nan or inf in {np.count_nonzero(~np.isfinite(mine)):,} of {counted(mine.size, 'entry', 'entries')}"
        )
    if not mine.any():
        return "it is 0 everywhere: the path is cut, by a stop_gradient or an update whose result is dropped"
    if same(-reference):
        return "it has the wrong sign"
    if mine.size > 1 and same(ratio * reference):
        return _factor(ratio, None if by_step is None else len(by_step))
    if mine.ndim == 2 and mine.shape[0] == mine.shape[1] and same(reference.T):
        return "it is the transpose"
    if by_lag is not None:
        for cut, total in enumerate(np.cumsum(by_lag, axis=0)[:-1], start=1):
            if same(total):
                short = "one lag short: " if cut == len(by_lag) - 1 else ""
                return f"{short}it has the first {cut} of {counted(len(by_lag), 'lag')}, longer paths are cut"
    if by_step is not None:
        for t, term in enumerate(by_step):
            if same(reference - term):
                return f"time step {t} (counted from 0) is missing"
            if same(reference + term):
                return f"time step {t} (counted from 0) is counted twice"
    found = _low_rank(mine - reference, bound * float(np.linalg.norm(reference))) if low_rank else None
    return found or f"{_UNKNOWN}: it is nearest to {ratio:.3g} times the reference"


def _factor(ratio: float, steps: int | None) -> str:
    for factor, words in ((ratio, "times"), (1 / ratio, "of")):
        whole = round(factor)
        if whole > 1 and abs(factor / whole - 1) < 1e-3:
            amount = f"{whole} times" if words == "times" else f"1/{whole} of"
            if steps == whole:
                return f"it is {amount} the reference, a factor T: one is a sum over time steps, the other a mean"
            return (
                f"it is {amount} the reference: perhaps one is a sum over {whole} time steps or rows, the other a mean"
            )
    return f"it is {ratio:.6g} times the reference"


def _low_rank(difference: np.ndarray, noise: float) -> str | None:
    """A step adds one outer product δ hᵀ for each row of the batch: a few missing steps leave a difference of low rank."""
    if difference.ndim != 2:
        return None
    rank = int(np.sum(np.linalg.svd(difference, compute_uv=False) > noise))
    if rank == 0 or rank > min(difference.shape) // 2:
        return None
    terms = "one outer product" if rank == 1 else f"{rank} outer products"
    rows = counted(rank, "row")
    return (
        f"perhaps a missing step: the difference is {terms}, which one time step, or the longest lag, adds for {rows}"
    )


def _leaves_or_none(contributions: Any, reference: Any) -> Sequence[Any]:
    if contributions is None:
        return [None] * len(jax.tree.leaves(reference))
    return [_wide(leaf) for leaf in jax.tree.leaves(contributions)]


def _wide(array: Any) -> np.ndarray:
    """In double precision, so that the comparison itself adds no rounding errors."""
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
