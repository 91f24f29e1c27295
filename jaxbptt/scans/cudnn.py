r"""An LSTM over all time steps in one call of cuDNN, through `jax.experimental.rnn`: on CUDA only, in float32 only.

cuDNN's gates are those of `lstm`, in the same order. Here its arguments are made from ours by operations that JAX
differentiates, and what it can't do is refused. Some of that shows only when a program is transformed or lowered: so all
arrays that go into the call or come out of it pass an identity, a primitive whose rules raise. It also fixes their layout.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.experimental import rnn
from jax.experimental.layout import Layout, with_layout_constraint
from jax.export import is_symbolic_dim
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from jaxbptt.along_time import at_one_step
from jaxbptt.array_types import is_on_devices
from jaxbptt.cells import dense
from jaxbptt.cells.cell import Cell, step_of
from jaxbptt.cells.lstm import LSTMState
from jaxbptt.programs.flagged import select_rows
from jaxbptt.scans.flags import check_flags
from jaxbptt.scans.recurrence import Recurrence, as_arrays, prepare
from jaxbptt.trees import name

Layers = tuple[tuple[int, int], ...]  # (input_size, hidden_size), lowest first


def cudnn_scan(
    step: Callable[..., Any] | Cell,
    params: Any,
    init: Any,
    xs: Any = None,
    *,
    length: int | None = None,
    valid: Any = None,
    **unsupported: Any,
) -> tuple[Any, Any]:
    r"""`scan` of an `lstm`, or of a `stack` of them, by cuDNN: one call for all time steps, on CUDA only.

    cₜ, yₜ = step(θ, cₜ₋₁, xₜ),  t = 1 … T

    Exact: full BPTT, in float32. Time O(T) steps, in one call each for the forward and the backward pass; memory O(T n), a
    buffer that cuDNN keeps for its backward pass. Outside the calls weights are copied, and xs and ys transposed.

    The factors of products are rounded to TF32, with 10 bits after the point, unless `jax.default_matmul_precision` says
    "highest" or "float32"; "bfloat16" is refused by JAX. Derivatives are in reverse mode and of first order alone, since
    cuDNN's backward pass has none. Rows are batch axes of init and xs, any number of them; `jax.vmap` is refused.

    Args:
        step: a `Cell` that `lstm` made, without `compute_dtype`, or a `stack` of such with one hidden size.
        params: as `scan`, like init, xs and length; all arrays are float32.
        valid: as `scan`, but padding stands at the end of each row only: True … True False … False. Known values are
            checked; where traced ones, as under `jax.jit`, are of another form, all results and their gradients are nan.
        **unsupported: `is_first`, `reset_carry`, `reverse`, `unroll` and other options of strategies, which are refused.

    Returns:
        c_T, and the yₜ stacked on a leading time axis.

    Raises:
        ValueError: layers of unequal hidden size, padding before a valid step, a jaxlib without cuDNN, a size that
            `jax.export` leaves open; when it is lowered, another platform than CUDA; and as `scan`.
        TypeError: a step that is not of an `lstm`, other dtypes than float32, another option; forward-mode and second
            derivatives, `jax.vmap`; and as `scan`.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jaxbptt as bptt
        >>> cell = bptt.lstm(3, 4)
        >>> params, carry, xs = cell.init(jax.random.key(0)), cell.initial_carry((2,)), jnp.ones((50, 2, 3))
        >>> on_cuda = "cuda" in jax.devices()[0].client.platform_version
        >>> scan = bptt.cudnn_scan if on_cuda else bptt.adjoint_scan
        >>> gradient = jax.grad(lambda params: jnp.mean(scan(cell, params, carry, xs)[1] ** 2))(params)
        >>> gradient.W_hh.shape
        (16, 4)

    References:
        Appleyard, Kočiský and Blunsom, Optimizing performance of recurrent neural networks on GPUs, 2016,
        arXiv:1604.01946.
    """
    layers = _layers_of(step)
    given = [option for option, value in unsupported.items() if value is not None and value is not False]
    if given:
        raise TypeError(
            f"cudnn_scan has no {' or '.join(given)}: cuDNN runs each row from its first step to its last in one call. Use "
            "adjoint_scan; or, where is_first says only that every row begins with a new sequence, pass is_first=None and "
            "the reset carry as init."
        )
    r = prepare(step, as_arrays("params", params), init, xs, length, valid)
    _check_arrays(r)
    _, y = jax.eval_shape(r.step, r.params, r.init, at_one_step(r.xs))  # the cell's own checks of shapes
    sizes = r.length, *y.shape
    if any(map(is_symbolic_dim, sizes)):
        raise ValueError(
            f"cudnn_scan can't leave sizes open, but ys would have shape {sizes}: cuDNN is asked for its memory while JAX "
            "traces. Export it with fixed numbers of time steps and rows, or use adjoint_scan."
        )
    at_end = None
    if valid is not None:
        valid, at_end = _check_padding(valid, r, y.ndim)
    if 0 in sizes:
        return r.init, jnp.zeros(sizes, y.dtype)
    if not hasattr(getattr(rnn, "gpu_rnn", None), "compute_rnn_workspace_reserve_space_sizes"):
        raise ValueError(
            "cudnn_scan needs cuDNN, and this installation of jaxlib has none: install jax[cuda12] or jax[cuda13] on a "
            "machine with an NVIDIA GPU, or use adjoint_scan, which runs everywhere."
        )
    if valid is None:
        return _run(layers, r.params, r.init, r.xs, jnp.full(y.shape[:-1], r.length, jnp.int32))

    # Padding is replaced, not multiplied by 0, which would keep a nan. A row of padding alone runs one step on zeros.
    zero = jnp.zeros((), y.dtype)
    lengths = valid.sum(axis=0, dtype=jnp.int32)
    starts = lengths > 0
    init = jax.tree.map(lambda leaf: select_rows(starts, leaf, zero), r.init)
    lengths = jnp.expand_dims(jnp.maximum(lengths, 1), range(lengths.ndim, y.ndim - 1))
    xs, lengths = select_rows(valid, r.xs, zero), jnp.broadcast_to(lengths, y.shape[:-1])
    carry, ys = _run(layers, r.params, init, xs, lengths)
    carry, ys = select_rows(starts, carry, r.init), select_rows(valid, ys, zero)
    if at_end is None:
        return carry, ys
    # A factor, not a selection: its nan gets into the gradient as well.
    factor = jnp.where(at_end, zero + 1, jnp.nan)
    return jax.tree.map(lambda leaf: leaf * factor, (carry, ys))


def _run(layers: Layers, params: Any, init: Any, xs: Any, lengths: Any) -> tuple[Any, Any]:
    """The last carry and the outputs of rows that have these lengths, by cuDNN."""
    steps, *batch, features = xs.shape
    rows, hidden = math.prod(batch), layers[0][1]
    weights = jax.tree.leaves(params, is_leaf=lambda leaf: hasattr(leaf, "W_xh"))
    states, treedef = jax.tree.flatten(init, is_leaf=lambda leaf: hasattr(leaf, "h"))
    # cuDNN has two biases, which it adds, and puts the rows first.
    matrices = [matrix.reshape(-1) for layer in weights for matrix in (layer.W_xh, layer.W_hh)]
    biases = [bias for layer in weights for bias in (layer.b, jnp.zeros_like(layer.b))]
    operands = (
        xs.reshape(steps, rows, features).swapaxes(0, 1),
        jnp.stack([state.h.reshape(rows, hidden) for state in states]),
        jnp.stack([state.c.reshape(rows, hidden) for state in states]),
        jnp.concatenate(matrices + biases),
    )
    sizes = features, hidden, len(layers)
    config: Any = jax.config
    # By default JAX reads the precision in each pass, and it may have changed in between.
    options = {"dropout": 0.0, "bidirectional": False, "precision": config.jax_default_matmul_precision}
    outputs: Any = rnn.lstm(*map(_marked, operands), lengths.reshape(rows), *sizes, **options)
    ys, h, c = map(_marked, outputs)
    carry = [LSTMState(*(leaf[i].reshape(*batch, hidden) for leaf in (h, c))) for i in range(len(layers))]
    return treedef.unflatten(carry), ys.swapaxes(0, 1).reshape(steps, *batch, hidden)


def _layers_of(step: Any) -> Layers:
    layers = dense.lstm_layers(step_of(step)) if isinstance(step, Cell) else None
    if layers is None:
        kind = "Cell that is none of these" if isinstance(step, Cell) else type(step_of(step)).__name__
        raise TypeError(
            "cudnn_scan runs a Cell that lstm(...) made, without compute_dtype, or a stack(...) of such: cuDNN computes "
            f"nothing else, and this step is a {kind}. Use adjoint_scan, which takes any step."
        )
    sizes = [hidden for _, hidden in layers]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"The layers of the stack have hidden sizes {sizes}, but cuDNN runs layers of one hidden size: use "
            "adjoint_scan, or make them equal."
        )
    return layers


def _check_arrays(r: Recurrence) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(r._replace(step=None, length=None, reverse=None)):
        if leaf.dtype != jnp.float32:
            raise TypeError(
                f"{name('', path)[1:]} has dtype {leaf.dtype}, but JAX's binding of cuDNN computes in float32 alone: pass "
                "params, init and xs in float32, or use adjoint_scan."
            )
    if any(map(is_on_devices, jax.tree.leaves(r.init))):  # `prepare` gave it what the types of all arrays say
        raise ValueError(
            "cudnn_scan got arrays whose types name devices, which JAX's binding of cuDNN drops, and gradients would be "
            "wrong: split rows by jax.shard_map(..., check_vma=False), or use adjoint_scan."
        )


def _check_padding(valid: Any, r: Recurrence, axes: int) -> tuple[Any, Any]:
    """`valid` as an array; and where its values are traced, whether padding stands at the end of each row."""
    flags = check_flags("valid", valid, r)
    if flags.ndim > axes:
        raise ValueError(
            f"valid has shape {flags.shape}, which says more than which steps of a row are padding: pass [time, *batch]."
        )
    if isinstance(valid, Tracer):
        return flags, ~(flags[1:] & ~flags[:-1]).any()
    known = np.asarray(valid)  # what was given: under `jax.jit` a new array of it is traced
    late = np.argwhere(known[1:] & ~known[:-1])
    if late.size:
        t, *row = late[0].tolist()
        raise ValueError(
            f"valid has padding before a valid step: step {t + 1} of row {tuple(row)} is valid and step {t} is not (counted "
            "from 0). cuDNN takes padding at the end of each row only: move it there, or use adjoint_scan."
        )
    return flags, None


# What is differentiated twice, mapped, or lowered for another platform than CUDA raises as it passes this identity.
_array_p = Primitive("cudnn_scan_array")
# And its tangents this one, which can be transposed, as reverse mode does, but not computed.
_tangent_p = Primitive("cudnn_scan_tangent")


@jax.custom_jvp
def _marked(array: Any) -> Any:
    return _array_p.bind(array)


@_marked.defjvp
def _marked_jvp(primals: Any, tangents: Any) -> Any:
    return _array_p.bind(*primals), _tangent_p.bind(*tangents)


def _row_major(array: Any) -> Any:
    """Row-major, as cuDNN reads and writes it: JAX leaves the layout to XLA, which makes transposes a part of it."""
    return with_layout_constraint(array, Layout(major_to_minor=tuple(range(array.ndim))))


def _refuse(error: type[Exception], message: str) -> Callable[..., Any]:
    def rule(*_: Any, **__: Any) -> Any:
        raise error(f"cudnn_scan {message}")

    return rule


_array_p.def_impl(jax.jit(_array_p.bind))
_array_p.def_abstract_eval(lambda array: array)
mlir.register_lowering(_array_p, mlir.lower_fun(_row_major, multiple_results=False), platform="cuda")
_OTHER_PLATFORM = "runs on CUDA, and is lowered for another platform: use adjoint_scan, which runs everywhere."
mlir.register_lowering(_array_p, _refuse(ValueError, _OTHER_PLATFORM))
_MAPPED = "can't be mapped (jax.vmap, jacrev): let rows be batch axes of init and xs, or map adjoint_scan."
batching.primitive_batchers[_array_p] = _refuse(TypeError, _MAPPED)
_TWICE = "is differentiated twice, but cuDNN's backward pass has no derivative: use adjoint_scan, or scan."
ad.primitive_jvps[_array_p] = _refuse(TypeError, _TWICE)

_FORWARD = "has no forward-mode derivative (jvp, jacfwd, linearize): use jaxbptt.scan, which has both modes."
_refuse_forward_mode = _refuse(TypeError, _FORWARD)
_tangent_p.def_impl(_refuse_forward_mode)
_tangent_p.def_abstract_eval(lambda tangent: tangent)
mlir.register_lowering(_tangent_p, _refuse_forward_mode)
batching.primitive_batchers[_tangent_p] = _refuse_forward_mode
ad.deflinear2(_tangent_p, lambda cotangent, _: [_array_p.bind(cotangent)])
