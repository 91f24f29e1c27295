r"""n-gram models of a sequence of symbols, interpolated: what a recurrent character model has to beat.

p_n(s | c) = (N(cs) − D(N(cs)) + (Σ_s' D(N(cs'))) p_{n−1}(s | c⁻)) / Σ_s' N(cs'),  c⁻ = c without its first symbol

Modified Kneser–Ney: D is one of three discounts, for grams seen once, twice, or more often. Below the highest order N(g)
counts the different symbols seen before g, not how often g was seen. p₁ counts every symbol once more, so nothing has
probability 0. For a context never seen, p_n is p_{n−1} of the shorter one.

Chen and Goodman, An empirical study of smoothing techniques for language modeling, 1998, TR-10-98, Harvard.
"""

from typing import NamedTuple

import numpy as np


class Level(NamedTuple):
    """One order of a model, over sorted codes: a gram (s₁ … s_k) is the number Σ s_j symbols^(k − j).

    Attributes:
        grams: codes of the grams seen.
        kept: N − D of each.
        contexts: codes of the contexts seen, the grams without their last symbol.
        totals: Σ_s N(cs) of each.
        left: Σ_s D(N(cs)) of each, the weight of the order below.
    """

    grams: np.ndarray
    kept: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    left: np.ndarray


class Model(NamedTuple):
    """An n-gram model: p₁, and the levels 2 … n."""

    unigram: np.ndarray
    levels: tuple[Level, ...]


def fit(values: np.ndarray, symbols: int, highest: int) -> list[Model]:
    """The models of order 1 … `highest` of a sequence of numbers below `symbols`."""
    if symbols**highest > np.iinfo(np.int64).max:
        raise ValueError(f"{highest}-grams of {symbols} symbols do not fit 64 bits: lower one of the two.")
    seen = [np.unique(_codes(_windows(values, k), symbols), return_counts=True) for k in range(1, highest + 1)]
    # The number of different symbols before a gram is the number of different grams, one longer, that end with it.
    before = [np.unique(longer % symbols**k, return_counts=True) for k, (longer, _) in enumerate(seen[1:], start=1)]
    levels = [_level(*grams, symbols) for grams in seen[1:]]
    lower = [_level(*grams, symbols) for grams in before[1:]]
    models = [Model(_unigram(*seen[0], symbols), ())]
    for order in range(2, highest + 1):
        models.append(Model(_unigram(*before[0], symbols), (*lower[: order - 2], levels[order - 2])))
    return models


def probability(model: Model, contexts: np.ndarray, following: np.ndarray) -> np.ndarray:
    """p(s | c) for contexts `[n, at least order − 1]`, oldest symbol first, and the symbols `[n]` that follow."""
    symbols = len(model.unigram)
    p = model.unigram[following]
    for k, level in enumerate(model.levels, start=1):
        context = _codes(contexts[:, contexts.shape[1] - k :], symbols)
        at, known = _find(level.contexts, context)
        gram, seen = _find(level.grams, context * symbols + following)
        kept = np.where(seen, level.kept[gram], 0)
        p = np.where(known, (kept + level.left[at] * p) / level.totals[at], p)
    return p


def bits(model: Model, values: np.ndarray, start: int) -> float:
    """Mean of −log₂ p over values[start:], each given all values before it."""
    windows = _windows(values, len(model.levels) + 1)[start - len(model.levels) :]
    return float(-np.log2(probability(model, windows[:, :-1], windows[:, -1])).mean())


def _windows(values: np.ndarray, length: int) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(np.asarray(values, np.int64), length)


def _codes(grams: np.ndarray, symbols: int) -> np.ndarray:
    code = np.zeros(len(grams), np.int64)
    for column in grams.T:
        code = code * symbols + column
    return code


def _find(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The index of each of `wanted` in the sorted keys, and whether it is there."""
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return at, keys[at] == wanted


def _level(grams: np.ndarray, counts: np.ndarray, symbols: int) -> Level:
    discounts = _discounts(counts)[np.minimum(counts, 3)]
    contexts, first = np.unique(grams // symbols, return_index=True)
    totals, left = np.add.reduceat(counts, first), np.add.reduceat(discounts, first)
    return Level(grams, counts - discounts, contexts, totals, left)


def _discounts(counts: np.ndarray) -> np.ndarray:
    """D(0 … 3) from the numbers of grams seen once to four times; ½ where one of these is 0."""
    once, twice, thrice, four = np.bincount(np.minimum(counts, 5), minlength=6)[1:5]
    if 0 in (once, twice, thrice):
        return np.array([0, 0.5, 0.5, 0.5])
    y = once / (once + 2 * twice)
    found = [0, 1 - 2 * y * twice / once, 2 - 3 * y * thrice / twice, 3 - 4 * y * four / thrice]
    return np.clip(found, 0, np.arange(4))


def _unigram(grams: np.ndarray, counts: np.ndarray, symbols: int) -> np.ndarray:
    return (np.bincount(grams, counts, minlength=symbols) + 1) / (counts.sum() + symbols)


def check(model: Model, contexts: np.ndarray) -> float:
    """The largest |Σ_s p(s | c) − 1| over the contexts."""
    symbols = len(model.unigram)
    following = np.tile(np.arange(symbols), len(contexts))
    sums = probability(model, np.repeat(contexts, symbols, axis=0), following).reshape(-1, symbols).sum(axis=1)
    return float(np.abs(sums - 1).max())
