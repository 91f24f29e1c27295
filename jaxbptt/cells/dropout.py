r"""Dropout with one mask for a whole sequence: a wrapper around a cell."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxbptt.array_types import sharded_like
from jaxbptt.arrays import as_array, check_key, is_number
from jaxbptt.cells import dense
from jaxbptt.cells.cell import Cell


class DropoutParams(NamedTuple):
    """Params of a cell with masks, True where an entry is kept: `x [*batch, input]`, `h [*batch, hidden]`, or `None`."""

    cell: Any
    x: Bool[Array, "*batch input"] | None = None
    h: Bool[Array, "*batch hidden"] | None = None


class Dropout(NamedTuple):
    r"""A cell that drops, and the masks that it drops by.

    Attributes:
        cell: the `Cell`, whose params are those of the cell inside, or `DropoutParams` of them. With the former nothing is
            dropped.
        draw: `(key, params, batch_shape=()) -> DropoutParams`.
    """

    cell: Cell
    draw: Callable[..., Any]


def dropout(cell: Cell, *, input_rate: float = 0.0, recurrent_rate: float = 0.0) -> Dropout:
    r"""Dropout with masks that are the same at every time step (variational dropout).

    yₜ, hₜ = step(θ, m_h ⊙ hₜ₋₁ / (1 − p_h), m_x ⊙ xₜ / (1 − p_x))  with  m ~ Bernoulli(1 − p), drawn once

    m_h is on what `W_hh` reads, and on nothing else: the memory of an `lstm`, and what a `gru` or a `rate` keeps of its
    state, stay as they are. Costs two elementwise products a step; the adjoint is derived.

    The masks are arguments, a part of the params: draw them inside the loss, from a new key for each update, and every
    strategy, also where it recomputes, takes the gradient under the same masks. Sequences that follow each other in a row of
    the batch (`is_first`) share its mask until the next draw. To evaluate, pass the params themselves.

    Args:
        cell: a built-in cell, with a `recurrent_rate` one that has a `W_hh`; of a `stack` wrap the layers.
        input_rate: p_x, the probability that an entry of x is dropped.
        recurrent_rate: p_h, the same for the state.

    Returns:
        `Dropout(cell, draw)`. Its `cell` has the same params and carry, and stands wherever a `Cell` does.

    Raises:
        ValueError: a rate outside [0, 1), a cell that is not built in.
        TypeError: no `Cell`.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell, draw = bptt.dropout(bptt.lstm(3, 5), input_rate=0.2, recurrent_rate=0.3)
        >>> params, carry, xs = cell.init(jax.random.key(0)), cell.initial_carry((2,)), jax.numpy.ones((7, 2, 3))
        >>> def loss(params, key):
        ...     _, ys = bptt.adjoint_scan(cell, draw(key, params, (2,)), carry, xs)
        ...     return (ys**2).mean()
        >>> jax.grad(loss)(params, jax.random.key(1)).W_hh.shape
        (20, 5)
        >>> carry_T, ys = bptt.scan(cell, params, carry, xs)  # nothing dropped

    References:
        Gal and Ghahramani, A theoretically grounded application of dropout in recurrent neural networks, 2016,
        arXiv:1512.05287.
    """
    if not isinstance(cell, Cell):
        raise TypeError(
            f"dropout wraps a Cell, but got a {type(cell).__name__}: pass a built-in cell, such as lstm(3, 5)."
        )
    sizes = getattr(cell.step, "sizes", None)
    for name, value in (("input_rate", input_rate), ("recurrent_rate", recurrent_rate)):
        if not is_number(value, -1, 1) or value < 0:
            raise ValueError(f"{name} is {value!r}, but it is a probability to drop: pass a number from 0 to below 1.")
    reads_state = "drop" in inspect.signature(cell.step).parameters
    if sizes is None or (recurrent_rate and not reads_state):
        raise ValueError(
            "dropout has to know where a step reads its state, and knows it for elman, gru, lstm and rate (for input_rate "
            "alone, any built-in cell): wrap the layers of a stack, stack(dropout(...).cell, ...), and let a step of your own "
            "multiply by a mask in its params."
        )

    def draw(key: Array, params: Any, batch_shape: tuple[int, ...] = ()) -> DropoutParams:
        check_key(key)
        dense.check_batch_shape(batch_shape)
        each = zip(jax.random.split(key), sizes, (input_rate, recurrent_rate), strict=True)
        return DropoutParams(
            params, *(jax.random.bernoulli(k, 1 - p, (*batch_shape, size)) if p else None for k, size, p in each)
        )

    def step(params, carry, x):
        if not isinstance(params, DropoutParams):
            return cell.step(params, carry, x)
        # The input of a `rate` with noise is a pair of x and a key.
        x, *key = x if isinstance(x, tuple) else (x,)
        x = _kept(params.x, "x", x, input_rate)

        def drop(h):
            return _kept(params.h, "the state", h, recurrent_rate)

        return cell.step(params.cell, carry, (x, *key) if key else x, **({"drop": drop} if reads_state else {}))

    step = dense.with_sizes(step, *sizes)
    return Dropout(Cell(cell.init, cell.initial_carry, step), draw)


def _kept(mask: Any, name: str, entries: Any, p: float) -> Any:
    """0 where dropped, and elsewhere the entry times 1/(1 − p), so that the mean is the same."""
    if mask is None:
        return entries
    entries = as_array(f"dropout: {name}", entries, "[*batch, features]")
    if mask.shape != entries.shape:
        raise ValueError(
            f"dropout: {name} has shape {entries.shape} at one time step, but its mask {mask.shape}: draw the "
            "masks with the batch axes of the carry, draw(key, params, batch_shape)."
        )
    scaled = entries / (1 - p)
    return jnp.where(sharded_like(mask, scaled), scaled, jnp.zeros_like(scaled))
