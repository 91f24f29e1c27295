r"""Initialisations that keep a gradient alive at the start: what a cell's `recurrent_init` and `chrono_length` ask for.

jax's own initialisers fit `recurrent_init` and `input_init` as well; here is what it lacks or lays out transposed.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array

from jaxbptt.arrays import is_number


def orthogonal(scale: float = 1.0) -> Callable[..., Array]:
    r"""A random orthogonal matrix times a factor g: all its singular values are g, the bound of a tanh layer's Jacobian.

    W = g Q,  QᵀQ = I

    Args:
        scale: g.

    Returns:
        A jax initializer `(key, shape, dtype) -> W`; float32 or float64, the cells cast it where they are in half precision.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> W = bptt.elman(3, 5, recurrent_init=bptt.initializers.orthogonal(0.9)).init(jax.random.key(0)).W_hh
        >>> bool(jnp.allclose(W @ W.T, 0.81 * jnp.eye(5), atol=1e-6))
        True

    References:
        Saxe, McClelland and Ganguli, Exact solutions to the nonlinear dynamics of learning in deep linear networks, 2013,
        arXiv:1312.6120.
    """
    _check_scale(scale)
    return jax.nn.initializers.orthogonal(scale)


def identity(scale: float = 1.0) -> Callable[..., Array]:
    r"""The identity times a factor g: at the start every unit keeps what it has, as in the IRNN (there with relu).

    W = g I

    Args:
        scale: g.

    Returns:
        A jax initializer `(key, shape, dtype) -> W`.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> print(bptt.elman(3, 2, recurrent_init=bptt.initializers.identity()).init(jax.random.key(0)).W_hh)
        [[1. 0.]
         [0. 1.]]

    References:
        Le, Jaitly and Hinton, A simple way to initialize recurrent networks of rectified linear units, 2015,
        arXiv:1504.00941.
    """
    _check_scale(scale)

    def init(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        return jnp.asarray(scale, dtype) * jnp.eye(*shape, dtype=dtype)

    return init


def chrono(length: float) -> Callable[..., Array]:
    r"""Biases of a gate that keeps its memory for times spread up to a given length.

    b = log u,  u ~ Uniform(1, length − 1)

    A gate σ(b) = 1 − 1/(1 + u) forgets over u + 1 steps. `lstm` and `gru` have it as `chrono_length`.

    Args:
        length: of the longest dependency to expect, time steps, above 2.

    Returns:
        A jax initializer `(key, shape, dtype) -> b`.

    Raises:
        ValueError: a length of 2 or less.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> b = bptt.initializers.chrono(100)(jax.random.key(0), (1_000,))
        >>> keeps = 1 / (1 - jax.nn.sigmoid(b))  # time steps
        >>> bool(1.9 < keeps.min() < 10), bool(90 < keeps.max() < 100.1)
        (True, True)

    References:
        Tallec and Ollivier, Can recurrent neural networks warp time?, 2018, arXiv:1804.11188.
    """
    if not is_number(length, 2):
        raise ValueError(
            f"chrono_length is {length!r}, but the longest dependency has to be above 2 time steps: leave it out otherwise."
        )

    def init(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
        drawn = dtype if jnp.finfo(dtype).bits >= 32 else jnp.float32
        return jnp.log(jax.random.uniform(key, shape, drawn, 1.0, length - 1.0)).astype(dtype)

    return init


def _check_scale(scale: Any) -> None:
    if not isinstance(scale, Tracer) and not is_number(scale, -math.inf):
        raise ValueError(f"scale is {scale!r}, but it is a factor of the matrix: pass a finite number.")
