r"""Cells of Flax and Equinox as steps, and weights from torch and to it.

torch: `state_dict`s of `nn.RNN`, `nn.GRU` and `nn.LSTM`, with one or more layers. The layouts are the same except for the
biases: torch keeps two of each, of which only the GRU's candidate needs both.

None of the three libraries is imported here: who passes a module has imported its library.
"""

import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxbptt.arrays import as_array
from jaxbptt.cells import dense
from jaxbptt.cells.cell import Cell
from jaxbptt.cells.elman import ElmanParams
from jaxbptt.cells.gru import GRUParams
from jaxbptt.cells.lstm import LSTMParams

LayerParams = ElmanParams | GRUParams | LSTMParams


def from_flax(module: Any, variables: Any = None) -> tuple[Cell, Any]:
    r"""A cell of Flax as a step and its params, for every strategy and every analysis.

    cₜ, yₜ = module(cₜ₋₁, xₜ)

    `nnx.LSTMCell`, `OptimizedLSTMCell`, `GRUCell`, `SimpleCell` and any module of yours that is called in this way; those of
    `flax.linen` with their variables. The computation is the module's own: `adjoint_scan` derives the backward of it.

    Args:
        module: an `nnx.Module`, or a `linen.Module`. Not an `RNN`, which is a loop already: pass its `cell`.
        variables: of a linen module, what its `init` returned; `None` for nnx, whose modules hold their own.

    Returns:
        `(cell, params)`. For nnx, `params` are the `nnx.State` of all its `nnx.Param`, the rest of the module is constant;
        `nnx.update(module, params)` puts them back. For linen they are `variables`. `cell.initial_carry(batch_shape)` is
        the module's `initialize_carry`, and `cell.init` gives the same params whatever the key.

    Raises:
        TypeError: neither an nnx nor a linen module, an `RNN`, variables that are missing or too many.
        ValueError: at a step, an nnx module that changes more than its carry, such as the statistics of a batch norm, or a
            counter of random numbers: the change would be lost. When the carry is made, a module that does not say which it
            starts with.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from flax import nnx
        >>> import jaxbptt as bptt
        >>> cell, params = bptt.interop.from_flax(nnx.GRUCell(3, 5, rngs=nnx.Rngs(0)))
        >>> loss = lambda params, xs: (bptt.adjoint_scan(cell, params, cell.initial_carry((2,)), xs)[1] ** 2).mean()
        >>> jax.grad(loss)(params, jnp.ones((7, 2, 3)))["dense_h"]["kernel"].shape
        (5, 15)
    """
    nnx, linen = sys.modules.get("flax.nnx"), sys.modules.get("flax.linen")
    if nnx is not None and isinstance(module, nnx.Module):
        _check_flax(module, nnx.RNN)
        if variables is not None:
            raise TypeError("An nnx module holds its own variables: leave them out.")
        return _from_nnx(nnx, module)
    if linen is not None and isinstance(module, linen.Module):
        _check_flax(module, linen.RNN)
        if not isinstance(variables, Mapping):
            raise TypeError(
                f"A linen module is called with its variables, but got a {type(variables).__name__}: pass what "
                "module.init(key, carry, x) returned."
            )
        return _from_linen(module, variables)
    raise TypeError(
        f"from_flax takes an nnx.Module, or a linen.Module and its variables, but got a {type(module).__name__}: "
        "pass a cell, such as nnx.GRUCell(3, 5, rngs=nnx.Rngs(0))."
    )


def from_equinox(module: Any) -> tuple[Cell, Any]:
    r"""A cell of Equinox as a step and its params, for every strategy and every analysis.

    cₜ = module(xₜ, cₜ₋₁),  yₜ = cₜ, or the first entry of cₜ where that is a tuple: the h of (h, c)

    `eqx.nn.GRUCell`, `eqx.nn.LSTMCell`, and any module of yours that is called in this way, with one row, whose state is a
    vector or a tuple of vectors: over batch axes it is mapped. For any other, write a step of your own.

    Args:
        module: an `eqx.Module`.

    Returns:
        `(cell, params)`: the module with its floating-point arrays alone, as `eqx.filter_grad` differentiates it, so that
        `jax.grad` and optax take it; everything else in the module is constant. `eqx.combine(params, module)` puts them
        back. `cell.initial_carry(batch_shape)` are zeros, for the two cells of Equinox, and `cell.init` gives the same
        params whatever the key.

    Raises:
        TypeError: no Equinox module, one that can't be called.
        ValueError: when the carry is made, a module that is neither of the two cells of Equinox.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import equinox as eqx
        >>> import jaxbptt as bptt
        >>> cell, params = bptt.interop.from_equinox(eqx.nn.GRUCell(3, 5, key=jax.random.key(0)))
        >>> loss = lambda params, xs: (bptt.adjoint_scan(cell, params, cell.initial_carry((2,)), xs)[1] ** 2).mean()
        >>> jax.grad(loss)(params, jnp.ones((7, 2, 3))).weight_hh.shape
        (15, 5)
    """
    eqx = _equinox_of(module)
    params, constants = eqx.partition(module, eqx.is_inexact_array)

    def initial_carry(batch_shape: tuple[int, ...] = ()) -> Any:
        if not isinstance(module, eqx.nn.GRUCell | eqx.nn.LSTMCell):
            raise ValueError(
                f"A {type(module).__name__} does not say which carry it starts with: pass one of your own to the scan."
            )
        h, c = (dense.zeros(batch_shape, module.hidden_size, module.weight_hh.dtype) for _ in range(2))
        return (h, c) if isinstance(module, eqx.nn.LSTMCell) else h

    def step(params, carry, x):
        call = eqx.combine(params, constants)
        for _ in range(jnp.ndim(jax.tree.leaves(carry)[0]) - 1):
            call = jax.vmap(call)
        carry = call(x, carry)
        return carry, carry[0] if isinstance(carry, tuple) else carry

    return Cell(lambda key: params, initial_carry, step), params


def from_torch(state_dict: Any) -> tuple[LayerParams, ...]:
    r"""Turn a torch `nn.RNN`, `nn.GRU` or `nn.LSTM`, or its `state_dict`, into params, one entry a layer.

    W_xh = weight_ih,  W_hh = weight_hh,  b = bias_ih + bias_hh;  for a GRU, b_n = bias_in and b_hn = bias_hn stay separate

    The kind of cell follows from the shape of `weight_hh`: 1, 3 or 4 blocks of `[hidden, hidden]`. `nn.RNN` must use tanh,
    which its `state_dict` does not record.

    Args:
        state_dict: the module, or names to tensors or arrays, as `module.state_dict()` gives them.

    Returns:
        A tuple of params from the lowest layer up, as `stack` takes them, in the dtype of the tensors; for a single layer,
        `(params,) = ...`.

    Raises:
        ValueError: missing or unknown names, two directions, projections, a shape that fits no cell, a module
            with relu.
        TypeError: neither a module nor a mapping, tensors that are not floating-point.

    Example:
        >>> import numpy as np
        >>> from jaxbptt import interop
        >>> (params,) = interop.from_torch({"weight_ih_l0": np.ones((2, 3)), "weight_hh_l0": np.eye(2)})
        >>> params.W_xh.shape, params.b.shape  # no biases: zeros
        ((2, 3), (2,))
    """
    if hasattr(state_dict, "state_dict"):
        nonlinearity = getattr(state_dict, "nonlinearity", "tanh")
        if nonlinearity != "tanh":
            raise ValueError(f"The module's nonlinearity is {nonlinearity!r}, but the Elman cell's is tanh.")
        state_dict = state_dict.state_dict()
    if not isinstance(state_dict, Mapping):
        raise TypeError(
            f"from_torch takes a module or its state_dict(), but got a {type(state_dict).__name__}: pass names to tensors."
        )
    names = re.compile(r"(weight|bias)_(ih|hh)_l(\d+)")
    foreign = [key for key in state_dict if not isinstance(key, str) or not names.fullmatch(key)]
    if foreign:
        raise ValueError(
            f"{foreign[0]!r} is not a weight of a unidirectional nn.RNN, nn.GRU or nn.LSTM without projection: pass that "
            "module's own state_dict(), without a prefix, and only these names: weight_ih_l0, weight_hh_l0, bias_ih_l0, "
            "bias_hh_l0, and so on for further layers."
        )
    arrays = {key: _array(key, value) for key, value in state_dict.items()}
    layers = sorted({int(key.rpartition("_l")[2]) for key in arrays})
    if layers != list(range(len(layers))) or not layers:
        raise ValueError(f"The layers are numbered {layers}, but 0, 1, … without a gap are expected.")
    return tuple(_layer_from_torch(arrays, layer) for layer in layers)


def to_torch(params: LayerParams | Sequence[LayerParams]) -> dict[str, np.ndarray]:
    r"""Turn params into a `state_dict` for torch's `nn.RNN`, `nn.GRU` or `nn.LSTM`, as numpy arrays.

    The inverse of `from_torch`: all of b goes to `bias_ih`, and `bias_hh` is zero except for a GRU's b_hn.

    Args:
        params: of one cell, or a sequence of them from the lowest layer up.

    Returns:
        Names to arrays, in float32 for bfloat16 params, since numpy has no bfloat16; load with
        `module.load_state_dict({name: torch.as_tensor(array) for name, array in ...items()})`.

    Raises:
        ValueError: biases that do not fit the weights.
        TypeError: params that are not those of `elman`, `gru` or `lstm`, leaves that are not arrays of numbers.

    Example:
        >>> import jax
        >>> import jaxbptt as bptt
        >>> sorted(bptt.interop.to_torch(bptt.gru(3, 2).init(jax.random.key(0))))
        ['bias_hh_l0', 'bias_ih_l0', 'weight_hh_l0', 'weight_ih_l0']
    """
    layers = [params] if isinstance(params, LayerParams) else params
    if not isinstance(layers, Sequence) or isinstance(layers, str):
        raise TypeError(
            f"to_torch takes ElmanParams, GRUParams or LSTMParams, or a sequence of them, but got a {type(params).__name__}."
        )
    state_dict = {}
    for layer, p in enumerate(layers):
        if not isinstance(p, LayerParams):
            raise TypeError(
                f"Layer {layer} is a {type(p).__name__}, but ElmanParams, GRUParams or LSTMParams is expected."
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


def _equinox_of(module: Any) -> Any:
    """Equinox, where the module is one of it."""
    eqx = sys.modules.get("equinox")
    if eqx is not None and isinstance(module, eqx.Module) and callable(module):
        return eqx
    raise TypeError(
        f"from_equinox takes an eqx.Module that is called with (x, state), but got a {type(module).__name__}: "
        "pass a cell, such as eqx.nn.GRUCell(3, 5, key=key)."
    )


def _from_nnx(nnx: Any, module: Any) -> tuple[Cell, Any]:
    graph, params, constants = nnx.split(module, nnx.Param, ...)

    def step(params, carry, x):
        # Merged anew at each step, since a call may change the module.
        called = nnx.merge(graph, params, constants, copy=True)
        before = _leaves_by_name(nnx.state(called))
        carry, y = called(carry, x)
        changed = [name for name, leaf in _leaves_by_name(nnx.state(called)).items() if before.get(name) is not leaf]
        if changed:
            raise ValueError(
                f"A {type(module).__name__} changes {changed[0]} when it is called, which would be lost: turn it "
                "off, module.eval(), or write a step of your own that has it in the carry."
            )
        return carry, y

    def start(batch_shape):
        return module.initialize_carry((*batch_shape, getattr(module, "in_features", 1)), nnx.Rngs(0))

    return Cell(lambda key: params, _initial_carry(module, start), step), params


def _leaves_by_name(state: Any) -> dict[str, Any]:
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}


def _from_linen(module: Any, variables: Any) -> tuple[Cell, Any]:
    def start(batch_shape):
        return module.initialize_carry(jax.random.key(0), (*batch_shape, 1))

    return Cell(lambda key: variables, _initial_carry(module, start), module.apply), variables


def _initial_carry(module: Any, start: Any) -> Any:
    def initial_carry(batch_shape: tuple[int, ...] = ()) -> Any:
        dense.check_batch_shape(batch_shape)
        # A cell with more axes than that, a convolutional one, needs the shape of its input.
        if not hasattr(module, "initialize_carry") or getattr(module, "num_feature_axes", 1) != 1:
            raise ValueError(
                f"A {type(module).__name__} does not say which carry it starts with: pass one of your own to the scan."
            )
        return start(batch_shape)

    return initial_carry


def _check_flax(module: Any, rnn: type) -> None:
    if isinstance(module, rnn) or not callable(module):
        raise TypeError(
            f"from_flax takes a cell, called with (carry, x), but got a {type(module).__name__}: of an RNN "
            "pass its cell, rnn.cell."
        )


def _layer_from_torch(arrays: Mapping[str, np.ndarray], layer: int) -> LayerParams:
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
