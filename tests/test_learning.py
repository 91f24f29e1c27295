"""Long dependencies are learned by the full gradient and not by a truncated one: a short form of benchmarks/learning.py."""

import jax
import jax.numpy as jnp
import optax
import pytest

import jaxbptt as bptt
from jaxbptt import losses, tasks

STEPS, WAIT, CUT = 100, 10, 10


@pytest.fixture(autouse=True)
def as_users_run_it(strict):
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def sample(key, batch):
    """The adding problem with all markers before the last chunk: the answer depends on steps behind the cut."""
    xs, ys, _ = tasks.adding_problem(steps=STEPS - WAIT).sample(key, batch)
    values = jax.random.uniform(jax.random.fold_in(key, 1), (WAIT, batch, 1))
    unmarked = jnp.concatenate([values, jnp.zeros_like(values)], axis=-1)
    last = jnp.broadcast_to(jnp.arange(STEPS)[:, None] == STEPS - 1, (STEPS, batch))
    return bptt.streams.Chunk(jnp.concatenate([xs, unmarked]), jnp.broadcast_to(ys[:1], (STEPS, batch, 1)), mask=last)


@pytest.mark.parametrize("truncation_length", [None, CUT])
@pytest.mark.costly
def test_adding_problem(truncation_length):
    cell = bptt.lstm(2, 32, chrono_length=STEPS)
    net = bptt.network(cell, 1)

    def loss(params, carry, chunk, *, scan, key):
        _, outputs = net.apply(params, cell.initial_carry((chunk.xs.shape[1],)), chunk.xs, scan=scan)
        return losses.mean_squared_error(outputs, chunk.targets, mask=chunk.mask), carry

    clip = optax.clip_by_global_norm(1.0)
    init, update = bptt.tbptt(loss, optax.adam(2e-2), truncation_length=truncation_length, clip=clip)
    state = init(net.init(jax.random.key(0)), (), jax.random.key(0))
    keys = jax.random.split(jax.random.key(100), 250)
    state, _ = jax.jit(lambda state: jax.lax.scan(lambda s, key: update(s, sample(key, 32)), state, keys))(state)
    error = loss(state.params, (), sample(jax.random.key(1), 500), scan=bptt.scan, key=None)[0]
    always_the_mean = 1 / 6
    if truncation_length is None:
        assert error < 0.01
    else:
        assert 0.1 < error < 1.2 * always_the_mean
