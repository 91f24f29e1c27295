"""Weights in files: read back by numpy and by safetensors, every one of them, bit for bit."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_models
from safetensors import safe_open
from safetensors.numpy import load_file

import jaxbptt as bptt
from jaxbptt import models, words
from jaxbptt.__main__ import main

LSTM = ("W_xh", "W_hh", "b")
KINDS = {
    "text": (test_models.TEXT, test_models.VOCABULARY),
    "numbers": (test_models.NUMBERS, None, test_models.COLUMNS),
}
MODEL = models.Architecture("lstm", 4, 2, 5, 5, text=True, embedding=3)


def weights_of(layers):
    cells = [bptt.lstm(3 if i == 0 else 4, 4) for i in range(layers)]
    return bptt.network(bptt.stack(*cells) if layers > 1 else cells[0], 2, bias=True).init(jax.random.key(0))


@pytest.mark.parametrize(
    ("params", "names"),
    [
        (lambda: weights_of(1), [*(f"cell.{one}" for one in LSTM), "W_hy", "b_y"]),
        (lambda: weights_of(2), [*(f"cell.{i}.{one}" for i in (0, 1) for one in LSTM), "W_hy", "b_y"]),
        (
            lambda: models.build(MODEL).init(jax.random.key(0)),
            [*(f"cell.{i}.{one}" for i in (0, 1) for one in LSTM), "W_hy", "b_y", "embedding"],
        ),
        (lambda: {"a": {"b": jnp.ones(2)}, "file": [1.0, None]}, ["a.b", "file.0"]),
        (lambda: jnp.ones(2), ["params"]),
    ],
    ids=["network", "layers", "model", "dicts", "array"],
)
def test_names(tmp_path, params, names):
    params = params()
    weights = models.named_weights(params)
    assert list(weights) == names
    for array, leaf in zip(weights.values(), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(array, leaf)
    models.save_weights(tmp_path / "w.npz", params)
    models.save_weights(tmp_path / "w.safetensors", params)
    for read in (np.load(tmp_path / "w.npz"), load_file(tmp_path / "w.safetensors")):
        assert set(read) == set(names)
        for name in names:
            np.testing.assert_array_equal(read[name], weights[name], strict=True)


def test_every_dtype(tmp_path):
    """As it is in safetensors; numpy has no bfloat16, of which float32 has every digit."""
    params = {
        dtype: jnp.arange(-3, 3).reshape(2, 3).astype(dtype) / 3
        for dtype in ("bfloat16", "float16", "float32", "float64")
    }
    params |= {"int32": jnp.arange(3, dtype=jnp.int32), "bool": np.True_, "turned": np.arange(6.0).reshape(2, 3).T}
    models.save_weights(tmp_path / "w.safetensors", params)
    models.save_weights(tmp_path / "w.npz", params)
    theirs, ours = load_file(tmp_path / "w.safetensors"), np.load(tmp_path / "w.npz")
    for name, array in params.items():
        np.testing.assert_array_equal(theirs[name], array)
        np.testing.assert_array_equal(ours[name], np.asarray(array, np.float32 if name == "bfloat16" else None))
        assert theirs[name].shape == ours[name].shape == array.shape
        assert (theirs[name].dtype, ours[name].dtype.name) == (array.dtype, name.replace("bfloat16", "float32")) or (
            name == "turned"
        )


def test_metadata(tmp_path):
    metadata = {"cell": "größe", "sizes": [1, 2]}
    for path in (tmp_path / "w.safetensors", tmp_path / "w.npz"):
        models.save_weights(path, {"w": np.ones(2)}, metadata)
    with safe_open(tmp_path / "w.safetensors", "np") as file:
        assert file.metadata() == {"cell": "größe", "sizes": "[1, 2]"}
    assert json.loads(str(np.load(tmp_path / "w.npz")["__metadata__"])) == metadata
    before = (tmp_path / "w.npz").read_bytes()
    models.save_weights(tmp_path / "w.npz", {"w": np.ones(2)}, metadata)
    assert (tmp_path / "w.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("params", "error", "message"),
    [
        ({}, ValueError, "There are no arrays in params: pass what init"),
        ({"w": {"key": jax.random.key(0)}}, TypeError, r"w\.key is a random key, but an array of numbers is expected"),
        ({"w": "text"}, TypeError, r"w is of dtype <U4, but an array of numbers is expected"),
        ({"a.b": 1.0, "a": {"b": 2.0}}, ValueError, r"Two arrays are named a\.b: rename one"),
    ],
)
def test_params_that_cannot_be_named(tmp_path, params, error, message):
    with pytest.raises(error, match=message):
        models.save_weights(tmp_path / "w.npz", params)
    assert list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_written(tmp_path, monkeypatch):
    params = {"w": np.ones(2)}
    with pytest.raises(ValueError, match=r"w\.pt ends in '\.pt': use \.safetensors or \.npz\."):
        models.save_weights(tmp_path / "w.pt", params)
    with pytest.raises(ValueError, match="An array is named __metadata__"):
        models.save_weights(tmp_path / "w.npz", {"__metadata__": np.ones(2)}, {"a": 1})
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError) as error:
        models.save_weights(tmp_path / "w.safetensors", params)
    assert str(error.value) == f"safetensors.numpy is not installed: {words.install_command('safetensors')}"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, described in KINDS.items():
        test_models.saved(folder / name, *described)
    return folder


@pytest.mark.parametrize("ending", ["npz", "safetensors"])
@pytest.mark.parametrize("kind", ["text", "numbers"])
def test_weights_are_exported(folders, capsys, tmp_path, kind, ending):
    file = tmp_path / f"w.{ending}"
    assert main(["export", str(folders / kind), "--output", str(file)]) == 0
    model = bptt.load(folders / kind)
    expected = models.named_weights(model.params)
    printed = capsys.readouterr()
    assert printed.err == ""
    *names, last = printed.out.splitlines()
    assert names == [f"{name} {list(array.shape)}" for name, array in expected.items()]
    assert last == f"{file}: {sum(array.size for array in expected.values()):,} numbers, after 3 updates"
    if ending == "npz":
        read = dict(np.load(file))
        metadata = json.loads(str(read.pop("__metadata__")))
    else:
        with safe_open(file, "np") as opened:
            read = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            metadata = {
                key: value if key == "written_by" else json.loads(value) for key, value in opened.metadata().items()
            }
    assert read.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(read[name], array, strict=True)
    assert metadata["written_by"].startswith(f"jaxbptt {bptt.__version__}, jax {jax.__version__}, Python ")
    assert metadata["updates"] == 3
    assert metadata["architecture"] == model.settings["architecture"]
    assert ("vocabulary" in metadata, "columns" in metadata) == (kind == "text", kind == "numbers")


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("w.pt", r"--output w\.pt ends in '\.pt': use \.safetensors or \.npz\."),
        ("nowhere/w.npz", r"--output nowhere/w\.npz can't be written: there is no folder nowhere"),
        (None, r"the following arguments are required: --output"),
    ],
)
def test_files_that_cannot_be_exported(folders, capsys, tmp_path, monkeypatch, output, message):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(["export", str(folders / "text"), *(["--output", output] if output else [])])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2
    assert re.match("jaxbptt export: " + message, error), error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
