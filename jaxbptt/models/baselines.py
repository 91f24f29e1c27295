r"""What is easy to forecast with: the last value, the value one season ago, and whether there is a season.

A network that is not better than these has learnt nothing that is of use.
"""

from typing import Any

import numpy as np

# A season is looked for in this many of the last values: more would cost time, and seasons drift.
LOOKED_AT = 50_000
# A season has to be seen this often.
_CYCLES = 4
# The share of the variance that the mean season has to explain is 0.2 and, of c cycles, 2/c: few explain much by chance.
_EXPLAINED, _EXPLAINED_MORE = 0.2, 2.0
# Changes over two seasons are about the same up to this factor.
_SAME = 1.1
_PEAKS, _PARTS = 8, 60
# Of values up to 1, squared.
_ROUNDING = 1e-24


def persistence(values: Any, origins: Any, horizons: int) -> np.ndarray:
    r"""Forecasts that nothing changes.

    x̂ₜ₊ₕ = xₜ

    Args:
        values: `[time, columns]`.
        origins: the last rows that are known, t, `[origins]`.
        horizons: how many steps to forecast, h = 1, 2, …

    Returns:
        Forecasts, `[origins, horizons, columns]`.
    """
    last = np.asarray(values, float)[np.asarray(origins)]
    return np.repeat(last[:, None], horizons, axis=1)


def seasonal_naive(values: Any, origins: Any, horizons: int, *, season: int) -> np.ndarray:
    r"""Forecasts that all is as it was at the same time of the last season that is known.

    x̂ₜ₊ₕ = xₜ₊ₕ₋ₘₖ,  k = ⌈h/m⌉,  for a season of m steps

    Args:
        values: `[time, columns]`.
        origins: the last rows that are known, t, `[origins]`.
        horizons: how many steps to forecast, h = 1, 2, …
        season: its length m; 1 is persistence.

    Returns:
        Forecasts, `[origins, horizons, columns]`; nan where less than a season is known.

    References:
        Hyndman and Athanasopoulos, Forecasting: principles and practice, third edition, 2021, section 5.2.
    """
    values = np.asarray(values, float)
    steps = np.arange(1, horizons + 1)
    rows = np.asarray(origins)[:, None] + steps - season * -(-steps // season)
    return np.where(rows[..., None] >= 0, values[np.maximum(rows, 0)], np.nan)


def season_length(values: Any) -> int | None:
    r"""The length of the season of a series, in steps; `None` where it has none.

    Candidates are the peaks of the autocorrelation and of the spectrum, both without a cubic trend. Without its moving
    average over one season, the mean season of each half of the series has to explain a fifth of the other half's variance,
    and more where there are few: what only oscillates, like Lorenz's equations, loses its phase, and such a mean is close
    to 0. Of several, it is the one over which the series changes least; of those over which it changes about as little, the
    shortest.

    Only the last 50,000 values are looked at, for seasons that are there at least four times.

    Args:
        values: `[time]`, finite.

    Returns:
        The number of steps, at least 2, or `None`.

    Raises:
        ValueError: values of another shape.

    Example:
        >>> import numpy as np
        >>> from jaxbptt.models.baselines import season_length
        >>> days = np.arange(200)
        >>> season_length(0.1 * days + (days % 7 >= 5))
        7
    """
    values = np.asarray(values, float)
    if values.ndim != 1:
        raise ValueError(f"values has shape {values.shape}, but a season is that of one series: pass [time].")
    values = values[-LOOKED_AT:]
    count = len(values)
    longest = count // _CYCLES
    if longest < 2:
        return None
    # Scaled first, since squares of large numbers overflow; what is left of a line or a constant is rounding.
    values = values / (np.abs(values).max() or 1.0)
    residuals = _detrended(values)
    if np.abs(residuals).max() <= _ROUNDING**0.5:
        return None
    seasons, season = {}, None
    found = _around(_candidates(residuals, longest), longest)
    while found:
        seasons |= {m: _change(residuals, m) for m in found if _is_season(residuals, m)}
        about_least = _SAME * min(seasons.values(), default=0.0) + 0.01 * residuals.var()
        before, season = season, min((m for m, change in seasons.items() if change <= about_least), default=None)
        if season is None or season == before:
            break
        # Every multiple of a season is one too, and may be the highest peak.
        found = _around(season / np.arange(2, season // 2 + 1)[:_PARTS], longest) - seasons.keys()
    return season


def _candidates(residuals: np.ndarray, longest: int) -> np.ndarray:
    """The highest peaks of the autocorrelation, and the periods of the strongest frequencies; real numbers."""
    count = len(residuals)
    power = np.abs(np.fft.rfft(residuals, 2 * count)) ** 2
    # At each lag the mean of its products, up to a factor.
    r = np.fft.irfft(power)[:count] / np.arange(count, 0, -1)
    lags = np.arange(2, longest + 1)
    peaks = lags[(r[lags] > r[lags - 1]) & (r[lags] >= r[lags + 1])]
    # A peak counts by how far it stands above the lowest point before it.
    contrast = r[peaks] - np.minimum.accumulate(r)[peaks]
    highest = peaks[np.argsort(-contrast, kind="stable")[:_PEAKS]]
    frequencies = np.argsort(-np.abs(np.fft.rfft(residuals)[_CYCLES:]), kind="stable")[:_PEAKS] + _CYCLES
    return np.concatenate([highest, count / frequencies])


def _around(lags: np.ndarray, longest: int) -> set[int]:
    """Whole numbers at lags, and a step beside them, where noise may have moved them."""
    near = np.round(lags)[:, None] + np.array([-1, 0, 1])
    return {int(m) for m in near.ravel() if 2 <= m <= longest}


def _detrended(values: np.ndarray) -> np.ndarray:
    time = np.linspace(-1, 1, len(values))
    return values - np.polynomial.Polynomial.fit(time, values, 3)(time)


def _change(values: np.ndarray, season: int) -> float:
    """The mean square of the change over a season, which is what the seasonal naive forecast misses."""
    return float(np.mean((values[season:] - values[:-season]) ** 2))


def _is_season(values: np.ndarray, season: int) -> bool:
    """Whether the mean season of each half explains enough of the other half's variance; more, where seasons are few."""
    sums = np.cumsum(np.concatenate([[0.0], values]))
    # The mean over one season, as near the middle as whole steps allow.
    trend = (sums[season:] - sums[:-season]) / season
    residuals = values[season // 2 :][: len(trend)] - trend
    half = len(residuals) // 2 // season * season
    if not half:
        return False
    one, other = residuals[:half], residuals[half : 2 * half]
    # Without their means, which are what the moving average misses of a trend that bends.
    halves = [(each - each.mean()).reshape(-1, season) for each in (one, other)]
    needed = _EXPLAINED + _EXPLAINED_MORE * season / len(values)
    for one, other in (halves, halves[::-1]):
        variance = np.mean(other**2)
        if not variance > _ROUNDING or np.mean((other - one.mean(axis=0)) ** 2) > (1 - needed) * variance:
            return False
    return True
