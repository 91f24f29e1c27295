r"""How far a matrix is from having orthogonal eigenvectors.

A normal matrix does over many steps what its eigenvalues say. One that is not lets perturbations grow for a while though
all its eigenvalues are inside the unit circle: it has part of its activity run from one direction into another.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.analysis.norms import norm
from jaxbptt.arrays import as_array, at_least_float32
from jaxbptt.html_table import fields_table


class NormalityDeparture(NamedTuple):
    """Henrici's departure from normality.

    Attributes:
        absolute: of each matrix, in the units of its entries.
        relative: divided by the Frobenius norm of the matrix: from 0 to 1; 0 for the matrix 0.
    """

    absolute: Float[Array, "*matrices"]
    relative: Float[Array, "*matrices"]

    _repr_html_ = fields_table


def departure_from_normality(A: Any) -> NormalityDeparture:
    r"""Henrici's departure from normality of a matrix, such as W_hh or the Jacobian of a step.

    d(A) = √(‖A‖² − Σᵢ |μᵢ|²) = ‖N‖,  A = U (diag(μ) + N) Uᴴ,  ‖·‖ the Frobenius norm

    with N the part above the diagonal of the Schur form. 0 where Aᵀ A = A Aᵀ, as for symmetric and orthogonal matrices;
    relative to ‖A‖ it is 1 where all eigenvalues are 0. Computed from N: the difference of squares would lose half of the
    digits where A is nearly normal. Time O(n³) a matrix, one at a time; memory O(n²) beyond the result. On CPUs only, where
    JAX has the decomposition.

    Args:
        A: `[*matrices, n, n]`, for example W_hh `[n, n]` or the Jacobians `[time, n, n]` of `state_jacobians`.

    Returns:
        `NormalityDeparture(absolute, relative)`, each `[*matrices]`.

    Raises:
        ValueError: A not `[*matrices, n, n]`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> turn, delay = jnp.array([[0.0, -1.0], [1.0, 0.0]]), jnp.array([[0.0, 1.0], [0.0, 0.0]])
        >>> print(bptt.departure_from_normality(jnp.stack([turn, delay])).relative.round(6))
        [0. 1.]

    References:
        Henrici, Bounds for iterates, inverses, spectral variation and fields of values of non-normal matrices, 1962,
        doi:10.1007/BF01386294; Trefethen and Embree, Spectra and Pseudospectra, 2005, ch. 48.
    """
    A = as_array("A", A, "[*matrices, n, n]")
    if A.ndim < 2 or A.shape[-1] != A.shape[-2] or not A.shape[-1]:
        raise ValueError(f"A has shape {A.shape}, but square matrices [*matrices, n, n] are expected.")
    A = A.astype(at_least_float32(A.dtype))
    wide = jnp.complex64 if jnp.finfo(A.dtype).bits == 32 else jnp.complex128

    def of_one(matrix):
        size = norm(matrix)
        scaled = matrix / jnp.where(size > 0, size, 1)
        # One result on some versions of JAX, two on others, where no vectors are asked for.
        T, *_ = jax.lax.linalg.schur(scaled.astype(wide), compute_schur_vectors=False)
        relative = norm(jnp.triu(T, 1))
        return relative * size, relative

    absolute, relative = jax.lax.map(of_one, A.reshape(-1, *A.shape[-2:]))
    return NormalityDeparture(absolute.reshape(A.shape[:-2]), relative.reshape(A.shape[:-2]))
