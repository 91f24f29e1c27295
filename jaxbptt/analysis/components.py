r"""Trajectories in few dimensions: the principal components of states, and how many dimensions they fill."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.arrays import as_array, at_least_float32, check_count
from jaxbptt.html_table import columns_table, in_words
from jaxbptt.trees import is_differentiable, name
from jaxbptt.words import counted


class PrincipalComponents(NamedTuple):
    """Orthonormal directions of states, in order of the variance along them.

    Attributes:
        components: the directions, one a row, the largest entry of each positive, `[k, n]`.
        explained_variance: λᵢ, the variance of the states along each, `[k]`.
        explained_variance_ratio: its share of the variance in all n directions, `[k]`.
        mean: of the states, `[n]`.
        projections: the states less the mean, along each direction, `[*states, k]`.
    """

    components: Float[Array, "k n"]
    explained_variance: Float[Array, " k"]
    explained_variance_ratio: Float[Array, " k"]
    mean: Float[Array, " n"]
    projections: Float[Array, "*states k"]

    def _repr_html_(self) -> str:
        columns = {"variance": self.explained_variance, "share of all": self.explained_variance_ratio}
        notes = (f"Projections of the states: {in_words(self.projections)}.",)
        return columns_table(self, {"i": range(1, self.explained_variance.shape[-1] + 1)} | columns, notes=notes)

    def project(self, states: Any) -> Float[Array, "*others k"]:
        """Other states in the same coordinates, such as the points that `fixed_points` found: `[*others, n]`."""
        X, leading = _vectors(states)
        if X.shape[1] != len(self.mean):
            raise ValueError(
                f"The states have {counted(X.shape[1], 'number')}, but the components are of {len(self.mean)}: pass states "
                "of the same recurrence."
            )
        return ((X.astype(self.mean.dtype) - self.mean[None]) @ self.components.T).reshape(
            *leading, len(self.components)
        )


def principal_components(states: Any, *, num_components: int | None = None, valid: Any = None) -> PrincipalComponents:
    r"""Principal components of the states that a recurrence goes through.

    Cov(h) = Σᵢ λᵢ wᵢ wᵢᵀ,  projectionsₛᵢ = wᵢᵀ (hₛ − mean h)

    over all states s, of all time steps and rows together; the covariance is over their number less one. Time
    O(S n min(S, n)) for S states, memory O(S n), by a singular value decomposition of the states. To be jitted.

    Args:
        states: `[*states, n]`, for example `[time, batch, n]`; or a carry with such leaves, whose numbers are put together in
            order (of an LSTM: h, then c).
        num_components: k, the largest ones; all min(S, n) by default.
        valid: booleans `[*states]`: False for padded steps, which count neither in the mean nor in the covariance, but are
            projected too.

    Returns:
        `PrincipalComponents`; its `project` takes other states to the same coordinates.

    Raises:
        ValueError: fewer than two states, or none with numbers; leaves that differ in all axes but the last; `num_components`
            outside 1 … min(S, n); `valid` of another shape.
        TypeError: complex states.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.gru(3, 16)
        >>> key = jax.random.key(0)
        >>> _, hs = bptt.scan(cell, cell.init(key), cell.initial_carry((8,)), jax.random.normal(key, (50, 8, 3)))
        >>> found = bptt.principal_components(hs, num_components=2)
        >>> found.components.shape, found.projections.shape
        ((2, 16), (50, 8, 2))

    References:
        Jolliffe, Principal Component Analysis, 2002, doi:10.1007/b98835.
    """
    X, leading, mean, count = _centred(states, valid)
    most = min(X.shape)
    k = most if num_components is None else num_components
    meaning = f"{counted(X.shape[0], 'state')} of {counted(X.shape[1], 'number')} have 1 to {most} components"
    check_count("num_components", k, meaning, most=most)
    counted_in = X if valid is None else jnp.where(jnp.asarray(valid).reshape(-1, 1), X, 0)
    _, sigma, W = jnp.linalg.svd(counted_in, full_matrices=False)
    variances = sigma**2 / (count - 1)
    # The sign of a singular vector is that of the library; this one is the same on every platform.
    largest = jnp.take_along_axis(W, jnp.argmax(jnp.abs(W), axis=1, keepdims=True), axis=1)
    W = jnp.where(largest < 0, -W, W)[:k]
    total = jnp.sum(variances)
    return PrincipalComponents(
        components=W,
        explained_variance=variances[:k],
        explained_variance_ratio=variances[:k] / jnp.where(total > 0, total, 1),
        mean=mean,
        projections=(X @ W.T).reshape(*leading, k),
    )


def participation_ratio(states: Any, *, valid: Any = None) -> Float[Array, ""]:
    r"""How many dimensions the states fill.

    PR = (Σᵢ λᵢ)² / Σᵢ λᵢ²,  λᵢ the eigenvalues of Cov(h)

    1 for states on a line, n for the same variance in every direction, and in between the number of principal components
    that would matter if all mattered equally. As tr(Cov)²/‖Cov‖², without eigenvalues: time O(S n min(S, n)), memory
    O(S n). To be jitted, and differentiable. Few states bias it: it is at most their number less one.

    Args:
        states: `[*states, n]`, or a carry with such leaves, as for `principal_components`.
        valid: booleans `[*states]`: False for padded steps, which do not count.

    Returns:
        One number from 1 to n; nan where all states are the same.

    Raises:
        ValueError, TypeError: as for `principal_components`.

    Example:
        >>> import jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> print(bptt.participation_ratio(jnp.array([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0]])))
        2.0

    References:
        Gao and Ganguli, On simplicity and complexity in the brave new world of large-scale neuroscience, 2015,
        doi:10.1016/j.conb.2015.04.003; Recanatesi et al., 2019, arXiv:1906.00443.
    """
    X, *_ = _centred(states, valid)
    if valid is not None:
        X = jnp.where(jnp.asarray(valid).reshape(-1, 1), X, 0)
    # Scaled: the fourth power of a small number is 0.
    size = jax.lax.stop_gradient(jnp.max(jnp.abs(X)))
    X = X / jnp.where(size > 0, size, 1)
    gram = X.T @ X if X.shape[0] >= X.shape[1] else X @ X.T
    return jnp.trace(gram) ** 2 / jnp.sum(gram**2)


def _centred(states: Any, valid: Any) -> tuple[Array, tuple[int, ...], Array, Array]:
    """States as rows, less their mean; the axes they had, the mean, and how many count."""
    X, leading = _vectors(states)
    if len(X) < 2:
        raise ValueError(f"states hold {counted(len(X), 'state')}, but a variance takes two: pass at least two.")
    first = 0
    if valid is not None:
        valid = as_array("valid", valid, "[*states] of booleans")
        if valid.shape != leading or valid.dtype != bool:
            raise ValueError(
                f"valid is {valid.dtype}{list(valid.shape)}, but the states are {list(leading)}: pass a boolean for each."
            )
        valid = valid.reshape(-1, 1)
        first = jnp.argmax(valid)
    # Less one of them first, so that equal states differ from their mean by nothing, and not by its rounding.
    one = jax.lax.stop_gradient(X[first])
    X = X - one[None]
    mean, count = X.mean(axis=0, where=valid), len(X) if valid is None else jnp.sum(valid)
    return X - mean[None], leading, one + mean, jnp.asarray(count, X.dtype)


def _vectors(states: Any) -> tuple[Array, tuple[int, ...]]:
    """States as rows `[S, n]`, in float32 at least, and the axes they had."""
    leaves = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(states):
        leaf_name = name("states", path)
        # Python's own numbers in lists are leaves of a tree too.
        array = as_array(leaf_name, leaf, "[*states, n]") if not hasattr(leaf, "dtype") else leaf
        if not is_differentiable(array):
            continue
        if jnp.iscomplexobj(array):
            raise TypeError(f"{leaf_name} has dtype {array.dtype}: pass real and imaginary parts as two leaves.")
        array = jnp.asarray(array)
        if array.ndim < 2 or not array.shape[-1]:
            raise ValueError(
                f"{leaf_name} has shape {array.shape}, but [*states, n] is expected: states first, their numbers last."
            )
        if leaves and leaves[0].shape[:-1] != array.shape[:-1]:
            raise ValueError(
                f"{leaf_name} has shape {array.shape}, but the first leaf {leaves[0].shape}: all axes but the last must agree."
            )
        leaves.append(array)
    if not leaves:
        raise ValueError("states have no differentiable numbers: pass floating-point numbers [*states, n].")
    dtype = at_least_float32(max((leaf.dtype for leaf in leaves), key=lambda dtype: dtype.itemsize))
    rows = jnp.concatenate([leaf.astype(dtype) for leaf in leaves], axis=-1)
    return rows.reshape(-1, rows.shape[-1]), rows.shape[:-1]
