"""Dropout with one mask for a sequence: it is the cell with columns of its weights scaled, row by row."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import SEQUENTIAL, assert_close, make_cell, problem

import jaxbptt as bptt

RATES = {"input_rate": 0.3, "recurrent_rate": 0.5}


def scaled(params, masks):
    """The weights that give one row what its masks do: W (m ⊙ v) = (W diag m) v."""
    W_xh, W_hh = params.W_xh / 0.7, params.W_hh / 0.5
    return params._replace(W_xh=jnp.where(masks.x, W_xh, 0), W_hh=jnp.where(masks.h, W_hh, 0))


@pytest.mark.parametrize("name", ["gru", "lstm", "elman", "rate", "layer_norm"])
@pytest.mark.costly
def test_is_the_cell_with_scaled_weights(name):
    """Value and gradient of every strategy, also of those that recompute, and each row with masks of its own."""
    cell = make_cell(name)
    params, carry, xs = problem(cell, 7, (3,))
    dropped, draw = bptt.dropout(cell, **RATES)
    key = jax.random.key(4)

    def loss(scan, cell, params, carry, xs):
        return jnp.sum(jnp.sin(scan(cell, params, carry, xs)[1]))

    @jax.jit
    def every_way():
        def by_rows(params, xs):
            masks = draw(key, params, (3,))
            row = lambda m_x, m_h, carry, xs: loss(
                bptt.scan, cell, scaled(params, masks._replace(x=m_x, h=m_h)), carry, xs
            )
            return jax.vmap(row, in_axes=(0, 0, 0, 1))(masks.x, masks.h, carry, xs).sum()

        def by_masks(scan):
            return lambda params, xs: loss(scan, dropped, draw(key, params, (3,)), carry, xs)

        return [
            jax.value_and_grad(f, argnums=(0, 1))(params, xs) for f in (by_rows, *map(by_masks, SEQUENTIAL.values()))
        ]

    expected, *others = every_way()
    for mine in others:
        assert_close(mine, expected)


def test_masks():
    dropped, draw = bptt.dropout(bptt.gru(30, 30), **RATES)
    params = dropped.init(jax.random.key(0))
    masks = draw(jax.random.key(1), params, (40, 5))
    assert (masks.x.shape, masks.h.shape) == ((40, 5, 30),) * 2
    assert masks.cell is params
    assert np.corrcoef(masks.x.ravel(), masks.h.ravel())[0, 1] < 0.1, "drawn from keys of their own"
    assert np.mean(masks.x) == pytest.approx(0.7, abs=0.03)
    assert np.mean(masks.h) == pytest.approx(0.5, abs=0.03)
    assert np.any(masks.h != draw(jax.random.key(2), params, (40, 5)).h)
    assert draw(jax.random.key(1), params).h.shape == (30,)
    assert bptt.dropout(bptt.gru(2, 3), input_rate=0.5).draw(jax.random.key(0), params).h is None


def test_nothing_is_dropped_without_masks():
    cell = make_cell("lstm")
    params, carry, xs = problem(cell, 5, (2,))
    expected = bptt.scan(cell, params, carry, xs)
    dropped, _ = bptt.dropout(cell, **RATES)
    assert_close(bptt.scan(dropped, params, carry, xs), expected)
    off, draw = bptt.dropout(cell)
    assert_close(bptt.scan(off, draw(jax.random.key(0), params, (2,)), carry, xs), expected)


def test_layers_and_noise():
    """In a stack each layer has masks, and the key of a noisy input is not one of its entries."""
    lower = bptt.dropout(bptt.rate(3, 4, tau=2.0, dt=1.0, noise=0.1, dtype=jnp.float64), **RATES)
    upper = bptt.dropout(bptt.gru(4, 2, dtype=jnp.float64), input_rate=0.3)
    cell = bptt.stack(lower.cell, upper.cell)
    params, carry, xs = problem(cell, 5, (6,))
    xs = xs, jax.random.split(jax.random.key(0), 5)
    masks = tuple(layer.draw(jax.random.key(3), p, (6,)) for layer, p in zip((lower, upper), params, strict=True))
    _, between = bptt.scan(lower.cell, masks[0], carry[0], xs)
    expected = bptt.scan(upper.cell, masks[1], carry[1], between)
    carry_T, ys = bptt.adjoint_scan(cell, masks, carry, xs)
    assert_close((carry_T[1], ys), expected)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: inspect.unwrap(bptt.dropout)(len), TypeError, "dropout wraps a Cell, but got a builtin_function"),
        (
            lambda: bptt.dropout(make_cell("stack"), recurrent_rate=0.1),
            ValueError,
            r"wrap the layers of a stack, stack\(dropout",
        ),
        (
            lambda: bptt.dropout(make_cell("gru")._replace(step=lambda params, carry, x: (carry, x))),
            ValueError,
            "let a step of your own multiply by a mask in its params",
        ),
        (
            lambda: bptt.dropout(make_cell("gru"), input_rate=1.0),
            ValueError,
            "input_rate is 1.0, but it is a probability",
        ),
        (lambda: bptt.dropout(make_cell("gru"), recurrent_rate=-0.1), ValueError, "recurrent_rate is -0.1"),
        (lambda: bptt.dropout(make_cell("gru")).draw(jax.random.key(0), None, 3), ValueError, "batch_shape is 3"),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_masks_of_another_batch():
    dropped, draw = bptt.dropout(make_cell("gru"), **RATES)
    params, carry, xs = problem(dropped, 5, (6,))
    with pytest.raises(
        ValueError, match=r"x has shape \(6, 3\) at one time step, but its mask \(2, 3\): draw the masks with"
    ):
        bptt.scan(dropped, draw(jax.random.key(0), params, (2,)), carry, xs)


def test_cells_without_recurrent_weights_drop_inputs():
    """They have no W_hh that could read a state, and a recurrent rate is refused."""
    cell = make_cell("min_gru")
    dropped, draw = bptt.dropout(cell, input_rate=0.4)
    params, carry, xs = problem(cell, 5, (2,))
    masked = draw(jax.random.key(0), params, (2,))
    expected = bptt.scan(cell, params, carry, xs * masked.x.astype(float)[None] / 0.6)
    assert_close(bptt.adjoint_scan(dropped, masked, carry, xs), expected)
    with pytest.raises(ValueError, match="for input_rate alone, any built-in cell"):
        bptt.dropout(cell, recurrent_rate=0.4)
