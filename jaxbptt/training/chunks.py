r"""Chunks, which `tbptt` takes one per update, and streams of them.

Row i of a chunk continues row i of the chunk before. A stream gives the chunk at any position, so to resume it only the
position has to be saved.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool

from jaxbptt.arrays import as_array, check_count
from jaxbptt.trees import is_key
from jaxbptt.words import counted


class Chunk(NamedTuple):
    """Consecutive time steps of a batch of sequences; leaves are `[time, batch, ...]`.

    Attributes:
        xs: inputs.
        targets: what the loss compares the outputs with.
        mask: booleans `[time, batch]`, True where a step counts in the loss. `None`: all do.
        is_first: booleans `[time, batch]`, True where a new sequence begins: the row's carry is reset before that step.
            `None`: all rows continue from the chunk before.
        valid: booleans `[time, batch]`, False where a step is padding: it is skipped, the carry is held, and it does not
            count in the loss, whatever the mask says. `None`: no step is padding.
    """

    xs: Any
    targets: Any = None
    mask: Any = None
    is_first: Any = None
    valid: Any = None


@dataclass(frozen=True)
class Stream:
    """Chunks by position, epoch after epoch; all of one shape, so that a function of them is traced once.

    Attributes:
        read: `(epoch, index) -> Chunk` of numpy arrays.
        chunks: how many there are in an epoch.
    """

    read: Callable[[int, int], Chunk]
    chunks: int

    def __len__(self) -> int:
        """Chunks in an epoch."""
        return self.chunks

    def __iter__(self) -> Iterator[Chunk]:
        """The first epoch."""
        return (self.at(position) for position in range(self.chunks))

    def at(self, position: int) -> Chunk:
        """The chunk at a position, counted from 0 through all epochs."""
        return self.read(*divmod(int(position), self.chunks))

    def start(self, position: int = 0) -> "StreamIterator":
        """All chunks from a position on, without end."""
        return StreamIterator(self, int(position))


@dataclass
class StreamIterator:
    """An iterator over a stream; `position` is that of the next chunk, and all that has to be saved."""

    stream: Stream
    position: int

    def __iter__(self) -> "StreamIterator":
        """Itself."""
        return self

    def __next__(self) -> Chunk:
        """The next chunk."""
        chunk = self.stream.at(self.position)
        self.position += 1
        return chunk


def is_first_from_done(done: Bool[ArrayLike, " time *batch"], *, first: Any = True) -> Bool[Array, " time *batch"]:
    r"""Where sequences begin, from where the ones before them end: one step later.

    is_firstₜ = doneₜ₋₁

    Most environments return `done` for the transition of step t. The observation of step t + 1 is then the first of a new
    episode, and the carry is reset before it is read.

    Args:
        done: booleans `[time, *batch]`, True at the last step of an episode.
        first: `done` of the step before the first one here, `[*batch]`; True where a rollout starts.

    Returns:
        Booleans `[time, *batch]`.

    Raises:
        TypeError: `done` is not boolean.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbptt import streams
        >>> print(streams.is_first_from_done(jnp.array([False, True, False])))
        [ True False  True]
    """
    done = as_array("done", done, "[time, *batch] of booleans")
    if done.dtype != jnp.bool_:
        raise TypeError(f"done has dtype {done.dtype}, but True and False are expected: pass done.astype(bool).")
    if not done.ndim:
        raise ValueError("done has shape (), but time is its first axis: pass booleans [time, *batch].")
    first = as_array("first", first, f"{done.shape[1:]} of booleans")
    if first.dtype != jnp.bool_ or first.shape not in ((), done.shape[1:]):
        raise ValueError(
            f"first is {first.dtype}{list(first.shape)}, but booleans of shape {done.shape[1:]} are expected, or True or "
            "False."
        )
    before = jnp.broadcast_to(first, done.shape[1:])[None]
    return jnp.concatenate([before, done])[: len(done)]


def pad(chunk: Chunk, length: int) -> Chunk:
    r"""A chunk padded to a length with steps that are not valid, for a last chunk that is shorter than the others.

    Args:
        chunk: leaves `[time, batch, ...]`.
        length: time steps, at least as many as the chunk has.

    Returns:
        A `Chunk` with leaves `[length, batch, ...]` and all flags; the padding is zeros, for random keys the last entry.

    Raises:
        ValueError: `length` is shorter than the chunk, or a leaf has no batch axis.
        TypeError: not a `Chunk`.

    Example:
        >>> import jax.numpy as jnp
        >>> from jaxbptt import streams
        >>> chunk = streams.pad(streams.Chunk(xs=jnp.ones((2, 1))), 3)
        >>> print(chunk.xs.T, chunk.valid.T, chunk.is_first.T)
        [[1. 1. 0.]] [[ True  True False]] [[False False False]]
    """
    if not isinstance(chunk, Chunk):
        raise TypeError(f"pad takes a Chunk(xs, targets, ...), but got a {type(chunk).__name__}.")
    steps, batch = _time_and_batch(chunk)
    meaning = f"the chunk has {counted(steps, 'time step')}"
    check_count("length", length, meaning, least=steps, way_out="cut it, or pad to more")

    def extended(leaf):
        leaf = jnp.asarray(leaf)
        if is_key(leaf):
            return leaf[jnp.minimum(jnp.arange(length), steps - 1)]
        return jnp.pad(leaf, [(0, length - steps)] + [(0, 0)] * (leaf.ndim - 1))

    mask, valid = (jnp.ones((steps, batch), bool) if flag is None else flag for flag in (chunk.mask, chunk.valid))
    is_first = jnp.zeros((steps, batch), bool) if chunk.is_first is None else chunk.is_first
    return jax.tree.map(extended, Chunk(chunk.xs, chunk.targets, mask, is_first, valid))


def _time_and_batch(chunk: Chunk) -> tuple[int, int]:
    shapes = {jnp.shape(leaf)[:2] for leaf in jax.tree.leaves(chunk)}
    shape = next(iter(shapes), ())
    if len(shapes) != 1 or len(shape) != 2:
        raise ValueError(
            f"The chunk's leaves begin with the axes {sorted(shapes)}, but [time, batch] must be the same."
        )
    return shape[0], shape[1]
