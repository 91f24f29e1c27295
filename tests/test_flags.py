"""Resets and padding in every strategy: rows that are reset, end early or have gaps give what their sequences give alone."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from jax.experimental import io_callback
from reference import EXACT, UNCUT, assert_close, make_cell, problem, random_like

import jaxbptt as bptt

STRATEGIES = EXACT | UNCUT


def loop_with_flags(step, params, init, xs, is_first, valid, reset_carry):
    """What the flags mean, row by row: reset before the first step of a sequence; a step that is not there is not taken."""
    ys, last = np.zeros((len(xs), *valid.shape[1:]), object), []
    for row in range(valid.shape[1]):
        carry = jax.tree.map(lambda leaf, row=row: leaf[row], init)
        for t in range(len(xs)):
            if not valid[t, row]:
                continue
            if is_first[t, row]:
                carry = jax.tree.map(lambda leaf, row=row: leaf[row], reset_carry)
            carry, ys[t, row] = step(params, carry, xs[jnp.array(t), jnp.array(row)])
        last.append(carry)
    shape = next(y for y in ys.flat if not isinstance(y, int)).shape
    ys = jnp.stack([jnp.zeros(shape) if isinstance(y, int) else y for y in ys.flat]).reshape(*ys.shape, *shape)
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *last), ys


FLAGS = {
    "is_first": np.array([[0, 1], [0, 0], [1, 0], [1, 0], [0, 1], [0, 1], [1, 0], [0, 1]], bool),
    # A hole, an end, a row that starts late, and a sequence whose first step is not there.
    "valid": np.array([[1, 0], [1, 0], [1, 1], [0, 1], [1, 1], [1, 0], [1, 1], [0, 1]], bool),
}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("elman", "is_first"),
        ("elman", "valid"),
        ("lstm", "both"),
        pytest.param("stack", "both", marks=pytest.mark.slow),
    ],
)
@pytest.mark.costly
def test_every_strategy_equals_a_loop(name, given):
    cell = make_cell(name)
    params, init, xs = problem(cell, 8, (2,))
    to = random_like(init, 7)
    flags = {
        "is_first": FLAGS["is_first"] if given != "valid" else np.zeros((8, 2), bool),
        "valid": FLAGS["valid"] if given != "is_first" else np.ones((8, 2), bool),
    }
    loop = lambda *args: loop_with_flags(jax.jit(cell.step), *args[:3], **flags, reset_carry=args[3])
    expected, pull = jax.vjp(loop, params, init, xs, to)
    cotangent = random_like(expected, 3)
    expected = expected, pull(cotangent)
    # In the padding: nan among the inputs, and in what comes back from outputs that should not have been looked at.
    spoilt = jnp.where(flags["valid"][..., None], xs, jnp.nan)
    cotangent = cotangent[0], jnp.where(flags["valid"][..., None], cotangent[1], jnp.nan)
    options = {"is_first": flags["is_first"], "valid": flags["valid"]}
    if given != "both":
        options = {given: flags[given]}

    @jax.jit
    def ways(params, init, xs, to, cotangent):
        results = {}
        for name, scan in STRATEGIES.items():
            if "is_first" in options:
                run = lambda *args, scan=scan: scan(cell, *args[:3], reset_carry=args[3], **options)
            else:
                run = lambda *args, scan=scan: scan(cell, *args[:3], **options)
            out, pull = jax.vjp(run, params, init, xs, to)
            results[name] = out, pull(cotangent)
        return results

    for name, result in ways(params, init, spoilt, to, cotangent).items():
        assert_close(result, expected), name


# In the order of running: what cuts, cuts there too.
CUT = {
    "truncated_scan, cut": partial(bptt.truncated_scan, truncation_length=3),
    "windowed_scan, cut": partial(bptt.windowed_scan, window=2),
}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("elman", "is_first and valid"),
        ("gru", "nothing"),
        ("elman", "is_first"),
        ("elman", "valid"),
        ("gru", "is_first and valid"),
        ("lstm", "is_first and valid"),
        ("stack", "is_first and valid"),
    ],
)
@pytest.mark.costly
def test_reverse_is_flipping(name, given):
    """Values and all gradients, with resets to a carry of one's own, and nan in the padding."""
    cell = make_cell(name)
    params, init, xs = problem(cell, 8, (2,))
    to = random_like(init, 7)
    flags = {word: flag for word, flag in FLAGS.items() if word in given}
    options = lambda to: {"reset_carry": to} if "is_first" in flags else {}

    def by_hand(scan, params, init, xs, to):
        flipped = {word: flag[::-1] for word, flag in flags.items()}
        carry, ys = scan(cell, params, init, xs[::-1], **flipped, **options(to))
        return carry, ys[::-1]

    def reversed_by_scan(scan, params, init, xs, to):
        return scan(cell, params, init, xs, reverse=True, **flags, **options(to))

    valid = FLAGS["valid"] if "valid" in flags else np.ones((8, 2), bool)
    spoilt = jnp.where(valid[..., None], xs, jnp.nan)
    bars = random_like(jax.eval_shape(partial(by_hand, bptt.scan), params, init, xs, to), 3)

    @jax.jit
    def ways(*args):
        def vjp(function):
            out, pull = jax.vjp(function, *args)
            return out, pull(bars)

        expected = {name: vjp(partial(by_hand, scan)) for name, scan in ({"scan": bptt.scan} | CUT).items()}
        return expected, {name: vjp(partial(reversed_by_scan, scan)) for name, scan in (EXACT | CUT).items()}

    expected, found = ways(params, init, spoilt, to)
    assert np.isfinite(expected["scan"][0][1]).all()
    assert jnp.abs(expected["scan"][0][1] - expected["scan"][0][1][::-1]).max() > 0.1
    for name, result in found.items():
        assert_close(result, expected.get(name, expected["scan"])), name


def test_padding_in_reverse_runs_on_a_pair_that_occurs():
    """The first carry and the input that it meets, the last one in time; with the first one the root has no derivative."""
    step = lambda rate, last, time: (time, jnp.sqrt(rate * (7 - last + time)))
    times, valid = jnp.array([[1.0], [3.0], [9.0], [0.0]]), jnp.array([[True], [True], [True], [False]])

    @jax.jit
    def ways():
        loss = lambda rate, scan: jnp.sum(scan(step, rate, jnp.array([10.0]), times, valid=valid, reverse=True)[1])
        return [jax.grad(loss)(1.0, scan) for scan in STRATEGIES.values()]

    np.testing.assert_allclose(ways(), (np.sqrt(6) + 1 + np.sqrt(5)) / 2)


def test_reverse_without_inputs():
    """Outputs stand where `lax.scan` puts them, and so they do in a network."""
    step = lambda w, h, x: (w * h, h)
    expected = jax.lax.scan(partial(step, 0.5), 1.0, None, length=4, reverse=True)
    cell = make_cell("elman")
    net, xs = bptt.network(cell, 2, dtype=jnp.float64), random_like(jax.ShapeDtypeStruct((5, 2, 3), "float64"), 1)
    params = net.init(jax.random.key(0))
    last, ys = net.apply(params, cell.initial_carry((2,)), xs[::-1], scan=bptt.scan)
    for scan in STRATEGIES.values():
        assert_close(scan(step, 0.5, 1.0, length=4, reverse=True), expected)
    reverse = partial(bptt.adjoint_scan, reverse=True)
    assert_close(net.apply(params, cell.initial_carry((2,)), xs, scan=reverse), (last, ys[::-1]))
    paths = bptt.surviving_paths(partial(bptt.truncated_scan, reverse=True), 4, truncation_length=2)
    np.testing.assert_array_equal(paths, np.kron(np.eye(2), np.triu(np.ones((2, 2)))))


def test_valid_from_lengths():
    rows = np.array([0, 3, 1])
    expected = np.array([[0, 1, 1], [0, 1, 0], [0, 1, 0]], bool)
    np.testing.assert_array_equal(bptt.valid_from_lengths(rows, 3), expected)
    np.testing.assert_array_equal(jax.jit(partial(bptt.valid_from_lengths, time_steps=3))(rows), expected)
    assert bptt.valid_from_lengths(rows.astype(np.int8).reshape(1, 3), 200).shape == (200, 1, 3)
    assert bptt.valid_from_lengths(rows.astype(np.int8), 200).sum() == 4
    assert bptt.valid_from_lengths(2, 3).tolist() == [True, True, False]
    assert bptt.valid_from_lengths(np.zeros(2, int), 0).shape == (0, 2)
    for lengths, steps, error, message in (
        ([4], 3, ValueError, "lengths has 4, but rows have 3 time steps: pass numbers from 0 to 3, or more time_steps"),
        ([-1], 3, ValueError, "lengths has -1, but rows"),
        ([0.5], 3, TypeError, "lengths has dtype float.*pass whole numbers"),
        ([True], 3, TypeError, "lengths has dtype bool"),
        ([1], 2.5, ValueError, r"time_steps is 2\.5, but it counts time steps"),
    ):
        with pytest.raises(error, match=message):
            bptt.valid_from_lengths(jnp.array(lengths), steps)


def test_a_rollout_is_replayed():
    """An agent acts step by step in environments that end at different times; replayed at once, its states are the same."""
    cell = bptt.gru(3, 5, dtype=jnp.float64)
    params, rng = cell.init(jax.random.key(0)), np.random.default_rng(0)
    step = jax.jit(cell.step)
    carry, done = cell.initial_carry((4,)), np.ones(4, bool)
    observations, dones, carries = [], [], []
    for _ in range(30):
        carry = jnp.where(done[:, None], 0.0, carry)  # a new episode: the agent has seen nothing of it
        observation = rng.standard_normal((4, 3))
        carry, _ = step(params, carry, observation)
        done = rng.random(4) < 0.2
        observations.append(observation)
        dones.append(done)
        carries.append(carry)
    is_first = bptt.streams.is_first_from_done(np.stack(dones))
    assert is_first[1:].any()

    @jax.jit
    def replay(init, xs):
        return [scan(cell, params, init, xs, is_first=is_first) for scan in STRATEGIES.values()]

    for last, replayed in replay(random_like(carry, 1), jnp.stack(observations)):
        assert_close(replayed, jnp.stack(carries))
        assert_close(last, carries[-1])


def test_padding_where_the_step_is_not_defined():
    """Zeros are padding as well: 1/0 there would make the derivative nan though its result is dropped."""
    step = lambda w, h, x: (x * jnp.tanh(w * h + 1 / x), h)
    valid = jnp.array([[True, False], [False, True], [True, True], [False, False]])

    @jax.jit
    def ways(xs):
        loss = lambda w, xs, scan: jnp.sum(scan(step, w, jnp.full(2, 0.3), xs, valid=valid)[0])
        return [jax.grad(loss, argnums=(0, 1))(0.5, xs, scan) for scan in STRATEGIES.values()]

    expected, *others = ways(jnp.full((4, 2), 2.0))
    for gradients in (*others, *ways(jnp.where(valid, 2.0, jnp.array([0.0, jnp.nan])))):
        assert_close(gradients, expected)
        assert not gradients[1][~valid].any()


@pytest.mark.slow
def test_padding_runs_on_a_pair_that_occurs():
    """A carry and an input that never meet may be out of the step's range, each fine alone: times that have gone by."""

    def step(rate, carry, time):
        h, last = carry
        h = h * jnp.exp(-jnp.sqrt(rate * (time - last))) + 1
        return (h, time), h

    defined_at_0 = lambda rate, carry, time: ((carry[0] * rate + time, time), carry[0])
    times = jnp.array([[1.0, 50.0], [100.0, 60.0], [9.0, 0.0], [0.0, 0.0]])
    valid = jnp.array([[True, True], [True, True], [False, False], [False, False]])

    @jax.jit
    def ways(times):
        def of(scan, times, step=step, **flags):
            init = jnp.zeros(times.shape[1:])
            loss = lambda rate, times: jnp.sum(scan(step, rate, (init, init), times, **flags)[1])
            return jax.grad(loss, argnums=(0, 1))(1.0, times)

        return [
            (
                (of(scan, times, valid=valid), of(scan, times[:2])),
                # A row with no step at all, and no step in any row, which then run on zeros.
                (of(scan, times[:2], valid=valid[:2].at[:, 1].set(False)), of(scan, times[:2, :1])),
                (of(scan, times[:2], defined_at_0, valid=valid[2:]), of(scan, times[:0], defined_at_0)),
            )
            for scan in STRATEGIES.values()
        ]

    for pairs in ways(times):
        for (rate, padded), (expected, alone) in pairs:
            assert_close(rate, expected)
            assert_close(padded, jnp.zeros_like(padded).at[: alone.shape[0], : alone.shape[1]].set(alone))


def test_a_number_as_output():
    step = lambda w, h, x: (h * w, 0.0)
    valid = jnp.array([True, False, True])
    assert bptt.adjoint_scan(step, 0.5, jnp.array(1.0), jnp.ones(3), valid=valid)[0] == 0.25


def test_whatever_has_no_batch_axis_or_no_derivative():
    """Inputs shared by all rows, integers, random keys and a valid of time alone."""
    shared = jnp.arange(4.0)
    step = lambda w, h, x: (jnp.tanh(w * h + x["own"][:, None] + x["shared"]), {"key": x["key"], "h": h})
    xs = {"own": jnp.ones((4, 2), int), "shared": shared, "key": jax.random.split(jax.random.key(0), (4, 2))}
    xs["own"] = xs["own"].astype(float)
    valid = jnp.array([[True, True], [True, False], [False, True], [True, True]])
    expected = bptt.scan(step, 0.5, jnp.zeros((2, 3)), xs, valid=valid)[0]
    row = {"own": xs["own"][:, :1], "shared": shared, "key": xs["key"][:, :1]}
    alone = jax.tree.map(lambda leaf: leaf[jnp.array([0, 1, 3])], row)
    assert_close(expected[:1], bptt.scan(step, 0.5, jnp.zeros((1, 3)), alone)[0])
    of_time = bptt.adjoint_scan(step, 0.5, jnp.zeros((2, 3)), xs, valid=valid[:, 0])[0]
    assert_close(of_time[:1], expected[:1])
    no_steps = jax.tree.map(lambda leaf: leaf[:0], xs)
    assert_close(bptt.scan(step, 0.5, jnp.ones((2, 3)), no_steps, valid=valid[:0])[0], jnp.ones((2, 3)))


@pytest.mark.parametrize("rows", [2, 0])
@pytest.mark.costly
def test_empty_arrays(rows):
    """Leaves without entries, and batches without rows: values and gradients as without flags."""

    def step(w, carry, x):
        h = jnp.tanh(w * carry["h"] + x["x"] + x["shared"])
        return {"h": h, "empty": carry["empty"]}, (h, x["empty"])

    init = {"h": jnp.full((rows, 3), 0.3), "empty": jnp.zeros((rows, 0))}
    xs = {
        "x": jnp.ones((5, rows, 3)),
        "shared": jnp.ones(5),
        "empty": jnp.zeros((5, rows, 0)),
        "none": jnp.zeros((5, 0)),
    }
    flags = {"valid": jnp.ones((5, rows), bool), "is_first": jnp.zeros((5, rows), bool)}

    @jax.jit
    def ways(init, xs):
        def of(scan, **flags):
            loss = lambda w, init, xs: jnp.sum(scan(step, w, init, xs, **flags)[1][0] ** 2)
            return jax.value_and_grad(loss, argnums=(0, 1, 2))(0.5, init, xs)

        return {name: (of(scan), of(scan, **flags)) for name, scan in STRATEGIES.items()}

    for name, (plain, flagged) in ways(init, xs).items():
        assert_close(flagged, plain), name


@pytest.mark.parametrize(
    "scan",
    [bptt.scan, bptt.adjoint_scan, bptt.checkpointed_scan, partial(bptt.truncated_scan, truncation_length=100)],
    ids=["scan", "adjoint", "checkpointed", "truncated"],
)
@pytest.mark.costly
def test_bytes_are_those_without_flags(scan):
    """Nothing keeps a filled copy of the inputs: temporary bytes within 5 % of those without flags."""
    steps, rows = 4_000, 8
    cell = bptt.gru(32, 8, dtype=jnp.float32)
    shapes = jax.eval_shape(lambda key: (cell.init(key), cell.initial_carry((rows,))), jax.random.key(0))
    xs, flags = jax.ShapeDtypeStruct((steps, rows, 32), "float32"), jax.ShapeDtypeStruct((steps, rows), bool)

    def temporary_bytes(*names):
        def last_state(params, init, xs, flags):
            return jnp.sum(scan(cell, params, init, xs, **dict.fromkeys(names, flags))[0] ** 2)

        compiled = jax.jit(jax.grad(last_state)).lower(*shapes, xs, flags).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary_bytes("valid", "is_first") < 1.05 * temporary_bytes()


def test_padded_inputs_get_no_gradient():
    """Not even where the first valid step, which padded ones repeat, has an infinite derivative."""
    step = lambda w, h, x: (h + w * (jnp.sqrt(x["own"]) + jnp.sqrt(x["shared"])), h)
    valid = jnp.array([[True, False], [False, True], [True, True], [False, False]])
    xs = {"own": jnp.array([[0.0, 5.0], [5.0, 4.0], [1.0, 0.0], [5.0, 5.0]]), "shared": jnp.array([0.0, 1.0, 1.0, 5.0])}

    @jax.jit
    def ways(xs):
        loss = lambda xs, scan: jnp.sum(scan(step, 1.0, jnp.zeros(2), xs, valid=valid)[0])
        return [jax.grad(loss)(xs, scan) for scan in STRATEGIES.values()]

    for gradient in ways(xs):
        np.testing.assert_array_equal(gradient["own"], [[np.inf, 0], [0, 0.25], [0.5, np.inf], [0, 0]])
        np.testing.assert_array_equal(gradient["shared"][1:], [0.5, 1, 0])


def test_effects_are_those_of_the_step():
    """What a step does beside computing, a differentiated `scan` with flags does as often as `lax.scan`."""
    seen = []

    def step(w, h, x):
        io_callback(lambda x: None, None, x[0], ordered=True)
        jax.debug.callback(lambda x: seen.append(int(x)), x[0])
        return w * h + x, h

    loss = lambda w: jnp.sum(bptt.scan(step, w, jnp.zeros(2), jnp.ones((3, 2)), valid=jnp.ones((3, 2), bool))[0])
    gradient = jax.grad(loss)(0.5)
    jax.effects_barrier()
    assert seen == [1, 1, 1]
    assert_close(gradient, jnp.array(4.0))  # of 1 + w + w², in two rows


def test_keys_go_on():
    """A key of all rows is no state of a row: held where no row has a step, never reset. A row's own is, if told to."""

    def step(w, carry, x):
        key, use = jax.random.split(carry["key"])
        noise = jax.random.bits(use, (2,))
        return {"h": w * carry["h"] + noise.astype(float) * x, "key": key}, noise

    def step_of_rows(w, carry, x):
        keys = jax.vmap(jax.random.split)(carry["key"])
        noise = jax.vmap(jax.random.bits)(keys[:, 1])
        return {"h": w * carry["h"] + noise.astype(float) * x, "key": keys[:, 0]}, noise

    shared = {"h": jnp.zeros(2), "key": jax.random.key(0)}
    own = shared | {"key": jax.random.split(shared["key"])}
    holes = jnp.array([[True, True], [True, False], [False, False], [False, True]])
    is_first = jnp.array([[False, False], [False, True], [True, False], [False, False]])

    def noise(scan, step, init, **flags):
        def last(w):
            carry, ys = scan(step, w, init, jnp.ones((4, 2)), **flags)
            return jnp.sum(carry["h"]), ys

        return jax.grad(last, has_aux=True)(0.5)[1]

    @jax.jit
    def ways():
        everything = noise(bptt.scan, step, shared), noise(bptt.scan, step_of_rows, own)
        return everything, [
            (
                noise(scan, step, shared, valid=holes, is_first=holes),
                noise(scan, step, shared, valid=holes, is_first=holes, reset_carry=shared),
                noise(scan, step_of_rows, own, is_first=is_first),
                noise(scan, step_of_rows, own, is_first=is_first, reset_carry=own),
            )
            for scan in (bptt.scan, bptt.adjoint_scan)
        ]

    (of_all, of_rows), flagged = ways()
    held = jnp.where(holes, of_all[jnp.array([0, 1, 2, 2])], 0)
    again = jnp.stack([of_rows[jnp.array([0, 1, 0, 1]), 0], of_rows[jnp.array([0, 0, 1, 2]), 1]], axis=1)
    for way in flagged:
        for actual, expected in zip(way, (held, held, of_rows, again), strict=True):
            np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("scan", [bptt.scan, bptt.adjoint_scan])
def test_errors(scan):
    cell = make_cell("elman")
    args = problem(cell, 5, (2,))
    flags = jnp.ones((5, 2), bool)
    for options, error, message in (
        ({"valid": flags.astype(int)}, TypeError, r"valid has dtype int64.*such as valid\.astype\(bool\)\.$"),
        ({"valid": flags[:3]}, ValueError, r"valid has shape \(3, 2\), but the sequence has 5 time steps"),
        ({"valid": flags[:, :1]}, ValueError, r"valid has shape \(5, 1\).*init has shape \(2, 4\)"),
        ({"valid": flags, "is_first": flags[:, 0]}, ValueError, r"is_first has shape \(5,\), but valid has \(5, 2\)"),
        ({"reset_carry": args[1]}, ValueError, r"reset_carry says what is_first resets to"),
        (
            {"is_first": flags, "reset_carry": jax.new_ref(args[1])},
            TypeError,
            r"reset_carry is a mutable array \(a Ref\)",
        ),
    ):
        with pytest.raises(error, match=message):
            scan(cell, *args, **options)
    shared = lambda leaf: scan(lambda w, c, x: (c, c[0]), 0.5, (jnp.zeros((2, 3)), leaf), jnp.ones((5, 2)), valid=flags)
    for leaf in (jnp.array(0), jnp.zeros(4, jnp.uint32)):
        with pytest.raises(ValueError, match=r"init\[1\] has shape \(4?,?\).*let a counter be an input.*wrap_key_data"):
            shared(leaf)
    with pytest.raises(ValueError, match=r"init\[1\] has shape \(3,\): its first axes must be the same"):
        shared(jnp.zeros(3))
    summed = lambda params, h, x: (cell.step(params, h, x)[0], jnp.sum(h))
    with pytest.raises(ValueError, match=r"y has shape \(\) at a time step, but valid has \(2,\) there"):
        scan(summed, *args, valid=flags)


STEPS, ROWS, PATTERNS = 6, 3, 100


def _bits(number):
    return np.array([number >> i & 1 for i in range(STEPS * ROWS)], bool).reshape(STEPS, ROWS)


def _loss(scan, cell, params, xs, targets, is_first, valid):
    carry = cell.initial_carry(xs.shape[1:-1])
    _, ys = scan(cell, params, carry, xs, is_first=is_first, valid=valid)
    return bptt.losses.mean_squared_error(ys, targets, mask=valid, reduction="sum")


@pytest.fixture(scope="module")
def compiled():
    """Gradients of a hundred patterns at once by every strategy, and of many sequences of one length, each alone."""
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        cell = bptt.gru(2, 3, dtype=jnp.float64)
        params = random_like(jax.eval_shape(cell.init, jax.random.key(0)), 0, 0.7)

        def every(*args):
            return {
                name: jax.vmap(partial(jax.value_and_grad(_loss, argnums=2), scan, cell, params))(*args)
                for name, scan in STRATEGIES.items()
            }

        def alone(xs, targets):
            def loss(params, xs, targets):
                _, ys = bptt.scan(cell, params, cell.initial_carry(), xs)
                return bptt.losses.mean_squared_error(ys, targets, reduction="sum")

            return jax.vmap(partial(jax.value_and_grad(loss), params))(xs, targets)

        yield jax.jit(every), jax.jit(alone)


@pytest.mark.slow
@settings(max_examples=100, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(
    patterns=st.lists(st.tuples(*[st.integers(0, 2 ** (STEPS * ROWS) - 1)] * 2), min_size=PATTERNS, max_size=PATTERNS),
    seed=st.integers(0, 2**32 - 1),
)
def test_ten_thousand_patterns(compiled, patterns, seed):
    """Loss and gradient of rows with any resets, ends and holes are the sums of those of each sequence run alone."""
    every, alone = compiled
    rng = np.random.default_rng(seed)
    xs, targets = rng.standard_normal((PATTERNS, STEPS, ROWS, 2)), rng.standard_normal((PATTERNS, STEPS, ROWS, 3))
    valid, is_first = (np.stack([_bits(pattern[i]) for pattern in patterns]) for i in (0, 1))
    sequences = {length: [] for length in range(1, STEPS + 1)}  # (pattern, row, its time steps)
    for p, row in np.ndindex(PATTERNS, ROWS):
        here = np.flatnonzero(valid[p, :, row])
        begins = np.flatnonzero(is_first[p, here, row])
        for steps in np.split(here, begins):
            if len(steps):
                sequences[len(steps)].append((p, row, steps))
    losses, gradients = np.zeros(PATTERNS), None
    for found in sequences.values():
        if not found:
            continue
        p, row, steps = (np.array(part) for part in zip(*found, strict=True))
        room = -len(p) % 256  # few shapes, so that few are compiled
        own = [np.pad(array[p[:, None], steps, row[:, None]], ((0, room), (0, 0), (0, 0))) for array in (xs, targets)]
        count = len(p)
        values, grads = jax.tree.map(lambda leaf, count=count: np.asarray(leaf)[:count], alone(*own))
        np.add.at(losses, p, values)
        gradients = (
            jax.tree.map(lambda g: np.zeros((PATTERNS, *g.shape[1:])), grads) if gradients is None else gradients
        )
        jax.tree.map(lambda total, g, p=p: np.add.at(total, p, g), gradients, grads)
    spoilt = np.where(valid[..., None], xs, np.nan), np.where(valid[..., None], targets, np.nan)
    for name, (value, gradient) in every(*spoilt, is_first, valid).items():
        np.testing.assert_allclose(value, losses, rtol=1e-12, atol=1e-12, err_msg=name)
        if gradients is not None:
            jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-12, err_msg=name), gradient, gradients)
