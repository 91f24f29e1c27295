r"""`python -m jaxbptt train` trains a character model or a forecaster on the user's own file, and can resume."""

import argparse
import io
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxbptt.commands import arguments, cluster, compiled, export, metrics, run, sources
from jaxbptt.commands import options as train_options
from jaxbptt.models import baselines, forecasting, sampling
from jaxbptt.models.model import Model, load, saved_architecture, settings_of
from jaxbptt.tasks import InputError
from jaxbptt.training import checkpoints, hooks
from jaxbptt.words import counted, install_command


def add_parser(commands: Any) -> None:
    """The command's options."""
    train = commands.add_parser(
        "train",
        help="train a character model or a forecaster by truncated BPTT; can be resumed after any interruption",
        description="Trains a recurrent network by truncated BPTT to predict the next character of a text or the next row "
        "of numbers; files may be larger than memory. Ctrl-C saves, and --resume FOLDER continues as if there had been no "
        "stop, bit for bit. Without a file it reads a module of the standard library. What was trained is in FOLDER: "
        "`jaxbptt sample FOLDER`, `jaxbptt forecast FOLDER`, and `jaxbptt.load(FOLDER)` in Python, which take the best on "
        "validation. A cluster launcher's environment (JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID, "
        "Slurm, Open MPI) is respected.",
        formatter_class=arguments.HelpFormatter,
    )
    train.set_defaults(run=start)
    train_options.add_options(train)


def start(options: argparse.Namespace) -> int:
    """Train as the options say; returns the exit code."""
    with run.signals() as caught, jax.enable_x64(False):
        try:
            return _train(options, caught)
        except KeyboardInterrupt:
            print("\njaxbptt train: interrupted, nothing saved since the last checkpoint", file=sys.stderr)
            return 128 + max(caught, default=signal.SIGINT)


def _train(options: argparse.Namespace, caught: list[int]) -> int:
    try:
        # Imported here, since the rest of the package does not need them.
        import orbax.checkpoint  # noqa: F401
        from rich.console import Console

        from jaxbptt.commands.display import Display
        from jaxbptt.plots import plot_learning_curve
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: {install_command('train')}") from None
    record = train_options.complete(options)
    folder = Path(options.checkpoints)
    metrics_file = Path(options.metrics or folder / "metrics.csv")
    figure_file = Path(options.figure or folder / "learning-curve.png")
    _check_outputs(options, folder, metrics_file, figure_file)
    on_update = _hooks(options)
    source = sources.open_source(options, record and record.settings)
    place = cluster.start(options.devices, options.batch)
    training = train_options.settings_of(options, train_options.TRAINING)
    if record is None:
        architecture = compiled.architecture_of(training, source)
        settings = settings_of(architecture, source.vocabulary, source.columns, source.prompt)
    else:
        architecture = saved_architecture(record.settings)
        settings = dict(record.settings)
    settings |= {"data": source.data, "training": training}
    functions = compiled.compile_run(
        architecture, training, options.updates, source, place.mesh, sources.MAX_VALIDATION_CHUNKS
    )
    state = functions.state if record is None else checkpoints.restore(folder, functions.state, record.settings)
    errors = _errors(functions.network, source, options.season)
    if caught:
        raise KeyboardInterrupt
    console = Console(quiet=not place.first, highlight=False, markup=False, soft_wrap=True)
    for words in (*source.words, *_about(options, state, place)):
        console.print(words)
    if place.first:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            metrics.begin(metrics_file, int(state.step), text=source.vocabulary is not None)
        except OSError as error:
            raise InputError(f"{error.filename} can't be written: {error.strerror or error}.") from None
    limits = run.Limits(
        options.updates,
        None if options.minutes is None else 60 * options.minutes,
        options.save_every,
        folder,
        metrics_file if place.first else None,
        settings,
        {"versions": run.versions(), "run": train_options.settings_of(options, train_options.RUN)},
        options.patience,
        on_update if place.first else (),
        errors,
    )
    so_far = record and record.info["metrics"]
    try:
        with Display(console, source.measured_in, options.updates) as display:
            outcome = run.train(functions, state, source, limits, display.show, so_far, caught)
    finally:
        for hook in limits.hooks:
            hooks.close(hook)
    if place.first:
        _draw(plot_learning_curve, metrics_file, figure_file, source)
    if outcome.signal:
        console.print(f"Stopped and saved at update {int(outcome.state.step)}. To resume:\n{_command(folder)}")
        return 128 + outcome.signal
    best = outcome.progress.get("best")
    if outcome.out_of_patience and best is not None:
        console.print(f"Stopped early: no validation was better than that of update {best['update']:,}.")
    model = load(folder)
    if place.first:
        _use(model, options, console)
        console.print(f"\nCheckpoints: {folder}\nMetrics: {metrics_file}\nLearning curve: {figure_file}")
    if outcome.learnt_nothing:
        print(
            f"jaxbptt train: at the end the loss is still above {source.measure(source.constant_loss):.3g} "
            f"{source.measured_in}, that of a constant prediction: nothing has been learnt. Try a smaller --learning-rate, "
            "or more --updates.",
            file=sys.stderr,
        )
        return 1
    return 0


def _about(options: argparse.Namespace, state: Any, place: cluster.Place) -> list[str]:
    """The run in a line, and another where there is nothing to do."""
    done, parameters = int(state.step), sum(leaf.size for leaf in jax.tree.leaves(state.params))
    lines = [
        f"{options.cell}, hidden size {options.hidden}, {counted(options.layers, 'layer')}, {parameters:,} parameters, "
        f"{counted(options.batch, 'row')} side by side, {counted(options.steps, 'step')} an update, "
        f"{counted(options.devices * place.processes, 'device')} ({jax.devices()[0].device_kind})"
        + (f", resumed at update {done:,}" if done else "")
    ]
    if options.updates is not None and done >= options.updates:
        lines.append(f"Nothing is left to do: the run is to end at update {options.updates:,}.")
    return lines


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
            f"--checkpoints {folder} already has a checkpoint of update {newest}: continue from it with --resume {folder}, "
            "or name another folder."
        )
    for option, path in (("--metrics", metrics_file), ("--figure", figure_file)):
        # The folder of the checkpoints is made later.
        if path.parent != folder or folder.exists():
            arguments.check_output(option, path)
    metrics.check(metrics_file)
    if not options.resume and metrics_file.parent != folder and metrics_file.exists() and metrics.read(metrics_file):
        raise InputError(f"--metrics {metrics_file} already holds the metrics of another run: name another file.")
    if options.export:
        export.check("--export", options.export)
    arguments.check_figure(figure_file)


def _hooks(options: argparse.Namespace) -> tuple[hooks.Hook, ...]:
    """What is called with the metrics of each update."""
    tensorboard = [hooks.tensorboard(options.tensorboard)] if options.tensorboard else []
    return (*tensorboard, *([hooks.load_hook(options.on_update)] if options.on_update else []))


def _errors(network: Any, source: sources.Source, season: int | None) -> Callable[[Any], Any]:
    """`params -> validation errors by horizon`, as a checkpoint has them; `None` for a text, or without validation."""
    columns = source.columns
    if columns is None or source.validation is None:
        return lambda params: None
    before = min(source.cut, baselines.LOOKED_AT)
    if season is not None and season > before:
        raise InputError(f"--season {season:,} is longer than the {before:,} rows before validation.")

    def errors(params: Any) -> dict[str, Any]:
        local, rows = _on_this_device(params), source.values
        found = forecasting.validation_errors(
            network, local, columns, rows, source.observed, start=source.cut, season=season
        )
        return found.to_json()

    return errors


def _use(model: Model, options: argparse.Namespace, console: Any) -> None:
    """A sample, and the weights in a file, of the model that `load` gives."""
    from jaxbptt.commands.display import show_errors

    if model.vocabulary is not None and options.sample:
        key = jax.random.key(options.seed)
        text = sampling.sample(model, None, length=options.sample, temperature=options.temperature, key=key)
        console.print("\nA sample that continues the training text:", style="bold")
        console.print(text)
    if errors := model.info.get("errors"):
        show_errors(console, forecasting.ValidationErrors.from_json(errors))
    if options.export:
        export.write("--export", options.export, model)
        console.print(f"Weights: {options.export}")


def _on_this_device(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf.addressable_data(0)), tree)


def _draw(plot: Any, metrics_file: Path, figure_file: Path, source: sources.Source) -> None:
    rows = metrics.read(metrics_file)
    if not rows:
        return
    name = "bits_per_character" if source.vocabulary else "loss"
    training, validation = (
        ([row["update"] for row in rows if key in row], [row[key] for row in rows if key in row])
        for key in (name, f"validation_{name}")
    )
    figure = plot(training, validation, measure=source.measured_in)
    picture = io.BytesIO()
    figure.savefig(picture, format=figure_file.suffix[1:], dpi=150)
    arguments.write("--figure", figure_file, picture.getvalue())


def _command(folder: Path) -> str:
    """The command that resumes the run, by this Python."""
    name = Path(sys.executable).name
    python = name if shutil.which(name) == sys.executable else sys.executable
    return shlex.join([python, "-m", "jaxbptt", "train", "--resume", str(folder)])
