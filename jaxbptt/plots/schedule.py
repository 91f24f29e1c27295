r"""When a checkpointing schedule computes, keeps and reverses each step."""

from typing import Any

import numpy as np
from matplotlib.lines import Line2D

from jaxbptt.plots.figure import (
    COLOURS,
    Ax,
    Drawing,
    add_legend,
    drawing,
    label_axes,
    panels_in,
    step_ticks,
)
from jaxbptt.scans.schedule import Schedule


def plot_schedule(schedule: Schedule, *, ax: Ax = None) -> Drawing:
    r"""The moves of a schedule from top to bottom, time from left to right; below, how often each step is computed.

    A move computes forward from a state that is kept, and then keeps the state it has reached, or reverses the next step.

    Args:
        schedule: from `checkpoint_schedule`, of some dozens of steps: each move takes a line.
        ax: two Axes to draw in, which share their x axis; a new figure by default.

    Returns:
        A `Drawing`; the artists are the lines `"forward"`, `"reverse"` and `"kept"`, in which nan separates the moves, and
        the bars `"times computed"`.

    Raises:
        ValueError: `ax` of another number of Axes.

    Example:
        >>> import jaxbptt as bptt
        >>> from jaxbptt import plots
        >>> drawing = plots.plot_schedule(bptt.checkpoint_schedule(10, 3))
        >>> bars = drawing.artists["times computed"]
        >>> sum(int(bar.get_height()) for bar in bars)
        25

    References:
        Griewank and Walther, Algorithm 799: revolve, 2000, doi:10.1145/347837.347846.
    """
    height = 3.2 + 0.12 * len(schedule.moves)
    ratios = [max(height - 2.4, 1.2), 1]
    panels = panels_in(ax, 2, width=9.0, height=height, stacked=True, sharex=True, height_ratios=ratios)
    moves, bars = panels
    forward, reverse, kept = [], [], []
    since, computed = {0: 0}, np.zeros(schedule.length, int)  # since which move each state is kept
    for row, (start, stop, keep) in enumerate(np.asarray(schedule.moves).tolist(), start=1):
        forward.append([(start, row), (stop, row)])
        computed[start:stop] += 1
        if keep:
            since[stop] = row
            continue
        reverse.append([(stop, row), (stop + 1, row)])
        computed[stop] += 1
        if start == stop:
            kept.append([(start, since.pop(start)), (start, row)])
    red: dict[str, Any] = {"linewidth": 5, "solid_capstyle": "butt"}
    artists: dict[str, Any] = {
        "forward": _line(moves, forward, "-", color=COLOURS[0], linewidth=2, label="compute forward"),
        "reverse": _line(moves, reverse, "-", color=COLOURS[1], label="reverse the step", **red),
        "kept": _line(moves, kept, "o:", color=COLOURS[2], label="state kept, from the dot on", markevery=3),
        "times computed": bars.bar(np.arange(schedule.length) + 0.5, computed, width=0.8, color=COLOURS[0]),
    }
    moves.set_ylim(len(schedule.moves) + 1, -1)
    label_axes(moves, "", "", "move, in order of work")
    label_axes(bars, "", "time step, counted from 0", "times computed")
    step_ticks(bars.xaxis, bars.yaxis, moves.yaxis)
    add_legend(panels, ax)
    return drawing(panels, artists)


def _line(axes: Any, pieces: list[Any], style: str, **options: Any) -> Line2D:
    """One artist for many separate lines of two points: nan is where the pen is lifted."""
    points = np.array([point for piece in pieces for point in (*piece, (np.nan, np.nan))], float).reshape(-1, 2)
    return axes.plot(*points.T, style, **options)[0]
