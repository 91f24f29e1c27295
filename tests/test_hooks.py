"""Hooks: what tensorboardX writes is read back from the file, and what a command line names is found or refused."""

import importlib
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxbptt import tasks, words
from jaxbptt.training import hooks

ROWS = [
    {"update": 5, "loss": 2.5, "gradient_norm": np.float32(0.125)},
    {"update": 6, "loss": 2.25, "gradient_norm": 8.0, "validation_loss": 3.0},
]


def events(file):
    """The events of a TensorBoard file: each is its length, a checksum, the event, a checksum."""
    event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
    content, found = file.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        found.append(event_pb2.Event.FromString(content[12 : 12 + length]))
        content = content[12 + length + 4 :]
    return found


def scalars(file):
    return [(one.step, value.tag, value.simple_value) for one in events(file) for value in one.summary.value]


def test_tensorboard_files_hold_the_numbers(tmp_path):
    folder = tmp_path / "runs" / "one"
    with hooks.tensorboard(folder) as on_update:
        assert list(folder.iterdir()) == []
        for row in ROWS:
            on_update(row)
    (file,) = folder.glob("events.out.tfevents.*")
    expected = [(row["update"], key, value) for row in ROWS for key, value in row.items() if key != "update"]
    assert scalars(file) == expected
    # Where a resumed run starts, so that TensorBoard hides the updates that it does again.
    assert [one.step for one in events(file) if one.HasField("session_log")] == [5]
    hooks.close(on_update)  # closed already
    on_update(ROWS[1])
    hooks.close(on_update)
    assert [scalars(one) for one in sorted(folder.iterdir())] == [expected, expected[2:]]
    hooks.close(print)  # has nothing to close


def test_nothing_is_lost_where_nobody_closes(tmp_path):
    code = (
        "import sys; from jaxbptt.training import hooks; hook = hooks.tensorboard(sys.argv[1]);"
        "[hook({'update': i, 'loss': i / 2}) for i in range(1, 51)]"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    (file,) = tmp_path.iterdir()
    assert scalars(file) == [(i, "loss", i / 2) for i in range(1, 51)]


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(tasks.InputError, match=r"file can't be written: File exists\."):
        hooks.tensorboard(tmp_path / "file")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(tasks.InputError, match=r"can't be written: it is read-only\."):
        hooks.tensorboard(tmp_path)


def test_without_tensorboardx(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(tasks.InputError) as error:
        hooks.tensorboard(tmp_path)
    assert str(error.value) == f"tensorboardX is not installed: {words.install_command('tensorboard')}"


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """A folder with modules of a user, in which an installed command runs: the folder is not on the path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    before = set(sys.modules)
    Path("my_hooks.py").write_text(
        "seen = []\ndef on_update(metrics): seen.append(metrics)\nclass Log: write = on_update\n"
    )
    Path("my_broken.py").write_text("import nowhere_at_all\n")
    Path("my_error.py").write_text("raise RuntimeError('no\\nkey')\n")
    yield
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


def test_a_hook_is_found_in_the_current_folder(modules):
    for name in ("my_hooks:on_update", "my_hooks:Log.write"):
        hooks.load_hook(name)(ROWS[0])
    assert sys.modules["my_hooks"].seen == [ROWS[0]] * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_hooks", r"'my_hooks' does not name a hook: write module:function, such as my_hooks:on_update\."),
        ("my_hooks:", r"'my_hooks:' does not name a hook"),
        ("my_hooks.py:f", r"there is no module my_hooks\.py, neither installed nor in /"),
        ("/my_hooks:f", r"'/my_hooks:f' does not name a hook"),
        ("nowhere.at:f", r"nowhere\.at:f: there is no module nowhere, neither installed nor in /"),
        ("my_broken:f", r"my_broken:f: my_broken can't be imported: ModuleNotFoundError: No module named 'nowhere_at"),
        ("my_error:f", r"my_error:f: my_error can't be imported: RuntimeError: no key$"),
        ("my_hooks:log", r"my_hooks:log: my_hooks has no log\."),
        ("my_hooks:seen", r"my_hooks:seen is a list, but a function of one dict of metrics is expected\."),
    ],
)
def test_hooks_that_cannot_be_loaded(modules, name, message):
    with pytest.raises(tasks.InputError, match=message) as error:
        hooks.load_hook(name)
    assert "\n" not in str(error.value)
