"""What `lax.scan` takes for a step, a first carry and inputs, every strategy takes, and makes the same of it."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import EXACT, UNCUT

import jaxbptt as bptt

WITH_GRADIENT_OF_INPUTS = EXACT | UNCUT
ALL = WITH_GRADIENT_OF_INPUTS | {"forward_scan": bptt.forward_scan}
strategies = pytest.mark.parametrize("strategy", ALL.values(), ids=ALL)


@pytest.mark.parametrize("strategy", WITH_GRADIENT_OF_INPUTS.values(), ids=WITH_GRADIENT_OF_INPUTS)
def test_a_step_may_empty_the_containers_it_is_given(strategy):
    """h ← 2 w h + x, and the containers of the caller stay as they are."""
    params, init, xs = {"w": 1.0}, {"h": 0.0}, {"x": np.array([2.0, 1.0, 3.0])}

    def step(params, carry, x):
        w, h = params.pop("w"), carry.pop("h")
        return {"h": 2 * w * h + x.pop("x")}, {"before": h, "emptied": carry}

    @jax.jit
    def value_and_gradients(w, h, x):
        def last(w, h, x):
            params["w"], init["h"], xs["x"] = w, h, x
            carry, ys = strategy(step, params, init, xs)
            assert ys["emptied"] == {}
            return carry["h"], ys["before"]

        return jax.value_and_grad(last, argnums=(0, 1, 2), has_aux=True)(w, h, x)

    (h, before), gradients = value_and_gradients(params["w"], init["h"], xs["x"])
    np.testing.assert_allclose(h, 13)
    np.testing.assert_allclose(before, [0, 2, 5])
    w_bar, h_bar, x_bar = gradients
    np.testing.assert_allclose(w_bar, 2 * 5 + 2 * (2 * 2))  # 2 h₂ + 2 (2 h₁ + 2 (2 h₀))
    np.testing.assert_allclose(h_bar, 8)
    np.testing.assert_allclose(x_bar, [4, 2, 1])
    assert [len(tree) for tree in (params, init, xs)] == [1, 1, 1]


bf16 = partial(jnp.ones, 3, jnp.bfloat16)
WEAK = {
    "kept by the carry, gives way in y": (lambda c, x: (c * 0.5, c * x), lambda: 1.0, bf16),
    "an integer": (lambda c, x: (c + 1, (c * x, c)), lambda: 1, partial(jnp.ones, 3, jnp.int8)),
    "takes the dtype of the new carry": (lambda c, x: (c * x, c), lambda: 1.0, bf16),
    "an integer that takes a real dtype": (lambda c, x: (c * x, c), lambda: 1, bf16),
    "a step that returns numbers": (lambda c, x: (1.0, 2), lambda: 0.0, bf16),
    "an array": (lambda c, x: (c * 0.5, (c, c * x)), lambda: jnp.asarray(1.0), bf16),
    "in xs": (lambda c, x: (c * x, (c, x)), lambda: jnp.ones((), jnp.bfloat16), lambda: jax.lax.full((3,), 1.0)),
    "no xs": (lambda c, x: (c + 1, (c, c * 1.0)), lambda: 1, lambda: None),
    "one of two": (
        lambda c, x: ({"a": c["a"] * 0.5, "n": c["n"] + 1}, c["a"] * x),
        lambda: {"a": 1.0, "n": jnp.ones((), jnp.int8)},
        bf16,
    ),
}


@strategies
def test_python_numbers_give_way_as_they_do_in_lax_scan(strategy):
    def types(scan, case):
        step, init, xs = case
        xs = xs()
        out = jax.eval_shape(lambda: scan(step, init(), xs, length=3))
        return [(leaf.shape, leaf.dtype, leaf.weak_type) for leaf in jax.tree.leaves(out)]

    for name, case in WEAK.items():
        assert types(
            lambda step, *args, **kw: strategy(lambda _, *at_t: step(*at_t), None, *args, **kw), case
        ) == types(jax.lax.scan, case), name


@strategies
def test_gradient_of_a_python_number_that_stays_one(strategy):
    """c₁ = c₀/2 and so on, y = c x in the low precision of x."""
    x = jnp.array([1.0, 2.0, 3.0], jnp.bfloat16)

    def loss(w, c):
        c, ys = strategy(lambda w, c, x: (w * c, c * x), w, c, x)
        return c + ys.sum().astype(c.dtype)

    value, gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(0.5, 4.0)
    np.testing.assert_allclose(value, 0.5 + 4 + 2 * 2 + 1 * 3)
    # w³ c + c + 2 w c + 3 w² c
    np.testing.assert_allclose(gradients, (3 * 0.25 * 4 + 8 + 6 * 0.5 * 4, 0.125 + 1 + 1 + 0.75))


def test_scan_hands_out_references_to_the_entries_of_mutable_arrays():
    """As `lax.scan` does: the step reads x and leaves the carry before it there."""
    ref = jax.new_ref(jnp.array([1.0, 2.0, 3.0]))

    def step(_, h, x):
        before, x["a"][...] = x["a"][...], h
        return h + before, h * before

    h, ys = jax.jit(lambda: bptt.scan(step, None, 0.5, {"a": ref}))()
    np.testing.assert_allclose(h, 6.5)
    np.testing.assert_allclose(ys, [0.5, 3, 10.5])
    np.testing.assert_allclose(ref[...], [0.5, 1.5, 3.5])


@strategies
def test_mutable_arrays_are_named(strategy):
    ref = jax.new_ref(jnp.ones(3))
    step = lambda _, c, x: (c, None)
    if strategy is not bptt.scan:
        with pytest.raises(
            TypeError, match=r"xs\['a'\] is a mutable array \(a Ref\) of shape \(3,\).*jaxbptt\.scan takes"
        ):
            jax.jit(lambda: strategy(step, None, 0.0, {"a": ref}))()
    with pytest.raises(TypeError, match=r"init\[0\] is a mutable array .*: pass its values, init\[0\]\[\.\.\.\]"):
        jax.jit(lambda: strategy(step, None, [ref], length=3))()
    with pytest.raises(TypeError, match=r"valid is a mutable array .*: pass its values"):
        jax.jit(lambda: strategy(step, None, 0.0, jnp.ones(3), valid=jax.new_ref(jnp.ones(3, bool))))()


@strategies
@pytest.mark.costly
def test_keys_of_steps_that_are_computed_again_count_as_used_once(strategy):
    def gradient(step, w, key):
        xs = {"key": jax.random.split(key, 4)}
        return jax.jit(jax.grad(lambda w: strategy(step, w, (0.5, jax.random.clone(key)), xs)[1].sum()))(w)

    def step(w, carry, x):
        h, key = carry
        key, own = jax.random.split(key)
        return (w * h + jax.random.normal(own) + jax.random.normal(x["key"]), key), h

    def careless_step(w, carry, x):
        return step(w, carry, x)[0], jax.random.normal(x["key"])

    with jax.debug_key_reuse(True):
        assert jnp.isfinite(gradient(step, 0.3, jax.random.key(0)))
        with pytest.raises(jax.errors.KeyReuseError):
            gradient(careless_step, 0.3, jax.random.key(0))


@strategies
def test_a_step_may_turn_double_precision_on_for_itself(strategy):
    def step(w, c, x):
        with jax.enable_x64(True):
            exact = (c.astype(jnp.float64) / 3, jnp.int64(2**40) + x.astype(jnp.int64))
            w, wide, x = (leaf.astype(jnp.float64) for leaf in (w, c, x))
            return (w * wide + x).astype(jnp.float32), (c, exact)

    def loss(w, xs):
        c, (ys, exact) = strategy(step, w, jnp.float32(0.5), xs)
        return c + ys.sum(), exact

    with jax.enable_x64(False):
        xs = jnp.array([1.0, 2.0, 3.0], jnp.float32)
        (_, (thirds, large)), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(jnp.float32(0.5), xs)
    np.testing.assert_allclose(thirds, np.array([0.5, 1.25, 2.625]) / 3, rtol=1e-15)
    assert list(large) == [2**40 + 1, 2**40 + 2, 2**40 + 3]
    # ys: c, w c + 1, w² c + w + 2, and the last carry w³ c + w² + 2 w + 3
    np.testing.assert_allclose(gradient, 0.5 + (2 * 0.5 * 0.5 + 1) + (3 * 0.25 * 0.5 + 2 * 0.5 + 2), rtol=1e-6)
