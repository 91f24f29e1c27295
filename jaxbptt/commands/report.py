r"""`python -m jaxbptt report` takes the gradient every way there is, on the user's own sequence."""

import argparse
import platform
from typing import Any

import jax
import jax.numpy as jnp

from jaxbptt import tasks
from jaxbptt.commands import arguments
from jaxbptt.words import counted


def add_parser(commands: Any) -> None:
    """The command's options."""
    report = commands.add_parser(
        "report",
        help="take the gradient every way there is, prove that they agree, and show how far back it reaches",
        description="Takes the gradient of an untrained network on your sequence every way there is, prints how far they "
        "are apart and what they cost, and writes one HTML page. Without a file it reads a module of the standard library.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    report.set_defaults(run=run)
    arguments.add_source(report, npz="predict the next row of an array [time] or [time, features]")
    report.add_argument("--cell", choices=("all", "elman", "gru", "lstm"), default="all", help="the recurrent cell")
    report.add_argument("--hidden", type=arguments.size, default=64, help="size of the hidden state")
    report.add_argument("--steps", type=arguments.size, default=256, help="time steps T of a sequence")
    report.add_argument("--batch", type=arguments.size, default=4, help="sequences side by side")
    report.add_argument("--seed", type=int, default=0, help="of the random weights")
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
        # Here and not at the top, since the rest of the package does without the two.
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        from jaxbptt import page
        from jaxbptt.report import cells_of, horizon_sentence, reach_sentence, report_cell, stages
    except ModuleNotFoundError as error:
        raise tasks.InputError(f"{error.name} is not installed: pip install 'jaxbptt[report]'.") from None

    console = Console()
    cells = list(cells_of(options.cell))
    columns = TextColumn("{task.description:32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=sum(stages(cell, task, options.hidden) for cell in cells), completed=-1)

        def advance(stage: str) -> None:
            progress.update(bar, description=stage, advance=1)

        settings: dict[str, Any] = {"hidden": options.hidden, "seed": options.seed, "dtype": jnp.result_type(float)}
        reports = [report_cell(cell, task, **settings, progress=advance) for cell in cells]
        html = page.render(facts, reports)
    try:
        page.write(options.output, html)
    except OSError as error:
        raise tasks.InputError(f"--output {options.output} can't be written: {error.strerror or error}.") from None

    for report in reports:
        console.print(_table(report))
        for words in report.left_out:
            console.print(f"Left out: {words}.", style="dim")
        console.print(_bias_table(report))
    for report in reports:
        for sentence in (
            reach_sentence(report),
            horizon_sentence(report),
            f"{report.name}: {report.diagnosis.sentence}",
        ):
            if sentence:
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


def _table(report: Any) -> Any:
    from rich.table import Table

    table = Table(title=f"{report.name}: every way, against jax.grad through lax.scan", title_justify="left")
    table.add_column("way", no_wrap=True)
    for column in ("relative error", "KiB", "Mflop", "ms"):
        table.add_column(column, justify="right")
    table.add_column("agrees")
    for row in report.certificate.rows:
        table.add_row(
            row.name,
            f"{row.largest_error:.1e}",
            f"{row.temporary_bytes / 1024:,.0f}",
            f"{row.flops / 1e6:,.1f}",
            f"{row.seconds * 1e3:,.2f}",
            "yes" if row.agrees else "NO",
        )
    return table


def _bias_table(report: Any) -> Any:
    from rich.table import Table

    bias = report.bias
    kinds = {"truncated_scan": bias.chunked, "windowed_scan": bias.windowed}
    table = Table(title=f"{report.name}: truncated at K steps, against the exact gradient", title_justify="left")
    table.add_column("K", justify="right")
    for way in kinds:
        table.add_column(f"{way}: error", justify="right")
        table.add_column("cosine", justify="right")
    for i, K in enumerate(bias.lengths):
        numbers = [(kind.relative_errors[i], kind.cosines[i]) for kind in kinds.values()]
        table.add_row(str(K), *(cell for error, cosine in numbers for cell in (f"{error:.2g}", f"{cosine:.3f}")))
    return table
