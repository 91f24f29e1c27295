r"""SnAp: the influence of each weight on the entries of the carry that it can reach in a few steps."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.arrays import check_count
from jaxbptt.influences import dense, own_units
from jaxbptt.influences.influence import Influence
from jaxbptt.influences.own_units import OwnUnits
from jaxbptt.influences.state import jacobians
from jaxbptt.programs.pattern import patterns, reached_entries


def snap(order: int) -> Influence:
    r"""The sparse n-step approximation: dcₜ/dθ where `order` steps can have led to, zero elsewhere.

    Mₜ = Pₙ ⊙ (Jₜ Mₜ₋₁ + Fₜ),  P₁ = pattern(F),  Pₙ = pattern(J) Pₙ₋₁ ∪ P₁

    Biased where the pattern is not full: what a weight does to other units is lost, once they are further than `order` steps
    away. For a dense layer `snap(1)` keeps what each weight does to its own unit, in time and memory O(p) a step and row, and
    `snap(2)` is `rtrl`; what lies between shows where W_hh is sparse. Where no unit reads another, as in `lru` and `min_gru`,
    any order is exact, as `rtrl` is. Otherwise M has leaves `[n, *leaf]`, and a step takes as long as one of `rtrl`.

    The pattern is that of the step as a program, found when it is traced: constants that the step closes over keep their zeros,
    as those of a mask that W_hh is multiplied by, and permutations of units are followed. It depends on no param, carry or x.

    Args:
        order: n, in time steps.

    Returns:
        An `Influence`.

    Raises:
        ValueError: an order below 1.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell = bptt.gru(3, 4)
        >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (20, 3))
        >>> def loss(params, order):
        ...     influence = bptt.influences.snap(order)
        ...     return jax.numpy.mean(bptt.forward_scan(cell, params, cell.initial_carry(), xs, influence=influence)[1] ** 2)
        >>> biased, exact = (jax.grad(loss)(params, order).W_hh for order in (1, 2))
        >>> bool(jax.numpy.vdot(biased, exact) > 0.9 * jax.numpy.linalg.norm(biased) * jax.numpy.linalg.norm(exact))
        True

    References:
        Menick, Elsen, Evci, Osindero, Simonyan and Graves, A practical sparse approximation for real time recurrent learning,
        2020, arXiv:2006.07232.
    """
    check_count("order", order, "it is the number of steps in which a weight leads to what is kept")
    return Influence(_initialise(order), _advance, _pull)


class _Mask(NamedTuple):
    """Flags, packed, as something that can be hashed."""

    shape: tuple[int, ...]
    bits: bytes

    @classmethod
    def of(cls, flags: np.ndarray) -> "_Mask":
        return cls(flags.shape, np.packbits(flags).tobytes())

    @property
    def flags(self) -> np.ndarray:
        bits = np.unpackbits(np.frombuffer(self.bits, np.uint8), count=int(np.prod(self.shape)))
        return bits.astype(bool).reshape(self.shape)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Masked:
    """An influence `[n, *leaf]`, with zeros where its mask has none."""

    values: Any
    masks: tuple[_Mask | None, ...] = field(metadata={"static": True})


def _initialise(order: int) -> Any:
    def init(step, params, carry, x):
        of_params, of_carry = reached_entries(step, params, carry, x)
        layout = own_units.layout_of(params, carry, of_params, of_carry)
        if layout is None and order == 1:
            layout = own_units.layout_of(params, carry, of_params)
        if layout is not None:
            return own_units.init(layout, params, carry)
        values = dense.init(params, carry)
        masks = [None if flags.all() else _Mask.of(flags) for flags in kept(order, *patterns(step, params, carry, x))]
        return _Masked(values, tuple(masks))

    return init


def kept(order: int, F: list[np.ndarray], J: np.ndarray) -> list[np.ndarray]:
    """Where each weight leads to in so many steps."""
    reached, J = F, J.astype(np.float32)
    for _ in range(order - 1):
        further = [(J @ flags.reshape(len(J), -1) > 0).reshape(flags.shape) | flags for flags in reached]
        if all((a == b).all() for a, b in zip(reached, further, strict=True)):
            break
        reached = further
    return reached


def _advance(step: Any, params: Any, carry: Any, x: Any, M: Any, key: Any) -> Any:
    if isinstance(M, OwnUnits):
        between = own_units.jacobian_between(step, params, carry, x)
        return own_units.advance(step, params, carry, x, M, between)
    values = dense.advance(M.values, *jacobians(step, params, carry, x))
    leaves, treedef = jax.tree.flatten(values)
    masked = [
        leaf if mask is None else jnp.where(mask.flags, leaf, 0) for leaf, mask in zip(leaves, M.masks, strict=True)
    ]
    return _Masked(treedef.unflatten(masked), M.masks)


def _pull(M: Any, carry_bar: Any) -> Any:
    return own_units.pull(M.values if isinstance(M, _Masked) else M, carry_bar)
