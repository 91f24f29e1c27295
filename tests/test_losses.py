"""Losses are optax's, averaged over valid steps, and nothing in the padding matters."""

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
@pytest.mark.costly
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
    ("dtype", "steps"), [(jnp.float16, 65_536), (jnp.bfloat16, 10_000)], ids=["float16", "bfloat16"]
)
@each_loss
@pytest.mark.costly
def test_half_precision_is_added_up_in_single(kind, dtype, steps):
    """In float16 the sum and the count overflow at 65,504; in bfloat16 a count stops at 256."""
    loss, _, _ = setup(kind)
    rng = np.random.default_rng(0)
    outputs = jnp.asarray(4 * rng.standard_normal((steps, 3)), dtype)
    targets = rng.integers(0, 3, steps) if kind == "classes" else rng.dirichlet(np.ones(3), steps)
    targets = jnp.asarray(targets, jnp.int32 if kind == "classes" else dtype)
    wide = targets if kind == "classes" else targets.astype(jnp.float64)
    expected, expected_gradient = jax.value_and_grad(loss)(outputs.astype(jnp.float64), wide)
    value, gradient = jax.value_and_grad(loss)(outputs, targets)
    assert value.dtype == gradient.dtype == dtype
    np.testing.assert_allclose(float(value), expected, rtol=float(jnp.finfo(dtype).eps))
    scale = float(jnp.abs(expected_gradient).max())
    np.testing.assert_allclose(gradient.astype(float), expected_gradient, atol=0.01 * scale)


def test_a_single_step():
    """A row of logits and one class number are told apart without a time axis."""
    logits = jnp.array([0.0, 1.0, -1.0])
    expected = losses.cross_entropy(logits[None], jnp.array([2]))
    assert inspect.unwrap(losses.cross_entropy)(logits, 2) == expected
    assert jnp.isnan(inspect.unwrap(losses.cross_entropy)(logits, -1))


def test_ones_against_zeros_in_half_precision():
    ones, zeros = jnp.ones((65_536, 1), jnp.float16), jnp.zeros((65_536, 1), jnp.float16)
    assert losses.mean_squared_error(ones, zeros) == 1
    assert losses.final_step(losses.mean_squared_error)(ones, zeros) == 1


@pytest.mark.parametrize("label", [-4, -1, 3])
@pytest.mark.costly
def test_a_label_that_is_not_a_class_gives_nan_and_never_another_class(label):
    logits, labels = jax.random.normal(jax.random.key(0), (4, 2, 3)), jnp.zeros((4, 2), int).at[1, 0].set(label)
    value, gradient = jax.jit(jax.value_and_grad(losses.cross_entropy))(logits, labels)
    assert jnp.isnan(value)
    assert jnp.isnan(gradient).sum() == jnp.isnan(gradient[1, 0]).sum() == 3
    # Where it does not count, it is nothing.
    mask = labels == 0
    expected = losses.cross_entropy(logits, jnp.zeros((4, 2), int), mask=mask)
    assert losses.cross_entropy(logits, labels, mask=mask) == expected
    value, gradient = jax.value_and_grad(losses.cross_entropy)(logits, labels, ignore_label=label)
    assert value == expected
    assert not gradient[1, 0].any()
    total = losses.cross_entropy(logits, labels, ignore_label=label, reduction="sum")
    np.testing.assert_allclose(total, 7 * expected, rtol=1e-12)


@pytest.mark.slow
def test_ignored_labels_and_a_mask_together():
    logits, labels = jax.random.normal(jax.random.key(0), (5, 3)), jnp.array([0, -100, 2, -100, 1])
    mask = jnp.array([True, True, False, True, True])
    value = losses.cross_entropy(logits, labels, mask=mask, ignore_label=-100)
    np.testing.assert_allclose(value, losses.cross_entropy(logits[jnp.array([0, 4])], labels[jnp.array([0, 4])]))
    assert losses.cross_entropy(logits, jnp.full(5, -100), ignore_label=-100) == 0
    final = losses.final_step(losses.cross_entropy)
    assert final(logits, labels, ignore_label=1) == 0
    assert final(logits, labels, ignore_label=-100) == losses.cross_entropy(logits[4:], labels[4:])


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8])
@pytest.mark.costly
def test_labels_of_few_bits_and_more_classes_than_they_can_hold(dtype):
    logits, labels = jax.random.normal(jax.random.key(0), (3, 300)), jnp.array([0, 100, 127])
    expected = losses.cross_entropy(logits, labels)
    assert losses.cross_entropy(logits, labels.astype(dtype)) == expected


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
            r"outputs have shape \(0, 2\), but final_step needs at least one time step",
        ),
        (
            lambda: inspect.unwrap(losses.cross_entropy)(jnp.ones(4), jnp.ones(4)),
            ValueError,
            r"can't be told whether the axis is time or classes",
        ),
        (
            lambda: losses.cross_entropy(jnp.ones((4, 0)), jnp.zeros(4, int)),
            ValueError,
            r"logits have shape \(4, 0\), .* at least one entry on the last axis",
        ),
        (
            lambda: inspect.unwrap(losses.mean_squared_error)(jnp.array(1.0), jnp.array(1.0)),
            ValueError,
            r"outputs have shape \(\), but \[time, \*batch, features\] is expected",
        ),
        (
            lambda: inspect.unwrap(losses.cross_entropy)(jnp.ones((4, 2)), jnp.zeros(4, int), ignore_label=-1.0),
            ValueError,
            r"ignore_label is -1\.0, but labels of int64 are from .*: pass a whole number they can hold, or a mask",
        ),
        (
            lambda: losses.cross_entropy(jnp.ones((4, 2)), jnp.zeros(4, jnp.uint8), ignore_label=-1),
            ValueError,
            r"ignore_label is -1, but labels of uint8 are from 0 to 255: pass a whole number they can hold, or a mask",
        ),
        (
            lambda: losses.cross_entropy(jnp.ones((4, 2)), jnp.ones((4, 2)), ignore_label=-1),
            ValueError,
            r"ignore_label is -1, but labels of float64 are distributions, not class numbers: pass a mask",
        ),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_single_features_masked():
    """What was not observed counts in neither sum nor number, and nan there changes nothing."""
    outputs, targets = jax.random.normal(jax.random.key(0), (2, 3, 4, 2))
    mask = jax.random.bernoulli(jax.random.key(1), 0.6, outputs.shape)
    squares = np.asarray((outputs - targets) ** 2)[np.asarray(mask)]
    spoilt = jnp.where(mask, targets, jnp.nan)
    value, gradient = jax.value_and_grad(losses.mean_squared_error)(outputs, spoilt, mask=mask)
    np.testing.assert_allclose(value, squares.mean())
    assert np.isfinite(gradient).all()
    np.testing.assert_allclose(
        losses.mean_squared_error(outputs, spoilt, mask=mask, reduction="sum"), squares.sum() / 2
    )
    every = jnp.ones(outputs.shape, bool)
    for reduction in ("mean", "sum"):
        np.testing.assert_allclose(
            losses.mean_squared_error(outputs, targets, mask=every, reduction=reduction),
            losses.mean_squared_error(outputs, targets, reduction=reduction),
        )
