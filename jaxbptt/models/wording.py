"""Validation errors in words: a table and sentences, the same in the terminal and on the page."""

from collections.abc import Sequence

import numpy as np

from jaxbptt.models.forecasting import ValidationErrors
from jaxbptt.words import counted

HORIZONS = (1, 10, 50)
# Networks that are worse by less are as good.
_WORSE = 1.01
# Of the largest error of persistence: what is below is rounding.
_ROUNDING = 1e-9


def errors_table(
    errors: ValidationErrors, horizons: Sequence[int] = HORIZONS
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Root mean squared errors: a head, and a row for each column and horizon that was measured.

    The season is in steps, and the last column is the network's error divided by that of the better baseline.
    """
    head = "column", "steps ahead", "network", "persistence", "seasonal naive", "season", "ratio"
    rows = []
    for i, name in enumerate(errors.columns):
        season = errors.season[i]
        for h in _measured(errors, horizons):
            network, persistence, seasonal = (
                float(found[h - 1, i]) for found in (errors.network, errors.persistence, errors.seasonal)
            )
            baseline = np.fmin(persistence, seasonal)
            ratio = np.nan if _is_exact(errors, baseline, i) else network / baseline
            length = "none" if season is None else f"{season:,}"
            rows.append(
                (
                    name,
                    f"{h:,}",
                    _number(network),
                    _number(persistence),
                    _number(seasonal),
                    length,
                    _number(ratio, ".2f"),
                )
            )
    return head, rows


def errors_sentences(errors: ValidationErrors, horizons: Sequence[int] = HORIZONS) -> list[str]:
    """Warnings of each column whose network is worse than a baseline by 1 % or more, or is not finite."""
    sentences = []
    for i, name in enumerate(errors.columns):
        baselines = {"persistence": errors.persistence, "the seasonal naive forecast": errors.seasonal}
        for baseline, found in baselines.items():
            exact, worse = [], {}
            for h in _measured(errors, horizons):
                network, easy = errors.network[h - 1, i], found[h - 1, i]
                if _is_exact(errors, easy, i):
                    exact += [h] * (not _is_exact(errors, network, i) and not np.isnan(network))
                elif network > _WORSE * easy:
                    worse[h] = network / easy
            if exact:
                sentences.append(f"Warning: {name}: {baseline} is exact {_steps_ahead(exact)}, but the network is not.")
            if worse:
                times = _listed([f"{ratio:.3g}" for ratio in worse.values()])
                sentences.append(
                    f"Warning: {name}: the network is worse than {baseline} {_steps_ahead(list(worse))}, with {times} times "
                    "its error."
                )
        lost = [
            h for h in _measured(errors, horizons) if errors.observed[h - 1, i] and np.isnan(errors.network[h - 1, i])
        ]
        if lost:
            sentences.append(
                f"Warning: {name}: the network's forecasts are not finite {counted(lost[0], 'step')} ahead and beyond."
            )
    return sentences


def measured_sentence(errors: ValidationErrors) -> str:
    """What the table shows, and from how many forecasts."""
    return (
        f"Root mean squared errors on validation data, in the columns' own units, of forecasts from "
        f"{counted(errors.origins, 'row')} and up to {counted(errors.horizons, 'step')} ahead. Ratio: the network's to the "
        "better of the other two."
    )


def _is_exact(errors: ValidationErrors, error: float, column: int) -> bool:
    """Whether an error of a column is 0, up to rounding."""
    return bool(error <= _ROUNDING * np.fmax.reduce(errors.persistence[:, column], initial=0.0))


def _steps_ahead(horizons: list[int]) -> str:
    return f"{_listed([f'{h:,}' for h in horizons])} {'step' if horizons == [1] else 'steps'} ahead"


def _measured(errors: ValidationErrors, horizons: Sequence[int]) -> list[int]:
    """The horizons that were measured, and the longest one in place of those beyond it."""
    return sorted({min(h, errors.horizons) for h in horizons})


def _number(value: float, form: str = ".3g") -> str:
    return "–" if not np.isfinite(value) else f"{value:{form}}"


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
