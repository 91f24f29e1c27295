r"""Two cells over one sequence, one from its first step on and one from its last step back."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt.arrays import check_callable, check_key
from jaxbptt.cells.cell import Cell
from jaxbptt.scans.adjoint import adjoint_scan
from jaxbptt.scans.flags import ends_of_sequences


class Directions(NamedTuple):
    """Params or carries of a `bidirectional` layer: those of the cell that runs forward, and of the one that runs back."""

    forward: Any
    backward: Any


class Bidirectional(NamedTuple):
    """A bidirectional layer as pure functions.

    Attributes:
        init: `(key) -> Directions` of params.
        initial_carry: `(batch_shape=()) -> Directions` of carries of zeros.
        apply: `(params, carry, xs, *, scan=adjoint_scan, is_first=None, valid=None) -> (carry, ys)`.
    """

    init: Callable[..., Directions]
    initial_carry: Callable[..., Directions]
    apply: Callable[..., tuple[Directions, Any]]


def bidirectional(forward: Cell, backward: Cell) -> Bidirectional:
    r"""A layer whose output at each step has read the whole sequence: what came before it, and what comes after it.

    cₜ, uₜ = forward(θ, cₜ₋₁, xₜ),  dₜ₋₁, vₜ = backward(φ, dₜ, xₜ),  yₜ = (uₜ, vₜ)

    Each direction is one call of the strategy, the second with `reverse=True`. Costs what the two cost.

    Rows of unequal length: `valid` says which steps are there. The carry is held over padding, so each row is read
    back from its own last valid step; this equals torch's packed sequences, and padding may stand anywhere. Where a row has
    several sequences, `is_first` says where they begin in time; the backward direction begins each of them at its end.
    Pass both to `apply`: an `is_first` in the options of `scan` would go to both directions as it is. A sequence has to
    be there as a whole: one that goes on in another chunk, as in `tbptt`, has no end to begin at.

    For more layers, let each read what the one below it gives:

        for layer, p, c in zip(layers, params, carries):
            c, xs = layer.apply(p, c, xs, valid=valid)

    Args:
        forward: a `Cell` whose output is an array `[*batch, features]`, or a pytree of them.
        backward: another, that reads the same inputs; its outputs have the structure of those of `forward`.

    Returns:
        A `Bidirectional`. `apply(params, carry, xs, *, scan=adjoint_scan, is_first=None, valid=None)` takes inputs
        `[time, *batch, features]` and flags `[time, *batch]`. It returns the carry of `forward` after the last step and that
        of `backward` after the first one, and outputs `[time, *batch, features of both]`, those of `forward` in front.

    Raises:
        TypeError: no `Cell`; from `apply`, params or a carry that are not `Directions`, outputs of another structure, and
            what the strategy raises; `cudnn_scan` takes no `reverse`.
        ValueError: from `apply`, what the strategy raises.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> layer = bptt.bidirectional(bptt.lstm(3, 8), bptt.lstm(3, 8))
        >>> params, xs = layer.init(jax.random.key(0)), jnp.ones((10, 2, 3))
        >>> valid = bptt.valid_from_lengths([10, 6], 10)
        >>> carry, ys = layer.apply(params, layer.initial_carry((2,)), xs, valid=valid)
        >>> ys.shape, carry.backward.h.shape
        ((10, 2, 16), (2, 8))

    References:
        Schuster and Paliwal, Bidirectional recurrent neural networks, 1997, doi:10.1109/78.650093.
    """
    for name, cell in (("forward", forward), ("backward", backward)):
        if not isinstance(cell, Cell):
            raise TypeError(
                f"{name} is a {type(cell).__name__}, but a Cell is expected: pass lstm(...), stack(...), or your own Cell."
            )

    def init(key: Any) -> Directions:
        check_key(key)
        return Directions(*(cell.init(k) for cell, k in zip((forward, backward), jax.random.split(key), strict=True)))

    def initial_carry(batch_shape: tuple[int, ...] = ()) -> Directions:
        return Directions(forward.initial_carry(batch_shape), backward.initial_carry(batch_shape))

    def apply(
        params: Directions,
        carry: Directions,
        xs: Any,
        *,
        scan: Callable[..., Any] = adjoint_scan,
        is_first: Any = None,
        valid: Any = None,
    ) -> tuple[Directions, Any]:
        check_callable("scan", scan, "adjoint_scan, or another strategy")
        params, carry = _both("params", params), _both("carry", carry)
        flags = {"is_first": is_first, "valid": valid}
        # What is not given is left to the options of a functools.partial.
        flags = {name: flag for name, flag in flags.items() if flag is not None}
        last, ys = scan(forward, params.forward, carry.forward, xs, **flags)
        if is_first is not None:
            flags["is_first"] = ends_of_sequences(is_first, valid)
        first, ys_back = scan(backward, params.backward, carry.backward, xs, reverse=True, **flags)
        if jax.tree.structure(ys) != jax.tree.structure(ys_back):
            raise TypeError(
                f"The outputs of forward have structure {jax.tree.structure(ys)}, and those of backward "
                f"{jax.tree.structure(ys_back)}: to be joined they must have the same."
            )
        return Directions(last, first), jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=-1), ys, ys_back)

    return Bidirectional(init, initial_carry, apply)


def _both(name: str, pair: Any) -> Directions:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        raise TypeError(
            f"{name} is a {type(pair).__name__}, but one entry for each direction is expected: pass "
            "Directions(forward, backward), as init(key) and initial_carry(batch_shape) make them."
        )
    return Directions(*pair)
