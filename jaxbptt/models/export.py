r"""Weights for other programs: by name, in one file of numpy's or of safetensors."""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxbptt.files import write_whole
from jaxbptt.trees import is_key
from jaxbptt.words import install_command

ENDINGS = (".safetensors", ".npz")
METADATA = "__metadata__"


def named_weights(params: Any) -> dict[str, np.ndarray]:
    r"""Every array of a tree, by its fields, keys and positions with dots between them.

    Args:
        params: any pytree of arrays, such as a model's or a network's params.

    Returns:
        Names, such as `cell.W_hh` of one layer, `cell.0.W_hh` of several, `W_hy`, `b_y`, to arrays, in the tree's order and
        in their own dtype, bfloat16 too.

    Raises:
        TypeError: a leaf that is no array of numbers.
        ValueError: no leaves; two with the same name, which dots in the keys of dicts can lead to.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> net = bptt.network(bptt.gru(3, 8), output_size=2)
        >>> for name, array in bptt.models.named_weights(net.init(jax.random.key(0))).items():
        ...     print(name, array.shape)
        cell.W_xh (24, 3)
        cell.W_hh (24, 8)
        cell.b (24,)
        cell.b_hn (8,)
        W_hy (2, 8)
    """
    weights: dict[str, np.ndarray] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = ".".join(str(_bare(entry)) for entry in path) or "params"
        array = None if is_key(leaf) else np.asarray(leaf)
        # numpy calls the dtypes that it has not itself, such as bfloat16, void.
        if array is None or not (jax.numpy.issubdtype(array.dtype, jax.numpy.number) or array.dtype == bool):
            what = "a random key" if array is None else f"of dtype {array.dtype}"
            raise TypeError(f"{name} is {what}, but an array of numbers is expected: leave it out.")
        if name in weights:
            raise ValueError(f"Two arrays are named {name}: rename one, without dots in the keys of dicts.")
        weights[name] = array
    if not weights:
        raise ValueError("There are no arrays in params: pass what init(key) returned, or a model's params.")
    return weights


def save_weights(path: str | Path, params: Any, metadata: Mapping[str, Any] | None = None) -> None:
    r"""Write all weights to one file that needs neither this library nor JAX to be read.

    `.safetensors` keeps every dtype; read it with the library safetensors, in whatever framework. `.npz` is read by
    `numpy.load`; numpy has no bfloat16, so those weights are written as float32, which holds every one of their digits.

    Args:
        path: of the file, which is replaced as a whole or left as it was; its ending says which of the two it is.
        params: any pytree of arrays; `named_weights` says how they are named.
        metadata: names to what else is to stand in the file, as text, or as JSON where it is something else. In a `.npz` it
            is one JSON object, in the entry `__metadata__`.

    Raises:
        ValueError: another ending.
        TypeError: metadata that JSON can't express; for leaves and names see `named_weights`.
        OSError: the file can't be written.
        ImportError: without safetensors (extra `safetensors`).

    Example:
        >>> import tempfile, pathlib, jax, numpy as np
        >>> import jaxbptt as bptt
        >>> params = bptt.elman(3, 8).init(jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = pathlib.Path(folder, "weights.npz")
        ...     bptt.models.save_weights(path, params, {"cell": "elman"})
        ...     with np.load(path) as file:
        ...         print(file["W_hh"].shape, file["__metadata__"])
        (8, 8) {"cell": "elman"}
    """
    check(path)
    weights = named_weights(params)
    if Path(path).suffix == ".npz":
        arrays = {name: _for_numpy(array) for name, array in weights.items()}
        if METADATA in arrays:
            raise ValueError(
                f"An array is named {METADATA}, which is the name of what else stands in a .npz: rename it."
            )
        if metadata:
            arrays[METADATA] = np.array(json.dumps(dict(metadata), ensure_ascii=False))
        content = _npz(arrays)
    else:
        save = _safetensors()
        text = {key: value if isinstance(value, str) else json.dumps(value) for key, value in (metadata or {}).items()}
        content = save({name: np.array(array, order="C") for name, array in weights.items()}, text or None)
    write_whole(path, content)


def check(path: str | Path) -> None:
    """Raise a ValueError unless the file's name ends as one that `save_weights` writes, an ImportError if it can't."""
    if Path(path).suffix not in ENDINGS:
        raise ValueError(f"{path} ends in {Path(path).suffix!r}: use {' or '.join(ENDINGS)}.")
    if Path(path).suffix == ".safetensors":
        _safetensors()


def _safetensors() -> Any:
    try:
        from safetensors.numpy import save
    except ModuleNotFoundError as error:
        message = f"{error.name} is not installed: {install_command('safetensors')}"
        raise ImportError(message, name=error.name) from None
    return save


def _bare(entry: Any) -> Any:
    """A field's name, a key of a dict, a position."""
    return next(getattr(entry, kind) for kind in ("name", "key", "idx") if hasattr(entry, kind))


def _npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """What `numpy.savez` writes, which takes names as arguments and so can't write an array that is named `file`."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, array in arrays.items():
            # A ZipInfo has a fixed date: the same weights are the same bytes.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)
    return content.getvalue()


def _for_numpy(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype.kind == "V" else array
