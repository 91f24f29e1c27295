"""The outside oracle: torch's nn.RNN, nn.GRU and nn.LSTM, value and every gradient, in float32."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import SEQUENTIAL, cases

import jaxbptt as bptt
from jaxbptt import interop, models

torch = pytest.importorskip("torch")

MODULES = {"elman": "RNN", "gru": "GRU", "lstm": "LSTM"}
STEPS, BATCH, INPUT, HIDDEN = 20, 4, 3, 5


def close(mine, theirs, tolerance=1e-5):
    theirs = np.asarray(theirs.detach().numpy() if hasattr(theirs, "detach") else theirs)
    np.testing.assert_allclose(np.asarray(mine), theirs, rtol=0, atol=tolerance * max(np.abs(theirs).max(), 1e-3))


@pytest.mark.parametrize("strategy", [bptt.scan, bptt.adjoint_scan])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.costly
def test_equals_torch(name, layers, strategy):
    torch.manual_seed(0)
    module = getattr(torch.nn, MODULES[name])(INPUT, HIDDEN, num_layers=layers)
    xs = torch.randn(STEPS, BATCH, INPUT, requires_grad=True)
    states = [torch.randn(layers, BATCH, HIDDEN, requires_grad=True) for _ in range(1 + (name == "lstm"))]
    ys, last = module(xs, tuple(states) if name == "lstm" else states[0])
    weights = torch.randn(ys.shape)
    last = last if name == "lstm" else (last,)
    loss = (ys * weights).sum() + sum((state**2).sum() for state in last)
    loss.backward()

    make = getattr(bptt, name)
    cell = bptt.stack(*(make(size, HIDDEN) for size in [INPUT, HIDDEN][:layers]))
    params = interop.from_torch(module.state_dict())
    rows = [[jnp.asarray(state[layer].detach().numpy()) for state in states] for layer in range(layers)]
    init = tuple(bptt.LSTMState(*row) if name == "lstm" else row[0] for row in rows)

    def our_loss(params, init, xs):
        carry, ys = strategy(cell, params, init, xs)
        return jnp.sum(ys * weights.numpy()) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(carry)), (carry, ys)

    (value, (carry, our_ys)), gradients = jax.value_and_grad(our_loss, argnums=(0, 1, 2), has_aux=True)(
        params, init, jnp.asarray(xs.detach().numpy())
    )
    params_bar, init_bar, xs_bar = gradients
    size = (ys * weights).abs().sum() + sum((state**2).sum() for state in last)  # the terms of the loss nearly cancel
    np.testing.assert_allclose(value, loss.item(), rtol=0, atol=1e-6 * size.item())
    close(our_ys, ys)
    close(xs_bar, xs.grad)
    for layer in range(layers):
        for ours, theirs in zip(jax.tree.leaves(carry[layer]), last, strict=True):
            close(ours, theirs[layer])
        for ours, theirs in zip(jax.tree.leaves(init_bar[layer]), states, strict=True):
            close(ours, theirs.grad[layer])
        theirs = {key.rpartition("_l")[0]: p.grad for key, p in module.named_parameters() if key.endswith(str(layer))}
        close(params_bar[layer].W_xh, theirs["weight_ih"])
        close(params_bar[layer].W_hh, theirs["weight_hh"])
        close(params_bar[layer].b, theirs["bias_ih"])
        if name == "gru":
            close(params_bar[layer].b_hn, theirs["bias_hh"][-HIDDEN:])


@cases("scan", SEQUENTIAL, "adjoint_scan")
@pytest.mark.parametrize(("name", "layers"), [("lstm", 2), ("gru", 2), ("elman", 1)])
def test_packed_and_bidirectional(name, layers, scan):
    """Rows of unequal length, in float64: values and all gradients."""
    torch.manual_seed(0)
    module = getattr(torch.nn, MODULES[name])(INPUT, HIDDEN, num_layers=layers, bidirectional=True).double()
    lengths = [STEPS, 3, 11, 1]
    xs = torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64, requires_grad=True)
    shape = 2 * layers, BATCH, HIDDEN
    states = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(1 + (name == "lstm"))]
    packed = torch.nn.utils.rnn.pack_padded_sequence(xs, lengths, enforce_sorted=False)
    out, last = module(packed, tuple(states) if name == "lstm" else states[0])
    ys, _ = torch.nn.utils.rnn.pad_packed_sequence(out, total_length=STEPS)
    last = last if name == "lstm" else (last,)
    weights = torch.randn(ys.shape, dtype=torch.float64)
    ((ys * weights).sum() + sum((state**2).sum() for state in last)).backward()

    make = partial(getattr(bptt, name), dtype=jnp.float64)
    cells = [bptt.bidirectional(*[make(size, HIDDEN)] * 2) for size in [INPUT, 2 * HIDDEN][:layers]]
    params, valid = interop.from_torch(module), bptt.valid_from_lengths(lengths, STEPS)
    kind = bptt.LSTMState if name == "lstm" else lambda h: h
    carries = lambda tensors: [
        bptt.Directions(*(kind(*(jnp.asarray(leaf.numpy()[2 * i + d]) for leaf in tensors)) for d in (0, 1)))
        for i in range(layers)
    ]

    @jax.jit
    def our_gradients(params, init, xs):
        def loss(params, init, xs):
            carries = []
            for layer, p, c in zip(cells, params, init, strict=True):
                c, xs = layer.apply(p, c, xs, scan=scan, valid=valid)
                carries.append(c)
            return jnp.sum(xs * weights.numpy()) + sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(carries)), (
                carries,
                xs,
            )

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(params, init, xs)

    arrays = params, carries([state.detach() for state in states]), jnp.asarray(xs.detach().numpy())
    (params_bar, init_bar, xs_bar), (carry, our_ys) = our_gradients(*arrays)
    exactly = partial(close, tolerance=1e-10)
    exactly(our_ys, ys)
    exactly(xs_bar, xs.grad)
    expected = jax.tree.leaves([carries([s.detach() for s in last]), carries([s.grad for s in states])])
    for ours, theirs in zip(jax.tree.leaves([carry, init_bar]), expected, strict=True):
        exactly(ours, theirs)
    bars = {key: p.grad for key, p in module.named_parameters()}
    for layer, both in enumerate(params_bar):
        for end, ours in zip((f"{layer}", f"{layer}_reverse"), both, strict=True):
            exactly(ours.W_xh, bars[f"weight_ih_l{end}"])
            exactly(ours.W_hh, bars[f"weight_hh_l{end}"])
            exactly(ours.b, bars[f"bias_ih_l{end}"])
            if name == "gru":
                exactly(ours.b_hn, bars[f"bias_hh_l{end}"][-HIDDEN:])


@pytest.mark.parametrize("name", MODULES)
def test_torch_reads_ours(name):
    params = getattr(bptt, name)(INPUT, HIDDEN).init(jax.random.key(0))
    module = getattr(torch.nn, MODULES[name])(INPUT, HIDDEN)
    module.load_state_dict({key: torch.as_tensor(array) for key, array in interop.to_torch(params).items()})
    cell = getattr(bptt, name)(INPUT, HIDDEN)
    xs = np.random.default_rng(0).normal(size=(STEPS, INPUT)).astype(np.float32)
    _, ys = bptt.scan(cell, params, cell.initial_carry(), xs)
    close(ys, module(torch.as_tensor(xs))[0])
    # And both directions of two layers.
    layers = [
        bptt.bidirectional(*[getattr(bptt, name)(size, HIDDEN)] * 2).init(jax.random.key(size)) for size in (INPUT, 10)
    ]
    module = getattr(torch.nn, MODULES[name])(INPUT, HIDDEN, 2, bidirectional=True)
    module.load_state_dict({key: torch.as_tensor(array) for key, array in interop.to_torch(layers).items()})
    for leaf, back in zip(*map(jax.tree.leaves, (layers, interop.from_torch(module))), strict=True):
        np.testing.assert_array_equal(leaf, back)


class Net(torch.nn.Module):
    """As the docstring of `to_torch` describes it."""

    def __init__(self, kind, inputs, outputs, *, layers=1, bias=True, symbols=None):
        super().__init__()
        if symbols is not None:
            self.embedding = torch.nn.Embedding(symbols, inputs)
        self.rnn = getattr(torch.nn, MODULES[kind])(inputs, HIDDEN, layers)
        self.readout = torch.nn.Linear(HIDDEN, outputs, bias=bias)

    def forward(self, xs, state=None):
        hs, state = self.rnn(self.embedding(xs) if hasattr(self, "embedding") else xs, state)
        return self.readout(hs), state


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("name", MODULES)
@pytest.mark.costly
def test_networks_with_a_read_out(name, layers, bias):
    make = getattr(bptt, name)
    cells = [make(size, HIDDEN) for size in [INPUT, HIDDEN][:layers]]
    cell = cells[0] if layers == 1 else bptt.stack(*cells)
    net = bptt.network(cell, 2, bias=bias)
    params = random(net.init(jax.random.key(0)))
    module = loaded(Net(name, INPUT, 2, layers=layers, bias=bias), params)
    xs = np.random.default_rng(1).normal(size=(STEPS, BATCH, INPUT)).astype(np.float32)
    close(net.apply(params, cell.initial_carry((BATCH,)), xs, scan=bptt.scan)[1], module(torch.as_tensor(xs))[0])
    same(interop.from_torch(module), params)


@pytest.mark.parametrize("embedding", [3, None])
def test_models_of_text(embedding):
    symbols = 7
    net = models.build(models.Architecture("lstm", HIDDEN, 2, symbols, symbols, text=True, embedding=embedding))
    params = random(net.init(jax.random.key(0)))
    size = {"symbols": symbols} if embedding else {}
    module = loaded(Net("lstm", embedding or symbols, symbols, layers=2, **size), params)
    xs = np.random.default_rng(1).integers(0, symbols, (STEPS, BATCH))
    theirs = torch.as_tensor(xs)
    theirs = theirs if embedding else torch.nn.functional.one_hot(theirs, symbols).float()
    close(net.apply(params, net.cell.initial_carry((BATCH,)), xs, scan=bptt.scan)[1], module(theirs)[0])
    back = interop.from_torch(module)
    assert type(back) is (models.ModelParams if embedding else bptt.NetworkParams)
    same(back, params)


def test_models_of_numbers():
    """The network predicts changes, which torch's module leaves to who calls it."""
    targets, change = (2, 0), np.array([0.5, 2.0], np.float32)
    net = models.build(models.Architecture("gru", HIDDEN, 1, 3, 2, text=False, targets=targets, change=tuple(change)))
    params = random(net.init(jax.random.key(0)))
    xs = np.random.default_rng(1).normal(size=(STEPS, 3)).astype(np.float32)
    theirs = loaded(Net("gru", 3, 2), params)(torch.as_tensor(xs))[0].detach().numpy()
    close(net.apply(params, net.cell.initial_carry(), xs)[1], xs[:, targets] + change * theirs)


def random(params):
    """Every weight drawn, so that biases count too."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / 2, leaf.dtype), params)


def loaded(module, params):
    module.load_state_dict({key: torch.as_tensor(array) for key, array in interop.to_torch(params).items()})
    return module


def same(ours, theirs):
    for leaf, back in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
        np.testing.assert_array_equal(leaf, back)


def test_cross_entropy_is_torchs():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(6, 4, 5)).astype(np.float32), rng.integers(0, 5, (6, 4))
    theirs = torch.nn.functional.cross_entropy(
        torch.as_tensor(logits).reshape(-1, 5), torch.as_tensor(labels).reshape(-1)
    )
    np.testing.assert_allclose(bptt.losses.cross_entropy(logits, labels), theirs.item(), rtol=1e-6)


@pytest.mark.parametrize("name", MODULES)
def test_bfloat16_modules(name):
    module = getattr(torch.nn, MODULES[name])(INPUT, HIDDEN).to(torch.bfloat16)
    (params,) = interop.from_torch(module)
    assert {leaf.dtype for leaf in params} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(params.W_hh.astype(jnp.float32), module.weight_hh_l0.detach().float().numpy())
    tensors = {key: torch.as_tensor(array) for key, array in interop.to_torch(params).items()}
    module.load_state_dict(tensors)
    np.testing.assert_array_equal(interop.from_torch(module)[0].b.astype(float), params.b.astype(float))


def test_a_module_with_relu_is_refused():
    with pytest.raises(ValueError, match="nonlinearity is 'relu', but the Elman cell's is tanh"):
        interop.from_torch(torch.nn.RNN(INPUT, HIDDEN, nonlinearity="relu"))
    module = Net("elman", INPUT, 2)
    module.rnn = torch.nn.RNN(INPUT, HIDDEN, nonlinearity="relu")
    with pytest.raises(ValueError, match="nonlinearity is 'relu'"):
        interop.from_torch(module)
