"""A checkpoint is restored bit for bit, or refused in one line."""

import json
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxbptt.training import checkpoints
from jaxbptt.training.checkpoints import CheckpointError, latest, restore, save

SETTINGS = {"hidden": 4, "data": "abc", "rate": 0.1}


def make(seed=0, width=3):
    """A state with one leaf of every kind that a run may have."""
    params = {"W": jax.random.normal(jax.random.key(seed), (2, width), jnp.float32), "b": jnp.zeros(0)}
    return {
        "params": params,
        "half": jnp.arange(5, dtype=jnp.bfloat16) + jnp.asarray(seed, jnp.bfloat16),
        "opt_state": optax.adam(0.1).init(params),
        "step": jnp.int32(seed),
        "key": jax.random.key(seed),
        "old": jax.random.key(seed, impl="rbg"),
        "host": np.array([seed, np.nan, -0.0]),
    }


def as_bytes(tree):
    numbers = jax.tree.map(
        lambda leaf: jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf, tree
    )
    return [
        (np.asarray(leaf).dtype, np.asarray(leaf).shape, np.asarray(leaf).tobytes())
        for leaf in jax.tree.leaves(numbers)
    ]


def one_line(error):
    return "\n" not in str(error.value)


def test_what_is_saved_is_restored_bit_for_bit(tmp_path):
    state = make(7)
    path = save(tmp_path / "run", 7, state, SETTINGS)
    again = restore(tmp_path / "run", make(0), SETTINGS)
    assert path.name == "step_00000007"
    assert as_bytes(again) == as_bytes(state)
    assert as_bytes(again) != as_bytes(make(0))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert jax.random.key_impl(again["old"]) == jax.random.key_impl(state["old"])
    np.testing.assert_array_equal(jax.random.bits(again["key"]), jax.random.bits(state["key"]))


def test_the_newest_are_kept(tmp_path):
    assert latest(tmp_path / "none") is None
    for step in (1, 2, 9, 10):
        save(tmp_path, step, make(step), SETTINGS, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000002", "step_00000009", "step_00000010"]
    assert latest(tmp_path) == 10
    assert int(restore(tmp_path, make(), SETTINGS)["step"]) == 10


def test_nothing_is_overwritten(tmp_path):
    save(tmp_path, 1, make(1), SETTINGS)
    with pytest.raises(CheckpointError, match=r"step_00000001 exists already: a checkpoint is never overwritten"):
        save(tmp_path, 1, make(2), SETTINGS)
    assert as_bytes(restore(tmp_path, make(), SETTINGS)) == as_bytes(make(1))


def test_an_older_step_has_to_be_asked_for(tmp_path):
    save(tmp_path, 9, {"w": jnp.ones(1)}, SETTINGS)
    with pytest.raises(CheckpointError, match=r"of step 9 already, .* not from step 3\. .*pass older=True"):
        save(tmp_path, 3, {"w": jnp.zeros(1)}, SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000009"]
    path = save(tmp_path, 3, {"w": jnp.zeros(1)}, SETTINGS, keep=1, older=True)
    assert path.is_dir()
    assert restore(tmp_path, {"w": jnp.zeros(1)}, SETTINGS)["w"] == 1


def donated():
    leaf = jnp.ones(2)
    leaf.delete()
    return leaf


@pytest.mark.parametrize(
    ("leaf", "words"),
    [
        (jnp.tanh, r"\['bad'\] is of type PjitFunction, but arrays of numbers are expected: leave it out"),
        (object(), r"\['bad'\] is of type object"),
        ("lstm", r"\['bad'\] is of type str"),
        (b"lstm", r"\['bad'\] is of type bytes"),
        (2**100, r"\['bad'\] is of type int"),
        (np.array(["lstm"]), r"\['bad'\] is an array of .U4"),
        (np.array([None]), r"\['bad'\] is an array of object"),
        (np.array("2026-01-01", "datetime64[D]"), r"\['bad'\] is an array of datetime64\[D\]"),
        (np.zeros(1, jax.dtypes.float0), r"\['bad'\] is an array of \[\('float0', 'V'\)\]"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), r"\['bad'\] is of type ShapeDtypeStruct"),
        (donated, r"\['bad'\] was donated or deleted: save what the update returned"),
    ],
)
def test_leaves_that_are_not_numeric_are_refused_before_a_file_is_touched(tmp_path, capfd, leaf, words):
    leaf = leaf() if leaf is donated else leaf
    with pytest.raises(CheckpointError, match=r"The state can't be saved: leaf " + words) as error:
        save(tmp_path / "run", 1, {"bad": leaf, "w": jnp.ones(2)}, SETTINGS)
    assert one_line(error)
    assert not (tmp_path / "run").exists()
    assert capfd.readouterr() == ("", "")


def test_a_state_without_numbers_and_a_traced_one(tmp_path):
    for state, words in (
        ({"w": None}, r"leaf \['w'\] is None"),
        ([None, jnp.zeros(0)], r"leaf \[0\] is None, leaf \[1\] is empty"),
        (None, "it is None"),
        ({}, "it has no leaves"),
    ):
        with pytest.raises(CheckpointError, match=rf"The state has no numbers to save: {words}\.$"):
            save(tmp_path / "run", 1, state, SETTINGS)
    with pytest.raises(CheckpointError, match=r"it is traced: call save outside of jax\.jit"):
        jax.jit(lambda w: save(tmp_path / "run", 1, w, SETTINGS))(jnp.ones(2))
    assert not (tmp_path / "run").exists()
    save(tmp_path / "run", 1, {"none": None, "w": 2.0}, SETTINGS)
    assert restore(tmp_path / "run", {"none": None, "w": 0.0}, SETTINGS) == {"none": None, "w": 2.0}


def test_what_a_killed_process_leaves_is_not_a_checkpoint(tmp_path):
    save(tmp_path, 1, make(1), SETTINGS)
    for name in ("step_00000002.saving", "step_00000000.removing"):
        shutil.copytree(tmp_path / "step_00000001", tmp_path / name)
    (tmp_path / "step_notes.txt").write_text("mine")
    assert latest(tmp_path) == 1
    save(tmp_path, 2, make(2), SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000001", "step_00000002", "step_notes.txt"]


@pytest.mark.parametrize("damage", ["remove", "cut", "flip", "empty"])
def test_a_damaged_file_is_found(tmp_path, damage):
    """Each file in turn: an array store reads what is missing as zeros, and no difference may go unseen."""
    save(tmp_path / "whole", 1, make(1), SETTINGS)
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    for file in files:
        shutil.rmtree(tmp_path / "damaged", ignore_errors=True)
        shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
        path = tmp_path / "damaged" / file
        content = bytearray(path.read_bytes())
        if damage == "flip" and content:
            content[len(content) // 2] ^= 1
        path.write_bytes({"cut": content[: len(content) // 2], "empty": b""}.get(damage, content))
        if damage == "remove":
            path.unlink()
        if path.exists() and path.read_bytes() == (tmp_path / "whole" / file).read_bytes():
            continue
        with pytest.raises(
            CheckpointError,
            match=r"^.*step_00000001 (is damaged or cut short|is not a checkpoint|was saved|doesn't fit).*$",
        ):
            restore(tmp_path / "damaged", make(), SETTINGS)
    assert len(files) > 5


def test_changed_numbers_are_found(tmp_path):
    """Only the digest can tell, since every file is one that was saved."""
    for step in (1, 2):
        save(tmp_path, step, make(step), SETTINGS)
    older, newer = tmp_path / "step_00000001", tmp_path / "step_00000002"
    shutil.rmtree(newer / "state")
    shutil.copytree(older / "state", newer / "state")
    with pytest.raises(CheckpointError, match=r"is not what was saved\. Remove that folder to go on from step 1\.$"):
        restore(tmp_path, make(), SETTINGS)
    files = json.loads((older / "record.json").read_text())["files"]
    record = json.loads((newer / "record.json").read_text())
    (newer / "record.json").write_text(json.dumps(record | {"files": files}))
    with pytest.raises(
        CheckpointError, match=r"not those that were saved\. Remove that folder to go on from step 1\.$"
    ):
        restore(tmp_path, make(), SETTINGS)
    shutil.rmtree(newer)
    assert int(restore(tmp_path, make(), SETTINGS)["step"]) == 1


def test_a_record_that_was_changed_is_found(tmp_path):
    path = save(tmp_path, 1, make(1), SETTINGS) / "record.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"settings": SETTINGS | {"hidden": 5}}))
    with pytest.raises(CheckpointError, match=r"not those that were saved\. There is none before it"):
        restore(tmp_path, make(), SETTINGS | {"hidden": 5})
    path.write_text(json.dumps(record | {"step": 2}))
    with pytest.raises(CheckpointError, match="its record is not that of step 1"):
        restore(tmp_path, make(), SETTINGS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"hidden": 5}, r"was saved with hidden = 4, but here it is 5\. Use the same"),
        ({"hidden": 5, "data": "x"}, r"with hidden = 4, but here it is 5; data = abc, but here it is x\."),
        ({"new": 1}, r"with new = None, but here it is 1\."),
    ],
)
def test_other_settings(tmp_path, settings, words):
    save(tmp_path, 1, make(1), SETTINGS)
    with pytest.raises(CheckpointError, match=words) as error:
        restore(tmp_path, make(), SETTINGS | settings)
    assert one_line(error)


def test_settings_and_leaves_that_json_and_jax_convert(tmp_path):
    """Numbers as keys, nan, tuples, a Python number among the leaves: what can be saved can be read."""
    settings = {"layers": {2: 1, 10: 2}, "rate": float("nan"), "sizes": (1, 2)}
    save(tmp_path, np.int64(3), {"n": 3, "w": np.ones(2)}, settings)
    assert restore(tmp_path, {"n": 0, "w": np.zeros(2)}, settings)["n"] == 3
    with pytest.raises(CheckpointError, match=r"The settings can't be saved: .*Use JSON's types"):
        save(tmp_path, 4, make(), {"size": np.int64(3)})
    for step in (-1, True, 4.0, "4"):
        with pytest.raises(
            ValueError, match=f"step is {step!r}, but it counts updates: pass a whole number of at least 0"
        ):
            save(tmp_path, step, make(), SETTINGS)
    for keep in (0, True, 2.5, "3"):
        with pytest.raises(
            ValueError, match=f"keep is {keep!r}, but it counts checkpoints: pass a whole number of at least 1"
        ):
            save(tmp_path, 4, make(), SETTINGS, keep=keep)


def test_other_shapes_and_structures(tmp_path):
    save(tmp_path, 1, make(1), SETTINGS)
    with pytest.raises(
        CheckpointError,
        match=r"leaf \['opt_state'\]\[0\]\.mu\['W'\] is float32\[2, 3\] in it, but float32\[2, 5\] here",
    ):
        restore(tmp_path, make(width=5), SETTINGS)
    with pytest.raises(CheckpointError, match=r"leaf \['new'\] is absent in it, but int32\[\] here"):
        restore(tmp_path, make() | {"new": jnp.int32(0)}, SETTINGS)
    with pytest.raises(CheckpointError, match=r"leaf \['host'\] is float64\[3\] in it, but absent here"):
        restore(tmp_path, {key: leaf for key, leaf in make().items() if key != "host"}, SETTINGS)
    with pytest.raises(CheckpointError, match=r"leaf \['step'\] is int32\[\] in it, but float32\[\] here"):
        restore(tmp_path, make() | {"step": jnp.float32(0)}, SETTINGS)


def test_an_empty_folder_and_one_of_something_else(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint: there is nothing to go on from"):
        restore(tmp_path, make(), SETTINGS)
    (tmp_path / "step_00000003").mkdir()
    with pytest.raises(CheckpointError, match="step_00000003 is not a checkpoint of jaxbptt, or has lost its record"):
        restore(tmp_path, make(), SETTINGS)
    record = tmp_path / "step_00000003" / "record.json"
    for content in ("[]", '{"format": "another"}'):
        record.write_text(content)
        with pytest.raises(CheckpointError, match="is not a checkpoint of this version of jaxbptt"):
            restore(tmp_path, make(), SETTINGS)


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="can't be written: ") as error:
        save(tmp_path / "file" / "run", 1, make(), SETTINGS)
    assert one_line(error)


def test_what_orbax_cannot_read_is_one_line(tmp_path):
    path = save(tmp_path, 1, make(1), SETTINGS)
    record = json.loads((path / "record.json").read_text())
    shutil.rmtree(path / "state")
    (path / "record.json").write_text(json.dumps(record | {"files": {}}))
    with pytest.raises(CheckpointError, match="is damaged or cut short: ") as error:
        restore(tmp_path, make(), SETTINGS)
    assert one_line(error)


def test_without_orbax(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "orbax.checkpoint", None)
    monkeypatch.delattr(sys.modules.get("orbax", sys), "checkpoint", raising=False)
    for call in (lambda: save(tmp_path, 1, make(), SETTINGS), lambda: restore(tmp_path, make(), SETTINGS)):
        with pytest.raises(ImportError, match=r"orbax.checkpoint is not installed: .*pip install .*\[train\]'"):
            call()


def test_long_errors_are_cut():
    assert checkpoints._one_line(ValueError("a\n b" + "c" * 300)) == "a b" + "c" * 197 + " …"
    assert checkpoints._one_line(ValueError()) == "ValueError"
