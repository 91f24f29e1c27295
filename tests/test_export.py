"""Weights in files: read back by numpy and by safetensors, every one of them, bit for bit."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import jaxbptt as bptt
from jaxbptt import models, words

LSTM = ("W_xh", "W_hh", "b")
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
