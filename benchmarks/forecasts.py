r"""Forecasts by trained networks beside what is easy: the last value, and the value one season ago.

- Lorenz's equations, 0.02 units of time a step: within 50 steps errors grow 2.5 times in the mean, and there is more than
  one turn around a wing;
- a tide, hourly: two seasons, of half a day and of a day, each of two frequencies that beat, with a trend and noise;
- a load, hourly: a day and a week, a trend, noise, and weather, which no forecast knows.

Each is trained by the command `train`, and its errors are those on the validation part, the last fifth, that the checkpoint
has. Seeds are fixed.

    python benchmarks/forecasts.py [--quick] [--only lorenz tide load]
"""

import argparse
import contextlib
import io
import tempfile
import time
from pathlib import Path

import harness
import numpy as np

from jaxbptt import models, tasks
from jaxbptt.__main__ import main as jaxbptt

HORIZONS = (1, 10, 50)
VALIDATION = 0.2


def lorenz(length):
    return np.asarray(tasks.lorenz_series(length, dt=0.02), float)


def tide(length):
    """Metres above datum: the moon's and the sun's half-daily tides, two daily ones, a slow rise, and waves."""
    hours = np.arange(length)
    periods, heights = np.array([12.42, 12.0, 23.93, 25.82]), np.array([1.8, 0.8, 0.5, 0.4])
    waves = np.random.default_rng(0).normal(0, 0.05, length)
    return (5 + 1e-5 * hours + np.cos(2 * np.pi * hours[:, None] / periods + np.arange(4)) @ heights + waves)[:, None]


def load(length):
    """Megawatts: days with two peaks, flatter and lower at weekends, a trend, and weather that is forgotten in 100 hours."""
    rng, hours = np.random.default_rng(0), np.arange(length)
    days, weekend = hours / 24, hours // 24 % 7 >= 5
    shape = 10 * np.sin(2 * np.pi * (days - 0.3)) + 4 * np.sin(4 * np.pi * days + 1)
    weather = np.zeros(length)
    for i, shock in enumerate(rng.normal(0, 4 * np.sqrt(1 - 0.99**2), length - 1)):
        weather[i + 1] = 0.99 * weather[i] + shock
    demand = 100 + 0.001 * hours + np.where(weekend, 0.6 * shape - 6, shape) + weather
    return (demand + rng.normal(0, 0.5, length))[:, None]


# Column names, rows, options of `train`.
SERIES = {
    "lorenz": (
        lorenz,
        ("x", "y", "z"),
        20_000,
        # The mean time of a turn around a wing: there is no season, but something to repeat.
        {"cell": "lstm", "hidden": 64, "steps": 32, "batch": 32, "updates": 3_000, "learning-rate": 4e-3, "season": 38},
    ),
    "tide": (
        tide,
        ("level, m",),
        24 * 730,
        {"cell": "lstm", "hidden": 64, "steps": 96, "batch": 32, "updates": 4_000, "learning-rate": 4e-3},
    ),
    "load": (
        load,
        ("load, MW",),
        24 * 1_095,
        {"cell": "gru", "hidden": 64, "steps": 168, "batch": 32, "updates": 3_000, "learning-rate": 4e-3},
    ),
}
ABOUT = {
    "lorenz": "Lorenz's equations, 0.02 units of time a step",
    "tide": "A tide, hourly: 12.42, 12, 23.93 and 25.82 hours, a trend, and noise of 0.05 m",
    "load": "A load, hourly: a day, a week, a trend, weather with a deviation of 4 MW, and noise of 0.5 MW",
}


def measure(name, *, rows, seed, **options):
    """Validation errors of a network that `train` trained on the series, and the seconds it took."""
    make, _, _, defaults = SERIES[name]
    options = defaults | options | {"seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        file, checkpoints = Path(folder, "series.npy"), Path(folder, "run")
        np.save(file, make(rows))
        options |= {"validation": VALIDATION, "schedule": "cosine", "save-every": options["updates"]}
        words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            code = jaxbptt(["train", "--npz", str(file), "--checkpoints", str(checkpoints), *words])
        if code:
            raise RuntimeError(printed.getvalue())
        seconds = time.perf_counter() - start
        return models.ValidationErrors.from_json(models.load(checkpoints).info["errors"]), seconds


def section(name, seeds, **changes):
    _, columns, length, options = SERIES[name]
    options, rows, factors = options | changes, [], []
    length = options.pop("rows", length)
    for seed in seeds:
        errors, seconds = measure(name, rows=length, seed=seed, **options)
        for h in (h for h in HORIZONS if h <= errors.horizons):
            for i, column in enumerate(columns):
                network, last, season = (e[h - 1, i] for e in (errors.network, errors.persistence, errors.seasonal))
                factor = np.fmin(last, season) / network
                factors.append((h, factor))
                seasonal = "no season" if errors.season[i] is None else f"{season:.3g} (season {errors.season[i]:,})"
                rows.append((column, h, seed, f"{network:.3g}", f"{last:.3g}", seasonal, f"{factor:.1f}"))
        print(f"{name}, seed {seed}: {seconds:.0f} s, {errors.origins} origins", flush=True)
    order = {column: i for i, column in enumerate(columns)}
    rows.sort(key=lambda row: (order[row[0]], row[1], row[2]))
    least = {h: min(factor for at, factor in factors if at == h) for h, _ in factors}
    settings = (
        f"{options['cell']}, n = {options['hidden']}, {options['batch']} rows, chunks of {options['steps']} steps"
    )
    return (
        f"## {ABOUT[name]}\n\n{length:,} rows, the last {VALIDATION:.0%} for validation, forecasts from {errors.origins} of "
        f"them. {settings}, {options['updates']:,} updates with Adam, from {options['learning-rate']:g} to 0 as a cosine.\n\n"
        + harness.table(
            ("column", "steps ahead", "seed", "network", "persistence", "seasonal naive", "better by a factor of"), rows
        )
        + "\n\nThe network is better than both by a factor of at least "
        + ", ".join(f"{factor:.1f} at {h}" for h, factor in least.items())
        + f" steps ahead. {seconds:.0f} s of training and validation."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to check that it runs; writes nothing")
    parser.add_argument("--only", nargs="+", choices=list(SERIES), help="these series; writes nothing")
    options = parser.parse_args()
    changes = {"rows": 1_000, "hidden": 8, "steps": 10, "batch": 2, "updates": 5} if options.quick else {}
    texts = [f"# Forecasts, measured\n\n{harness.machine()}"]
    texts.append(
        "Root mean squared errors on validation data, in the series' own units. The network runs freely: it reads its own "
        "predictions. Persistence is the last value, the seasonal naive forecast the value one season ago. The season is "
        "found on the training part; Lorenz's equations have none, and are given the mean time of a turn around a wing."
    )
    for name in options.only or SERIES:
        texts.append(section(name, (0,) if options.quick else (0, 1, 2), **changes))
        print(texts[-1], end="\n\n", flush=True)
    if not options.quick and options.only is None:
        harness.RESULTS.mkdir(exist_ok=True)
        (harness.RESULTS / "forecasts.md").write_text("\n\n".join(texts) + "\n")


if __name__ == "__main__":
    main()
