r"""A recurrent cell with a linear read-out: the network of the textbook, unrolled by any strategy."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.arrays import check_callable, check_key
from jaxbptt.cells import dense
from jaxbptt.cells.cell import Cell
from jaxbptt.scans.adjoint import adjoint_scan


class NetworkParams(NamedTuple):
    """Parameters of a `network`: its cell's, the read-out `W_hy [output, hidden]`, and its bias `b_y [output]` or `None`."""

    cell: Any
    W_hy: Float[Array, "output hidden"]
    b_y: Float[Array, " output"] | None = None


class Network(NamedTuple):
    """A recurrent network as pure functions.

    Attributes:
        init: `(key) -> NetworkParams`.
        apply: `(params, carry, xs, *, scan=adjoint_scan) -> (carry, outputs)`.
    """

    init: Callable[..., NetworkParams]
    apply: Callable[..., Any]


def network(
    cell: Cell,
    output_size: int,
    *,
    bias: bool = False,
    dtype: Any = None,
    output_init: dense.Initializer = dense.fan_in_normal,
    compute_dtype: Any = None,
) -> Network:
    r"""A cell with a linear read-out of its output.

    hₜ = cell(θ, hₜ₋₁, xₜ),  yₜ = W_hy hₜ + b_y

    The read-out is applied to all time steps at once, outside the loop, so ∂L/∂W_hy = Σₜ ȳₜ hₜᵀ is one matrix product, and
    ∂L/∂b_y = Σₜ ȳₜ. Without `bias` there is no b_y.

    The cell is unrolled by `adjoint_scan`; `apply(..., scan=)` takes any other strategy.

    Args:
        cell: any `Cell` whose output is an array `[*batch, hidden]`, with the features of its carry's last leaf, or a
            built-in one, which says how many features its output has.
        output_size: features of y.
        bias: whether there is a b_y; it starts at 0.
        dtype: of `W_hy`, `b_y` and the outputs, to which hₜ is cast; by default `W_hy` and `b_y` have that of the cell's
            state, and nothing is cast.
        output_init: jax initializer of `W_hy`; normal with variance 1/hidden by default.
        compute_dtype: what the factors of the read-out's products are rounded to, as in the cells; the gradient
            of `W_hy`, one product for all steps, is rounded once, at its end.

    Returns:
        A `Network`. `apply(params, carry, xs, *, scan=adjoint_scan)` takes inputs `[time, *batch, features]`, unrolls the
        cell by the strategy given, and returns the last carry and outputs `[time, *batch, output]`.

    Raises:
        ValueError: an output size below 1, a `dtype` or `compute_dtype` that is not floating-point.
        TypeError: no `Cell`, an `output_init` that is not a function, a `bias` that is neither True nor False.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.elman(3, 8)
        >>> net = bptt.network(cell, output_size=2)
        >>> params = net.init(jax.random.key(0))
        >>> carry, ys = net.apply(params, cell.initial_carry(), jnp.ones((10, 3)))
        >>> ys.shape
        (10, 2)
    """
    if not isinstance(cell, Cell):
        raise TypeError(
            f"cell is a {type(cell).__name__}, but a Cell is expected: pass elman(...), stack(...), or your own Cell."
        )
    if not isinstance(bias, bool):
        raise TypeError(f"bias is {bias!r}, but it says whether the read-out has a bias: pass True or False.")
    dense.check_sizes(output_size=output_size)
    if dtype is not None:
        dense.check_dtype(dtype)
    check_callable("output_init", output_init, "a jax initializer, (key, shape, dtype) -> array")
    products = dense.products(compute_dtype)

    def init(key: Array) -> NetworkParams:
        check_key(key)
        key_cell, key_hy = jax.random.split(key)
        state = jax.tree.leaves(cell.initial_carry())[-1]
        own_dtype = state.dtype if dtype is None else dtype
        _, features = getattr(cell.step, "sizes", (None, state.shape[-1]))
        W_hy = dense.gate_blocks(output_init, key_hy, 1, (output_size, features), own_dtype)
        b_y = jnp.zeros(output_size, own_dtype) if bias else None
        return NetworkParams(cell.init(key_cell), W_hy, b_y)

    def apply(
        params: NetworkParams, carry: Any, xs: Any, *, scan: Callable[..., Any] = adjoint_scan
    ) -> tuple[Any, Array]:
        carry, hs = scan(cell, params.cell, carry, xs)
        ys = products.linear(params.W_hy, hs if dtype is None else hs.astype(dtype))
        return carry, ys if params.b_y is None else dense.add_bias(ys, params.b_y)

    return Network(init, apply)
