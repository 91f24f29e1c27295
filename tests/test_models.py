"""A model from its checkpoints: what it says of itself, and that it is the network that was saved."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbptt as bptt
from jaxbptt import checkpoints, models, tasks
from jaxbptt.models.model import BEST, settings_of

TEXT = models.Architecture("lstm", 6, 2, 5, 5, text=True, embedding=3, layer_norm=True, dropout=0.3)
NUMBERS = models.Architecture("gru", 6, 1, 3, 2, text=False, dropout=0.3, targets=(2, 0), change=(0.1, 0.2))
COLUMNS = models.Columns(("a", "b", "c"), np.array([1.0, 2.0, 1 / 3]), np.array([1.0, 0.1, 3.0]), (2, 0))
VOCABULARY = tasks.Vocabulary((97, 98, 177, 195, 200))


def saved(folder, architecture, vocabulary=None, columns=None, step=3, **options):
    """A checkpoint as training saves it, and the params in it."""
    net = models.build(architecture)
    init, _ = bptt.tbptt(lambda params, carry, *_, **__: (0.0, carry), optax.adam(1e-3))
    state = init(net.init(jax.random.key(step)), net.cell.initial_carry((4,)), jax.random.key(0))
    checkpoints.save(folder, step, state, settings_of(architecture, vocabulary, columns, [1, 2]), **options)
    return state.params


@pytest.mark.parametrize(
    ("architecture", "vocabulary", "columns", "xs"),
    [(TEXT, VOCABULARY, None, jnp.arange(4)), (NUMBERS, None, COLUMNS, jnp.ones((4, 3), jnp.float32))],
    ids=["text", "numbers"],
)
def test_loaded_is_what_was_saved(tmp_path, architecture, vocabulary, columns, xs):
    params = saved(tmp_path, architecture, vocabulary, columns, info={"loss": 0.5})
    model = bptt.load(tmp_path)
    assert (model.step, model.info, model.vocabulary) == (3, {"loss": 0.5}, vocabulary)
    jax.tree.map(np.testing.assert_array_equal, model.params, params)
    expected = models.build(architecture).apply(params, model.carry, xs)
    jax.tree.map(np.testing.assert_array_equal, model.network.apply(model.params, model.carry, xs), expected)
    if columns is not None:
        assert model.columns.target_names == ("c", "a")
        jax.tree.map(np.testing.assert_array_equal, tuple(model.columns), tuple(columns))


def test_the_best_is_loaded_unless_the_last_is_asked_for(tmp_path):
    saved(tmp_path, NUMBERS, columns=COLUMNS, step=9)
    assert bptt.load(tmp_path).step == 9
    saved(tmp_path / BEST, NUMBERS, columns=COLUMNS, step=5)
    assert (bptt.load(tmp_path).step, bptt.load(tmp_path, which="last").step) == (5, 9)
    with pytest.raises(ValueError, match="which is 'first', but there are two: pass 'best' or 'last'"):
        bptt.load(tmp_path, which="first")


def test_what_is_no_model(tmp_path):
    with pytest.raises(checkpoints.CheckpointError, match="holds no checkpoint"):
        bptt.load(tmp_path)
    checkpoints.save(tmp_path, 1, {"w": np.ones(3)}, {})
    with pytest.raises(checkpoints.CheckpointError, match="but not of a model that `jaxbptt train` of this version"):
        bptt.load(tmp_path)


def test_numbers_are_predicted_as_changes():
    """y = x + s (W h + b), of the target columns in their order."""
    net = models.build(NUMBERS)
    params = net.init(jax.random.key(0))
    xs = jax.random.normal(jax.random.key(1), (5, 3), jnp.float32)
    _, hs = bptt.scan(net.cell, params.cell, net.cell.initial_carry(), xs)
    params = params._replace(b_y=jnp.array([2.0, -1.0], jnp.float32))
    _, ys = net.apply(params, net.cell.initial_carry(), xs)
    changes = np.asarray(hs @ params.W_hy.T) + np.array([2.0, -1.0])
    expected = np.stack([xs[:, 2], xs[:, 0]], 1) + np.array([0.1, 0.2]) * changes
    np.testing.assert_allclose(ys, expected, rtol=1e-5)


def test_symbols_are_read_as_vectors():
    for architecture in (TEXT, TEXT._replace(embedding=None)):
        net = models.build(architecture)
        params = net.init(jax.random.key(0))
        vectors = params.embedding if architecture.embedding else np.eye(5)
        np.testing.assert_array_equal(net.read(params, jnp.array([[3, 0]])), vectors[jnp.array([[3, 0]])])


def test_dropout_is_between_layers_and_in_training_alone():
    """The mean over masks is close to the network without them where it is linear: in the read-out."""
    net = models.build(NUMBERS._replace(dropout=0.5))
    params, carry = net.init(jax.random.key(0)), net.cell.initial_carry((2000,))
    xs = jnp.broadcast_to(jax.random.normal(jax.random.key(1), (3, 1, 3), jnp.float32), (3, 2000, 3))
    (last, ys), (last_dropped, dropped) = (net.apply(params, carry, xs, key=key) for key in (None, jax.random.key(2)))
    np.testing.assert_array_equal(last, last_dropped)  # a single layer reads its own inputs whole
    np.testing.assert_allclose(dropped.mean(axis=1), ys[:, 0], atol=0.01)
    assert np.abs(dropped - ys).max() > 0.05
    deep = models.build(TEXT)
    params, carry, xs = deep.init(jax.random.key(0)), deep.cell.initial_carry((4,)), jnp.ones((3, 4), int)
    (first, second), _ = deep.apply(params, carry, xs, key=jax.random.key(2))
    (first_whole, second_whole), _ = deep.apply(params, carry, xs)
    np.testing.assert_allclose(first.h, first_whole.h, rtol=1e-6)
    assert np.abs(second.h - second_whole.h).max() > 1e-3


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"cell": "rnn"}, "cell is 'rnn', but it is one of elman, gru, lstm"),
        ({"cell": "gru"}, "layer_norm is there for an lstm, not for gru"),
        ({"layers": 0}, "layers"),
        ({"embedding": 0}, "embedding"),
        ({"dropout": 1.0}, "probability"),
    ],
)
def test_architectures_that_cannot_be(changed, message):
    with pytest.raises(ValueError, match=message):
        models.build(TEXT._replace(**changed))


def test_vocabulary():
    assert VOCABULARY.encode("bña").tolist() == [1, 3, 2, 0]
    assert VOCABULARY.decode([1, 3, 2, 0]) == "bña"
    assert VOCABULARY.decode([2, 0, 3]) == "a"  # half characters at both ends
    with pytest.raises(tasks.InputError, match="has never seen 'c', 'é': use only characters of its training text"):
        VOCABULARY.encode("acéc")


def test_columns():
    raw = np.array([[1.0, 2.0, 3.0], [2.0, 2.1, 1 / 3]])
    encoded = COLUMNS.encode(raw)
    np.testing.assert_allclose(encoded, [[0, 0, 8 / 9], [1, 1, 0]], atol=1e-6)
    np.testing.assert_allclose(COLUMNS.decode(encoded[:, [2, 0]]), raw[:, [2, 0]], rtol=1e-6)
