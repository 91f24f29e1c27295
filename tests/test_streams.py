"""Chunks hold every step of the sequences once and in order; what is not a number is refused with its position."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxbptt as bptt
from jaxbptt import streams
from jaxbptt.tasks import InputError


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(
    steps=st.integers(2, 60),
    batch=st.integers(1, 7),
    length=st.integers(1, 9),
    overlap=st.integers(0, 12),
    data=st.data(),
)
def test_rows_continue_from_chunk_to_chunk(steps, batch, length, overlap, data):
    """The valid new steps of a row, chunk after chunk, are consecutive; the rows together are the whole series."""
    if steps - 1 < batch:
        return
    series = np.random.default_rng(0).standard_normal((steps, 2))
    stream = streams.rows(series, batch=batch, chunk_length=length, overlap=overlap)
    epoch = data.draw(st.integers(0, 2))
    xs, targets = [[] for _ in range(batch)], [[] for _ in range(batch)]
    for index in range(len(stream)):
        chunk = stream.at(epoch * len(stream) + index)
        assert chunk.xs.shape == chunk.targets.shape == (overlap + length, batch, 2)
        for row in range(batch):
            valid, so_far = np.flatnonzero(chunk.mask[:, row]), len(xs[row])
            before, new = valid[valid < overlap], valid[valid >= overlap]
            if len(new):  # what comes before is what the row had last
                np.testing.assert_array_equal(
                    chunk.xs[before, row], np.array(xs[row][so_far - len(before) :])[: len(before)].reshape(-1, 2)
                )
            xs[row].extend(chunk.xs[new, row])
            targets[row].extend(chunk.targets[new, row])
            begins = valid[:1] if so_far == len(before) else []
            np.testing.assert_array_equal(np.flatnonzero(chunk.is_first[:, row]), begins)
    np.testing.assert_array_equal(np.concatenate([np.array(row).reshape(-1, 2) for row in xs]), series[:-1])
    np.testing.assert_array_equal(np.concatenate([np.array(row).reshape(-1, 2) for row in targets]), series[1:])


def test_positions_count_through_epochs_and_can_be_resumed():
    stream = streams.rows(np.arange(14), batch=2, chunk_length=3)
    assert len(stream) == stream.chunks == len(list(stream)) == 3
    chunks = stream.start()
    first = [next(chunks) for _ in range(5)]
    resumed = stream.start(chunks.position)
    for a, b in zip(jax.tree.leaves((next(chunks), first[0])), jax.tree.leaves((next(resumed), first[3])), strict=True):
        np.testing.assert_array_equal(a, b)
    assert chunks.position == resumed.position == 6


def test_given_targets_and_encoding():
    letters = np.frombuffer(b"abcabc", np.uint8)
    chunk = streams.rows(letters, batch=1, chunk_length=5, encode=lambda letters: letters - ord("a")).at(0)
    assert chunk.xs[:, 0].tolist() == [0, 1, 2, 0, 1]
    assert chunk.targets[:, 0].tolist() == [1, 2, 0, 1, 2]
    chunk = streams.rows(
        letters, 2.0 * np.arange(6), batch=1, chunk_length=6, encode=lambda letters: letters - ord("a")
    ).at(0)
    assert chunk.xs[:, 0].tolist() == [0, 1, 2, 0, 1, 2]
    assert chunk.targets[:, 0].tolist() == [0, 2, 4, 6, 8, 10]


def test_a_file_is_read_only_where_it_is_needed(tmp_path):
    """Of 400 MB on disk, a chunk reads only its own steps; the array is never copied."""
    path = tmp_path / "long.npy"
    values = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(100_000_000, 1))
    values[-1] = values[50_000_000] = 1
    del values
    reads = []

    class Watched(np.memmap):
        def __getitem__(self, index):
            read = super().__getitem__(index)
            reads.append(read.size)
            return read

    mapped = np.load(path, mmap_mode="r").view(Watched)
    stream = streams.rows(mapped, batch=2, chunk_length=10)
    assert stream.at(0).xs[0].tolist() == [[0.0], [1.0]]
    assert stream.at(len(stream) - 1).targets[stream.at(len(stream) - 1).mask][-1] == 1
    assert max(reads) <= 11


def test_episodes_follow_each_other():
    rng = np.random.default_rng(0)
    lengths = [4, 1, 7, 3, 3, 2]
    data = [({"a": rng.standard_normal((n, 2)), "b": np.arange(n)}, rng.standard_normal(n)) for n in lengths]
    stream = streams.episodes(data, batch=2, chunk_length=4)
    chunks = [jax.tree.map(np.asarray, chunk) for chunk in stream]
    whole = jax.tree.map(lambda *leaves: np.concatenate(leaves), *chunks)
    found = []
    for row in range(2):
        begins = np.flatnonzero(whole.is_first[:, row])
        there = np.flatnonzero(whole.mask[:, row])
        assert begins[0] == 0
        assert (there == np.arange(len(there))).all(), "padding at the end only"
        for steps in np.split(there, begins[1:]):
            found.append((whole.xs["a"][steps, row], whole.xs["b"][steps, row], whole.targets[steps, row]))
    assert sorted(len(xs) for xs, *_ in found) == sorted(lengths)
    for (xs, targets), n in zip(data, lengths, strict=True):
        assert any(
            len(a) == n and (a == xs["a"]).all() and (b == np.arange(n)).all() and (t == targets).all()
            for a, b, t in found
        )


def test_sequences_of_several_dtypes_become_one():
    """No value is rounded to fit: halves stay halves, and the dtype is the same in every chunk."""
    data = [(np.array([1, 2, 3]), None), (np.array([0.5, 1.5, 2.5]), None), (np.array([9], ">i2"), None)]
    for stream in (streams.episodes(data, batch=1, chunk_length=3), streams.padded(data, batch=1)):
        chunks = list(stream)
        assert {chunk.xs.dtype for chunk in chunks} == {np.dtype(float)}
        assert [chunk.xs[chunk.valid].tolist() for chunk in chunks] == [[1, 2, 3], [0.5, 1.5, 2.5], [9]]
    big_endian = streams.rows(np.arange(9, dtype=">f4"), batch=1, chunk_length=8).at(0)
    assert jnp.asarray(big_endian.xs)[3, 0] == 3


def test_padded_sequences_in_any_order():
    data = [(np.full((n, 1), n), np.full(n, -n)) for n in (3, 1, 5, 2, 4)]
    stream = streams.padded(data, batch=2, seed=3)
    orders = []
    for epoch in range(3):
        seen = []
        for index in range(len(stream)):
            chunk = stream.at(epoch * len(stream) + index)
            assert chunk.xs.shape == (5, 2, 1)
            for row in range(2):
                n = chunk.mask[:, row].sum()
                assert (chunk.xs[:n, row] == n).all()
                assert (chunk.targets[:n, row] == -n).all()
                assert chunk.is_first[:, row].tolist() == [n > 0, False, False, False, False]
                seen.append(n)
        assert sorted(seen) == [0, 1, 2, 3, 4, 5]
        orders.append(tuple(seen))
    assert len(set(orders)) > 1
    again = streams.padded(data, batch=2, seed=3).at(len(stream) + 1)
    np.testing.assert_array_equal(again.xs, stream.at(len(stream) + 1).xs)
    kept = [chunk.mask.sum(axis=0).tolist() for chunk in streams.padded(data, batch=2)]
    assert kept == [[3, 1], [5, 2], [4, 0]]


def test_is_first_from_done():
    done = jnp.array([[False, True], [True, False], [False, False]])
    assert streams.is_first_from_done(done).tolist() == [[True, True], [False, True], [True, False]]
    went_on = streams.is_first_from_done(done, first=jnp.array([False, True]))
    assert went_on.tolist() == [[False, True], [False, True], [True, False]]
    assert jax.jit(streams.is_first_from_done)(done[:1]).tolist() == [[True, True]]
    with pytest.raises(TypeError, match=r"done has dtype .*pass done\.astype\(bool\)"):
        streams.is_first_from_done(done.astype(int))


def test_pad():
    keys = jax.random.split(jax.random.key(0), (2, 1))
    chunk = bptt.Chunk(
        {"x": jnp.ones((2, 1, 3)), "key": keys}, None, jnp.array([[False], [True]]), jnp.array([[True], [False]])
    )
    longer = streams.pad(chunk, 4)
    assert longer.xs["x"].sum(axis=-1).T.tolist() == [[3.0, 3.0, 0.0, 0.0]]
    assert longer.xs["key"].shape == (4, 1)
    assert longer.valid.T.tolist() == [[True, True, False, False]]
    assert longer.mask.T.tolist() == [[False, True, False, False]]
    assert longer.is_first.T.tolist() == [[True, False, False, False]]
    with pytest.raises(ValueError, match="length is 1, but the chunk has 2 time steps"):
        streams.pad(chunk, 1)
    with pytest.raises(ValueError, match=r"leaves begin with the axes .*\[time, batch\] must be the same"):
        streams.pad(bptt.Chunk(jnp.ones((2, 1)), jnp.ones((3, 1))), 4)


def test_missing_and_nonfinite_values_are_reported_with_their_position():
    series = np.ones((20, 2))
    series[15, 1] = np.nan
    stream = streams.rows(series, batch=2, chunk_length=3)
    stream.at(0)
    with pytest.raises(InputError, match=r"values \[15, 1\] is nan: fill it in, or cut"):
        [stream.at(i) for i in range(len(stream))]
    targets = np.ones(20)
    targets[4] = -np.inf
    with pytest.raises(InputError, match=r"targets \[4\] is -inf"):
        streams.rows(np.ones(20), targets, batch=1, chunk_length=20).at(0)
    masked = np.ma.masked_array(np.arange(6), np.arange(6) == 2)
    with pytest.raises(InputError, match=r"values \[2\] is missing"):
        streams.rows(masked, batch=1, chunk_length=5).at(0)
    with pytest.raises(InputError, match=r"sequences\[1\]\[0\]\['a'\] \[0\] is nan"):
        streams.episodes([({"a": np.ones(2)}, None), ({"a": np.array([np.nan])}, None)], batch=1, chunk_length=3).at(0)
    with pytest.raises(InputError, match=r"sequences\[0\]\[1\] \[1, 0\] is inf"):
        streams.padded([(np.ones(2), np.array([[0.0], [np.inf]]))], batch=1).at(0)


def test_errors():
    rows = partial(streams.rows, np.arange(10))
    pair = (np.ones(3), np.ones(3))
    for call, message in (
        (partial(rows, batch=0, chunk_length=2), "batch is 0, but it counts rows: pass a whole number"),
        (partial(rows, batch=2, chunk_length=True), "chunk_length is True"),
        (partial(rows, batch=2, chunk_length=2, overlap=-1), "overlap is -1"),
        (partial(rows, batch=10, chunk_length=2), "values have 10 time steps, too few for batch=10 rows"),
        (partial(rows, np.arange(9), batch=2, chunk_length=2), "targets have 9 time steps, but values have 10"),
        (partial(streams.rows, np.array(["a", "b"]), batch=1, chunk_length=1), "values are of dtype <U1"),
        (partial(streams.rows, np.array(1.0), batch=1, chunk_length=1), r"values have shape \(\)"),
        (partial(streams.episodes, [], batch=1, chunk_length=1), "There are no sequences"),
        (partial(streams.episodes, [pair, np.ones(3)], batch=1, chunk_length=1), r"sequences\[1\] is not a pair"),
        (
            partial(streams.padded, [(np.ones(3), np.ones(2))], batch=1),
            r"sequences\[0\] has leaves of \[2, 3\] time steps",
        ),
        (partial(streams.padded, [(np.ones(0), None)], batch=1), r"sequences\[0\] has leaves of \[0\] time steps"),
        (partial(streams.padded, [([1, 2], None)], batch=1), r"a leaf without a time axis: pass arrays, not lists"),
        (partial(streams.padded, [(None, np.ones(3))], batch=1), r"sequences\[0\] has no xs"),
        (
            partial(streams.padded, [pair, (np.ones((3, 1)), np.ones(3))], batch=2),
            r"sequences\[1\] has \(xs, targets\) of shapes \(\(1,\), \(\)\) at a time step, but sequences\[0\] has",
        ),
        (partial(rows, np.ones(10, np.longdouble), batch=1, chunk_length=1), "targets are of dtype float128"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
