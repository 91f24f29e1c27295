"""`cudnn_scan`: what cuDNN is called with, and everything around the call.

cuDNN itself needs a device. Elsewhere JAX's reference implementation of what cuDNN computes stands in for it, in the layout
of weights that JAX documents; and for lowering, stand-ins for the two functions of JAX's plugin that ask the device.
"""

import re
from functools import partial, wraps
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.experimental import rnn
from jax.interpreters import mlir
from reference import assert_close, cases, gradient_of, problem, random_like

import jaxbptt as bptt
from jaxbptt.scans import cudnn

T, F, H = 5, 3, 4
CELL = bptt.lstm(F, H)
TWO = bptt.stack(CELL, bptt.lstm(H, H))
NESTED = bptt.stack(TWO, bptt.lstm(H, H))
SIZES = "compute_rnn_workspace_reserve_space_sizes"
# Three rows of 5 steps: whole, two steps, and no step at all.
LENGTHS = np.array([5, 2, 0])
VALID = np.arange(T)[:, None] < LENGTHS


@pytest.fixture
def cudnn_here(monkeypatch):
    """cuDNN's call runs on the CPU, as JAX's reference implementation."""

    def lstm(x, h_0, c_0, weights, seq_lengths, *sizes, dropout, bidirectional, precision):
        weights = jnp.where((seq_lengths > 0).all(), weights, jnp.nan)  # cuDNN's manual wants a step in every row
        unpacked = rnn.unpack_lstm_weights(weights, *sizes, bidirectional)
        return rnn.lstm_ref(x, h_0, c_0, *unpacked, seq_lengths, *sizes, dropout, bidirectional)

    monkeypatch.setattr(rnn, "gpu_rnn", SimpleNamespace(**{SIZES: None}))
    monkeypatch.setattr(rnn, "lstm", lstm)
    monkeypatch.setattr(cudnn, "_marked", lambda array: array)
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture
def cudnn_lowers(monkeypatch):
    """cuDNN's call lowers for CUDA by JAX's own rules. The descriptor of the call is the text of its arguments."""
    plugin = SimpleNamespace(build_rnn_descriptor=lambda *args: repr(args))
    rules = {rnn.rnn_fwd_p: "rnn", rnn.rnn_bwd_p: "rnn_bwd"}
    monkeypatch.setattr(rnn.gpu_rnn, SIZES, lambda *args: (7, 11), raising=False)
    for primitive, rule in rules.items():
        lower = partial(getattr(rnn.gpu_rnn, f"cudnn_{rule}_lowering").func, plugin, "cu")
        mlir.register_lowering(primitive, lower, platform="cuda")
    with jax.default_matmul_precision(None):  # whatever the environment says
        yield
    for primitive, rule in rules.items():
        mlir.register_lowering(primitive, getattr(rnn.gpu_rnn, f"cudnn_{rule}_lowering"), platform="cuda")


def arguments(cell, batch):
    params, init, xs = problem(cell, T, batch, jnp.float32)
    return {"params": params, "init": init, "xs": xs}


def loss(scan, cell, params, init, xs, **options):
    outputs = scan(cell, params, init, xs, **options)
    weights = random_like(outputs, 5)
    terms = jax.tree.map(lambda leaf, weight: jnp.sum(weight * leaf), outputs, weights)
    return sum(jax.tree.leaves(terms)), outputs


CASES = {
    "rows": (CELL, (2,), None),
    "no batch": (CELL, (), None),
    "two batch axes": (CELL, (2, 2), None),
    "layers": (TWO, (2,), None),
    "nested layers": (NESTED, (2,), None),
    "padding": (CELL, (3,), VALID),
    "padding of layers": (TWO, (3,), VALID),
    "padding of two batch axes": (CELL, (3, 2), np.stack([VALID, VALID[:, ::-1]], axis=-1)),
    "padding shared by all rows": (CELL, (2,), VALID[:, 1]),
    "padding shared by some rows": (CELL, (3, 2), VALID),
    "nothing but padding": (CELL, (2,), np.zeros((T, 2), bool)),
}


def nan_unless(flags, leaf):
    return jnp.where(flags.reshape(flags.shape + (1,) * (leaf.ndim - flags.ndim)), leaf, jnp.nan)


def compare(cell, batch, valid, rtol=None):
    """Outputs of `cudnn_scan` and `scan`, and the gradients of everything; with padding, of known and of traced flags."""
    args, options = arguments(cell, batch), {}
    if valid is not None:
        options["valid"] = valid
        args["xs"] = nan_unless(valid, args["xs"])
        args["init"] = jax.tree.map(partial(nan_unless, valid.any(axis=0)), args["init"])

    def run(scan, args, options):
        return gradient_of(partial(loss, scan, cell, **options), args, tuple(args), has_aux=True)

    expected = jax.jit(partial(run, bptt.scan))(args, options)
    assert_close(jax.jit(partial(run, bptt.cudnn_scan, options=options))(args), expected, rtol=rtol)
    if options:
        assert_close(jax.jit(partial(run, bptt.cudnn_scan))(args, options), expected, rtol=rtol)


@pytest.mark.usefixtures("cudnn_here")
@cases("case", CASES, "rows", "padding of layers")
def test_equals_scan(case):
    compare(*case)


@pytest.mark.usefixtures("cudnn_here")
def test_traced_padding_before_a_valid_step_is_nan():
    args = arguments(CELL, (3,))
    run = lambda params, init, xs, valid: loss(bptt.cudnn_scan, CELL, params, init, xs, valid=valid)
    valid = VALID.copy()
    valid[:, 1] = [True, False, True, False, False]
    with pytest.raises(ValueError, match=r"step 2 of row \(1,\) is valid and step 1 is not"):
        run(**args, valid=valid)
    result = jax.jit(jax.value_and_grad(run, argnums=(0, 1, 2), has_aux=True))(*args.values(), valid)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(result[0]))
    *bars, xs_bar = jax.tree.leaves(result[1])
    assert all(np.isnan(leaf).all() for leaf in bars)
    assert np.isnan(xs_bar[:, 0]).all()
    assert np.isnan(xs_bar[0, 1]).all()


@pytest.mark.usefixtures("cudnn_here")
@pytest.mark.costly
@pytest.mark.parametrize(("valid", "options"), [(VALID, {}), (None, {"burn_in": 2})], ids=["padding", "burn-in"])
def test_in_a_network_and_in_training(valid, options):
    net = bptt.network(CELL, 2)
    xs, targets = (random_like(jax.ShapeDtypeStruct((T, 3, size), jnp.float32), size) for size in (F, 2))
    params, carry = net.init(jax.random.key(0)), CELL.initial_carry((3,))

    def training_loss(params, carry, chunk, *, scan, key):
        carry, ys = net.apply(params, carry, chunk.xs, scan=scan)
        return bptt.losses.mean_squared_error(ys, chunk.targets, mask=chunk.mask), carry

    def updated(chunk, scan):
        init, update = bptt.tbptt(training_loss, optax.sgd(0.1), scan=scan, **options)
        state, metrics = jax.jit(update)(init(params, carry, jax.random.key(1)), chunk)
        return state.params, state.carry, metrics

    chunk = bptt.Chunk(xs, targets, valid=valid)
    assert_close(updated(chunk, bptt.cudnn_scan), updated(chunk, bptt.adjoint_scan))
    with pytest.raises(TypeError, match=r"cudnn_scan has no is_first: .*Use adjoint_scan; or, .*pass is_first=None"):
        updated(chunk._replace(is_first=VALID), bptt.cudnn_scan)


@pytest.mark.parametrize(("steps", "batch"), [(0, (2,)), (T, (0,)), (T, (2, 0))])
def test_nothing_to_run_needs_no_cudnn(steps, batch):
    params, init, xs = problem(CELL, steps, batch, jnp.float32)
    for valid in (None, jnp.zeros((steps, *batch), bool)):
        options = {"valid": valid, "length": steps, "is_first": None, "reverse": False}
        assert_close(*(scan(CELL, params, init, xs, **options) for scan in (bptt.cudnn_scan, bptt.scan)))


def calls(program):
    """Of each custom call: its target, the arguments of its descriptor, and the shapes of its operands."""
    pattern = r'custom_call @(\w+)\(.*opaque = "(.*?)".*: \((.*?)\) -> '
    found = [re.search(pattern, line) for line in program.mlir_module().splitlines() if "custom_call @cu" in line]
    return [
        (target, eval(descriptor), re.findall(r"tensor<(.*?)>", operands))
        for target, descriptor, operands in (match.groups() for match in found)
    ]


@pytest.mark.usefixtures("cudnn_lowers")
def test_lowers_under_shard_map():
    args = arguments(CELL, (2,))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))
    rows, steps = jax.P("rows"), jax.P(None, "rows")

    def total(params, init, xs):
        run = partial(bptt.cudnn_scan, CELL)
        options = {"in_specs": (jax.P(), rows, steps), "out_specs": (rows, steps), "check_vma": False}
        return jnp.sum(jax.shard_map(run, mesh=mesh, **options)(params, init, xs)[1])

    assert len(calls(exported(jax.grad(total), *args.values()))) == 2


def exported(function, *args, platforms=("cuda",)):
    targets = "cudnn_rnn_ffi", "cudnn_rnn_bwd_ffi", "LayoutConstraint"
    checks = [export.DisabledSafetyCheck.custom_call(target) for target in targets]
    return export.export(jax.jit(function), platforms=platforms, disabled_checks=checks)(*args)


@pytest.mark.usefixtures("cudnn_lowers")
@pytest.mark.parametrize(("cell", "layers"), [(CELL, 1), (TWO, 2)])
def test_lowers_for_cuda(cell, layers):
    def gradient(args, valid):
        return gradient_of(partial(loss, bptt.cudnn_scan, cell, valid=valid), args, tuple(args), has_aux=True)

    (_, outputs), bars = jax.eval_shape(gradient, arguments(cell, (3, 2)), jnp.asarray(VALID))
    forward, backward = calls(exported(gradient, arguments(cell, (3, 2)), jnp.asarray(VALID)))
    rows, weights = 6, 4 * H * (F + H + 2) + (layers - 1) * 4 * H * (2 * H + 2)
    state, x, y, w = f"{layers}x{rows}x{H}xf32", f"{rows}x{T}x{F}xf32", f"{rows}x{T}x{H}xf32", f"{weights}xf32"
    descriptor = (F, H, layers, rows, T, 0.0, False, True, 7, 11)
    assert forward == ("cudnn_rnn_ffi", descriptor, [x, state, state, w, f"{rows}xi32"])
    assert backward == (
        "cudnn_rnn_bwd_ffi",
        descriptor,
        [y, state, state, x, state, state, w, y, "11xf32", w, f"{rows}xi32"],
    )
    assert outputs[1].shape == (T, 3, 2, H)
    assert len(bars) == 3 * layers + 2 * layers + 1


@pytest.mark.usefixtures("cudnn_lowers")
def test_arrays_are_row_major():
    """JAX leaves the layouts of cuDNN's arrays to XLA, which keeps time the slowest axis, and cuDNN doesn't know."""
    gradient = jax.value_and_grad(partial(loss, bptt.cudnn_scan, CELL), (0, 1, 2), has_aux=True)
    text = exported(gradient, *arguments(CELL, (2,)).values()).mlir_module()
    constraint = r"(%\w+) = stablehlo.custom_call @LayoutConstraint\((\S+)\) .*result_layouts = \[dense<\[2, 1, 0\]>"
    constrained = dict(re.findall(constraint, text))
    found = re.findall(r"(%\w+):5 = stablehlo.custom_call @cudnn_\w+\((.*?)\) .* : \((.*)\) -> \((.*)\)", text)
    (forward, *_), (_, read_backward, *_) = found

    def of_rank_3(names, types):
        return [name for name, shape in zip(names, types.split(", "), strict=True) if shape.count("x") == 3]

    for call, operands, operand_types, result_types in found:
        read = of_rank_3(operands.split(", "), operand_types)
        returned = of_rank_3([f"{call}#{i}" for i in range(5)], result_types)
        assert (len(read), len(returned)) == ((3, 3) if call == forward else (7, 3))
        # The backward call reads ys as the forward call wrote them.
        assert set(read) <= {*constrained, f"{forward}#0"}
        for name in returned:
            assert name in constrained.values()
            assert text.count(name) == 1 + (name in read_backward.split(", "))


@pytest.mark.usefixtures("cudnn_lowers")
def test_precision_is_that_of_the_forward_pass():
    def gradient(params, init, xs, precision):
        with jax.default_matmul_precision(precision):
            ys, pull = jax.vjp(lambda params: bptt.cudnn_scan(CELL, params, init, xs)[1], params)
        return pull(ys)

    for precision, tf32 in (("highest", False), ("tensorfloat32", True), (None, True)):
        program = exported(partial(gradient, precision=precision), *arguments(CELL, (2,)).values())
        assert [descriptor[7] for _, descriptor, _ in calls(program)] == [tf32, tf32], precision


UNMAPPED = r"cudnn_scan can't be mapped \(jax\.vmap, jacrev\): .*batch axes of init and xs, or map adjoint_scan"
NO_FORWARD = r"cudnn_scan has no forward-mode derivative.*: use jaxbptt\.scan"
TWICE = r"cudnn_scan is differentiated twice.*: use adjoint_scan, or scan"
ELSEWHERE = r"cudnn_scan runs on CUDA, and is lowered for another platform: use adjoint_scan"


def final(params):
    args = arguments(CELL, (2,))
    return jnp.sum(bptt.cudnn_scan(CELL, params, args["init"], args["xs"])[0].h)


def of_many(function):
    return lambda params: jax.vmap(function)(jax.tree.map(lambda leaf: leaf[None], params))


def tangent(params):
    return jax.jvp(final, (params,), (params,))[1]


def sum_of_gradient(params, final=final):
    return jnp.sum(jax.grad(final)(params).b)


@pytest.mark.usefixtures("cudnn_lowers")
@pytest.mark.parametrize(
    ("function", "message"),
    [
        (of_many(final), UNMAPPED),
        (of_many(jax.jit(final)), UNMAPPED),
        (of_many(jax.grad(final)), UNMAPPED),
        (jax.jacrev(lambda params: jnp.stack([final(params)] * 2)), UNMAPPED),
        (tangent, NO_FORWARD),
        (jax.jacfwd(final), NO_FORWARD),
        (jax.jacfwd(jax.jit(final)), NO_FORWARD),
        (lambda params: jax.linearize(final, params)[1](params), NO_FORWARD),
        (jax.grad(sum_of_gradient), TWICE),
        (jax.grad(partial(sum_of_gradient, final=jax.jit(final))), TWICE),
        (jax.grad(jax.jit(sum_of_gradient)), TWICE),
        (jax.hessian(final), TWICE),
    ],
)
def test_transformations_that_cudnn_has_not(function, message):
    params = arguments(CELL, (2,))["params"]
    with pytest.raises(TypeError, match=message):
        exported(function, params)


@pytest.mark.usefixtures("cudnn_lowers")
def test_other_platforms():
    params = arguments(CELL, (2,))["params"]
    with jax.default_device(jax.devices("cpu")[0]):
        for function in (final, jax.grad(final), jax.jit(final), jax.jit(jax.grad(final))):
            with pytest.raises(ValueError, match=ELSEWHERE):
                function(params)
    for platforms in (("tpu",), ("rocm",), ("cuda", "cpu")):
        with pytest.raises(ValueError, match=ELSEWHERE):
            exported(jax.grad(final), params, platforms=platforms)


def in_a_loop(params):
    def body(total, weight):
        return total + final(jax.tree.map(lambda leaf: weight * leaf, params)), None

    return jax.lax.scan(body, jnp.float32(0), jnp.ones(2, jnp.float32))[0]


def in_a_branch(params):
    return jax.lax.cond(params.b[0] > 0, final, lambda params: jnp.sum(params.b), params)


@pytest.mark.usefixtures("cudnn_lowers")
@pytest.mark.parametrize("function", [jax.checkpoint(final), in_a_loop, in_a_branch], ids=["remat", "loop", "branch"])
def test_gradients_inside(function):
    """The marks of arrays go through JAX's own control flow, forward and backward."""
    found = calls(exported(jax.grad(function), arguments(CELL, (2,))["params"]))
    assert {target for target, *_ in found} == {"cudnn_rnn_ffi", "cudnn_rnn_bwd_ffi"}


def test_without_cudnn(monkeypatch):
    args = arguments(CELL, (2,))
    for plugin in (None, SimpleNamespace()):
        monkeypatch.setattr(rnn, "gpu_rnn", plugin)
        with pytest.raises(ValueError, match=r"needs cuDNN, and this installation of jaxlib has none.*adjoint_scan"):
            bptt.cudnn_scan(CELL, *args.values())


def wrapped(cell):
    return cell._replace(step=wraps(cell.step)(lambda *args: cell.step(*args)))


ONLY_LSTM = r"runs a Cell that lstm\(\.\.\.\) made.*this step is a {}\. Use adjoint_scan"
NO_LSTM = "Cell that is none of these"
IN_FLOAT32 = r"{} has dtype {}, but JAX's binding of cuDNN computes in float32 alone"
ROWS_ONLY = r"valid has shape \(5, 3, 4\), which says more than which steps of a row are padding"
REFUSED = {
    "a bare step": ({"step": CELL.step}, TypeError, ONLY_LSTM.format("function")),
    "another cell": ({"step": bptt.gru(F, H)}, TypeError, ONLY_LSTM.format(NO_LSTM)),
    "another layer": ({"step": bptt.stack(CELL, bptt.gru(H, H))}, TypeError, ONLY_LSTM.format(NO_LSTM)),
    "a replaced step": ({"step": wrapped(CELL)}, TypeError, ONLY_LSTM.format(NO_LSTM)),
    "rounded products": ({"step": bptt.lstm(F, H, compute_dtype=jnp.bfloat16)}, TypeError, ONLY_LSTM.format(NO_LSTM)),
    "a rounded layer": ({"step": bptt.stack(bptt.lstm(F, H, compute_dtype=jnp.float32))}, TypeError, "stack"),
    "no step": ({"step": None}, TypeError, r"step is a NoneType, but a Cell or a function is expected"),
    "unequal layers": ({"step": bptt.stack(CELL, bptt.lstm(H, 5))}, ValueError, r"hidden sizes \[4, 5\]"),
    "is_first": ({"is_first": VALID}, TypeError, r"cudnn_scan has no is_first: .*Use adjoint_scan"),
    "reverse": ({"reverse": True}, TypeError, r"cudnn_scan has no reverse: .*Use adjoint_scan"),
    "options": ({"reset_carry": 0.0, "unroll": 2}, TypeError, r"cudnn_scan has no reset_carry or unroll: "),
    "params in float64": ({"params": jnp.float64}, TypeError, IN_FLOAT32.format(r"params\.W_xh", "float64")),
    "init in bfloat16": ({"init": jnp.bfloat16}, TypeError, IN_FLOAT32.format(r"init\.h", "bfloat16")),
    "integers": ({"xs": jnp.int32}, TypeError, IN_FLOAT32.format("xs", "int32")),
    "a carry of fewer rows": ({"init": CELL.initial_carry((2,))}, ValueError, r"lstm: x has shape \(3, 3\)"),
    "foreign params": ({"params": bptt.lstm(F, 5).init(jax.random.key(0))}, ValueError, r"lstm: W_xh has shape"),
    "lengths that disagree": ({"length": 4}, ValueError, r"length says 4 time steps \(4\), but xs has 5"),
    "valid of another length": ({"valid": VALID[1:]}, ValueError, r"valid has shape \(4, 3\), but the sequence has 5"),
    "valid of other rows": ({"valid": VALID[:, 1:]}, ValueError, r"valid has shape \(5, 2\)"),
    "valid for units": ({"valid": np.ones((T, 3, H), bool)}, ValueError, ROWS_ONLY),
    "numbers for valid": ({"valid": LENGTHS}, TypeError, r"valid has dtype int64"),
    "padding first": (
        {"valid": VALID[::-1]},
        ValueError,
        r"step 3 of row \(1,\) is valid and step 2 is not .*at the end of each row only: move it there, or use adjoint_scan",
    ),
}


@pytest.mark.usefixtures("cudnn_here")
@pytest.mark.parametrize(("change", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_refused(change, error, message):
    args = {"step": CELL, **arguments(CELL, (3,))}
    for name, value in change.items():
        cast = isinstance(value, type(jnp.float32))
        args[name] = jax.tree.map(lambda leaf, to=value: leaf.astype(to), args[name]) if cast else value
    with pytest.raises(error, match=message):
        bptt.cudnn_scan(**args)


def test_devices_in_types_are_refused():
    args = arguments(CELL, (2,))
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("rows",))
    run = lambda params, init, xs, valid: bptt.cudnn_scan(CELL, params, init, xs, valid=valid)
    message = r"types name devices.*split rows by jax\.shard_map\(\.\.\., check_vma=False\)"
    for varies in range(4):
        specs = tuple(jax.P("rows") if i == varies else jax.P() for i in range(4))
        mapped = jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=jax.P("rows"))
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(mapped, *args.values(), VALID[:, :2])


def test_open_sizes_are_refused():
    args = arguments(CELL, (3,))
    for sizes, shape in (("t, 3", r"\(t, 3, 4\)"), ("5, b", r"\(5, b, 4\)")):
        time, batch = export.symbolic_shape(sizes)
        xs = jax.ShapeDtypeStruct((time, batch, F), jnp.float32)
        with pytest.raises(ValueError, match=rf"can't leave sizes open, but ys would have shape {shape}"):
            exported(
                lambda params, xs: bptt.cudnn_scan(CELL, params, CELL.initial_carry(xs.shape[1:-1]), xs),
                args["params"],
                xs,
            )


on_a_device = pytest.mark.skipif(
    not hasattr(rnn.gpu_rnn, SIZES) or jax.default_backend() != "gpu", reason="cuDNN needs a CUDA device"
)


@on_a_device
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_scan_on_a_device(case):
    with jax.default_matmul_precision("highest"):
        compare(*case, rtol=1e-4)  # cuDNN's tanh is not XLA's


@on_a_device
def test_without_jit_on_a_device():
    params = arguments(CELL, (2,))["params"]
    assert_close(jax.grad(final)(params), jax.jit(jax.grad(final))(params))
    with pytest.raises(TypeError, match=NO_FORWARD):
        tangent(params)
