"""The optimisers and learning rates of `train`, all of them optax's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

# What makes the direction of an update from the gradient.
OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "adam": optax.scale_by_adam,
    "adamw": optax.scale_by_adam,
    "lion": optax.scale_by_lion,
    "rmsprop": optax.scale_by_rms,
    "momentum": partial(optax.trace, decay=0.9),
    "sgd": optax.identity,
}
SCHEDULES = ("constant", "cosine", "linear")
ADAMW_DECAY = 0.01


def optimizer(
    name: str, rate: float, *, weight_decay: float | None, warmup: int, schedule: str, updates: int | None
) -> optax.GradientTransformation:
    """Directions by name, decoupled weight decay of matrices, and the learning rate, as `train` takes them."""
    if weight_decay is None:
        weight_decay = ADAMW_DECAY if name == "adamw" else 0.0
    decay = optax.add_decayed_weights(weight_decay, mask=_matrices) if weight_decay else optax.identity()
    return optax.chain(
        OPTIMIZERS[name](), decay, optax.scale_by_learning_rate(learning_rate(rate, warmup, schedule, updates))
    )


def learning_rate(rate: float, warmup: int, schedule: str, updates: int | None) -> optax.Schedule:
    """It rises to `rate` in equal steps over the warm-up, then stays or falls to 0 at `updates`."""
    if schedule == "constant" or updates is None:
        after = optax.constant_schedule(rate)
    elif schedule == "cosine":
        after = optax.cosine_decay_schedule(rate, updates - warmup)
    else:
        after = optax.linear_schedule(rate, 0.0, updates - warmup)
    if not warmup:
        return after
    # The first update already has a share of the rate: with a rate of 0 it would change nothing.
    rising = optax.linear_schedule(rate / (warmup + 1), rate, warmup)
    return optax.join_schedules([rising, after], [warmup])


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)
