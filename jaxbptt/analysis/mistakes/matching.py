r"""When a candidate counts as the gradient in question: up to rounding, and hardly by chance."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

_CHANCE = -6  # log10


class Match(NamedTuple):
    """Two gradients as lists of arrays, and when a candidate counts as the first."""

    mine: Sequence[Any]
    reference: Sequence[Any]
    bounds: Sequence[float]
    factors: Sequence[float]
    tried: int

    @property
    def differences(self) -> np.ndarray:
        """max|mine − reference| of each leaf."""
        pairs = zip(self.mine, self.reference, strict=True)
        return np.array([np.max(np.abs(a - b), initial=0.0) for a, b in pairs])

    @property
    def agrees(self) -> np.ndarray:
        """Whether each leaf is right."""
        sizes = np.array([np.max(np.abs(leaf), initial=0.0) for leaf in self.reference])
        return self.differences <= np.array(self.bounds) * sizes

    def close(self, errors: np.ndarray, sizes: np.ndarray, factor: int = 0) -> np.ndarray:
        """Whether candidates are equal to mine, but for rounding: `[candidates, leaves]`."""
        return errors <= 2 * np.array(self.bounds) * sizes * abs(self.factors[factor])

    def likely(self, errors: np.ndarray, sizes: np.ndarray, leaves: np.ndarray) -> bool:
        """Whether one of the candidates would come as close by chance, in these leaves.

        Each number of a candidate is within a share of the difference from the reference, and so by chance as often as the
        share says. Numbers that a term of a single time step has: an outer product of m and n has m + n − 1 of its own.
        """
        chance = np.log10(self.tried)
        differences = self.differences
        for i in np.flatnonzero(leaves).tolist():
            leaf = self.mine[i]
            own = sum(leaf.shape) - 1 if leaf.ndim == 2 and leaf.size else leaf.size
            least = self.bounds[i] ** (1 / 0.6) * sizes[i]  # one rounding: bounds are eps^0.6
            share = max(errors[i], least) / differences[i] if differences[i] > 0 else 1.0
            chance += own * np.log10(max(min(share, 1.0), 1e-300))
        return bool(chance > _CHANCE)
