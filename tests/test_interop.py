"""Weights survive the way to torch's layout and back; what can't be read is refused in words."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, make_cell, problem

import jaxbptt as bptt
from jaxbptt import interop


@pytest.mark.parametrize("name", ["elman", "gru", "lstm"])
def test_round_trip(name):
    params, _, _ = problem(make_cell(name), 1)
    state_dict = interop.to_torch(params)
    assert {key: value.shape for key, value in state_dict.items()} == {
        "weight_ih_l0": params.W_xh.shape,
        "weight_hh_l0": params.W_hh.shape,
        "bias_ih_l0": params.b.shape,
        "bias_hh_l0": params.b.shape,
    }
    assert_close(interop.from_torch(state_dict), (params,))


def test_layers():
    cell = bptt.stack(bptt.gru(3, 4, dtype=jnp.float64), bptt.gru(4, 4, dtype=jnp.float64))
    params = cell.init(jax.random.key(0))
    assert sorted(interop.to_torch(params))[:2] == ["bias_hh_l0", "bias_hh_l1"]
    assert_close(interop.from_torch(interop.to_torch(params)), params)


def test_both_biases_of_torch_count():
    ones = {"weight_ih_l0": np.ones((4, 3)), "weight_hh_l0": np.ones((4, 4))}
    (params,) = interop.from_torch(ones | {"bias_ih_l0": np.full(4, 2.0), "bias_hh_l0": np.full(4, 3.0)})
    assert params.b.tolist() == [5] * 4
    gru = {"weight_ih_l0": np.ones((6, 3)), "weight_hh_l0": np.ones((6, 2))}
    (params,) = interop.from_torch(gru | {"bias_ih_l0": np.full(6, 2.0), "bias_hh_l0": np.full(6, 3.0)})
    assert params.b.tolist() == [5, 5, 5, 5, 2, 2]
    assert params.b_hn.tolist() == [3, 3]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"readout.weight": np.ones((4, 3))}, r"readout.weight has shape \(4, 3\), but \[\*, 2\] is expected"),
        ({"readout.bias": np.ones(3)}, r"readout.bias has shape \(3,\), but \[4\] is expected"),
        ({"embedding.weight": np.ones((9, 2))}, r"embedding.weight has shape \(9, 2\), but \[\*, 3\] is expected"),
        ({"dropout.weight": np.ones(2)}, r"'dropout.weight' belongs to no part of a module as `to_torch` describes it"),
        ({"rnn.weight_ih_l1": np.ones((8, 2))}, r"'weight_hh_l1' is missing"),
    ],
)
def test_modules_with_a_read_out_that_do_not_fit(changed, message):
    fitting = {
        "rnn.weight_ih_l0": np.ones((8, 3)),
        "rnn.weight_hh_l0": np.ones((8, 2)),
        "readout.weight": np.ones((4, 2)),
        "readout.bias": np.ones(4),
        "embedding.weight": np.ones((9, 3)),
    }
    params = interop.from_torch(fitting)
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == [(8, 3), (8, 2), (8,), (4, 2), (4,), (9, 3)]
    reverse = {f"{key}_reverse": value for key, value in fitting.items() if key.startswith("rnn")}
    both = interop.from_torch(fitting | reverse | {"readout.weight": np.ones((4, 4))})
    assert isinstance(both.cell, bptt.Directions)
    del fitting["readout.bias"]
    assert interop.from_torch(fitting).b_y.tolist() == [0] * 4
    with pytest.raises(ValueError, match=message):
        interop.from_torch(fitting | changed)


def test_layers_that_torch_has_not():
    key = jax.random.key(0)
    normalised = bptt.lstm(3, 4, layer_norm=True).init(key)
    to_torch = inspect.unwrap(interop.to_torch)
    network = bptt.network(bptt.lstm(3, 4, layer_norm=True), 2).init(key)
    for params in (normalised, [normalised], network):
        with pytest.raises(TypeError, match=r"Layer 0 is a LayerNormLSTMParams, but .* torch has no other cells"):
            to_torch(params)
    for upper in (bptt.gru(4, 4), bptt.lstm(4, 5)):
        with pytest.raises(
            ValueError, match=r"Layer 0 is LSTMParams of hidden size 4 and layer 1 .* of one kind and size"
        ):
            to_torch(bptt.network(bptt.stack(bptt.lstm(3, 4), upper), 2).init(key))


@pytest.mark.parametrize("name", ["elman", "gru", "lstm"])
def test_bfloat16(name):
    """numpy as torch knows it has no bfloat16: float32 arrays go there, and the same numbers come back."""
    params, _, _ = problem(make_cell(name, jnp.bfloat16), 1, dtype=jnp.bfloat16)
    state_dict = interop.to_torch(params)
    assert {array.dtype for array in state_dict.values()} == {np.dtype("float32")}
    (back,) = interop.from_torch({key: array.astype(jnp.bfloat16) for key, array in state_dict.items()})
    for mine, theirs in zip(back, params, strict=True):
        assert mine.dtype == jnp.bfloat16
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        (
            {"weight_ih_l0": np.ones((5, 3)), "weight_hh_l0": np.ones((2, 2))},
            r"two matrices with the same number of rows",
        ),
        (
            {"weight_ih_l0": np.ones((2, 3)), "weight_hh_l0": np.ones((2, 2)), "bias_ih_l0": np.ones(1)},
            r"The biases of layer 0 have shapes \(1,\) and \(2,\), but \(2,\) is expected",
        ),
        ({}, r"The layers are numbered \[\]"),
        (
            {"weight_ih_l0": np.ones((2, 2)), "weight_hh_l0": np.ones((2, 2)), "weight_ih_l0_reverse": np.ones((2, 2))},
            r"'weight_hh_l0_reverse' is missing",
        ),
        ({"weight_ih_l0_reverse": np.ones((2, 2))}, r"'weight_ih_l0' is missing"),
        ({"weight_ih_l0_reversed": np.ones((2, 2))}, r"'weight_ih_l0_reversed' is not a weight of an nn.RNN"),
        ({"weight_hr_l0": np.ones((2, 2))}, r"'weight_hr_l0' is not a weight .* without projection"),
        ({"weight_ih_l1": np.ones((2, 2))}, r"The layers are numbered \[1\], but 0, 1, … without a gap"),
        ({"weight_ih_l0": np.ones((2, 2))}, r"'weight_hh_l0' is missing"),
        (
            {"weight_ih_l0": np.ones((4, 3)), "weight_hh_l0": np.ones((4, 2))},
            r"weight_hh_l0 has shape \(4, 2\), but 1, 3 or 4 blocks of \[2, 2\]",
        ),
    ],
)
def test_refused(state_dict, message):
    with pytest.raises(ValueError, match=message):
        interop.from_torch(state_dict)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: inspect.unwrap(interop.from_torch)(None),
            TypeError,
            "takes a module or its state_dict.*got a NoneType",
        ),
        (lambda: inspect.unwrap(interop.from_torch)("lstm"), TypeError, "takes a module or its state_dict.*got a str"),
        (lambda: interop.from_torch({"weight_ih_l0": np.ones((2, 2), int)}), TypeError, "weight_ih_l0 is of dtype int"),
        (lambda: interop.from_torch({"weight_ih_l0": None}), TypeError, "weight_ih_l0 is of dtype object"),
        (
            lambda: interop.from_torch({"weight_ih_l0": np.ones((0, 3)), "weight_hh_l0": np.ones((0, 0))}),
            ValueError,
            r"weight_ih_l0 has shape \(0, 3\), weight_hh_l0 \(0, 0\): they are empty",
        ),
        (lambda: inspect.unwrap(interop.to_torch)(None), TypeError, "takes ElmanParams.*but got a NoneType"),
        (
            lambda: interop.to_torch(inspect.unwrap(bptt.ElmanParams)(np.ones((2, 2)), "x", np.ones(2))),
            TypeError,
            "W_hh of layer 0 is a str",
        ),
    ],
)
def test_refused_in_words(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_params_of_something_else():
    with pytest.raises(TypeError, match="Layer 1 is a dict, but ElmanParams"):
        inspect.unwrap(interop.to_torch)([bptt.elman(2, 2).init(jax.random.key(0)), {}])
