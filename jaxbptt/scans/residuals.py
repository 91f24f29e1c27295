r"""What the way forward leaves for the way back, each number of it once.

A residual that is returned as an output is read there. So is a carry that was the output of the step before: of a network
whose output is its state, the states are not kept beside the outputs.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt.along_time import at, window


@partial(jax.tree_util.register_dataclass, data_fields=("kept", "ys", "init"), meta_fields=("places", "treedef"))
@dataclass(frozen=True)
class Residuals:
    """The residuals of all time steps.

    Attributes:
        kept: arrays stacked over time.
        ys: the outputs that are read, stacked over time.
        init: the leaves of the first carry that are read.
        places: for each leaf of a step's residuals, ("kept" or "ys", index), or ("before", index into ys, into init).
        treedef: structure of a step's residuals.
    """

    kept: list[Any]
    ys: list[Any]
    init: list[Any]
    places: tuple[tuple[Any, ...], ...]
    treedef: Any

    def at(self, t: Any) -> Any:
        """Those of step t."""

        def before(y, init):  # a read before the beginning is one at the beginning
            return jax.lax.select(t == 0, init, at(y, t - 1))

        return self._gather(partial(at, t=t), before)

    def window(self, start: Any, length: int) -> Any:
        """Those of `length` steps from `start` on, stacked."""

        def before(y, init):
            first = jax.lax.select(start == 0, init, at(y, start - 1))
            return jnp.concatenate([first[None], window(y, start, length - 1)])

        return self._gather(partial(window, start=start, length=length), before)

    def stacked(self) -> Any:
        """Those of all steps."""
        return self._gather(lambda leaf: leaf, lambda y, init: jnp.concatenate([init[None], y])[: y.shape[0]])

    def _gather(self, get: Callable[..., Any], before: Callable[..., Any]) -> Any:
        def leaf(kind, *index):
            if kind == "before":
                return before(self.ys[index[0]], self.init[index[1]])
            return get(getattr(self, kind)[index[0]])

        return self.treedef.unflatten([leaf(*place) for place in self.places])


def places(
    residuals: list[Any], ys: list[Any], carry: list[Any], new_carry: list[Any]
) -> tuple[list[int], tuple[list[int], list[int]], tuple[tuple[Any, ...], ...]]:
    """Which residuals to keep, which outputs and leaves of the first carry to read, and where each residual is found.

    All four lists are of variables of a traced step.
    """
    residuals, ys, carry, new_carry = (
        [id(var) for var in variables] for variables in (residuals, ys, carry, new_carry)
    )
    kept: dict[int, int] = {}
    read_ys: dict[int, int] = {}
    read_init: dict[int, int] = {}

    def place(i, var):
        after = new_carry[carry.index(var)] if var in carry else None
        if var in ys:
            return "ys", read_ys.setdefault(ys.index(var), len(read_ys))
        if after in ys:
            y = read_ys.setdefault(ys.index(after), len(read_ys))
            return "before", y, read_init.setdefault(carry.index(var), len(read_init))
        kept.setdefault(var, i)
        return "kept", list(kept).index(var)

    found = tuple(place(i, var) for i, var in enumerate(residuals))
    return list(kept.values()), (list(read_ys), list(read_init)), found
