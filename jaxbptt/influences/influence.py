r"""The contract of an influence: dc_t/dθ, or an estimate of it, carried forward in time beside the carry."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Influence(NamedTuple):
    r"""How dcₜ/dθ is carried forward in time, as pure functions: `Adjoint` turned round.

    Mₜ = dcₜ/dθ = Jₜ Mₜ₋₁ + Fₜ,  Jₜ = ∂cₜ/∂cₜ₋₁,  Fₜ = ∂cₜ/∂θ at a fixed cₜ₋₁

    All three functions see one row of a batch and real arrays: what uses them maps them over rows, takes complex arrays apart into
    pairs, and puts `None` in the place of params without a gradient and of a carry without influence. M is any pytree of
    floating-point arrays, and all zeros stand for no influence, as before the first step.

    - `forward_scan` multiplies Mₜ by what the loss of each output says of cₜ.
    - `tbptt` multiplies it, at the start of a chunk, by what the chunk says of the carry that it started from.

    Attributes:
        init: `(step, params, carry, x) -> M`, an influence of zeros, for a step with arguments of these shapes. `step` is
            `step(params, carry, x) -> (carry, y)`, of which y does not matter here.
        advance: `(step, params, carry, x, M, key) -> M`: from before a step to after it; `carry` is that before it. `key` is a
            random key, a new one at each step and row, or `None` where the user gave none.
        pull: `(M, carry_bar) -> params_bar`: dL/dc times M, like params; `carry_bar` is like the carry.

    Example:
        An influence of your own: only the diagonal of J, for a carry that is one array `[hidden]`, exact where no unit
        reads another (Mozer's focused backpropagation).

        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> def immediate(step, params, h, x):
        ...     return jax.jacrev(lambda params: step(params, h, x)[0])(params)
        >>> def init(step, params, h, x):
        ...     return jax.tree.map(jnp.zeros_like, immediate(step, params, h, x))
        >>> def advance(step, params, h, x, M, key):
        ...     J = jnp.diagonal(jax.jacfwd(lambda h: step(params, h, x)[0])(h))
        ...     along = lambda leaf: J.reshape(-1, *(1,) * (leaf.ndim - 1))
        ...     return jax.tree.map(lambda leaf, new: along(leaf) * leaf + new, M, immediate(step, params, h, x))
        >>> def pull(M, h_bar):
        ...     return jax.tree.map(lambda leaf: jnp.tensordot(h_bar, leaf, 1), M)
        >>> focused = bptt.Influence(init, advance, pull)
        >>> cell = bptt.min_gru(3, 4)
        >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (20, 5, 3))
        >>> def loss(params, scan):
        ...     return jnp.mean(scan(cell, params, cell.initial_carry((5,)), xs)[1] ** 2)
        >>> online = jax.grad(loss)(params, lambda *args: bptt.forward_scan(*args, influence=focused))
        >>> exact = jax.grad(loss)(params, bptt.scan)
        >>> bool(jnp.allclose(online.W_xh, exact.W_xh, atol=1e-6))
        True

    References:
        Williams and Zipser, A learning algorithm for continually running fully recurrent neural networks, 1989,
        doi:10.1162/neco.1989.1.2.270.
    """

    init: Callable[..., Any]
    advance: Callable[..., Any]
    pull: Callable[..., Any]


def check_influence(influence: Any, meaning: str) -> None:
    """Raise where an argument is no `Influence`; `meaning` says what one is for there."""
    if not isinstance(influence, Influence):
        raise TypeError(
            f"influence is a {type(influence).__name__}, but {meaning}: pass influences.rtrl(), another of jaxbptt.influences, or an "
            "Influence(init, advance, pull)."
        )
