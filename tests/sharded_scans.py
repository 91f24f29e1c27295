"""Every strategy on eight devices and on one, run by test_sharded_scans.py: `python tests/sharded_scans.py WORD ...`.

A case runs where its name has every word. It is under `jax.shard_map`, which checks what varies over the devices, or on
arrays of an Explicit mesh, where each array's type says how it lies; in both its values and gradients are those of one device.
"""

import os
import itertools
import sys
import traceback
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

import jaxbptt as bptt

jax.config.update("jax_enable_x64", True)
DEBUG = os.environ.get("DEBUG")
T, ROWS, UNITS = 6, 8, 4
mesh = jax.make_mesh((4, 2), ("rows", "other"))
by_rows, everywhere = P("rows"), P()
rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape) / 2)


cell = bptt.gru(3, UNITS, dtype=float)
lstm = bptt.lstm(3, UNITS, dtype=float)
flags = {"is_first": jnp.asarray(rng.random((T, ROWS)) < 0.3), "valid": jnp.asarray(rng.random((T, ROWS)) < 0.7)}

strategies = {
    "scan": bptt.scan,
    "adjoint": bptt.adjoint_scan,
    "truncated": partial(bptt.truncated_scan, truncation_length=4),
    "windowed": partial(bptt.windowed_scan, window=3),
    "checkpointed": partial(bptt.checkpointed_scan, segment_length=4),
    "few_checkpoints": partial(bptt.checkpointed_scan, checkpoints=2),
}

closed_over = normal(UNITS, UNITS)


def closing(W):
    return lambda params, h, x: (jnp.tanh(h @ W + x @ params["in"]),) * 2


def looping(params, h, x):
    def body(_, h):
        return jnp.tanh(h @ params["W"] + x @ params["in"])

    h = jax.lax.fori_loop(0, 2, body, h)
    return h, jnp.sin(h)


def branching(params, h, x):
    h = jax.lax.cond(params["on"] > 0, lambda h: jnp.tanh(h @ params["W"]), lambda h: h, h + x @ params["in"])
    return h, {"h": h, "doubled": 2 * h}


def counting(params, carry, x):
    """Outputs and state that are the same on every device, beside some that are not."""
    h, count, scale = carry
    h = jnp.tanh(h @ params["W"] + x @ params["in"] * scale)
    scale = scale * params["decay"]
    return (h, count + 1, scale), (h * scale, scale, count)


weights = {"W": normal(UNITS, UNITS), "in": normal(3, UNITS)}
steps = {
    "own": (cell, cell.init(jax.random.key(0)), cell.initial_carry((ROWS,))),
    "own_of_two": (lstm, lstm.init(jax.random.key(0)), lstm.initial_carry((ROWS,))),
    "linear": (lstm.step, lstm.init(jax.random.key(0)), lstm.initial_carry((ROWS,))),
    "closing": (closing, (closed_over, {"in": weights["in"]}), normal(ROWS, UNITS)),
    "looping": (looping, weights, normal(ROWS, UNITS)),
    "branching": (branching, weights | {"on": jnp.asarray(1.0)}, normal(ROWS, UNITS)),
    "from_zeros": (cell, cell.init(jax.random.key(0)), None),
    "counting": (
        counting,
        weights | {"decay": jnp.asarray(0.9)},
        (normal(ROWS, UNITS), jnp.asarray(0), jnp.asarray(1.0)),
    ),
}
xs = normal(T, ROWS, 3)


def rows_of(leaf):
    return by_rows if jnp.ndim(leaf) else everywhere


def over_time(leaf):
    return P(None, "rows") if jnp.ndim(leaf) > 1 else everywhere


def run(step, params, init, xs, flags, *, scan):
    if init is None:  # neither on the mesh nor different on its devices
        init = cell.initial_carry((xs.shape[1],))
    if step is closing:
        W, params = params
        step = closing(W)
    return scan(step, params, init, xs, **flags)


def loss_and_outputs(step, moving, still, xs, flags, *, scan):
    params, floats = moving
    init = jax.tree.map(lambda a, b: b if a is None else a, floats, still, is_leaf=lambda leaf: leaf is None)
    outputs = run(step, params, init, xs, flags, scan=scan)
    weighted = [jnp.sum(leaf * jnp.cos(leaf)) for leaf in jax.tree.leaves(outputs) if leaf.dtype == float]
    # Over all rows: what is the same on every device counts once.
    return sum(
        jax.lax.psum(part, "rows") if "rows" in jax.typeof(part).manual_axis_type.varying else part for part in weighted
    ), outputs


def case(kind, with_flags, *, scan, where):
    step, params, init = steps[kind]
    given = flags if with_flags else {}
    floats = jax.tree.map(lambda leaf: leaf if leaf.dtype == float else None, init)
    still = jax.tree.map(lambda leaf: None if leaf.dtype == float else leaf, init)
    args = (params, floats), still, xs, given
    fn = partial(loss_and_outputs, step, scan=scan)
    gradient = jax.value_and_grad(fn, argnums=(0, 2), has_aux=True)
    specs = (
        (jax.tree.map(lambda _: everywhere, params), jax.tree.map(rows_of, floats)),
        jax.tree.map(rows_of, still),
        P(None, "rows"),
        jax.tree.map(lambda _: P(None, "rows"), given),
    )
    if where == "one":
        return jax.jit(gradient)(*args)
    if where == "manual":
        _, (carry, ys) = jax.eval_shape(fn, *args)
        outputs = jax.tree.map(rows_of, carry), jax.tree.map(over_time, ys)

        mapped = jax.shard_map(gradient, mesh=mesh, in_specs=specs, out_specs=((P(), outputs), (specs[0], specs[2])))
        return jax.jit(mapped)(*_spread(args, specs))
    spread = _spread(args, specs)
    if where == "explicit" and kind not in ("looping", "branching"):
        return jax.jit(gradient)(*spread)
    # Without it, JAX itself fails outside of jit on one end, and at derivatives of inner loops on the other.
    with jax.set_mesh(mesh):
        return (gradient if where == "eager" else jax.jit(gradient))(*spread)


def _spread(args, specs):
    leaves, treedef = jax.tree.flatten(args)
    return treedef.unflatten(
        jax.device_put(leaf, jax.NamedSharding(mesh, spec))
        for leaf, spec in zip(leaves, treedef.flatten_up_to(specs), strict=True)
    )


def main(*words):
    failed = 0
    for name, with_flags, kind, where in itertools.product(
        strategies, (False, True), steps, ("manual", "explicit", "eager")
    ):
        label = "-".join((where, name, kind, "flags" if with_flags else "plain"))
        if not all(word in label if word[0] != "^" else word[1:] not in label for word in words) or (
            kind == "counting" and with_flags
        ):
            continue
        scan = strategies[name]
        try:
            expected = case(kind, with_flags, scan=scan, where="one")
            got = case(kind, with_flags, scan=scan, where=where)
            jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6, rtol=1e-6), got, expected)
        except Exception as error:
            failed += 1
            print("FAILED", label, type(error).__name__, str(error).splitlines()[:3])
            if DEBUG:
                traceback.print_exc()
        else:
            print("passed", label, flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
