r"""`python -m jaxbptt forecast` continues a table with a trained model: a file of forecasts with intervals, and a figure."""

import argparse
import csv
import io
import warnings
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxbptt import tasks
from jaxbptt.commands import arguments, numbers, tables
from jaxbptt.models.forecasting import LEVELS, Forecast, ValidationErrors, forecast
from jaxbptt.models.model import Columns, Model
from jaxbptt.tasks import InputError
from jaxbptt.words import counted, install_command

# So many names of columns fit in a line.
_MAX_NAMES = 8


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "forecast",
        help="forecast the next rows of a table with a model that `train` has trained on one like it",
        description="Reads the table, whose columns are found by their names, and lets the network run on from its last "
        "row: each prediction is read as the next row, and columns that are not predicted keep their last value. Writes "
        "step, date where the table has evenly spaced ones, and for each column the forecast and an interval, which held "
        "the given share of the model's validation data as many steps ahead. Without a file it continues the table that the "
        "model was trained on.",
        formatter_class=arguments.HelpFormatter,
    )
    parser.set_defaults(run=run)
    arguments.add_model(parser)
    a = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--csv", metavar="FILE", help="the table to continue")
    source.add_argument("--npz", metavar="FILE", help="or an array [time] or [time, features], in a .npz or .npy file")
    a("--steps", type=arguments.size, required=True, metavar="N", help="how many rows to forecast")
    a("--level", type=float, choices=LEVELS, default=0.9, help="share of the validation data that the intervals held")
    a("--output", metavar="FILE", default="jaxbptt-forecast.csv", help="the file to write")
    a("--figure", metavar="FILE", help="the figure, .png, .svg or .pdf; named like the output by default")
    tables.add_options(parser)


def run(options: argparse.Namespace) -> int:
    """Load the model, read the table, write forecast and figure, print how far off the model was."""
    with jax.enable_x64(False):
        return _forecast(options)


def _forecast(options: argparse.Namespace) -> int:
    try:
        # Imported here, since the rest of the package does not need them.
        from rich.console import Console

        from jaxbptt.commands.display import show_errors
        from jaxbptt.plots import plot_forecast
    except ModuleNotFoundError as error:
        raise InputError(f"{error.name} is not installed: {install_command('report')}") from None
    output = Path(options.output)
    figure = Path(options.figure or output.with_suffix(".png"))
    _check_outputs(output, figure)
    model = arguments.load_model(options)
    if model.columns is None:
        raise InputError(
            f"{options.folder} has a model of text, which forecasts no numbers: jaxbptt sample {options.folder}"
        )
    console = Console(highlight=False, markup=False, soft_wrap=True)
    table = _read(options, model)
    for words in table.read_as:
        console.print(words)
    _check_order(table)
    try:
        future = forecast(model, table.values, steps=options.steps, level=options.level)
    except ValueError as error:
        raise InputError(str(error)) from None
    times, about_times = _continued(table.times, options.steps)
    errors = model.info.get("errors")
    console.print(_about(table, model.columns, future, about_times, measured=errors is not None))
    picture = io.BytesIO()
    past = table.values[:, list(model.columns.targets)]
    plot_forecast(future, past, times=times).savefig(picture, format=figure.suffix[1:], dpi=150)
    for option, path, content in (
        ("--output", output, _rows(future, times, f"date ({table.zone})" if table.zone else "date")),
        ("--figure", figure, picture.getvalue()),
    ):
        arguments.write(option, path, content)
    if errors is not None:
        show_errors(console, ValidationErrors.from_json(errors))
    console.print(f"\nForecast: {output}\nFigure: {figure}")
    return 0


def _check_outputs(output: Path, figure: Path) -> None:
    arguments.check_output("--output", output)
    arguments.check_output("--figure", figure)
    arguments.check_figure(figure)
    if figure == output:
        raise InputError(f"--output {output} is the name of the figure, too: name a .csv file.")


def _read(options: argparse.Namespace, model: Model) -> tasks.Table:
    """The columns that the model reads, in its order, read as those it was trained on."""
    data = model.settings["data"]
    path = options.csv or options.npz
    kind = "csv" if options.csv else "npz" if options.npz else data["kind"]
    if path is None and data["path"] is not None and Path(data["path"]).is_file():
        path = data["path"]
    if path is None:
        raise InputError(
            f"the file that the model was trained on, {data['path']}, is gone: name one by --csv or --npz."
        )
    if kind == "csv" and (options.missing or data["reading"].get("missing")) == "mask":
        # The same values, but there is no loss in which they could count.
        options = argparse.Namespace(**{**vars(options), "missing": "hold"})
    return numbers.read_for_model(model, options, kind, path)


def _check_order(table: tasks.Table) -> None:
    """Refuse rows that are not in the order of time: what follows the last one would not be the future."""
    times = table.times
    if times is None or not (back := times[1:] < times[:-1]).any():
        return
    row = int(back.argmax())
    later, earlier = _written(times[row : row + 2])
    order = "the newest row is first" if back.all() else f"the row of {later} is before that of {earlier}"
    raise InputError(
        f"{table.name}: {order}, but a forecast continues the last row: put the rows in order with --sort. A model that was "
        "trained on rows in this order has to be trained with --sort, too."
    )


def _continued(times: np.ndarray | None, steps: int) -> tuple[np.ndarray | None, str]:
    """Dates of the rows read and of those to come, and what there is to say of them."""
    if times is None:
        return None, ""
    import pandas

    # A few thousand dates show the spacing as well as all of them.
    known = pandas.DatetimeIndex(times[-4000:])
    with warnings.catch_warnings():
        # Newer versions say that they will return the spacing as an object, which is as good here.
        warnings.simplefilter("ignore")
        spacing = pandas.infer_freq(known) if len(known) > 2 else None
    if len(known) < 3:
        return None, "Fewer than 3 rows don't show how dates are spaced, so the forecast has steps only."
    if spacing is None:
        return None, "The dates are not evenly spaced, so the forecast has steps only."
    later = pandas.date_range(known[-1], periods=steps + 1, freq=spacing)[1:]
    return np.concatenate([times, later.to_numpy().astype(times.dtype)]), ""


def _made_up(table: tasks.Table) -> str:
    """Which columns have no value in the last rows, from which the network runs on."""
    lengths = np.where(table.observed.any(axis=0), np.argmax(table.observed[::-1], axis=0), len(table.observed))
    columns = [f"{name} ({counted(int(n), 'row')})" for name, n in zip(table.columns, lengths, strict=True) if n]
    if not columns:
        return ""
    return (
        "Warning: the table ends with missing cells, whose values are made up and from which the forecast starts: "
        f"{numbers.shortened(columns)}."
    )


def _about(table: tasks.Table, columns: Columns, future: Forecast, about_times: str, *, measured: bool) -> str:
    """What is forecast and from what."""
    steps = len(future.mean)
    sentences = [
        f"{counted(steps, 'row')} after the last of {counted(len(table.values), 'row')} of {table.name}, for "
        f"{numbers.shortened(columns.target_names)}.",
        about_times,
        _made_up(table),
    ]
    if future.held:
        sentences.append(
            f"{numbers.shortened(future.held)}: read but not predicted, held at the last value; train without "
            "--target to predict it, too."
        )
    if not measured:
        sentences.append(
            "There are no intervals: the model was trained without validation data, so nothing is known of its errors."
        )
    elif not future.measured:
        sentences.append("There are no intervals: validation has not measured enough errors for this level.")
    elif future.measured < steps:
        sentences.append(
            f"There are intervals for the first {counted(future.measured, 'step')}: validation has not measured enough "
            "errors further ahead."
        )
    lost = np.flatnonzero(~np.isfinite(future.mean).all(axis=1))
    if len(lost):
        sentences.append(f"Warning: from step {lost[0] + 1:,} on the forecast is not finite.")
    return "\n".join(filter(None, sentences))


def _rows(future: Forecast, times: np.ndarray | None, head: str) -> str:
    """The forecast as a CSV file."""
    steps = len(future.mean)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    dates = [] if times is None else _written(times)[-steps:]
    ends = (("", future.mean), (" low", future.low), (" high", future.high))
    names = (f"{name}{end}" for name in future.columns for end, _ in ends)
    writer.writerow(["step", *([head] if dates else []), *names])
    cells = np.stack([numbers for _, numbers in ends], axis=2).reshape(steps, -1)
    for i, row in enumerate(cells):
        writer.writerow([i + 1, *dates[i : i + 1], *(f"{x:.9g}" if np.isfinite(x) else "" for x in row)])
    return text.getvalue()


def _written(times: np.ndarray) -> list[str]:
    """Dates, with the time of day where any has one."""
    whole_days = (times == times.astype("datetime64[D]")).all()
    words = np.datetime_as_string(times, unit="D" if whole_days else "s")
    return [word.replace("T", " ") for word in words.tolist()]
