r"""Real-time recurrent learning: the influence itself, every entry of it."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt.influences.influence import Influence
from jaxbptt.influences.state import flat, jacobians, size, vector


def rtrl() -> Influence:
    r"""Real-time recurrent learning: dcₜ/dθ in full. Exact, for any step and any carry.

    Mₜ = Jₜ Mₜ₋₁ + Fₜ

    M has a leaf `[n, *leaf]` for each leaf of the params, n numbers of the carry of a row. Time O(n² p) a step and row, memory
    O(n p), whatever T. For a dense layer p is about n² itself, so the time is O(n⁴).

    Returns:
        An `Influence`.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> power = lambda w, h, x: (w * h, w * h)
        >>> last = lambda w: bptt.forward_scan(power, w, 1.0, length=3, influence=bptt.influences.rtrl())[0]
        >>> print(jax.grad(last)(0.5))  # 3 w²
        0.75

    References:
        Williams and Zipser, A learning algorithm for continually running fully recurrent neural networks, 1989,
        doi:10.1162/neco.1989.1.2.270.
    """
    return Influence(_init, _advance, _pull)


def _init(step: Any, params: Any, carry: Any, x: Any) -> Any:
    n, dtype = size(carry), vector(carry).dtype
    return jax.tree.map(lambda leaf: jnp.zeros((n, *leaf.shape), dtype), params)


def _advance(step: Any, params: Any, carry: Any, x: Any, M: Any, key: Any) -> Any:
    J, F = jacobians(step, params, carry, x)
    return jax.tree.map(lambda leaf, new: (J @ flat(leaf)).reshape(leaf.shape) + new, M, F)


def _pull(M: Any, carry_bar: Any) -> Any:
    bar = vector(carry_bar)
    return jax.tree.map(lambda leaf: (bar.astype(leaf.dtype) @ flat(leaf)).reshape(leaf.shape[1:]), M)
