"""Every strategy with every option, `tbptt` and the analysis lower for GPUs and TPUs, on a machine that has none.

Lowering finds what a platform has no rule for, and what was decided by the machine at hand in place of the platform that the
program is for. It shows neither the numbers nor that the platform's compiler takes the program.
"""

import inspect
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from reference import CELLS, EXACT, assert_close, make_cell, problem, random_like

import jaxbptt as bptt

PLATFORMS = "cuda", "rocm", "tpu"
# Long enough to be cut into segments wherever a strategy does so, with steps left over.
STEPS, BATCH = 17, 2

STRATEGIES = EXACT | {
    "scan, unrolled": partial(bptt.scan, unroll=2),
    "adjoint_scan, unrolled": partial(bptt.adjoint_scan, unroll=2),
    "adjoint_scan, clipped": partial(bptt.adjoint_scan, clip_adjoint=1.0),
    "adjoint_scan (derived), clipped": lambda cell, *args, **kw: bptt.adjoint_scan(
        cell.step, *args, clip_adjoint=jnp.tanh, **kw
    ),
    "checkpointed_scan, segment_length": partial(bptt.checkpointed_scan, segment_length=4),
    "checkpointed_scan, 3 checkpoints": partial(bptt.checkpointed_scan, checkpoints=3),
    "truncated_scan": partial(bptt.truncated_scan, truncation_length=4),
    "windowed_scan": partial(bptt.windowed_scan, window=4),
}


@pytest.fixture(autouse=True)
def as_users_run(strict):
    """In float32, the only precision of a TPU; optax's Adam promotes."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def lowered(function, *args, platforms=PLATFORMS):
    """The program for all platforms at once, with a branch for each where their rules differ."""
    return export.export(jax.jit(function), platforms=platforms)(*args)


def every(leaf):
    return jnp.sum(leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf)


def value_and_gradients(scan, step, flags):
    def loss(params, init, xs):
        carry, ys = scan(step, params, init, xs, **flags)
        return jnp.sum(ys**2) + sum(map(jnp.sum, jax.tree.leaves(carry)))

    return jax.value_and_grad(loss, argnums=(0, 1, 2))


def of_cell(name, flags, dtype=jnp.float32):
    """A cell, the arguments of a scan, and flags with a carry to reset to."""
    cell = make_cell(name, dtype)
    params, init, xs = problem(cell, STEPS, (BATCH,), dtype)
    rows = np.arange(STEPS * BATCH).reshape(STEPS, BATCH)
    flags = {"is_first": rows % 5 == 3, "valid": rows < 30, "reset_carry": init} if flags else {}
    return cell, (params, init, xs), flags


@pytest.mark.parametrize("flags", [False, True], ids=["", "flags"])
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies(name, cell, flags):
    cell, args, flags = of_cell(cell, flags)
    assert lowered(value_and_gradients(STRATEGIES[name], cell, flags), *args).platforms == PLATFORMS


@pytest.mark.parametrize("cell", [cell if cell == "elman" else pytest.param(cell, marks=pytest.mark.slow) for cell in CELLS])
@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_in_double_precision(name, cell):
    with jax.enable_x64(True):
        cell, args, flags = of_cell(cell, True, jnp.float64)
        program = lowered(value_and_gradients(STRATEGIES[name], cell, flags), *args, platforms=["cuda"])
    assert "f64" in program.mlir_module()


def convolutional(params, h, x):
    h = jnp.tanh(jax.lax.conv(h, params, (1, 1), "SAME") + x)
    return h, h


def branching(params, carry, x):
    """A random key, a branch, and a loop."""
    key, subkey = jax.random.split(carry["key"])
    h = params * carry["h"] + jax.random.normal(subkey, (3,))
    h = jax.lax.cond(x[0] > 0, jnp.tanh, jnp.sin, h + x)
    h = jax.lax.scan(lambda h, _: (jnp.sin(h), None), h, length=2)[0]
    return {"h": h, "key": key}, h


STEPS_OF_USERS = {
    # Eight channels to eight: from 32 products on, the layout of a convolution is chosen.
    "convolution": (convolutional, jnp.ones((8, 8, 3, 3)), jnp.ones((2, 8, 5, 5)), jnp.ones((STEPS, 2, 8, 5, 5))),
    "branch": (branching, jnp.ones(3), {"h": jnp.ones(3), "key": jax.random.key(0)}, jnp.ones((STEPS, 3))),
}


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name not in ("scan, unrolled", "adjoint_scan, unrolled")])
@pytest.mark.parametrize("step", STEPS_OF_USERS)
def test_steps_of_users(step, name):
    step, params, init, xs = STEPS_OF_USERS[step]
    if name == "adjoint_scan (derived), clipped":
        pytest.skip("the step is bare already, and a key is not clipped")

    def loss(params, xs):
        return jnp.sum(STRATEGIES[name](step, params, init, xs)[1] ** 2)

    lowered(jax.value_and_grad(loss, argnums=(0, 1)), params, xs)
