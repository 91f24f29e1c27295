"""The textbook's loop gives the gradient of the textbook's loss, and everything in it is what it is called."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import assert_close, make_cell, problem

import jaxbptt as bptt


def setup(steps=6):
    cell = make_cell("elman")
    net = bptt.network(cell, 5)
    params = net.init(jax.random.key(0))
    _, h_0, xs = problem(cell, steps)
    targets = jax.random.randint(jax.random.key(2), (steps,), 0, 5)
    return net, params, h_0, xs, targets


@pytest.mark.parametrize("steps", [0, 1, 2, 6])
@pytest.mark.costly
def test_equals_autodiff(steps):
    net, params, h_0, xs, targets = setup(steps)

    def loss(params, h_0):
        return bptt.losses.cross_entropy(net.apply(params, h_0, xs)[1], targets, reduction="sum")

    value, (gradients, h_0_bar) = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(params, h_0)
    result = jax.jit(bptt.bptt)(params, xs, h_0, targets)
    assert_close((result.loss, result.gradients, result.dh_0), (value, gradients, h_0_bar))
    assert_close(jax.jit(bptt.bptt)(params, xs, h_0, jnp.eye(5)[targets]).gradients, gradients)


def test_three_steps_by_hand():
    """n = 1, W_xh = b = 0: hₜ = tanh(w hₜ₋₁), with the softmax of two classes; everything by pencil."""
    w, v, h_0 = 0.8, np.array([[1.0], [-1.0]]), 0.5
    one = jnp.ones((1, 1))
    params = bptt.NetworkParams(bptt.ElmanParams(0 * one, w * one, jnp.zeros(1)), jnp.asarray(v))
    result = bptt.bptt(params, jnp.zeros((3, 1)), jnp.array([h_0]), jnp.array([0, 1, 0]))
    h_1 = np.tanh(w * h_0)
    h_2 = np.tanh(w * h_1)
    h_3 = np.tanh(w * h_2)
    dy = [1 / (1 + np.exp(-2 * h)) - target for h, target in ((h_1, 1), (h_2, 0), (h_3, 1))]
    raw_3 = 2 * dy[2] * (1 - h_3**2)
    raw_2 = (2 * dy[1] + w * raw_3) * (1 - h_2**2)
    raw_1 = (2 * dy[0] + w * raw_2) * (1 - h_1**2)
    np.testing.assert_allclose(result.hs[:, 0], [h_1, h_2, h_3])
    np.testing.assert_allclose(result.dy[:, 0], dy)
    np.testing.assert_allclose(result.dh[:, 0], [2 * dy[0] + w * raw_2, 2 * dy[1] + w * raw_3, 2 * dy[2]])
    np.testing.assert_allclose(result.dh_raw[:, 0], [raw_1, raw_2, raw_3])
    np.testing.assert_allclose(result.dW_hh[0, 0], raw_1 * h_0 + raw_2 * h_1 + raw_3 * h_2)
    np.testing.assert_allclose(result.dW_hy[0, 0], dy[0] * h_1 + dy[1] * h_2 + dy[2] * h_3)
    np.testing.assert_allclose(result.db[0], raw_1 + raw_2 + raw_3)
    np.testing.assert_allclose(result.dh_0[0], w * raw_1)


def test_dh_is_gradient_flow():
    _, params, h_0, xs, targets = setup()
    loss = lambda carry, hs: bptt.losses.cross_entropy(hs @ params.W_hy.T, targets, reduction="sum")
    flow = bptt.gradient_flow(make_cell("elman"), params.cell, h_0, xs, loss)
    assert_close(flow.adjoints, bptt.bptt(params, xs, h_0, targets).dh)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"xs": jnp.ones((6, 2, 3))}, r"xs has shape \(6, 2, 3\), but the weights need \(6, 3\)"),
        ({"h_0": jnp.ones(3)}, r"h_0 has shape \(3,\), but the weights need \(4,\)"),
        (
            {"targets": jnp.ones((6, 4))},
            r"targets has shape \(6, 4\), but the weights need \(6,\) or \(6, 5\).*vmap",
        ),
    ],
)
def test_wrong_shapes(change, message):
    _, params, h_0, xs, targets = setup()
    with pytest.raises(ValueError, match=message):
        # Behind the annotations that the suite checks, whose own error would come first.
        inspect.unwrap(bptt.bptt)(params, **({"xs": xs, "h_0": h_0, "targets": targets} | change))


def test_a_bias_of_the_read_out_is_refused():
    _, params, h_0, xs, targets = setup()
    with pytest.raises(ValueError, match=r"params have a bias b_y, .*network\(\.\.\., bias=False\)"):
        bptt.bptt(params._replace(b_y=jnp.zeros(5)), xs, h_0, targets)
