r"""`python -m jaxbptt train` trains a character model or a forecaster on the user's own file, and can be stopped at any time."""

import argparse
import io
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import jax

from jaxbptt.cells import CELLS
from jaxbptt.commands import arguments, cluster, metrics, model, run, sources
from jaxbptt.files import write_whole
from jaxbptt.tasks import InputError
from jaxbptt.training import checkpoints

DEFAULT_UPDATES = 1000


def add_parser(commands: Any) -> None:
    """The command's options."""
    train = commands.add_parser(
        "train",
        help="train a character model or a forecaster by truncated BPTT, and go on after any interruption",
        description="Trains a recurrent network by truncated BPTT to predict the next character of a text or the next row "
        "of numbers; files may be larger than memory. Ctrl-C saves; --resume goes on bit for bit. Without a file it reads a "
        "module of the standard library. A cluster launcher's environment (JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES "
        "and JAX_PROCESS_ID, Slurm, Open MPI) is respected.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    train.set_defaults(run=start)
    a = train.add_argument
    arguments.add_source(
        train, npz="predict the next row of an array [time] or [time, features], in a .npz or .npy file"
    )
    a("--cell", choices=tuple(CELLS), default="lstm", help="the recurrent cell")
    a("--hidden", type=arguments.size, default=256, help="size of the hidden state")
    a("--layers", type=arguments.size, default=1, help="cells on top of each other")
    a("--steps", type=arguments.size, default=64, help="truncation length: time steps of an update")
    a("--batch", type=arguments.size, default=32, help="rows side by side that the file is cut into")
    a("--learning-rate", type=arguments.positive, default=4e-3, metavar="RATE", help="of Adam")
    a("--schedule", choices=("constant", "cosine"), default="constant", help="cosine: the rate falls to 0 at --updates")
    a(
        "--updates",
        type=arguments.size,
        metavar="N",
        help=f"stop after so many in all; {DEFAULT_UPDATES} without --minutes",
    )
    a("--minutes", type=arguments.positive, metavar="M", help="stop after so long a time, at the latest")
    a(
        "--validation",
        type=arguments.share,
        default=0.1,
        metavar="SHARE",
        help="of the series, its end, not learnt from",
    )
    a("--seed", type=int, default=0, help="of the random weights and the sample")
    a("--checkpoints", metavar="FOLDER", default="jaxbptt-train", help="where to save")
    a(
        "--save-every",
        type=arguments.size,
        default=200,
        metavar="N",
        help="updates between checkpoints, and validations",
    )
    a("--resume", action="store_true", help="go on from the newest checkpoint, with the same data and settings")
    a("--metrics", metavar="FILE", help=".csv or .jsonl, a line an update; FOLDER/metrics.csv by default")
    a("--figure", metavar="FILE", help="learning curve, .png, .svg or .pdf; FOLDER/learning-curve.png by default")
    a("--sample", type=arguments.count, default=400, metavar="N", help="bytes of text to make up at the end")
    a("--temperature", type=arguments.at_least_zero, default=0.7, help="of the sample: 0 takes the likeliest")
    a("--devices", type=arguments.size, default=1, metavar="N", help="that share the batch, in each process")


def start(options: argparse.Namespace) -> int:
    """Train as the options say; returns the exit code."""
    try:
        with jax.enable_x64(False):
            return _train(options)
    except KeyboardInterrupt:
        print("\njaxbptt train: interrupted, nothing saved since the last checkpoint", file=sys.stderr)
        return 130


def _train(options: argparse.Namespace) -> int:
    try:
        # Here and not at the top, since the rest of the package does without them.
        import orbax.checkpoint  # noqa: F401
        from rich.console import Console

        from jaxbptt.commands.display import Display
        from jaxbptt.plots import plot_learning_curve
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: pip install 'jaxbptt[train]'.") from None
    if options.updates is None and options.minutes is None:
        options.updates = DEFAULT_UPDATES
    if options.schedule == "cosine" and options.updates is None:
        raise InputError("--schedule cosine needs --updates, at which the rate is 0.")
    folder = Path(options.checkpoints)
    metrics_file = Path(options.metrics or folder / "metrics.csv")
    figure_file = Path(options.figure or folder / "learning-curve.png")
    _check_outputs(options, folder, metrics_file, figure_file)
    source = sources.open_source(options)
    place = cluster.start(options.devices, options.batch)
    built = model.build(options, source, place.mesh, sources.MAX_VALIDATION_CHUNKS)
    state, settings = built.state, _settings(options, source)
    if options.resume:
        state = checkpoints.restore(folder, state, settings)
    console = Console(quiet=not place.first, highlight=False, markup=False, soft_wrap=True)
    console.print(source.words)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    done = int(state.step)
    console.print(
        f"{options.cell} of {options.hidden}, layers: {options.layers}, parameters: {parameters:,}, "
        f"devices: {options.devices * place.processes} ({jax.devices()[0].device_kind})"
        + (f", on from update {done}" if done else "")
    )
    if place.first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            metrics.begin(metrics_file, done, text=source.text is not None)
        except OSError as error:
            raise InputError(f"{error.filename} can't be written: {error.strerror or error}.") from None
    seconds = None if options.minutes is None else 60 * options.minutes
    limits = run.Limits(
        options.updates, seconds, options.save_every, folder, metrics_file if place.first else None, settings
    )
    with Display(console, source.measured_in, options.updates) as display:
        state, stopped = run.train(built, state, source, limits, display.show)
    if place.first:
        _draw(plot_learning_curve, metrics_file, figure_file, source)
    if stopped:
        console.print(f"Stopped and saved at update {int(state.step)}. To go on:\n{_command(options)}")
        return 128 + stopped
    if source.text and options.sample and place.first:
        key = jax.random.key(options.seed)
        made_up = source.text.decode(built.sample(state.params, options.sample, options.temperature, key))
        console.print("\nA sample, going on from the end of what was learnt from:", style="bold")
        console.print(made_up)
    console.print(f"\nCheckpoints: {folder}\nMetrics: {metrics_file}\nLearning curve: {figure_file}")
    return 0


def _check_outputs(options: argparse.Namespace, folder: Path, metrics_file: Path, figure_file: Path) -> None:
    """All that would only be found out after training."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--checkpoints {folder} is a file, not a folder.")
    there = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"--checkpoints {folder} can't be written: {there} is no folder to write to.")
    newest = checkpoints.latest(folder)
    if newest is not None and not options.resume:
        raise InputError(
            f"--checkpoints {folder} has a checkpoint of update {newest} already: add --resume to go on from it, or name another folder."
        )
    if newest is None and options.resume:
        raise InputError(f"--checkpoints {folder} holds no checkpoint: there is nothing to go on from.")
    for option, path in (("--metrics", metrics_file), ("--figure", figure_file)):
        # The folder of the checkpoints is made later.
        if path.parent != folder or folder.exists():
            arguments.check_output(option, path)
    metrics.check(metrics_file)
    if not options.resume and metrics_file.parent != folder and metrics_file.exists() and metrics.read(metrics_file):
        raise InputError(f"--metrics {metrics_file} has the metrics of another run already: name another file.")
    if figure_file.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--figure {figure_file} ends in {figure_file.suffix!r}: .png, .svg and .pdf are known.")


def _settings(options: argparse.Namespace, source: sources.Source) -> dict[str, Any]:
    """All that the numbers of a run depend on, but the devices, which change their rounding only."""
    names = ("cell", "hidden", "layers", "steps", "batch", "learning_rate", "schedule", "validation", "seed")
    settings = {f"--{name.replace('_', '-')}": getattr(options, name) for name in names}
    if options.schedule == "cosine":
        settings["--updates"] = options.updates
    kind = "text" if source.text else "csv" if options.csv else "npz"
    return settings | {"data": f"{kind}, {source.fingerprint}"}


def _draw(plot: Any, metrics_file: Path, figure_file: Path, source: sources.Source) -> None:
    rows = metrics.read(metrics_file)
    if not rows:
        return
    name = "bits_per_character" if source.text else "loss"
    training, validation = (
        ([row["update"] for row in rows if key in row], [row[key] for row in rows if key in row])
        for key in (name, f"validation_{name}")
    )
    figure = plot(training, validation, measure=source.measured_in)
    picture = io.BytesIO()
    figure.savefig(picture, format=figure_file.suffix[1:], dpi=150)
    try:
        write_whole(figure_file, picture.getvalue())
    except OSError as error:
        raise InputError(f"--figure {figure_file} can't be written: {error.strerror or error}.") from None


def _command(options: argparse.Namespace) -> str:
    """What to type to go on."""
    words = [word for word in options.arguments if word != "--resume"]
    return shlex.join([Path(sys.executable).name, "-m", "jaxbptt", *words, "--resume"])
