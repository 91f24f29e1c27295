r"""Weights from torch and to it: `state_dict`s of `nn.RNN`, `nn.GRU` and `nn.LSTM`, with layers and both directions.

And those of a small module that has a read-out, and perhaps an embedding, beside one of them.

The layouts are the same except for the biases: torch keeps two of each, of which only the GRU's candidate needs both.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxbptt.arrays import as_array
from jaxbptt.bidirectional import Directions
from jaxbptt.cells.elman import ElmanParams
from jaxbptt.cells.gru import GRUParams
from jaxbptt.cells.lstm import LSTMParams
from jaxbptt.models.architecture import ModelParams
from jaxbptt.network import NetworkParams

LayerParams = ElmanParams | GRUParams | LSTMParams
_RNN, _READOUT, _BIAS, _EMBEDDING = "rnn.", "readout.weight", "readout.bias", "embedding.weight"


def from_torch(state_dict: Any) -> Any:
    r"""Turn a torch `nn.RNN`, `nn.GRU` or `nn.LSTM`, or its `state_dict`, into params, one entry a layer.

    W_xh = weight_ih,  W_hh = weight_hh,  b = bias_ih + bias_hh;  for a GRU, b_n = bias_in and b_hn = bias_hn stay separate

    The kind of cell follows from the shape of `weight_hh`: 1, 3 or 4 blocks of `[hidden, hidden]`. `nn.RNN` must use tanh,
    which its `state_dict` does not record. With two directions each layer is `Directions(forward, backward)`, for
    `bidirectional`. A module with a read-out, and perhaps an embedding, is read too, where its parts are named as in
    `to_torch`.

    Args:
        state_dict: the module, or names to tensors or arrays, as `module.state_dict()` gives them.

    Returns:
        A tuple of params from the lowest layer up, as `stack` takes them, in the dtype of the tensors; for a single layer,
        `(params,) = ...`. With a read-out, `NetworkParams`, whose `cell` are a single layer's params or such a tuple; with
        an embedding, `ModelParams`.

    Raises:
        ValueError: missing or unknown names, projections, a shape that fits no cell, sizes that do not fit together, a
            module with relu.
        TypeError: neither a module nor a mapping, tensors that are not floating-point.

    Example:
        >>> import numpy as np
        >>> from jaxbptt import interop
        >>> (params,) = interop.from_torch({"weight_ih_l0": np.ones((2, 3)), "weight_hh_l0": np.eye(2)})
        >>> params.W_xh.shape, params.b.shape  # no biases: zeros
        ((2, 3), (2,))
    """
    if hasattr(state_dict, "state_dict"):
        nonlinearity = getattr(getattr(state_dict, "rnn", state_dict), "nonlinearity", "tanh")
        if nonlinearity != "tanh":
            raise ValueError(f"The module's nonlinearity is {nonlinearity!r}, but the Elman cell's is tanh.")
        state_dict = state_dict.state_dict()
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"from_torch takes a module or its state_dict(), but got a {type(state_dict).__name__}: pass names to tensors."
        )
    if _READOUT in state_dict:
        return _network_from_torch(state_dict)
    names = re.compile(r"(weight|bias)_(ih|hh)_l(\d+)(_reverse)?")
    foreign = [key for key in state_dict if not isinstance(key, str) or not names.fullmatch(key)]
    if foreign:
        raise ValueError(
            f"{foreign[0]!r} is not a weight of an nn.RNN, nn.GRU or nn.LSTM without projection: pass that module's own "
            "state_dict(), without a prefix, and only these names: weight_ih_l0, weight_hh_l0, bias_ih_l0, bias_hh_l0, these "
            "with _reverse where it has two directions, and so on for further layers; or those of a module with a read-out, "
            f"{_READOUT}, as `to_torch` names them."
        )
    arrays = {key: _array(key, value) for key, value in state_dict.items()}
    layers = sorted({int(key.removesuffix("_reverse").rpartition("_l")[2]) for key in arrays})
    if layers != list(range(len(layers))) or not layers:
        raise ValueError(f"The layers are numbered {layers}, but 0, 1, … without a gap are expected.")
    if not any(key.endswith("_reverse") for key in arrays):
        return tuple(_layer_from_torch(arrays, f"{layer}") for layer in layers)
    return tuple(
        Directions(*(_layer_from_torch(arrays, f"{layer}{end}") for end in ("", "_reverse"))) for layer in layers
    )


def to_torch(
    params: LayerParams | Directions | NetworkParams | ModelParams | Sequence[LayerParams | Directions],
) -> dict[str, np.ndarray]:
    r"""Turn params into a `state_dict` for torch's `nn.RNN`, `nn.GRU` or `nn.LSTM`, as numpy arrays.

    The inverse of `from_torch`: all of b goes to `bias_ih`, and `bias_hh` is zero except for a GRU's b_hn.

    Params with a read-out, of a `network` or of a model that `load` returned, are the `state_dict` of a module that has the
    recurrent layers as `rnn`, the read-out as `readout`, and as `embedding` the vectors of the symbols where it has them:

        class Net(torch.nn.Module):
            def __init__(self, symbols, size, hidden, layers, outputs):
                super().__init__()
                self.embedding = torch.nn.Embedding(symbols, size)    # without embedding: leave it out
                self.rnn = torch.nn.LSTM(size, hidden, layers)
                self.readout = torch.nn.Linear(hidden, outputs)       # without b_y: bias=False

            def forward(self, xs, state=None):
                hs, state = self.rnn(self.embedding(xs), state)
                return self.readout(hs), state

    A model of text without embedding reads one-hot vectors. A model of numbers reads standardised rows, and its outputs are
    `xs[..., targets] + change * readout(hs)`, with the `targets` and the `change` of its `settings["architecture"]`.

    Args:
        params: of one cell, or of a `bidirectional` layer of two, or a sequence of them from the lowest layer up; or
            `NetworkParams` or `ModelParams`, whose `cell` is one of these.

    Returns:
        Names to arrays, in float32 for bfloat16 params, since numpy has no bfloat16; load with
        `module.load_state_dict({name: torch.as_tensor(array) for name, array in ...items()})`.

    Raises:
        ValueError: biases that do not fit the weights; layers of different kinds or sizes below a read-out, of which torch
            makes no one module.
        TypeError: params that are not those of `elman`, `gru` or `lstm`, such as a layer-normalised lstm's; leaves that are
            not arrays of numbers.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> sorted(bptt.interop.to_torch(bptt.gru(3, 2).init(jax.random.key(0))))
        ['bias_hh_l0', 'bias_ih_l0', 'weight_hh_l0', 'weight_ih_l0']
    """
    if isinstance(params, NetworkParams | ModelParams):
        return _network_to_torch(params)
    return _cell_to_torch(params)


def _cell_to_torch(params: Any) -> dict[str, np.ndarray]:
    # One layer's params are a tuple of arrays, whatever its kind.
    layers = [params] if isinstance(params, Directions) or hasattr(params, "_fields") else params
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise TypeError(
            f"to_torch takes ElmanParams, GRUParams or LSTMParams, or a sequence of them, but got a {type(params).__name__}."
        )
    state_dict, directions = {}, []
    for layer, p in enumerate(layers):
        both = zip(("", "_reverse"), p, strict=True) if isinstance(p, Directions) else [("", p)]
        directions += [(f"{layer}{end}", params) for end, params in both]
    for layer, p in directions:
        if not isinstance(p, LayerParams):
            raise TypeError(
                f"Layer {layer} is a {type(p).__name__}, but ElmanParams, GRUParams or LSTMParams is expected, since torch has "
                "no other cells: models.save_weights writes any weights to a file."
            )
        arrays = {leaf: _for_torch(f"{leaf} of layer {layer}", value) for leaf, value in p._asdict().items()}
        tensors = {"weight_ih": arrays["W_xh"], "weight_hh": arrays["W_hh"], "bias_ih": arrays["b"]}
        tensors["bias_hh"] = np.zeros_like(arrays["b"])
        if isinstance(p, GRUParams):
            b_hn = arrays["b_hn"]
            if arrays["b"].shape != (3 * b_hn.size,):
                raise ValueError(
                    f"b of layer {layer} has shape {arrays['b'].shape}, and b_hn {b_hn.shape}: not a GRU's."
                )
            tensors["bias_hh"][2 * b_hn.size :] = b_hn
        state_dict |= {f"{key}_l{layer}": value for key, value in tensors.items()}
    return state_dict


def _network_to_torch(params: NetworkParams | ModelParams) -> dict[str, np.ndarray]:
    cell = _cell_to_torch(params.cell)
    layers = [params.cell] if hasattr(params.cell, "_fields") else list(params.cell)
    kinds = [f"{type(p).__name__} of hidden size {p.W_hh.shape[-1]}" for p in layers if not isinstance(p, Directions)]
    for layer, kind in enumerate(kinds):
        if kind != kinds[0]:
            raise ValueError(
                f"Layer 0 is {kinds[0]} and layer {layer} {kind}, but the layers of a module of torch are of one kind and size: "
                "give each layer to to_torch by itself."
            )
    state_dict = {f"{_RNN}{name}": array for name, array in cell.items()}
    state_dict[_READOUT] = _for_torch("W_hy", params.W_hy)
    if params.b_y is not None:
        state_dict[_BIAS] = _for_torch("b_y", params.b_y)
    if isinstance(params, ModelParams) and params.embedding is not None:
        state_dict[_EMBEDDING] = _for_torch("embedding", params.embedding)
    return state_dict


def _network_from_torch(state_dict: Mapping[str, Any]) -> NetworkParams | ModelParams:
    names = (_READOUT, _BIAS, _EMBEDDING)
    cell = from_torch({key.removeprefix(_RNN): value for key, value in state_dict.items() if key.startswith(_RNN)})
    foreign = [key for key in state_dict if key not in names and not key.startswith(_RNN)]
    if foreign:
        raise ValueError(
            f"{foreign[0]!r} belongs to no part of a module as `to_torch` describes it: rnn, readout and embedding are expected."
        )
    arrays = {key: _array(key, state_dict[key]) for key in names if key in state_dict}
    first, last = (layer.forward if isinstance(layer, Directions) else layer for layer in (cell[0], cell[-1]))
    hidden = last.W_hh.shape[1] * (2 if isinstance(cell[-1], Directions) else 1)
    W_hy = arrays[_READOUT]
    expected = {_READOUT: ("*", hidden), _BIAS: W_hy.shape[:1], _EMBEDDING: ("*", first.W_xh.shape[1])}
    for key, array in arrays.items():
        sizes = expected[key]
        if array.ndim != len(sizes) or any(
            size not in ("*", found) for size, found in zip(sizes, array.shape, strict=True)
        ):
            shape = ", ".join(map(str, sizes))
            raise ValueError(
                f"{key} has shape {array.shape}, but [{shape}] is expected from the shapes of the other weights."
            )
    b_y = jnp.asarray(arrays[_BIAS]) if _BIAS in arrays else None
    params = NetworkParams(cell[0] if len(cell) == 1 else cell, jnp.asarray(W_hy), b_y)
    if _EMBEDDING not in arrays:
        return params
    b_y = jnp.zeros_like(params.W_hy[:, 0]) if b_y is None else b_y
    return ModelParams(params.cell, params.W_hy, b_y, jnp.asarray(arrays[_EMBEDDING]))


def _layer_from_torch(arrays: Mapping[str, np.ndarray], layer: str) -> LayerParams:
    for key in (f"weight_ih_l{layer}", f"weight_hh_l{layer}"):
        if key not in arrays:
            raise ValueError(f"{key!r} is missing from the state_dict.")
    W_xh, W_hh = arrays[f"weight_ih_l{layer}"], arrays[f"weight_hh_l{layer}"]
    if W_hh.ndim != 2 or W_xh.ndim != 2 or len(W_xh) != len(W_hh):
        raise ValueError(
            f"weight_ih_l{layer} has shape {W_xh.shape} and weight_hh_l{layer} {W_hh.shape}: two matrices with the same "
            "number of rows are expected."
        )
    rows, hidden = W_hh.shape
    if not W_hh.size or not W_xh.size:
        raise ValueError(f"weight_ih_l{layer} has shape {W_xh.shape}, weight_hh_l{layer} {W_hh.shape}: they are empty.")
    zeros = np.zeros(rows, W_hh.dtype)
    b_ih, b_hh = arrays.get(f"bias_ih_l{layer}", zeros), arrays.get(f"bias_hh_l{layer}", zeros)
    if b_ih.shape != (rows,) or b_hh.shape != (rows,):
        raise ValueError(
            f"The biases of layer {layer} have shapes {b_ih.shape} and {b_hh.shape}, but ({rows},) is expected."
        )
    if rows == hidden:
        return ElmanParams(*map(jnp.asarray, (W_xh, W_hh, b_ih + b_hh)))
    if rows == 3 * hidden:
        b_hh_rz, b_hn = np.split(b_hh, [2 * hidden])
        b = b_ih + np.concatenate([b_hh_rz, np.zeros_like(b_hn)])
        return GRUParams(*map(jnp.asarray, (W_xh, W_hh, b, b_hn)))
    if rows == 4 * hidden:
        return LSTMParams(*map(jnp.asarray, (W_xh, W_hh, b_ih + b_hh)))
    raise ValueError(
        f"weight_hh_l{layer} has shape {W_hh.shape}, but 1, 3 or 4 blocks of [{hidden}, {hidden}] are expected."
    )


def _array(key: str, value: Any) -> np.ndarray:
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        # torch can't convert bfloat16 to numpy; by way of float32 no digit changes.
        value = value.float().numpy().astype(jnp.bfloat16) if str(value.dtype) == "torch.bfloat16" else value.numpy()
    array = np.asarray(value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(f"{key} is of dtype {array.dtype}, but floating-point numbers are expected.")
    return array


def _for_torch(leaf: str, value: Any) -> np.ndarray:
    array = np.array(as_array(leaf, value, "a weight or a bias"))
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array
