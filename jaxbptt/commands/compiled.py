"""The network to train, compiled: its update, its validation, and what it needs in memory."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxbptt.commands.memory import available_bytes
from jaxbptt.commands.optimizers import optimizer
from jaxbptt.commands.sources import Source
from jaxbptt.models.architecture import Architecture, ModelNetwork, build
from jaxbptt.tasks import InputError
from jaxbptt.training import losses, sharding
from jaxbptt.training.chunks import Stream
from jaxbptt.training.tbptt import TrainState, tbptt


class Compiled(NamedTuple):
    """A run as compiled functions.

    Attributes:
        network: what is trained.
        state: to start from.
        update: `(state, chunk) -> (state, metrics)`; donates the state it is given.
        validate: `(params) -> mean loss` over the validation part, or `None`.
    """

    network: ModelNetwork
    state: TrainState
    update: Callable[..., Any]
    validate: Callable[[Any], float] | None


def architecture_of(training: Mapping[str, Any], source: Source) -> Architecture:
    """The network that the options of `train` ask for."""
    text = source.vocabulary
    columns = source.columns
    return Architecture(
        cell=training["cell"],
        hidden=training["hidden"],
        layers=training["layers"],
        inputs=len(text.symbols) if text else len(columns.names),  # pyright: ignore[reportOptionalMemberAccess]
        outputs=len(text.symbols) if text else len(columns.targets),  # pyright: ignore[reportOptionalMemberAccess]
        text=text is not None,
        embedding=training["embedding"],
        layer_norm=training["layer_norm"],
        dropout=training["dropout"],
        targets=columns.targets if columns else (),
        change=source.change,
    )


def compile_run(
    architecture: Architecture,
    training: Mapping[str, Any],
    updates: int | None,
    source: Source,
    mesh: Mesh | None,
    max_validation_chunks: int,
) -> Compiled:
    """The functions of a run, on one device or on a mesh. An update has to fit in memory.

    Args:
        architecture: of the network.
        training: the options of `train` by name.
        updates: where the schedule of the learning rate ends.
        source: the data.
        mesh: of the devices that share the batch, or `None`.
        max_validation_chunks: chunks in a validation, at most.

    Raises:
        InputError: an update needs more memory than there is.
    """
    network = build(architecture)
    functions = tbptt(
        _loss(network, architecture, training["dropout"]),
        optimizer(
            training["optimizer"],
            training["learning_rate"],
            weight_decay=training["weight_decay"],
            warmup=training["warmup"],
            schedule=training["schedule"],
            updates=updates,
        ),
        clip=optax.clip_by_global_norm(training["clip"]),
        has_aux=True,
    )
    init, update = functions
    key_params, key_run = jax.random.split(jax.random.key(training["seed"]))

    def start() -> TrainState:
        return init(network.init(key_params), network.cell.initial_carry((training["batch"],)), key_run)

    place: Callable[[Any], Any] = lambda chunk: chunk  # noqa: E731
    state: Any = None
    options: dict[str, Any] = {}
    if mesh is not None:
        state = sharding.shard_state(start(), mesh)
        place = partial(sharding.shard_chunk, mesh=mesh)
        # The state keeps its sharding: for another one the update would be compiled again.
        replicated = NamedSharding(mesh, PartitionSpec())
        options = {"out_shardings": (jax.tree.map(lambda leaf: leaf.sharding, state), replicated)}
    like = jax.eval_shape(start) if state is None else state
    compiled = jax.jit(update, donate_argnums=0, **options).lower(like, place(source.training.at(0))).compile()
    _check_memory(compiled, 1 if mesh is None else len(mesh.local_devices))
    state = start() if state is None else state
    evaluate = jax.jit(functions.evaluate)
    # A copy, since `update` donates its state.
    fresh = jax.tree.map(jnp.copy, state._replace(params=(), opt_state=()))

    def validate(stream: Stream, params: Any) -> float:
        validation, results = fresh._replace(params=params), []
        for position in range(min(len(stream), max_validation_chunks)):
            validation, measured = evaluate(validation, place(stream.at(position)))
            results.append((measured.loss, measured.aux))
        means, counts = np.array(jax.device_get(results), float).T
        return float(np.average(means, weights=counts)) if counts.any() else float("nan")

    return Compiled(
        network,
        state,
        lambda state, chunk: compiled(state, place(chunk)),
        partial(validate, source.validation) if source.validation is not None else None,
    )


def _loss(network: ModelNetwork, architecture: Architecture, dropout: float) -> Callable[..., Any]:
    """The loss of a chunk, with what it is the mean of as aux: how many steps, or entries."""
    width, targets = architecture.inputs, list(architecture.targets)

    def loss(params, carry, chunk, *, scan, key):
        if architecture.text:
            carry, logits = network.apply(params, carry, chunk.xs, scan=scan, key=key)
            return losses.cross_entropy(logits, chunk.targets, mask=chunk.mask), (carry, jnp.sum(chunk.mask))
        # Behind the columns stands whether each entry was observed, where not all were.
        xs, observed = chunk.xs[..., :width], chunk.targets[..., width:]
        carry, outputs = network.apply(params, carry, xs, scan=scan, key=key)
        mask = jnp.broadcast_to(chunk.mask[..., None], outputs.shape)
        if observed.shape[-1]:
            mask &= observed[..., jnp.array(targets)] > 0
        expected = chunk.targets[..., jnp.array(targets)]
        return losses.mean_squared_error(outputs, expected, mask=mask), (carry, jnp.sum(mask))

    return loss


def _check_memory(compiled: Any, devices: int) -> None:
    """Refuse an update that the machine would be killed for."""
    sizes, available = compiled.memory_analysis(), available_bytes(jax.local_devices()[0])
    if sizes is None or available is None:
        return
    needed = (
        sizes.argument_size_in_bytes + sizes.output_size_in_bytes + sizes.temp_size_in_bytes - sizes.alias_size_in_bytes
    )
    if jax.local_devices()[0].platform == "cpu":
        needed *= devices
    if needed > available:
        raise InputError(
            f"an update needs {needed / 2**30:,.1f} GiB, but there are {available / 2**30:,.1f} GiB left: use a smaller "
            "--steps, --batch or --hidden."
        )
