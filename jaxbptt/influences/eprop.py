r"""e-prop: the influence moves on within each unit, from one of its states to another, and not from unit to unit."""

from typing import Any

import jax
import numpy as np

from jaxbptt.influences import own_units
from jaxbptt.influences.influence import Influence
from jaxbptt.influences.own_units import OwnUnits
from jaxbptt.influences.state import flat, jacobians
from jaxbptt.programs.pattern import Reached, reached_entries
from jaxbptt.programs.terms import Sum


def eprop() -> Influence:
    r"""e-prop: eligibility traces, in which a weight's influence stays with its own unit's states.

    Mₜ = Dₜ Mₜ₋₁ + Fₜ,  Dₜ the part of Jₜ that leads through no product with a matrix

    So D holds ∂cᵢ/∂cᵢ = fᵢ and ∂hᵢ/∂cᵢ of an LSTM's unit, zᵢ of a GRU's, 1 − dt/τ of a leaky unit's, and of `elman` nothing.
    Biased: what goes from one unit to another, or from a unit to itself by W_hh, is lost. Time and memory O(p) a step and row
    where each weight leads to one unit in a step, as in every cell; in a stack M has leaves `[n, *leaf]`, and a step takes O(n p).
    Where no unit reads another, as in `lru` and `min_gru`, it is exact.

    The learning signal is the true one, dL/dcₜ through yₜ: symmetric e-prop, with the readout's own weights as feedback.

    Returns:
        An `Influence`.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell = bptt.lstm(3, 4)
        >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (20, 3))
        >>> def loss(params, scan):
        ...     return jax.numpy.mean(scan(cell, params, cell.initial_carry(), xs)[1] ** 2)
        >>> def local(*args):
        ...     return bptt.forward_scan(*args, influence=bptt.influences.eprop())
        >>> biased, exact = (jax.grad(loss)(params, scan).W_hh for scan in (local, bptt.scan))
        >>> bool(jax.numpy.vdot(biased, exact) > 0.9 * jax.numpy.linalg.norm(biased) * jax.numpy.linalg.norm(exact))
        True

    References:
        Bellec, Scherr, Subramoney, Hajek, Salaj, Legenstein and Maass, A solution to the learning dilemma for recurrent networks
        of spiking neurons, 2020, doi:10.1038/s41467-020-17236-y.
    """
    return Influence(_init, _advance, own_units.pull)


def _init(step: Any, params: Any, carry: Any, x: Any) -> Any:
    of_params, _ = reached_entries(step, params, carry, x)
    of_carry = _reached_elementwise(own_units.state_terms(step, params, carry, x), jax.tree.leaves(carry))
    layout = own_units.layout_of(params, carry, of_params, of_carry)
    return own_units.init(layout, params, carry)


def _reached_elementwise(sums: list[Sum], leaves: list[Any]) -> list[list[Reached | None]]:
    """For each leaf k of the new carry, for each leaf j of the old, the entry that each of j leads to element by element."""
    found: list[list[Any]] = [[np.full(leaf.shape, -1).reshape(-1) for leaf in leaves] for _ in leaves]
    for k, of_leaf in enumerate(sums):
        for term in of_leaf.elementwise.terms:
            source = term.source.reshape(-1)
            i, j = np.flatnonzero(source >= 0), source[source >= 0]
            reached = found[k][term.leaf]
            if reached is None:
                continue
            before = reached[j]
            reached[j] = i
            if (reached[j] != i).any() or ((before >= 0) & (before != i)).any():
                found[k][term.leaf] = None
    return [
        [
            None if reached is None else reached.reshape(leaf.shape)
            for reached, leaf in zip(of_leaf, leaves, strict=True)
        ]
        for of_leaf in found
    ]


def _advance(step: Any, params: Any, carry: Any, x: Any, M: Any, key: Any) -> Any:
    sums = [found.elementwise for found in own_units.state_terms(step, params, carry, x)]
    if isinstance(M, OwnUnits):
        return own_units.advance(step, params, carry, x, M, own_units.entries_of(sums))
    _, F = jacobians(step, params, carry, x)
    sizes = [leaf.size for leaf in jax.tree.leaves(carry)]
    starts = np.cumsum([0, *sizes])

    def moved(leaf, new):
        old, new = flat(leaf), flat(new)
        for k, found in enumerate(sums):
            for term in found.terms:
                source = term.source.reshape(-1)
                to, of = np.flatnonzero(source >= 0), source[source >= 0]
                part = term.after.reshape(-1)[to, None].astype(old.dtype) * old[starts[term.leaf] + of]
                new = new.at[starts[k] + to].add(part)
        return new.reshape(leaf.shape)

    return jax.tree.map(moved, M, F)
