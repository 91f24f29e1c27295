r"""Random feedback local online learning: the recurrence of the influence is the leak of each unit alone."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.arrays import as_array, is_floating
from jaxbptt.influences import own_units
from jaxbptt.influences.influence import Influence
from jaxbptt.influences.own_units import OwnUnits
from jaxbptt.influences.state import jacobians, vector
from jaxbptt.programs.pattern import reached_entries
from jaxbptt.trees import name


def rflo(leak: Any = None) -> Influence:
    r"""Random feedback local online learning: each entry of the carry keeps its influence by its leak, and no other's.

    Mₜ = λ ⊙ Mₜ₋₁ + Fₜ,  λ = `leak`, or the element-wise part of the diagonal of Jₜ

    Biased: it leaves out what goes from one unit to another, or through W_hh at all. In a leaky network, as `rate`, λ = 1 − dt/τ;
    with no leak, as in `elman`, only the last step is left. Time and memory O(p) a step and row where each weight leads to one
    unit in a step, as in every cell; in a stack M has leaves `[n, *leaf]`, and a step takes O(n p).

    What is random in the paper, the weights that bring the error back from the output, is left to the step: here the learning
    signal is the true one, dL/dcₜ through yₜ, as if the feedback weights were the transposed readout.

    Args:
        leak: λ, a number for all entries of the carry, or an array that broadcasts against each leaf of it. `None` reads it off
            the step: of ∂cₜ[i]/∂cₜ₋₁[i] what does not pass through a product with a matrix, or a sum, and so no weight.

    Returns:
        An `Influence`.

    Raises:
        ValueError: in a gradient, a leak whose shape does not fit the carry.
        TypeError: a leak that is no real number or array of them.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell = bptt.rate(3, 4, tau=100.0, dt=20.0)
        >>> params, xs = cell.init(jax.random.key(0)), jax.random.normal(jax.random.key(1), (20, 3))
        >>> def loss(params, leak):
        ...     influence = bptt.influences.rflo(leak)
        ...     return jax.numpy.mean(bptt.forward_scan(cell, params, cell.initial_carry(), xs, influence=influence)[1] ** 2)
        >>> found, given = (jax.grad(loss)(params, leak).W_hh for leak in (None, 1 - 20 / 100))
        >>> bool(jax.numpy.allclose(found, given))
        True

    References:
        Murray, Local online learning in recurrent networks with random feedback, 2019, doi:10.7554/eLife.43299.
    """
    if leak is not None:
        found = as_array("leak", leak, "a number for all entries of the carry, or an array of them")
        if not is_floating(found.dtype):
            raise TypeError(
                f"leak has dtype {found.dtype}, but it is what an entry of the carry keeps of itself: pass real numbers."
            )
    return Influence(_init, partial(_advance, leak), own_units.pull)


def _init(step: Any, params: Any, carry: Any, x: Any) -> Any:
    of_params, _ = reached_entries(step, params, carry, x)
    layout = own_units.layout_of(params, carry, of_params)
    return own_units.init(layout, params, carry)


def _advance(leak: Any, step: Any, params: Any, carry: Any, x: Any, M: Any, key: Any) -> Any:
    kept = _kept(leak, step, params, carry, x)
    if isinstance(M, OwnUnits):

        def between(k, j, at):
            return kept[k].reshape(-1) if k == j else None

        return own_units.advance(step, params, carry, x, M, between)
    _, F = jacobians(step, params, carry, x)
    along = vector(kept)
    return jax.tree.map(lambda leaf, new: along.reshape(-1, *(1,) * (leaf.ndim - 1)) * leaf + new, M, F)


def _kept(leak: Any, step: Any, params: Any, carry: Any, x: Any) -> list[Any]:
    """For each leaf of the carry what each of its entries keeps of itself."""
    leaves = jax.tree.leaves(carry)
    if leak is not None:
        for path, leaf in jax.tree.leaves_with_path(carry):
            if not _broadcasts(np.shape(leak), leaf.shape):
                raise ValueError(
                    f"leak has shape {np.shape(leak)}, but {name('carry', path)} has {leaf.shape} in a row of the batch: pass one "
                    "number, or an array that broadcasts against each leaf of the carry."
                )
        return [jnp.broadcast_to(jnp.asarray(leak, leaf.dtype), leaf.shape) for leaf in leaves]
    sums = own_units.state_terms(step, params, carry, x)
    return [
        jnp.broadcast_to(found.elementwise.entries(k, np.arange(leaf.size)), leaf.size).reshape(leaf.shape)
        for k, (found, leaf) in enumerate(zip(sums, leaves, strict=True))
    ]


def _broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(shape[::-1], to[::-1], strict=False))
