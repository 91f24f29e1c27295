"""What `lax.scan` takes for a step, a first carry and inputs, every strategy takes, and makes the same of it."""

import jax
import numpy as np
import pytest
from reference import EXACT, UNCUT

ALL = EXACT | UNCUT
strategies = pytest.mark.parametrize("strategy", ALL.values(), ids=ALL)


@strategies
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
