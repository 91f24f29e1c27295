r"""Layers in one step: a cell made of cells, and a backward pass made of theirs."""

import itertools
from collections.abc import Callable
from typing import Any

import jax

from jaxbptt.arrays import check_key
from jaxbptt.cells import dense
from jaxbptt.cells.cell import Adjoint, Cell


def stack(*cells: Cell) -> Cell:
    r"""Cells on top of each other: at each step, each layer reads the output of the one below.

    cₜˡ, yₜˡ = stepˡ(θˡ, cₜ₋₁ˡ, yₜˡ⁻¹)  with  yₜ⁰ = xₜ,  and yₜ = yₜᴸ

    Costs the sum of its layers. The backward pass runs all layers in one loop, top first; the gradient of each layer's
    weights is still one contraction over time outside it. Its residuals are those of the layers and the inputs of the upper
    ones.

    Args:
        *cells: the layers, lowest first; each one's `input_size` is the `hidden_size` of the one below.

    Returns:
        A `Cell` whose params and carry are tuples with one entry a layer. Its `adjoint` is `None` if a layer has none.

    Raises:
        ValueError: no cells given; neighbours whose sizes do not fit, where they are built-in cells.
        TypeError: a layer that is not a `Cell`.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> cell = bptt.stack(bptt.lstm(3, 8), bptt.gru(8, 5))
        >>> carry, y = cell.step(cell.init(jax.random.key(0)), cell.initial_carry(), jax.numpy.ones(3))
        >>> carry[0].c.shape, carry[1].shape, y.shape
        ((8,), (5,), (5,))

    References:
        Hermans and Schrauwen, Training and analysing deep recurrent neural networks, NeurIPS 2013.
    """
    if not cells:
        raise ValueError("stack() got no cells: pass at least one, the lowest layer first.")
    for layer, cell in enumerate(cells):
        if not isinstance(cell, Cell):
            raise TypeError(f"Layer {layer} of the stack is a {type(cell).__name__}, but a Cell is expected.")
    sizes = [getattr(cell.step, "sizes", None) for cell in cells]
    for layer, (below, above) in enumerate(itertools.pairwise(sizes), start=1):
        if below and above and below[1] != above[0]:
            raise ValueError(
                f"Layer {layer} of the stack reads {above[0]} features, but layer {layer - 1} below it gives {below[1]}: "
                f"its input_size must be the hidden_size of the layer below, {below[1]}."
            )

    def init(key: Any) -> tuple[Any, ...]:
        check_key(key)
        return tuple(cell.init(k) for cell, k in zip(cells, jax.random.split(key, len(cells)), strict=True))

    def initial_carry(batch_shape: tuple[int, ...] = ()) -> tuple[Any, ...]:
        return tuple(cell.initial_carry(batch_shape) for cell in cells)

    def check(params, carry):
        for name, given in (("params", params), ("the carry", carry)):
            if not isinstance(given, tuple | list) or len(given) != len(cells):
                raise TypeError(
                    f"stack: {name} is a {type(given).__name__}, but a tuple with one entry for each of the {len(cells)} "
                    "layers is expected: make params with cell.init(key) and the carry with cell.initial_carry(batch_shape)."
                )

    def step(params, carry, x):
        check(params, carry)
        new_carry = []
        for cell, p, c in zip(cells, params, carry, strict=True):
            c, x = cell.step(p, c, x)
            new_carry.append(c)
        return tuple(new_carry), x

    adjoints = [cell.adjoint for cell in cells if cell.adjoint is not None]
    adjoint = _stacked_adjoint(adjoints, check) if len(adjoints) == len(cells) else None
    if sizes[0] and sizes[-1]:
        step = dense.with_sizes(step, sizes[0][0], sizes[-1][1])
    lstms = [layers for cell in cells if (layers := dense.lstm_layers(cell.step))]
    if len(lstms) == len(cells):
        step = dense.with_lstm_layers(step, tuple(itertools.chain(*lstms)))
    return Cell(init, initial_carry, step, adjoint)


def _stacked_adjoint(adjoints: list[Adjoint], check: Callable[..., None]) -> Adjoint:
    layers = range(len(adjoints))

    def forward(params, carry, x):
        check(params, carry)
        new_carry, residuals, inputs = [], [], []
        for layer in layers:
            inputs.append(x)
            (c, x), r = adjoints[layer].forward(params[layer], carry[layer], x)
            new_carry.append(c)
            residuals.append(r)
        return (tuple(new_carry), x), (tuple(residuals), tuple(inputs[1:]))

    def backward(params, saved, x, carry_bar, y_bar):
        residuals, upper_inputs = saved
        inputs = (x, *upper_inputs)
        carry_bars, deltas = [], []
        for layer in reversed(layers):
            args = params[layer], residuals[layer], inputs[layer]
            c_bar, delta = adjoints[layer].backward(*args, carry_bar[layer], y_bar)
            carry_bars.append(c_bar)
            deltas.append((y_bar, delta))
            if layer > 0:
                y_bar = _input_bar(adjoints[layer], *args, y_bar, delta)
        return tuple(reversed(carry_bars)), tuple(reversed(deltas))

    def contract(params, saved, xs, ys_bar, deltas):
        residuals, upper_inputs = saved
        inputs = (xs, *upper_inputs)
        bars = [
            adjoints[layer].contract(params[layer], residuals[layer], inputs[layer], *deltas[layer]) for layer in layers
        ]
        return tuple(params_bar for params_bar, _ in bars), bars[0][1]

    return Adjoint(forward, backward, contract)


def _input_bar(adjoint: Adjoint, params: Any, *at_one_step: Any) -> Any:
    """∂L/∂x of one step, as a contraction over a time axis of length 1; the weight gradients are not used."""
    _, xs_bar = adjoint.contract(params, *jax.tree.map(lambda leaf: leaf[None], at_one_step))
    _, x, _, _ = at_one_step
    return jax.tree.map(lambda leaf, leaf_bar: leaf_bar[0].astype(leaf.dtype), x, xs_bar)
