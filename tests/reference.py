"""What the tests hold everything against: the meaning of a recurrence as a plain Python loop, and one tolerance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import keystr

import jaxbptt as bptt

SIZES = {"input": 3, "hidden": 4}


def make_cell(name, dtype=jnp.float64):
    match name:
        case "elman" | "gru" | "lstm":
            return getattr(bptt, name)(SIZES["input"], SIZES["hidden"], dtype=dtype)
        case "min_gru" | "min_lstm" | "rg_lru":
            return getattr(bptt, name)(SIZES["input"], SIZES["hidden"], dtype=dtype)
        case "lru":
            return bptt.lru(SIZES["input"], SIZES["hidden"], output_size=SIZES["input"], dtype=dtype)
        case "stack":
            return bptt.stack(bptt.lstm(3, 4, dtype=dtype), bptt.gru(4, 5, dtype=dtype), bptt.elman(5, 2, dtype=dtype))

        case "rate":
            return bptt.rate(3, 4, tau=[2.0, 3.0, 5.0, 9.0], dt=2.0, dtype=dtype)
        case "layer_norm":
            return bptt.lstm(3, 4, layer_norm=True, dtype=dtype)


CELLS = ("elman", "gru", "lstm", "stack")
# Affine in the carry, each unit on its own.
DIAGONAL = ("lru", "min_gru", "min_lstm", "rg_lru")

# The exact strategies that run a loop over time, as users call them: with a Cell, and with a bare step where the strategy tells
# the two apart.
SEQUENTIAL = {
    "scan": bptt.scan,
    "adjoint_scan": bptt.adjoint_scan,
    "adjoint_scan (derived)": lambda cell, *args, **kw: bptt.adjoint_scan(getattr(cell, "step", cell), *args, **kw),
    "checkpointed_scan": bptt.checkpointed_scan,
    "checkpointed_scan (derived, 1 state)": lambda cell, *args, **kw: bptt.checkpointed_scan(
        getattr(cell, "step", cell), *args, checkpoints=1, **kw
    ),
}
# Every exact strategy. The last two compile for longest: where a test is of what all strategies share, SEQUENTIAL is enough.
EXACT = SEQUENTIAL | {"parallel_adjoint_scan": bptt.parallel_adjoint_scan, "newton_scan": bptt.newton_scan}


def exact_for(name):
    """The exact strategies that run this cell."""
    return EXACT | ({"parallel_scan": bptt.parallel_scan} if name in DIAGONAL else {})


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


def cases(names, table, *quick):
    """`table` as the parameters of a test, all slow but the quick ones and the first."""
    quick = quick or tuple(table)[:1]
    params = [
        pytest.param(case, id=name, marks=() if name in quick else pytest.mark.slow) for name, case in table.items()
    ]
    return pytest.mark.parametrize(names, params)


def gradient_of(function, args, wrt, **options):
    """Value and gradients of `function(**args)` with respect to the leaves that stand under one of the names in `wrt`.

    Options are those of `jax.value_and_grad`.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(args)
    leaves = [leaf for _, leaf in paths]
    chosen = [i for i, (path, _) in enumerate(paths) if any(f"'{name}'" in keystr(path) for name in wrt)]

    def of_chosen(moving):
        return function(**treedef.unflatten([moving.get(i, leaf) for i, leaf in enumerate(leaves)]))

    value, gradients = jax.value_and_grad(of_chosen, allow_int=True, **options)({i: leaves[i] for i in chosen})
    return value, {keystr(paths[i][0]): gradient for i, gradient in gradients.items()}


def assert_close(actual, expected, *, rtol=None):
    """Equal leaf by leaf, relative to the largest entry of each leaf: 1e-10 in float64, 1e-5 in float32.

    A leaf that has vanished under the resolution of the largest one, as the gradient of a first carry does, is held to
    that resolution. What is not finite is the same in both, and so is what has no derivative.
    """
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    pairs = zip(jax.tree_util.tree_leaves_with_path(actual), map(_as_numpy, jax.tree.leaves(expected)), strict=True)
    pairs = [(keystr(path), _as_numpy(leaf), other) for (path, leaf), other in pairs]
    whole = max((_largest(b) for _, _, b in pairs), default=0.0)
    for path, a, b in pairs:
        assert a.shape == b.shape, (path, a.shape, b.shape)
        assert a.dtype == b.dtype, (path, a.dtype, b.dtype)
        if b.dtype == jax.dtypes.float0:
            continue
        if not np.issubdtype(b.dtype, np.inexact):
            np.testing.assert_array_equal(a, b, path)
            continue
        finite = np.isfinite(b)
        np.testing.assert_array_equal(a[~finite], b[~finite], f"{path}, where that of the reference is not finite")
        assert np.isfinite(a[finite]).all(), f"{path}: not finite where the reference is, {a[finite]} for {b[finite]}"
        tolerance = rtol or {8: 1e-10, 4: 1e-5}[b.real.dtype.itemsize]
        scale = max(_largest(b), np.finfo(b.dtype).eps * whole)
        error = np.max(np.abs(a[finite] - b[finite]), initial=0.0)
        assert error <= tolerance * scale, f"{path}: {error:.2e} of {scale:.2e}"


def _as_numpy(leaf):
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return np.asarray(jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf)


def _largest(leaf):
    """The largest finite magnitude."""
    if not np.issubdtype(leaf.dtype, np.inexact):
        return 0.0
    return np.max(np.abs(leaf[np.isfinite(leaf)]), initial=0.0)
