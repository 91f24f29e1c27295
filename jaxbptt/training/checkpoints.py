r"""A training run's state on disk, by orbax: written whole or not at all, and read back only if every byte is as it was.

Beside the arrays is a record: the settings of the run, what else is to be known of it, the name, shape and dtype of every
leaf, a SHA-256 of all that and of the numbers, and one of each file. It is needed because orbax's array store reads missing
data as zeros. orbax is imported only where it is used (extra `train`).
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray, Tracer

from jaxbptt.arrays import check_count
from jaxbptt.html_table import fields_table
from jaxbptt.trees import is_key
from jaxbptt.words import install_command

_FORMAT = "jaxbptt checkpoint 1"
_RECORD = "record.json"
_STEP = re.compile(r"step_(\d+)")


class CheckpointError(ValueError):
    """A checkpoint that can't be written, read or used; the message says why in one line."""


class Record(NamedTuple):
    """What a checkpoint says of itself.

    Attributes:
        step: of the checkpoint.
        settings: what `restore` asks for.
        info: what else was saved with it.
    """

    step: int
    settings: dict[str, Any]
    info: dict[str, Any]

    _repr_html_ = fields_table


def save(
    folder: str | Path,
    step: int,
    state: Any,
    settings: Mapping[str, Any],
    *,
    info: Mapping[str, Any] | None = None,
    keep: int = 3,
    older: bool = False,
) -> Path:
    """Write `folder/step_…`, whole or not at all, then remove all but the newest checkpoints.

    A process killed while saving leaves the earlier checkpoints as they were, and a temporary folder that the next `save`
    removes. With several processes all of them call it, with the same arguments and a folder that all of them see.

    Args:
        folder: created if it doesn't exist.
        step: names the checkpoint; larger is newer.
        state: a pytree of arrays, which may include typed keys of `jax.random`; sharded over devices and processes or not.
        settings: what the run was started with, in JSON's types; `restore` asks for the same.
        info: what else `record` is to tell, such as metrics and versions, in JSON's types; `restore` does not ask for it.
        keep: how many of the newest checkpoints are kept.
        older: allow a step before the newest one in the folder. Both are kept, but `restore` reads the newest.

    Returns:
        The checkpoint's own folder.

    Raises:
        CheckpointError: a state that can't be saved, such as a leaf that is not numeric; a step that exists already or is
            older than the newest. These are found before a file is touched; a failed write raises it too.
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
    check_count("step", step, "it counts updates", least=0)
    check_count("keep", keep, "it counts checkpoints")
    step, settings, info = int(step), _plain(settings), _plain(info or {})
    path = folder / f"step_{step:08d}"
    if path.exists():
        raise CheckpointError(f"{path} exists already: a checkpoint is never overwritten. Use another folder.")
    newest = latest(folder)
    if newest is not None and step < newest and not older:
        raise CheckpointError(
            f"{folder} has a checkpoint of step {newest} already, and `restore` would go on from that, not from step "
            f"{step}. Use another folder, or pass older=True."
        )
    _check_leaves(state)
    named = _named_leaves(state)
    record = _record(step, named, settings) | {"info": info}
    record["sha256"] = _digest(record, named)
    # Written under another name and renamed at the end, which file systems do at once or not at all. Only one process
    # makes, renames and removes folders; the arrays are written by all, each its own shards.
    saving = path.with_name(f"{path.name}.saving")
    try:
        if jax.process_index() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(folder)
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
        settings: must equal those that were saved.

    Returns:
        The state, in the structure of `like`, every bit as it was saved.

    Raises:
        CheckpointError: no checkpoint; one that is damaged, or has another format, other settings or other shapes.
        ImportError: without orbax.
    """
    ocp = _orbax()
    step, path = _newest(folder)
    named = _named_leaves(like)
    record = _read_record(path, step)
    _compare(path, record, _record(step, named, _plain(settings)))
    leaves = _restored(ocp, path, record, named)
    wanted, structure = jax.tree.flatten(like)
    return structure.unflatten(
        jax.random.wrap_key_data(leaf, impl=jax.random.key_impl(one)) if is_key(one) else leaf
        for one, leaf in zip(wanted, leaves.values(), strict=True)
    )


def read(folder: str | Path) -> dict[str, np.ndarray]:
    """The newest checkpoint's leaves by name, whatever they are: for who does not know what the state looked like.

    Args:
        folder: what `save` was given.

    Returns:
        Names, in the form of `jax.tree_util.keystr`, to arrays; random keys as their data.

    Raises:
        CheckpointError: no checkpoint, or one that is damaged or has another format.
        ImportError: without orbax.

    Example:
        >>> import tempfile, jax.numpy as jnp
        >>> from jaxbptt import checkpoints
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = checkpoints.save(folder, 5, {"w": jnp.arange(3.0)}, {"seed": 0}, info={"loss": 0.5})
        ...     print(checkpoints.read(folder), checkpoints.record(folder).info)
        {"['w']": array([0., 1., 2.], dtype=float32)} {'loss': 0.5}
    """
    ocp = _orbax()
    step, path = _newest(folder)
    found = _read_record(path, step)
    # jnp.dtype knows bfloat16 by name.
    return _restored(
        ocp, path, found, {name: np.zeros(shape, jnp.dtype(dtype)) for name, shape, dtype in found["leaves"]}
    )


def record(folder: str | Path) -> Record:
    """What the newest checkpoint says of itself, without its arrays.

    Args:
        folder: what `save` was given.

    Returns:
        A `Record`.

    Raises:
        CheckpointError: no checkpoint, or one that is damaged or has another format.
    """
    step, path = _newest(folder)
    found = _read_record(path, step)
    return Record(step, found["settings"], found.get("info", {}))


def latest(folder: str | Path) -> int | None:
    """The step of the newest complete checkpoint; None if there is none."""
    return max(_steps(Path(folder)), default=None)


def _newest(folder: str | Path) -> tuple[int, Path]:
    """The newest checkpoint: its step and its own folder."""
    folder = Path(folder).absolute()
    step = latest(folder)
    if step is None:
        raise CheckpointError(f"{folder} holds no checkpoint: there is nothing to go on from.")
    return step, folder / f"step_{step:08d}"


def _restored(ocp: Any, path: Path, record: Mapping[str, Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by name, like those given in shape, dtype and sharding, every bit as it was saved."""
    with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
        arrays = ocp.args.StandardRestore(jax.tree.map(_abstract, _by_number(named)))
        try:
            restored = checkpointer.restore(path / "state", args=arrays)
        except Exception as error:  # orbax passes on what file systems and its array store raise
            raise _damaged(path, _one_line(error)) from None
    leaves = {
        name: restored[f"{number:05d}"] if leaf.size else leaf for number, (name, leaf) in enumerate(named.items())
    }
    if _digest(record, leaves) != record["sha256"]:
        raise _damaged(path, "its numbers are not those that were saved")
    return leaves


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as JSON will give them back."""
    try:
        return json.loads(json.dumps(dict(settings)))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"The settings can't be saved: {_one_line(error)}. Use JSON's types.") from None


def _orbax() -> Any:
    try:
        import orbax.checkpoint as ocp
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: {install_command('train')}", name=error.name) from None
    return ocp


def _steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints, in order; an incomplete one has a longer name, which doesn't match."""
    names = [path.name for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return sorted(int(match[1]) for match in map(_STEP.fullmatch, names) if match)


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left half written or half removed."""
    for path in folder.glob("step_*"):
        if re.fullmatch(r"step_\d+\.(saving|removing)", path.name):
            shutil.rmtree(path)


def _remove(path: Path) -> None:
    # Renamed first: a half-removed checkpoint must not look like a complete one.
    removing = path.with_name(f"{path.name}.removing")
    os.rename(path, removing)
    shutil.rmtree(removing)


def _check_leaves(state: Any) -> None:
    """Refuse leaves that are not numeric, before anything is written."""
    leaves = [
        (f"leaf {jax.tree_util.keystr(path)}" if path else "it", leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state, is_leaf=lambda leaf: leaf is None)[0]
    ]
    for name, leaf in leaves:
        if leaf is not None and (problem := _problem(leaf)):
            raise CheckpointError(f"The state can't be saved: {name} {problem}.")
    if not any(np.size(leaf) for _, leaf in leaves if leaf is not None):
        found = ", ".join(f"{name} is {'None' if leaf is None else 'empty'}" for name, leaf in leaves)
        raise CheckpointError(f"The state has no numbers to save: {found or 'it has no leaves'}.")


def _problem(leaf: Any) -> str | None:
    """Why a leaf can't be saved; None if it can."""
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
    """Leaves by path, random keys by their data."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path): jax.random.key_data(leaf) if is_key(leaf) else leaf
        for path, leaf in ((path, leaf if hasattr(leaf, "dtype") else np.asarray(leaf)) for path, leaf in leaves)
    }


def _by_number(named: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves by number: names that fit any file system, in the record's order. orbax can't store empty arrays."""
    return {f"{number:05d}": leaf for number, leaf in enumerate(named.values()) if leaf.size}


def _abstract(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) if hasattr(leaf, "sharding") else leaf


def _record(step: int, named: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    leaves = [[name, list(leaf.shape), np.dtype(leaf.dtype).name] for name, leaf in named.items()]
    return {"format": _FORMAT, "step": step, "settings": dict(settings), "leaves": leaves}


def _digest(record: Mapping[str, Any], named: Mapping[str, Any]) -> str:
    described = {key: record[key] for key in ("format", "step", "settings", "leaves", "info") if key in record}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True).encode())
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
    """The record, if it and all files are as they were. orbax's own errors don't say what is damaged."""
    try:
        record = json.loads((path / _RECORD).read_bytes())
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} is not a checkpoint of jaxbptt, or has lost its record: it has no {_RECORD}. Use another folder."
        ) from None
    except (OSError, ValueError) as error:
        raise _damaged(path, f"its record can't be read, {_one_line(error)}") from None
    if not isinstance(record, dict) or record.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version of jaxbptt. Use another folder.")
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


def _compare(path: Path, saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise unless two records have the same settings and leaves."""

    def as_text(value):
        return json.dumps(value, sort_keys=True)  # in which nan equals nan

    there, here = saved["settings"], wanted["settings"]
    differ = [key for key in {**here, **there} if as_text(there.get(key)) != as_text(here.get(key))]
    if differ:
        words = (f"{key} = {there.get(key)}, but here it is {here.get(key)}" for key in differ)
        raise CheckpointError(f"{path} was saved with {'; '.join(words)}. Use the same, or another folder.")
    there, here = ({name: f"{dtype}{shape}" for name, shape, dtype in record["leaves"]} for record in (saved, wanted))
    for name in {**here, **there}:
        if here.get(name) != there.get(name):
            raise CheckpointError(
                f"{path} doesn't fit: leaf {name} is {there.get(name, 'absent')} in it, but {here.get(name, 'absent')} "
                "here. Use another folder."
            )


def _damaged(path: Path, reason: str) -> CheckpointError:
    before = [step for step in _steps(path.parent) if step < int(path.name.removeprefix("step_"))]
    way_out = f"Remove that folder to go on from step {before[-1]}" if before else "There is none before it"
    return CheckpointError(f"{path} is damaged or cut short: {reason}. {way_out}.")


def _one_line(error: Exception) -> str:
    words = " ".join(str(error).split()) or type(error).__name__
    return (words if len(words) <= 200 else words[:200] + " …").rstrip(".")
