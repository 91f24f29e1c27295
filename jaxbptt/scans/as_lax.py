r"""A strategy called as `lax.scan` is called."""

from collections.abc import Callable
from typing import Any

from jaxbptt.arrays import check_callable


def as_lax(strategy: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    r"""Make a drop-in for `jax.lax.scan` of a strategy.

    cₜ, yₜ = f(cₜ₋₁, xₜ),  t = 1 … T

    The gradient is that of the strategy, and arrays that f closes over get theirs. Costs what the strategy costs.

    Args:
        strategy: `adjoint_scan`, or another; with options as `functools.partial(checkpointed_scan, segment_length=10)`.

    Returns:
        `scan(f, init, xs=None, length=None, reverse=False, unroll=1) -> (carry, ys)`, with the arguments of `lax.scan`:
        `f(carry, x) -> (carry, y)`, and `reverse` as for `jaxbptt.scan`. Options at these defaults are left to the strategy.

    Raises:
        TypeError: a strategy or an f that is not a function; and from the scan what the strategy raises.
        ValueError: from the scan, `_split_transpose=True`, an option of `lax.scan` for how JAX takes the gradient; and what
            the strategy raises.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> scan = bptt.as_lax(bptt.adjoint_scan)
        >>> def last(w, scan):
        ...     return scan(lambda h, x: (jnp.tanh(w * h + x), h), 0.1, jnp.linspace(0.0, 1.0, 50))[0]
        >>> print(f"{jax.grad(last)(0.5, scan):.4f} {jax.grad(last)(0.5, jax.lax.scan):.4f}")
        0.1981 0.1981

    References:
        `jax.lax.scan`, https://docs.jax.dev/en/latest/_autosummary/jax.lax.scan.html.
    """
    check_callable("strategy", strategy, "adjoint_scan, or another")

    def scan(
        f: Callable[[Any, Any], tuple[Any, Any]],
        init: Any,
        xs: Any = None,
        length: int | None = None,
        reverse: bool = False,
        unroll: int | bool = 1,
        _split_transpose: bool = False,
    ) -> tuple[Any, Any]:
        """`lax.scan` with the gradient of the strategy."""
        check_callable("f", f, "f(carry, x) -> (carry, y)")
        if _split_transpose:
            raise ValueError(
                "_split_transpose says how JAX takes the gradient of lax.scan, and here the strategy says it: leave it out."
            )
        # A functools.partial may have options of its own.
        options: dict[str, Any] = {"reverse": reverse} if reverse is not False else {}
        if unroll is True or unroll != 1:  # True, which equals 1, unrolls all of it
            options["unroll"] = unroll
        return strategy(lambda _, carry, x: f(carry, x), None, init, xs, length=length, **options)

    return scan
