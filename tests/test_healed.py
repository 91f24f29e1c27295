"""`tbptt(influence=...)`: the cut of truncated BPTT healed. All here goes through several chunks: within one there is no cut."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from reference import assert_close, make_cell, random_like

import jaxbptt as bptt

BATCH, STEPS, FEATURES = 2, 10, 3
# The gradient of each update, with θ held: what the optimiser was given is its state.
CAPTURE = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, state, params=None: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


@pytest.fixture(autouse=True)
def optax_promotes(strict):
    """Optax's Adam raises a Python float to the power of an integer array; and chex counts traces by a function's name."""
    chex.clear_trace_counter()
    with jax.numpy_dtype_promotion("standard"):
        yield


class Problem:
    """A network of a cell with a read-out, a sequence, and a loss that is a sum over steps: so those of chunks add up."""

    def __init__(self, name, seed=0):
        self.cell = make_cell(name)
        self.net = bptt.network(self.cell, FEATURES)
        self.params = random_like(jax.eval_shape(self.net.init, jax.random.key(0)), seed, 0.7)
        rng = np.random.default_rng(5)
        self.xs, self.targets = rng.standard_normal((2, STEPS, BATCH, FEATURES))
        # A carry that is not zero: as it was before the sequence, it owes nothing to the params.
        self.carry = random_like(self.cell.initial_carry((BATCH,)), 3, 0.5)

    def loss(self, params, carry, chunk, *, scan, key):
        carry, outputs = self.net.apply(params, carry, chunk.xs, scan=scan)
        errors = jnp.sum((outputs - chunk.targets) ** 2, axis=-1)
        return jnp.sum(errors if chunk.mask is None else jnp.where(chunk.mask, errors, 0)), carry

    def chunks(self, length, *, padded=False, **flags):
        """The sequence cut; the last chunk is shorter, or padded with nan."""
        for start in range(0, STEPS, length):
            given = {"xs": self.xs, "targets": self.targets} | flags
            chunk = bptt.Chunk(**{word: leaf[start : start + length] for word, leaf in given.items()})
            yield as_long(chunk, length) if padded else chunk

    def whole(self, **flags):
        """Full BPTT: the gradient of the sequence as one chunk."""
        chunk = bptt.Chunk(self.xs, self.targets, flags.get("valid"))
        scan = partial(bptt.scan, **flags)
        return jax.jit(jax.grad(lambda params: self.loss(params, self.carry, chunk, scan=scan, key=None)[0]))(
            self.params
        )

    def start(self, init, chunk=None, **options):
        return init(self.params, self.carry, jax.random.key(1), chunk, **options)

    def summed(self, chunks, influence=None, loss=None, **options):
        """The sum of the gradients of chunks, with θ held, and the last state."""
        init, update = bptt.tbptt(self.loss if loss is None else loss, CAPTURE, influence=influence, **options)
        chunks, update, total = list(chunks), jax.jit(update), 0
        state = self.start(init, chunks[0])
        for chunk in chunks:
            state, _ = update(state, chunk)
            total = jax.tree.map(jnp.add, total, state.opt_state[1]) if total else state.opt_state[1]
        return total, state


def as_long(chunk, length):
    """Padded; nothing may read the inputs there."""
    steps = len(chunk.xs)
    padded = jax.tree.map(lambda leaf: np.resize(leaf, (length, *leaf.shape[1:])), chunk)
    padded.xs[steps:] = np.nan
    return padded._replace(valid=np.repeat(np.arange(length)[:, None] < steps, BATCH, 1))


def largest_difference(tree, other):
    pairs = zip(*map(jax.tree.leaves, (tree, other)), strict=True)
    return float(np.max([np.max(np.abs(a - b)) for a, b in pairs]))  # nan, if there is one


def rtrl():
    return bptt.influences.rtrl()


@pytest.mark.parametrize(
    ("name", "length", "padded"),
    [("lstm", 1, False), ("gru", 3, True)]
    + [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in [
            *(("elman", length, padded) for length in (1, 3, 4) for padded in (False, True)),
            *(("gru", 1, False), ("gru", 4, False), ("lstm", 3, False), ("lstm", 4, True)),
            *(("stack", 3, True), ("lru", 3, False)),
        ]
    ],
)
def test_gradients_of_chunks_add_up_to_full_bptt(name, length, padded):
    """Healed they do, and as they are they don't, though the read-out's does."""
    problem = Problem(name)
    chunks = list(problem.chunks(length, padded=padded))
    whole = problem.whole()
    assert largest_difference(problem.summed(chunks, rtrl())[0], whole) < 1e-10
    cut, _ = problem.summed(chunks)
    assert largest_difference(cut.cell, whole.cell) > 1e-2
    assert largest_difference(cut.W_hy, whole.W_hy) < 1e-10


@pytest.mark.parametrize("words", [pytest.param("is_first", marks=pytest.mark.slow), "both"])
def test_resets_and_padding(words):
    """The influence of a row is reset with its carry, at the start of a chunk and inside one, and held where it is padded."""
    problem, is_first, padded = Problem("gru"), *np.zeros((2, STEPS, BATCH), bool)
    is_first[[4, 6, 7], [0, 0, 1]] = True
    padded[[3, 6, 9], [1, 0, 0]] = True
    flags = {"is_first": is_first} | ({"valid": ~padded} if words == "both" else {})
    if words == "both":
        problem.xs[padded] = np.nan
    summed, state = problem.summed(problem.chunks(4, **flags), rtrl())
    assert largest_difference(summed, problem.whole(**flags)) < 1e-10
    assert largest_difference(problem.summed(problem.chunks(4, **flags))[0], summed) > 1e-2
    ends_with_reset = is_first.copy()
    ends_with_reset[8, 0] = True
    _, reset = problem.summed(problem.chunks(4, **flags | {"is_first": ends_with_reset}), rtrl())
    for before, after in zip(*map(jax.tree.leaves, (state.influence, reset.influence)), strict=True):
        assert_close(after[1], before[1])
        assert float(jnp.max(jnp.abs(after[0] - before[0]))) > 1e-3


def compiled(loss):
    return lambda *args, scan, key: jax.jit(partial(loss, scan=scan))(*args, key=key)


def rematerialised(loss):
    return lambda *args, scan, key: jax.checkpoint(partial(loss, scan=scan, key=key))(*args)


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda loss: rematerialised(compiled(loss)), id="both"),
        pytest.param(compiled, id="jit", marks=pytest.mark.slow),
        pytest.param(rematerialised, id="checkpoint", marks=pytest.mark.slow),
    ],
)
def test_a_loss_that_wraps_its_scan(wrap):
    problem = Problem("elman")
    healed, _ = problem.summed(problem.chunks(4), rtrl(), wrap(problem.loss))
    assert largest_difference(healed, problem.whole()) < 1e-10


def test_whatever_the_params_of_scan_are_computed_from():
    """Weights made from others, an array that the step closes over, one that has no gradient and a number that is none."""
    problem = Problem("elman")
    problem.params = {"net": problem.params, "log_gain": jnp.array([0.1, -0.2, 0.3, 0.2]), "steps": jnp.array(7)}

    def loss(params, carry, chunk, *, scan, key):
        gain, mask = jnp.exp(params["log_gain"]), jnp.array([1.0, 1.0, 0.0, 1.0])
        cell = params["net"].cell._replace(W_hh=jnp.tanh(params["net"].cell.W_hh))

        def step(params, h, x):
            h, y = problem.cell.step(params[0], gain * h * mask, x)
            return h, y + params[1]

        carry, ys = scan(step, (cell, params["steps"]), carry, chunk.xs)
        return jnp.sum((ys @ params["net"].W_hy.T - chunk.targets) ** 2), carry

    trained = {word: problem.params[word] for word in ("net", "log_gain")}
    whole = jax.grad(
        lambda trained: loss(problem.params | trained, problem.carry, *problem.chunks(STEPS), scan=bptt.scan, key=None)[
            0
        ]
    )
    healed, state = problem.summed(problem.chunks(4), rtrl(), loss)
    expected = jax.jit(whole)(trained)
    assert healed.pop("steps") is None
    assert largest_difference(healed, expected) < 1e-10
    cut, _ = problem.summed(problem.chunks(4), loss=loss)
    assert largest_difference(cut["log_gain"], expected["log_gain"]) > 1e-2
    assert len(jax.tree.leaves(state.influence)) == 4, "of W_xh, W_hh, b and the gain, and not of the mask"


def test_online_learning_is_that_of_williams_and_zipser():
    """An update at each step, with the influence of the params that were used on the way: against a loop by hand."""
    problem, rate = Problem("elman"), 0.03
    init, update = bptt.tbptt(problem.loss, optax.sgd(rate), influence=rtrl())
    update, chunks = jax.jit(update), list(problem.chunks(1))
    state = problem.start(init, chunks[0])

    @jax.jit
    def by_hand(params, h, M, x, target):
        def advanced(cell, h):
            return problem.cell.step(cell, h, x)[0]

        def error(W_hy, h):
            return jnp.sum((h @ W_hy.T - target) ** 2)

        new = advanced(params.cell, h)
        W_bar, h_bar = jax.grad(error, argnums=(0, 1))(params.W_hy, new)
        J, F = jax.jacrev(advanced, argnums=1)(params.cell, h), jax.jacrev(advanced)(params.cell, h)
        M = jax.tree.map(lambda M, F: jnp.tensordot(J, M, 2) + F, M, F)
        gradient = params._replace(cell=jax.tree.map(lambda M: jnp.tensordot(h_bar, M, 2), M), W_hy=W_bar)
        return jax.tree.map(lambda p, g: p - rate * g, params, gradient), new, M

    params, h = problem.params, problem.carry
    M = jax.tree.map(lambda leaf: jnp.zeros((*h.shape, *leaf.shape)), params.cell)
    for t, chunk in enumerate(chunks):
        state, _ = update(state, chunk)
        params, h, M = by_hand(params, h, M, problem.xs[t], problem.targets[t])
        assert_close(state.params, params)
    assert_close(state.carry, h)
    assert largest_difference(params, problem.params) > 0.1


def noisy():
    """RTRL with noise in its influence, so that each key shows."""

    def advance(step, params, carry, x, M, key):
        M = rtrl().advance(step, params, carry, x, M, key)
        keys = jax.random.split(key, len(jax.tree.leaves(M)))
        leaves = [leaf + jax.random.normal(k, leaf.shape) for k, leaf in zip(keys, jax.tree.leaves(M), strict=True)]
        return jax.tree.unflatten(jax.tree.structure(M), leaves)

    return rtrl()._replace(advance=advance)


def test_a_run_resumes_bit_for_bit_and_is_traced_once(tmp_path):
    """With an influence that draws and another learning rate at each update; the last chunk is padded."""
    problem = Problem("elman")
    optimizer = optax.adam(optax.linear_schedule(0.1, 0.0, 8))
    init, update = bptt.tbptt(problem.loss, optimizer, influence=noisy())
    update, chunks = jax.jit(chex.assert_max_traces(update, n=1)), list(problem.chunks(3, padded=True))

    def train(state, chunks):
        for chunk in chunks:
            state, _ = update(state, chunk)
        return state

    straight = train(problem.start(init, chunks[0]), chunks)
    half = train(problem.start(init, chunks[0]), chunks[:2])
    bptt.checkpoints.save(tmp_path, 2, half, {})
    loaded = bptt.checkpoints.restore(tmp_path, problem.start(init, chunks[0]), {})
    resumed = train(loaded, chunks[2:])
    for a, b in zip(*map(jax.tree.leaves, (straight, resumed)), strict=True):
        assert (jax.random.key_data(a) == jax.random.key_data(b)).all() if a is straight.key else (a == b).all()


def test_each_step_and_row_and_update_draws_anew():
    """What is drawn for M alone: the step has no influence of its own here."""

    def loss(w, h, chunk, *, scan, key):
        h, _ = scan(lambda w, h, x: (h + w * x, None), w, h, chunk.xs)
        return jnp.sum(h), h

    def advance(step, params, carry, x, M, key):
        return jax.tree.map(lambda M: jnp.roll(M, 1).at[0].set(jax.random.normal(key)), M)

    def pull(M, carry_bar):
        return jax.tree.map(lambda M: jnp.sum(M) * carry_bar, M)

    drawing = bptt.Influence(lambda step, w, h, x: jax.tree.map(lambda _: jnp.zeros(4), w), advance, pull)
    init, update = bptt.tbptt(loss, optax.sgd(0.0), influence=drawing)
    chunk = bptt.Chunk(jnp.ones((4, BATCH)))
    state, drawn = init(jnp.array(1.0), jnp.zeros(BATCH), jax.random.key(0), chunk), []
    for _ in range(2):
        state, _ = update(state, chunk)
        drawn.append(np.asarray(jax.tree.leaves(state.influence)))
    assert len(np.unique(drawn)) == 2 * BATCH * 4


def test_evaluate_leaves_the_influence():
    problem = Problem("elman")
    functions = bptt.tbptt(problem.loss, optax.sgd(0.0), influence=rtrl())
    (chunk, *_) = problem.chunks(3)
    start = problem.start(functions.init, chunk)
    (state, metrics), (evaluated, measured) = jax.jit(
        lambda: (functions.update(start, chunk), functions.evaluate(start, chunk))
    )()
    np.testing.assert_allclose(measured.loss, metrics.loss, rtol=1e-12)
    assert_close(evaluated.carry, state.carry)
    assert (jax.random.key_data(evaluated.key) == jax.random.key_data(state.key)).all()
    assert not any(jnp.any(leaf) for leaf in jax.tree.leaves(evaluated.influence))


def test_without_an_influence_nothing_is_new():
    problem = Problem("elman")
    init, update = bptt.tbptt(problem.loss, optax.sgd(0.1))
    (chunk, *_) = problem.chunks(3)
    state = problem.start(init)
    assert state.influence is None
    assert bptt.TrainState(*state[:5]) == state
    key = update(state, chunk)[0].key
    assert (jax.random.key_data(key) == jax.random.key_data(jax.random.split(state.key)[0])).all()


@pytest.mark.slow
def test_runs_side_by_side():
    """An update mapped over runs, each with its own params, carry and influence."""
    problem = Problem("elman")
    init, update = bptt.tbptt(problem.loss, optax.sgd(0.1), influence=rtrl())
    first, second = list(problem.chunks(5))
    many = jax.tree.map(lambda leaf: jnp.stack([leaf, 1.1 * leaf]), (problem.params, problem.carry))
    keys = jax.random.split(jax.random.key(0))

    def run(params, carry, key):
        state, _ = update(init(params, carry, key, first), first)
        return update(state, second)[0]

    side_by_side = jax.jit(jax.vmap(run))(*many, keys)
    alone = jax.jit(run)(*jax.tree.map(lambda leaf: leaf[1], many), keys[1])
    assert_close(jax.tree.map(lambda leaf: leaf[1], side_by_side._replace(key=())), alone._replace(key=()))


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_the_chunk_beyond_its_gradient():
    """M is moved step by step: at four times the length an update takes what an update without an influence takes, and M."""
    problem, extra = Problem("gru"), {}
    for steps in (50, 200):
        chunk = bptt.Chunk(*(jax.ShapeDtypeStruct((steps, BATCH, FEATURES), jnp.float64) for _ in range(2)))
        bytes_of = {}
        for influence in (None, rtrl()):
            init, update = bptt.tbptt(problem.loss, optax.sgd(0.1), influence=influence)
            state = problem.start(init, chunk)
            sizes = jax.jit(update, donate_argnums=0).lower(state, chunk).compile().memory_analysis()
            bytes_of[influence is None] = sizes.temp_size_in_bytes
        extra[steps] = bytes_of[False] - bytes_of[True]
    assert extra[200] < extra[50] + 50 * BATCH * 4 * 8, extra


def focused():
    """Mozer's: only the diagonal of J; exact where no unit reads another."""

    def immediate(step, params, h, x):
        return jax.jacrev(lambda params: step(params, h, x)[0])(params)

    def advance(step, params, h, x, M, key):
        J = jnp.diagonal(jax.jacfwd(lambda h: step(params, h, x)[0])(h))
        F = immediate(step, params, h, x)
        return jax.tree.map(lambda leaf, new: J.reshape(-1, *(1,) * (leaf.ndim - 1)) * leaf + new, M, F)

    return bptt.Influence(
        lambda *args: jax.tree.map(jnp.zeros_like, immediate(*args)),
        advance,
        lambda M, bar: jax.tree.map(lambda leaf: jnp.tensordot(bar, leaf, 1), M),
    )


@pytest.mark.parametrize(
    ("name", "influence", "exact"),
    [
        ("min_gru", focused, True),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("gru", focused, False),
                ("min_lstm", lambda: bptt.influences.snap(1), True),
                ("lstm", lambda: bptt.influences.snap(1), False),
                ("elman", lambda: bptt.influences.snap(2), True),
                ("lstm", lambda: bptt.influences.eprop(), False),
                ("rate", lambda: bptt.influences.rflo(), False),
            )
        ),
    ],
)
def test_estimates(name, influence, exact):
    """Of the user's own and others; one that is not exact gives neither the gradient of full BPTT nor that of the cut."""
    problem = Problem(name)
    healed, _ = problem.summed(problem.chunks(4), influence())
    assert (largest_difference(healed, problem.whole()) < 1e-10) == exact
    assert largest_difference(healed, problem.summed(problem.chunks(4))[0]) > 1e-2


def calling(how):
    """A loss that calls `how(scan, params, carry, xs) -> (carry, outputs)`."""

    def loss(params, carry, chunk, *, scan, key):
        carry, outputs = how(scan, params, carry, chunk.xs)
        return jnp.sum(params.W_hy) * jnp.sum(outputs), carry

    return loss


CELL = make_cell("elman")


def twice(scan, params, carry, xs):
    carry, ys = scan(CELL, params.cell, carry, xs)
    return scan(CELL, params.cell, carry, ys @ params.W_hy.T)


def mapped(scan, params, carry, xs):
    """One row at a time."""
    return jax.vmap(lambda h, xs: scan(CELL, params.cell, h, xs), (0, 1), (0, 1))(carry, xs)


def drawing(scan, params, carry, xs):
    """One key for all rows."""

    def step(params, h, key_and_x):
        key, x = key_and_x
        return CELL.step(params, h + jax.random.normal(key, h.shape), x)

    return scan(step, params.cell, carry, (jax.random.split(jax.random.key(0), len(xs)), xs))


def writing(scan, params, carry, xs):
    seen = jax.new_ref(jnp.zeros(()))

    def step(params, h, x):
        seen[...] += 1
        return CELL.step(params, h, x)

    return scan(step, params.cell, carry, xs)


LOSSES = {
    "twice": (twice, ValueError, "The loss calls scan more than once, but an influence belongs to one recurrence"),
    "never": (lambda scan, params, carry, xs: (carry, xs), ValueError, "The loss does not call the scan it is given"),
    "unused": (
        lambda scan, params, carry, xs: (scan(CELL, params.cell, carry, xs)[0], xs),
        ValueError,
        "The loss does not depend on what scan returns",
    ),
    "stopped": (
        lambda scan, params, carry, xs: scan(CELL, jax.lax.stop_gradient(params.cell), carry, xs),
        ValueError,
        "or nothing that scan is given depends on the params",
    ),
    "reverse": (
        lambda scan, params, carry, xs: scan(CELL, params.cell, carry, xs, reverse=True),
        ValueError,
        "reverse=True runs from the last step of the chunk",
    ),
    "mapped": (mapped, ValueError, "The loss maps scan with jax.vmap, but the influence is that of all rows"),
    "drawing": (drawing, ValueError, r"is_first has shape \(3, 2\), but the rows of the carry can't be told apart"),
    "writing": (writing, TypeError, r"The step has a mutable array \(a Ref\)"),
}


@pytest.mark.parametrize("case", LOSSES)
def test_losses_that_an_influence_can_not_be_carried_through(case):
    """Already `init` says so, which only reads shapes."""
    how, error, words = LOSSES[case]
    init, _ = bptt.tbptt(calling(how), optax.sgd(0.1), influence=rtrl())
    problem, flags = Problem("elman"), np.zeros((3, BATCH), bool)
    chunk = bptt.Chunk(problem.xs[:3], problem.targets[:3], is_first=flags if case == "drawing" else None)
    with pytest.raises(error, match=words):
        problem.start(init, chunk)


def test_options_that_an_influence_does_not_go_with():
    for options, words in (
        ({"burn_in": 2}, "burn_in=2 was given with an influence"),
        ({"truncation_length": 2, "update_every": 4}, "truncation_length=2 was given with an influence"),
        ({"truncation_length": 6, "update_every": 4}, "truncation_length=6 was given with an influence"),
        ({"scan": bptt.windowed_scan}, "scan=.*windowed_scan.* was given with an influence"),
        ({"scan": partial(bptt.truncated_scan, truncation_length=2)}, "truncated_scan.* was given with an influence"),
    ):
        with pytest.raises(ValueError, match=words):
            bptt.tbptt(calling(twice), optax.sgd(0.1), influence=rtrl(), **options)
    with pytest.raises(
        TypeError, match=r"influence is a function, but it says how dc/dθ is carried from chunk to chunk"
    ):
        bptt.tbptt(calling(twice), optax.sgd(0.1), influence=rtrl)


def test_states_that_do_not_fit():
    problem = Problem("elman")
    (chunk, *_) = problem.chunks(3)
    init, update = bptt.tbptt(problem.loss, optax.sgd(0.1), influence=rtrl())
    without, update_without = bptt.tbptt(problem.loss, optax.sgd(0.1))
    with pytest.raises(ValueError, match=r"pass a chunk as well, init\(params, carry, key, chunk\)"):
        problem.start(init)
    with pytest.raises(TypeError, match=r"init takes a Chunk"):
        problem.start(init, problem.xs)
    state = problem.start(init, chunk)
    with pytest.raises(ValueError, match="The state has no influence, but this tbptt was called with one"):
        update(problem.start(without), chunk)
    with pytest.raises(ValueError, match="The state has an influence, but this tbptt was called without one"):
        update_without(state, chunk)
    fewer_rows = jax.tree.map(lambda leaf: leaf[:, :1], chunk)
    with pytest.raises(
        ValueError, match=r"influence is .*\[2, 4, 4, 4\].* for this loss and chunk it is .*\[1, 4, 4, 4\]"
    ):
        update(state._replace(carry=state.carry[:1]), fewer_rows)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) for name in ("kf_rtrl", "low_rank", "uoro")]
)
def test_random_influences_heal_on_average(name):
    """Over many runs the sum of the gradients is that of full BPTT, and the cut would be seen at this precision."""
    influence = bptt.influences.low_rank(2) if name == "low_rank" else getattr(bptt.influences, name)()
    problem = Problem("elman")
    init, update = bptt.tbptt(problem.loss, CAPTURE, influence=influence)
    chunks = list(problem.chunks(5))

    def summed(key):
        state, total = init(problem.params, problem.carry, key, chunks[0]), 0.0
        for chunk in chunks:
            state, _ = update(state, chunk)
            total += state.opt_state[1].cell.W_hh
        return total

    found = jax.jit(jax.vmap(summed))(jax.random.split(jax.random.key(2), 500 if name == "low_rank" else 3_000))
    error = jnp.std(found, axis=0) / np.sqrt(len(found))
    whole, (cut, _) = problem.whole().cell.W_hh, problem.summed(chunks)
    assert float(jnp.max(jnp.abs(jnp.mean(found, axis=0) - whole) / error)) < 4.5
    assert float(jnp.max(jnp.abs(cut.cell.W_hh - whole) / error)) > 10
