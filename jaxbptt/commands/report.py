r"""`python -m jaxbptt report` takes the gradient by every method, on the user's own sequence, of a trained network too."""

import argparse
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxbptt import tasks
from jaxbptt.cells import CELLS
from jaxbptt.commands import arguments, numbers, tables
from jaxbptt.models.forecasting import ValidationErrors
from jaxbptt.models.model import Model
from jaxbptt.tasks.files import standardise
from jaxbptt.words import counted, install_command

# Of a table with a row for each column of the data, what fits on a screen.
_MAX_ROWS = 24
_DEFAULTS = {"cell": "all", "hidden": 64, "seed": 0}
# As many as one chart tells apart.
_ALL = ("elman", "gru", "lstm")


def add_parser(commands: Any) -> None:
    """The command's options."""
    report = commands.add_parser(
        "report",
        help="take the gradient by every method, check that they agree, and show how far back it reaches",
        description="Takes the gradient of a network on your sequence by every method, prints how far back it reaches and "
        "whether the methods agree, and writes one HTML page. The network is an untrained one, or with --checkpoint one that "
        "the train command has trained, before training and after. Without a file it reads a module of the standard library, "
        "or the data that the network was trained on.",
        formatter_class=arguments.HelpFormatter,
    )
    report.set_defaults(run=run)
    a = report.add_argument
    a("--checkpoint", metavar="FOLDER", help="open up a trained network, from the folder of its checkpoints")
    a("--which", choices=("best", "last"), help="the checkpoint: the best on validation (default), or the last")
    arguments.add_source(
        report, npz="predict the next row of an array [time] or [time, features], in a .npz or .npy file"
    )
    a(
        "--cell",
        choices=("all", *CELLS),
        help=f"the recurrent cell; all: {', '.join(_ALL)} (default: {_DEFAULTS['cell']})",
    )
    a("--hidden", type=arguments.size, help=f"size of the hidden state (default: {_DEFAULTS['hidden']})")
    a("--steps", type=arguments.size, default=256, help="time steps per sequence")
    a("--batch", type=arguments.size, default=4, help="sequences in the batch")
    a("--seed", type=arguments.seed, help=f"seed of the random weights (default: {_DEFAULTS['seed']})")
    a("--output", metavar="FILE", default="jaxbptt-report.html", help="the page to write")
    a("--float64", action="store_true", help="compute in double precision")
    tables.add_options(report)


def run(options: argparse.Namespace) -> int:
    """Take the gradients, print the tables, write the page."""
    for name, default in _DEFAULTS.items():
        if options.checkpoint is None:
            setattr(options, name, default if getattr(options, name) is None else getattr(options, name))
        elif getattr(options, name) is not None:
            raise tasks.InputError(f"--{name} is that of the checkpoint: leave it out, or leave out --checkpoint.")
    if options.which is not None and options.checkpoint is None:
        raise tasks.InputError(
            "--which chooses among checkpoints, but there is none: name their folder with --checkpoint."
        )
    arguments.check_output("--output", options.output)
    with jax.enable_x64(options.float64):
        _report(options)
    return 0


class _Subject(NamedTuple):
    """What is reported on.

    Attributes:
        entries: the networks.
        facts: by name.
        lines: printed first.
        sections: `(reports) -> sections`, what the page and the terminal say beside the gradient.
        measured: what was measured, in a sentence.
        row: what the networks read in the first row of the batch.
        easy: of a trained network: what is easy, in words, and its loss.
    """

    entries: tuple[Any, ...]
    facts: dict[str, str]
    lines: tuple[str, ...]
    sections: Callable[[Any], tuple[Any, ...]]
    measured: str
    row: Any
    easy: tuple[str, float] | None = None


def _report(options: argparse.Namespace) -> None:
    data = None if options.checkpoint else _data(options)
    try:
        # Imported here, since only this command needs rich and charts.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from jaxbptt.commands.display import table
        from jaxbptt.reports import page, report, summary, wording
    except ModuleNotFoundError as error:
        raise tasks.InputError(f"{error.name} is not installed: {install_command('report')}") from None

    console = Console()
    subject = _trained(options) if data is None else _untrained(options, data)
    for line in subject.lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=sum(len(report.stages(entry)) for entry in subject.entries))

        def show(words: str, done: int) -> None:
            progress.update(bar, description=words, advance=done)

        reports = report.report_cells(subject.entries, show)
        sections = subject.sections(reports)
        trained = options.checkpoint is not None
        found = summary.summary(subject.measured, reports, trained=trained, easy=subject.easy)
        html = page.render(subject.facts, reports, sections, summary=found, row=subject.row, trained=trained)
    arguments.write("--output", options.output, html)

    def say(words: str, style: str = "") -> None:
        # Lines are broken between words on a terminal, and not at all in a pipe.
        console.print(words, highlight=False, markup=False, style=style, soft_wrap=not console.is_terminal)

    for sentence in found:
        say(f"\n{sentence}")
    console.print()
    console.print(table("", *wording.overview_table(reports)))
    for cell in reports:
        for words in cell.left_out:
            say(f"{cell.name}: left out: {words}.", style="dim")
    disagree = [not row.agrees for cell in reports for row in cell.certificate.rows]
    if any(disagree):
        say(wording.agreement_sentence(reports), style="bold")
    for section in sections:
        head, rows = section.table
        console.print()
        console.print(table(section.title, head, rows[:_MAX_ROWS]))
        if len(rows) > _MAX_ROWS:
            say(f"{counted(len(rows) - _MAX_ROWS, 'more row')} on the page.", style="dim")
        for sentence in section.warnings:
            say(sentence)
    console.print(f"\nReport: {options.output}", highlight=False, markup=False, soft_wrap=True)


class _Data(NamedTuple):
    """What an untrained network reads.

    Attributes:
        series: the whole of it.
        task: sequences of it.
        table: of numbers, in their own units.
        observed: of sequences with masked entries, where a target counts.
    """

    series: tasks.Series
    task: tasks.NextStep
    table: tasks.Table | None = None
    observed: Any = None


def _data(options: argparse.Namespace) -> _Data:
    reading = tables.given(options)
    sizes = {"steps": options.steps, "batch": options.batch}
    if not options.csv and not options.npz:
        series = tasks.read_standard_library() if options.text is None else tasks.read_text(options.text)
        return _Data(series, tasks.next_step(series, **sizes))
    table = numbers.read_numbers("csv" if options.csv else "npz", options.csv or options.npz, reading)
    series = tasks.Series(table.name, standardise(table.values), ())
    task, observed = tasks.next_step(series, **sizes), None
    if reading.get("missing") == "mask" and not table.observed.all():
        observed = tasks.next_step(series._replace(values=table.observed), **sizes).targets
    return _Data(series, task, table, observed)


def _untrained(options: argparse.Namespace, data: _Data) -> _Subject:
    from jaxbptt.reports import report, wording

    series, table = data.series, data.table
    names = _ALL if options.cell == "all" else [options.cell]
    settings: dict[str, Any] = {"hidden": options.hidden, "seed": options.seed, "dtype": jnp.result_type(float)}
    kind = "character" if series.symbols else "column"
    facts = {
        "data": f"{series.name}, {counted(len(series.values), 'step')} of {counted(series.features, kind)}",
        "time steps": str(options.steps),
        "batch": str(options.batch),
        "hidden": str(options.hidden),
        "seed": str(options.seed),
        **_machine(),
    }
    if table is None:
        row = report.Row(series.name, tuple(series.symbols[number] for number in data.task.xs[:, 0].argmax(axis=-1)))
    else:
        # The first sequence of the batch begins where the series does.
        row = report.Row(series.name, None, tuple(table.columns), table.values[: options.steps])
    easy = () if table is None else (wording.persistence_section(table.columns, table.values, table.observed),)
    return _Subject(
        tuple(report.untrained(name, data.task, observed=data.observed, **settings) for name in names),
        facts,
        () if table is None else table.read_as,
        lambda reports: easy,
        _measured(
            f"{_NUMBERS.get(len(names), len(names))} untrained {'network' if len(names) == 1 else 'networks'} of "
            f"{counted(options.hidden, 'unit')} ({', '.join(names)})",
            options,
            series.name,
            "character" if series.symbols else "row",
        ),
        row,
    )


_NUMBERS = {1: "An", 2: "Two", 3: "Three"}


def _measured(networks: str, options: argparse.Namespace, name: str, one: str) -> str:
    """What was measured, in a sentence; `one` is what is read in a step."""
    sequences = f"{counted(options.batch, 'sequence')} of {counted(options.steps, one)}"
    return (
        f"{networks} read {sequences} from {name}, one {one} a step, and the gradient of {'their' if 'networks' in networks else 'its'} "
        "loss was followed back through time."
    )


def _trained(options: argparse.Namespace) -> _Subject:
    from jaxbptt.commands import sequences
    from jaxbptt.reports import trained, wording

    model = arguments.load_model(argparse.Namespace(folder=options.checkpoint, which=options.which or "best"))
    cut = sequences.of_model(model, options)
    text = model.vocabulary is not None
    unit = "nats per byte" if text else "squared standard deviations"
    facts = {
        "checkpoint": f"{options.checkpoint}, update {model.step:,}{_standing(model)}",
        "network": _network(model),
        **_metrics(model, unit),
        "trained on": _trained_on(model),
        "sequences": f"{options.batch} of {counted(options.steps, 'step')} from {cut.words}",
        **_machine(),
    }
    easy = trained.easy(model, cut.sequences)
    errors = model.info.get("errors")
    forecasts = () if errors is None else (wording.errors_section(ValidationErrors.from_json(errors)),)
    return _Subject(
        trained.entries(model, cut.sequences, dtype=jnp.result_type(float)),
        facts,
        cut.read_as,
        lambda reports: (wording.losses_section(reports, easy, unit), *forecasts),
        _measured(
            f"A network ({_network(model)})",
            options,
            f"{cut.name}, before training and after it",
            "byte" if text else "row",
        ),
        trained.first_row(model, cut.sequences, cut.name),
        easy,
    )


def _standing(model: Model) -> str:
    best = model.info.get("metrics", {}).get("best")
    return ", the best on validation" if best and best["update"] == model.step else ""


def _network(model: Model) -> str:
    a = model.settings["architecture"]
    size = f"{a['cell']}, {counted(a['layers'], 'layer')} of {a['hidden']}"
    embedding = f", embedding of {a['embedding']}" if a["embedding"] else ""
    parameters = sum(leaf.size for leaf in jax.tree.leaves(model.params))
    return f"{size}{', layer normalisation' if a['layer_norm'] else ''}{embedding}, {parameters:,} parameters"


def _metrics(model: Model, unit: str) -> dict[str, str]:
    found = model.info.get("metrics", {})
    names = {"loss": "training loss", "validation_loss": "validation loss"}
    return {words: f"{found[name]:.4g} {unit}" for name, words in names.items() if found.get(name) is not None}


def _trained_on(model: Model) -> str:
    path = model.settings["data"]["path"]
    name = "the standard library's decimal arithmetic" if path is None else Path(path).name
    versions = ", ".join(f"{program} {version}" for program, version in model.info.get("versions", {}).items())
    return f"{name}{f', by {versions}' if versions else ''}"


def _machine() -> dict[str, str]:
    return {
        "numbers": jnp.result_type(float).name,
        "on": f"{jax.devices()[0].device_kind}, jax {jax.__version__}, Python {platform.python_version()}",
    }
