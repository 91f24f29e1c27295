"""Cells of Flax and Equinox, wrapped by hand or by `interop`, work in every strategy and in the analysis."""

import subprocess
import sys
from functools import partial
from types import SimpleNamespace

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx
from flax.nnx.transforms import iteration
from reference import SEQUENTIAL, assert_close, cases, random_like

import jaxbptt as bptt
from jaxbptt import interop

strategies = pytest.mark.parametrize("strategy", SEQUENTIAL.values(), ids=SEQUENTIAL)


def nnx_lstm():
    cell = nnx.OptimizedLSTMCell(3, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64, dtype=jnp.float64)
    graph, state = nnx.split(cell)

    def step(state, carry, x):
        return nnx.merge(graph, state)(carry, x)

    return step, state, (jnp.ones(4), jnp.ones(4))


def nnx_gru():
    cell = nnx.GRUCell(3, 4, rngs=nnx.Rngs(0), param_dtype=jnp.float64, dtype=jnp.float64)
    graph, state = nnx.split(cell)
    return lambda state, carry, x: nnx.merge(graph, state)(carry, x), state, jnp.ones(4)


def equinox_gru():
    cell = eqx.nn.GRUCell(3, 4, key=jax.random.key(0), dtype=jnp.float64)

    def step(cell, h, x):
        h = cell(x, h)
        return h, h

    return step, cell, jnp.ones(4)


def equinox_with_functions():
    """A model with functions among its leaves, as most Equinox models have."""
    model = eqx.nn.MLP(7, 4, 8, 2, key=jax.random.key(0), dtype=jnp.float64)

    def step(model, h, x):
        h = model(jnp.concatenate([h, x]))
        return h, h

    return step, model, jnp.ones(4)


@pytest.mark.parametrize("make", [nnx_lstm, nnx_gru, equinox_gru, equinox_with_functions])
@pytest.mark.costly
def test_step_of_another_library(make):
    step, params, init = make()
    xs = jax.random.normal(jax.random.key(1), (6, 3))

    @eqx.filter_jit
    def every_way(params):
        plain = lambda step, params, init, xs: jax.lax.scan(partial(step, params), init, xs)
        return {
            name: eqx.filter_value_and_grad(lambda params, scan=scan: jnp.sum(scan(step, params, init, xs)[1] ** 2))(
                params
            )
            for name, scan in {"lax.scan": plain, **SEQUENTIAL}.items()
        }

    expected, *others = every_way(params).values()
    for mine in others:
        assert_close(mine, expected)


@strategies
@pytest.mark.costly
def test_flax_scan_runs_on_a_strategy(monkeypatch, strategy):
    """`nnx.RNN`, and any `nnx.scan`, pass a carry of queues that the step empties and fills again."""
    rnn = nnx.RNN(nnx.SimpleCell(3, 2, rngs=nnx.Rngs(0), param_dtype=jnp.float64, dtype=jnp.float64))
    x = jax.random.normal(jax.random.key(1), (2, 5, 3))
    value_and_gradient = nnx.value_and_grad(lambda rnn: jnp.sum(rnn(x) ** 2))
    expected = value_and_gradient(rnn)
    calls = []

    def scan(f, init, xs, *, reverse, unroll, _split_transpose, **options):
        calls.append(f)
        return strategy(lambda _, carry, x: f(carry, x), None, init, xs, **options)

    lax = SimpleNamespace(**vars(jax.lax) | {"scan": scan})
    monkeypatch.setattr(iteration, "jax", SimpleNamespace(**vars(jax) | {"lax": lax}))
    assert_close(value_and_gradient(rnn), expected)
    assert len(calls) == 1


def test_analysis_of_another_library():
    step, params, init = nnx_lstm()
    xs = jax.random.normal(jax.random.key(1), (6, 3))
    flow = bptt.gradient_flow(step, params, init, xs, lambda carry, ys: jnp.sum(ys[-1]))
    expected = jax.grad(lambda params: jnp.sum(bptt.scan(step, params, init, xs)[1][-1]))(params)
    assert_close(flow.param_gradients, expected)
    assert flow.norms.shape == (6,)
    assert bptt.state_jacobians(step, params, init, xs)[1].shape == (6, 8, 8)


def test_equals_flax_lstm():
    """Flax orders the gates i, f, g, o as well: the same weights give the same numbers."""
    step, state, _ = nnx_lstm()
    dense_i, dense_h = state["dense_i"], state["dense_h"]
    params = bptt.LSTMParams(dense_i["kernel"][...].T, dense_h["kernel"][...].T, dense_h["bias"][...])
    carry, xs = (jnp.full(4, 0.3), jnp.full(4, 0.2)), jax.random.normal(jax.random.key(1), (6, 3))
    _, theirs = bptt.scan(step, state, carry, xs)
    cell = bptt.lstm(3, 4, dtype=jnp.float64)
    # Flax's carry is (c, h).
    _, ours = bptt.scan(cell, params, bptt.LSTMState(h=carry[1], c=carry[0]), xs)
    assert_close(ours, theirs)


# Each gives (cell, params), and the value and gradient that its own library computes, in the structure of params.


def of_nnx(kind):
    module = kind(3, 4, rngs=nnx.Rngs(0))
    module = nnx.merge(nnx.graphdef(module), random_like(nnx.state(module), 0, 0.5))

    def own(xs, loss):
        rnn = nnx.RNN(module, time_major=True)
        value, gradient = nnx.value_and_grad(lambda rnn: loss(rnn(xs)))(rnn)
        return value, gradient["cell"]

    return *interop.from_flax(module), own


def of_linen(kind):
    module = kind(4)
    x = jnp.ones((2, 3), jnp.float32)
    variables = module.init(jax.random.key(0), module.initialize_carry(jax.random.key(0), x.shape), x)
    variables = random_like(variables, 0, 0.5)

    def own(xs, loss):
        rnn = linen.RNN(kind(4), time_major=True)
        value, gradient = jax.value_and_grad(lambda cell: loss(rnn.apply({"params": {"cell": cell}}, xs)))(
            variables["params"]
        )
        return value, {"params": gradient}

    return *interop.from_flax(module, variables), own


def of_equinox(kind):
    module = kind(3, 4, key=jax.random.key(0))

    def own(xs, loss):
        def value(module):
            def step(carry, x):
                carry = module(x, carry)
                return carry, carry[0] if kind is eqx.nn.LSTMCell else carry

            zeros = jnp.zeros(4, jnp.float32)
            start = (zeros, zeros) if kind is eqx.nn.LSTMCell else zeros
            return loss(jax.vmap(lambda xs: jax.lax.scan(step, start, xs)[1], in_axes=1, out_axes=1)(xs))

        return eqx.filter_value_and_grad(value)(module)

    return *interop.from_equinox(module), own


MODULES = {f"nnx.{name}": (of_nnx, getattr(nnx, name)) for name in ("GRUCell", "SimpleCell", "LSTMCell")}
MODULES |= {"nnx.OptimizedLSTMCell": (of_nnx, nnx.OptimizedLSTMCell)}
MODULES |= {f"linen.{name}": (of_linen, getattr(linen, name)) for name in ("GRUCell", "SimpleCell", "LSTMCell")}
MODULES |= {"linen.OptimizedLSTMCell": (of_linen, linen.OptimizedLSTMCell)}
MODULES |= {f"eqx.{name}": (of_equinox, getattr(eqx.nn, name)) for name in ("GRUCell", "LSTMCell")}
QUICK = ("nnx.GRUCell", "linen.OptimizedLSTMCell", "eqx.LSTMCell")


@cases("module", MODULES, *QUICK)
def test_gradient_is_that_of_its_own_library(module):
    """In float32, to 3e-6, the tolerance of `newton_scan`; in one dimension more than the module takes, for Equinox."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
        make, kind = module
        cell, params, own = make(kind)
        xs = jax.random.normal(jax.random.key(1), (7, 2, 3))
        loss = lambda ys: jnp.sum(jnp.sin(ys))
        init = cell.initial_carry((2,))

        @jax.jit
        def ours(params):
            losses = [lambda params, scan=scan: loss(scan(cell, params, init, xs)[1]) for scan in SEQUENTIAL.values()]
            return [jax.value_and_grad(f)(params) for f in losses]

        (value, gradient), found = own(xs, loss), ours(params)
        for mine_value, mine in found:
            assert_close(mine_value, value, rtol=3e-6)
            assert jax.tree.structure(mine) == jax.tree.structure(params)
            assert_close(jax.tree.leaves(mine), jax.tree.leaves(gradient), rtol=1e-6)


class Called(eqx.Module):
    """A module of a user's, with a function, a number and an integer array inside."""

    mlp: eqx.nn.MLP
    order: jax.Array
    gain: float = 0.9

    def __call__(self, x, h):
        return self.gain * self.mlp(jnp.concatenate([h[self.order], x]))


def test_equinox_module_of_a_user():
    module = Called(eqx.nn.MLP(7, 4, 8, 1, key=jax.random.key(0), dtype=jnp.float64), jnp.array([3, 1, 0, 2]))
    cell, params = interop.from_equinox(module)
    xs, h = jax.random.normal(jax.random.key(1), (5, 2, 3)), jnp.full((2, 4), 0.3)
    by_hand = lambda h, x: (jax.vmap(module)(x, h),) * 2
    assert_close(bptt.adjoint_scan(cell, params, h, xs), jax.lax.scan(by_hand, h, xs))
    gradient = jax.grad(lambda params: bptt.adjoint_scan(cell, params, h, xs)[1].sum())(params)
    assert_close(gradient, eqx.filter_grad(lambda params: bptt.scan(cell, params, h, xs)[1].sum())(params))
    assert jax.tree.structure(eqx.combine(params, module)) == jax.tree.structure(module)
    with pytest.raises(ValueError, match="A Called does not say which carry it starts with: pass one of your own"):
        cell.initial_carry()


class Residual(nnx.Module):
    """A module of a user's around a cell, with a layer that keeps what it is told to."""

    def __init__(self, inner):
        self.cell, self.inner = nnx.SimpleCell(3, 4, rngs=nnx.Rngs(0)), inner

    def __call__(self, carry, x):
        carry, y = self.cell(carry, x)
        return carry, self.inner(y)


def test_nnx_module_that_changes_itself():
    """What a call changes beside the carry would be lost; where it changes nothing the module is as good as any."""
    h, xs = jnp.zeros((2, 4), jnp.float32), jnp.ones((5, 2, 3), jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        for inner, what in (
            (nnx.BatchNorm(4, rngs=nnx.Rngs(0)), r"\['inner'\]\['mean'\]"),
            (nnx.Dropout(0.5, rngs=nnx.Rngs(0)), "count"),
        ):
            module = Residual(inner)
            cell, params = interop.from_flax(module)
            with pytest.raises(
                ValueError, match=f"A Residual changes .*{what}.* when it is called, which would be lost"
            ):
                bptt.adjoint_scan(cell, params, h, xs)
            module.eval()
            cell, params = interop.from_flax(module)
            gradient = jax.grad(lambda params, cell=cell: bptt.adjoint_scan(cell, params, h, xs)[1].sum())(params)
            assert set(gradient) >= {"cell"}
            with pytest.raises(ValueError, match="A Residual does not say which carry it starts with"):
                cell.initial_carry()


def test_network_and_analysis_of_a_module():
    """The pair stands where a cell of our own and its params do."""
    cell, params = interop.from_equinox(eqx.nn.GRUCell(3, 4, key=jax.random.key(0), dtype=jnp.float64))
    net = bptt.network(cell, 2, dtype=jnp.float64)
    xs = jnp.ones((5, 3))
    all_params = net.init(jax.random.key(0))
    assert all_params.cell is params
    assert net.apply(all_params, cell.initial_carry(), xs)[1].shape == (5, 2)
    assert bptt.state_jacobians(cell, params, cell.initial_carry(), xs)[1].shape == (5, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: interop.from_flax(None),
            "from_flax takes an nnx.Module, or a linen.Module and its variables, but got a None",
        ),
        (
            lambda: interop.from_flax(nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)))),
            "but got a RNN: of an RNN pass its cell",
        ),
        (
            lambda: interop.from_flax(linen.RNN(linen.GRUCell(4)), {}),
            "but got a RNN: of an RNN pass its cell, rnn.cell",
        ),
        (
            lambda: interop.from_flax(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), {}),
            "An nnx module holds its own variables: leave",
        ),
        (
            lambda: interop.from_flax(linen.GRUCell(4)),
            "A linen module is called with its variables, but got a NoneType",
        ),
        (
            lambda: interop.from_flax(eqx.nn.GRUCell(3, 4, key=jax.random.key(0))),
            "but got a GRUCell: pass a cell, such as",
        ),
        (
            lambda: interop.from_equinox(linen.GRUCell(4)),
            r"from_equinox takes an eqx.Module .* but got a GRUCell: pass",
        ),
        (lambda: interop.from_equinox(lambda x, h: h), "but got a function: pass a cell, such as eqx.nn.GRUCell"),
    ],
)
def test_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_convolutional_cell_has_its_own_first_carry():
    """Which has more axes than rows and features."""
    module = linen.ConvLSTMCell(2, (3,))
    init = module.initialize_carry(jax.random.key(0), (1, 6, 3))
    variables = module.init(jax.random.key(0), init, jnp.ones((1, 6, 3), jnp.float32))
    cell, _ = interop.from_flax(module, variables)
    with pytest.raises(ValueError, match="A ConvLSTMCell does not say which carry it starts with"):
        cell.initial_carry((1,))


def test_other_libraries_are_not_imported():
    code = (
        "import sys, jaxbptt as bptt\n"
        "for make in (bptt.interop.from_flax, bptt.interop.from_equinox):\n"
        "    try: make(len)\n"
        "    except TypeError as error: print(error)\n"
        "assert not {'flax', 'equinox'} & set(sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.count("but got a builtin_function_or_method") == 2
