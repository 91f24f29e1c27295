"""Nothing leans on axes that JAX adds by itself: all of it runs under `jax_numpy_rank_promotion="raise"`."""

from functools import partial

import jax
import jax.numpy as jnp
import optax
import pytest
from reference import CELLS, DIAGONAL, assert_close, make_cell, problem

import jaxbptt as bptt
from jaxbptt.analysis.credit import LagContributions


@pytest.fixture(autouse=True)
def explicit():
    with jax.numpy_rank_promotion("raise"):
        yield


@pytest.mark.parametrize("name", [*CELLS, *DIAGONAL, "rate", "layer_norm"])
@pytest.mark.costly
def test_cells_with_a_batch(name):
    """The step, and the cell's own adjoint, by shapes alone; and values in float32."""
    cell = make_cell(name)
    params, carry, xs = problem(cell, 3, (2,))
    flags = jnp.zeros((3, 2), bool)

    def gradient(scan):
        return jax.grad(lambda params: jnp.sum(scan(cell, params, carry, xs)[1]))

    for scan in (bptt.scan, bptt.adjoint_scan, partial(bptt.adjoint_scan, is_first=flags, valid=~flags)):
        jax.eval_shape(gradient(scan), params)
    row = jax.tree.map(lambda leaf: leaf[0], carry)
    assert_close(cell.step(params, carry, xs[0])[1][0], cell.step(params, row, xs[0, 0])[1])


def calls():
    """Everything but strategies, as functions of nothing."""
    cell = make_cell("lstm")
    params, init, xs = problem(cell, 4)
    batch = problem(cell, 4, (2,))
    loss = lambda carry, ys: jnp.sum(ys[-1])
    one = (cell, params, init, xs)
    rows = (cell, params, batch[1], batch[2])
    J = jnp.ones((4, 3, 3))
    lags = LagContributions({"W": jnp.ones((4, 3, 2))}, {"W": jnp.ones((3, 2))}, None, None, None)
    elman = bptt.network(bptt.elman(3, 4, dtype=jnp.float64), 2)
    outputs, labels, mask = jnp.ones((4, 2, 3)), jnp.ones((4, 2), int), jnp.ones((4, 2), bool)
    key = jax.random.key(0)

    def updated(**lengths):
        def loss(params, carry, chunk, *, scan, key):
            carry, ys = scan(cell, params, carry, chunk.xs)
            return bptt.losses.mean_squared_error(ys, chunk.targets, mask=chunk.mask), carry

        init, update = bptt.tbptt(loss, optax.sgd(0.1), clip=optax.clip_by_global_norm(1.0), **lengths)
        chunk = bptt.streams.pad(bptt.Chunk(rows[3], jnp.ones((4, 2, 4))), 4)
        return update(init(params, rows[2], key), chunk)

    return {
        "state_jacobians": lambda: bptt.state_jacobians(*one),
        "temporal_contributions": lambda: bptt.temporal_contributions(*one, loss),
        "jacobian_products": lambda: bptt.product_log_singular_values(bptt.jacobian_products(J)),
        "singular_values": lambda: bptt.singular_values(J, start=[0, 2]),
        "singular_values of operators": lambda: bptt.singular_values(bptt.jacobian_operators(*one)),
        "log_norms": lambda: bptt.log_norms(J),
        "jacobian_eigenvalues": lambda: bptt.jacobian_eigenvalues(J),
        "lyapunov_exponents": lambda: bptt.lyapunov_exponents(*one, num_exponents=2, burn_in=1, qr_every=2),
        "covariant_lyapunov_vectors": lambda: bptt.covariant_lyapunov_vectors(*one, burn_in=1, burn_out=1),
        "principal_components": lambda: bptt.principal_components(outputs, valid=mask).project(outputs),
        "participation_ratio": lambda: bptt.participation_ratio(outputs, valid=mask),
        "sample_states": lambda: bptt.sample_states(outputs, 3, key=key, noise=0.1, batch_axes=1, valid=mask),
        "departure_from_normality": lambda: bptt.departure_from_normality(J),
        "gradient_flow": lambda: bptt.gradient_flow(*rows, loss),
        "lag_contributions": lambda: bptt.lag_contributions(*rows, loss),
        "truncation_bias": lambda: bptt.truncation_bias(*rows, loss),
        "input_saliency": lambda: bptt.input_saliency(*rows, lambda carry, ys: ys.sum((1, 2))),
        "effective_horizon": lambda: bptt.effective_horizon(lags),
        "pascanu": lambda: bptt.regularizers.pascanu(*rows, loss),
        "gradient_flossing": lambda: bptt.regularizers.gradient_flossing(*one, num_exponents=2),
        "bptt": lambda: bptt.bptt(elman.init(key), xs, jnp.zeros(4), jnp.zeros(4, int)),
        "elman_state_jacobians": lambda: bptt.elman_state_jacobians(elman.init(key).cell, jnp.ones((2, 5, 4))),
        "cross_entropy": lambda: bptt.losses.cross_entropy(outputs, labels, mask=mask, ignore_label=0),
        "mean_squared_error": lambda: bptt.losses.mean_squared_error(outputs, outputs, mask=mask),
        "final_step": lambda: bptt.losses.final_step(bptt.losses.cross_entropy)(outputs, labels, mask=mask),
        "surviving_paths": lambda: bptt.surviving_paths(bptt.windowed_scan, 4, window=2),
        "bidirectional": lambda: bptt.bidirectional(cell, cell).apply(
            (params, params),
            (batch[1], batch[1]),
            batch[2],
            is_first=mask,
            valid=bptt.valid_from_lengths(jnp.ones(2, int), 4),
        ),
        "tbptt": updated,
        "tbptt with burn_in": lambda: updated(burn_in=1),
        "tbptt, truncated": lambda: updated(truncation_length=2),
        "tbptt, overlapping": lambda: updated(truncation_length=4, update_every=2),
        "adding_problem": lambda: bptt.tasks.adding_problem(steps=5).sample(key, 3),
        "copy_memory": lambda: bptt.tasks.copy_memory(delay=5).sample(key, 3),
        "temporal_order": lambda: bptt.tasks.temporal_order(steps=40).sample(key, 3),
        "delayed_xor": lambda: bptt.tasks.delayed_xor(delay=3).sample(key, 3),
        "characters": lambda: bptt.tasks.characters(bptt.tasks.read_standard_library(), steps=5).sample(key, 2),
        "lorenz_series": lambda: bptt.tasks.lorenz_series(5, initial=jnp.ones((2, 3)), transient=0.0),
        "mackey_glass_series": lambda: bptt.tasks.mackey_glass_series(5, tau=5, initial=jnp.ones(2), transient=0),
    }


def test_everything_else_by_shapes_alone():
    refused = {}
    with jax.numpy_dtype_promotion("standard"):  # optax promotes
        for name, call in calls().items():
            try:
                jax.eval_shape(call)
            except ValueError as error:
                refused[name] = str(error)
    assert not refused


@pytest.mark.slow
@pytest.mark.parametrize("task", [lambda: bptt.tasks.lorenz(steps=3), lambda: bptt.tasks.mackey_glass(steps=3)])
def test_chaotic_tasks(task):
    """Their mean and deviation are computed, not traced."""
    with jax.enable_x64(False):
        task().sample(jax.random.key(0), 2)


@pytest.mark.slow
def test_verdicts():
    cell = make_cell("gru")
    params, init, xs = problem(cell, 5)
    _, rows, batch = problem(cell, 5, (2,))
    loss = lambda carry, ys: jnp.sum(ys[-1])
    assert bptt.diagnose_gradient(cell, params, init, xs, loss).cause
    assert bptt.fixed_points(cell, params, xs[0], jnp.zeros((2, 4))).fixed.all()
    assert bptt.plan(cell, params, rows, batch, memory_bytes=1).reason
    lags = bptt.lag_contributions(cell, params, rows, batch, loss)
    assert bptt.adaptive_truncation_length(lags).reason
