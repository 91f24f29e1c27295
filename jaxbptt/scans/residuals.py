r"""What one loop saves for another, each array once.

A residual that is also this or the previous step's output is read from `ys`, not stored again: where a network's
output is its state, the states are not stored a second time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt.along_time import at, window


@dataclass(frozen=True)
class Storage:
    """Where each leaf of a tree is found, so that none is stored twice.

    Attributes:
        stored: numbers of the leaves to store.
        places: for each leaf, ("stored", index) or (name of a list that has it anyway, index).
        treedef: structure of the tree.
    """

    stored: tuple[int, ...]
    places: tuple[tuple[str, int], ...]
    treedef: Any

    def store(self, tree: Any) -> list[Any]:
        """The leaves to store."""
        leaves = jax.tree.leaves(tree)
        return [leaves[i] for i in self.stored]

    def restore(self, **found: Callable[[int], Any] | Sequence[Any]) -> Any:
        """The tree, from lists, or functions of the index, by name."""
        getters = {name: get if callable(get) else get.__getitem__ for name, get in found.items()}
        return self.treedef.unflatten([getters[name](index) for name, index in self.places])


def stored_once(tree: Any, **available: Sequence[Any]) -> Storage:
    """Where to find each leaf of a tree of variables, given lists of variables that are available anyway."""
    by_id = {name: list(map(id, variables)) for name, variables in available.items()}
    stored: dict[int, int] = {}
    leaves, treedef = jax.tree.flatten(tree)

    def place(i, var):
        for name, ids in by_id.items():
            if id(var) in ids:
                return name, ids.index(id(var))
        stored.setdefault(id(var), i)
        return "stored", list(stored).index(id(var))

    places = tuple(place(i, var) for i, var in enumerate(leaves))
    return Storage(tuple(stored.values()), places, treedef)


@partial(jax.tree_util.register_dataclass, data_fields=("stored", "ys", "init"), meta_fields=("after", "storage"))
@dataclass(frozen=True)
class Residuals:
    """The residuals of all time steps.

    Attributes:
        stored: arrays stacked over time.
        ys: by number, the leaves of the outputs that are read, stacked over time.
        init: by number, the leaves of the first carry that are read.
        after: (number of a leaf of the carry, number of the output that it is after the step).
        storage: of a step's residuals, with "ys" for an output of this step and "carry" for one of the step before.
    """

    stored: list[Any]
    ys: dict[int, Any]
    init: dict[int, Any]
    after: tuple[tuple[int, int], ...]
    storage: Storage

    @classmethod
    def layout(cls, residuals: Any, ys: Any, carry: Any, new_carry: Any) -> "Residuals":
        """Without arrays, from the variables of a traced step."""
        ys, carry, new_carry = map(jax.tree.leaves, (ys, carry, new_carry))
        ids = list(map(id, ys))
        # A leaf of the carry can be read from ys, one step earlier, where its new value is an output.
        after = {i: ids.index(id(new)) for i, new in enumerate(new_carry) if id(new) in ids}
        was_output = [var if i in after else None for i, var in enumerate(carry)]
        storage = stored_once(residuals, ys=ys, carry=was_output)
        read = {kind: {index for name, index in storage.places if name == kind} for kind in ("ys", "carry")}
        after = {i: y for i, y in after.items() if i in read["carry"]}
        outputs = sorted(read["ys"] | set(after.values()))
        return cls([], dict.fromkeys(outputs), dict.fromkeys(after), tuple(after.items()), storage)

    def filled(self, stored: list[Any], ys: Any, init: Any) -> "Residuals":
        """With the arrays: those stored, and all outputs and leaves of the first carry to choose from."""
        ys, init = jax.tree.leaves(ys), jax.tree.leaves(init)
        return Residuals(stored, {i: ys[i] for i in self.ys}, {i: init[i] for i in self.init}, self.after, self.storage)

    def at(self, t: Any) -> Any:
        """Those of step t."""

        def before(y, init):
            # Before the first step the index −1 is clamped to 0, and what is read there is not selected.
            return jax.lax.select(t == 0, init, at(y, t - 1))

        return self._restored(partial(at, t=t), before)

    def window(self, start: Any, length: int) -> Any:
        """Those of `length` steps from `start` on, stacked."""

        def before(y, init):
            first = jax.lax.select(start == 0, init, at(y, start - 1))
            return jnp.concatenate([first[None], window(y, start, length - 1)])

        return self._restored(partial(window, start=start, length=length), before)

    def stacked(self) -> Any:
        """Those of all steps."""
        return self._restored(lambda leaf: leaf, lambda y, init: jnp.concatenate([init[None], y])[: y.shape[0]])

    def _restored(self, get: Callable[..., Any], before: Callable[..., Any]) -> Any:
        after = dict(self.after)
        return self.storage.restore(
            stored=lambda i: get(self.stored[i]),
            ys=lambda i: get(self.ys[i]),
            carry=lambda i: before(self.ys[after[i]], self.init[i]),
        )
