"""Arrays as arguments: what is none is refused by name, and half precision is raised where something is added up."""

from typing import Any

import jax.numpy as jnp
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


def at_least_float32(dtype: Any) -> Any:
    """What to compute and add up in: counted one by one, half precision gets no further than 2,048, or 256."""
    if not jnp.issubdtype(dtype, jnp.inexact):
        return jnp.result_type(float)
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)
