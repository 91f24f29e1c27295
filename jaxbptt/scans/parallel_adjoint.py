r"""The exact backward pass of any recurrence in log T rounds, after a forward pass in sequence."""

from collections.abc import Callable
from typing import Any

from jaxbptt.arrays import check_count
from jaxbptt.cells.cell import Adjoint, Cell
from jaxbptt.scans import all_at_once
from jaxbptt.scans.derivative import with_derivative
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.passes import one_pass
from jaxbptt.scans.recurrence import check_known_length, prepare


def parallel_adjoint_scan(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    is_first: Any = None,
    valid: Any = None,
    reset_carry: Any = None,
    reverse: bool = False,
    adjoint: Adjoint | None = None,
    chunk_length: int | None = None,
    unroll: int | bool | None = None,
) -> tuple[Any, Any]:
    r"""`scan` with a backward pass that is parallel in time, for any step.

    c̄ₜ₋₁ = Jₜᵀ c̄ₜ + (∂yₜ/∂cₜ₋₁)ᵀ ȳₜ for all t at once, as an associative scan over the pairs (Jₜᵀ, (∂yₜ/∂cₜ₋₁)ᵀ ȳₜ) in reverse

    Exact: values and gradients are those of `scan`; however nonlinear the step is, this recursion is affine in c̄. Values
    take T steps in sequence. The backward pass has depth 2 log₂ C for each of T/C chunks of C steps; its work is
    O(T n) where Jₜ is diagonal, which is read off the trace, and O(T n³) where it is dense, n times that of the recursion in
    sequence; memory O(C n²) for the Jacobians, and O(T n) for residuals as in `adjoint_scan`.

    It pays on accelerators, for small n. On a CPU the loop is faster (`adjoint_scan`). Derivatives of second order and
    forward mode run the loop over time. A step that branches (`lax.cond`) is linearised one step at a time.

    Args:
        step: as `scan`, like params, init, xs, length, is_first, valid, reset_carry and reverse.
        adjoint: the backward of one step, which must allow `jax.vmap`. By default the `Cell`'s own, or else derived.
        chunk_length: C, time steps whose Jacobians exist at a time. By default as many as take four times the bytes of
            the residuals at most, and 16 at least.
        unroll: time steps in one iteration of the compiled forward loop, as for `lax.scan`. `None` for 8 on CUDA,
            from 32 steps on, and 1 elsewhere.

    Returns:
        The last carry, and the yₜ stacked on a leading time axis.

    Raises:
        ValueError: `chunk_length` below 1; and as `adjoint_scan`.
        TypeError: as `adjoint_scan`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.gru(3, 4)
        >>> params, h_0, xs = cell.init(jax.random.key(0)), cell.initial_carry(), jnp.ones((50, 3))
        >>> loss = lambda scan, params: jnp.mean(scan(cell, params, h_0, xs)[1] ** 2)
        >>> ours = jax.grad(loss, argnums=1)(bptt.parallel_adjoint_scan, params)
        >>> bptt.compare_gradients(ours, jax.grad(loss, argnums=1)(bptt.scan, params)).agrees
        True

    References:
        Wang, Bai and Pekhimenko, BPPSA: Scaling back-propagation by parallel scan algorithm, 2020, arXiv:1907.10134.
    """
    if chunk_length is not None:
        check_count("chunk_length", chunk_length, "it counts time steps")
    r = prepare(step, params, init, xs, length, is_first, valid, reverse=reverse)
    check_known_length("parallel_adjoint_scan", r.length)
    over_time, r = one_pass(step, adjoint, r, Flags(is_first, valid, reset_carry), unroll)
    length = r.length

    def run(params, init, xs):
        return over_time.run(params, init, xs, length)

    def forward(over_time, params, init, xs):
        return over_time.forward(params, init, xs, length)

    def backward(over_time, params, init, xs, residuals, carry_bar, ys_bar):
        return all_at_once.back(
            over_time, params, init, xs, residuals.stacked(), carry_bar, ys_bar, length, chunk_length
        )

    return with_derivative("parallel_adjoint_scan", over_time, run, forward, backward)(r)
