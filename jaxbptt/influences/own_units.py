r"""Influences that keep what each weight does to its own unit: for each leaf of the carry an array like the params.

A row of a weight matrix leads to one unit alone, and reaches at most one entry of each leaf of the carry in a step: of an LSTM's
(h, c), hᵢ and cᵢ. Which, is found once, from the step, and is static. So M is stored without its zeros, and one cotangent of
ones for each leaf of the carry gives all of F. Of J only what leads from a unit to itself is needed:

M′ₖ[θ] = Fₖ[θ] + Σₗ ∂cₖ[i]/∂cₗ[j] Mₗ[θ],  i and j the entries of leaves k and l that θ reaches
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.arrays import at_least_float32
from jaxbptt.influences import dense
from jaxbptt.influences.state import state_jacobian
from jaxbptt.programs.pattern import Reached
from jaxbptt.programs.terms import Sum, terms_of

_FEW_RUNS = 16

# The derivative of entry i of leaf k of the new carry with respect to entry at[i] of leaf l: `(k, l, at) -> array`.
Between = Callable[[int, int, np.ndarray], Any]


class Places(NamedTuple):
    """Entries of a leaf of the carry, one for each entry of a leaf of the params, as something that can be hashed.

    Attributes:
        shape: broadcasts against the leaf: with size 1 along the axes that do not count.
        numbers: entries, flat; -1 for none.
    """

    shape: tuple[int, ...]
    numbers: tuple[int, ...]

    @classmethod
    def of(cls, reached: Reached, anywhere: np.ndarray) -> "Places | None":
        """With as few axes as possible; `None` where nothing is reached.

        `anywhere` flags what reaches anything, in any leaf of the carry: what does not may have any number.
        """
        if not (reached >= 0).any():
            return None
        reached = np.where(anywhere, reached, -2)
        for axis in range(reached.ndim):
            largest = reached.max(axis, keepdims=True)
            if ((reached == largest) | (reached == -2)).all():
                reached = largest
        return cls(reached.shape, tuple(np.maximum(reached, -1).reshape(-1).tolist()))

    def take(self, values: Any) -> Any:
        """The values at these entries, of a flat array; 0 for none."""
        at = np.asarray(self.numbers)
        steps = np.where(at[1:] < 0, at[:-1] < 0, (np.diff(at) == 1) & (at[:-1] >= 0))
        runs = np.split(at, 1 + np.flatnonzero(~steps))
        if len(runs) > _FEW_RUNS:
            taken = jnp.where(at < 0, 0, values[np.maximum(at, 0)])
        else:  # those of each gate follow one another, and slices are faster
            parts = [jnp.zeros(len(run), values.dtype) if run[0] < 0 else values[run[0] : run[-1] + 1] for run in runs]
            taken = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
        return taken.reshape(self.shape)


class Layout(NamedTuple):
    """Where each weight leads to.

    Attributes:
        treedef: that of the params.
        shapes: of their leaves.
        places: for each leaf of the carry, for each of the params, the entry that is reached; `None` where none is.
        pairs: for each leaf k of the carry, for each leaf l, the entry of l that belongs to each of k, -1 for none; `None` where
            no weight leads to both.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    places: tuple[tuple[Places | None, ...], ...]
    pairs: tuple[tuple[tuple[int, ...] | None, ...], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class OwnUnits:
    """An influence on own units: `values[k][a]`, like leaf a of the params, or `None` where it does not lead to leaf k."""

    values: list[list[Any]]
    layout: Layout = field(metadata={"static": True})


def init(layout: Layout | None, params: Any, carry: Any) -> Any:
    """Zeros: in full where there is no layout."""
    if layout is None:
        return dense.init(params, carry)
    leaves = jax.tree.leaves(carry)
    values = [
        [
            None if places is None else jnp.zeros(shape, at_least_float32(leaf.dtype))
            for places, shape in zip(of_leaf, layout.shapes, strict=True)
        ]
        for of_leaf, leaf in zip(layout.places, leaves, strict=True)
    ]
    return OwnUnits(values, layout)


def advance(step: Callable[..., Any], params: Any, carry: Any, x: Any, M: OwnUnits, between: Between) -> OwnUnits:
    """J M + F, where J is what `between` gives of it."""
    values = [list(of_leaf) for of_leaf in M.values]
    for k, of_leaf in enumerate(M.values):
        if all(leaf is None for leaf in of_leaf):
            continue
        coefficients = {
            j: between(k, j, np.asarray(pairs)) for j, pairs in enumerate(M.layout.pairs[k]) if pairs is not None
        }
        for a, F in enumerate(immediate(step, params, carry, x, k)):
            places = M.layout.places[k][a]
            if places is None:
                continue
            new = F.astype(of_leaf[a].dtype)
            for j, coefficient in coefficients.items():
                old = M.values[j][a]
                if old is not None and coefficient is not None:
                    new = places.take(coefficient.astype(new.dtype)) * old.astype(new.dtype) + new
            values[k][a] = new
    return OwnUnits(values, M.layout)


def pull(M: Any, carry_bar: Any) -> Any:
    """Each weight's part, of its own entries; or of all, where M is kept in full."""
    if not isinstance(M, OwnUnits):
        return dense.pull(M, carry_bar)
    bars = [leaf.reshape(-1) for leaf in jax.tree.leaves(carry_bar)]
    found = []
    for a, shape in enumerate(M.layout.shapes):
        total = jnp.zeros(shape, at_least_float32(bars[0].dtype))
        for k, bar in enumerate(bars):
            places, leaf = M.layout.places[k][a], M.values[k][a]
            if places is not None:
                total = total + (places.take(bar.astype(leaf.dtype)) * leaf).astype(total.dtype)
        found.append(total)
    return jax.tree.unflatten(M.layout.treedef, found)


def immediate(step: Callable[..., Any], params: Any, carry: Any, x: Any, k: int) -> list[Any]:
    """The sum of F over the entries of leaf k of the carry, for each leaf of the params: of which each reaches one."""
    leaf, vjp = jax.vjp(lambda params: jax.tree.leaves(step(params, carry, x)[0])[k], params)
    return jax.tree.leaves(vjp(jnp.ones_like(leaf))[0])


def layout_of(
    params: Any, carry: Any, of_params: list[list[Any]], of_carry: list[list[Any]] | None = None
) -> Layout | None:
    """Where each weight leads to, in one step, or with `of_carry` in any number of steps; `None` if to several entries of a leaf.

    `of_params` and `of_carry` are as `reached_entries` finds them.
    """
    if any(reached is None for of_leaf in (*of_params, *(of_carry or ())) for reached in of_leaf):
        return None
    reached = of_params if of_carry is None else _closure(of_params, of_carry)
    return None if reached is None else _layout(params, carry, reached)


def _closure(of_params: list[list[Any]], of_carry: list[list[Any]]) -> list[list[Reached]] | None:
    """What is reached in any number of steps, where each entry of the carry reaches one of each leaf; `None` if several."""
    found, leaves = [list(of_leaf) for of_leaf in of_params], range(len(of_carry))
    moved = True
    while moved:
        moved = False
        for k in leaves:
            for j in leaves:
                for a, start in enumerate(found[j]):
                    further = np.where(start >= 0, of_carry[k][j].reshape(-1)[start], -1)
                    here = found[k][a]
                    if ((here >= 0) & (further >= 0) & (here != further)).any():
                        return None
                    if ((here < 0) & (further >= 0)).any():
                        found[k][a] = np.maximum(here, further)
                        moved = True
    return found


def _layout(params: Any, carry: Any, reached: list[list[Reached]]) -> Layout | None:
    sizes = [leaf.size for leaf in jax.tree.leaves(carry)]
    pairs = [
        [_pairs(size, of_leaf, others) for others in reached] for size, of_leaf in zip(sizes, reached, strict=True)
    ]
    if any(found is False for of_leaf in pairs for found in of_leaf):
        return None
    anywhere = [np.any([places >= 0 for places in of_param], axis=0) for of_param in zip(*reached, strict=True)]
    places = tuple(tuple(map(Places.of, of_leaf, anywhere)) for of_leaf in reached)
    shapes = tuple(leaf.shape for leaf in jax.tree.leaves(params))
    return Layout(jax.tree.structure(params), shapes, places, tuple(map(tuple, pairs)))


def _pairs(size: int, reached: list[Reached], others: list[Reached]) -> Any:
    """The entry of another leaf that belongs to each entry; `False` if it is not one."""
    found = np.full(size, -1)
    for here, there in zip(reached, others, strict=True):
        both = (here >= 0) & (there >= 0)
        mine, other = here[both], there[both]
        found[mine] = other
        if (found[mine] != other).any():
            return False
    for here, there in zip(reached, others, strict=True):
        both = (here >= 0) & (there >= 0)
        if (found[here[both]] != there[both]).any():
            return False
    return tuple(found.tolist()) if (found >= 0).any() else None


def jacobian_between(step: Callable[..., Any], params: Any, carry: Any, x: Any) -> Between:
    """The entries of J itself: read off the equations, or else from the whole of J."""
    sums, leaves = state_terms(step, params, carry, x), jax.tree.leaves(carry)
    starts = np.cumsum([0, *(leaf.size for leaf in leaves)])
    whole = []

    def between(k, j, at):
        found = sums[k].entries(j, at)
        if found is not None:
            return None if isinstance(found, float) else found
        if not whole:
            whole.append(state_jacobian(step, params, carry, x))
        return jnp.where(at >= 0, whole[0][starts[k] + np.arange(len(at)), starts[j] + np.maximum(at, 0)], 0)

    return between


def entries_of(sums: list[Sum]) -> Between:
    """Those of tangents of which nothing is lost."""

    def between(k, j, at):
        found = sums[k].entries(j, at)
        return None if isinstance(found, float) else found

    return between


def state_terms(step: Callable[..., Any], params: Any, carry: Any, x: Any) -> list[Sum]:
    """The tangent of each leaf of the new carry, from tangents of the carry."""
    leaves, treedef = jax.tree.flatten(carry)
    return terms_of(lambda leaves: jax.tree.leaves(step(params, treedef.unflatten(leaves), x)[0]), leaves)
