"""One recurrent layer in every library: the contenders of the speed benchmark.

Each is a layer and its parameters, on the same inputs, of the same size and with the same number of multiply-adds. Those
that share our parameters also compute the same numbers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
from jax.experimental import rnn
from jax.experimental.layout import Layout, with_layout_constraint

import jaxbptt as bptt
from jaxbptt.cells import CELLS

try:
    import haiku as hk
except ImportError:  # left out of the comparison, as torch is
    hk = None

CUDNN = "jax.experimental.rnn"


class Size(NamedTuple):
    """T time steps, B rows, D inputs, H hidden units."""

    T: int
    B: int
    D: int
    H: int

    def __str__(self):
        return "/".join(map(str, self))


class Layer(NamedTuple):
    """A contender: `run(params, xs) -> hs`, all states."""

    run: Callable[..., Any]
    params: Any


def elman_step(params, h, a):
    h = jnp.tanh(a + h @ params.W_hh.T)
    return h, h


def gru_step(params, h, a):
    a_r, a_z, a_n = jnp.split(a, 3, axis=-1)
    h_r, h_z, h_n = jnp.split(h @ params.W_hh.T, 3, axis=-1)
    r, z = jax.nn.sigmoid(a_r + h_r), jax.nn.sigmoid(a_z + h_z)
    n = jnp.tanh(a_n + r * (h_n + params.b_hn))
    h = (1 - z) * n + z * h
    return h, h


def lstm_step(params, state, a):
    h, c = state
    i, f, g, o = jnp.split(a + h @ params.W_hh.T, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    h = jax.nn.sigmoid(o) * jnp.tanh(c)
    return (h, c), h


# Steps that take a = W_xh x + b, what the inputs add to the gates; it is computed at each step or before the loop.
STEPS = {"elman": elman_step, "gru": gru_step, "lstm": lstm_step}


def input_product(params, xs):
    return xs @ params.W_xh.T + params.b


def zeros(kind, size):
    """The first carry of a plain step."""
    h = jnp.zeros((size.B, size.H))
    return (h, h) if kind == "lstm" else h


def ours(kind, size):
    """Layers of this library, and of JAX alone, all with the same parameters."""
    cell, recurrent = CELLS[kind](size.D, size.H), STEPS[kind]
    params = cell.init(jax.random.key(0))

    def plain(params, h, x):
        return recurrent(params, h, input_product(params, x))

    def hoisted(params, xs):
        body = partial(recurrent, params)
        return jax.lax.scan(body, zeros(kind, size), input_product(params, xs))[1]

    def by_lax(step):
        return lambda params, xs: jax.lax.scan(lambda h, x: step(params, h, x), zeros(kind, size), xs)[1]

    def by(scan, step=cell):
        init = cell.initial_carry((size.B,)) if step is cell else zeros(kind, size)
        return lambda params, xs: scan(step, params, init, xs)[1]

    runs = {
        "lax.scan + jax.grad": by_lax(plain),
        "lax.scan, jax.checkpoint": by_lax(jax.checkpoint(plain)),
        "lax.scan, hoisted inputs": hoisted,
        "scan": by(bptt.scan),
        "checkpointed_scan": by(bptt.checkpointed_scan),
        "adjoint_scan (derived)": by(bptt.adjoint_scan, plain),
        "adjoint_scan": by(bptt.adjoint_scan),
    }
    return {name: Layer(run, params) for name, run in runs.items()}


def convolutional(T, B, side, channels):
    """An Elman network of images, written as a bare step."""
    keys = jax.random.split(jax.random.key(0))
    params = [0.1 * jax.random.normal(key, (3, 3, channels, channels)) for key in keys]

    def step(params, h, x):
        of_h, of_x = (
            jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
            for image, kernel in zip((h, x), params, strict=True)
        )
        h = jnp.tanh(of_h + of_x)
        return h, h

    shape = B, side, side, channels
    return step, params, jnp.zeros(shape), (T, *shape)


def linen(cell, T, *shape):
    """A cell of flax.linen as a step."""
    x = jnp.zeros(shape)
    carry = cell.initialize_carry(jax.random.key(0), x.shape)
    return cell.apply, cell.init(jax.random.key(1), carry, x), carry, (T, *shape)


# (step, params, init, shape of xs) of steps that are not this library's; and of small ones, to check that they run.
FOREIGN_STEPS = {
    "convolutional RNN, 20/4/16×16×8": lambda: convolutional(20, 4, 16, 8),
    "flax ConvLSTM, 20/4/16×16×8": lambda: linen(nn.ConvLSTMCell(8, (3, 3)), 20, 4, 16, 16, 8),
    "flax OptimizedLSTM, 128/16/32/64": lambda: linen(nn.OptimizedLSTMCell(64), 128, 16, 32),
    "flax OptimizedLSTM, 256/32/64/128": lambda: linen(nn.OptimizedLSTMCell(128), 256, 32, 64),
}
QUICK_FOREIGN_STEPS = {
    "convolutional RNN, 4/2/5×5×2": lambda: convolutional(4, 2, 5, 2),
    "flax OptimizedLSTM, 4/2/3/4": lambda: linen(nn.OptimizedLSTMCell(4), 4, 2, 3),
}


def of_step(step, params, init):
    """A foreign step with JAX alone, and in the strategies that derive an adjoint for it."""

    def by(scan):
        return Layer(lambda params, xs: scan(step, params, init, xs)[1], params)

    def by_lax(step, params, init, xs):
        return jax.lax.scan(partial(step, params), init, xs)

    return {
        "lax.scan + jax.grad": by(by_lax),
        "checkpointed_scan": by(bptt.checkpointed_scan),
        "adjoint_scan (derived)": by(bptt.adjoint_scan),
    }


def by_flax(kind, size):
    make = {"elman": nnx.SimpleCell, "gru": nnx.GRUCell, "lstm": nnx.OptimizedLSTMCell}[kind]
    graph, params, rest = nnx.split(nnx.RNN(make(size.D, size.H, rngs=nnx.Rngs(0)), time_major=True), nnx.Param, ...)
    init = zeros(kind, size)
    return Layer(lambda params, xs: nnx.merge(graph, params, rest)(xs, initial_carry=init), params)


def by_equinox(kind, size):
    make = {"gru": eqx.nn.GRUCell, "lstm": eqx.nn.LSTMCell}[kind]
    params, static = eqx.partition(make(size.D, size.H, key=jax.random.key(0)), eqx.is_array)

    def run(params, xs):
        cell = eqx.combine(params, static)

        def body(state, x):
            state = jax.vmap(cell)(x, state)
            return state, state[0] if kind == "lstm" else state

        return jax.lax.scan(body, zeros(kind, size), xs)[1]

    return Layer(run, params)


def by_haiku(kind, size):
    def unroll(xs):
        core = {"gru": hk.GRU, "lstm": hk.LSTM}[kind](size.H)
        return hk.dynamic_unroll(core, xs, core.initial_state(size.B))[0]

    init, apply = hk.without_apply_rng(hk.transform(unroll))
    return Layer(apply, init(jax.random.key(0), jnp.zeros((size.T, size.B, size.D))))


def row_major(array):
    """JAX leaves the layouts of cuDNN's arrays to XLA, which moves transposes into them; cuDNN reads rows first."""
    return with_layout_constraint(array, Layout(major_to_minor=tuple(range(array.ndim))))


def by_cudnn(size, params):
    """JAX's binding of cuDNN, which has only an LSTM, and only on a GPU; the numbers are those of our params."""
    weights = jnp.concatenate([*map(jnp.ravel, params), jnp.zeros_like(params.b)])  # cuDNN adds its two biases
    lengths = jnp.full(size.B, size.T, jnp.int32)
    state = jnp.zeros((1, size.B, size.H))

    def run(weights, xs):
        xs = row_major(xs.swapaxes(0, 1))
        ys, _, _ = rnn.lstm(xs, state, state, weights, lengths, size.D, size.H, 1, dropout=0.0, bidirectional=False)
        return row_major(ys).swapaxes(0, 1)

    return Layer(run, weights)


def from_cudnn(loss, gradient, params):
    """What a loss of `by_cudnn` returns, with the gradient in the form of our params, of which it tells the shapes."""
    leaves, start = [], 0
    for leaf in params:
        leaves.append(gradient[start : start + leaf.size].reshape(leaf.shape))
        start += leaf.size
    return loss, type(params)(*leaves)


def in_jax(kind, size):
    """All contenders that JAX compiles, by name."""
    layers = ours(kind, size)
    layers["flax.nnx.RNN"] = by_flax(kind, size)
    if kind != "elman":  # equinox has no such cell, and haiku's has relu instead of tanh
        layers["equinox"] = by_equinox(kind, size)
        if hk is not None:
            layers["haiku.dynamic_unroll"] = by_haiku(kind, size)
    if kind == "lstm" and jax.default_backend() == "gpu":
        layers[CUDNN] = by_cudnn(size, next(iter(layers.values())).params)
    return layers


def by_torch(kind, size, params, xs, target):
    """The layer of torch with our weights, as a call that returns loss and gradients; `None` without torch."""
    try:
        import torch
    except ImportError:
        return None
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        return None
    make = {"elman": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[kind]
    module = make(size.D, size.H).to(device)
    state = {name: torch.tensor(array) for name, array in bptt.interop.to_torch(params).items()}
    module.load_state_dict(state)
    xs, target = (torch.tensor(jax.device_get(array)).to(device) for array in (xs, target))
    weights = list(module.parameters())

    def call():
        loss = ((module(xs)[0] - target) ** 2).mean()
        gradients = torch.autograd.grad(loss, weights)
        if device == "cuda":
            torch.cuda.synchronize()
        return loss, gradients

    return call


def from_torch(loss, gradients):
    """What `by_torch` returns, with the gradient in the form of our params.

    torch adds its two biases, so the gradient of each is that of their sum. It is taken from `bias_ih`, and from `bias_hh`
    only for b_hn, which a GRU does not add to the other bias.
    """
    names = "weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"
    found = {name: gradient.cpu().numpy().copy() for name, gradient in zip(names, gradients, strict=True)}
    rows, hidden = found["weight_hh_l0"].shape
    found["bias_hh_l0"][: 2 * hidden if rows == 3 * hidden else rows] = 0
    (gradient,) = bptt.interop.from_torch(found)
    return loss.item(), gradient


def dense_products(kind, size):
    """The floor: the multiply-adds of a layer and of its gradient as three matrix products, without a recurrence."""
    gates = {"elman": 1, "gru": 3, "lstm": 4}[kind]
    rows, columns = gates * size.H, size.D + size.H

    def products(weights, inputs, deltas):
        a = inputs @ weights.T
        h_bar = deltas @ weights[:, size.D :]
        return a, h_bar, deltas.T @ inputs

    keys = jax.random.split(jax.random.key(2), 3)
    shapes = (rows, columns), (size.T * size.B, columns), (size.T * size.B, rows)
    return products, tuple(jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
