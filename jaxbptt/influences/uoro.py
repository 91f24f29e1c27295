r"""Unbiased online recurrent optimisation: the influence as one random product of a carry and a set of params."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxbptt.influences import signs
from jaxbptt.influences.influence import Influence
from jaxbptt.influences.state import as_function, vector


def uoro() -> Influence:
    r"""Unbiased online recurrent optimisation (UORO): a random estimate of dcₜ/dθ, right on average, for any step and any carry.

    Mₜ ≈ uₜ vₜᵀ,  uₜ = ρ₀ Jₜ uₜ₋₁ + ρ₁ ν,  vₜᵀ = vₜ₋₁ᵀ/ρ₀ + νᵀFₜ/ρ₁

    ν are n random signs. ρ₀ and ρ₁ make both factors of a term equally large, ρ₀² = ‖vₜ₋₁‖/‖Jₜ uₜ₋₁‖ and ρ₁² = ‖νᵀFₜ‖/‖ν‖, which
    keeps the variance low.

    Time of one tangent and one cotangent of a step, and O(p); memory O(n + p), whatever T. It has the largest variance of the
    unbiased influences, and it grows with n and with how long the carry remembers: average over many sequences, or take `kf_rtrl`.

    Returns:
        An `Influence` that needs a `key`; without one a gradient raises a `ValueError`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.elman(2, 3)
        >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (8, 2))
        >>> def gradient(scan, **options):
        ...     return jax.grad(lambda params: jnp.sum(scan(cell, params, jnp.zeros(3), xs, **options)[1] ** 2))(params).W_hh
        >>> def drawn(key):
        ...     return gradient(bptt.forward_scan, influence=bptt.influences.uoro(), key=key)
        >>> many = jax.jit(jax.vmap(drawn))(jax.random.split(jax.random.key(2), 10_000))
        >>> exact = gradient(bptt.scan)
        >>> bool(jnp.linalg.norm(many.mean(0) - exact) < 0.1 * jnp.linalg.norm(exact))
        True

    References:
        Tallec and Ollivier, Unbiased online recurrent optimization, 2017, arXiv:1702.05043.
    """
    return Influence(_init, _advance, _pull)


class _Product(NamedTuple):
    """u vᵀ: a carry as a vector `[n]`, and arrays like the params."""

    u: Array
    v: Any


def _init(step: Any, params: Any, carry: Any, x: Any) -> _Product:
    u = jnp.zeros_like(vector(carry))
    return _Product(u, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, u.dtype), params))


def _advance(step: Any, params: Any, carry: Any, x: Any, M: _Product, key: Any) -> _Product:
    signs.check_drawn(key, "uoro()")
    fn, params, c = as_function(step, params, carry, x)
    _, vjp = jax.vjp(fn, params, c)
    # A tangent, by transposing cotangents: a jax.custom_vjp has no other.
    _, jvp = jax.vjp(lambda c_bar: vjp(c_bar)[1], jnp.zeros_like(c))
    nu = signs.signs(key, c.shape, c.dtype)
    of_params = jax.tree.map(lambda leaf: leaf.astype(c.dtype), vjp(nu)[0])
    return _Product(*signs.added(signs.balanced(*(jvp(M.u)[0], M.v)), signs.balanced(nu, of_params)))


def _pull(M: _Product, carry_bar: Any) -> Any:
    return signs.scaled(M.v, vector(carry_bar) @ M.u)
