r"""A network from a description that fits in a file: what the `train` command builds, and `load` builds again."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxbptt.cells import CELLS, dense
from jaxbptt.cells.cell import Cell
from jaxbptt.cells.dropout import dropout
from jaxbptt.cells.stack import stack
from jaxbptt.network import network
from jaxbptt.scans.adjoint import adjoint_scan


class Architecture(NamedTuple):
    """A network in numbers and names, as it stands in a checkpoint.

    Attributes:
        cell: a name in `CELLS`.
        hidden: size of each layer's state.
        layers: how many there are.
        inputs: symbols of a text, or columns of a table that the network reads.
        outputs: symbols, or columns that it predicts.
        text: whether inputs are symbol numbers.
        embedding: size of the vector learnt for each symbol; `None` for one-hot vectors.
        layer_norm: normalised layers, of an lstm.
        dropout: probability that an entry of what a layer above the first, or the read-out, reads is dropped in training.
        targets: the positions among the inputs of the columns that are predicted; empty for a text.
        change: standard deviation of one step's change of each target, the unit in which the network predicts changes.
    """

    cell: str
    hidden: int
    layers: int
    inputs: int
    outputs: int
    text: bool
    embedding: int | None = None
    layer_norm: bool = False
    dropout: float = 0.0
    targets: tuple[int, ...] = ()
    change: tuple[float, ...] = ()


class ModelParams(NamedTuple):
    """Weights of a model: its cell's, the read-out `W_hy [output, hidden]` and `b_y [output]`, and of an embedded text
    the vector of each symbol, `embedding [symbols, size]`."""  # noqa: D205, D209

    cell: Any
    W_hy: Float[Array, "output hidden"]
    b_y: Float[Array, " output"]
    embedding: Float[Array, "symbols size"] | None = None


class ModelNetwork(NamedTuple):
    """A model's network as pure functions; `apply` is `read`, the cell unrolled, and `readout`.

    Attributes:
        init: `(key) -> ModelParams`.
        apply: `(params, carry, xs, *, scan=adjoint_scan, key=None) -> (carry, outputs)`; with a key, dropout is on.
        cell: its `Cell`.
        read: `(params, xs) -> features`, what the cell reads.
        readout: `(params, xs, hs) -> outputs`.
    """

    init: Callable[..., ModelParams]
    apply: Callable[..., Any]
    cell: Cell
    read: Callable[..., Any]
    readout: Callable[..., Any]


def build(architecture: Architecture) -> ModelNetwork:
    r"""The network that an `Architecture` describes.

    Of a text: logitsₜ = W_hy hₜ + b_y, where the cell reads symbols as one-hot or embedded vectors. Of standardised numbers
    it predicts the change of each target column: yₜ = xₜ + s (W_hy hₜ + b_y), with s the `change`.

    Dropout draws one mask for all steps of a call, for the inputs of each layer above the first and of the read-out.

    Args:
        architecture: sizes and names.

    Returns:
        A `ModelNetwork`. Its `apply` takes symbol numbers `[time, *batch]`, or rows `[time, *batch, inputs]`, and returns
        the last carry and logits `[time, *batch, symbols]`, or the predicted next rows `[time, *batch, targets]`.

    Raises:
        ValueError: an unknown cell, sizes below 1, layer normalisation of another cell than an lstm.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from jaxbptt.models.architecture import Architecture, build
        >>> net = build(Architecture("gru", hidden=8, layers=2, inputs=5, outputs=5, text=True, embedding=3))
        >>> params = net.init(jax.random.key(0))
        >>> carry, logits = net.apply(params, net.cell.initial_carry(), jnp.array([0, 4, 2]))
        >>> logits.shape
        (3, 5)

    References:
        Gal and Ghahramani, A theoretically grounded application of dropout in recurrent neural networks, 2016,
        arXiv:1512.05287.
    """
    a = architecture
    if a.cell not in CELLS:
        raise ValueError(f"cell is {a.cell!r}, but it is one of {', '.join(CELLS)}.")
    if a.layer_norm and a.cell != "lstm":
        raise ValueError(f"layer_norm is there for an lstm, not for {a.cell}: leave it out, or use an lstm.")
    dense.check_sizes(layers=a.layers, inputs=a.inputs, **{} if a.embedding is None else {"embedding": a.embedding})
    features = a.embedding or a.inputs
    options = {"layer_norm": True} if a.layer_norm else {}
    layers = [CELLS[a.cell](a.hidden if i else features, a.hidden, **options) for i in range(a.layers)]
    dropped = [dropout(layer, input_rate=a.dropout) for layer in layers[1:]]
    cell = _one_or_stack(layers)
    cell_with_dropout = _one_or_stack([layers[0], *(one.cell for one in dropped)])
    net = network(cell, a.outputs, bias=True)
    targets, change = jnp.array(a.targets, int), jnp.array(a.change, jnp.float32)

    def init(key: Array) -> ModelParams:
        key, key_embedding = jax.random.split(key)
        params = ModelParams(*net.init(key))  # pyright: ignore[reportArgumentType] (a network with `bias` has a b_y)
        if a.embedding is None:
            return params
        return params._replace(embedding=jax.random.normal(key_embedding, (a.inputs, a.embedding), jnp.float32))

    def read(params: ModelParams, xs: Any) -> Array:
        if not a.text:
            return xs
        if params.embedding is not None:
            return params.embedding[xs]
        return jax.nn.one_hot(xs, a.inputs, dtype=jnp.float32)

    def readout(params: ModelParams, xs: Any, hs: Any) -> Array:
        ys = dense.add_bias(dense.products(None).linear(params.W_hy, hs), params.b_y)
        return ys if a.text else xs[..., targets] + change.astype(ys.dtype) * ys

    def apply(
        params: ModelParams, carry: Any, xs: Any, *, scan: Any = adjoint_scan, key: Any = None
    ) -> tuple[Any, Array]:
        if key is None or not a.dropout:
            carry, hs = scan(cell, params.cell, carry, read(params, xs))
            return carry, readout(params, xs, hs)
        batch_shape = jax.tree.leaves(carry)[0].shape[:-1]
        key_readout, *keys = jax.random.split(key, a.layers)
        of_layers = params.cell if a.layers > 1 else (params.cell,)
        masked = [
            of_layers[0],
            *(one.draw(k, p, batch_shape) for one, k, p in zip(dropped, keys, of_layers[1:], strict=True)),
        ]
        carry, hs = scan(cell_with_dropout, tuple(masked) if a.layers > 1 else masked[0], carry, read(params, xs))
        kept = jax.random.bernoulli(key_readout, 1 - a.dropout, hs.shape[1:])
        return carry, readout(params, xs, jnp.where(kept, hs / (1 - a.dropout), 0))

    return ModelNetwork(init, apply, cell, read, readout)


def _one_or_stack(cells: list[Cell]) -> Cell:
    return cells[0] if len(cells) == 1 else stack(*cells)
