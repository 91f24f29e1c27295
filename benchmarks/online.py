r"""What networks learn from gradients that are carried forward in time, beside full and truncated BPTT.

- copy memory: a string of bits to repeat, longer by one whenever it is repeated well: how long does it get?
- the adding problem, T = 50: one loss at the end, one update a sequence;
- Lorenz's equations and Mackey and Glass's: the next value of a single number;
- the next character of a text.

All methods see the same number of time steps through `tbptt`, by Adam with gradients clipped at 1. What updates at every step
makes more updates than what waits for the end of a chunk; the influence of the steps before is all it knows of them. Three seeds run
side by side in one compiled loop over all updates. Learning rates are one for each task and length of chunk, found on a seed of
their own for full and truncated BPTT and for `rtrl`, some of them for larger networks than these; the others have `rtrl`'s. Except in
copy memory they decay to 0 along a cosine. `snap(2)` is in the sparse network only: of a dense one it is `rtrl`. `rflo` and `eprop` are
the same where a unit has one number.

    python benchmarks/online.py [--quick] [--only copy sparse adding lorenz mackey_glass characters seconds]
"""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import harness
import jax
import jax.numpy as jnp
import learning
import numpy as np
import optax

import jaxbptt as bptt
from jaxbptt import influences, losses, tasks
from jaxbptt.analysis.cost import compile_and_cost, median_seconds

ROWS = 8
SOLVED = 0.15  # bits a symbol, as in Mujika et al. and Menick et al.


class Method(NamedTuple):
    """Where the gradient is cut, `None` for nowhere within a sequence, and the influence that heals the cut."""

    chunk: int | None
    influence: Callable[[], bptt.Influence] | None = None
    random: bool = False


METHODS = {
    "full BPTT": Method(None),
    "truncated at 50": Method(50),
    "truncated at 10": Method(10),
    "truncated at 10 and healed": Method(10, influences.rtrl),
    "truncated at 1": Method(1),
    "rtrl": Method(1, influences.rtrl),
    "snap(1)": Method(1, partial(influences.snap, 1)),
    "snap(2)": Method(1, partial(influences.snap, 2)),
    "uoro": Method(1, influences.uoro, random=True),
    "kf_rtrl": Method(1, influences.kf_rtrl, random=True),
    "rflo": Method(1, influences.rflo),
    "eprop": Method(1, influences.eprop),
}


def sparse(cell, zeros):
    """The cell, with that share of its recurrent weights fixed at zero."""

    def mask(params):
        kept = np.random.default_rng(0).random(params.W_hh.shape) >= zeros
        return params._replace(W_hh=params.W_hh * kept)

    return bptt.Cell(cell.init, cell.initial_carry, lambda params, carry, x: cell.step(mask(params), carry, x))


class Learner(NamedTuple):
    """A network, and the loss of a chunk."""

    cell: bptt.Cell
    net: bptt.Network
    of_steps: Callable[..., Any]

    def loss(self, params, carry, chunk, *, scan, key):
        """The sum over a chunk by the number of its steps and rows, so that steps without a target are no divisor of the others."""
        carry, outputs = self.net.apply(params, carry, chunk.xs, scan=scan)
        total = self.of_steps(outputs, chunk.targets, mask=chunk.mask, reduction="sum")
        return total / (len(chunk.xs) * ROWS), carry

    def functions(self, method, rate):
        """`tbptt`'s."""
        options = {} if method.influence is None else {"influence": method.influence()}
        return bptt.tbptt(self.loss, optax.adam(rate), clip=optax.clip_by_global_norm(1.0), **options)

    def start(self, method, rate, params, chunk):
        """(state, update)."""
        init, update = self.functions(method, rate)
        options = {} if method.influence is None else {"chunk": chunk}
        return init(params, self.cell.initial_carry((ROWS,)), jax.random.key(1), **options), update


# Copy memory


class Copy(NamedTuple):
    """Where the rows of an endless stream are, and how the curriculum stands."""

    drawn: Any
    position: Any
    bits: Any
    length: Any
    wrong: Any
    counted: Any
    steps: Any
    four: Any


class CopyMemory(NamedTuple):
    """Strings of bits, go, and the same bits again, over and over."""

    hidden: int
    zeros: float
    longest: int
    budget: int
    rates: dict

    def learner(self):
        cell = bptt.gru(4, self.hidden)
        cell = sparse(cell, self.zeros) if self.zeros else cell
        return Learner(cell, bptt.network(cell, 2, bias=True), losses.cross_entropy)

    def prepare(self, key):
        """(params, stream): strings of one bit; rows begin out of step with each other."""
        keys = jax.random.split(key, 3)
        drawn = jax.random.randint(keys[0], (self.budget + 2 * self.longest + 50, ROWS, self.longest), 0, 2, jnp.int8)
        position = jax.random.randint(keys[1], (ROWS,), 0, 3)
        zero = jnp.float32(0)
        return self.learner().net.init(keys[2]), Copy(
            drawn, position, drawn[-1], jnp.full(ROWS, 1), zero, zero, 0, jnp.float32(jnp.nan)
        )

    def draw(self, source, length, chunk):
        """(source, chunk) of some steps; `None` for one whole sequence in each row, padded to the longest there may be."""
        whole = chunk is None
        if whole:
            chunk = 2 * self.longest + 1
            source = source._replace(position=jnp.zeros(ROWS, int))

        def one(state, drawn):
            p, bits, L = state
            begins = p == 0
            bits, L = jnp.where(begins[:, None], drawn, bits), jnp.where(begins, length, L)
            bit, again = (
                jnp.take_along_axis(bits, jnp.clip(i, 0, self.longest - 1)[:, None], 1)[:, 0].astype(int)
                for i in (p, p - L - 1)
            )
            x = jnp.where(p < L, bit, jnp.where(p == L, 3, 2))
            valid = p <= 2 * L
            now = bptt.streams.Chunk(jax.nn.one_hot(x, 4), again, valid & (p > L), begins, valid)
            return (p + 1 if whole else (p + 1) % (2 * L + 1), bits, L), now

        drawn = jax.lax.dynamic_slice_in_dim(source.drawn, source.steps, chunk)
        (position, bits, of_row), chunk = jax.lax.scan(one, (source.position, source.bits, source.length), drawn)
        source = source._replace(position=position, bits=bits, length=of_row)
        return source, chunk if whole else chunk._replace(valid=None)

    def train(self, method, rate, params, source):
        """(the length reached when the budget of time steps is used up, updates)."""
        level = jnp.int32(1)
        state, update = self.learner().start(method, rate, params, self.draw(source, level, method.chunk)[1])

        def body(loop):
            state, source, level = loop
            source, chunk = self.draw(source, level, method.chunk)
            state, metrics = update(state, chunk)
            count = chunk.mask.sum()
            bits = metrics.loss * (len(chunk.xs) * ROWS) / math.log(2)
            kept = jnp.exp(-count / 1_000)
            wrong, counted = kept * source.wrong + bits, kept * source.counted + count
            solved = (counted > 500) & (wrong < SOLVED * counted) & (level < self.longest)
            wrong, counted = jnp.where(solved, 0, wrong), jnp.where(solved, 0, counted)
            steps = source.steps + (len(chunk.xs) if chunk.valid is None else chunk.valid[:, 0].sum())
            four = jnp.where(solved & (level == 4), steps, source.four)
            return state, source._replace(wrong=wrong, counted=counted, steps=steps, four=four), level + solved

        loop = jax.lax.while_loop(lambda loop: loop[1].steps < self.budget, body, (state, source, level))
        return {"length": loop[2], "steps until 4 bits were repeated": loop[1].four}, loop[0].step

    def measure(self, reached):
        return reached

    def sample(self, chunk, source):
        """A chunk to measure an update with."""
        return self.draw(source, jnp.int32(self.longest // 2), chunk)[1]

    def about(self):
        return (
            "A string of L random bits, go, and the string again, over and over; from a bit to its repetition there are L + 1 steps. L "
            f"grows by one when the last thousand or so repeated bits cost less than {SOLVED} bits each; it is at most "
            f"{self.longest}. GRU, n = {self.hidden}, {ROWS} rows, {self.budget:,} time steps a row. "
            + (
                f"{self.zeros:.0%} of the recurrent weights are fixed at zero."
                if self.zeros
                else "Full BPTT updates once a sequence, its rows in step."
            )
        )


# Endless series, known beforehand


class Endless(NamedTuple):
    """A series that each seed draws for itself, to be learnt one step ahead; a new sequence begins every `period` steps.

    `draw` is `(key, steps) -> (xs, ys)` of all rows; `held_out` chunks of whole sequences.
    """

    make: Callable[[], Learner]
    draw: Callable[..., Any]
    held_out: Callable[[], Any]
    budget: int
    period: int | None
    rates: dict
    measured: str
    unit: float
    text: str

    def learner(self):
        return self.make()

    def about(self):
        return self.text

    def prepare(self, key):
        """(params, all that is trained on)."""
        keys = jax.random.split(key)
        xs, ys = self.draw(keys[0], self.budget)
        first = None
        if self.period is not None:
            first = jnp.broadcast_to(jnp.arange(self.budget)[:, None] % self.period == 0, xs.shape[:2])
        return self.learner().net.init(keys[1]), bptt.streams.Chunk(xs, ys, is_first=first)

    def train(self, method, rate, params, series):
        length = self.period if method.chunk is None else method.chunk
        count = self.budget // length
        chunks = jax.tree.map(lambda leaf: leaf[: count * length].reshape(count, length, *leaf.shape[1:]), series)
        rate = optax.cosine_decay_schedule(rate, count)
        state, update = self.learner().start(method, rate, params, self.sample(method.chunk, series))
        state, _ = jax.lax.scan(lambda state, chunk: (update(state, chunk)[0], None), state, chunks)
        return state.params, state.step

    def measure(self, params):
        learner = self.learner()
        xs, ys, mask = self.held_out()
        _, outputs = learner.net.apply(params, learner.cell.initial_carry((xs.shape[1],)), xs)
        return {self.measured: learner.of_steps(outputs, ys, mask=mask) / self.unit}

    def sample(self, chunk, series):
        return jax.tree.map(lambda leaf: leaf[: self.period if chunk is None else chunk], series)


WARM_UP = 20


def standardised(series):
    """`[time, batch]` values as inputs and targets of one feature, by the mean and deviation of all."""
    series = (series - series.mean()) / series.std()
    return series[:-1, :, None], series[1:, :, None]


def lorenz(key, steps, rows=ROWS):
    """The first number alone, 0.02 units of time a step."""
    near = jnp.array([0.0, 0.0, 25.0]) + 8 * jax.random.normal(key, (rows, 3))
    return standardised(tasks.lorenz_series(steps + 1, dt=0.02, initial=near, transient=50.0)[..., 0])


def mackey_glass(key, steps, rows=ROWS):
    """One unit of time a step; the rows begin at random times."""
    history, start = jax.random.split(key)
    first = jax.random.uniform(history, (rows,), minval=0.2, maxval=1.4)
    series = tasks.mackey_glass_series(steps + 501, initial=first, transient=500)[..., 0]
    starts = jax.random.randint(start, (rows,), 0, 500)
    return standardised(series[starts + jnp.arange(steps + 1)[:, None], jnp.arange(rows)])


def one_step_ahead(draw, cell, text, *, budget, rates, period=200):
    """A chaotic series to be forecast."""

    def learner():
        return Learner(cell, bptt.network(cell, 1, bias=True), losses.mean_squared_error)

    def held_out():
        xs, ys = draw(jax.random.key(1_000), period, 64)
        return xs, ys, jnp.broadcast_to(jnp.arange(period)[:, None] >= WARM_UP, xs.shape[:2])

    xs, ys, mask = held_out()
    last_value = losses.mean_squared_error(xs, ys, mask=mask)
    text = (
        f"{text}, {ROWS} rows, {budget:,} time steps a row, a new sequence every {period}. Squared error of the next value, in "
        f"variances of the series, in 64 other sequences from step {WARM_UP} on; that of the last value is {last_value:.2e}."
    )
    return Endless(learner, draw, held_out, budget, period, rates, "squared error", 1.0, text)


def small_alphabet():
    """Python's decimal arithmetic in lower case: letters, and what else is frequent."""
    text = tasks.read_standard_library()
    symbols = [text.symbols[i].lower() for i in range(len(text.symbols))]
    lower = np.array(symbols)[text.values]
    names, counts = np.unique(lower, return_counts=True)
    frequent = list(names[np.argsort(-counts)][:31])
    numbers = {name: frequent.index(name) if name in frequent else 31 for name in names}
    return np.array([numbers[name] for name in names], np.int32)[np.searchsorted(names, lower)]


def characters(*, hidden, budget, rates):
    values = small_alphabet()
    cut = len(values) * 9 // 10
    train, test = jnp.asarray(values[:cut]), jnp.asarray(values[cut:])
    cell = bptt.gru(32, hidden)

    def learner():
        return Learner(cell, bptt.network(cell, 32, bias=True), losses.cross_entropy)

    def draw(key, steps):
        starts = jax.random.randint(key, (ROWS,), 0, cut)
        read = train[(starts + jnp.arange(steps + 1)[:, None]) % cut]
        return jax.nn.one_hot(read[:-1], 32), read[1:]

    def held_out():
        length = (len(test) - 1) // 16
        read = jnp.stack([test[i * length : (i + 1) * length + 1] for i in range(16)], 1)
        return jax.nn.one_hot(read[:-1], 32), read[1:], None

    shares = np.bincount(values[:cut], minlength=32) / cut
    alone = -np.sum(np.log2(shares + 1e-9)[values[cut:]]) / (len(values) - cut)
    text = (
        f"Python's decimal arithmetic in lower case, {len(values):,} characters of 32 kinds: the 31 most frequent ones, and all "
        f"others. GRU, n = {hidden}, {ROWS} rows, {budget:,} time steps a row, each from a random place on. Bits for each "
        f"character of the last tenth, which is held out; by the frequencies of single characters it is {alone:.2f}. The text is "
        "one sequence, so there is no full BPTT."
    )
    return Endless(learner, draw, held_out, budget, None, rates, "bits a character", math.log(2), text)


# The adding problem


class Adding(NamedTuple):
    """One loss at the end of a sequence, and one update; the gradient within it is taken by `forward_scan`."""

    hidden: int
    steps: int
    wait: int
    rows: int
    updates: int
    rates: dict

    def sequences(self, key, rows):
        """None of the last `wait` values is marked: a gradient that is cut there has nothing to learn from."""
        return bptt.streams.Chunk(*learning.adding_after_a_wait(self.steps, self.wait)(key, rows))

    def learner(self):
        cell = bptt.gru(2, self.hidden)
        return Learner(cell, bptt.network(cell, 1, bias=True), losses.mean_squared_error)

    def prepare(self, key):
        """(params, all that is trained on)."""
        keys = jax.random.split(key, self.updates + 1)
        chunks = jax.vmap(lambda key: self.sequences(key, self.rows))(keys[1:])
        return self.learner().net.init(keys[0]), chunks

    def start(self, method, rate, params, chunk):
        learner = self.learner()
        at_the_end = losses.final_step(learner.of_steps)
        scan = None
        if method.influence is not None:
            scan = partial(bptt.forward_scan, influence=method.influence())
        elif method.chunk is not None:
            scan = partial(bptt.truncated_scan, truncation_length=method.chunk)

        def loss(params, carry, chunk, *, scan, key):
            if method.random:
                scan = partial(scan, key=key)
            zeros = learner.cell.initial_carry((chunk.xs.shape[1],))
            _, outputs = learner.net.apply(params, zeros, chunk.xs, scan=scan)
            return at_the_end(outputs, chunk.targets), carry

        init, update = bptt.tbptt(loss, optax.adam(rate), clip=optax.clip_by_global_norm(1.0), scan=scan)
        return init(params, (), jax.random.key(1)), update

    def train(self, method, rate, params, chunks):
        state, update = self.start(method, optax.cosine_decay_schedule(rate, self.updates), params, None)
        state, _ = jax.lax.scan(lambda state, chunk: (update(state, chunk)[0], None), state, chunks)
        return state.params, state.step

    def measure(self, params):
        learner = self.learner()
        xs, ys, *_ = self.sequences(jax.random.key(1_000), 1_000)
        _, outputs = learner.net.apply(params, learner.cell.initial_carry((1_000,)), xs)
        return {"squared error": losses.final_step(learner.of_steps)(outputs, ys)}

    def sample(self, chunk, chunks):
        return jax.tree.map(lambda leaf: leaf[0], chunks)

    def about(self):
        return (
            f"GRU, n = {self.hidden}, {self.rows} sequences of {self.steps} steps an update, the last {self.wait} of them never "
            "marked; squared error on 1,000 other ones. "
            f"Always answering 1 has {1 / 6:.4f}. The loss is at the end of a sequence and so is the update: the influences are "
            "those of `forward_scan`, exact for `rtrl`; BPTT is cut by `truncated_scan`."
        )


# What is printed


def kinds(problem):
    """The methods that make sense for a problem, by name."""
    out = {"snap(2)"}
    if isinstance(problem, CopyMemory) and problem.zeros:
        out = METHODS.keys() - {"truncated at 1", "rtrl", "snap(1)", "snap(2)"}
    if isinstance(problem, Adding):  # its updates are once a sequence, so there is no cut to heal
        out |= {"truncated at 50", "truncated at 10 and healed"}
    if isinstance(problem, Endless) and problem.period is None:
        out |= {"full BPTT"}
    return {name: method for name, method in METHODS.items() if name not in out}


def rate_of(problem, method):
    return problem.rates.get(method.chunk, problem.rates[1])


def digits(value):
    if np.isnan(value):
        return "–"
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"


def learned(problem, methods, seeds):
    """A row for each method: median and range over seeds of what was reached."""
    rows, names = [], []
    prepared = jax.jit(jax.vmap(problem.prepare))(jnp.stack([jax.random.key(seed) for seed in seeds]))
    measure = jax.jit(jax.vmap(problem.measure))
    for name, method in methods.items():
        start = time.perf_counter()
        rate = rate_of(problem, method)
        reached, updates = jax.jit(jax.vmap(partial(problem.train, method, rate)))(*prepared)
        found, cells = jax.device_get(measure(reached)), []
        for values in found.values():
            values = np.sort(np.asarray(values, float))
            cells += [digits(values[len(values) // 2]), f"{digits(values[0])} to {digits(values[-1])}"]
        names = [word for measured in found for word in (measured, "of all seeds")]
        seconds = time.perf_counter() - start
        rows.append((name, *cells, f"{int(np.median(updates)):,}", f"{rate:g}", f"{seconds:.0f}"))
        print(*rows[-1], flush=True)
    return harness.table(("gradient", *names, "updates", "rate", "s, all seeds, with compiling"), rows)


class Timed(NamedTuple):
    """Some updates as one compiled call: bytes of one of them, and how many time steps they take."""

    call: Callable[[], Any]
    bytes: int
    steps: int


def timed(problem, prepared, method, steps):
    """Updates on the same chunk, over and over."""
    params, source = prepared
    chunk = problem.sample(method.chunk, source)
    start = problem.start if isinstance(problem, Adding) else problem.learner().start
    state, update = start(method, rate_of(problem, method), params, chunk)
    _, cost = compile_and_cost(update, state, chunk)
    carried = sum(leaf.nbytes for leaf in jax.tree.leaves(getattr(state, "influence", None)))
    length = len(chunk.xs)
    count = -(-steps // length)
    loop = jax.jit(lambda state: jax.lax.scan(lambda s, _: (update(s, chunk)[0], None), state, length=count)[0])
    compiled = loop.lower(state).compile()
    return Timed(lambda: compiled(state), cost.temporary_bytes + carried, count * length)


def seconds(problems, methods, steps, repeats):
    """Bytes of an update, and seconds of a time step by each method and task; the methods of a task take turns."""
    columns, rows = {}, {}
    for task, problem in problems.items():
        prepared = jax.jit(problem.prepare)(jax.random.key(0))
        found = {name: timed(problem, prepared, method, steps) for name, method in methods[task].items()}
        medians = median_seconds([update.call for update in found.values()], repeats)
        columns[task] = dict(zip(found, zip(found.values(), medians, strict=True), strict=True))
        print(task, {name: f"{1e6 * s / one.steps:.0f} µs" for name, (one, s) in columns[task].items()}, flush=True)
    for name in METHODS:
        cells = []
        for task in problems:
            if name not in columns[task]:
                cells += ["", ""]
                continue
            one, median = columns[task][name]
            cells += [f"{1e6 * median / one.steps:,.1f}", f"{one.bytes / 1024:,.0f}"]
        rows[name] = (name, *cells)
    head = ("gradient", *(f"{task}, {what}" for task in problems for what in ("µs", "KiB")))
    return (
        f"Microseconds for each time step of all {ROWS} rows, updates included, with one seed and no data to draw, and KiB of an "
        "update: temporaries, and the influence that it carries on. The methods of a task take turns; medians of "
        f"{repeats}.\n\n" + harness.table(head, rows.values())
    )


def problems(quick):
    rates = {1: 3e-3, 10: 1e-2, 50: 3e-2, None: 3e-2}
    if quick:
        return {
            "copy": CopyMemory(hidden=4, zeros=0.0, longest=6, budget=20, rates=rates),
            "adding": Adding(hidden=4, steps=8, wait=2, rows=ROWS, updates=2, rates=rates),
            "lorenz": one_step_ahead(lorenz, bptt.rate(1, 4, tau=2.0, dt=1.0), "", budget=100, rates=rates, period=50),
        }
    return {
        "copy": CopyMemory(hidden=16, zeros=0.0, longest=20, budget=30_000, rates=rates | {None: 1e-2}),
        "sparse": CopyMemory(hidden=16, zeros=0.75, longest=20, budget=30_000, rates=rates),
        "adding": Adding(hidden=16, steps=50, wait=12, rows=ROWS, updates=800, rates={1: 1e-2}),
        "lorenz": one_step_ahead(
            lorenz,
            bptt.rate(1, 16, tau=2.0, dt=1.0),
            "Lorenz's equations: the next x from x alone, 0.02 units of time a step. Leaky rate network, n = 16, τ = 2 steps",
            budget=20_000,
            rates=rates,
        ),
        "mackey_glass": one_step_ahead(
            mackey_glass,
            bptt.gru(1, 16),
            "Mackey and Glass's equation, τ = 17, one unit of time a step. GRU, n = 16",
            budget=20_000,
            rates=rates,
        ),
        "characters": characters(hidden=16, budget=15_000, rates=rates),
    }


TITLES = {
    "copy": "Copy memory",
    "sparse": "Copy memory, sparse",
    "adding": "Adding problem",
    "lorenz": "Lorenz",
    "mackey_glass": "Mackey–Glass",
    "characters": "Characters",
    "seconds": "Seconds and bytes",
}


def main():
    options = harness.section_options(__doc__ or "", TITLES)
    method = " ".join((__doc__ or "").split("\n\n")[2].split())
    head = f"# Learning with gradients carried forward in time, measured\n\n{method}"
    path = harness.RESULTS / f"online_cpu_jax_{jax.__version__}.md"
    found = problems(options.quick)
    methods = {name: kinds(problem) for name, problem in found.items()}
    if options.quick:
        few = {"copy": "truncated at 10 and healed", "adding": "snap(1)", "lorenz": "uoro"}
        methods = {name: {method: METHODS[method]} for name, method in few.items()}
    for name in options.only:
        if name == "seconds":
            text = (
                seconds({"lorenz": found["lorenz"]}, methods, 10, 2)
                if options.quick
                else seconds(found, methods, 400, 5)
            )
        elif name in found:
            text = f"{found[name].about()}\n\n{learned(found[name], methods[name], range(1 if options.quick else 3))}"
        else:
            continue
        text = f"{harness.machine(f'optax {optax.__version__}')}\n\n{text}"
        print(f"## {TITLES[name]}\n\n{text}\n", flush=True)
        if not options.quick:
            harness.write_sections(path, head, list(TITLES.values()), {TITLES[name]: text})


if __name__ == "__main__":
    main()
