"""What makes the backward fast: constants leave the loop, nothing is computed or kept twice, time is cut into segments."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from reference import assert_close, make_cell, problem, random_like

import jaxbptt as bptt
from jaxbptt.along_time import at
from jaxbptt.analysis.cost import count_flops
from jaxbptt.platforms import CHOICES, ELSEWHERE
from jaxbptt.programs.evaluate import subjaxprs
from jaxbptt.programs.hoist import hoisted, last_moves
from jaxbptt.programs.linearized import linearized
from jaxbptt.programs.perturbed import everything
from jaxbptt.programs.program import program
from jaxbptt.programs.trace import trace
from jaxbptt.scans.flags import Flags
from jaxbptt.scans.passes import one_pass, segment_length
from jaxbptt.scans.recurrence import prepare

CELLS = ("elman", "gru", "lstm")


def derive(step, params, init, xs):
    r = prepare(step, params, init, xs, None)
    return linearize(trace(r.step, r.params, r.init, r.xs))


def linearize(traced):
    return linearized(traced, everything(*traced.shapes))


def gradients(scan, step, args, seed=3):
    out, pull = jax.vjp(partial(scan, step), *args)
    return out, pull(random_like(out, seed))


@pytest.mark.parametrize(
    ("steps", "batch"), [(1, ()), (15, (70,)), (16, ()), (17, (70,)), (31, (2, 3)), (67, ()), (67, (2, 3))]
)
@pytest.mark.costly
def test_segments_with_and_without_a_rest(steps, batch):
    """70 rows take segments of about 15 steps, one row segments of half the sequence."""
    cell = make_cell("gru")
    args = problem(cell, steps, batch)
    expected = gradients(bptt.scan, cell, args)
    assert_close(gradients(bptt.adjoint_scan, cell, args), expected)
    assert_close(gradients(bptt.adjoint_scan, cell.step, args), expected)


@pytest.mark.parametrize(
    ("carry", "steps", "on_cpu"),
    [
        (jax.ShapeDtypeStruct((32, 128), float), 256, 32),
        (jax.ShapeDtypeStruct((1, 128), float), 1024, 512),
        (jax.ShapeDtypeStruct((1000, 128), float), 64, 8),
        ({"h": jax.ShapeDtypeStruct((4,), float), "c": jax.ShapeDtypeStruct((4, 5), float)}, 10_000, 250),
        (jax.ShapeDtypeStruct((3,), float), 7, 7),
    ],
)
def test_segment_lengths(carry, steps, on_cpu):
    assert segment_length(carry, steps, CHOICES["cpu"]) == on_cpu
    assert segment_length(carry, steps, ELSEWHERE) == steps
    assert segment_length(carry, 0, CHOICES["cpu"]) == segment_length(carry, 0, ELSEWHERE) == 1


@pytest.mark.parametrize("name", ["gru", "lstm"])
@pytest.mark.slow
def test_second_derivatives_through_segments(name):
    cell = make_cell(name)
    params, init, xs = problem(cell, 17, (2,))

    def squared_gradient(scan, step, params):
        gradient = jax.grad(lambda params: jnp.sum(scan(step, params, init, xs)[1] ** 3))(params)
        return sum(jnp.vdot(leaf, leaf) for leaf in jax.tree.leaves(gradient))

    expected = jax.grad(partial(squared_gradient, bptt.scan, cell))(params)
    assert_close(jax.grad(partial(squared_gradient, bptt.adjoint_scan, cell))(params), expected)
    assert_close(jax.grad(partial(squared_gradient, bptt.adjoint_scan, cell.step))(params), expected)


@pytest.mark.parametrize("name", CELLS)
def test_nothing_is_computed_twice(name):
    """Products by one step: as many operations as JAX's own gradient, the derived adjoint included."""
    cell = bptt.__dict__[name](16, 32)
    params, init, xs = cell.init(jax.random.key(0)), cell.initial_carry((8,)), jnp.zeros((64, 8, 16), jnp.float32)

    def flops(scan, step):
        gradient = jax.grad(lambda params: jnp.sum(scan(step, params, init, xs)[1] ** 2))
        return count_flops(jax.make_jaxpr(gradient)(params).jaxpr)

    expected = flops(bptt.scan, cell)
    assert flops(bptt.adjoint_scan, cell) < 1.03 * expected
    assert flops(bptt.adjoint_scan, cell.step) < 1.03 * expected


@pytest.mark.parametrize("name", CELLS)
def test_constants_leave_the_loop(name):
    """No weight is transposed, nor put beside another, at a step; nor read across in the recursion of a derived adjoint."""
    cell = make_cell(name)
    params, init, xs = problem(cell, 64, (5,))
    for step in (cell, cell.step):
        gradient = jax.grad(lambda params, step=step: jnp.sum(bptt.adjoint_scan(step, params, init, xs)[1] ** 2))
        jaxpr = jax.make_jaxpr(gradient)(params).jaxpr
        weights = {leaf.shape for leaf in jax.tree.leaves(params)} | {leaf.T.shape for leaf in jax.tree.leaves(params)}
        for eqn in equations_in_inner_loops(jaxpr):
            if eqn.primitive.name == "transpose":
                assert eqn.outvars[0].aval.shape not in weights
            if eqn.primitive.name == "dot_general" and eqn.invars[1].aval.shape in weights:
                (_, (right,)), _ = eqn.params["dimension_numbers"]
                assert right == 0


def equations_in_inner_loops(jaxpr, inside=False):
    for eqn in jaxpr.eqns:
        inner = [inner for inner, _ in subjaxprs(eqn)]
        if inside and not inner:
            yield eqn
        for jaxpr in inner:
            innermost = eqn.primitive.name == "scan" and "scan" not in {e.primitive.name for e in jaxpr.eqns}
            yield from equations_in_inner_loops(jaxpr, inside or innermost)


def test_what_is_kept():
    """States are read from the outputs; gates are stored once each, and what is cheap is rematerialised."""
    counts = {"elman": (0, 0), "gru": (4, 4), "lstm": (5, 6)}
    for name, (own, derived) in counts.items():
        cell = make_cell(name)
        params, init, xs = problem(cell, 6, (2,))
        for step, count in ((cell, own), (cell.step, derived)):
            over_time, r = one_pass(step, None, prepare(step, params, init, xs, None), Flags(), unroll=1)
            over_time = over_time.differentiated(everything(r.params, init, xs))
            (_, ys), residuals = over_time.forward(r.params, init, xs, 6)
            assert len(residuals.stored) == count, name
            stacked = residuals.stacked()
            assert_close(residuals.window(2, 3), jax.tree.map(lambda leaf: leaf[2:5], stacked))
            assert_close(residuals.window(0, 2), jax.tree.map(lambda leaf: leaf[:2], stacked))
            for t in (0, 5):
                assert_close(residuals.at(t), at(stacked, t))
        h_0 = jax.tree.leaves(init)[0]
        assert any(leaf.shape == ys.shape and (leaf[1:] == ys[:-1]).all() and (leaf[0] == h_0).all()
                   for leaf in jax.tree.leaves(stacked))  # fmt: skip


@pytest.mark.parametrize(
    "loss", [lambda h, ys: jnp.mean(ys**2), lambda h, ys: jnp.mean(ys[-1] ** 2)], ids=["every", "last"]
)
@pytest.mark.parametrize("name", CELLS)
@pytest.mark.costly
def test_fewer_bytes_than_scan(name, loss):
    cell = bptt.__dict__[name](16, 64)
    params, init = cell.init(jax.random.key(0)), cell.initial_carry((1,))

    def temporary_bytes(scan, step, xs):
        gradient = jax.jit(jax.value_and_grad(lambda params, xs: loss(*scan(step, params, init, xs))))
        return gradient.lower(params, xs).compile().memory_analysis().temp_size_in_bytes

    for steps in (300, 2_000):
        xs = jnp.zeros((steps, 1, 16), jnp.float32)
        reference = temporary_bytes(bptt.scan, cell, xs)
        assert temporary_bytes(bptt.adjoint_scan, cell, xs) <= reference


def compiled_gradient(loss, steps):
    cell = bptt.elman(8, 32)
    params, init = jax.eval_shape(cell.init, jax.random.key(0)), jax.eval_shape(cell.initial_carry)
    xs = jax.ShapeDtypeStruct((steps, 8), jnp.float32)
    gradient = jax.jit(jax.grad(lambda *args: loss(*bptt.adjoint_scan(cell, *args))))
    return gradient.lower(params, init, xs).compile()


def test_unused_outputs_have_no_gradient_array():
    steps = 50_000
    states = 4 * 32 * steps
    last, every = (
        compiled_gradient(loss, steps).memory_analysis().temp_size_in_bytes
        for loss in (lambda h, ys: jnp.sum(h**2), lambda h, ys: jnp.sum(ys**2))
    )
    assert states < last < 1.1 * states
    assert 2 * states < every < 2.1 * states


@pytest.mark.parametrize("loss", [lambda h, ys: h.sum(), lambda h, ys: ys.sum(), lambda h, ys: ys[-1].sum()])
def test_no_loop_fills_arrays_of_all_steps(loss):
    """XLA moves constants into loops: a gradient of ones was once rematerialised as a whole in each segment."""
    steps = 50_000
    text = compiled_gradient(loss, steps).as_text()
    bodies = set(re.findall(r"body=(%[\w.-]+)", text))
    assert bodies
    computation = None
    for line in text.splitlines():
        if line.startswith(("%", "ENTRY")):
            computation = line.split()[0]
        operation = re.search(rf" = f32\[{steps},\d+\]\S* (\S+?)\(", line.split("metadata=")[0])
        if computation in bodies and operation and operation[1] not in ("parameter", "get-tuple-element"):
            assert "dynamic-update-slice" in line, line


def test_moves_come_after_a_sum():
    def fn(a, b):
        return [jnp.concatenate([a.T, b @ a.T]), (a * 2).reshape(6)], a.sum()

    a, b = random_like((jnp.zeros((2, 3)), jnp.zeros((3, 3))), 0)
    traced = program(fn, a, b)
    moves = last_moves(traced, 2)
    assert {var.aval.shape for var in moves.operands} == {(2, 3), (3, 2)}
    values = [{"a": a, "b a": b @ a.T, "2 a": 2 * a}[key] for key in ("a", "b a", "2 a")]
    assert_close(moves(values), fn(a, b)[0])
    assert moves.form == last_moves(program(fn, 2 * a, b), 2).form
    assert moves.form != last_moves(program(lambda a, b: ((a.T, (b @ a.T).T), 2 * a), a, b), 2).form


def other_order(h, deltas):
    return (deltas.T @ h).T


def other_parts(h, deltas):
    return jnp.concatenate([h[:, :1].T @ deltas, h[:, 1:].T @ deltas])


@pytest.mark.parametrize("steps", [17, 19])
@pytest.mark.parametrize("other", [other_order, other_parts])
@pytest.mark.parametrize(
    "is_other",
    [lambda length: length > 12, lambda length: length > 2, lambda length: length % 2 == 1],
    ids=["all steps", "long", "odd"],
)
@pytest.mark.costly
def test_contractions_that_differ_by_length(steps, other, is_other):
    """An adjoint may contract segments of different lengths differently; a second derivative contracts all steps at once."""

    def step(W, h, x):
        h = jnp.tanh(h @ W + x)
        return h, h

    def forward(W, h, x):
        outputs = step(W, h, x)
        return outputs, (h, outputs[0])

    def backward(W, residuals, x, h_bar, y_bar):
        delta = (h_bar + y_bar) * (1 - residuals[1] ** 2)
        return delta @ W.T, delta

    def contract(W, residuals, xs, ys_bar, deltas):
        h = residuals[0]
        return (other(h, deltas) if is_other(len(deltas)) else h.T @ deltas), deltas

    adjoint = bptt.Adjoint(forward, backward, contract)
    args = random_like((jnp.zeros((3, 3)), jnp.zeros(3), jnp.zeros((steps, 3))), 1)
    expected = gradients(bptt.scan, step, args)
    for scan in (
        bptt.adjoint_scan,
        bptt.checkpointed_scan,
        partial(bptt.checkpointed_scan, segment_length=3),
        partial(bptt.checkpointed_scan, checkpoints=2),
        partial(bptt.truncated_scan, truncation_length=steps),
    ):
        assert_close(gradients(partial(scan, adjoint=adjoint), step, args), expected)

    def hessian_product(scan):
        gradient = jax.grad(lambda W: jnp.sum(jnp.sin(scan(step, W, *args[1:])[1])))
        return jax.jvp(gradient, args[:1], (jnp.cos(args[0]),))[1]

    mine = hessian_product(partial(bptt.adjoint_scan, adjoint=adjoint))
    assert_close(mine, hessian_product(bptt.scan))


@pytest.mark.parametrize("steps", [1, 19])
@pytest.mark.slow
def test_contraction_of_outputs_that_the_loss_does_not_use(steps):
    """The gradient of y = W h is taken by `contract` alone; of the loss of the last state there is none."""

    def step(W, h, x):
        h = 0.9 * jnp.tanh(h + x)
        return h, (h @ W, h)

    def forward(W, h, x):
        outputs = step(W, h, x)
        return outputs, outputs[0] / 0.9

    def backward(W, u, x, h_bar, ys_bar):
        delta = (h_bar + ys_bar[0] @ W.T + ys_bar[1]) * 0.9 * (1 - u**2)
        return delta, delta

    def contract(W, us, xs, ys_bar, deltas):
        return 0.9 * us.T @ ys_bar[0], deltas

    adjoint = bptt.Adjoint(forward, backward, contract)
    args = random_like((jnp.zeros((3, 3)), jnp.zeros(3), jnp.zeros((steps, 3))), 1)
    losses = [
        lambda h, ys: jnp.sum(h**3),
        lambda h, ys: jnp.sum(ys[1] ** 3),
        lambda h, ys: jnp.sum(ys[0] ** 3),
        lambda h, ys: 0.0,
    ]
    for loss in losses:
        expected = jax.grad(lambda *args, loss=loss: loss(*bptt.scan(step, *args)), argnums=(0, 1, 2))(*args)
        for scan in (bptt.adjoint_scan, partial(bptt.checkpointed_scan, checkpoints=1), bptt.checkpointed_scan):
            for ours in (partial(scan, step, adjoint=adjoint), partial(scan, step)):
                assert_close(
                    jax.grad(lambda *args, ours=ours, loss=loss: loss(*ours(*args)), argnums=(0, 1, 2))(*args), expected
                )


@pytest.mark.slow
def test_many_segments_in_half_precision():
    """The sum over 512 segments of 1,024 each: in bfloat16 it would stay at 262,144."""
    w, h, xs = jnp.ones((), jnp.bfloat16), jnp.zeros((128, 1), jnp.bfloat16), jnp.ones((4096, 128, 1), jnp.bfloat16)
    gradient = jax.grad(lambda w: bptt.adjoint_scan(lambda w, h, x: (h, w * x), w, h, xs)[1].sum())
    assert gradient(w) == 4096 * 128


def test_effects_stay_in_the_loop():
    """What a step does beside computing it does at every step, even if it depends on params alone."""
    seen = []

    def step(w, h, x):
        jax.debug.callback(lambda w: seen.append(float(w)), w)
        return w * h + x, h

    jax.grad(lambda w: bptt.adjoint_scan(step, w, 0.0, jnp.ones(5))[0])(0.5)
    jax.effects_barrier()
    assert seen == [0.5] * 5


def test_long_chains_are_sorted_in_time():
    """Each square is used twice, and the chain is longer than Python's stack is deep."""

    def step(w, h, x):
        for _ in range(250):
            h = h * h * 0.9 + h * w
        return h, h

    assert derive(step, jnp.array(0.1), jnp.array(0.2), jnp.ones(3)) is not None


def inner_loop(w, h, x):
    h, _ = jax.lax.scan(lambda h, _: (jnp.tanh(w * h + x), None), h, None, length=3)
    return h, h


def branch(w, h, x):
    h = jax.lax.cond(x > 0, lambda h: jnp.sin(w * h), lambda h: h + w * x, h)
    return h, h


@jax.custom_vjp
def own_derivative(h, w):
    return jnp.tanh(h * w)


own_derivative.defvjp(
    lambda h, w: (own_derivative(h, w), (h, w)),
    lambda saved, bar: jax.vjp(lambda h, w: jnp.tanh(h * w), *saved)[1](bar),
)


@pytest.mark.parametrize(
    "step",
    [inner_loop, branch, lambda w, h, x: (own_derivative(h, w) + x, h)],
    ids=["loop", "branch", "custom_vjp"],
)
def test_steps_that_are_not_sorted(step):
    """They are reversed by jax.vjp, step by step."""
    args = jnp.array(0.7), jnp.array(0.3), jnp.array([0.5, -0.2] * 10)
    assert derive(step, *args) is None
    assert_close(gradients(bptt.adjoint_scan, step, args), gradients(bptt.scan, step, args))


@pytest.mark.parametrize(
    "step",
    [
        lambda w, h, x: (h, w * x),  # nothing of the input in the carry
        lambda w, h, x: (h + x, h),  # the input's tangent enters as it is
        lambda w, h, x: (w * x, jnp.sin(h)),  # nothing of the carry in the next one
        lambda w, h, x: (jnp.zeros_like(h), w * h * x),  # a carry without a tangent
        lambda w, h, x: (h * 0.5, x),  # params unused
        lambda w, h, x: (jnp.zeros(3).at[1].add(h * w).at[1].set(x * h).sum() + h * w, h),
        lambda w, h, x: (jnp.where(h > 0, h * w, jax.lax.stop_gradient(h) + x), jnp.exp(w) * h),
        lambda w, h, x: (jax.nn.relu(h * w) + jax.checkpoint(jnp.sin)(h * x), jnp.cumsum(jnp.stack([h, w * x]))),
    ],
)
def test_odd_steps_are_sorted(step):
    args = jnp.array(0.7), jnp.array(0.3), jnp.array([0.5, -0.2, 0.9] * 7)
    assert derive(step, *args) is not None
    assert_close(gradients(bptt.adjoint_scan, step, args), gradients(bptt.scan, step, args))


@pytest.mark.parametrize("steps", [8, 40])
def test_own_adjoint_with_flags_and_integers_among_params(steps):
    """Flags stay Python, and what a contraction returns for a leaf without a derivative is left out, in segments too."""

    def forward(params, h, x):
        h_new = jnp.tanh(params["W"] @ h + x) if params["tanh"] else params["W"] @ h + x
        return (h_new, h_new), (h, h_new)

    def backward(params, residuals, x, h_bar, y_bar):
        delta = (h_bar + y_bar) * (1 - residuals[1] ** 2)
        return params["W"].T @ delta, delta

    def contract(params, residuals, xs, ys_bar, deltas):
        return params | {"W": deltas.T @ residuals[0]}, deltas

    adjoint = bptt.Adjoint(forward, backward, contract)

    def loss(scan, W):
        params = {"W": W, "sizes": jnp.arange(3), "tanh": True}
        return jnp.sum(scan(lambda *args: forward(*args)[0], params, jnp.ones(3), jnp.ones((steps, 3)))[1] ** 2)

    W = random_like(jnp.zeros((3, 3)), 0, 0.5)
    expected = jax.grad(partial(loss, bptt.scan))(W)
    assert_close(jax.grad(partial(loss, partial(bptt.adjoint_scan, adjoint=adjoint)))(W), expected)


def test_dead_tangents_are_not_sorted():
    """What is stopped leaves nothing to keep or to contract."""

    def step(w, h, x, *, extra):
        h = jnp.tanh(w @ h + x)
        return h + jax.lax.stop_gradient(jnp.tanh(w @ jnp.sin(h))) if extra else h, h

    args = jnp.eye(3), jnp.ones(3), jnp.ones((40, 3))
    sizes = []
    for extra in (False, True):
        adjoint = derive(partial(step, extra=extra), *args)
        at_t = args[1], args[2][0]
        (bars, kept), params = adjoint.forward(trace_params(step, args), *at_t), trace_params(step, args)
        _, deltas = adjoint.backward(params, kept, at_t[1], *bars)
        sizes.append((len(kept), len(deltas)))
    assert sizes[0] == sizes[1]


def trace_params(step, args):
    return trace(*prepare(partial(step, extra=False), *args, None)[:4]).params


def test_large_tangents_stay_out_of_the_recursion():
    """A table built at each step would make each delta as large as the table."""

    def step(table, h, x):
        return jnp.tanh(jnp.concatenate([table, h[None]])[-1] * 0.9 + table[0] * x), h

    args = random_like((jnp.zeros((500, 3)), jnp.zeros(3), jnp.zeros(40)), 0)
    assert derive(step, *args) is None
    assert_close(gradients(bptt.adjoint_scan, step, args), gradients(bptt.scan, step, args))


def test_without_inputs_and_with_integers():
    def step(w, state, _):
        h, n = state
        return (jnp.tanh(w * h + n.astype(h.dtype)), n + 1), (h, n)

    def loss(scan, w, h):
        (h, n), (hs, ns) = scan(step, w, (h, 0), length=40)
        return h + jnp.sum(hs * ns.astype(hs.dtype)) + n.astype(h.dtype)

    args = jnp.array(0.7), jnp.array(0.3)
    expected = jax.grad(partial(loss, bptt.scan), argnums=(0, 1))(*args)
    assert_close(jax.grad(partial(loss, bptt.adjoint_scan), argnums=(0, 1))(*args), expected)


def test_hoisting_keeps_broadcasts_inside():
    """A bias is not written out for all rows to be read again at each step."""
    loop = hoisted(lambda b, h: h + b, jnp.ones(3), jnp.zeros((4, 3)))
    jaxpr = jax.make_jaxpr(loop.call)(jnp.zeros((4, 3)))
    assert [const.shape for const in jaxpr.consts] == [(3,)]
    assert_close(loop.call(jnp.zeros((4, 3))), jnp.ones((4, 3)))


def equations_in_loops(jaxpr, inside=False):
    """Of a program for CPU."""
    for eqn in jaxpr.eqns:
        if inside:
            yield eqn
        platforms = eqn.params.get("branches_platforms") or ()
        others = {name for names in platforms for name in names or ()}
        for i, (inner, _) in enumerate(subjaxprs(eqn)):
            # `None` stands for the platforms that have no branch of their own.
            if platforms and "cpu" not in (platforms[i] or {"cpu"} - others):
                continue
            yield from equations_in_loops(inner, inside or eqn.primitive.name in ("scan", "while"))


# Names of the axes of images, kernel and results, shapes of the first two, and options.
CONVOLUTIONS = {
    "channels last": (("NHWC", "HWIO", "NHWC"), (6, 5, 4, 6), (3, 3, 6, 6), {}),
    "channels first": (("NCHW", "OIHW", "NCHW"), (6, 6, 5, 4), (6, 6, 2, 3), {}),
    "one axis, odd order": (("WNC", "IWO", "CNW"), (5, 6, 6), (6, 3, 6), {}),
    "groups": (("NCW", "OIW", "NCW"), (6, 8, 5), (8, 4, 3), {"feature_group_count": 2}),
    "dilated": (("NWC", "WIO", "NWC"), (6, 5, 6), (3, 6, 6), {"rhs_dilation": (2,)}),
    "few channels": (("NCW", "OIW", "NCW"), (2, 3, 5), (3, 3, 3), {}),
}


@pytest.mark.parametrize(
    ("names", "strategy"),
    [(names, bptt.adjoint_scan) for names in CONVOLUTIONS]
    + [("channels first", bptt.checkpointed_scan)]
    + [("channels last", partial(bptt.truncated_scan, truncation_length=99))],
)
def test_convolutions_in_loops_have_the_form_that_is_fast(names, strategy):
    """That of a kernel's gradient is not in it as JAX derives it, and takes 40 times as long in a loop on a CPU."""
    numbers, shape, kernel, options = CONVOLUTIONS[names]

    def convolved(image, kernel):
        out = jax.lax.conv_general_dilated(
            image, kernel, (1,) * (len(shape) - 2), "SAME", dimension_numbers=numbers, **options
        )
        return out.transpose([numbers[2].index(axis) for axis in numbers[0]])

    def step(params, h, x):
        h = jnp.tanh(convolved(h, params[0]) + convolved(x, params[1]))
        return h, h

    params = random_like([jax.ShapeDtypeStruct(kernel, float)] * 2, 0, 0.3)
    init, xs = random_like((jnp.zeros(shape), jnp.zeros((17, *shape))), 1)

    def gradient(scan):
        return jax.grad(lambda *args: jnp.sum(scan(step, *args)[1] ** 2), argnums=(0, 1, 2))

    assert_close(jax.jit(gradient(strategy))(params, init, xs), jax.jit(gradient(bptt.scan))(params, init, xs))
    jaxpr = jax.make_jaxpr(gradient(strategy))(params, init, xs).jaxpr
    rank, loops = len(shape), equations_in_loops(jaxpr)
    found = [eqn.params["dimension_numbers"] for eqn in loops if eqn.primitive.name == "conv_general_dilated"]
    assert len(found) >= 6
    last = (0, rank - 1, *range(1, rank - 1))
    allowed = {(last, (rank - 1, rank - 2, *range(rank - 2)), last)}
    if names == "few channels":  # for which the other form is the slower one
        assert not allowed.issuperset(map(tuple, found))
        return
    if strategy is not bptt.adjoint_scan:  # without a derivative, the forward pass is the step as it was written
        allowed.add(tuple(jax.lax.conv_dimension_numbers(shape, kernel, numbers)))
    assert set(map(tuple, found)) <= allowed


def test_pieces_of_one_product_have_one_delta():
    """Gates of weights that are put together in the step, and added up piece by piece."""

    def step(params, h, x):
        of_h, of_x = (jnp.split(a @ jnp.concatenate(w, 1), 2, 1) for a, w in zip((h, x), params, strict=True))
        h = jnp.tanh(of_h[0] + of_x[0]) * jax.nn.sigmoid(of_h[1] + of_x[1])
        return h, h

    params, init, xs = random_like(([[jnp.zeros((4, 4))] * 2] * 2, jnp.zeros((3, 4)), jnp.zeros((16, 3, 4))), 0)
    assert_close(gradients(bptt.adjoint_scan, step, (params, init, xs)), gradients(bptt.scan, step, (params, init, xs)))
    jaxpr = jax.make_jaxpr(jax.grad(lambda params: jnp.sum(bptt.adjoint_scan(step, params, init, xs)[1])))(params)
    loops = list(equations_in_loops(jaxpr.jaxpr))

    def shapes(name):
        return [eqn.outvars[0].aval.shape for eqn in loops if eqn.primitive.name == name]

    assert shapes("concatenate") == [(3, 8), (8, 3, 4)]  # of a δₜ, and of the states before each step of a segment
    assert shapes("split") == [(3, 4), (3, 4)]  # in the forward pass
