"""The update of truncated BPTT against the loop it stands for, written out in Python; and what a run must not do."""

import gc
import resource
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import EXACT, assert_close, python_loop, random_like

import jaxbptt as bptt
from jaxbptt import losses, streams

BATCH, FEATURES, HIDDEN = 2, 2, 3


@pytest.fixture(autouse=True)
def optax_promotes(strict):
    """Optax's Adam raises a Python float to the power of an integer array; and chex counts traces by a function's name."""
    chex.clear_trace_counter()
    with jax.numpy_dtype_promotion("standard"):
        yield


def net():
    cell = bptt.gru(FEATURES, HIDDEN, dtype=jnp.float64)
    return cell, bptt.network(cell, FEATURES)


def loss(params, carry, chunk, *, scan, key):
    carry, outputs = net()[1].apply(params, carry, chunk.xs, scan=scan)
    return losses.mean_squared_error(outputs, chunk.targets, mask=chunk.mask), carry


def start(init, seed=0):
    cell, network = net()
    params = random_like(jax.eval_shape(network.init, jax.random.key(0)), seed, 0.7)
    return init(params, cell.initial_carry((BATCH,)), jax.random.key(1))


def values(steps=40, seed=5):
    return np.random.default_rng(seed).standard_normal((steps, FEATURES))


def by_hand(params, carry, xs, targets, counted=None, cut_every=10**6):
    """Mean squared error over the counted steps, with the carry cut every so many of them, and the carry after each."""
    cell, errors, carries = net()[0], [], []
    for t in range(len(xs)):
        if t > 0 and t % cut_every == 0:
            carry = jax.lax.stop_gradient(carry)
        carry, y = cell.step(params.cell, carry, xs[t])
        carries.append(carry)
        errors.append(jnp.mean((y @ params.W_hy.T - targets[t]) ** 2, axis=-1))
    errors = jnp.stack(errors)[slice(None) if counted is None else counted]
    return jnp.mean(errors), carries


@pytest.mark.parametrize(
    ("every", "back", "length"),
    [(5, 2, 5), (3, 7, 7)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in ((None, None, 5), (5, 5, 5), (2, 8, 8), (1, 4, 4))],
)
@pytest.mark.costly
def test_updates_equal_a_loop(every, back, length):
    """An update every k1 steps with a gradient that reaches back k2: params, carry and metrics, update by update."""
    optimizer, clip = optax.sgd(0.1, momentum=0.9), optax.clip_by_global_norm(0.3)
    init, update = bptt.tbptt(loss, optimizer, truncation_length=back, update_every=every, clip=clip)
    state = start(init)
    new = every or length
    series = values(2 * 2 * 6 + 3)
    stream = streams.rows(series, batch=BATCH, chunk_length=new, overlap=length - new)
    update = jax.jit(update)

    params, carry, opt_state = state.params, state.carry, optimizer.init(state.params)
    row = -(-(len(series) - 1) // BATCH)
    rows = jnp.stack([series[:row], series[row : 2 * row]], axis=1)
    next_rows = jnp.stack([series[1 : row + 1], series[row + 1 : 2 * row + 1]], axis=1)
    reference = jax.jit(jax.value_and_grad(by_hand, has_aux=True), static_argnames=("cut_every",))
    before = 0  # the step that the carry stands before
    for number in range(min(6, row // new)):
        stop = (number + 1) * new
        first = max(stop - length, 0)
        while before < first:  # with the current params
            carry, before = net()[0].step(params.cell, carry, rows[before])[0], before + 1
        (value, carries), gradient = reference(
            params,
            carry,
            rows[first:stop],
            next_rows[first:stop],
            np.arange(stop - new - first, stop - first),
            cut_every=back if length == new and back else 10**6,
        )
        state, metrics = update(state, stream.at(number))
        np.testing.assert_allclose(metrics.loss, value, rtol=1e-12)
        np.testing.assert_allclose(
            metrics.gradient_norm, np.sqrt(sum(np.sum(leaf**2) for leaf in jax.tree.leaves(gradient))), rtol=1e-12
        )
        # The carry that the next chunk begins with, from before this update.
        begins_next = max(stop + new - length, 0)
        carry, before = (carries[begins_next - 1 - first], begins_next) if begins_next > first else (carry, first)
        if length == new:
            assert_close(state.carry, carry)
        clipped, _ = clip.update(gradient, clip.init(params))
        updates, opt_state = optimizer.update(clipped, opt_state, params)
        params = optax.apply_updates(params, updates)
        assert_close(state.params, params)
    assert int(state.step) == number + 1


@pytest.mark.parametrize("name", [*EXACT, "truncated_scan", "windowed_scan"])
@pytest.mark.costly
def test_every_strategy_counts_every_step_once(name):
    """At learning rate 0, an epoch in uneven chunks adds up every step's loss once, and ends with the last carries."""
    strategies = EXACT | {
        "truncated_scan": partial(bptt.truncated_scan, truncation_length=2),
        "windowed_scan": partial(bptt.windowed_scan, window=2),
    }
    init, update = bptt.tbptt(loss, optax.sgd(0.0), scan=strategies[name])
    series = values(24)  # 23 steps: rows of 12 and 11, chunks of 5, 5 and 2
    stream = streams.rows(series, batch=BATCH, chunk_length=5)
    state, total = start(init), 0.0
    update = jax.jit(update)
    for chunk in stream:
        state, metrics = update(state, chunk)
        total += float(metrics.loss) * chunk.mask.sum()
    cell = net()[0]
    expected, carries = 0.0, []
    for row in (slice(0, 12), slice(12, 23)):
        xs, targets = series[:-1][row], series[1:][row]
        carry, ys = python_loop(cell, state.params.cell, cell.initial_carry(), jnp.asarray(xs))
        expected += float(jnp.sum(jnp.mean((ys @ state.params.W_hy.T - targets) ** 2, axis=-1)))
        carries.append(carry)
    np.testing.assert_allclose(total, expected, rtol=1e-12)
    assert_close(state.carry, jnp.stack(carries))


def test_overlapping_chunks_count_every_step_once():
    init, update = bptt.tbptt(loss, optax.sgd(0.0), truncation_length=9, update_every=4)
    series = values(24)
    counted = 0.0
    for k1, overlap in ((4, 5), (23, 0)):
        init, update = bptt.tbptt(loss, optax.sgd(0.0), truncation_length=k1 + overlap, update_every=k1)
        state, total = start(init), 0.0
        for chunk in streams.rows(series, batch=BATCH, chunk_length=k1, overlap=overlap):
            mask = chunk.mask & (np.arange(len(chunk.mask)) >= overlap)[:, None]
            state, metrics = jax.jit(update)(state, chunk)
            total += float(metrics.loss) * mask.sum()
        counted = counted or total
    np.testing.assert_allclose(counted, total, rtol=1e-12)


@pytest.mark.slow
def test_burn_in_has_neither_gradient_nor_loss():
    init, update = bptt.tbptt(loss, optax.sgd(1.0), burn_in=3)
    state = start(init)
    series = values(16)
    (chunk,) = streams.rows(series, batch=1, chunk_length=15)
    state = state._replace(carry=state.carry[:1])
    carry = state.carry
    for t in range(3):
        carry = net()[0].step(state.params.cell, carry, series[t : t + 1])[0]
    (value, carries), gradient = jax.value_and_grad(by_hand, has_aux=True)(
        state.params, carry, series[3:15, None], series[4:16, None]
    )
    for mask, valid in ((chunk.mask, chunk.valid), (None, None), (None, chunk.valid)):
        new_state, metrics = jax.jit(update)(state, chunk._replace(mask=mask, valid=valid))
        np.testing.assert_allclose(metrics.loss, value, rtol=1e-12)
        assert_close(jax.tree.map(jnp.subtract, state.params, new_state.params), gradient)
        assert_close(new_state.carry, carries[-1])


def test_masked_steps_still_update_the_carry():
    """A task's mask says which steps count in the loss; the others update the carry too, unless they are padding."""
    init, update = bptt.tbptt(loss, optax.sgd(0.0))
    state, series = start(init), jnp.asarray(values(14)).reshape(7, BATCH, FEATURES)
    xs, targets, last = series[:-1], series[1:], jnp.zeros((6, BATCH), bool).at[-1].set(True)
    new_state, metrics = jax.jit(update)(state, streams.Chunk(xs, targets, last))
    value, carries = by_hand(state.params, state.carry, xs, targets, counted=jnp.array([5]))
    np.testing.assert_allclose(metrics.loss, value, rtol=1e-12)
    assert_close(new_state.carry, carries[-1])
    ends_early = jnp.ones((6, BATCH), bool).at[-1, 0].set(False)
    new_state, metrics = jax.jit(update)(state, streams.Chunk(xs, targets, last, valid=ends_early))
    np.testing.assert_allclose(
        metrics.loss, by_hand(state.params, state.carry[1:], xs[:, 1:], targets[:, 1:], jnp.array([5]))[0], rtol=1e-12
    )
    assert_close(new_state.carry, jnp.stack([carries[-2][0], carries[-1][1]]))


def test_burn_in_without_inputs():
    def power(w, carry, chunk, *, scan, key):
        h, _ = scan(lambda w, h, _: (w * h, None), w, carry, length=5)
        return h, h

    init, update = bptt.tbptt(power, optax.sgd(1.0), burn_in=2)
    state, metrics = update(init(jnp.array(0.5), jnp.array(1.0), jax.random.key(0)), streams.Chunk(jnp.zeros((5, 1))))
    np.testing.assert_allclose(metrics.loss, 0.5**5)
    np.testing.assert_allclose(0.5 - state.params, 3 * 0.5**4)  # of w³ times the 0.5² that came before


def test_burn_in_with_resets_and_a_reset_carry():
    """Resets inside the burn-in and after it are those of the whole chunk."""

    def learned_start(params, carry, chunk, *, scan, key):
        scan = partial(scan, reset_carry=params["start"])
        carry, outputs = net()[1].apply(params["net"], carry, chunk.xs, scan=scan)
        return losses.mean_squared_error(outputs, chunk.targets, mask=chunk.mask), carry

    init, update = bptt.tbptt(learned_start, optax.sgd(0.0), burn_in=3)
    plain, plain_update = bptt.tbptt(learned_start, optax.sgd(0.0))
    state = start(init)
    params = {"net": state.params, "start": jnp.ones(HIDDEN)}
    state = init(params, state.carry, state.key)
    chunk = streams.rows(values(17), batch=BATCH, chunk_length=8).at(0)
    chunk.is_first[[1, 5], 0] = True
    burnt, _ = jax.jit(update)(state, chunk)
    assert_close(burnt.carry, jax.jit(plain_update)(plain(params, state.carry, state.key), chunk)[0].carry)


def test_one_trace_for_an_epoch_with_a_shorter_last_chunk():
    init, update = bptt.tbptt(loss, optax.adam(1e-2), truncation_length=9, update_every=4)
    update = jax.jit(chex.assert_max_traces(update, n=1))
    state = start(init)
    for chunk in streams.rows(values(31), batch=BATCH, chunk_length=4, overlap=5):
        state, metrics = update(state, chunk)
    assert np.isfinite(metrics.loss)


def test_metrics():
    gradient = {"a": jnp.array([3.0, 0.0, -4.0]), "b": jnp.array(12.0)}

    def linear(params, carry, chunk, *, scan, key):
        return sum(jnp.vdot(p, g) for p, g in zip(params.values(), gradient.values(), strict=True)), carry

    chunk = streams.Chunk(jnp.zeros((2, 1)))
    zeros = jax.tree.map(jnp.zeros_like, gradient)
    for clip, clipped in ((optax.clip(3.5), 2 / 3), (optax.clip_by_global_norm(12.0), 1.0), (optax.clip(12.0), 0.0)):
        init, update = bptt.tbptt(linear, optax.sgd(1.0), clip=clip)
        state = init(zeros, {"h": jnp.array([3.0, 4.0]), "n": jnp.array(7)}, jax.random.key(0))
        state, metrics = update(state, chunk)
        np.testing.assert_allclose(metrics.gradient_norm, 13)
        np.testing.assert_allclose(metrics.fraction_clipped, clipped)
        np.testing.assert_allclose(metrics.carry_norm, 5)
        assert_close(state.params, jax.tree.map(jnp.negative, clip.update(gradient, clip.init(zeros))[0]))


def test_a_resumed_run_continues_bit_for_bit():
    def noisy(params, carry, chunk, *, scan, key):
        value, carry = loss(params, carry, chunk, scan=scan, key=key)
        return value + 0.1 * jax.random.normal(key) * jnp.sum(params.W_hy), carry

    init, update = bptt.tbptt(noisy, optax.adamw(1e-2), clip=optax.adaptive_grad_clip(0.1))
    update = jax.jit(update)
    stream = streams.rows(values(40), batch=BATCH, chunk_length=3)

    def train(state, until):
        chunks = stream.start(int(state.step))
        while int(state.step) < until:
            state, _ = update(state, next(chunks))
        assert chunks.position == until
        return state

    straight = train(start(init), 16)
    half = train(start(init), 9)
    saved = [np.asarray(jax.random.key_data(x) if x is half.key else x) for x in jax.tree.leaves(half)]
    leaves, structure = jax.tree.flatten(half)
    loaded = [jax.random.wrap_key_data(s) if leaf is half.key else s for s, leaf in zip(saved, leaves, strict=True)]
    resumed = train(structure.unflatten(loaded), 16)
    for a, b in zip(jax.tree.leaves(straight), jax.tree.leaves(resumed), strict=True):
        assert (jax.random.key_data(a) == jax.random.key_data(b)).all() if a is straight.key else (a == b).all()


EVALUATIONS = {
    "a chunk": ({}, 5, 0),
    "cut inside": ({"truncation_length": 2, "update_every": 5}, 5, 0),
    "overlap": ({"truncation_length": 6, "update_every": 4}, 4, 2),
    "burn-in": ({"burn_in": 2}, 5, 0),
}


@pytest.mark.parametrize("case", EVALUATIONS)
@pytest.mark.costly
def test_evaluate_is_update_without_learning(case):
    """Loss, carry, aux and keys over a stream with padding and resets are those of updates at learning rate 0."""
    options, length, overlap = EVALUATIONS[case]

    def noisy(params, carry, chunk, *, scan, key):
        value, carry = loss(params, carry, chunk, scan=scan, key=key)
        return value + jax.random.normal(key), (carry, {"counted": chunk.mask.sum(), "carry": carry})

    functions = bptt.tbptt(noisy, optax.sgd(0.0), has_aux=True, **options)
    init, update = functions
    update, evaluate = jax.jit(update), jax.jit(functions.evaluate)
    trained = evaluated = start(init)
    for chunk in streams.rows(values(24), batch=BATCH, chunk_length=length, overlap=overlap):
        first = np.zeros_like(chunk.mask)
        first[1, 0] = True
        chunk = chunk._replace(is_first=first)
        trained, metrics = update(trained, chunk)
        evaluated, measured = evaluate(evaluated, chunk)
        assert isinstance(measured, bptt.training.Evaluation)
        expected = {name: getattr(metrics, name) for name in measured._fields}
        assert jax.tree.structure(measured._asdict()) == jax.tree.structure(expected)
        assert_close(measured._asdict(), expected)
        assert_close(evaluated.carry, trained.carry)
        assert (jax.random.key_data(evaluated.key) == jax.random.key_data(trained.key)).all()
    assert int(evaluated.step) == 0


def test_evaluate_saves_nothing_for_a_gradient():
    """At five times the length it takes no more memory than the chunk and the outputs that the loss reads."""
    functions = bptt.tbptt(loss, optax.sgd(0.1))
    state = start(functions.init)
    needs = {}
    for steps in (200, 1_000):
        chunk = streams.Chunk(*(jax.ShapeDtypeStruct((steps, BATCH, FEATURES), jnp.float64) for _ in range(2)))
        for name, function in (("update", functions.update), ("evaluate", functions.evaluate)):
            memory = jax.jit(function).lower(state, chunk).compile().memory_analysis()
            needs[name, steps] = memory.temp_size_in_bytes
    grows = {name: (needs[name, 1_000] - needs[name, 200]) / (800 * BATCH * 8) for name in ("update", "evaluate")}
    assert grows["evaluate"] <= 3 * HIDDEN + 2 * FEATURES < grows["update"]


@pytest.mark.parametrize("returns_pair", [False, True])
def test_a_carry_that_is_a_pair_is_not_taken_for_aux(returns_pair):
    """Only has_aux says what a pair means: a carry may be one itself."""
    before = (jnp.zeros(2), jnp.ones(2))
    pair = lambda params, carry, chunk, *, scan, key: (params, (carry, 7) if returns_pair else carry)
    init, update = bptt.tbptt(pair, optax.sgd(0.1), has_aux=returns_pair)
    state, metrics = update(init(jnp.ones(()), before, jax.random.key(0)), streams.Chunk(jnp.zeros((2, 2, 1))))
    assert_close(state.carry, before)
    assert metrics.aux == (7 if returns_pair else ())


def test_each_update_has_a_key_of_its_own():
    seen = lambda params, carry, chunk, *, scan, key: (params * jax.random.normal(key), carry)
    init, update = bptt.tbptt(seen, optax.sgd(0.0))
    state, found = init(jnp.ones(()), (), jax.random.key(0)), []
    for _ in range(3):
        state, metrics = update(state, streams.Chunk(jnp.zeros((1, 1))))
        found.append(float(metrics.loss))
    assert len(set(found)) == 3


def test_params_without_a_derivative_are_left_alone():
    params = {"w": jnp.ones(()), "n": jnp.array(3), "key": jax.random.key(0)}
    square = lambda params, carry, chunk, *, scan, key: (params["w"] ** 2 * params["n"].astype(float), carry)
    init, update = bptt.tbptt(square, optax.adam(0.1))
    state, _ = jax.jit(update)(init(params, (), jax.random.key(1)), streams.Chunk(jnp.zeros((1, 1))))
    assert state.params["n"] == 3
    assert state.params["w"] < 1


@pytest.mark.parametrize("name", ["prodigy", "reduce_on_plateau", "polyak_sgd", "multi_steps"])
@pytest.mark.costly
def test_optimisers_that_keep_params_or_ask_for_the_loss(name):
    """The caller's params outlive a donated state, and nothing is traced twice."""
    optimizer = {
        "prodigy": optax.contrib.prodigy,
        "reduce_on_plateau": lambda: optax.chain(optax.adam(1e-2), optax.contrib.reduce_on_plateau()),
        "polyak_sgd": optax.polyak_sgd,
        "multi_steps": lambda: optax.MultiSteps(optax.adam(1e-2), 2),
    }[name]()
    init, update = bptt.tbptt(loss, optimizer)
    update = jax.jit(chex.assert_max_traces(update, n=1), donate_argnums=0)
    params = start(bptt.tbptt(loss, optax.sgd(0.1))[0]).params
    state = init(params, net()[0].initial_carry((BATCH,)), jax.random.key(0))
    for chunk in streams.rows(values(30), batch=BATCH, chunk_length=5):
        state, metrics = update(state, chunk)
    assert np.isfinite(metrics.loss)
    assert np.isfinite(params.W_hy).all()
    assert any((a != b).any() for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(state.params), strict=True))


def test_weakly_typed_params_are_traced_once():
    square = lambda params, carry, chunk, *, scan, key: (params["w"] ** 2, carry)
    init, update = bptt.tbptt(square, optax.adam(0.1))
    update, state = jax.jit(chex.assert_max_traces(update, n=1)), init({"w": 0.5}, (), jax.random.key(0))
    for _ in range(3):
        state, _ = update(state, streams.Chunk(jnp.zeros((1, 1))))


def test_memory_of_a_run_does_not_grow():
    init, update = bptt.tbptt(loss, optax.adam(1e-3), clip=optax.clip_by_global_norm(1.0))
    update = jax.jit(update, donate_argnums=0)
    chunks = streams.rows(values(60), batch=BATCH, chunk_length=4).start()

    def run(state, updates):
        for _ in range(updates):
            state, _ = update(state, next(chunks))
        gc.collect()
        return state, len(jax.live_arrays()), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    state, arrays, _ = run(start(init), 200)
    state, arrays_then, peak_then = run(state, 300)
    state, arrays_now, peak_now = run(state, 1_000)
    assert arrays_now == arrays_then == arrays
    assert peak_now - peak_then < 2_000  # KiB; 1,000 copies of the state would be 3,000


def test_errors():
    for options, message in (
        ({"truncation_length": 0}, r"truncation_length is 0, but it counts time steps"),
        ({"update_every": 1.5}, r"update_every is 1\.5"),
        ({"burn_in": -1}, r"burn_in is -1"),
        (
            {"burn_in": 2, "truncation_length": 9, "update_every": 3},
            r"burn_in=2 was given with truncation_length=9 above",
        ),
        (
            {"truncation_length": 3, "scan": bptt.scan},
            r"truncation_length=3 cuts inside a chunk.*leave one of them out",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            bptt.tbptt(loss, optax.sgd(0.1), **options)
    chunk = streams.rows(values(21), batch=BATCH, chunk_length=6).at(0)
    for options, message in (
        ({"update_every": 5}, r"has 6 time steps, but update_every=5.*take chunks of 5: cut it, or pad"),
        ({"update_every": 5, "truncation_length": 8}, r"take chunks of 8, the last 5 of them new \(streams\.rows"),
        ({"truncation_length": 8}, r"has 6 time steps, but truncation_length is 8: .*needs update_every"),
        ({"burn_in": 6}, r"burn_in=6 leaves none of them to learn from"),
    ):
        init, update = bptt.tbptt(loss, optax.sgd(0.1), **options)
        with pytest.raises(ValueError, match=message):
            update(start(init), chunk)
    back = lambda params, carry, chunk, *, scan, key: loss(
        params, carry, chunk, scan=partial(scan, reverse=True), key=key
    )
    init, update = bptt.tbptt(back, optax.sgd(0.1), burn_in=2)
    with pytest.raises(ValueError, match=r"reverse=True runs from the last step .*burn_in .*leave one of them out"):
        update(start(init), chunk)
    init, update = bptt.tbptt(loss, optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"update takes a Chunk\(xs, targets, \.\.\.\), but got a ndarray"):
        update(start(init), chunk.xs)
    with pytest.raises(ValueError, match="time is their first axis, and they must agree"):
        update(start(init), chunk._replace(targets=chunk.targets[1:]))
    wider = streams.rows(values(21), batch=2 * BATCH, chunk_length=6).at(0)
    with pytest.raises(
        ValueError, match=r"The chunk has 4 rows, but carry has shape \(2, 3\): .*initial_carry\(\(4,\)\)"
    ):
        update(start(init), wider)
    for returned, error, message in (
        (lambda carry: (carry,), TypeError, r"a carry of structure PyTreeDef\(\(\*,\)\), but it was given one of"),
        (lambda carry: carry[:1], ValueError, r"carry as float64\[1, 3\], but it was given float64\[2, 3\]"),
        (lambda carry: carry.astype(jnp.float32), ValueError, r"carry as float32\[2, 3\], but it was given float64"),
    ):
        other = lambda params, carry, chunk, *, scan, key, returned=returned: (jnp.sum(params.W_hy), returned(carry))
        init, update = bptt.tbptt(other, optax.sgd(0.1))
        with pytest.raises(error, match=message):
            update(start(init), chunk)
    init, update = bptt.tbptt(lambda *args, **kwargs: jnp.zeros(()), optax.sgd(0.1))
    with pytest.raises(TypeError, match=r"returns a pair \(loss, carry\), but this one returned"):
        update(start(init), chunk)
    aux = lambda params, carry, chunk, *, scan, key: (jnp.sum(params.W_hy), (carry, 0))
    with pytest.raises(TypeError, match=r"a carry of structure .*For \(loss, \(carry, aux\)\) pass has_aux=True"):
        bptt.tbptt(aux, optax.sgd(0.1)).update(start(init), chunk)
    functions = bptt.tbptt(loss, optax.sgd(0.1), has_aux=True)
    with pytest.raises(TypeError, match=r"returns \(loss, \(carry, aux\)\), but this one returned .* in the place of"):
        functions.update(start(init), chunk)
    with pytest.raises(TypeError, match=r"evaluate takes a Chunk\(xs, targets, \.\.\.\), but got a ndarray"):
        functions.evaluate(start(init), chunk.xs)
