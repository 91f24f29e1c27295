r"""Sequences too long, too many or too unequal for one array, cut into chunks of one shape.

An array is read only when a chunk needs it, and only there: a `numpy.memmap` is never in memory as a whole.
"""

import functools
from bisect import bisect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.arrays import as_numpy, check_callable, check_count
from jaxbptt.tasks.files import InputError
from jaxbptt.training.chunks import (
    Chunk as Chunk,
)
from jaxbptt.training.chunks import (
    Stream as Stream,
)
from jaxbptt.training.chunks import (
    is_first_from_done as is_first_from_done,
)
from jaxbptt.training.chunks import (
    pad as pad,
)
from jaxbptt.words import counted


def rows(
    values: Any,
    targets: Any = None,
    *,
    batch: int,
    chunk_length: int,
    overlap: int = 0,
    encode: Callable[[np.ndarray], np.ndarray] | None = None,
) -> Stream:
    r"""One long sequence, cut into contiguous rows that are read side by side.

    Row i has steps i R + 1 … (i + 1) R of N, R = ⌈N / batch⌉; chunk j has steps j C + 1 … (j + 1) C of each row.

    Nothing is dropped: the last rows may be shorter, and the last chunk is padded with steps that are not valid. Carries are
    reset at the start of an epoch, since row i then jumps back from its end to its beginning. Reading a chunk takes time
    and memory in proportion to its size.

    Args:
        values: `[time]` or `[time, features]`, integers, booleans or real numbers; an array or a `numpy.memmap`.
        targets: as long as `values`; by default the values one step later, and the last one is only a target.
        batch: rows.
        chunk_length: C, new time steps in a chunk.
        overlap: time steps at the end of a chunk that the next one begins with, for `tbptt` with a `truncation_length`
            above `update_every`.
        encode: maps consecutive `values` to what the network reads, such as `lambda bytes: table[bytes]`.

    Returns:
        A `Stream` of chunks with xs and targets `[overlap + C, batch, ...]`, mask, is_first and valid.

    Raises:
        ValueError: sizes below 1, more rows than steps, values that are not numbers, targets of another length.
        InputError: when a chunk is read that has missing values or values that are not finite, with their position.

    Example:
        >>> import numpy as np
        >>> from jaxbptt import streams
        >>> stream = streams.rows(np.arange(9), batch=2, chunk_length=3)
        >>> for chunk in stream:
        ...     print(chunk.xs.T.tolist(), chunk.targets.T.tolist(), chunk.mask.T.tolist())
        [[0, 1, 2], [4, 5, 6]] [[1, 2, 3], [5, 6, 7]] [[True, True, True], [True, True, True]]
        [[3, 0, 0], [7, 0, 0]] [[4, 0, 0], [8, 0, 0]] [[True, False, False], [True, False, False]]
    """
    _check_counts(batch=batch, chunk_length=chunk_length)
    check_count("overlap", overlap, "it counts time steps", least=0)
    if encode is not None:
        check_callable("encode", encode, "encode(values) -> what the network reads")
    values = _numbers("values", values)
    steps = len(values) - 1
    if targets is not None:
        targets = _numbers("targets", targets)
        steps = len(values)
        if len(targets) != steps:
            raise ValueError(
                f"targets have {counted(len(targets), 'time step')}, but values have {steps:,}: one target for each."
            )
    if steps < batch:
        raise ValueError(
            f"values have {counted(len(values), 'time step')}, too few for batch={batch} rows: use fewer rows."
        )
    row_length = -(-steps // batch)

    def read(epoch: int, index: int) -> Chunk:
        # `start`, `low` and `high` count steps of a row, `begin` steps of the whole sequence. The first chunk has no steps
        # before it to overlap with, so its `start` is negative and its first `overlap` steps are padding.
        start = index * chunk_length - overlap
        placed = []
        for row in range(batch):
            begin = row * row_length
            low = max(start, 0)
            high = min(start + overlap + chunk_length, row_length, steps - begin)
            if low >= high:
                continue
            if targets is None:
                # One step more, so that the last input has a target. Encoded once: inputs and targets are the same values.
                encoded = _finite("values", values, begin + low, begin + high + 1)
                encoded = encoded if encode is None else encode(encoded)
                x, y = encoded[:-1], encoded[1:]
            else:
                x = _finite("values", values, begin + low, begin + high)
                x = x if encode is None else encode(x)
                y = _finite("targets", targets, begin + low, begin + high)
            placed.append(_Placed(row, low - start, x, y, begins=low == 0))
        return _assemble(placed, overlap + chunk_length, batch)

    return Stream(read, -(-row_length // chunk_length))


def episodes(sequences: Sequence[tuple[Any, Any]], *, batch: int, chunk_length: int) -> Stream:
    r"""Sequences of different lengths, one after the other in each row, with `is_first` where one begins.

    Every episode is put whole into the row that is shortest so far; only the ends of the rows are padded. `padded` gives
    each sequence a row of its own.

    Args:
        sequences: episodes, pairs (xs, targets) of arrays `[time, ...]`, or trees of them; targets may be `None`.
        batch: rows.
        chunk_length: time steps in a chunk.

    Returns:
        A `Stream` of chunks with xs and targets `[chunk_length, batch, ...]`, mask, is_first and valid.

    Raises:
        ValueError: sizes below 1, no episodes, an empty one, one whose leaves disagree on time or with the others.
        InputError: when a chunk is read that has missing values or values that are not finite, with their position.

    Example:
        >>> import numpy as np
        >>> from jaxbptt import streams
        >>> long, short = np.array([1, 2, 3, 4, 5]), np.array([6, 7])
        >>> (chunk,) = streams.episodes([(long, long), (short, short), (short, short)], batch=2, chunk_length=5)
        >>> print(chunk.xs.T.tolist())
        [[1, 2, 3, 4, 5], [6, 7, 6, 7, 0]]
        >>> print(chunk.is_first.T.astype(int).tolist(), chunk.mask[:, 1].tolist())
        [[1, 0, 0, 0, 0], [1, 0, 1, 0, 0]] [True, True, True, True, False]
    """
    _check_counts(batch=batch, chunk_length=chunk_length)
    lengths, like = _lengths(sequences)
    row_lengths = [0] * batch
    episodes_of: list[list[tuple[int, int]]] = [[] for _ in range(batch)]  # for each row, (first step, episode)
    for number, length in enumerate(lengths):
        row = row_lengths.index(min(row_lengths))
        episodes_of[row].append((row_lengths[row], number))
        row_lengths[row] += length

    def read(epoch: int, index: int) -> Chunk:
        start = index * chunk_length
        placed = []
        for row, row_episodes in enumerate(episodes_of):
            # The first episode that can reach into the chunk is the last that begins at `start` or before; the pair
            # (start, len(lengths)) sorts right behind it.
            first = max(bisect(row_episodes, (start, len(lengths))) - 1, 0)
            for begin, number in row_episodes[first:]:
                if begin >= start + chunk_length:
                    break
                low = max(start, begin)
                high = min(start + chunk_length, begin + lengths[number])
                if low < high:
                    x, y = _read(f"sequences[{number}]", sequences[number], low - begin, high - begin)
                    placed.append(_Placed(row, low - start, x, y, begins=low == begin))
        return _assemble(placed, chunk_length, batch, like)

    return Stream(read, -(-max(row_lengths) // chunk_length))


def padded(sequences: Sequence[tuple[Any, Any]], *, batch: int, seed: int | None = None) -> Stream:
    r"""Whole sequences of different lengths side by side, each padded to the longest of all.

    Args:
        sequences: pairs (xs, targets) of arrays `[time, ...]`, or trees of them; targets may be `None`.
        batch: sequences in a chunk. If their number is not a multiple of it, the rows left over have no valid step.
        seed: shuffles the sequences again in every epoch, identically in every run; `None` keeps the order given.

    Returns:
        A `Stream` of chunks with xs and targets `[longest, batch, ...]`, mask, is_first and valid.

    Raises:
        ValueError: a batch below 1, no sequences, an empty one, one whose leaves disagree on time or with the others.
        InputError: when a chunk is read that has missing values or values that are not finite, with their position.

    Example:
        >>> import numpy as np
        >>> from jaxbptt import streams
        >>> long, short = np.array([1.0, 2.0, 3.0]), np.array([4.0])
        >>> (chunk,) = streams.padded([(long, None), (short, None)], batch=2)
        >>> print(chunk.xs.T.tolist(), chunk.mask.sum(axis=0).tolist())
        [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]] [3, 1]
    """
    _check_counts(batch=batch)
    lengths, like = _lengths(sequences)
    number_of_sequences, longest = len(lengths), max(lengths)

    @functools.lru_cache(maxsize=1)  # one permutation for all chunks of an epoch
    def order(epoch: int) -> np.ndarray:
        if seed is None:
            return np.arange(number_of_sequences)
        return np.random.default_rng([seed, epoch]).permutation(number_of_sequences)

    def read(epoch: int, index: int) -> Chunk:
        placed = []
        for row, place in enumerate(order(epoch)[index * batch : (index + 1) * batch]):
            number = int(place)
            x, y = _read(f"sequences[{number}]", sequences[number], 0, lengths[number])
            placed.append(_Placed(row, 0, x, y, begins=True))
        return _assemble(placed, longest, batch, like)

    return Stream(read, -(-number_of_sequences // batch))


class _Placed(NamedTuple):
    """Consecutive steps of one sequence, and where they stand in a chunk: in `row`, from time `at` on."""

    row: int
    at: int
    xs: Any
    targets: Any
    begins: bool


def _assemble(placed: list[_Placed], steps: int, batch: int, like: Any = None) -> Chunk:
    """The chunk, zeros where nothing is placed; its leaves look like those of `like`, or of the first entry."""
    valid, is_first = np.zeros((2, steps, batch), bool)

    def zeros(leaf):
        return np.zeros((steps, batch, *leaf.shape[1:]), leaf.dtype)

    chunk_xs, chunk_targets = jax.tree.map(zeros, like or (placed[0].xs, placed[0].targets))
    for row, at, xs, targets, begins in placed:

        def write(to, leaf, row=row, at=at):
            to[at : at + len(leaf), row] = leaf

        jax.tree.map(write, (chunk_xs, chunk_targets), (xs, targets))
        valid[at : at + len(jax.tree.leaves(xs)[0]), row] = True
        is_first[at, row] = begins
    return Chunk(chunk_xs, chunk_targets, mask=valid, is_first=is_first, valid=valid)


def _numbers(what: str, values: Any) -> Any:
    """An array of numbers over time. Not by `np.asarray`, which would drop the mask of a masked array."""
    values = values if isinstance(values, np.ndarray) else as_numpy(values)
    floating = jnp.issubdtype(values.dtype, jnp.floating)  # bfloat16 too, whose kind numpy calls V
    if (values.dtype.kind not in "biuf" and not floating) or values.dtype.itemsize > 8:
        raise ValueError(
            f"{what} are of dtype {values.dtype}, but integers, booleans or real numbers of at most 64 bits are expected: "
            "convert them."
        )
    if not values.ndim:
        raise ValueError(f"{what} have shape (), but time is their first axis: pass an array with one.")
    return values


def _finite(what: str, values: Any, low: int, high: int) -> np.ndarray:
    """values[low:high], or an error that says where the first number is missing or not finite."""
    array = values[low:high]
    bad = np.ma.getmaskarray(array) if np.ma.isMaskedArray(array) else np.zeros(array.shape, bool)
    array = _native(np.asarray(array))
    if jnp.issubdtype(array.dtype, jnp.floating):
        bad = bad | ~np.isfinite(array)
    if bad.any():
        place = np.argwhere(bad)[0]
        word = "missing" if np.isfinite(array[tuple(place)]) else str(array[tuple(place)])
        place[0] += low
        raise InputError(
            f"{what} {place.tolist()} is {word}: fill it in, or cut the sequence there, before it reaches the network."
        )
    return array


def _read(what: str, sequence: tuple[Any, Any], low: int, high: int) -> tuple[Any, Any]:
    """Steps `low` to `high` of a pair (xs, targets)."""

    def read_leaf(path, leaf):
        return _finite(what + jax.tree_util.keystr(path), _numbers(what, leaf), low, high)

    return jax.tree_util.tree_map_with_path(read_leaf, tuple(sequence))


def _lengths(sequences: Sequence[tuple[Any, Any]]) -> tuple[list[int], Any]:
    """Time steps of each, and the leaves of all, empty: shapes must agree, dtypes are promoted to a common one."""
    if not isinstance(sequences, Sequence) or not sequences:
        raise ValueError(
            f"There are no sequences in this {type(sequences).__name__}: pass a list of at least one pair (xs, targets)."
        )
    lengths, empties = [], []
    for number, sequence in enumerate(sequences):
        what = f"sequences[{number}]"
        if not isinstance(sequence, tuple | list) or len(sequence) != 2:
            raise ValueError(f"{what} is not a pair (xs, targets): pass (xs, None) where there are no targets.")
        leaves = jax.tree.leaves(tuple(sequence))
        if not jax.tree.leaves(sequence[0]) or not all(np.ndim(leaf) for leaf in leaves):
            raise ValueError(f"{what} has no xs, or a leaf without a time axis: pass arrays, not lists of numbers.")
        sizes = {np.shape(leaf)[0] for leaf in leaves}
        if len(sizes) != 1 or not min(sizes):
            raise ValueError(
                f"{what} has leaves of {sorted(sizes)} time steps, but they must have the same number, at least 1: cut or "
                "pad them, and leave out empty sequences."
            )
        lengths.append(sizes.pop())
        empties.append(jax.tree.map(lambda leaf, what=what: _native(_numbers(what, leaf)[:0]), tuple(sequence)))
        first, here = (jax.tree.map(lambda leaf: leaf.shape[1:], empty) for empty in (empties[0], empties[-1]))
        if first != here:
            raise ValueError(
                f"{what} has (xs, targets) of shapes {here} at a time step, but sequences[0] has {first}: make them the "
                "same."
            )
    return lengths, jax.tree.map(lambda *leaves: np.concatenate(leaves), *empties)


def _native(array: np.ndarray) -> np.ndarray:
    """In the machine's own byte order, the only one that JAX takes."""
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _check_counts(**counts: int) -> None:
    for name, value in counts.items():
        check_count(name, value, "it counts rows" if name == "batch" else "it counts time steps")
