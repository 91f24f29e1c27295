"""Checks of arguments before anything is computed: arrays, numbers, keys, dtypes; an error names the argument.

And the dtype to accumulate in, where half precision has too few digits.
"""

from operator import index
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.tree_util import keystr
from jaxtyping import Array


def as_array(name: str, value: Any, expected: str) -> Array:
    """`jnp.asarray`, or a TypeError that names the argument and says what was expected."""
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError):
        array = None
    if array is None or not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        what = f"an array of {value.dtype}" if hasattr(value, "dtype") else f"a {type(value).__name__}"
        raise TypeError(f"{name} is {what}, but {expected} is expected: pass an array of numbers.")
    return array


def as_numpy(value: Any) -> np.ndarray:
    """`np.asarray`; rows of unequal length become objects, to be refused by their dtype."""
    try:
        return np.asarray(value)
    except ValueError:
        return np.asarray(None)


def at_least_float32(dtype: Any) -> Any:
    """The dtype to compute and accumulate in: a sum of ones stops at 2,048 in float16, and at 256 in bfloat16."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.result_type(float)
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def check_count(
    name: str, value: Any, meaning: str, least: int = 1, most: int | None = None, way_out: str | None = None
) -> None:
    """Raise unless `value` is a whole number in a range, known before the program runs."""
    try:
        number = index(value)
        if not isinstance(value, bool) and least <= number and (most is None or number <= most):
            return
    except TypeError:
        pass  # not a whole number, or traced
    in_range = f"of at least {least}" if most is None else f"from {least} to {most}"
    raise ValueError(f"{name} is {value!r}, but {meaning}: {way_out or f'pass a whole number {in_range}'}.")


def is_number(value: Any, above: float, below: float = float("inf")) -> bool:
    """Whether a value is a real number between two others, known before the program runs."""
    if isinstance(value, bool | str | bytes):
        return False
    try:
        return above < float(value) < below
    except (TypeError, ValueError):
        return False


def is_floating(dtype: Any, kind: Any = jnp.floating) -> bool:
    """Whether a value names a floating-point dtype. `None` and an array do not, though `jnp.dtype` reads them as one."""
    is_array = not isinstance(dtype, type) and getattr(dtype, "ndim", 0)  # numpy's types have an attribute `ndim` too
    try:
        return dtype is not None and not is_array and bool(jnp.issubdtype(jnp.dtype(dtype), kind))
    except TypeError:
        return False


def check_key(key: Any) -> None:
    """Raise unless the key is a single random key, typed or raw."""
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if (typed and shape == ()) or (dtype == jnp.uint32 and shape is not None and len(shape) == 1 and shape[0] > 0):
        return
    if typed:
        raise ValueError(f"key has shape {shape}, but a single one is expected: pick one, or use jax.vmap.")
    what = repr(key) if isinstance(key, int | float | str) or key is None else f"a {type(key).__name__}"
    raise TypeError(f"key is {what}, but a random key is expected: pass jax.random.key(0), or another of your seed.")


def check_callable(name: str, value: Any, signature: str) -> None:
    """Raise unless the value can be called."""
    if not callable(value):
        raise TypeError(f"{name} is a {type(value).__name__}, but a function is expected: pass {signature}.")


def check_concrete(function: str, **arguments: Any) -> None:
    """Raise where a leaf of an argument is traced, for functions that look at the numbers themselves."""
    for name, tree in arguments.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if isinstance(leaf, Tracer):
                raise TypeError(
                    f"{function} looks at the numbers themselves, but {name}{keystr(path)} is traced: call it with arrays, "
                    "outside jax.jit, jax.vmap and jax.grad."
                )


def scalar_loss(loss: Any) -> Any:
    """The loss, which raises unless it returns one real number."""
    check_callable("loss", loss, "loss(carry, ys) -> scalar")

    def checked(*args: Any) -> Any:
        value = as_array("The loss's result", loss(*args), "a scalar")
        if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ValueError(
                f"The loss returned {value.dtype}{list(value.shape)}, but one real number is expected: take the sum or "
                "the mean, in floating point."
            )
        return value

    return checked
