"""Cells compute their equations, and start as documented."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CELLS, DIAGONAL, assert_close, make_cell, problem

import jaxbptt as bptt
from jaxbptt import cells


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def test_elman_equation():
    cell = make_cell("elman")
    p, h, xs = problem(cell, 1)
    expected = np.tanh(p.W_hh @ h + p.W_xh @ xs[0] + p.b)
    assert_close(cell.step(p, h, xs[0]), (expected, expected))


def test_gru_equation():
    cell = make_cell("gru")
    p, h, xs = problem(cell, 1)
    (W_xr, W_xz, W_xn), (W_hr, W_hz, W_hn) = np.split(p.W_xh, 3), np.split(p.W_hh, 3)
    b_r, b_z, b_n = np.split(p.b, 3)
    r = sigmoid(W_hr @ h + W_xr @ xs[0] + b_r)
    z = sigmoid(W_hz @ h + W_xz @ xs[0] + b_z)
    n = np.tanh(W_xn @ xs[0] + b_n + r * (W_hn @ h + p.b_hn))
    expected = (1 - z) * n + z * h
    assert_close(cell.step(p, h, xs[0]), (expected, expected))


def test_lstm_equation():
    cell = make_cell("lstm")
    p, state, xs = problem(cell, 1)
    a_i, a_f, a_g, a_o = np.split(p.W_hh @ state.h + p.W_xh @ xs[0] + p.b, 4)
    c = sigmoid(a_f) * state.c + sigmoid(a_i) * np.tanh(a_g)
    h = sigmoid(a_o) * np.tanh(c)
    assert_close(cell.step(p, state, xs[0]), (bptt.LSTMState(h, c), h))


def test_layer_norm_equation():
    cell = make_cell("layer_norm")
    p, state, xs = problem(cell, 1)

    def normalised(a, gain):
        return gain * (a - a.mean()) / np.sqrt(a.var() + 1e-5)

    a = normalised(p.W_hh @ state.h, p.gain_hh) + normalised(p.W_xh @ xs[0], p.gain_xh) + p.b
    a_i, a_f, a_g, a_o = np.split(a, 4)
    c = sigmoid(a_f) * state.c + sigmoid(a_i) * np.tanh(a_g)
    h = sigmoid(a_o) * np.tanh(normalised(c, p.gain_c) + p.b_c)
    assert_close(cell.step(p, state, xs[0]), (bptt.LSTMState(h, c), h))


def test_layer_norm_starts_as_the_lstm_does():
    """The weights of the plain cell, chrono's biases included, gains of 1, and nothing added to the memory."""
    options = {"chrono_length": 9, "dtype": jnp.float64}
    params = bptt.lstm(3, 4, layer_norm=True, **options).init(jax.random.key(0))
    assert isinstance(params, bptt.LayerNormLSTMParams)
    assert_close(params[:3], tuple(bptt.lstm(3, 4, **options).init(jax.random.key(0))))
    assert [(np.unique(leaf).tolist(), leaf.shape) for leaf in params[3:]] == [([1], (16,))] * 2 + [
        ([1], (4,)),
        ([0], (4,)),
    ]
    with pytest.raises(TypeError, match="layer_norm is 1, but it says whether to normalise: pass True or False"):
        inspect.unwrap(bptt.lstm)(3, 4, layer_norm=1)
    cell = make_cell("layer_norm")
    with pytest.raises(ValueError, match=r"lstm: gain_hh has shape \(3,\), but \(16,\) is expected"):
        cell.step(params._replace(gain_hh=jnp.ones(3)), cell.initial_carry(), jnp.ones(3))


def test_the_adjoint_of_layer_norm_pays():
    """By hand it gives the gradient that is derived, in at most 0.85 of its temporary bytes."""
    cell = make_cell("layer_norm")
    params, carry, xs = problem(cell, 200, (8,))

    def compiled(step):
        def loss(params, xs):
            return jnp.sum(jnp.sin(bptt.adjoint_scan(step, params, carry, xs)[1]))

        return jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, xs).compile()

    by_hand, derived = compiled(cell), compiled(cell.step)
    assert_close(by_hand(params, xs), derived(params, xs))
    by_hand, derived = (program.memory_analysis().temp_size_in_bytes for program in (by_hand, derived))
    assert by_hand < 0.85 * derived


def test_stack_is_its_layers_one_after_the_other():
    lower, upper = bptt.lstm(3, 4, dtype=jnp.float64), bptt.gru(4, 2, dtype=jnp.float64)
    cell = bptt.stack(lower, upper)
    params, carry, xs = problem(cell, 6)
    _, between = bptt.scan(lower, params[0], carry[0], xs)
    _, expected = bptt.scan(upper, params[1], carry[1], between)
    assert_close(bptt.scan(cell, params, carry, xs)[1], expected)


@pytest.mark.parametrize("name", [*CELLS, *DIAGONAL, "rate", "layer_norm"])
@pytest.mark.costly
def test_batch_axes_are_independent_rows(name):
    cell = make_cell(name)
    params, carry, xs = problem(cell, 1, (2, 3))
    together = cell.step(params, carry, xs[0])
    apart = jax.vmap(jax.vmap(cell.step, in_axes=(None, 0, 0)), in_axes=(None, 0, 0))(params, carry, xs[0])
    assert_close(together, apart)


@pytest.mark.parametrize(("name", "gates"), [("elman", 1), ("gru", 3), ("lstm", 4)])
@pytest.mark.costly
def test_recurrent_weights_start_orthogonal(name, gates):
    params = make_cell(name).init(jax.random.key(3))
    for block in np.split(params.W_hh, gates):
        np.testing.assert_allclose(block @ block.T, np.eye(4), atol=1e-12)
    blocks = np.split(np.asarray(params.W_hh), gates)
    assert all(np.abs(blocks[0] - block).max() > 0.1 for block in blocks[1:])
    wide = getattr(bptt, name)(400, 64).init(jax.random.key(0)).W_xh
    assert np.std(wide) == pytest.approx(1 / 20, rel=0.05)


@pytest.mark.parametrize("make", [bptt.elman, bptt.gru, bptt.lstm])
def test_initialisers_are_optional(make):
    constant = jax.nn.initializers.constant
    params = make(3, 4, recurrent_init=constant(2.0), input_init=constant(3.0)).init(jax.random.key(0))
    assert np.unique(params.W_hh).tolist() == [2]
    assert np.unique(params.W_xh).tolist() == [3]


@pytest.mark.parametrize(("make", "option", "gates"), [(bptt.gru, "update_bias", 3), (bptt.lstm, "forget_bias", 4)])
def test_the_gate_that_keeps_the_state_starts_open(make, option, gates):
    for expected, cell in ((1.0, make(3, 4)), (0.0, make(3, 4, **{option: 0.0}))):
        first, keeps, *rest = np.split(np.asarray(cell.init(jax.random.key(0)).b), gates)
        assert np.unique(keeps).tolist() == [expected]
        assert not np.any([first, *rest])


@pytest.mark.parametrize("dtype", [np.float32, np.dtype("float32"), "float32", jnp.float32, jnp.dtype("float32")])
def test_names_of_a_dtype(dtype):
    cell = bptt.lstm(3, 4, dtype=dtype, compute_dtype=dtype)
    assert cell.initial_carry().h.dtype == cell.init(jax.random.key(0)).b.dtype == "float32"


def test_dtype_and_shapes():
    for name in (*CELLS, *DIAGONAL):
        cell = make_cell(name, jnp.float32)
        assert {leaf.dtype for leaf in jax.tree.leaves(cell.init(jax.random.key(0)))} == {jnp.dtype("float32")}
        carry = cell.initial_carry((2, 5))
        assert all(leaf.shape[:2] == (2, 5) and not leaf.any() for leaf in jax.tree.leaves(carry))


@pytest.mark.parametrize("name", [*CELLS, *DIAGONAL])
def test_a_first_carry_can_be_donated(name):
    """No buffer twice in it, made eagerly or compiled; the lstm's h and c once were one."""
    cell = make_cell(name)
    halve = jax.jit(lambda carry: jax.tree.map(lambda leaf: leaf / 2, carry), donate_argnums=0)
    for carry in (cell.initial_carry((2,)), jax.jit(lambda: cell.initial_carry((2,)))()):
        halve(carry)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(carry))


def test_network_reads_out_every_strategy():
    cell = make_cell("stack")
    net = bptt.network(cell, 6)
    params = net.init(jax.random.key(0))
    assert params.W_hy.shape == (6, 2)
    xs = jax.random.normal(jax.random.key(1), (5, 7, 3))
    carry, ys = net.apply(params, cell.initial_carry((7,)), xs)
    _, hs = bptt.scan(cell, params.cell, cell.initial_carry((7,)), xs)
    assert_close(ys, jnp.einsum("oh,tbh->tbo", params.W_hy, hs))
    assert_close(net.apply(params, cell.initial_carry((7,)), xs, scan=bptt.checkpointed_scan), (carry, ys))
    with pytest.raises(ValueError, match="output_size is 0"):
        bptt.network(cell, 0)


def gradients_of_network(net, params, carry, xs, **scan):
    def loss(params, carry, xs):
        carry, ys = net.apply(params, carry, xs, **scan)
        return jnp.mean(jnp.sin(ys)) + sum(jnp.sum(leaf) for leaf in jax.tree.leaves(carry))

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))(params, carry, xs)


@pytest.mark.parametrize("bias", [False, True])
def test_network_is_unrolled_by_adjoint_scan(bias):
    """With the values and gradients of scan."""
    cell = make_cell("gru")
    net = bptt.network(cell, 2, bias=bias)
    params = net.init(jax.random.key(0))
    if bias:
        params = params._replace(b_y=jnp.array([0.3, -0.7]))
    _, carry, xs = problem(cell, 7, (5,))
    assert_close(
        gradients_of_network(net, params, carry, xs), gradients_of_network(net, params, carry, xs, scan=bptt.scan)
    )
    text = str(jax.make_jaxpr(lambda p: net.apply(p, carry, xs))(params))
    assert "custom_jvp" in text
    assert "custom_jvp" not in str(jax.make_jaxpr(lambda p: net.apply(p, carry, xs, scan=bptt.scan))(params))


@pytest.mark.parametrize("batch", [(), (5,)])
def test_bias_of_the_read_out(batch):
    cell = make_cell("elman")
    net, without = bptt.network(cell, 2, bias=True), bptt.network(cell, 2)
    params = net.init(jax.random.key(0))
    assert params.b_y.tolist() == [0, 0]
    assert without.init(jax.random.key(0)).b_y is None
    assert_close(params._replace(b_y=None), without.init(jax.random.key(0)))
    params = params._replace(b_y=jnp.array([2.0, -1.0]))
    _, carry, xs = problem(cell, 4, batch)

    def outputs(params):
        return net.apply(params, carry, xs)[1]

    def by_hand(params):
        _, hs = bptt.scan(cell, params.cell, carry, xs)
        ys = jnp.einsum("oh,...h->...o", params.W_hy, hs)
        return ys + jnp.broadcast_to(params.b_y, ys.shape)

    assert_close(outputs(params), by_hand(params))
    gradients, expected = (jax.grad(lambda p, f=f: jnp.sum(jnp.sin(f(p))))(params) for f in (outputs, by_hand))
    assert_close(gradients, expected)
    assert_close(gradients.b_y, jnp.cos(by_hand(params)).reshape(-1, 2).sum(0))


@pytest.mark.parametrize("compute_dtype", [None, jnp.bfloat16])
@pytest.mark.parametrize(("of_cell", "of_read_out"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_dtype_of_the_read_out(of_cell, of_read_out, compute_dtype):
    cell = make_cell("lstm", jnp.dtype(of_cell))
    net = bptt.network(cell, 2, bias=True, dtype=of_read_out, compute_dtype=compute_dtype)
    params = net.init(jax.random.key(0))
    assert {leaf.dtype.name for leaf in jax.tree.leaves(params.cell)} == {of_cell}
    assert params.W_hy.dtype == params.b_y.dtype == of_read_out
    _, carry, xs = problem(cell, 4, (3,), dtype=jnp.dtype(of_cell))
    new_carry, ys = net.apply(params, carry, xs)
    assert ys.dtype == of_read_out
    assert new_carry.h.dtype == of_cell
    _, hs = bptt.scan(cell, params.cell, carry, xs)
    exact = np.asarray(hs, float) @ np.asarray(params.W_hy, float).T
    np.testing.assert_allclose(np.asarray(ys, float), exact, atol=0.03)
    gradients = jax.grad(lambda params: jnp.sum(net.apply(params, carry, xs)[1]))(params)
    assert jax.tree.map(lambda leaf: leaf.dtype, gradients) == jax.tree.map(lambda leaf: leaf.dtype, params)
    np.testing.assert_array_equal(gradients.b_y, 12)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dtype": int}, ValueError, "dtype is <class 'int'>, but params and carry are floating-point"),
        ({"bias": None}, TypeError, "bias is None, but it says whether the read-out has a bias: pass True or False"),
    ],
)
def test_options_of_the_read_out(options, error, message):
    with pytest.raises(error, match=message):
        inspect.unwrap(bptt.network)(make_cell("elman"), 2, **options)


def test_cells_by_name():
    """What the command line and the report offer."""
    assert list(cells.CELLS) == ["elman", "gru", "lstm", *DIAGONAL]
    assert all(make is getattr(bptt, name) for name, make in cells.CELLS.items())
