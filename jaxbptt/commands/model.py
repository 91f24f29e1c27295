"""The network to train: its update, its validation, and the text that it samples."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxbptt.cells import CELLS
from jaxbptt.cells.stack import stack
from jaxbptt.commands.sources import Source
from jaxbptt.network import network
from jaxbptt.training import losses, sharding
from jaxbptt.training.chunks import Stream
from jaxbptt.training.tbptt import TrainState, tbptt

CLIP = 1.0


class Model(NamedTuple):
    """A run as compiled functions.

    Attributes:
        state: to start from.
        update: `(state, chunk) -> (state, metrics)`; donates the state it is given.
        validate: `(params) -> mean loss` over the validation part, or `None`.
        sample: `(params, count, temperature, key) -> symbol numbers`.
    """

    state: TrainState
    update: Callable[..., Any]
    validate: Callable[[Any], float] | None
    sample: Callable[..., np.ndarray]


def build(options: argparse.Namespace, source: Source, mesh: Mesh | None, max_validation_chunks: int) -> Model:
    """The model of the options for the source, on one device or on a mesh."""
    make = CELLS[options.cell]
    layers = [make(source.features if i == 0 else options.hidden, options.hidden) for i in range(options.layers)]
    cell = layers[0] if len(layers) == 1 else stack(*layers)
    net = network(cell, source.features)
    loss_of = losses.cross_entropy if source.text else losses.mean_squared_error

    def read(xs):
        return jax.nn.one_hot(xs, source.features, dtype=jnp.float32) if source.text else xs

    def loss(params, carry, chunk, *, scan, key):
        carry, outputs = net.apply(params, carry, read(chunk.xs), scan=scan)
        return loss_of(outputs, chunk.targets, mask=chunk.mask), (carry, jnp.sum(chunk.mask))

    rate = options.learning_rate
    if options.schedule == "cosine":
        rate = optax.cosine_decay_schedule(rate, options.updates)
    functions = tbptt(loss, optax.adam(rate), clip=optax.clip_by_global_norm(CLIP), has_aux=True)
    init, update = functions
    key_params, key_run = jax.random.split(jax.random.key(options.seed))
    state = init(net.init(key_params), cell.initial_carry((options.batch,)), key_run)
    place: Callable[[Any], Any] = lambda chunk: chunk  # noqa: E731
    shardings: dict[str, Any] = {}
    if mesh is not None:
        state = sharding.shard_state(state, mesh)
        place = partial(sharding.shard_chunk, mesh=mesh)
        # The state keeps its sharding: for another one the update would be compiled again.
        replicated = NamedSharding(mesh, PartitionSpec())
        shardings = {"out_shardings": (jax.tree.map(lambda leaf: leaf.sharding, state), replicated)}
    compiled = jax.jit(update, donate_argnums=0, **shardings)
    evaluate = jax.jit(functions.evaluate)
    # A copy, since `update` donates its state.
    start = jax.tree.map(jnp.copy, state._replace(params=(), opt_state=()))

    def validate(stream: Stream, params: Any) -> float:
        validation, results = start._replace(params=params), []
        for position in range(min(len(stream), max_validation_chunks)):
            validation, measured = evaluate(validation, place(stream.at(position)))
            results.append((measured.loss, measured.aux))
        means, steps = np.array(jax.device_get(results), float).T
        return float(np.average(means, weights=steps))

    @partial(jax.jit, static_argnums=2)
    def sample(params, prompt, count, temperature, key):
        carry, outputs = net.apply(params, cell.initial_carry(), read(prompt))

        def draw(state, key):
            carry, logits = state
            drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
            symbol = jnp.where(temperature > 0, drawn, jnp.argmax(logits))
            carry, outputs = net.apply(params, carry, read(symbol[None]))
            return (carry, outputs[-1]), symbol

        return jax.lax.scan(draw, (carry, outputs[-1]), jax.random.split(key, count))[1]

    def sample_locally(params: Any, count: int, temperature: float, key: Any) -> np.ndarray:
        local = jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), params)
        return np.asarray(sample(local, source.prompt, count, np.float32(temperature), key))

    return Model(
        state,
        lambda state, chunk: compiled(state, place(chunk)),
        partial(validate, source.validation) if source.validation is not None else None,
        sample_locally,
    )
