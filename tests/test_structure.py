"""What is read off a traced step: which leaves of the carry depend on which, along which axes, and whether linearly."""

import jax
import jax.numpy as jnp
import pytest
from reference import make_cell

from jaxbptt.programs.structure import groups_of

ROWS, UNITS = 3, 4
LEAF = jax.ShapeDtypeStruct((ROWS, UNITS), jnp.float64)
MATRIX = jax.ShapeDtypeStruct((UNITS, UNITS), jnp.float64)
WIDE = jax.ShapeDtypeStruct((UNITS, 2 * UNITS), jnp.float64)


def lower(h, x):
    return jax.nn.sigmoid(x) * h + x


# For one leaf, h: (function of h, a matrix and x, whether all axes are kept, how many leading axes are).
ONE_LEAF = {
    "coefficient": (lambda h, W, x: x * h + x, True, 0),
    "quotient": (lambda h, W, x: h / (1 + x**2) - h, True, 0),
    "dense": (lambda h, W, x: h @ W + x, False, 1),
    "twice dense": (lambda h, W, x: h @ W @ W.T - x, False, 1),
    "matrix first": (lambda h, W, x: (W @ h.T).T, False, 1),
    "over rows": (lambda h, W, x: x - h.mean(axis=0), False, 0),
    "over units": (lambda h, W, x: h - h.mean(axis=1, keepdims=True), False, 1),
    "over all": (lambda h, W, x: x * h.sum(), False, 0),
    "chosen by x": (lambda h, W, x: jnp.where(x > 0, x * h, h), True, 0),
    "transposed twice": (lambda h, W, x: (2 * h.T).T, True, 0),
    "transposed": (lambda h, W, x: jnp.pad(h.T, ((0, 0), (0, 1)))[:ROWS], False, 0),
    "reshaped and back": (lambda h, W, x: h.reshape(ROWS, 2, 2).reshape(ROWS, UNITS), False, 1),
    "units shifted": (lambda h, W, x: jnp.roll(h, 1, axis=1), False, 1),
    "rows shifted": (lambda h, W, x: jnp.roll(h, 1, axis=0), False, 0),
    "sums along units": (lambda h, W, x: jnp.cumsum(h, axis=1), False, 1),
    "units reversed": (lambda h, W, x: h[:, ::-1], False, 1),
    "one unit for all": (lambda h, W, x: x + h[:, :1], False, 1),
    "split": (lambda h, W, x: jnp.concatenate(jnp.split(h, 2, axis=1)[::-1], axis=1), False, 1),
    "not at all": (lambda h, W, x: x, True, 0),
}
# And functions that are not affine.
NOT_AFFINE = {
    "square": lambda h, W, x: h * h,
    "power": lambda h, W, x: h**3,
    "gate of the state": lambda h, W, x: jax.nn.sigmoid(h) * x,
    "step function": lambda h, W, x: jnp.floor(h),
    "cut gradient": lambda h, W, x: jax.lax.stop_gradient(h),
    "chosen by the state": lambda h, W, x: jnp.where(h > 0, h, 2 * h),
    "maximum": lambda h, W, x: jnp.maximum(h, x),
    "divided by the state": lambda h, W, x: x / h,
    "product with its matrix": lambda h, W, x: (h @ W) * h,
    "branch": lambda h, W, x: jax.lax.cond(h.sum() > 0, lambda h: 2 * h, lambda h: h, h),
}


def one_leaf(function):
    (group,) = groups_of(lambda carry, W, x: [function(carry[0], W, x)], [LEAF], MATRIX, LEAF)
    return group


@pytest.mark.parametrize("case", ONE_LEAF.values(), ids=ONE_LEAF)
def test_axes_of_an_affine_step(case):
    function, elementwise, batch = case
    group = one_leaf(function)
    assert (group.leaves, group.before, group.clashes) == ((0,), (), ())
    assert (group.elementwise, group.batch) == (elementwise, batch)


@pytest.mark.parametrize("function", NOT_AFFINE.values(), ids=NOT_AFFINE)
def test_what_is_not_affine(function):
    assert one_leaf(function).clashes == ((0, 0),)


def test_a_branch_chosen_by_the_input_is_affine():
    def branch(h, W, x):
        return jax.lax.cond(x.sum() > 0, lambda h: 2 * h, lambda h: h, h)

    assert one_leaf(branch).clashes == ()


def found(function, leaves=2):
    groups = groups_of(lambda carry, W, x: list(function(*carry, W, x)), [LEAF] * leaves, MATRIX, LEAF)
    return [(group.leaves, group.before, group.elementwise, group.clashes) for group in groups]


def test_leaves_that_depend_on_each_other_are_one_group():
    assert found(lambda re, im, W, x: (x * re - im, x * im + re)) == [((0, 1), (), True, ())]
    assert found(lambda a, b, W, x: (b, a)) == [((0, 1), (), True, ())]
    assert found(lambda a, b, W, x: (b @ W, a)) == [((0, 1), (), False, ())]


def test_layers_are_solved_one_after_the_other():
    """A gate of the second layer reads the first layer's state: no clash, since that is known by then."""

    def layers(upper, h, W, x):
        below = lower(h, x)
        return jax.nn.sigmoid(below @ W) * upper + below, below

    assert found(layers) == [((1,), (), True, ()), ((0,), (1,), True, ())]


def test_leaves_whose_coefficients_depend_on_each_other_clash():
    assert found(lambda a, b, W, x: (a * b, b + a)) == [((0, 1), (), True, ((0, 1), (1, 0)))]
    # What a leaf is multiplied by may depend on another one that it does not feed.
    assert found(lambda a, b, W, x: (a * b, b + x)) == [((1,), (), True, ()), ((0,), (1,), True, ())]


@pytest.mark.parametrize("name", ["elman", "gru", "lstm"])
def test_dense_cells_keep_their_batch_axes(name):
    cell = make_cell(name)
    params = jax.eval_shape(cell.init, jax.random.key(0))
    leaves, treedef = jax.tree.flatten(jax.eval_shape(lambda: cell.initial_carry((5, 2))))

    def step(carry, params, x):
        return jax.tree.leaves(cell.step(params, treedef.unflatten(carry), x)[0])

    (group,) = groups_of(step, leaves, params, jax.ShapeDtypeStruct((5, 2, 3), jnp.float64))
    assert (group.elementwise, group.batch) == (False, 2)
    assert group.clashes
