"""Readers give what is in the file, and refuse the rest in one line that says what and where."""

import importlib.util

import numpy as np
import pytest

from jaxbptt import tasks


def test_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("banana é")
    series = tasks.read_text(path)
    assert series.symbols == (" ", "a", "b", "n", "é")
    assert series.features == 5
    assert "".join(series.symbols[i] for i in series.values) == "banana é"
    batch = tasks.next_step(series, steps=3, batch=2)
    assert batch.loss == "cross_entropy"
    assert batch.xs.shape == (3, 2, 5)
    inputs = ["".join(series.symbols[i] for i in row) for row in batch.xs.argmax(-1).T]
    targets = ["".join(series.symbols[i] for i in row) for row in batch.targets.T]
    assert inputs == ["ban", "na "]
    assert targets == ["ana", "a é"]


def test_a_byte_order_mark_is_no_character(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffañ\ufeff".encode())
    series, text = tasks.read_text(tmp_path / "a.txt"), tasks.map_text(tmp_path / "a.txt")
    assert "".join(series.symbols[i] for i in series.values) == "añ\ufeff"
    assert bytes(text.values).decode() == text.decode(text.encode(text.values)) == "añ\ufeff"
    assert text.characters == 3
    (tmp_path / "a.txt").write_bytes("\ufeff".encode())
    with pytest.raises(tasks.InputError, match=r"a\.txt is empty\."):
        tasks.map_text(tmp_path / "a.txt")


def test_half_characters_at_the_ends_are_left_out(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(whole := "𝄞né€".encode())
    text = tasks.map_text(path)
    read = lambda raw: text.decode(text.encode(np.frombuffer(raw, np.uint8)))
    for cut in (1, 2, 3):
        assert read(whole[cut:]) == "né€"
    for cut in (1, 2):
        assert read(whole[:-cut]) == "𝄞né"
    assert read(whole[:3]) == read(whole[1:4]) == ""
    assert read(whole[:2] + whole[4:]) == "\ufffdné€"


@pytest.mark.parametrize(
    ("raw", "characters"),
    [
        (b"abc", 3),
        ("aé€𝄞".encode(), 4),
        ("aé€𝄞".encode()[:-1], 4),
        ("𝄞aé€".encode()[1:], 3),
        ("aé€".encode() + b"\x80", None),
        ("a \x93b\x94 é".encode("latin-1"), None),
        (bytes(range(256)), None),
        (b"\x80\x80\x80\x80", None),
        (b"\xed\xa0\x80", None),
    ],
)
def test_characters_of_a_text_that_is_not_utf8_are_its_bytes(tmp_path, monkeypatch, raw, characters):
    (tmp_path / "a.txt").write_bytes(raw)
    for block in (2**22, 2):  # blocks may end within a character
        monkeypatch.setattr("jaxbptt.tasks.mapped.BLOCK_BYTES", block)
        text = tasks.map_text(tmp_path / "a.txt")
        assert text.utf8 == (characters is not None)
        assert text.characters == (characters or len(raw))


def test_rare_symbols_become_one(tmp_path):
    path = tmp_path / "many.txt"
    text = "".join(chr(0x4E00 + i) for i in range(400)) + "aaaa"
    path.write_text(text, encoding="utf-8")
    series = tasks.read_text(path)
    assert len(series.symbols) == 256
    assert series.symbols[series.values[-1]] == "a"
    assert np.sum(series.values == series.symbols.index("\ufffd")) == 401 - 255


def test_standard_library():
    series = tasks.read_standard_library()
    assert len(series.values) > 100_000
    assert "".join(series.symbols[i] for i in series.values[:2000]).count("decimal") > 0


@pytest.mark.parametrize("header", ["", "time,price\n", "\ufefftime,price\n"])
def test_csv(tmp_path, header):
    path = tmp_path / "a.csv"
    path.write_text(header + "1,5\n2,5\n\n3,5\n", encoding="utf-8")
    series = tasks.read_csv(path, delimiter=",")
    np.testing.assert_allclose(series.values, [[-(1.5**0.5), 0], [0, 0], [1.5**0.5, 0]])
    batch = tasks.next_step(series, steps=2, batch=1)
    assert batch.loss == "mean_squared_error"
    np.testing.assert_array_equal(batch.targets[0], batch.xs[1])


def test_npz(tmp_path):
    np.savez(tmp_path / "a.npz", anything=np.arange(5))
    assert tasks.read_npz(tmp_path / "a.npz").values.shape == (5, 1)
    np.savez(tmp_path / "b.npz", xs=np.arange(10.0).reshape(5, 2), other=np.ones(3))
    assert tasks.read_npz(tmp_path / "b.npz").values.shape == (5, 2)
    np.save(tmp_path / "c.npy", np.arange(10.0).reshape(5, 2))
    np.testing.assert_array_equal(tasks.read_npz(tmp_path / "c.npy").values, tasks.read_npz(tmp_path / "b.npz").values)


def npz(**arrays):
    def write(path):
        np.savez(path.with_suffix(".npz"), **arrays)
        path.with_suffix(".npz").rename(path)

    return write


def npy(array):
    def write(path):
        np.save(path.with_suffix(".npy"), array)
        path.with_suffix(".npy").rename(path)

    return write


BAD = {
    "no such file": (tasks.read_text, None, r"file can't be read: No such file or directory\."),
    "folder": (tasks.read_text, lambda path: path.mkdir(), r"file can't be read: Is a directory\."),
    "empty": (tasks.read_text, b"", r"file is empty\."),
    "not UTF-8": (tasks.read_text, b"ab\nc\xff", r"file is not UTF-8 text: byte 4 \(line 2\) is 0xff\."),
    "csv not UTF-8": (tasks.read_csv, b"1,\xff", r"file is not UTF-8 text: byte 2 \(line 1\) is 0xff\."),
    "csv with names only": (tasks.read_csv, b"a,b\n", r"file has no rows of numbers\."),
    "csv with text": (
        tasks.read_csv,
        b"a,b\n1,2\n3,x y\n",
        r"file, line 3, column 2 \(b\): 'x y' is not a finite number",
    ),
    "csv with nan": (tasks.read_csv, b"1,2\nnan,2\n", r"file, line 2, column 1: the cell is missing\."),
    "csv with a missing cell": (tasks.read_csv, b"1,2\n3, \n", r"file, line 2, column 2: the cell is missing\."),
    "csv that begins with nan": (
        tasks.read_csv,
        b"nan,inf\n1,2\n",
        r"file, line 1, column 2: 'inf' is not a finite number",
    ),
    "csv with an open quote": (
        tasks.read_csv,
        b'1,"' + b"x" * 200_000,
        r"file, line 1: a quote \(\"\) is opened and not closed\.",
    ),
    "csv of one column": (tasks.read_csv, b"1\n2,3\n", r"file, line 2: '2,3' may be 2 cells or one number\."),
    "a mark only": (tasks.read_text, b"\xef\xbb\xbf", r"file is empty\."),
    "a mark, not UTF-8": (tasks.read_text, b"\xef\xbb\xbfab\nc\xff", r"byte 7 \(line 2\) is 0xff\."),
    "csv with a mark only": (tasks.read_csv, b"\xef\xbb\xbf", r"file is empty\."),
    "ragged csv": (tasks.read_csv, b"a,b\n1,2\n3\n", r"file, line 3: 1 cell, but 2 columns\."),
    "npz of bytes": (tasks.read_npz, b"PK\x03\x04 broken", r"file is not a readable \.npz file of plain arrays: "),
    "an array of strings": (
        tasks.read_npz,
        npy(np.array(["x"])),
        r"file: the array is <U1 of shape \(1,\), but real numbers",
    ),
    "several arrays": (
        tasks.read_npz,
        npz(a=np.ones(3), b=np.ones(3)),
        r"file holds \['a', 'b'\]: name the array .* 'xs'",
    ),
    "cube": (tasks.read_npz, npz(a=np.ones((2, 2, 2))), r"array 'a' is float64 of shape \(2, 2, 2\), but real numbers"),
    "strings": (tasks.read_npz, npz(a=np.array(["x"])), r"array 'a' is <U1 of shape \(1,\), but real numbers"),
    "objects": (tasks.read_npz, npz(a=np.array([{}])), r"file is not a readable \.npz file of plain arrays: .*pickle"),
    "no entries": (tasks.read_npz, npz(a=np.ones((0, 2))), r"array 'a' is empty, its shape is \(0, 2\)\."),
    "infinite": (
        tasks.read_npz,
        npz(a=np.array([[1, 2], [3, np.inf]])),
        r"array 'a' is inf at \[time, feature\] = \[1, 1\]",
    ),
}


@pytest.mark.parametrize(("read", "content", "message"), BAD.values(), ids=BAD)
def test_bad_input(tmp_path, read, content, message):
    path = tmp_path / "file"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        content(path)
    with pytest.raises(tasks.InputError, match=message) as error:
        read(path)
    assert "\n" not in error.value.args[0]


def test_too_short(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcde")
    with pytest.raises(tasks.InputError, match=r"a\.txt has 5 time steps, but steps=5 needs 6, .*at most --steps 4"):
        tasks.next_step(tasks.read_text(path), steps=5, batch=1)
    assert tasks.next_step(tasks.read_text(path), steps=4, batch=3).xs.shape == (4, 3, 5)


def test_no_source_of_the_standard_library(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(tasks.InputError, match="pass a text of your own with --text"):
        tasks.read_standard_library()


def test_huge_numbers_do_not_overflow(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("1e200\n-1e200\n")
    np.testing.assert_allclose(tasks.read_csv(path).values, [[1], [-1]])
