"""What the tests hold everything against: the meaning of a recurrence as a plain Python loop, and one tolerance."""

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
}


def python_loop(step, params, init, xs=None, *, length=None):
    """Five lines that say what a recurrence is."""
    step = getattr(step, "step", step)
    carry, ys = init, []
    for t in range(len(jax.tree.leaves(xs)[0]) if length is None else length):
        carry, y = step(params, carry, jax.tree.map(lambda leaf, t=t: leaf[t], xs))
        ys.append(y)
    return carry, jax.tree.map(lambda *leaves: jnp.stack(leaves), *ys)


def random_like(tree, key):
    """A random array for each leaf of a tree."""
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))
    return treedef.unflatten(
        [jax.random.normal(k, leaf.shape, leaf.dtype) for k, leaf in zip(keys, leaves, strict=False)]
    )


def problem(cell, steps, batch=(), dtype=jnp.float64, seed=0):
    """Random parameters (biases too), a first carry that is not 0, and inputs."""
    keys = jax.random.split(jax.random.key(seed), 4)
    params = cell.init(keys[0])
    params = jax.tree.map(lambda p, r: p + 0.3 * r.astype(dtype), params, random_like(params, keys[1]))
    init = random_like(cell.initial_carry(batch), keys[2])
    return params, init, jax.random.normal(keys[3], (steps, *batch, SIZES["input"]), dtype)


def assert_close(actual, expected, *, rtol=None):
    """Equal leaf by leaf, relative to the largest entry of each leaf: 1e-10 in float64, 1e-5 in float32."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(actual), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.shape == b.shape, (path, a.shape, b.shape)
        assert a.dtype == b.dtype, (path, a.dtype, b.dtype)
        tolerance = rtol or {"float64": 1e-10, "float32": 1e-5}[str(b.dtype)]
        scale = np.max(np.abs(b), initial=0.0)
        error = np.max(np.abs(a - b), initial=0.0)
        assert error <= tolerance * scale, f"{jax.tree_util.keystr(path)}: {error:.2e} of {scale:.2e}"
