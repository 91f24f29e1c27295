r"""When to keep a state and when to recompute it: the binomial checkpointing schedule of Griewank and Walther.

`split` makes one decision; `checkpointed_scan` calls it inside its compiled loop, `checkpoint_schedule` lists all decisions
for one length.
"""

import math
import re
from contextlib import AbstractContextManager
from fractions import Fraction
from math import comb
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxbptt.arrays import check_count
from jaxbptt.html_table import columns_table
from jaxbptt.words import counted


class Schedule(NamedTuple):
    """How to reverse `length` steps with at most `checkpoints` states kept.

    Attributes:
        length: T.
        checkpoints: c, states kept at the same time, the first one included.
        repetitions: r, the most often that any step is recomputed before it is reversed.
        forward_steps: steps computed in all, those included that are computed to be reversed at once.
        moves: what to do, in order, rows (start, stop, keep), with steps counted 0 … T − 1: from the state kept before step
            `start` compute up to the state before step `stop`; where `keep` is 1 keep it, where it is 0 reverse step `stop`.
    """

    length: int
    checkpoints: int
    repetitions: int
    forward_steps: int
    moves: np.ndarray

    def _repr_html_(self) -> str:
        start, stop, keep = self.moves.T
        columns = {
            "from step": start,
            "to step": stop,
            "then": ["keep the state" if k else "reverse the step" for k in keep],
        }
        checkpoints, steps = counted(self.checkpoints, "checkpoint"), counted(self.forward_steps, "forward step")
        note = f"{counted(self.length, 'step')} with {checkpoints}: {steps}, each recomputed at most {counted(self.repetitions, 'time')}."
        return columns_table(self, columns, notes=[note])


def checkpoint_schedule(length: int, checkpoints: int) -> Schedule:
    r"""The order of computing, keeping and reversing steps that needs the fewest forward steps.

    r·T − C(c+r, r−1) + T forward steps, with r the least for which C(c+r, c) ≥ T

    No schedule needs fewer with c states kept: T = 1,000 steps and c = 10 states take 4,636. Costs O(T).

    Args:
        length: T, time steps, at least 1.
        checkpoints: c, states kept, from 1 to T.

    Returns:
        A `Schedule`.

    Raises:
        ValueError: `length` below 1, `checkpoints` outside 1 … T.

    Example:
        >>> import jaxbptt as bptt
        >>> schedule = bptt.checkpoint_schedule(10, 3)
        >>> schedule.forward_steps, schedule.repetitions
        (25, 2)
        >>> print(schedule.moves[:4])  # keep the states before steps 4 and 7, reverse step 9, then step 8
        [[0 4 1]
         [4 7 1]
         [7 9 0]
         [7 8 0]]

    References:
        Griewank and Walther, Algorithm 799: revolve, 2000, doi:10.1145/347837.347846.
    """
    check_count("length", length, "it counts time steps")
    check_checkpoints(checkpoints, length)
    reach = reaches(length, checkpoints) if checkpoints > 1 else None
    kept, moves = [0], []
    for last in reversed(range(length)):
        while last > kept[-1] and len(kept) < checkpoints:
            keep = kept[-1] + int(split(reach, last + 1 - kept[-1], checkpoints - len(kept) + 1))
            moves.append((kept[-1], keep, 1))
            kept.append(keep)
        moves.append((kept[-1], last, 0))
        if kept[-1] == last:
            kept.pop()
    table = np.array(moves)
    steps = int((table[:, 1] - table[:, 0]).sum()) + length
    return Schedule(length, checkpoints, repetitions(length, checkpoints), steps, table)


def forward_steps(length: int, checkpoints: int) -> int:
    """`checkpoint_schedule(length, checkpoints).forward_steps` by the formula."""
    r = repetitions(length, checkpoints)
    return r * length - (comb(checkpoints + r, r - 1) if r else 0) + length


def repetitions(length: int, checkpoints: int) -> int:
    """The least r for which C(c+r, c) ≥ T."""
    if checkpoints == 1:
        return length - 1
    r = 0
    while comb(checkpoints + r, checkpoints) < length:
        r += 1
    return r


def first_sweep(length: int, checkpoints: int) -> list[int]:
    """The steps before which the forward pass keeps a state."""
    kept = [0]
    reach = reaches(length, checkpoints) if checkpoints > 1 else None
    while length - kept[-1] > 1 and len(kept) < checkpoints:
        kept.append(kept[-1] + int(split(reach, length - kept[-1], checkpoints - len(kept) + 1)))
    return kept


def reaches(length: int, checkpoints: int) -> np.ndarray:
    """C(c+r, c), the longest chain that c kept states can reverse with r repetitions: entries [c, r], up to `length`."""
    columns = [np.ones(checkpoints + 1, np.int64)]
    while columns[-1][-1] < length:
        columns.append(np.minimum(np.cumsum(columns[-1]), length))
    return np.stack(columns, axis=1).astype(np.int32)


def split(reach: Any, length: Any, checkpoints: Any) -> Any:
    """How many of `length` > 1 steps to compute before the next state is kept, with `checkpoints` > 1 free.

    The largest of the optimal choices. Works on numpy and on traced integers.
    """
    row, shorter = reach[checkpoints], reach[checkpoints - 1]
    r = (row < length).sum(dtype=np.int32)
    most, least_left = row[r - 1], length - shorter[r - 1]
    return (most + least_left - abs(most - least_left)) // 2  # the smaller of the two


def runs(average: Fraction | int) -> AbstractContextManager[Any]:
    """Records how often the body of the loop traced inside runs, on average, which the trace doesn't show."""
    numerator, denominator = Fraction(average).as_integer_ratio()
    return jax.named_scope(f"runs_{numerator}_in_{denominator}")


def runs_of(eqn: Any) -> Fraction | None:
    """What `runs` recorded for a traced loop."""
    recorded = re.search(r"runs_(\d+)_in_(\d+)$", str(eqn.source_info.name_stack))
    return Fraction(int(recorded[1]), int(recorded[2])) if recorded else None


def check_checkpoints(checkpoints: Any, length: int) -> None:
    """Raise unless `checkpoints` is between 1 and `length`."""
    check_count("checkpoints", checkpoints, "it counts the states that are kept")
    if checkpoints > length:
        raise ValueError(
            f"checkpoints is {checkpoints}, more than the {counted(length, 'time step')}: keeping every state is "
            f"checkpoints={length}, and adjoint_scan does that more simply."
        )


def divisor_near(length: int, segment: float, within: float = 1.5) -> int:
    """A divisor of `length` near `segment`, so that no shorter segment is left over_time, or else what is nearest to it."""
    near = range(math.ceil(segment / within), math.floor(segment * 1.5) + 1)
    divisors = [s for s in near if s and length % s == 0]
    return min(divisors, key=lambda s: abs(math.log(s / segment))) if divisors else max(1, min(round(segment), length))
