r"""Why one array differs from another: what the two of them show, and the terms of the reference by step and lag."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.words import counted

UNKNOWN = "no single cause found"

# A factor counts as a whole number if one of its size would be by chance less often than this.
_BY_CHANCE = 0.05


def relative_error(mine: Any, reference: Any) -> float:
    """max|mine − reference| / max|reference|; 0 where both are 0."""
    mine, reference = wide(mine), wide(reference)
    with np.errstate(invalid="ignore", over="ignore"):
        error, scale = (np.max(np.abs(a), initial=0.0) for a in (mine - reference, reference))
        return 0.0 if error == 0 else float(error / scale) if scale > 0 else float("inf")


def tolerance(*trees: Any) -> float:
    """Relative error up to which gradients of these dtypes agree: eps^0.6, of the coarsest."""
    return max((float(jnp.finfo(leaf.dtype).eps) ** 0.6 for leaf in jax.tree.leaves(trees)), default=0.0)


def cause_of(
    mine: np.ndarray,
    reference: np.ndarray,
    ratio: float,
    bound: float,
    by_step: Any,
    by_lag: Any,
    counts: dict[int, str] | None,
    low_rank: bool,
) -> str:
    """Why a leaf that differs from the reference does, in words; they begin with `UNKNOWN` where nothing is found."""

    def same(candidate: Any) -> bool:
        return relative_error(mine, candidate) <= 2 * bound

    if not np.isfinite(reference).all():
        return "the reference itself has nan or inf"
    if not np.isfinite(mine).all():
        return (
            f"it has nan or inf in {np.count_nonzero(~np.isfinite(mine)):,} of {counted(mine.size, 'entry', 'entries')}"
        )
    if not reference.any():
        return "the reference is 0 everywhere, and it is not"
    if not mine.any():
        return "it is 0 everywhere: the path is cut, by a stop_gradient or an update whose result is dropped"
    if same(-reference):
        return "it has the wrong sign"
    if np.iscomplexobj(reference) and same(reference.conj()):
        return "it is the complex conjugate"
    if mine.size > 1 and abs(ratio - 1) > 2 * bound and same(ratio * reference):
        return _factor(ratio, 2 * bound, None if by_step is None else len(by_step), counts)
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
    bound_of_clip = np.abs(mine).max()
    if np.sum(np.abs(mine) >= bound_of_clip * (1 - bound)) > 1 and same(
        np.clip(reference, -bound_of_clip, bound_of_clip)
    ):
        return f"its entries are clipped at ±{bound_of_clip:.6g}"
    found = _low_rank(mine - reference, bound * float(np.linalg.norm(reference))) if low_rank else ""
    return f"{UNKNOWN}: it is nearest to {ratio:.3g} times the reference{found}"


def _factor(ratio: float, bound: float, steps: int | None, counts: dict[int, str] | None) -> str:
    """A factor, and what it may be: of `steps` time steps, or of what the problem has by number, if they are known."""
    for factor, words in ((ratio, "times"), (1 / ratio, "of")):
        whole = round(factor)
        known = whole == steps or whole in (counts or ())
        # Any large number is near a whole one: within the bound by a chance of 2 · whole · bound.
        if whole > 1 and abs(factor / whole - 1) <= bound and (known or 2 * whole * bound < _BY_CHANCE):
            amount = f"{whole} times" if words == "times" else f"1/{whole} of"
            if steps == whole:
                return f"it is {amount} the reference, a factor T: one is a sum over time steps, the other a mean"
            if counts is not None:
                return f"it is {amount} the reference" + (
                    f": one is a sum over {counts[whole]}, the other a mean" if whole in counts else ""
                )
            return (
                f"it is {amount} the reference: perhaps one is a sum over {whole} time steps or rows, the other a mean"
            )
    return f"it is {ratio:.6g} times the reference"


def _low_rank(difference: Any, noise: float) -> str:
    """That a difference is the sum of a few outer products. Many mistakes leave one, so it is a description, and no cause."""
    if difference.ndim != 2:
        return ""
    rank = int(np.sum(np.linalg.svd(difference, compute_uv=False) > noise))
    return f", and the difference has rank {rank}" if 0 < rank <= min(difference.shape) // 2 else ""


def wide(array: Any) -> np.ndarray:
    """In double precision, so that the comparison itself adds no rounding errors."""
    array = np.asarray(array)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)
