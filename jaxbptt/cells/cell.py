r"""The two contracts everything else stands on: what a time step is, and what its hand-written backward pass is.

A `Cell` bundles pure functions, it holds no arrays. Any user's function `step(params, carry, x) -> (carry, y)` stands
wherever a `Cell` does; the bundle only adds how to make parameters, a first carry, and the derivative.
"""

from collections.abc import Callable
from typing import Any, NamedTuple


class Adjoint(NamedTuple):
    r"""The hand-written backward pass of one step, in three parts that run at different times.

    With cₜ, yₜ = step(θ, cₜ₋₁, xₜ), a loss L, and a bar for ∂L/∂·:

    1. `forward(params, carry, x) -> ((carry, y), residuals)`: the step, and the residuals of its backward pass.
    2. `backward(params, residuals, x, carry_bar, y_bar) -> (carry_bar, delta)`: the recursion c̄ₜ, ȳₜ ↦ c̄ₜ₋₁, all that
       must run in sequence. `delta` is what part 3 needs of this step, usually the cotangent of the pre-activation.
    3. `contract(params, residuals, xs, ys_bar, deltas) -> (params_bar, xs_bar)`: every argument but `params` is stacked
       over a leading time axis, and the sum over time (and batch) is taken at once, outside the loop. It is called on
       segments of any length, and the `params_bar` of all segments are summed.

    `carry_bar`, `y_bar` and the results have the tree structure of what they are the derivative of, with `None` in place
    of leaves that have no derivative (integers, booleans, random keys).

    Pass one to `adjoint_scan(..., adjoint=...)`, and check it with `certify`.
    """

    forward: Callable[..., Any]
    backward: Callable[..., Any]
    contract: Callable[..., Any]


class Cell(NamedTuple):
    r"""What one time step computes: `init`, `initial_carry`, `step`, and the hand-derived `adjoint` of `step`.

    Attributes:
        init: `(key) -> params`.
        initial_carry: `(batch_shape=()) -> carry` of zeros with leaves `[*batch, hidden]`.
        step: `(params, carry, x) -> (carry, y)`, for any number of batch axes, without `vmap`.
        adjoint: the hand-derived `Adjoint` of `step`, or `None` where there is none.
    """

    init: Callable[..., Any]
    initial_carry: Callable[..., Any]
    step: Callable[..., Any]
    adjoint: Adjoint | None = None


def step_of(step: Callable[..., Any] | Cell) -> Callable[..., Any]:
    """The step function of a `Cell`, or the function itself."""
    if not callable(step) and not isinstance(step, Cell):
        raise TypeError(
            f"step is a {type(step).__name__}, but a Cell or a function is expected: pass "
            "step(params, carry, x) -> (carry, y)."
        )
    return step.step if isinstance(step, Cell) else step
