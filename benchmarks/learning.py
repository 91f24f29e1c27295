r"""What truncated BPTT learns, and what the update costs compared with the gradient alone.

- the adding problem, T = 100, with the full gradient and with one that is truncated every 10 steps;
- the next character of Python's standard library, against interpolated n-gram models;
- handwritten digits, read by rows and by pixels;
- seconds of an update of `tbptt` against the same gradient and optimiser step written by hand.

Seeds are fixed. About ten minutes on two cores, five of them for the characters.

    python benchmarks/learning.py [--quick] [--only adding characters digits throughput]
"""

import argparse
import math
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import harness
import jax
import jax.numpy as jnp
import ngrams
import numpy as np
import optax

import jaxbptt as bptt
from jaxbptt import losses, tasks

CLIP = 1.0


def train_on_samples(init, update, params, sample, *, updates, seed):
    """The params after `updates` updates, each on new sequences; all updates are one compiled loop."""

    def update_once(state, key):
        return update(state, bptt.streams.Chunk(*sample(key)))[0], None

    keys = jax.random.split(jax.random.key(seed), updates + 1)
    return jax.jit(lambda state, keys: jax.lax.scan(update_once, state, keys)[0].params)(
        init(params, (), keys[0]), keys[1:]
    )


def answer_at_the_end(net, cell, of_steps):
    """A loss of the last step, for sequences that all start from a carry of zeros."""
    at_the_end = losses.final_step(of_steps)

    def loss(params, carry, chunk, *, scan, key):
        zeros = cell.initial_carry((chunk.xs.shape[1],))
        _, outputs = net.apply(params, zeros, chunk.xs, scan=scan)
        return at_the_end(outputs, chunk.targets), carry

    return loss


def adding_after_a_wait(steps, wait):
    """Sequences of the adding problem in which the last `wait` of `steps` values are never marked."""
    task = tasks.adding_problem(steps=steps - wait)

    def sample(key, batch):
        xs, ys, _ = task.sample(key, batch)
        values = jax.random.uniform(jax.random.fold_in(key, 1), (wait, batch, 1))
        unmarked = jnp.concatenate([values, jnp.zeros_like(values)], axis=-1)
        return jnp.concatenate([xs, unmarked]), jnp.broadcast_to(ys[:1], (steps, *ys.shape[1:]))

    return sample


def adding(*, steps, cut, hidden, updates, batch, learning_rate, seeds):
    cell = bptt.lstm(2, hidden, chrono_length=steps)
    net = bptt.network(cell, 1)
    loss = answer_at_the_end(net, cell, losses.mean_squared_error)
    rows = []
    for wait in (0, cut):
        sample = adding_after_a_wait(steps, wait)
        fresh = bptt.streams.Chunk(*sample(jax.random.key(1_000), 1_000))
        for length in (None, cut):
            for seed in seeds:
                start = time.perf_counter()
                init, update = bptt.tbptt(
                    loss, optax.adam(learning_rate), truncation_length=length, clip=optax.clip_by_global_norm(CLIP)
                )
                params = net.init(jax.random.key(seed))
                params = train_on_samples(
                    init, update, params, partial(sample, batch=batch), updates=updates, seed=seed
                )
                error = float(loss(params, (), fresh, scan=bptt.scan, key=None)[0])
                reach = "all steps" if length is None else f"chunks of {length}"
                marked = f"1 to {steps - wait}"
                rows.append((marked, reach, seed, f"{error:.4f}", f"{time.perf_counter() - start:.0f}"))
    return (
        f"## Adding problem, T = {steps}\n\n"
        f"LSTM, n = {hidden}, {updates} updates on {batch} sequences each, Adam at {learning_rate:g}; squared error on "
        f"1,000 new ones. Always answering 1 has {1 / 6:.4f}.\n\nIf any step may be marked, some markers are in the last "
        "chunk, and what a network learns there it does at all steps, so the truncated gradient is enough, though slower. "
        "If no marker is in the last chunk, the truncated gradient has nothing to learn from.\n\n"
        + harness.table(("marked steps", "gradient over", "seed", "squared error", "s with compiling"), rows)
    )


class Text(NamedTuple):
    """A text as numbers; those from `held_out` on are not trained on."""

    values: np.ndarray
    symbols: int
    held_out: int
    about: str


def standard_library(modules=None):
    """The standard library's modules that are single files, in order of their names; the last tenth is held out."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in folder.glob("*.py") if path.stem in sys.stdlib_module_names)[:modules]
    text = np.array([ord(c) for c in "".join(path.read_text("utf-8") for path in files)])
    characters, numbers, counts = np.unique(text, return_inverse=True, return_counts=True)
    frequent = counts >= 100
    symbols = int(frequent.sum()) + 1  # the last one stands for all rare characters
    values = np.where(frequent, np.cumsum(frequent) - 1, symbols - 1)[numbers].astype(np.int32)
    held_out = len(values) * 9 // 10
    about = (
        f"{len(files)} modules of the standard library of Python {sys.version.split()[0]}, {len(values):,} characters, "
        f"{symbols} symbols: the {len(characters) - symbols + 1} characters seen less than 100 times count as one. The last "
        f"{len(values) - held_out:,} are held out."
    )
    return Text(values, symbols, held_out, about)


def characters(text, *, hidden, updates, batch, chunk_length, learning_rate, warm_up, reports, highest):
    models = ngrams.fit(text.values[: text.held_out], text.symbols, highest)
    rows = [
        (f"{n}-gram", f"{ngrams.bits(model, text.values, text.held_out):.3f}", "") for n, model in enumerate(models, 1)
    ]
    windows = np.lib.stride_tricks.sliding_window_view(text.values, highest - 1)
    drawn = np.random.default_rng(0).integers(0, text.symbols, (250, highest - 1))
    contexts = np.concatenate([drawn, windows[:: len(windows) // 250]])
    off_one = max(ngrams.check(model, contexts) for model in models)
    if off_one > 1e-9:
        raise AssertionError(f"The probabilities of all symbols sum to 1 only within {off_one:.1g}.")

    cell = bptt.lstm(text.symbols, hidden, input_init=jax.nn.initializers.normal(0.5))
    net = bptt.network(cell, text.symbols)

    def loss(params, carry, chunk, *, scan, key, reduction="mean"):
        carry, logits = net.apply(params, carry, jax.nn.one_hot(chunk.xs, text.symbols), scan=scan)
        return losses.cross_entropy(logits, chunk.targets, mask=chunk.mask, reduction=reduction), carry

    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, warm_up, updates)
    init, update = bptt.tbptt(loss, optax.adam(rate, b2=0.99), clip=optax.clip_by_global_norm(CLIP))
    state = init(net.init(jax.random.key(0)), cell.initial_carry((batch,)), jax.random.key(1))
    stream = bptt.streams.rows(text.values[: text.held_out], batch=batch, chunk_length=chunk_length)

    # All of the held-out text, in 16 rows that start from a carry of zeros.
    held_out = bptt.streams.rows(text.values[text.held_out - 1 :], batch=16, chunk_length=500)

    @jax.jit
    def nats(params, carry, chunk):
        scan = partial(bptt.scan, is_first=chunk.is_first, valid=chunk.valid)
        return loss(params, carry, chunk, scan=scan, key=None, reduction="sum")

    def bits(params):
        carry, total, count = cell.initial_carry((16,)), 0.0, 0
        for chunk in held_out:
            value, carry = nats(params, carry, chunk)
            total, count = total + float(value), count + int(chunk.mask.sum())
        return total / count / math.log(2)

    update = jax.jit(update, donate_argnums=0).lower(state, stream.at(0)).compile()
    seconds = 0.0
    for report in range(reports):
        start = time.perf_counter()
        for position in range(report * updates // reports, (report + 1) * updates // reports):
            state, _ = update(state, stream.at(position))
        jax.block_until_ready(state)
        seconds += time.perf_counter() - start
        rows.append((f"LSTM, {int(state.step):,} updates", f"{bits(state.params):.3f}", f"{seconds:.0f}"))
        print(*rows[-1], flush=True)
    return (
        f"## Next character\n\n{text.about}\n\nn-grams: modified Kneser–Ney, fitted to all that is not held out; "
        f"probabilities of all symbols sum to 1 within {off_one:.0e} in {len(contexts)} contexts. LSTM: n = {hidden}, "
        f"{batch} rows, chunks of {chunk_length} steps, Adam at {learning_rate:g} with a warm-up of {warm_up} updates and a "
        f"cosine decay over all {updates:,}; {updates * batch * chunk_length / text.held_out:.1f} passes over the text.\n\n"
        + harness.table(("held out", "bits per character", "s of updates"), rows)
    )


def digits(*, recipes, batch, seeds):
    rows = []
    for by, recipe in recipes.items():
        task, test = tasks.digits(by=by)
        cell = bptt.lstm(task.input_size, recipe["hidden"], chrono_length=recipe["chrono_length"])
        net = bptt.network(cell, 10)
        loss = answer_at_the_end(net, cell, losses.cross_entropy)

        def sample(key, task=task):
            return task.sample(key, batch)[:2]

        rate = optax.cosine_decay_schedule(recipe["learning_rate"], recipe["updates"])
        for seed in seeds:
            start = time.perf_counter()
            init, update = bptt.tbptt(loss, optax.adam(rate), clip=optax.clip_by_global_norm(CLIP))
            params = net.init(jax.random.key(seed))
            params = train_on_samples(init, update, params, sample, updates=recipe["updates"], seed=seed)
            _, logits = net.apply(params, cell.initial_carry((test.xs.shape[1],)), test.xs)
            right = float(jnp.mean(logits[-1].argmax(-1) == test.ys[-1]))
            seconds = time.perf_counter() - start
            size = f"{test.xs.shape[0]} x {test.xs.shape[2]}"
            rows.append((by, size, recipe["hidden"], recipe["updates"], seed, f"{100 * right:.1f} %", f"{seconds:.0f}"))
    return (
        f"## Handwritten digits\n\nLSTM, {batch} of the 1,438 training images in an update, Adam with a cosine decay; share "
        "of the 359 test images that are classified correctly.\n\n"
        + harness.table(("read by", "steps x features", "hidden", "updates", "seed", "right", "s with compiling"), rows)
    )


def throughput(*, sizes, symbols, repeats):
    rows = []
    for hidden, batch, steps in sizes:
        cell = bptt.lstm(symbols, hidden)
        net = bptt.network(cell, symbols)

        def loss(params, carry, chunk, *, scan, key=None, net=net):
            carry, logits = net.apply(params, carry, jax.nn.one_hot(chunk.xs, symbols), scan=scan)
            return losses.cross_entropy(logits, chunk.targets, mask=chunk.mask), carry

        clip, optimizer = optax.clip_by_global_norm(CLIP), optax.adam(1e-3)
        init, update = bptt.tbptt(loss, optimizer, clip=clip)

        def by_hand(state, chunk, _, loss=loss, clip=clip, optimizer=optimizer):
            (value, carry), gradient = jax.value_and_grad(loss, has_aux=True)(
                state.params, state.carry, chunk, scan=bptt.adjoint_scan
            )
            clip_state, opt_state = state.opt_state
            gradient, clip_state = clip.update(gradient, clip_state)
            updates, opt_state = optimizer.update(gradient, opt_state)
            return optax.apply_updates(state.params, updates), (clip_state, opt_state), carry, value

        state = init(net.init(jax.random.key(0)), cell.initial_carry((batch,)), jax.random.key(1))
        xs, targets = jax.random.randint(jax.random.key(2), (2, steps, batch), 0, symbols)
        plain = bptt.streams.Chunk(xs, targets)
        flags = plain._replace(
            valid=jnp.ones((steps, batch), bool), is_first=jax.random.bernoulli(jax.random.key(3), 0.01, (steps, batch))
        )
        functions = {
            "by hand": by_hand,
            "update": lambda state, plain, flags, update=update: update(state, plain),
            "update, valid and is_first": lambda state, plain, flags, update=update: update(state, flags),
        }
        found = harness.measure(functions, (state, plain, flags), repeats)
        base = found["by hand"][1]
        for name, (_, seconds) in found.items():
            size = f"{hidden}, {batch}, {steps}"
            rows.append(
                (size, name, f"{seconds * 1e3:.1f}", f"{steps * batch / seconds:,.0f}", f"{base / seconds:.3f}")
            )
    head = ("n, rows, steps", "update", "ms", "characters a second", "of by hand's speed")
    return (
        f"## Updates a second\n\nLSTM on {symbols} symbols, gradient by `adjoint_scan`, clipping by norm, Adam. By hand: "
        "`jax.value_and_grad` and the optimiser, on a chunk without valid and is_first. Medians of runs that take turns.\n\n"
        + harness.table(head, rows)
    )


def measurements(quick):
    """The four measurements by name, functions without arguments."""
    if quick:
        rows = {"hidden": 8, "updates": 5, "learning_rate": 1e-2, "chrono_length": None}
        return {
            "adding": partial(adding, steps=20, cut=5, hidden=8, updates=5, batch=4, learning_rate=1e-2, seeds=(0,)),
            "characters": lambda: characters(
                standard_library(3),
                hidden=16,
                updates=4,
                batch=2,
                chunk_length=10,
                learning_rate=1e-3,
                warm_up=2,
                reports=2,
                highest=3,
            ),
            "digits": partial(digits, recipes={"rows": rows}, batch=8, seeds=(0,)),
            "throughput": partial(throughput, sizes=((8, 2, 10),), symbols=20, repeats=2),
        }
    recipes = {
        "rows": {"hidden": 64, "updates": 1_000, "learning_rate": 1e-2, "chrono_length": None},
        "pixels": {"hidden": 64, "updates": 1_500, "learning_rate": 1e-2, "chrono_length": 64},
    }
    return {
        "adding": partial(
            adding, steps=100, cut=10, hidden=32, updates=300, batch=32, learning_rate=2e-2, seeds=(0, 1, 2)
        ),
        "characters": lambda: characters(
            standard_library(),
            hidden=256,
            updates=7_000,
            batch=64,
            chunk_length=32,
            learning_rate=8e-3,
            warm_up=100,
            reports=5,
            highest=6,
        ),
        "digits": partial(digits, recipes=recipes, batch=64, seeds=(0, 1, 2)),
        "throughput": partial(throughput, sizes=((64, 16, 64), (256, 64, 32), (384, 32, 64)), symbols=97, repeats=51),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs; writes nothing")
    parser.add_argument(
        "--only", nargs="+", choices=list(measurements(True)), help="these measurements; writes nothing"
    )
    options = parser.parse_args()
    texts = [f"# Learning, measured\n\n{harness.machine(f'optax {optax.__version__}')}"]
    for name, measure in measurements(options.quick).items():
        if options.only is None or name in options.only:
            texts.append(measure())
            print(texts[-1], end="\n\n", flush=True)
    if not options.quick and options.only is None:
        harness.RESULTS.mkdir(exist_ok=True)
        (harness.RESULTS / "learning.md").write_text("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    main()
