"""Which paths of the gradient a strategy keeps, found by differentiating through it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from jaxbptt.arrays import check_callable, check_count


def surviving_paths(strategy: Callable[..., Any], length: int, **options: Any) -> Bool[Array, "time time"]:
    r"""Which ∂Lₜ/∂hₛ a strategy keeps, read off its derivative.

    The strategy unrolls hₛ = hₛ₋₁ + xₛ, in which every ∂hₜ/∂hₛ with s ≤ t is 1. A path is cut where its gradient of hₜ with
    respect to xₛ is 0 instead. Costs T gradients of T steps.

    Args:
        strategy: `truncated_scan`, `windowed_scan`, or any other of the same signature.
        length: T, time steps.
        **options: passed to the strategy: `truncation_length=4`, `is_first=flags`.

    Returns:
        Booleans `[time, time]`: entry [t, s] for the loss of step t and the state after step s. Without a cut,
        all entries on and below the diagonal.

    Raises:
        ValueError: `length` below 1; whatever the strategy raises.

    Example:
        >>> import jaxbptt as bptt
        >>> print(bptt.surviving_paths(bptt.truncated_scan, 4, truncation_length=2).astype(int))
        [[1 0 0 0]
         [1 1 0 0]
         [0 0 1 0]
         [0 0 1 1]]
        >>> print(bptt.surviving_paths(bptt.windowed_scan, 4, window=2).astype(int))
        [[1 0 0 0]
         [1 1 0 0]
         [0 1 1 0]
         [0 0 1 1]]
    """
    check_callable("strategy", strategy, "truncated_scan, or another")
    check_count("length", length, "it counts time steps")

    def step(_, h, x):
        h = h + x
        return h, h

    def states(xs):
        return strategy(step, None, jnp.zeros((), xs.dtype), xs, **options)[1]

    return jax.jacrev(states)(jnp.zeros(length)) != 0
