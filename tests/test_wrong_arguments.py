"""Every public function × wrong arguments: what is refused is refused in our own words, wherever it would have failed.

An error is ours where a `raise` of the package made it, not JAX, numpy or an operator of Python's.
"""

import inspect
import linecache
import traceback
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import make_cell, problem

import jaxbptt as bptt
from jaxbptt.analysis.credit import LagContributions

PACKAGE = str(Path(bptt.__file__).parent)

# Made when a test runs, under its precision.
WRONG = {
    "None": lambda: None,
    "string": lambda: "x",
    "negative": lambda: -1,
    "fraction": lambda: 0.5,
    "bool": lambda: True,
    "list": lambda: [[1.0], [1.0, 2.0]],
    "no entries": lambda: jnp.zeros((0, 0)),
    "axes": lambda: jnp.ones((2, 3, 5, 7)),
    "integers": lambda: jnp.ones((4, 2, 3), jnp.int32),
    "complex": lambda: jnp.ones((4, 2, 3), jnp.complex64),
}


def ours(error):
    """Whether the line that raised it is a `raise` of this package."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = linecache.getline(frame.filename, frame.lineno or 0).strip()
    return (
        isinstance(error, ValueError | TypeError) and frame.filename.startswith(PACKAGE) and line.startswith("raise ")
    )


def functions():
    """Name: the function, arguments that are right, and of those the ones to put wrong, with what is no mistake there."""
    cell = make_cell("gru")
    params, init, xs = problem(cell, 4)
    one = {"step": cell, "params": params, "init": init, "xs": xs}
    loss = {"loss": lambda carry, ys: jnp.sum(ys[-1])}
    outputs, labels, mask = jnp.ones((4, 2, 3)), jnp.ones((4, 2), int), jnp.ones((4, 2), bool)
    key = jax.random.key(0)
    sizes = {"input_size": 3, "hidden_size": 4}
    options = {"dtype": jnp.float32, "compute_dtype": None, "recurrent_init": bptt.initializers.identity()}
    wrong_sizes = dict.fromkeys(["input_size", "hidden_size", "dtype", "recurrent_init"], frozenset()) | {
        "compute_dtype": {"None"}
    }
    J = jnp.ones((4, 3, 3))
    lags = LagContributions({"W": jnp.ones((4, 3, 2))}, {"W": jnp.ones((3, 2))}, jnp.ones(4), None, None)
    layer = bptt.bidirectional(cell, cell)
    elman = bptt.network(bptt.elman(3, 4, dtype=jnp.float64), 2)
    textbook = {"params": elman.init(key), "xs": xs, "h_0": jnp.zeros(4), "targets": jnp.zeros(4, int)}
    chunk = bptt.Chunk(xs=jnp.ones((4, 2, 1)))
    update = bptt.tbptt(lambda params, carry, chunk, *, scan, key: (jnp.sum(params), carry), optax.sgd(0.1))
    state = update.init(jnp.ones(2), jnp.ones((2, 1)), key)
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("batch",))
    return {
        "elman": (bptt.elman, sizes | options, wrong_sizes),
        "gru": (
            bptt.gru,
            sizes | options | {"chrono_length": 9, "update_bias": 1.0},
            wrong_sizes | {"chrono_length": {"None"}, "update_bias": {"negative", "fraction"}},
        ),
        "lstm": (
            bptt.lstm,
            sizes | options | {"chrono_length": 9, "forget_bias": 1.0, "layer_norm": False},
            wrong_sizes | {"chrono_length": {"None"}, "forget_bias": {"negative", "fraction"}, "layer_norm": {"bool"}},
        ),
        "rate": (
            bptt.rate,
            sizes | options | {"tau": 9.0, "dt": 1.0, "noise": 0.1, "nonlinearity": jnp.tanh},
            wrong_sizes | {"tau": set(), "dt": {"fraction", "bool"}, "noise": {"fraction"}, "nonlinearity": set()},
        ),
        "rate.step": (
            bptt.rate(3, 4, tau=9.0, dt=1.0, noise=0.1).step,
            {"params": bptt.RateParams(*params[:3]), "h": jnp.zeros(4), "x": (jnp.zeros(3), key)},
            dict.fromkeys(["params", "h", "x"], frozenset()),
        ),
        "dropout": (
            lambda cell, **rates: bptt.dropout(cell, **rates),
            {"cell": cell, "input_rate": 0.1, "recurrent_rate": 0.1},
            {"cell": set(), "input_rate": {"fraction"}, "recurrent_rate": {"fraction"}},
        ),
        "dropout.draw": (
            bptt.dropout(cell, input_rate=0.1).draw,
            {"key": key, "params": params, "batch_shape": (2,)},
            {"key": set(), "batch_shape": set()},
        ),
        "stack": (lambda cell: bptt.stack(cell), {"cell": cell}, {"cell": set()}),
        "network": (bptt.network, {"cell": cell, "output_size": 2}, {"cell": set(), "output_size": set()}),
        "bidirectional": (
            bptt.bidirectional,
            {"forward": cell, "backward": cell},
            {"forward": set(), "backward": set()},
        ),
        "bidirectional.init": (layer.init, {"key": key}, {"key": set()}),
        "bidirectional.apply": (
            layer.apply,
            {"params": layer.init(key), "carry": layer.initial_carry(), "xs": xs, "scan": bptt.scan, "is_first": None}
            | {"valid": None},
            {"params": set(), "carry": set(), "scan": set(), "is_first": {"None"}, "valid": {"None"}},
        ),
        "valid_from_lengths": (
            bptt.valid_from_lengths,
            {"lengths": labels, "time_steps": 3},
            {"lengths": {"integers"}, "time_steps": set()},
        ),
        "as_lax": (bptt.as_lax, {"strategy": bptt.scan}, {"strategy": set()}),
        "as_lax(scan)": (
            bptt.as_lax(bptt.scan),
            {"f": lambda carry, x: (carry, x), "init": jnp.zeros(()), "xs": xs, "reverse": False},
            {"f": set(), "reverse": {"bool"}},
        ),
        "network.init": (elman.init, {"key": key}, {"key": set()}),
        "cell.init": (cell.init, {"key": key}, {"key": set()}),
        "cell.initial_carry": (cell.initial_carry, {"batch_shape": (2,)}, {"batch_shape": set()}),
        "cell.step": (
            cell.step,
            {"params": params, "h": init, "x": xs[0]},
            dict.fromkeys(["params", "h", "x"], frozenset()),
        ),
        "lstm.step": (
            make_cell("lstm").step,
            dict(zip(["params", "state", "x"], problem(make_cell("lstm"), 1), strict=True)),
            {"params": set(), "state": set()},
        ),
        "orthogonal": (bptt.initializers.orthogonal, {"scale": 1.0}, {"scale": {"negative", "fraction"}}),
        "identity": (bptt.initializers.identity, {"scale": 1.0}, {"scale": {"negative", "fraction"}}),
        "chrono": (bptt.initializers.chrono, {"length": 9}, {"length": set()}),
        "elman_state_jacobians": (
            bptt.elman_state_jacobians,
            {"params": elman.init(key).cell, "hs": jnp.ones((2, 4))},
            {"params": set(), "hs": set()},
        ),
        "bptt": (bptt.bptt, textbook, dict.fromkeys(textbook, frozenset())),
        "cross_entropy": (
            bptt.losses.cross_entropy,
            {"logits": outputs, "labels": labels, "mask": mask, "ignore_label": 0, "reduction": "sum"},
            {
                "logits": set(),
                "labels": {"integers"},
                "mask": {"None"},
                "ignore_label": {"None", "negative"},
                "reduction": set(),
            },
        ),
        "mean_squared_error": (
            bptt.losses.mean_squared_error,
            {"outputs": outputs, "targets": outputs, "mask": mask, "reduction": "sum"},
            {"outputs": set(), "targets": {"integers"}, "mask": {"None"}, "reduction": set()},
        ),
        "final_step": (bptt.losses.final_step, {"loss": bptt.losses.cross_entropy}, {"loss": set()}),
        "final_step of cross_entropy": (
            bptt.losses.final_step(bptt.losses.cross_entropy),
            {"outputs": outputs, "targets": labels, "mask": mask},
            {"outputs": set(), "targets": set(), "mask": {"None"}},
        ),
        "from_torch": (bptt.interop.from_torch, {"state_dict": bptt.interop.to_torch(params)}, {"state_dict": set()}),
        "from_flax": (bptt.interop.from_flax, {"module": None}, {"module": set()}),
        "from_equinox": (bptt.interop.from_equinox, {"module": None}, {"module": set()}),
        "to_torch": (bptt.interop.to_torch, {"params": params}, {"params": set()}),
        "jacobian_products": (bptt.jacobian_products, {"J": J}, {"J": set()}),
        "product_log_singular_values": (
            bptt.product_log_singular_values,
            {"products": bptt.analysis.jacobians.ScaledProducts(J, jnp.ones(4))},
            {"products": set()},
        ),
        "singular_values": (
            bptt.singular_values,
            {"J": J, "start": 0, "top": 2},
            {"J": set(), "start": set(), "top": {"None"}},
        ),
        "log_norms": (
            bptt.log_norms,
            {"J": J, "probes": 2, "key": key, "pairs": [(1, 0)]},
            {"J": set(), "probes": set(), "key": {"None"}, "pairs": {"None"}},
        ),
        "jacobian_eigenvalues": (bptt.jacobian_eigenvalues, {"J": J}, {"J": set()}),
        "state_jacobians": (bptt.state_jacobians, one, {"step": set()}),
        "jacobian_operators": (bptt.jacobian_operators, one, {"step": set()}),
        "lyapunov_exponents": (
            bptt.lyapunov_exponents,
            one | {"num_exponents": 2, "burn_in": 0, "qr_every": 1, "time_step": 1.0, "key": key},
            {
                "step": set(),
                "num_exponents": {"None"},
                "burn_in": set(),
                "qr_every": set(),
                "time_step": {"fraction"},
                "key": {"None"},
            },
        ),
        "covariant_lyapunov_vectors": (
            bptt.covariant_lyapunov_vectors,
            one | {"num_vectors": 2, "burn_in": 0, "burn_out": 0, "num_unstable": 1, "time_step": 1.0, "key": key},
            {
                "step": set(),
                "num_vectors": {"None"},
                "burn_in": set(),
                "burn_out": set(),
                "num_unstable": {"None"},
                "time_step": {"fraction"},
                "key": {"None"},
            },
        ),
        "fixed_points": (
            bptt.fixed_points,
            {"step": cell, "params": params, "x": xs[0], "guesses": init[None]}
            | {"tolerance": 1e-9, "slow": 1e-2, "distance": 1e-6, "max_steps": 2},
            {
                "step": set(),
                "guesses": set(),
                "tolerance": {"None", "fraction"},
                "slow": {"fraction"},
                "distance": {"None", "fraction"},
                "max_steps": set(),
            },
        ),
        "sample_states": (
            bptt.sample_states,
            {"carries": outputs, "count": 3, "key": key, "noise": 0.1, "batch_axes": 1, "valid": mask},
            {
                "carries": {"axes", "integers", "complex"},
                "count": set(),
                "key": set(),
                "noise": {"fraction"},
                "batch_axes": set(),
                "valid": {"None"},
            },
        ),
        "principal_components": (
            bptt.principal_components,
            {"states": outputs, "num_components": 2, "valid": mask},
            {"states": {"axes"}, "num_components": {"None"}, "valid": {"None"}},
        ),
        "participation_ratio": (
            bptt.participation_ratio,
            {"states": outputs, "valid": mask},
            {"states": {"axes"}, "valid": {"None"}},
        ),
        "departure_from_normality": (bptt.departure_from_normality, {"A": J}, {"A": set()}),
        "gradient_flow": (bptt.gradient_flow, one | loss, {"step": set(), "loss": set()}),
        "temporal_contributions": (bptt.temporal_contributions, one | loss, {"step": set(), "loss": set()}),
        "lag_contributions": (
            bptt.lag_contributions,
            one | loss | {"max_lag": 1},
            {"step": set(), "loss": set(), "max_lag": {"None"}},
        ),
        "truncation_bias": (
            bptt.truncation_bias,
            one | loss | {"lengths": [2]},
            {"step": set(), "loss": set(), "lengths": {"None"}},
        ),
        "input_saliency": (
            bptt.input_saliency,
            one | {"losses": lambda carry, ys: ys.sum(1), "steps": [1]},
            {"step": set(), "losses": set(), "steps": {"None"}},
        ),
        "effective_horizon": (
            bptt.effective_horizon,
            {"lags": lags, "eps": 0.1},
            {"lags": set(), "eps": {"None", "fraction"}},
        ),
        "adaptive_truncation_length": (
            bptt.adaptive_truncation_length,
            {"lags": lags, "relative_bias": 0.1, "fit_from": 1},
            {"lags": set(), "relative_bias": {"fraction"}, "fit_from": {"None"}},
        ),
        "diagnose_gradient": (
            bptt.diagnose_gradient,
            one | loss | {"num_exponents": 2},
            {"step": set(), "loss": set(), "num_exponents": set()},
        ),
        "certify": (
            bptt.certify,
            one | loss | {"scans": {}, "gradients": None, "repeats": 1},
            {"step": set(), "loss": set(), "scans": {"None"}, "gradients": {"None"}, "repeats": set()},
        ),
        "plan": (
            bptt.plan,
            one | loss | {"memory_bytes": 2**20},
            {"step": set(), "loss": {"None"}, "memory_bytes": {"fraction"}},
        ),
        "plan_parallel": (
            bptt.plan_parallel,
            {"step": lambda a, h, x: (a * h + x, h), "params": 0.5, "init": jnp.zeros(2), "xs": jnp.ones((3, 2))}
            | {"loss": loss["loss"], "platform": None, "figures": None, "memory_bytes": None, "prefix": 8},
            {
                "step": set(),
                "loss": {"None"},
                "platform": {"None"},
                "figures": {"None"},
                "memory_bytes": {"None", "fraction"},
                "prefix": set(),
            },
        ),
        "surviving_paths": (
            bptt.surviving_paths,
            {"strategy": bptt.scan, "length": 3},
            {"strategy": set(), "length": set()},
        ),
        "newton_states": (
            bptt.newton_states,
            one
            | {
                "jacobian": "full",
                "tolerance": 0.1,
                "max_iterations": 2,
                "damping": 0.0,
                "guess": None,
                "chunk_length": 2,
            },
            {"step": set(), "jacobian": set(), "tolerance": {"None", "fraction"}, "max_iterations": {"None"}}
            | {"damping": {"fraction"}, "guess": {"None"}, "chunk_length": {"None"}},
        ),
        "checkpoint_schedule": (
            bptt.checkpoint_schedule,
            {"length": 5, "checkpoints": 2},
            {"length": set(), "checkpoints": set()},
        ),
        "compare_gradients": (
            bptt.compare_gradients,
            {"mine": params, "reference": params, "temporal": None, "lags": None, "step": None, "loss": None},
            {
                "mine": set(),
                "reference": set(),
                "temporal": {"None"},
                "lags": {"None"},
                "step": {"None"},
                "loss": {"None"},
            },
        ),
        "pascanu": (bptt.regularizers.pascanu, one | loss, {"step": set(), "loss": set()}),
        "gradient_flossing": (
            bptt.regularizers.gradient_flossing,
            one | {"num_exponents": 1, "burn_in": 0, "qr_every": 1},
            {"step": set(), "num_exponents": {"None"}, "burn_in": set(), "qr_every": set()},
        ),
        "tbptt": (
            bptt.tbptt,
            {"loss": loss["loss"], "optimizer": optax.sgd(0.1), "truncation_length": 2, "update_every": 2}
            | {"burn_in": 0, "scan": None, "clip": None, "influence": None},
            {
                "loss": set(),
                "optimizer": set(),
                "truncation_length": {"None"},
                "update_every": {"None"},
                "burn_in": set(),
                "scan": {"None"},
                "clip": {"None"},
                "influence": {"None"},
            },
        ),
        "tbptt.init": (
            update.init,
            {"params": jnp.ones(2), "carry": jnp.ones((2, 1)), "key": key},
            {"key": set()},
        ),
        "tbptt.update": (update.update, {"state": state, "chunk": chunk}, {"state": set(), "chunk": set()}),
        "shard_state": (
            bptt.sharding.shard_state,
            {"state": state, "mesh": mesh, "influence": "batch"},
            {"state": set(), "mesh": set(), "influence": set()},
        ),
        "shard_chunk": (bptt.sharding.shard_chunk, {"chunk": chunk, "mesh": mesh}, {"chunk": set(), "mesh": set()}),
        "rows": (
            bptt.streams.rows,
            {
                "values": np.arange(9.0),
                "targets": np.arange(9.0),
                "batch": 2,
                "chunk_length": 2,
                "overlap": 0,
                "encode": None,
            },
            {
                "values": set(),
                "targets": {"None"},
                "batch": set(),
                "chunk_length": set(),
                "overlap": set(),
                "encode": {"None"},
            },
        ),
        "episodes": (
            bptt.streams.episodes,
            {"sequences": [(np.ones(3), None)], "batch": 1, "chunk_length": 2},
            {"sequences": set(), "batch": set(), "chunk_length": set()},
        ),
        "padded": (
            bptt.streams.padded,
            {"sequences": [(np.ones(3), None)], "batch": 1},
            {"sequences": set(), "batch": set()},
        ),
        "pad": (bptt.streams.pad, {"chunk": chunk, "length": 5}, {"chunk": set(), "length": set()}),
        "is_first_from_done": (
            bptt.streams.is_first_from_done,
            {"done": mask, "first": True},
            {"done": set(), "first": {"bool"}},
        ),
        "adding_problem": (bptt.tasks.adding_problem, {"steps": 5}, {"steps": set()}),
        "adding_problem.sample": (
            bptt.tasks.adding_problem(steps=5).sample,
            {"key": key, "batch": 2},
            {"key": set(), "batch": set()},
        ),
        "copy_memory": (
            bptt.tasks.copy_memory,
            {"delay": 5, "symbols": 3, "length": 2},
            {"delay": set(), "symbols": set(), "length": set()},
        ),
        "temporal_order": (bptt.tasks.temporal_order, {"steps": 20}, {"steps": set()}),
        "delayed_xor": (bptt.tasks.delayed_xor, {"delay": 2, "steps": 9}, {"delay": set(), "steps": {"None"}}),
        "lorenz_series": (
            bptt.tasks.lorenz_series,
            {"length": 2, "dt": 0.01, "initial": jnp.ones(3), "transient": 0.0},
            {"length": set(), "dt": {"fraction"}, "initial": {"None", "integers"}, "transient": {"fraction"}},
        ),
        "mackey_glass_series": (
            bptt.tasks.mackey_glass_series,
            {"length": 2, "tau": 5, "initial": jnp.ones(2), "transient": 0},
            {"length": set(), "tau": set(), "transient": set()},
        ),
        "characters": (bptt.tasks.characters, {"series": None, "steps": 5}, {"series": {"None"}, "steps": set()}),
        "digits": (bptt.tasks.digits, {"by": "rows", "seed": 0}, {"by": set(), "seed": set()}),
        "truncated_scan": (
            bptt.truncated_scan,
            one | {"truncation_length": 2},
            {"step": set(), "truncation_length": set()},
        ),
        "windowed_scan": (bptt.windowed_scan, one | {"window": 2}, {"step": set(), "window": set()}),
        "checkpointed_scan": (
            bptt.checkpointed_scan,
            one | {"segment_length": 2},
            {"step": set(), "segment_length": {"None"}, "checkpoints": {"None"}},
        ),
        "scan": (bptt.scan, one, {"step": set(), "reverse": {"bool"}}),
        "adjoint_scan": (bptt.adjoint_scan, one, {"step": set(), "reverse": {"bool"}}),
        "cudnn_scan": (bptt.cudnn_scan, one, {"step": set()}),
    }


@pytest.mark.slow
def test_only_our_own_words():
    found = []
    filtering = jax.config.jax_traceback_filtering
    jax.config.update("jax_traceback_filtering", "off")
    try:
        for name, (function, right, arguments) in functions().items():
            # Behind the annotations that the suite may check, whose own errors would come first.
            function = inspect.unwrap(function)
            for argument, accepted in arguments.items():
                for kind, make in WRONG.items():
                    if kind in accepted:
                        continue
                    try:
                        function(**right | {argument: make()})
                        found.append(f"{name}({argument}={kind}) is accepted")
                    except Exception as error:
                        if not ours(error):
                            found.append(f"{name}({argument}={kind}): {type(error).__name__}: {str(error)[:120]}")
    finally:
        jax.config.update("jax_traceback_filtering", filtering)
    assert not found, "\n".join(found)


def test_what_looks_at_numbers_is_not_to_be_jitted():
    cell = make_cell("elman")
    params, init, xs = problem(cell, 4)
    loss = lambda carry, ys: jnp.sum(ys[-1])
    lags = LagContributions({"W": jnp.ones((4, 3, 2))}, {"W": jnp.ones((3, 2))}, jnp.ones(4), None, None)
    analyses = {
        r"diagnose_gradient looks at .*params.W_xh is traced: call it with arrays, outside jax.jit": (
            lambda params: bptt.diagnose_gradient(cell, params, init, xs, loss),
            params,
        ),
        "certify looks at": (lambda xs: bptt.certify(cell, params, init, xs, loss), xs),
        "plan_parallel looks at .*init is traced": (lambda init: bptt.plan_parallel(cell, params, init, xs), init),
        "plan looks at .*init is traced": (lambda init: bptt.plan(cell, params, init, xs, memory_bytes=1), init),
        "compare_gradients looks at .*mine.W_xh": (lambda mine: bptt.compare_gradients(mine, params), params),
        r"adaptive_truncation_length looks at .*lags.contributions\['W'\] is traced": (
            bptt.adaptive_truncation_length,
            lags,
        ),
        r"fixed_points looks at .*params.W_xh is traced": (
            lambda params: bptt.fixed_points(cell, params, xs[0], init[None]),
            params,
        ),
        "singular_values looks at .*start": (lambda start: bptt.singular_values(jnp.ones((4, 2, 2)), start=start), 0),
        "truncation_bias looks at .*lengths": (
            lambda lengths: bptt.truncation_bias(cell, params, init, xs, loss, lengths=lengths),
            jnp.array([1]),
        ),
        "input_saliency looks at .*steps": (
            lambda steps: bptt.input_saliency(cell, params, init, xs, lambda carry, ys: ys.sum(1), steps=steps),
            jnp.array([1]),
        ),
    }
    for message, (analysis, argument) in analyses.items():
        with pytest.raises(TypeError, match=message):
            jax.jit(analysis)(argument)


def test_stacked_sizes_that_do_not_fit():
    lower = bptt.stack(bptt.lstm(3, 4), bptt.gru(4, 2))
    with pytest.raises(ValueError, match="Layer 1 of the stack reads 4 features, but layer 0 below it gives 2"):
        bptt.stack(lower, bptt.elman(4, 4))
    # A step of one's own may read and give anything.
    wider = lower._replace(step=lambda params, carry, x: lower.step(params, carry, x[..., :3]))
    bptt.stack(bptt.elman(3, 7), wider, bptt.elman(5, 4))


def test_carries_and_params_of_another_cell():
    cell = bptt.lstm(3, 4)
    params, xs = cell.init(jax.random.key(0)), jnp.ones((5, 2, 3), jnp.float32)
    small, of_one = bptt.lstm(3, 2).initial_carry((2,)), bptt.gru(3, 4).initial_carry((2,))
    message = (
        r"lstm: carry.h has shape \(2, 2\) at one time step, but \(2, 4\) is expected.*initial_carry\(batch_shape\)"
    )
    with pytest.raises(ValueError, match=message):
        bptt.adjoint_scan(cell, params, small, xs)
    with pytest.raises(TypeError, match=r"lstm: the carry is an array \(2, 4\), but an LSTMState\(h, c\) is expected"):
        bptt.scan(cell, params, of_one, xs)
    with pytest.raises(ValueError, match=r"gru: W_xh has shape \(16, 3\), but \(12, 3\) is expected"):
        bptt.scan(bptt.gru(3, 4), params, of_one, xs)
    with pytest.raises(ValueError, match=r"gru: h has shape \(2, 5\) at one time step, but \[\*batch, 4\] is expected"):
        bptt.adjoint_scan(bptt.gru(3, 4), bptt.gru(3, 4).init(jax.random.key(0)), jnp.zeros((2, 5), jnp.float32), xs)
