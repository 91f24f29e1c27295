"""The options of `train`, and where those of a resumed run come from: the checkpoint, and what may be given anew."""

import argparse
from pathlib import Path
from typing import Any

from jaxbptt.cells import CELLS
from jaxbptt.commands import arguments, optimizers, tables
from jaxbptt.tasks import InputError
from jaxbptt.training import checkpoints

DEFAULT_UPDATES = 1000
# What the numbers of a run depend on.
TRAINING = (
    "cell",
    "hidden",
    "layers",
    "layer_norm",
    "dropout",
    "embedding",
    "steps",
    "batch",
    "optimizer",
    "learning_rate",
    "weight_decay",
    "warmup",
    "schedule",
    "clip",
    "validation",
    "patience",
    "save_every",
    "target",
    "season",
    "seed",
)
# What may change when a run is resumed, beside the path of its data.
RUN = (
    "updates",
    "minutes",
    "devices",
    "metrics",
    "figure",
    "sample",
    "temperature",
    "tensorboard",
    "on_update",
    "export",
)
_PATHS = ("metrics", "figure", "tensorboard", "export")
_SOURCES = ("text", "csv", "npz")
_UNSET = object()


def add_options(parser: argparse.ArgumentParser) -> None:
    """All options of `train`."""
    arguments.add_source(
        parser, npz="predict the next row of an array [time] or [time, features], in a .npz or .npy file"
    )
    tables.add_options(parser)
    a = parser.add_argument
    a("--target", nargs="+", metavar="NAME", help="predict only these columns, by name or position from 1")
    a(
        "--season",
        type=arguments.size,
        metavar="N",
        help="rows in a season, for the seasonal baseline; found if left out",
    )

    a = parser.add_argument_group("the network").add_argument
    a("--cell", choices=tuple(CELLS), default="lstm", help="the recurrent cell")
    a("--hidden", type=arguments.size, default=256, metavar="N", help="size of the hidden state")
    a("--layers", type=arguments.size, default=1, metavar="N", help="number of stacked layers")
    a("--layer-norm", action="store_true", help="normalise the layers, of an lstm")
    a(
        "--dropout",
        type=arguments.share,
        default=0.0,
        metavar="P",
        help="drop what upper layers and the read-out read with this probability, one mask for each update",
    )
    a("--embedding", type=arguments.size, metavar="N", help="learn a vector of this size for each symbol of a text")

    a = parser.add_argument_group("training").add_argument
    a(
        "--steps",
        type=arguments.size,
        metavar="N",
        help="truncation length: time steps per update; 64, or less for a short series",
    )
    a(
        "--batch",
        type=arguments.size,
        metavar="N",
        help="number of rows that the file is cut into, trained side by side; 32, or fewer for a short series",
    )
    a("--optimizer", choices=tuple(optimizers.OPTIMIZERS), default="adam", help="how gradients become updates")
    a("--learning-rate", type=arguments.positive, default=4e-3, metavar="RATE", help="learning rate")
    a(
        "--weight-decay",
        type=arguments.at_least_zero,
        metavar="RATE",
        help=f"share of the matrices' entries that is subtracted, times the learning rate; {optimizers.ADAMW_DECAY:g} for "
        "adamw, else 0",
    )
    a("--warmup", type=arguments.count, default=0, metavar="N", help="updates over which the learning rate rises")
    a(
        "--schedule",
        choices=optimizers.SCHEDULES,
        default="constant",
        help="cosine, linear: after the warm-up the rate falls to 0 at --updates",
    )
    a(
        "--clip",
        type=arguments.positive,
        default=1.0,
        metavar="NORM",
        help="longest gradient: longer ones are scaled down",
    )
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
    a(
        "--patience",
        type=arguments.size,
        metavar="N",
        help="stop early, after this many validations without a new least loss",
    )
    a("--seed", type=arguments.seed, default=0, help="seed of the random weights and of the sample")
    a("--devices", type=arguments.size, default=1, metavar="N", help="devices that share the batch, in each process")

    a = parser.add_argument_group("what is saved and written").add_argument
    a("--checkpoints", metavar="FOLDER", default="jaxbptt-train", help="folder for the checkpoints")
    a(
        "--save-every",
        type=arguments.size,
        default=200,
        metavar="N",
        help="updates between two checkpoints, and between two validations",
    )
    a(
        "--resume",
        metavar="FOLDER",
        help="continue from the newest checkpoint of this folder, with its data and settings; only limits and outputs, "
        "and the place of the data, may be given anew",
    )
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
    a("--export", metavar="FILE", help="file for the weights at the end, .npz or .safetensors")
    a("--tensorboard", metavar="FOLDER", help="write the metrics for TensorBoard, too")
    a(
        "--on-update",
        metavar="MODULE:FUNCTION",
        help="call this function of yours with the metrics of each update, a dictionary",
    )
    a("--sample", type=arguments.count, default=400, metavar="N", help="characters of text to sample at the end")
    a(
        "--temperature",
        type=arguments.at_least_zero,
        default=0.7,
        help="temperature of the sample; 0 always takes the most likely byte",
    )


def complete(options: argparse.Namespace) -> checkpoints.Record | None:
    """Fill in what follows from other options, or, for a resumed run, from its newest checkpoint, whose record is returned.

    Raises:
        InputError: options that contradict each other, or that a resumed run can't change.
        CheckpointError: there is nothing to resume.
    """
    record = None
    if options.resume is not None:
        record = _resumed(options)
    else:
        options.reading = tables.given(options)
        if options.updates is None and options.minutes is None:
            options.updates = DEFAULT_UPDATES
    if options.schedule != "constant" and options.updates is None:
        raise InputError(f"--schedule {options.schedule} needs --updates, after which the rate is 0.")
    if options.updates is not None and options.warmup >= options.updates:
        raise InputError(f"--warmup {options.warmup} leaves no update after it: --updates is {options.updates}.")
    if options.layer_norm and options.cell != "lstm":
        raise InputError(f"--layer-norm is there for --cell lstm, not for {options.cell}: leave it out.")
    if options.patience is not None and not options.validation:
        raise InputError("--patience counts validations, and --validation 0 leaves none: leave one of them out.")
    is_text = not (options.csv or options.npz)
    for option, given, kind, fits in (
        ("--embedding", options.embedding, "text", is_text),
        ("--target", options.target, "numbers", not is_text),
        ("--season", options.season, "numbers", not is_text),
    ):
        if given and not fits:
            raise InputError(f"{option} is for {kind}: leave it out.")
    return record


def _resumed(options: argparse.Namespace) -> checkpoints.Record:
    folder = Path(options.resume)
    if checkpoints.latest(folder) is None:
        raise InputError(f"--resume {folder} has no checkpoint to resume from.")
    record = checkpoints.record(folder)
    settings = record.settings
    if "architecture" not in settings:
        raise InputError(f"--resume {folder} has checkpoints, but not of a run of this version of jaxbptt train.")
    given = _given(options) - {"resume"}
    fixed = sorted(given - {*RUN, *_SOURCES})
    if fixed:
        raise InputError(
            f"{_flag(fixed[0])} can't be changed: --resume takes it from the checkpoint. Leave it out, or start another run."
        )
    data, run = settings["data"], dict(record.info["run"])
    if (other := given & {*_SOURCES}) and other != {data["kind"]}:
        raise InputError(f"{_flag(*other)} was given, but the run is of --{data['kind']}: name its file by that.")
    if "updates" in given and settings["training"]["schedule"] != "constant":
        raise InputError(f"--updates can't be changed: the rate's schedule ends at {run['updates']:,}. Leave it out.")
    if given & {"updates", "minutes"}:
        run["minutes"] = None
        # Unless the schedule of the rate ends there.
        run["updates"] = run["updates"] if settings["training"]["schedule"] != "constant" else None
    for name, value in {**settings["training"], **run}.items():
        if name not in given:
            setattr(options, name, value)
    if not other:
        setattr(options, data["kind"], data["path"])
    options.checkpoints, options.reading = options.resume, data["reading"]
    return record


def _given(options: argparse.Namespace) -> set[str]:
    """The options that stand on the command line, whatever their value."""
    parser = argparse.ArgumentParser()
    add_options(parser)
    names = vars(options)
    again = parser.parse_args(options.arguments[1:], argparse.Namespace(**dict.fromkeys(names, _UNSET)))
    return {name for name in names if getattr(again, name, _UNSET) is not _UNSET}


def settings_of(options: argparse.Namespace, names: tuple[str, ...]) -> dict[str, Any]:
    """Options by name, paths in a form that is true in every folder."""

    def value(name):
        given = getattr(options, name)
        return str(Path(given).absolute()) if name in _PATHS and given is not None else given

    return {name: value(name) for name in names}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
