"""Every strategy with every option, and the analysis, under each of JAX's modes: the same numbers, and no error."""

from contextlib import ExitStack, contextmanager
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import assert_close, cases, make_cell, random_like

import jaxbptt as bptt

# No multiple of the lengths below, and few: without jit each of them is run one operation at a time.
STEPS = 3


@contextmanager
def together(*modes):
    with ExitStack() as stack:
        for mode in modes:
            stack.enter_context(mode)
        yield


DEBUG = "debug_nans and debug_infs"
FLOAT32 = "float32, strict rank promotion"
# All but float32 in float64, and all with strict dtype promotion, as every test.
MODES = {
    "disable_jit": jax.disable_jit,
    DEBUG: lambda: together(jax.debug_nans(True), jax.debug_infs(True)),
    "checking_leaks": jax.checking_leaks,
    FLOAT32: lambda: together(jax.enable_x64(False), jax.numpy_rank_promotion("raise")),
}
modes = cases("mode", MODES)

STRATEGIES = {
    "scan": bptt.scan,
    "adjoint_scan": bptt.adjoint_scan,
    "adjoint_scan, unrolled": partial(bptt.adjoint_scan, unroll=2),
    "adjoint_scan, clipped": partial(bptt.adjoint_scan, clip_adjoint=1e3),
    "checkpointed_scan": bptt.checkpointed_scan,
    "checkpointed_scan, segment_length": partial(bptt.checkpointed_scan, segment_length=2),
    "checkpointed_scan, 1 checkpoint": partial(bptt.checkpointed_scan, checkpoints=1),
    "checkpointed_scan, 2 checkpoints": partial(bptt.checkpointed_scan, checkpoints=2, unroll=2),
    "parallel_adjoint_scan": partial(bptt.parallel_adjoint_scan, chunk_length=2),
    "newton_scan": bptt.newton_scan,
    "truncated_scan": partial(bptt.truncated_scan, truncation_length=9),
    "windowed_scan": partial(bptt.windowed_scan, window=9),
}
# Where they cut, all that can be asked is that they run, and give what they give outside the mode.
CUT = {
    "truncated_scan, cut": partial(bptt.truncated_scan, truncation_length=2),
    "windowed_scan, cut": partial(bptt.windowed_scan, window=2),
}


def branching(params, carry, x):
    """A counter, a key, a branch and a gather; nothing in it is promoted."""
    key, subkey = jax.random.split(carry["key"])
    h = params["w"] * carry["h"] + params["table"][x["i"]] + 0.1 * jax.random.normal(subkey, (3,), x["x"].dtype)
    h = jax.lax.cond(x["i"] > 0, jnp.tanh, jnp.sin, h + x["x"])
    return {"h": h, "key": key, "n": carry["n"] + 1}, {"h": h, "n": carry["n"]}


def gradients(scan, step, args, *, flags):
    def loss(moving, still):
        args = jax.tree.map(lambda a, b: b if a is None else a, moving, still, is_leaf=lambda leaf: leaf is None)
        carry, ys = scan(step, *args, **flags)
        return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves((carry, ys)) if jnp.issubdtype(leaf.dtype, jnp.inexact))

    floating = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.inexact)
    moving = jax.tree.map(lambda leaf: leaf if floating(leaf) else None, args)
    still = jax.tree.map(lambda leaf: None if floating(leaf) else leaf, args)
    return jax.value_and_grad(loss)(moving, still)


def problems(dtype):
    """A stack of cells with a batch and flags, and a step without batch, with flags and without them."""
    cell = bptt.stack(bptt.lstm(3, 4, dtype=dtype), bptt.elman(4, 2, dtype=dtype))
    params, init = jax.eval_shape(cell.init, jax.random.key(0)), jax.eval_shape(lambda: cell.initial_carry((2,)))
    args = random_like(params, 0, 0.5), random_like(init, 1), random_like(jax.ShapeDtypeStruct((STEPS, 2, 3), dtype), 2)
    step_args = (
        {"w": jnp.asarray(0.5, dtype), "table": random_like(jax.ShapeDtypeStruct((2, 3), dtype), 3)},
        {"h": random_like(jax.ShapeDtypeStruct((3,), dtype), 4), "key": jax.random.key(0), "n": jnp.int32(0)},
        {"x": random_like(jax.ShapeDtypeStruct((STEPS, 3), dtype), 5), "i": jnp.arange(STEPS, dtype=jnp.int32) % 2},
    )
    is_first = np.arange(STEPS) == 2
    flags = {"is_first": is_first[:, None] & np.array([True, False]), "valid": np.ones((STEPS, 2), bool)}
    flags["valid"][-2:, 1] = False
    yield cell, args, flags
    yield branching, step_args, {"is_first": is_first, "valid": ~is_first, "reset_carry": step_args[1]}
    if not (jax.config.jax_disable_jit or jax.config.jax_check_tracer_leaks):  # slow modes have two of the three
        yield branching, step_args, {}


def results(name):
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    scan = (STRATEGIES | CUT)[name]
    return jax.jit(lambda: [gradients(scan, step, args, flags=flags) for step, args, flags in problems(dtype)])()


@cache
def results_outside(name, x64):
    """By `scan`, or by a strategy that cuts, outside any mode."""
    with jax.enable_x64(x64):
        return results(name)


# Options change little in how a strategy meets a mode: they are tried in one.
WITHOUT_OPTIONS = (
    "scan",
    "adjoint_scan",
    "checkpointed_scan",
    "checkpointed_scan, 1 checkpoint",
    "truncated_scan",
    "windowed_scan",
)
# They take long without jit.
PARALLEL = "parallel_adjoint_scan", "newton_scan"
IN_A_MODE = {
    f"{name}-{mode}": (name, mode)
    for name in STRATEGIES | CUT
    for mode in MODES
    if mode == FLOAT32 or name in WITHOUT_OPTIONS or (name in PARALLEL and mode == "checking_leaks")
}


@cases("case", IN_A_MODE, "adjoint_scan-disable_jit")
def test_strategies(case):
    name, mode = case
    with MODES[mode]():
        found = results(name)
    assert len(found) >= 2
    expected = results_outside(name if name in CUT else "scan", mode != FLOAT32)
    for result, right in zip(found, expected, strict=False):
        assert_close(result, right)


def mean_square(carry, ys):
    return jnp.mean(ys**2) + jnp.mean(carry**2)


def lags(*args):
    contributions = bptt.lag_contributions(*args, mean_square)
    horizon, adaptive = bptt.effective_horizon(contributions), bptt.adaptive_truncation_length(contributions)
    return contributions, horizon, adaptive[:3]


def jacobians(*args):
    states, J = bptt.state_jacobians(*args)
    products = bptt.jacobian_products(J)
    magnitudes = jnp.sort(jnp.abs(jnp.asarray(bptt.jacobian_eigenvalues(J))))
    return states, J, products, bptt.product_log_singular_values(products), bptt.singular_values(J), magnitudes


ANALYSIS = {
    "gradient_flow": lambda *args: bptt.gradient_flow(*args, mean_square),
    "state_jacobians and what is made of them": jacobians,
    "jacobian_operators": lambda *args: bptt.log_norms(bptt.jacobian_operators(*args)),
    "log_norms": lambda *args: bptt.log_norms(bptt.state_jacobians(*args)[1]),
    "lyapunov_exponents": lambda *args: bptt.lyapunov_exponents(*args, key=jax.random.key(0)),
    "temporal_contributions": lambda *args: bptt.temporal_contributions(*args, mean_square),
    "lag_contributions and their horizons": lags,
    "truncation_bias": lambda *args: bptt.truncation_bias(*args, mean_square, lengths=[2]),
    "input_saliency": lambda *args: bptt.input_saliency(*args, lambda carry, ys: jnp.sum(ys**2, axis=-1)),
    "diagnose_gradient": lambda *args: bptt.diagnose_gradient(*args, mean_square),
    "plan": lambda *args: bptt.plan(*args, memory_bytes=2**20)[1:4],
    "plan_parallel": lambda *args: [bptt.plan_parallel(*args).rows[0].depth],
    "certify": lambda *args: [row.agrees for row in bptt.certify(*args, mean_square, repeats=1).rows],
    "surviving_paths": lambda *args: bptt.surviving_paths(bptt.truncated_scan, 5, truncation_length=2),
    "pascanu": lambda *args: bptt.regularizers.pascanu(*args, mean_square),
    "gradient_flossing": lambda *args: bptt.regularizers.gradient_flossing(*args, num_exponents=2),
}


def numbers(tree):
    return [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype") or isinstance(leaf, float | int)]


def analysed(name):
    dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    cell = make_cell("elman", dtype)
    params = random_like(jax.eval_shape(cell.init, jax.random.key(0)), 0, 0.5)
    xs = random_like(jax.ShapeDtypeStruct((STEPS, 3), dtype), 1)
    return numbers(ANALYSIS[name](cell, params, jnp.full(4, 0.1, dtype), xs))


# What depends on the precision: random first vectors, and bytes.
DRAWN_OR_BYTES = ("lyapunov_exponents", "diagnose_gradient", "gradient_flossing", "plan")


@cache
def analysed_outside(name, x64):
    """In float64 even for float32, unless it depends on the dtype."""
    if not x64 and name not in DRAWN_OR_BYTES:
        narrow = {np.dtype(np.float64): np.float32, np.dtype(np.int64): np.int32}
        as_32_bits = lambda leaf: (
            np.asarray(leaf, narrow.get(leaf.dtype, leaf.dtype)) if hasattr(leaf, "dtype") else leaf
        )
        return jax.tree.map(as_32_bits, analysed_outside(name, True))
    with jax.enable_x64(x64), jax.numpy_dtype_promotion("standard"):
        return analysed(name)


# The logarithm of a product that is not there yet is -inf; the dimension of a part of a spectrum is nan.
UNDEFINED = ("log_norms", "jacobian_operators", "gradient_flossing")


@modes
@cases(
    "name",
    {name: name for name in ANALYSIS},
    "gradient_flow",
    "lyapunov_exponents",
)
def test_analysis(name, mode):
    if mode is MODES[DEBUG] and name in UNDEFINED:
        with mode(), pytest.raises(FloatingPointError):
            analysed(name)
        return
    with mode():
        x64 = jax.config.jax_enable_x64
        mine = analysed(name)
    assert_close(mine, analysed_outside(name, x64), rtol=1e-9 if x64 else 1e-3)


@modes
def test_training(mode):
    """Losses, a network, and an update of truncated BPTT of each kind."""
    with mode():
        dtype = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
        cell = bptt.gru(3, 4, dtype=dtype)
        net = bptt.network(cell, 2)

        def loss(params, carry, chunk, *, scan, key):
            carry, outputs = net.apply(params, carry, chunk.xs, scan=scan)
            labels = jnp.argmax(chunk.targets[..., :2], axis=-1)
            error = bptt.losses.mean_squared_error(outputs, chunk.targets[..., :2], mask=chunk.mask)
            return error + bptt.losses.cross_entropy(outputs, labels, mask=chunk.mask), carry

        series = np.sin(np.arange(48.0)).reshape(16, 3).astype(dtype)  # two chunks
        for options, overlap in (({}, 0), ({"truncation_length": 2, "update_every": 4}, 0)):
            # Not adam: optax raises a float to an integer's power there, which strict promotion refuses.
            init, eager_update = bptt.tbptt(loss, optax.sgd(1e-2, momentum=0.9), **options)
            state = init(net.init(jax.random.key(0)), cell.initial_carry((2,)), jax.random.key(1))
            update = jax.jit(eager_update)
            for chunk in bptt.streams.rows(series, batch=2, chunk_length=4, overlap=overlap):
                state, metrics = update(state, chunk)
            assert np.isfinite(metrics.loss)
