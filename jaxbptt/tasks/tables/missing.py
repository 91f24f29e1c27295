r"""Values for the missing cells of a table, which networks can't be without."""

from typing import Literal

import numpy as np

Missing = Literal["error", "hold", "interpolate", "mask"]
_WORDS = {
    "hold": "repeat the last value",
    "interpolate": "lie on a line between their neighbours, and so use later values",
    "mask": "do not count in the loss, and repeat the last value as inputs",
}


def fill(values: np.ndarray, observed: np.ndarray, missing: Missing) -> int:
    """Write values into missing cells, in place.

    Args:
        values: `[time, columns]`, each column with at least one value.
        observed: where they are.
        missing: `"hold"` and `"mask"` repeat the last value, `"interpolate"` draws lines; before the first value and,
            for lines, after the last, that one is taken.

    Returns:
        How many cells are before the first value.
    """
    time, leading = np.arange(len(values)), 0
    for column in range(values.shape[1]):
        there = np.flatnonzero(observed[:, column])
        leading += int(there[0])
        if missing == "interpolate":
            values[:, column] = np.interp(time, there, values[there, column])
        else:
            last = np.searchsorted(there, time, side="right") - 1
            values[:, column] = values[there[np.maximum(last, 0)], column]
    return leading


def words(observed: np.ndarray, leading: int, missing: Missing) -> str:
    """What was done, for the user."""
    number = int((~observed).sum())
    first = f"; {leading:,} before the first value of a column take that one" if leading else ""
    return f"missing cells, {number:,} of {observed.size:,}, {_WORDS[missing]}{first}"
