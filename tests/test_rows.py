"""The rows of a batch: found where a step keeps them apart, and nowhere else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import CELLS, DIAGONAL, assert_close, make_cell, problem

import jaxbptt as bptt
from jaxbptt.programs.rows import rows_of
from jaxbptt.programs.trace import trace
from jaxbptt.scans.recurrence import prepare

B, N, D = 4, 3, 2


def rows(step, params, init, xs):
    r = prepare(step, params, init, xs, None)
    return rows_of(r.step, trace(r.step, r.params, r.init, r.xs), r.init, r.xs)


# In double precision, which jax has inside of a test only.
RNG = np.random.default_rng(0)
SHAPES = {"W_hh": (N, N), "W_xh": (N, D), "a": (N,)}
W = {name: RNG.standard_normal(shape) for name, shape in SHAPES.items()}
INIT, XS, CONTEXT = RNG.standard_normal((B, N)), RNG.standard_normal((5, B, D)), RNG.standard_normal((B, N))


def plain(p, h, x):
    return jnp.tanh(h @ p["W_hh"].T + x @ p["W_xh"].T), h.sum()


def of_one_hot(p, h, x):
    return jnp.tanh(h @ p["W_hh"].T + jax.nn.one_hot(x, D, dtype=float) @ p["W_xh"].T), ()


def of_embedding(p, h, x):
    return jax.nn.relu(h @ p["W_hh"].T + p["W_xh"].T[x]), ()


def shared_input(p, h, x):
    return jnp.tanh(h @ p["W_hh"].T + p["W_xh"] @ x), ()


def centred(p, h, x):
    h = plain(p, h, x)[0]
    return h - h.mean(axis=0), ()


def centred_input(p, h, x):
    return plain(p, h, x - x.mean(axis=0))


def with_context(p, h, x):
    return plain(p, h, x)[0] + CONTEXT, ()


def counting(p, h, x):
    return plain(p, h, x)[0] * jnp.arange(B, dtype=float)[:, None], ()


def noisy(p, h, x):
    x, key = x
    return plain(p, h, x)[0] + jax.random.normal(key, h.shape), ()


def noisy_by_row(p, h, x):
    x, key = x
    return plain(p, h, x)[0] + jax.vmap(lambda key: jax.random.normal(key, (N,)))(key), ()


def rolled(p, h, x):
    return jnp.roll(plain(p, h, x)[0], 1, axis=0), ()


def of_this_size(p, h, x):
    return plain(p, h.reshape(B, N), x)[0], ()


def of_their_number(p, h, x):
    return plain(p, h, x)[0] / len(h), ()


def of_an_array_of_their_number(p, h, x):
    return plain(p, h, x)[0] * np.full(N, 1 / len(h)), ()


def with_a_loss_of_their_number(p, h, x):
    return jax.nn.silu(plain(p, h, x)[0]) * np.full(N, 0.5), h.sum() / len(h)


def transposed(p, h, x):
    return jnp.tanh(p["W_hh"] @ h.T + p["W_xh"] @ x.T).T, ()


TOKENS = RNG.integers(0, D, (5, B))
KEYS = jax.random.split(jax.random.key(0), 5)
ROW_KEYS = jax.random.split(jax.random.key(0), (5, B))
FOUND = {
    "plain": (plain, XS, (B,)),
    "one-hot": (of_one_hot, TOKENS, (B,)),
    "embedding": (of_embedding, TOKENS, (B,)),
    "an input for all rows": (shared_input, XS[:, 0], (B,)),
    "a key for each row": (noisy_by_row, (XS, ROW_KEYS), (B,)),
    "transposed": (transposed, XS, (B,)),
    "rows read each other": (centred, XS, ()),
    "inputs of rows read each other": (centred_input, XS, ()),
    "an array of its own for each row": (with_context, XS, ()),
    "a number for each row": (counting, XS, ()),
    "one key for all rows": (noisy, (XS, KEYS), ()),
    "rows change places": (rolled, XS, ()),
    "a size that is written out": (of_this_size, XS, ()),
    "how many there are": (of_their_number, XS, ()),
    "an array made of how many there are": (of_an_array_of_their_number, XS, ()),
    "how many there are, in the output alone": (with_a_loss_of_their_number, XS, (B,)),
}


@pytest.mark.parametrize(("step", "xs", "batch"), FOUND.values(), ids=FOUND)
def test_rows_are_found_where_the_step_keeps_them_apart(step, xs, batch):
    found = rows(step, W, INIT, xs)
    assert found.batch == batch
    if not batch:
        return
    of_rows = found.map(lambda h, x: found.step(_params(step, xs), h, x)[0], 0, found.x_axes)
    x = jax.tree.map(lambda leaf: leaf[1], xs)
    assert_close(of_rows(CONTEXT, x), step(W, CONTEXT, x)[0])


def _params(step, xs):
    return trace(step, W, INIT, xs).params


@pytest.mark.parametrize(
    "name",
    [
        "embedding",
        "a key for each row",
        "one key for all rows",
        "an array of its own for each row",
        "how many there are",
    ],
)
def test_the_gradient_is_right_either_way(name):
    step, xs, _ = FOUND[name]

    def loss(params, scan):
        return jnp.sum(scan(step, params, INIT, xs)[0] ** 2)

    reference, forward = jax.jit(lambda W: [jax.grad(loss)(W, scan) for scan in (bptt.scan, bptt.forward_scan)])(W)
    assert_close(forward, reference)


@pytest.mark.parametrize("name", [*CELLS, *DIAGONAL, "rate", "layer_norm"])
def test_the_batch_axes_of_every_cell(name):
    cell = make_cell(name)
    for batch in ((), (5,), (2, 3)):
        assert rows(cell, *problem(cell, 2, batch)).batch == batch


def test_the_units_of_a_cell_are_no_rows():
    """Each has a λ of its own, though none reads another."""
    assert rows(lambda p, h, x: (p["a"] * h, ()), W, jnp.ones(N), jnp.ones((2, 1))).batch == ()
    assert rows(lambda p, h, x: (p["a"].sum() * h, ()), W, jnp.ones(N), jnp.ones((2, 1))).batch == (N,)


def test_flags_for_rows_that_read_each_other():
    with pytest.raises(ValueError, match=r"is_first has shape \(5, 4\), but the rows of the carry can't be told apart"):
        bptt.forward_scan(centred, W, INIT, XS, is_first=jnp.zeros((5, B), bool))
