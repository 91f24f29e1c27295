r"""A training run's state on disk, by orbax: written whole or not at all, and read back only if every byte is as it was.

Beside the arrays stands a record: the settings of the run, the name, shape and dtype of every leaf, a SHA-256 of all that and of
the numbers, and one of each file. It is needed, since the array store that orbax writes reads a piece of an array that has gone
as zeros.
orbax is imported only where it is used (extra `train`).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from operator import index
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.core import ShapedArray, Tracer

from jaxbptt.trees import is_key

_FORMAT = "jaxbptt checkpoint 1"
_RECORD = "record.json"
_STEP = re.compile(r"step_(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that can't be written, read or used here; the message says why in one line."""


def save(
    folder: str | Path, step: int, state: Any, settings: Mapping[str, Any], *, keep: int = 3, older: bool = False
) -> Path:
    """Write `folder/step_…`, whole or not at all, then remove all but the newest ones.

    A process that is killed here leaves the earlier checkpoints as they were, and a temporary folder that the next `save`
    removes. With several processes all of them call it, with the same arguments and a folder that all of them see.

    Args:
        folder: made where it doesn't exist.
        step: names the checkpoint; larger is newer.
        state: a pytree of arrays, typed keys of `jax.random` among them; sharded over devices and processes or not.
        settings: what the run was started with, as JSON knows it; `restore` asks for the same.
        keep: how many of the newest stay.
        older: allow a step before the newest one that is there. It stays as well, but `restore` reads the newest.

    Returns:
        The checkpoint's own folder.

    Raises:
        CheckpointError: what can't be written, such as a leaf that is no number or array; a step that is there already, or
            is older than another. All but what only writing shows is found before a file is touched.
        ValueError: a step below 0, or `keep` below 1.
        ImportError: without orbax.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from jaxbptt import checkpoints
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = checkpoints.save(folder, 5, {"w": jnp.arange(3.0)}, {"seed": 0})
        ...     print(checkpoints.latest(folder), checkpoints.restore(folder, {"w": jnp.zeros(3)}, {"seed": 0}))
        5 {'w': Array([0., 1., 2.], dtype=float32)}
    """
    ocp = _orbax()
    folder = Path(folder).absolute()
    step, settings = _checked(step, keep), _plain(settings)
    path = folder / f"step_{step:08d}"
    if path.exists():
        raise CheckpointError(f"{path} is there already: a checkpoint is never written over. Use another folder.")
    newest = latest(folder)
    if newest is not None and step < newest and not older:
        raise CheckpointError(
            f"{folder} has a checkpoint of step {newest} already, and `restore` would go on from that, not from step {step}. "
            "Use another folder, or pass older=True."
        )
    _check_leaves(state)
    named = _named_leaves(state)
    record = _record(step, named, settings)
    record["sha256"] = _digest(record, named)
    saving = path.with_name(f"{path.name}.saving")
    try:
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _sweep(folder)
            saving.mkdir()
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(saving / "state", args=ocp.args.StandardSave(_by_number(named)))
        if jax.process_index() == 0:
            _write(saving / _RECORD, json.dumps(record | {"files": _files(saving / "state")}))
            os.rename(saving, path)
            for old in _steps(folder)[:-keep]:
                if old != step:
                    _remove(folder / f"step_{old:08d}")
    except Exception as error:  # orbax passes on what file systems and its array store raise
        raise CheckpointError(f"{path} can't be written: {_one_line(error)}.") from None
    return path


def restore(folder: str | Path, like: Any, settings: Mapping[str, Any]) -> Any:
    """The newest checkpoint's state, if it is whole, of this structure, and of a run with these settings.

    Args:
        folder: what `save` was given.
        like: a pytree of arrays with the shapes, dtypes and shardings wanted, such as the state that training starts from.
        settings: to be equal to those that were saved.

    Returns:
        The state, in the structure of `like`, every bit as it was saved.

    Raises:
        CheckpointError: no checkpoint, one of something else, of other settings or shapes, or one that is damaged.
        ImportError: without orbax.
    """
    ocp = _orbax()
    folder = Path(folder).absolute()
    step = latest(folder)
    if step is None:
        raise CheckpointError(f"{folder} holds no checkpoint: there is nothing to go on from.")
    path = folder / f"step_{step:08d}"
    named = _named_leaves(like)
    record = _read_record(path, step)
    _compare(path, record, _record(step, named, _plain(settings)))
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        arrays = ocp.args.StandardRestore(jax.tree.map(_abstract, _by_number(named)))
        try:
            restored = checkpointer.restore(path / "state", args=arrays)
        except Exception as error:  # orbax passes on what file systems and its array store raise
            raise _damaged(path, _one_line(error)) from None
    leaves = [
        (name, restored[f"{number:05d}"] if leaf.size else leaf) for number, (name, leaf) in enumerate(named.items())
    ]
    if _digest(record, dict(leaves)) != record["sha256"]:
        raise _damaged(path, "its numbers are not those that were saved")
    originals, structure = jax.tree.flatten(like)
    return structure.unflatten(
        jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(original)) if is_key(original) else leaf
        for original, (_, leaf) in zip(originals, leaves, strict=True)
    )


def latest(folder: str | Path) -> int | None:
    """The step of the newest checkpoint that was written to its end; None where there is none."""
    return max(_steps(Path(folder)), default=None)


def _checked(step: Any, keep: int) -> int:
    try:
        whole = not isinstance(step, bool) and not isinstance(keep, bool) and index(step) >= 0 and index(keep) >= 1
    except TypeError:
        whole = False
    if not whole:
        raise ValueError(
            f"step is {step!r} and keep is {keep!r}: both are whole numbers, steps count from 0, and at least one checkpoint "
            "stays."
        )
    return index(step)


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they will be read again."""
    try:
        return json.loads(json.dumps(dict(settings)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The settings can't be saved: {_one_line(error)}. Use what JSON knows.") from None


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'jaxbptt[train]'.", name=error.name) from None
    return ocp


def _steps(folder: Path) -> list[int]:
    """In order. Until it is whole a checkpoint has a longer name."""
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def _sweep(folder: Path) -> None:
    """Remove what killed processes left half written or half removed."""
    for path in folder.glob("step_*"):
        if re.fullmatch(r"step_\d+\.(saving|removing)", path.name):
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    # Under another name first: half a checkpoint must not look like one.
    removing = path.with_name(f"{path.name}.removing")
    os.rename(path, removing)
    shutil.rmtree(removing)


def _check_leaves(state: Any) -> None:
    """Refuse what is no array of numbers, while nothing is written yet."""
    leaves = [
        (f"leaf {jax.tree_util.keystr(path)}" if path else "it", leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda leaf: leaf is None)[0]
    ]
    for name, leaf in leaves:
        if leaf is not None and (wrong := _wrong(leaf)):
            raise CheckpointError(f"The state can't be saved: {name} {wrong}.")
    if not any(np.size(leaf) for _, leaf in leaves if leaf is not None):
        found = ", ".join(f"{name} is {'None' if leaf is None else 'empty'}" for name, leaf in leaves)
        raise CheckpointError(f"The state has no numbers to save: {found or 'it has no leaves'}.")


def _wrong(leaf: Any) -> str | None:
    """Why a leaf can't be saved."""
    if isinstance(leaf, Tracer):
        return "is traced: call save outside of jax.jit"
    if isinstance(leaf, jax.Array) and leaf.is_deleted():
        return "was donated or deleted: save what the update returned"
    kind: Any = None
    if isinstance(leaf, jax.Array | np.ndarray | np.generic | bool | int | float | complex):
        with contextlib.suppress(TypeError):  # strings, dates, objects: dtypes that JAX does not have
            kind = jax.typeof(leaf if hasattr(leaf, "dtype") else np.asarray(leaf))
    if not isinstance(kind, ShapedArray) or kind.dtype == jax.dtypes.float0:
        what = f"an array of {leaf.dtype}" if isinstance(leaf, np.ndarray) else f"of type {type(leaf).__name__}"
        return f"is {what}, but arrays of numbers are expected: leave it out, and put it back after restore"
    return None


def _named_leaves(tree: Any) -> dict[str, Any]:
    """Leaves by path, keys as the numbers they are."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path): jax.random.key_data(leaf) if is_key(leaf) else leaf
        for path, leaf in ((path, leaf if hasattr(leaf, "dtype") else np.asarray(leaf)) for path, leaf in leaves)
    }


def _by_number(named: Mapping[str, Any]) -> dict[str, Any]:
    """Names that fit any file system; the record tells which is which. Arrays without a number can't be stored."""
    return {f"{number:05d}": leaf for number, leaf in enumerate(named.values()) if leaf.size}


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if hasattr(leaf, "sharding") else leaf


def _record(step: int, named: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    leaves = [[name, list(leaf.shape), np.dtype(leaf.dtype).name] for name, leaf in named.items()]
    return {"format": _FORMAT, "step": step, "settings": dict(settings), "leaves": leaves}


def _digest(record: Mapping[str, Any], named: Mapping[str, Any]) -> str:
    parts = {key: record[key] for key in ("format", "step", "settings", "leaves")}
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
    for leaf in named.values():
        digest.update(np.ascontiguousarray(_on_host(leaf)).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _on_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if not leaf.is_fully_replicated:
            from jax.experimental import multihost_utils

            return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
        leaf = leaf.addressable_data(0)
    return np.asarray(leaf)


def _files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file."""
    files = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        with file.open("rb") as content:
            files[file.relative_to(folder).as_posix()] = hashlib.file_digest(content, "sha256").hexdigest()
    return files


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _read_record(path: Path, step: int) -> dict[str, Any]:
    """The record, if it and all files are as they were: orbax doesn't read what is damaged without a word too many."""
    try:
        record = json.loads((path / _RECORD).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not a checkpoint of jaxbptt, or has lost its record: there is no {_RECORD} in it."
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(path, f"its record can't be read, {_one_line(error)}") from None
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of jaxbptt.")
    if not {"step", "settings", "leaves", "sha256", "files"} <= record.keys() or record["step"] != step:
        raise _damaged(path, f"its record is not that of step {step}")
    try:
        files = _files(path / "state")
    except OSError as error:
        raise _damaged(path, _one_line(error)) from None
    for file in [*record["files"], *files]:
        if record["files"].get(file) != files.get(file):
            how = "is missing" if file not in files else "is not what was saved"
            raise _damaged(path, f"its file state/{file} {how}")
    return record


def _compare(path: Path, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    settings = saved["settings"], here["settings"]
    keys = [*here["settings"], *(key for key in saved["settings"] if key not in here["settings"])]
    # As text, in which nan equals nan.
    differ = [key for key in keys if len({json.dumps(each.get(key), sort_keys=True) for each in settings}) > 1]
    if differ:
        words = (f"{key} = {settings[0].get(key)}, but here it is {settings[1].get(key)}" for key in differ)
        raise CheckpointError(f"{path} was saved with {'; '.join(words)}. Use the same, or another folder.")
    theirs, ours = ({name: f"{dtype}{shape}" for name, shape, dtype in record["leaves"]} for record in (saved, here))
    for name in [*ours, *theirs]:
        if ours.get(name) != theirs.get(name):
            there, wanted = theirs.get(name, "absent"), ours.get(name, "absent")
            raise CheckpointError(f"{path} doesn't fit: leaf {name} is {there} in it, but {wanted} here.")


def _damaged(path: Path, reason: str) -> CheckpointError:
    before = [step for step in _steps(path.parent) if step < int(path.name.removeprefix("step_"))]
    way_out = f"Remove that folder to go on from step {before[-1]}" if before else "There is none before it"
    return CheckpointError(f"{path} is damaged or cut short: {reason}. {way_out}.")


def _one_line(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return (words if len(words) <= 200 else words[:200] + " …").rstrip(".")
