"""What the tests hold everything against: the meaning of a recurrence as a plain Python loop, and one tolerance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jaxbptt as bptt

SIZES = {"input": 3, "hidden": 4}


def make_cell(name, dtype=jnp.float64):
    match name:
        case "elman" | "gru" | "lstm":
            return getattr(bptt, name)(SIZES["input"], SIZES["hidden"], dtype=dtype)
        case "stack":
            return bptt.stack(bptt.lstm(3, 4, dtype=dtype), bptt.gru(4, 5, dtype=dtype), bptt.elman(5, 2, dtype=dtype))


CELLS = ("elman", "gru", "lstm", "stack")

# Every exact strategy, as users call it: with a Cell, and with a bare step where the strategy tells the two apart.
EXACT = {
    "scan": bptt.scan,
    "adjoint_scan": bptt.adjoint_scan,
    "adjoint_scan (derived)": lambda cell, *args, **kw: bptt.adjoint_scan(getattr(cell, "step", cell), *args, **kw),
    "checkpointed_scan": bptt.checkpointed_scan,
    "checkpointed_scan (derived, 1 state)": lambda cell, *args, **kw: bptt.checkpointed_scan(
        getattr(cell, "step", cell), *args, checkpoints=1, **kw
    ),
}
# Biased strategies where they cut nothing: whatever holds for an exact one holds for them.
UNCUT = {
    "truncated_scan": partial(bptt.truncated_scan, truncation_length=10**6),
    "windowed_scan": partial(bptt.windowed_scan, window=10**6),
}


def python_loop(step, params, init, xs=None, *, length=None):
    """Five lines that say what a recurrence is."""
    step = getattr(step, "step", step)
    carry, ys = init, []
    for t in range(len(jax.tree.leaves(xs)[0]) if length is None else length):
        index = jnp.array(t)  # a Python number would be compiled anew for each t
        carry, y = step(params, carry, jax.tree.map(lambda leaf, t=index: leaf[t], xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


def random_like(tree, seed, scale=1.0):
    """A random array for each leaf of a tree of arrays or shapes. From numpy, which compiles nothing."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype), tree)


def problem(cell, steps, batch=(), dtype=jnp.float64, seed=0):
    """Random parameters (biases too), a first carry that is not 0, and inputs."""
    params, init = jax.eval_shape(cell.init, jax.random.key(0)), jax.eval_shape(lambda: cell.initial_carry(batch))
    xs = jax.ShapeDtypeStruct((steps, *batch, SIZES["input"]), dtype)
    return random_like(params, seed, 0.5), random_like(init, seed + 1), random_like(xs, seed + 2)


def assert_close(actual, expected, *, rtol=None):
    """Equal leaf by leaf, relative to the largest entry of each leaf: 1e-10 in float64, 1e-5 in float32.

    A leaf that has vanished under the resolution of the largest one, as the gradient of a first carry does, is held to
    that resolution.
    """
    whole = max((np.max(np.abs(leaf), initial=0.0) for leaf in map(np.asarray, jax.tree.leaves(expected))), default=0.0)
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, (path, a.shape, b.shape)
        assert a.dtype == b.dtype, (path, a.dtype, b.dtype)
        tolerance = rtol or {"float64": 1e-10, "float32": 1e-5}[str(b.dtype)]
        scale = max(np.max(np.abs(b), initial=0.0), np.finfo(b.dtype).eps * whole)
        error = np.max(np.abs(a - b), initial=0.0)
        assert error <= tolerance * scale, f"{jax.tree_util.keystr(path)}: {error:.2e} of {scale:.2e}"
