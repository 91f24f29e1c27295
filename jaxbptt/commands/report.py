r"""`python -m jaxbptt report` takes the gradient by every method, on the user's own sequence."""

import argparse
import platform
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt import tasks
from jaxbptt.cells import CELLS
from jaxbptt.commands import arguments
from jaxbptt.files import write_whole
from jaxbptt.words import counted, install_command


def add_parser(commands: Any) -> None:
    """The command's options."""
    report = commands.add_parser(
        "report",
        help="take the gradient by every method, check that they agree, and show how far back it reaches",
        description="Takes the gradient of an untrained network on your sequence by every method, prints how far the "
        "results differ and what each costs, and writes one HTML page. Without a file it reads a module of the "
        "standard library.",
        formatter_class=arguments.HelpFormatter,
    )
    report.set_defaults(run=run)
    arguments.add_source(report, npz="predict the next row of an array [time] or [time, features]")
    report.add_argument("--cell", choices=("all", *CELLS), default="all", help="the recurrent cell")
    report.add_argument("--hidden", type=arguments.size, default=64, help="size of the hidden state")
    report.add_argument("--steps", type=arguments.size, default=256, help="time steps per sequence")
    report.add_argument("--batch", type=arguments.size, default=4, help="sequences in the batch")
    report.add_argument("--seed", type=int, default=0, help="seed of the random weights")
    report.add_argument("--output", metavar="FILE", default="jaxbptt-report.html", help="the page to write")
    report.add_argument("--float64", action="store_true", help="compute in double precision")


def run(options: argparse.Namespace) -> int:
    """Take the gradients, print the tables, write the page."""
    with jax.enable_x64(options.float64):
        _report(options)
    return 0


def _report(options: argparse.Namespace) -> None:
    task, facts = _task(options)
    try:
        # Imported here, since only this command needs rich and matplotlib.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from jaxbptt.reports import page, report, wording
    except ModuleNotFoundError as error:
        raise tasks.InputError(f"{error.name} is not installed: {install_command('report')}") from None

    console = Console()
    settings: dict[str, Any] = {"hidden": options.hidden, "seed": options.seed, "dtype": jnp.result_type(float)}
    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        cells = {
            name: report.stages(name, task, **settings) for name in (CELLS if options.cell == "all" else [options.cell])
        }
        bar = progress.add_task("", total=sum(map(len, cells.values())))

        def show(words: str, done: int) -> None:
            progress.update(bar, description=words, advance=done)

        reports = [report.report_cell(name, stages, show) for name, stages in cells.items()]
        html = page.render(facts, reports)
    try:
        write_whole(options.output, html)
    except OSError as error:
        raise tasks.InputError(f"--output {options.output} can't be written: {error.strerror or error}.") from None

    for cell in reports:
        title = f"{cell.name}: every method, against jax.grad through lax.scan"
        console.print(_table(title, wording.certificate_table(cell.certificate)))
        for words in cell.left_out:
            console.print(f"Left out: {words}.", style="dim")
        title = f"{cell.name}: truncated at K steps, against the exact gradient"
        console.print(_table(title, wording.bias_table(cell.bias)))
    for cell in reports:
        for sentence in wording.sentences(cell):
            console.print(sentence, highlight=False, soft_wrap=True)
    console.print(f"\nReport: {options.output}", highlight=False, soft_wrap=True)


def _task(options: argparse.Namespace) -> tuple[tasks.NextStep, dict[str, str]]:
    arguments.check_output("--output", options.output)
    if options.text is not None:
        series = tasks.read_text(options.text)
    elif options.csv is not None:
        series = tasks.read_csv(options.csv)
    elif options.npz is not None:
        series = tasks.read_npz(options.npz)
    else:
        series = tasks.read_standard_library()
    task = tasks.next_step(series, steps=options.steps, batch=options.batch)
    kind = "character" if series.symbols else "column"
    facts = {
        "data": f"{series.name}, {counted(len(series.values), 'step')} of {counted(series.features, kind)}",
        "time steps": str(options.steps),
        "batch": str(options.batch),
        "hidden": str(options.hidden),
        "seed": str(options.seed),
        "numbers": jnp.result_type(float).name,
        "on": f"{jax.devices()[0].device_kind}, jax {jax.__version__}, Python {platform.python_version()}",
    }
    return task, facts


def _table(title: str, table: Any) -> Any:
    from rich.table import Table

    shown = Table(title=title, title_justify="left")
    for i, column in enumerate(table.head):
        shown.add_column(column, justify="right" if i else "left", no_wrap=not i)
    for row in table.rows:
        shown.add_row(*row)
    return shown
