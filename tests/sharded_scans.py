"""Every strategy on eight devices and on one; run by test_sharded_scans.py as `python sharded_scans.py WORD ...`.

A case runs where its name has every word. It runs under `jax.shard_map`, which checks what varies over its devices
("manual"), or on arrays of an Explicit mesh, whose types say how they lie ("explicit"; "eager": not compiled). Values and
gradients are those of one device.
"""

import itertools
import sys
import traceback
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxbptt as bptt

jax.config.update("jax_enable_x64", True)
T, ROWS, UNITS = 6, 8, 4
mesh = jax.make_mesh((4, 2), ("rows", "other"))
everywhere, by_rows, in_time = P(), P("rows"), P(None, "rows")
rng = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(rng.standard_normal(shape) / 2)


def both_directions(cell, params, init, xs, **flags):
    layer = bptt.bidirectional(cell, cell)
    carry, ys = layer.apply((params, params), (init, init), xs, **flags)
    return carry.backward, ys


strategies = {
    "scan": bptt.scan,
    "reversed": partial(bptt.adjoint_scan, reverse=True),
    "bidirectional": both_directions,
    "adjoint": bptt.adjoint_scan,
    "truncated": partial(bptt.truncated_scan, truncation_length=4),
    "windowed": partial(bptt.windowed_scan, window=3),
    "segments": partial(bptt.checkpointed_scan, segment_length=4),
    "checkpoints": partial(bptt.checkpointed_scan, checkpoints=2),
    "newton": bptt.newton_scan,
}
one_way = [name for name in strategies if name not in ("reversed", "bidirectional")]
flags = {"is_first": jnp.asarray(rng.random((T, ROWS)) < 0.3), "valid": jnp.asarray(rng.random((T, ROWS)) < 0.7)}
xs = normal(T, ROWS, 3)


def plain(params, h, x):
    h = jnp.tanh(h @ params["W"] + x @ params["U"])
    return h, h


def reset(params, carry, x):
    """Rows are reset to a carry of their own, and count their steps."""
    h, count = carry
    h, _ = plain(params, h, x)
    return (h, count + 1), (h, count)


def closing(params):
    return lambda decay, h, x: plain(params, decay * h, x)


def looping(params, h, x):
    return jax.lax.fori_loop(0, 2, lambda _, h: plain(params, h, x)[0], h), jnp.sin(h)


def branching(params, h, x):
    h = jax.lax.cond(params["U"][0, 0] > 0, lambda h: plain(params, h, x)[0], lambda h: 2 * h, h)
    return h, {"h": h, "doubled": 2 * h}


def counting(params, carry, x):
    """Some state and outputs are the same on every device."""
    h, count, scale = carry
    h, _ = plain(params, h, x * scale)
    return (h, count + 1, scale * params["decay"]), (h * scale, scale, count)


def wide(params, h, x):
    """Units are on several devices as well, and the step says so."""
    lies = P("rows", "other") if not jax.sharding.get_abstract_mesh().empty else None
    h = jnp.tanh(jnp.matmul(h, params["W"], out_sharding=lies) + jnp.matmul(x, params["U"], out_sharding=lies))
    return h, h


gru, lstm = bptt.gru(3, UNITS, dtype=float), bptt.lstm(3, UNITS, dtype=float)
gru_params, lstm_params = gru.init(jax.random.key(0)), lstm.init(jax.random.key(0))
dropout = bptt.dropout(gru, input_rate=0.3, recurrent_rate=0.4)
weights, h_0 = {"W": normal(UNITS, UNITS), "U": normal(3, UNITS)}, normal(ROWS, UNITS)


def dropped(params, h, x):
    """Masks that lie on every device, whole."""
    return dropout.cell.step(dropout.draw(jax.random.key(1), params, (ROWS,)), h, x)


problems = {
    "dropped": (dropped, gru_params, h_0),
    "gru": (gru, gru_params, h_0),
    "lstm": (lstm, lstm_params, lstm.initial_carry((ROWS,))),
    "linearised": (lstm.step, lstm_params, lstm.initial_carry((ROWS,))),
    "from_zeros": (gru, gru_params, None),
    "closing": (closing, (weights, jnp.asarray(0.9)), h_0),
    "looping": (looping, weights, h_0),
    "branching": (branching, weights, h_0),
    "reset": (reset, weights | {"to": normal(UNITS)}, (h_0, None)),
    "counting": (counting, weights | {"decay": jnp.asarray(0.9)}, (h_0, jnp.asarray(0), jnp.asarray(1.0))),
    "wide": (wide, weights, h_0),
}
cases = [
    *itertools.product(("manual", "explicit"), one_way, ("closing", "counting"), ("plain",)),
    *itertools.product(("manual", "explicit"), strategies, ("gru",), ("flags",)),
    *itertools.product(
        ("manual", "explicit"), ("adjoint",), ("lstm", "looping", "branching", "from_zeros"), ("plain",)
    ),
    *itertools.product(("manual", "explicit"), ("adjoint",), ("linearised", "reset"), ("flags",)),
    *itertools.product(("explicit",), ("adjoint", "segments"), ("wide", "dropped"), ("plain",)),
    *itertools.product(("eager",), ("adjoint", "checkpoints"), ("gru", "closing"), ("plain",)),
]


def specs_of(kind):
    """How params, the first carry and inputs lie."""
    _, params, init = problems[kind]
    params = jax.tree.map(lambda _: everywhere, params)
    if kind == "wide":
        return {"W": P("other", None), "U": P(None, "other")}, P("rows", "other"), in_time
    return params, jax.tree.map(lambda leaf: by_rows if leaf.ndim else everywhere, init), in_time


def spread(tree, specs):
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec)), tree, specs)


def loss_and_outputs(step, params, init, xs, flags, *, scan):
    if step is closing:
        closed_over, params = params
        step = closing(closed_over)
    if init is None:  # neither on the mesh nor different on its devices
        init = gru.initial_carry(xs.shape[1:2])
    if step is reset:
        params = {**params}
        flags = flags | {"valid": np.ones(xs.shape[:2], bool) & (np.arange(T) != 3)[:, None]}  # on no mesh
        init = init[0], jnp.zeros(xs.shape[1:2], int)
        flags = flags | {"reset_carry": (params.pop("to"), 0)}
    outputs = scan(step, params, init, xs, **flags)
    parts = [jnp.sum(leaf * jnp.cos(leaf)) for leaf in jax.tree.leaves(outputs) if leaf.dtype == float]
    # Over all rows: what is the same on every device counts once.
    parts = [jax.lax.psum(part, "rows") if jax.typeof(part).manual_axis_type.varying else part for part in parts]
    return sum(parts), outputs


def gradient(kind, scan):
    """`(params, init, xs, flags)` to loss, outputs and the gradients of all that is floating-point."""
    step, _, init = problems[kind]
    moving = jax.tree.map(lambda leaf: leaf.dtype == float, init)

    def both(params, init, xs, flags):
        def fn(params, floats, xs):
            whole = jax.tree.map(lambda moves, a, b: a if moves else b, moving, floats, init)
            return loss_and_outputs(step, params, whole, xs, flags, scan=scan)

        floats = jax.tree.map(lambda moves, leaf: leaf if moves else 0.0, moving, init)
        return jax.value_and_grad(fn, argnums=(0, 1, 2), has_aux=True)(params, floats, xs)

    return both


@cache
def on_one_device(name, kind, with_flags):
    _, params, init = problems[kind]
    return jax.jit(gradient(kind, strategies[name]))(params, init, xs, flags if with_flags else {})


@cache
def on_eight(where, name, kind, with_flags):
    fn, specs = gradient(kind, strategies[name]), specs_of(kind)
    given = flags if with_flags else {}
    of_flags = jax.tree.map(lambda _: in_time, given)
    args = *spread((*problems[kind][1:], xs), specs), spread(given, of_flags)
    if where == "manual":
        (_, (carry, ys)), _ = on_one_device(name, kind, with_flags)
        of_carry = jax.tree.map(lambda leaf: by_rows if leaf.ndim else everywhere, carry)
        of_ys = jax.tree.map(lambda leaf: in_time if leaf.ndim > 1 else everywhere, ys)
        fn = jax.shard_map(
            fn, mesh=mesh, in_specs=(*specs, of_flags), out_specs=((everywhere, (of_carry, of_ys)), specs)
        )
    if where == "explicit" and kind == "gru":
        return jax.jit(fn)(*args)
    # Without it, JAX itself fails outside of jit on one end, and at derivatives of loops and branches on the other.
    with jax.set_mesh(mesh):
        return (fn if where == "eager" else jax.jit(fn))(*args)


def check(where, name, kind, with_flags):
    found = on_eight(where, name, kind, with_flags)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), found, on_one_device(name, kind, with_flags))
    if where == "explicit":
        (_, outputs), (params_bar, *_) = found
        (_, like), _ = on_eight(where, "scan", kind, with_flags)
        for a, b in zip(jax.tree.leaves(outputs), jax.tree.leaves(like), strict=True):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), (a.sharding, b.sharding)
        for leaf, spec in zip(jax.tree.leaves(params_bar), jax.tree.leaves(specs_of(kind)[0]), strict=True):
            assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, spec), leaf.ndim), leaf.sharding


def main(*words):
    failed = 0
    for where, name, kind, flagged in cases:
        label = "-".join((where, name, kind, flagged))
        if not all(word in label.split("-") for word in words):
            continue
        try:
            check(where, name, kind, flagged == "flags")
        except Exception:
            failed += 1
            print("FAILED", label)
            traceback.print_exc()
        else:
            print("passed", label, flush=True)
    sys.exit(failed > 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
