"""Validation errors in words: a table and sentences, the same in the terminal and on the page."""

from collections.abc import Sequence

import numpy as np

from jaxbptt.models.forecasting import ValidationErrors
from jaxbptt.words import counted

HORIZONS = (1, 10, 50)


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
            ratio = network / baseline if baseline > 0 else np.nan
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
    """A warning for each column whose network is worse than a baseline, or is not finite."""
    sentences = []
    for i, name in enumerate(errors.columns):
        baselines = {"persistence": errors.persistence, "the seasonal naive forecast": errors.seasonal}
        for baseline, found in baselines.items():
            worse = {
                h: errors.network[h - 1, i] / found[h - 1, i]
                for h in _measured(errors, horizons)
                if errors.network[h - 1, i] > found[h - 1, i]
            }
            if worse:
                times = _listed([f"{ratio:.3g}" for ratio in worse.values()])
                sentences.append(
                    f"Warning: {name}: the network is worse than {baseline} {_listed([f'{h:,}' for h in worse])} "
                    f"{'step' if list(worse) == [1] else 'steps'} ahead, with {times} times its error."
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


def _measured(errors: ValidationErrors, horizons: Sequence[int]) -> list[int]:
    """The horizons that were measured, and the longest one in place of those beyond it."""
    return sorted({min(h, errors.horizons) for h in horizons})


def _number(value: float, form: str = ".3g") -> str:
    return "–" if not np.isfinite(value) else f"{value:{form}}"


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))
