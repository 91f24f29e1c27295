r"""Cells of Flax and Equinox as a `Cell` and its params.

Neither library is imported here: who passes a module has imported its library.
"""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt.cells import dense
from jaxbptt.cells.cell import Cell


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
