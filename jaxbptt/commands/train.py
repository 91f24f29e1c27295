r"""`python -m jaxbptt train` trains a character model or a forecaster on the user's own file, and can resume."""

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
from jaxbptt.words import counted, install_command

DEFAULT_UPDATES = 1000


def add_parser(commands: Any) -> None:
    """The command's options."""
    train = commands.add_parser(
        "train",
        help="train a character model or a forecaster by truncated BPTT; can be resumed after any interruption",
        description="Trains a recurrent network by truncated BPTT to predict the next character of a text or the next row "
        "of numbers; files may be larger than memory. Ctrl-C saves, and --resume continues as if there had been no stop, "
        "bit for bit. Without a file it reads a module of the standard library. A cluster launcher's environment "
        "(JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, Slurm, Open MPI) is respected.",
        formatter_class=arguments.HelpFormatter,
    )
    train.set_defaults(run=start)
    a = train.add_argument
    arguments.add_source(
        train, npz="predict the next row of an array [time] or [time, features], in a .npz or .npy file"
    )
    a("--cell", choices=tuple(CELLS), default="lstm", help="the recurrent cell")
    a("--hidden", type=arguments.size, default=256, help="size of the hidden state")
    a("--layers", type=arguments.size, default=1, help="number of stacked layers")
    a("--steps", type=arguments.size, default=64, help="truncation length: time steps per update")
    a("--batch", type=arguments.size, default=32, help="number of rows that the file is cut into, trained side by side")
    a("--learning-rate", type=arguments.positive, default=4e-3, metavar="RATE", help="learning rate of Adam")
    a("--schedule", choices=("constant", "cosine"), default="constant", help="cosine: the rate falls to 0 at --updates")
    a(
        "--updates",
        type=arguments.size,
        metavar="N",
        help=f"stop after this many updates in total; {DEFAULT_UPDATES} if there is no --minutes",
    )
    a("--minutes", type=arguments.positive, metavar="M", help="stop after this many minutes at the latest")
    a(
        "--validation",
        type=arguments.share,
        default=0.1,
        metavar="SHARE",
        help="share of the series, at its end, held out for validation",
    )
    a("--seed", type=int, default=0, help="seed of the random weights and of the sample")
    a("--checkpoints", metavar="FOLDER", default="jaxbptt-train", help="folder for the checkpoints")
    a(
        "--save-every",
        type=arguments.size,
        default=200,
        metavar="N",
        help="updates between two checkpoints, and between two validations",
    )
    a("--resume", action="store_true", help="continue from the newest checkpoint, with the same data and settings")
    a(
        "--metrics",
        metavar="FILE",
        help="file for the metrics, .csv or .jsonl, one line per update; FOLDER/metrics.csv by default",
    )
    a(
        "--figure",
        metavar="FILE",
        help="file for the learning curve, .png, .svg or .pdf; FOLDER/learning-curve.png by default",
    )
    a("--sample", type=arguments.count, default=400, metavar="N", help="bytes of text to sample at the end")
    a(
        "--temperature",
        type=arguments.at_least_zero,
        default=0.7,
        help="temperature of the sample; 0 always takes the most likely byte",
    )
    a("--devices", type=arguments.size, default=1, metavar="N", help="devices that share the batch, in each process")


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
        # Imported here, since the rest of the package does not need them.
        import orbax.checkpoint  # noqa: F401
        from rich.console import Console

        from jaxbptt.commands.display import Display
        from jaxbptt.plots import plot_learning_curve
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: {install_command('train')}") from None
    if options.updates is None and options.minutes is None:
        options.updates = DEFAULT_UPDATES
    if options.schedule == "cosine" and options.updates is None:
        raise InputError("--schedule cosine needs --updates, after which the rate is 0.")
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
        f"{options.cell}, hidden size {options.hidden}, {counted(options.layers, 'layer')}, {parameters:,} parameters, "
        f"{counted(options.devices * place.processes, 'device')} ({jax.devices()[0].device_kind})"
        + (f", resumed at update {done:,}" if done else "")
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
        console.print(f"Stopped and saved at update {int(state.step)}. To resume:\n{_command(options)}")
        return 128 + stopped
    if source.text and options.sample and place.first:
        key = jax.random.key(options.seed)
        sampled = source.text.decode(built.sample(state.params, options.sample, options.temperature, key))
        console.print("\nA sample that continues the training text:", style="bold")
        console.print(sampled)
    console.print(f"\nCheckpoints: {folder}\nMetrics: {metrics_file}\nLearning curve: {figure_file}")
    return 0


def _check_outputs(options: argparse.Namespace, folder: Path, metrics_file: Path, figure_file: Path) -> None:
    """Check now what would otherwise fail only after training."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--checkpoints {folder} is a file, not a folder.")
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"--checkpoints {folder} can't be written: {existing} is not a folder that can be written to.")
    newest = checkpoints.latest(folder)
    if newest is not None and not options.resume:
        raise InputError(
            f"--checkpoints {folder} already has a checkpoint of update {newest}: add --resume to continue from it, or "
            "name another folder."
        )
    if newest is None and options.resume:
        raise InputError(f"--checkpoints {folder} has no checkpoint to resume from.")
    for option, path in (("--metrics", metrics_file), ("--figure", figure_file)):
        # The folder of the checkpoints is made later.
        if path.parent != folder or folder.exists():
            arguments.check_output(option, path)
    metrics.check(metrics_file)
    if not options.resume and metrics_file.parent != folder and metrics_file.exists() and metrics.read(metrics_file):
        raise InputError(f"--metrics {metrics_file} already holds the metrics of another run: name another file.")
    if figure_file.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--figure {figure_file} ends in {figure_file.suffix!r}: use .png, .svg or .pdf.")


def _settings(options: argparse.Namespace, source: sources.Source) -> dict[str, Any]:
    """What the numbers of a run depend on, except the devices, which change only the rounding."""
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
    """The command that resumes the run."""
    words = [word for word in options.arguments if word != "--resume"]
    return shlex.join([Path(sys.executable).name, "-m", "jaxbptt", *words, "--resume"])
