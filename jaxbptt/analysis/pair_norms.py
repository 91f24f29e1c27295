r"""Norms of the products of Jacobians from many steps to many later ones, a group of starts at a time.

What starts at neighbouring steps is multiplied by the same Jacobians, so the directions of several starts are the columns of
one matrix: as many as make its products fast and still fit into a cache.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxbptt.analysis.norms import norm
from jaxbptt.analysis.operators import JacobianOperators

# Columns multiplied at once.
_COLUMNS = 256


def norms_from(
    J: JacobianOperators, basis: Float[Array, "n r"], starts: np.ndarray, ends: np.ndarray, *, turned: bool = False
) -> Float[Array, "time starts"]:
    """log‖product · basis‖ from each start to every step before its end; −∞ before it, and anything from its end on.

    Starts are sorted. With `turned`, time runs backwards: step 0 is the last one, and the products are the transposes.
    """
    if not len(starts):
        return jnp.zeros((J.length, 0), J.dtype)
    r = basis.shape[1]
    size = norm(basis)
    unit, log_size = basis / size, jnp.log(size)
    group = max(min(_COLUMNS // r, len(starts)), 1)
    groups = -(-len(starts) // group)
    # What is missing in the last group starts where its last member does.
    member = np.minimum(np.arange(groups * group), len(starts) - 1).reshape(groups, group)
    first, last = starts[member].min(axis=1), ends[member].max(axis=1)

    def from_group(inputs):
        starts, first, last = inputs

        def body(t, state):
            V, logs, table = state  # V [n, start, r], of norm 1 for each start
            # The Jacobian of step t takes the state before it to the one after it: turned, that of the step after.
            at_t = jax.tree.map(lambda leaf: leaf[jnp.minimum(J.length - t, J.length - 1) if turned else t], J.at)
            V = (J.pull if turned else J.push)(at_t, V.reshape(J.size, -1)).reshape(V.shape)
            growth = norm(V, (0, 2))
            V, logs = V / jnp.where(growth > 0, growth, 1)[None, :, None], logs + jnp.log(growth)
            V = jnp.where((starts == t)[None, :, None], unit[:, None], V)
            logs = jnp.where(starts == t, log_size, logs)
            return V, logs, table.at[t].set(logs)

        V = jnp.zeros((J.size, group, r), J.dtype)
        logs = jnp.full(group, -jnp.inf, J.dtype)
        table = jnp.full((J.length, group), -jnp.inf, J.dtype)
        return jax.lax.fori_loop(first, last, body, (V, logs, table))[2]

    tables = jax.lax.map(from_group, tuple(map(jnp.asarray, (starts[member], first, last))))
    return jnp.moveaxis(tables, 0, 1).reshape(J.length, groups * group)[:, : len(starts)]
