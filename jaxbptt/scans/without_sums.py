r"""The backward pass of a step whose params have no gradient: nothing is summed over time.

Where the gradient of x is a product of numbers, as for h ↦ a ⊙ h + b with a and b for inputs, there is nothing that many time
steps at once would do faster. So x̄ₜ is formed where c̄ₜ is, and no δₜ is stored and read again.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt.along_time import at, at_one_step, filled, put, room
from jaxbptt.array_types import as_type
from jaxbptt.programs.hoist import hoisted


def back_without_sums(
    over_time: Any, length: int, params: Any, bar_and_sums: Any, residuals: Any, xs: Any, ys_bar: Any
) -> tuple[Any, Any]:
    """The recursion over all steps of a `Pass`, and the gradient of each x in the same loop."""
    carry_bar, sums = bar_and_sums

    def step_back(params, residuals, x, carry_bar, y_bar):
        y_bar = filled(y_bar)
        carry_bar, deltas = over_time.adjoint.backward(params, residuals, x, carry_bar, y_bar)
        return carry_bar, over_time.weights.input_bar(params, residuals, x, y_bar, deltas)

    residuals_t, x, y_bar = at_one_step((jax.eval_shape(residuals.stacked), xs, ys_bar))
    backward = hoisted(step_back, params, residuals_t, x, carry_bar, y_bar)

    def one_step_back(state, _):
        t, carry_bar, xs_bar = state
        carry_bar, x_bar = backward.call(residuals.at(t), at(xs, t), carry_bar, at(ys_bar, t))
        return (t - 1, carry_bar, put(xs_bar, x_bar, t)), None

    _, x_bar = backward.program.outputs
    leaves, treedef = jax.tree.flatten(room(jax.tree.map(lambda var: as_type(var.aval), x_bar), length))
    # Each is filled with a number of its own: of equal arrays XLA makes one, and copies it for each loop that writes to it.
    xs_bar = treedef.unflatten([leaf + jnp.asarray(i, leaf.dtype) for i, leaf in enumerate(leaves, start=1)])
    state = jnp.array(length - 1, jnp.int32), carry_bar, xs_bar
    (_, carry_bar, xs_bar), _ = jax.lax.scan(one_step_back, state, None, length=length, unroll=over_time.unroll)
    return (carry_bar, sums), xs_bar
