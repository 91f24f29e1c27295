r"""Sequential depth: how many operations of a program have to wait for one another, however many run at the same time.

It is what is left of the time of a program on a device with no end of processors: a loop over T steps has the depth of a
step T times, an associative scan the depth of its operator 2 log₂ T times.
"""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jax.extend.core import Literal
from jax.interpreters.partial_eval import dce_jaxpr

from jaxbptt.programs.evaluate import subjaxprs
from jaxbptt.scans.schedule import runs_of

# What moves or names numbers computes none, and a compiler fuses it into what does.
_MOVES = {"broadcast_in_dim", "concatenate", "convert_element_type", "copy", "copy_p", "dynamic_slice"}
_MOVES |= {"dynamic_update_slice", "expand_dims", "gather", "iota", "optimization_barrier", "pad", "platform_index"}
_MOVES |= {"reshape", "rev", "select_n", "slice", "split", "squeeze", "stop_gradient", "transpose"}


def count_depth(jaxpr: Any, runs: int | None = None, *, loops: bool = True) -> float:
    """The longest chain of operations of a traced program that each need the result of the one before.

    A loop counts as the longest chain of its body as often as it runs, and of a branch the longest side does. Results that
    nobody uses do not count.

    Args:
        jaxpr: the program.
        runs: of each loop that runs until something holds, where the program does not say; without it such a loop makes
            the depth nan.
        loops: without them, a loop over a known number of steps counts nothing.
    """
    jaxpr, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    # numpy's maximum keeps nan, Python's drops it.
    return float(np.max([0.0, *_depths(jaxpr, [0.0] * len(jaxpr.invars), runs, loops)]))


def iterations(eqn: Any, runs: int | None) -> float | Fraction:
    """How often the inside of an equation runs: nan for a loop of which nothing is known, once where it is no loop."""
    if eqn.primitive.name == "scan":
        return eqn.params["length"]
    if eqn.primitive.name != "while":
        return 1
    known = runs_of(eqn)
    if known is None:
        return math.nan if runs is None else runs
    return known


def _depths(jaxpr: Any, start: Sequence[float], runs: int | None, loops: bool) -> list[float]:
    """Of each result, where the inputs have the depths `start`."""
    depths = dict(zip(jaxpr.invars, start, strict=True)) | dict.fromkeys(jaxpr.constvars, 0.0)

    def depth(var):
        return 0.0 if isinstance(var, Literal) else depths[var]

    for eqn in jaxpr.eqns:
        before = list(map(depth, eqn.invars))
        latest = float(np.max([0.0, *before]))
        kind, inside = eqn.primitive.name, [jaxpr for jaxpr, _ in subjaxprs(eqn)]
        if kind in ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call") and len(inside) == 1:
            after = _depths(inside[0], before, runs, loops)
        elif not inside:
            after = [latest + (kind not in _MOVES)] * len(eqn.outvars)
        elif kind == "scan" and not loops:
            after = [latest] * len(eqn.outvars)
        else:
            # The condition of a loop runs beside its body, and of branches one runs.
            deepest = float(np.max([count_depth(jaxpr, runs, loops=loops) for jaxpr in inside]))
            after = [float(latest + iterations(eqn, runs) * deepest)] * len(eqn.outvars)
        depths |= zip(eqn.outvars, after, strict=True)
    return list(map(depth, jaxpr.outvars))
