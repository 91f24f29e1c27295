"""Every strategy with every option, `tbptt` and the analysis lower for GPUs and TPUs, on a machine that has none.

Lowering finds what a platform has no rule for. It shows neither the numbers nor that the platform's compiler takes the
program.
"""

import inspect
import itertools
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from reference import CELLS, EXACT, assert_close, cases, make_cell, problem, random_like

import jaxbptt as bptt
from jaxbptt.scans import passes

PLATFORMS = "cuda", "rocm", "tpu"
# Enough steps to be cut into segments wherever a strategy does so, with some left over.
STEPS, BATCH = 17, 2

BARE = {
    "scan": bptt.scan,
    "scan, unrolled": partial(bptt.scan, unroll=2),
    "adjoint_scan": bptt.adjoint_scan,
    "adjoint_scan, unrolled": partial(bptt.adjoint_scan, unroll=2),
    "adjoint_scan, clipped": partial(bptt.adjoint_scan, clip_adjoint=1.0),
    "adjoint_scan, clipped by a function": partial(bptt.adjoint_scan, clip_adjoint=partial(jax.tree.map, jnp.tanh)),
    "adjoint_scan, reversed": partial(bptt.adjoint_scan, reverse=True),
    "checkpointed_scan": bptt.checkpointed_scan,
    "checkpointed_scan, segment_length": partial(bptt.checkpointed_scan, segment_length=4),
    "checkpointed_scan, 3 checkpoints": partial(bptt.checkpointed_scan, checkpoints=3),
    "newton_scan": bptt.newton_scan,
    "parallel_adjoint_scan": bptt.parallel_adjoint_scan,
    "truncated_scan": partial(bptt.truncated_scan, truncation_length=4),
    "windowed_scan": partial(bptt.windowed_scan, window=4),
}
STRATEGIES = BARE | {name: scan for name, scan in EXACT.items() if "derived" in name}


@pytest.fixture(autouse=True)
def as_users_run(strict):
    """In float32, the precision of a TPU; optax's Adam promotes."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        yield


def lowered(function, *args, platforms=PLATFORMS):
    """The program for all these platforms, with a branch for each where their rules differ."""
    return export.export(jax.jit(function), platforms=platforms)(*args)


def custom_calls(program):
    """The functions outside the compiler that a program calls."""
    return set(re.findall(r"custom_call @(\w+)", program.mlir_module()))


# Strategies


def of_cell(name, flags=False, dtype=jnp.float32):
    """A cell, the arguments of a scan, and flags with a carry to reset to."""
    cell = make_cell(name, dtype)
    params, init, xs = problem(cell, STEPS, (BATCH,), dtype)
    rows = np.arange(STEPS * BATCH).reshape(STEPS, BATCH)
    flags = {"is_first": rows % 5 == 3, "valid": rows < 30, "reset_carry": init} if flags else {}
    return cell, (params, init, xs), flags


def value_and_gradients(scan, step, flags, arguments=3):
    def loss(params, init, xs):
        carry, ys = scan(step, params, init, xs, **flags)
        return jnp.sum(ys**2) + sum(map(jnp.sum, jax.tree.leaves(carry)))

    return jax.value_and_grad(loss, argnums=tuple(range(arguments)))


# The stack has the three other cells.
PROBLEMS = {f"{cell}{', flags' if flags else ''}": (cell, flags) for cell in CELLS for flags in (False, True)}


@cases("case", PROBLEMS, "elman", "stack, flags")
@pytest.mark.parametrize("scan", STRATEGIES.values(), ids=STRATEGIES)
def test_strategies(scan, case):
    cell, args, flags = of_cell(*case)
    assert lowered(value_and_gradients(scan, cell, flags), *args).platforms == PLATFORMS


@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("scan", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.costly
def test_strategies_in_double_precision(scan, cell):
    with jax.enable_x64(True):
        cell, args, flags = of_cell(cell, True, jnp.float64)
        program = lowered(value_and_gradients(scan, cell, flags), *args, platforms=["cuda"])
    assert "f64" in program.mlir_module()


def test_forward_scan():
    """It has no gradient of inputs."""
    cell, args, flags = of_cell("stack", True)
    assert lowered(value_and_gradients(bptt.forward_scan, cell, flags, 2), *args).platforms == PLATFORMS


def convolutional(params, h, x):
    h = jnp.tanh(jax.lax.conv(h, params, (1, 1), "SAME") + x)
    return h, h


def branching(params, carry, x):
    """A random key, a branch, and a loop."""
    key, subkey = jax.random.split(carry["key"])
    h = params * carry["h"] + jax.random.normal(subkey, (3,))
    h = jax.lax.cond(x[0] > 0, jnp.tanh, jnp.sin, h + x)
    h, _ = jax.lax.scan(lambda h, _: (jnp.sin(h), None), h, length=2)
    return {"h": h, "key": key}, h


@cases("scan", BARE, "adjoint_scan")
@pytest.mark.parametrize("step", [convolutional, branching])
def test_steps_of_users(step, scan):
    if step is convolutional:  # of eight channels to eight: with few, no layout is chosen
        params, init, xs = jnp.ones((8, 8, 3, 3)), jnp.ones((2, 8, 5, 5)), jnp.ones((STEPS, 2, 8, 5, 5))
    else:
        params, init, xs = jnp.ones(3), {"h": jnp.ones(3), "key": jax.random.key(0)}, jnp.ones((STEPS, 3))

    def loss(params, xs):
        return jnp.sum(scan(step, params, init, xs)[1] ** 2)

    lowered(jax.value_and_grad(loss, argnums=(0, 1)), params, xs)


def test_one_program_for_cpu_and_gpu_has_the_same_numbers():
    cell, args, flags = of_cell("lstm", True)
    gradients = value_and_gradients(bptt.adjoint_scan, cell, flags)
    program = lowered(gradients, *args, platforms=["cpu", "cuda"])
    assert_close(program.call(*args), jax.jit(gradients)(*args))


def test_choices_are_those_of_the_platform_that_is_lowered_for(monkeypatch):
    """On a CPU the weight gradient is added up over segments, in a loop around that over time steps."""
    monkeypatch.setattr(passes, "_FEW_STEPS", 0)
    cell, args, _ = of_cell("elman")

    def loops(*platforms):
        return (
            lowered(value_and_gradients(bptt.adjoint_scan, cell, {}), *args, platforms=platforms)
            .mlir_module()
            .count("stablehlo.while")
        )

    assert [loops(platform) for platform in ("cpu", *PLATFORMS)] == [4, 2, 2, 2]  # and one for what is left over
    assert loops("cpu", "cuda") == 4 + 2


UNROLLED = "adjoint_scan", "checkpointed_scan", "truncated_scan", "windowed_scan", "parallel_adjoint_scan"


@pytest.mark.costly
@pytest.mark.parametrize("name", UNROLLED)
def test_loops_are_unrolled_as_the_platform_needs_it(name, monkeypatch):
    monkeypatch.setattr(passes, "_FEW_STEPS", 0)
    cell, args, _ = of_cell("elman")

    def steps(gradients, platform, **options):
        scan = partial(BARE[name], **options)
        function = value_and_gradients(scan, cell, {}) if gradients else partial(scan, cell)
        text = lowered(function, *args, platforms=[platform]).mlir_module()
        return text.count("call @") + text.count("stablehlo.tanh")  # a step is a function or not, by version of jax

    for gradients, platform in itertools.product((False, True), ("cpu", "cuda", "tpu")):
        by_default, one, eight = (
            steps(gradients, platform, **options) for options in ({}, {"unroll": 1}, {"unroll": 8})
        )
        assert by_default == (eight if platform == "cuda" else one)
        assert eight != one


# Training


UPDATES = {
    "adjoint_scan": {},
    "truncated inside the chunk": {"truncation_length": 2, "update_every": STEPS},
    "overlapping chunks": {"truncation_length": STEPS, "update_every": 5},
    "burn-in, checkpointed_scan": {"burn_in": 3, "scan": bptt.checkpointed_scan},
}


@pytest.mark.parametrize("options", UPDATES.values(), ids=UPDATES)
def test_updates(options):
    cell, (_, carry, xs), flags = of_cell("stack", True)
    net = bptt.network(cell, 5)

    def loss(params, carry, chunk, *, scan, key):
        carry, logits = net.apply(params, carry, chunk.xs, scan=scan)
        return bptt.losses.cross_entropy(logits, chunk.targets, mask=chunk.mask), carry

    init, update = bptt.tbptt(loss, optax.adam(1e-2), clip=optax.clip_by_global_norm(1.0), **options)
    targets = jnp.ones((STEPS, BATCH), jnp.int32)
    chunk = bptt.Chunk(xs, targets, mask=flags["valid"], is_first=flags["is_first"], valid=flags["valid"])
    state = jax.eval_shape(lambda key: init(net.init(key), carry, key), jax.random.key(0))
    lowered(update, state, chunk)


OUTPUTS = jnp.ones((STEPS, BATCH, 3))
LOSSES = {
    "cross_entropy": lambda ys, mask: bptt.losses.cross_entropy(ys, jnp.ones((STEPS, BATCH), jnp.int32), mask=mask),
    "mean_squared_error": lambda ys, mask: bptt.losses.mean_squared_error(ys, OUTPUTS, mask=mask),
    "final_step": lambda ys, mask: bptt.losses.final_step(bptt.losses.mean_squared_error)(ys, OUTPUTS, mask=mask),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses(name):
    lowered(jax.value_and_grad(LOSSES[name]), OUTPUTS, jnp.ones((STEPS, BATCH), bool))


# Analysis


def mean_square(carry, ys):
    return jnp.mean(ys**2) + jnp.mean(carry**2)


def jacobians(*args):
    return bptt.state_jacobians(*args)[1]


def lags(*args):
    return bptt.lag_contributions(*args, mean_square)


ANALYSIS = {
    "state_jacobians": bptt.state_jacobians,
    "jacobian_products": lambda *args: bptt.jacobian_products(jacobians(*args)),
    "product_log_singular_values": lambda *args: bptt.product_log_singular_values(
        bptt.jacobian_products(jacobians(*args))
    ),
    "temporal_contributions": lambda *args: bptt.temporal_contributions(*args, mean_square),
    "jacobian_operators": lambda *args: bptt.singular_values(bptt.jacobian_operators(*args)),
    "singular_values": lambda *args: bptt.singular_values(jacobians(*args), start=[0, 3]),
    "singular_values, top": lambda cell, params, init, xs: bptt.singular_values(
        xs[0, 0] * jnp.ones((3, 24, 24)), top=1
    ),
    "log_norms": lambda *args: bptt.log_norms(jacobians(*args)),
    "log_norms, probed": lambda *args: bptt.log_norms(bptt.jacobian_operators(*args), probes=2),
    "lyapunov_exponents": lambda *args: bptt.lyapunov_exponents(*args, burn_in=2, qr_every=3, key=jax.random.key(0)),
    "covariant_lyapunov_vectors": lambda *args: bptt.covariant_lyapunov_vectors(*args, burn_in=2, burn_out=1),
    "sample_states": lambda cell, params, init, xs: bptt.sample_states(xs, 5, key=jax.random.key(0), noise=0.1),
    "principal_components": lambda cell, params, init, xs: bptt.principal_components(xs),
    "participation_ratio": lambda cell, params, init, xs: bptt.participation_ratio(xs),
    "gradient_flow": lambda *args: bptt.gradient_flow(*args, mean_square),
    "kept_contributions": lambda *args: bptt.kept_contributions(
        *args, mean_square, influence=bptt.influences.snap(1), max_lag=2
    ),
    "lag_contributions": lags,
    "effective_horizon": lambda *args: bptt.effective_horizon(lags(*args)),
    "truncation_bias": lambda *args: bptt.truncation_bias(*args, mean_square),
    "input_saliency": lambda *args: bptt.input_saliency(*args, lambda carry, ys: jnp.sum(ys**2, axis=-1)),
    "surviving_paths": lambda *args: bptt.surviving_paths(bptt.truncated_scan, 6, truncation_length=2),
    "pascanu": jax.value_and_grad(
        lambda params, cell, *args: bptt.regularizers.pascanu(cell, params, *args, mean_square)
    ),
    "gradient_flossing": jax.value_and_grad(
        lambda params, cell, *args: bptt.regularizers.gradient_flossing(cell, params, *args, num_exponents=2)
    ),
}
REGULARIZERS = "pascanu", "gradient_flossing"
# What looks at numbers or compiles by itself runs wherever its arguments are, and refuses to be traced for any platform.
ON_NUMBERS = {
    "adaptive_truncation_length": lambda *args: bptt.adaptive_truncation_length(lags(*args)),
    "certify": lambda *args: bptt.certify(*args, mean_square),
    "compare_gradients": lambda cell, params, init, xs: bptt.compare_gradients(params, params),
    "diagnose_gradient": lambda *args: bptt.diagnose_gradient(*args, mean_square),
    "fixed_points": lambda cell, params, init, xs: bptt.fixed_points(cell, params, xs[0], init[None]),
    "plan": lambda *args: bptt.plan(*args, memory_bytes=2**20),
    "plan_parallel": lambda *args: bptt.plan_parallel(*args),
    "score_gradients": lambda *args: bptt.score_gradients(*args, mean_square, scans=[bptt.forward_scan]),
}


def analysed(name, dtype=jnp.float32):
    """A function of the arrays alone, and the arrays; of one row."""
    cell = make_cell("elman", dtype)
    function = (ANALYSIS | ON_NUMBERS)[name]

    def of_arrays(params, init, xs):
        result = function(params, cell, init, xs) if name in REGULARIZERS else function(cell, params, init, xs)
        return [leaf for leaf in jax.tree.leaves(result) if hasattr(leaf, "dtype")]

    return of_arrays, problem(cell, 6, (), dtype)


@pytest.mark.parametrize("name", ANALYSIS)
def test_analysis(name):
    function, args = analysed(name)
    assert lowered(function, *args).platforms == PLATFORMS


@pytest.mark.parametrize("name", ANALYSIS)
@pytest.mark.costly
def test_analysis_in_double_precision(name):
    with jax.enable_x64(True):
        function, args = analysed(name, jnp.float64)
        lowered(function, *args, platforms=["cuda"])


@pytest.mark.parametrize("name", ON_NUMBERS)
def test_what_looks_at_numbers_is_for_no_platform(name):
    function, args = analysed(name)
    with pytest.raises(TypeError, match=f"{name} looks at the numbers themselves"):
        lowered(function, *args)


# JAX has no nonsymmetric eigenvalues for TPUs. For GPUs it has: their program can be run, but not saved for a later jax.
EIGENVALUES = {
    "cuda": (ValueError, r"custom calls whose targets have no compatibility guarantees(.|\n)*eig_real"),
    "rocm": (ValueError, r"custom calls whose targets have no compatibility guarantees(.|\n)*eig_real"),
    "tpu": (NotImplementedError, "rule for primitive 'eig' not found for platform tpu"),
}


@pytest.mark.parametrize("platform", EIGENVALUES)
def test_eigenvalues(platform):
    error, message = EIGENVALUES[platform]
    J = random_like(jax.ShapeDtypeStruct((5, 4, 4), jnp.float32), 0)
    with pytest.raises(error, match=message):
        lowered(bptt.jacobian_eigenvalues, J, platforms=[platform])
    to_run = jax.jit(bptt.jacobian_eigenvalues).trace(J)
    if platform == "tpu":
        with pytest.raises(error, match=message):
            to_run.lower(lowering_platforms=(platform,))
    else:
        assert "eig_real" in to_run.lower(lowering_platforms=(platform,)).as_text()


def test_schur_form_is_for_cpus_alone():
    with pytest.raises(NotImplementedError, match="'schur' not found for platform cuda"):
        lowered(bptt.departure_from_normality, jnp.ones((5, 4, 4)), platforms=["cuda"])


def test_every_public_function_is_here():
    analysis = {name for name, function in vars(bptt.analysis).items() if inspect.isfunction(function)}
    here = {name.split(",")[0] for name in ANALYSIS | ON_NUMBERS} | {"jacobian_eigenvalues", "departure_from_normality"}
    assert analysis | {*REGULARIZERS} == here
    scans = {name for name in vars(bptt) if name.endswith("scan")}
    # Those that take some steps only, or have no gradient of inputs, have tests of their own.
    assert scans == {name.split(",")[0] for name in BARE} | {"cudnn_scan", "parallel_scan", "forward_scan"}


# What a program for several platforms shows


def test_a_program_for_several_platforms_has_the_rule_of_each():
    """A QR factorisation is another function on each platform, and what one platform has no rule for is refused for all."""
    function, args = analysed("lyapunov_exponents")
    alone = [custom_calls(lowered(function, *args, platforms=[platform])) for platform in PLATFORMS]
    assert all(a and a.isdisjoint(b) for a, b in zip(alone, alone[1:] + alone[:1], strict=True))
    assert custom_calls(lowered(function, *args)) == set.union(*alone)
    with pytest.raises(NotImplementedError, match=r"'eig' not found for platforms \['tpu'\]"):
        lowered(bptt.jacobian_eigenvalues, jnp.ones((5, 4, 4)))
