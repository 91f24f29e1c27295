r"""The optimal Kronecker sum: for each layer a few products of a derivative and an input, of the least variance."""

from functools import partial

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxbptt.arrays import check_count
from jaxbptt.influences.influence import Influence
from jaxbptt.influences.kf_rtrl import kronecker


def low_rank(rank: int) -> Influence:
    r"""Optimal Kronecker sum: a random estimate of dcₜ/dθ, right on average, with `rank` products for each layer.

    Mₜ ≈ Σᵢ Aᵢ ⊗ vᵢ, i = 1 … r:  r products of the least variance whose mean is Σᵢ (Jₜ Aᵢ) ⊗ vᵢ + Dₜ ⊗ zₜ

    The r + 1 products on the right (see `kf_rtrl` for D and z) are brought to a diagonal, σ₁ ≥ … ≥ σᵣ₊₁, by a QR decomposition of
    either side and an SVD of what is between. The large σ are kept. The others, s in sum, are mixed into one product less,
    (s/k) N (I - z zᵀ) N with zᵢ² = 1 - σᵢ k/s and N a diagonal of random signs: its mean is diag(σᵢ). Exact while there are no more
    than r products, as over the first r steps.

    Time and memory r times those of `kf_rtrl`, O(r n³) a step and gate and O(r n²), and O(r² n²) for the decompositions.

    Args:
        rank: r, how many products are kept for each layer.

    Returns:
        An `Influence` that needs a `key`; without one a gradient raises a `ValueError`, and so does a step that `kf_rtrl` has no
        form for.

    Raises:
        ValueError: a rank that is not a positive whole number.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.elman(2, 3)
        >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (4, 2))
        >>> def gradient(scan, **options):
        ...     return jax.grad(lambda params: jnp.sum(scan(cell, params, jnp.zeros(3), xs, **options)[1] ** 2))(params).W_hh
        >>> online = gradient(bptt.forward_scan, influence=bptt.influences.low_rank(4), key=jax.random.key(2))
        >>> bool(jnp.allclose(online, gradient(bptt.scan), atol=1e-5))
        True

    References:
        Benzing, Gauy, Mujika, Martinsson and Steger, Optimal Kronecker-sum approximation of real time recurrent learning, 2019,
        arXiv:1902.03993.
    """
    check_count("rank", rank, "it counts products")
    return kronecker(f"low_rank({rank})", rank, reduced)


_product = partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def reduced(left: Array, right: Array, nu: Array) -> tuple[Array, Array]:
    """Products `[r + 1, N]`, `[r + 1, M]` as one less."""
    q, nu = len(left), jnp.append(nu, 1)  # all signs turned round at once would change nothing
    (Q_left, R_left), (Q_right, R_right) = (jnp.linalg.qr(_tall(factor)) for factor in (left, right))
    U, sigma, V = jnp.linalg.svd(_product(R_left, R_right.T))
    # Rounding errors are not worth a random sign: their root would be added to the others.
    sizes = jnp.linalg.norm(left, axis=1) @ jnp.linalg.norm(right, axis=1)
    rounding = q * jnp.finfo(sigma.dtype).eps * sizes
    sigma = jnp.where(sigma > rounding, sigma, 0)
    # k terms are left for the σ from number q - 1 - k on: as many as make no z² negative.
    tails, k = jnp.cumsum(sigma[::-1])[::-1], jnp.arange(q - 1, 0, -1, sigma.dtype)
    first = jnp.argmax((k * sigma[:-1] <= tails[:-1]).at[-1].set(True))
    k, total = k[first], tails[first]
    mixed = jnp.arange(q) >= first
    squares = jnp.maximum(total - k * sigma, 0) / jnp.where(total > 0, total, 1)
    z = jnp.where(mixed, jnp.sqrt(squares), 0)
    # A reflection takes the last axis to -z, and so the others to the complement of z.
    w = z.at[-1].add(1)
    complement = (jnp.eye(q, dtype=w.dtype) - 2 * jnp.outer(w, w) / (w @ w))[:, :-1]
    scale = jnp.where(mixed, nu * jnp.sqrt(total / k), jnp.sqrt(sigma))
    factor = scale[:, None] * complement
    left_terms = _product(Q_left, _product(U, factor))[: left.shape[1]]
    return left_terms.T, _product(Q_right, _product(V.T, factor))[: right.shape[1]].T


def _tall(factor: Array) -> Array:
    """`[N, r + 1]`, with rows of zeros where N is smaller than r + 1."""
    terms, size = factor.shape
    return jnp.pad(factor.T, ((0, max(terms - size, 0)), (0, 0)))
