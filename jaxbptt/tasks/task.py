r"""What a sequence problem is: how to draw one, which loss fits, and the loss of a predictor without memory.

Every task is a NamedTuple made by a function; a network that beats `baseline` has remembered something.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Shaped

from jaxbptt.arrays import check_key
from jaxbptt.html_table import fields_table


class Sequences(NamedTuple):
    """A batch of sequences and their targets.

    Attributes:
        xs: inputs, `[time, batch, features]`, float32.
        ys: targets, class numbers `[time, batch]`, int32, or values `[time, batch, features]`, float32.
        mask: `[time, batch]`, True where the loss counts. Where it is False, `ys` holds no target of that step.
    """

    xs: Float[Array, "time batch features"]
    ys: Shaped[Array, "time batch *features"]
    mask: Bool[Array, "time batch"]

    _repr_html_ = fields_table


class Task(NamedTuple):
    """A sequence problem.

    Attributes:
        sample: `(key, batch) -> Sequences`, pure; under `jax.jit` with `batch` static.
        loss: the function of `jaxbptt.training.losses` that fits the targets.
        baseline: that loss, in nats or squared units, for the predictor without memory that the task's docstring names.
        input_size: features of `xs`.
        output_size: classes or features of `ys`.
    """

    sample: Callable[..., Sequences]
    loss: Literal["cross_entropy", "mean_squared_error"]
    baseline: float
    input_size: int
    output_size: int

    _repr_html_ = fields_table


def check_size(name: str, value: int, least: int, reason: str) -> None:
    """Raise unless `value` is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}, but a Python integer is expected.")
    if value < least:
        raise ValueError(f"{name}={value}, but {reason}: pass {name}={least} or more.")


def checked(sample: Callable[..., Sequences]) -> Callable[..., Sequences]:
    """`sample(key, batch)` that checks its key and its number of rows."""

    def checked_sample(key, batch):
        check_key(key)
        check_size("batch", batch, 1, "a batch has at least one row")
        return sample(key, batch)

    return checked_sample


def last_step(steps: int, batch: int) -> Bool[Array, "time batch"]:
    """The mask of a target at the last step only."""
    return jnp.broadcast_to((np.arange(steps) == steps - 1)[:, None], (steps, batch))
