"""Losses are optax's means over valid steps, and nothing that stands in the padding matters."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxbptt import losses

LOSSES = {
    "classes": (losses.cross_entropy, lambda key: jax.random.randint(key, (6, 3), 0, 5)),
    "distributions": (losses.cross_entropy, lambda key: jax.nn.softmax(jax.random.normal(key, (6, 3, 5)))),
    "squares": (losses.mean_squared_error, lambda key: jax.random.normal(key, (6, 3, 5))),
}
each_loss = pytest.mark.parametrize("kind", LOSSES)


def setup(kind):
    loss, make = LOSSES[kind]
    return loss, jax.random.normal(jax.random.key(0), (6, 3, 5)), make(jax.random.key(1))


def per_step(kind, outputs, targets):
    match kind:
        case "classes":
            return optax.softmax_cross_entropy_with_integer_labels(outputs, targets)
        case "distributions":
            return optax.softmax_cross_entropy(outputs, targets)
        case "squares":
            return jnp.mean((outputs - targets) ** 2, axis=-1)


@each_loss
def test_mean_and_sum(kind):
    loss, outputs, targets = setup(kind)
    expected = per_step(kind, outputs, targets)
    np.testing.assert_allclose(loss(outputs, targets), expected.mean(), rtol=1e-12)
    np.testing.assert_allclose(loss(outputs, targets, reduction="sum"), expected.sum(), rtol=1e-12)


@each_loss
@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(0, 6), min_size=3, max_size=3), garbage=st.sampled_from([np.nan, np.inf, 1e300]))
def test_padding_changes_nothing(kind, lengths, garbage):
    with jax.enable_x64(True):
        loss, outputs, targets = setup(kind)
        mask = jnp.arange(6)[:, None] < jnp.array(lengths)
        expected = jnp.where(mask, per_step(kind, outputs, targets), 0).sum() / max(sum(lengths), 1)
        dirty = jnp.where(mask[..., None], outputs, garbage)
        dirty_targets = (
            jnp.where(mask, targets, -(10**6)) if kind == "classes" else jnp.where(mask[..., None], targets, garbage)
        )
        value, gradient = jax.value_and_grad(loss)(dirty, dirty_targets, mask=mask)
        _, clean = jax.value_and_grad(loss)(outputs, targets, mask=mask)
        np.testing.assert_allclose(value, expected, rtol=1e-12)
        np.testing.assert_array_equal(gradient, clean)
        assert not gradient[~mask].any()


@each_loss
@pytest.mark.parametrize("lengths", [None, (6, 2, 4), (1, 0, 6)])
def test_final_step(kind, lengths):
    loss, outputs, targets = setup(kind)
    mask = None if lengths is None else jnp.arange(6)[:, None] < jnp.array(lengths)
    last = [5, 5, 5] if lengths is None else [n - 1 for n in lengths]
    rows = [(t, row) for row, t in enumerate(last) if t >= 0]
    table = per_step(kind, outputs, targets)
    expected = np.mean([table[t, row] for t, row in rows])
    final = losses.final_step(loss)
    np.testing.assert_allclose(final(outputs, targets, mask=mask), expected, rtol=1e-12)
    # Targets of the last step alone, as for classifying a whole sequence.
    alone = jnp.stack([targets[max(t, 0), row] for row, t in enumerate(last)])
    np.testing.assert_allclose(final(outputs, alone, mask=mask), expected, rtol=1e-12)
    np.testing.assert_allclose(final(outputs, targets, mask=mask, reduction="sum"), expected * len(rows), rtol=1e-12)


def test_unbatched_and_nothing_valid():
    logits, labels = jnp.ones((4, 5)), jnp.zeros(4, int)
    np.testing.assert_allclose(losses.cross_entropy(logits, labels), np.log(5))
    np.testing.assert_allclose(losses.final_step(losses.cross_entropy)(logits, jnp.array(0)), np.log(5))
    # Whole numbers as targets of a squared error, with and without an axis of time.
    last = losses.final_step(losses.mean_squared_error)
    assert last(jnp.ones((4, 5)), jnp.arange(5)) == last(jnp.ones((4, 5)), jnp.tile(jnp.arange(5), (4, 1))) == 3
    value, gradient = jax.value_and_grad(losses.cross_entropy)(logits, labels, mask=jnp.zeros(4, bool))
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: losses.cross_entropy(jnp.ones((4, 2, 5)), jnp.zeros((4, 3), int)),
            ValueError,
            r"labels have shape \(4, 3\), but logits have \(4, 2, 5\): pass class numbers .* of shape \(4, 2\)",
        ),
        (
            lambda: losses.mean_squared_error(jnp.ones((4, 2)), jnp.ones((4, 1))),
            ValueError,
            r"targets have shape \(4, 1\), but outputs have \(4, 2\)",
        ),
        (
            lambda: losses.cross_entropy(jnp.ones((4, 2, 5)), jnp.zeros((4, 2), int), mask=jnp.ones(4, bool)),
            ValueError,
            r"mask has shape \(4,\), but \(4, 2\) is expected, \[time, \*batch\].*broadcast_to",
        ),
        (
            lambda: losses.mean_squared_error(jnp.ones((4, 2)), jnp.ones((4, 2)), mask=jnp.ones(4)),
            TypeError,
            r"mask has dtype float64.*astype\(bool\)",
        ),
        (
            # Behind the annotations that the suite checks, whose own error would come first.
            lambda: inspect.unwrap(losses.mean_squared_error)(jnp.ones((4, 2)), jnp.ones((4, 2)), reduction="avg"),
            ValueError,
            r"reduction is 'avg', but only 'mean' and 'sum'",
        ),
        (
            lambda: losses.final_step(losses.cross_entropy)(jnp.ones((5, 4)), jnp.zeros(3, int)),
            ValueError,
            r"targets have shape \(3,\), but outputs have \(5, 4\): pass targets of every step, \[5, ...\], or of the last",
        ),
        (
            lambda: losses.final_step(losses.mean_squared_error)(jnp.ones((0, 2)), jnp.ones((0, 2))),
            ValueError,
            "final_step needs at least one time step",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()
