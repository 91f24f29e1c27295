"""What the commands' options share: checked numbers, files that can be written, and the trained model to use."""

import argparse
import math
import os
import platform
from pathlib import Path

import jax

from jaxbptt import __version__
from jaxbptt.files import write_whole
from jaxbptt.models.model import Model, load
from jaxbptt.tasks import InputError

# What `train` writes beside the checkpoints.
_OF_TRAINING = ("metrics.csv", "learning-curve.png")


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds to an option's help what its default is, where it has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default is not None and action.default is not False
        return super()._get_help_string(action) if has_default else action.help


def add_source(parser: argparse.ArgumentParser, *, npz: str) -> None:
    """The options that name the data, of which at most one is given."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", metavar="FILE", help="predict the next character of a UTF-8 text")
    source.add_argument("--csv", metavar="FILE", help="predict the next row of numeric columns")
    source.add_argument("--npz", metavar="FILE", help=npz)


def add_model(parser: argparse.ArgumentParser) -> None:
    """The options that name a trained model."""
    parser.add_argument("folder", metavar="FOLDER", help="folder of the checkpoints that `train` has saved")
    parser.add_argument(
        "--which", choices=("best", "last"), default="best", help="the checkpoint: the best on validation, or the last"
    )


def load_model(options: argparse.Namespace) -> Model:
    """The model that the options name.

    Raises:
        CheckpointError: no model, or a damaged one.
        InputError: without orbax.
    """
    try:
        return load(options.folder, which=options.which)
    except ImportError as error:
        raise InputError(str(error)) from None


def versions() -> str:
    """The package, jax and Python, as `--version` names them."""
    return f"jaxbptt {__version__}, jax {jax.__version__}, Python {platform.python_version()}"


def size(text: str) -> int:
    """A whole number of at least 1."""
    return _at_least(1, text)


def count(text: str) -> int:
    """A whole number of at least 0."""
    return _at_least(0, text)


def _at_least(least: int, text: str) -> int:
    try:
        number = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if number < least:
        raise argparse.ArgumentTypeError(f"{number} is too small: at least {least} is needed")
    return number


def seed(text: str) -> int:
    """A whole number that fits in 32 bits."""
    number = count(text)
    if number >= 2**32:
        raise argparse.ArgumentTypeError(f"{text} is too large: less than 2**32 is needed")
    return number


def positive(text: str) -> float:
    """A finite number above 0."""
    number = real(text)
    if number <= 0:
        raise argparse.ArgumentTypeError(f"{text} is too small: more than 0 is needed")
    return number


def share(text: str) -> float:
    """A number of at least 0 and less than 1."""
    number = real(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a share: at least 0 and less than 1 is needed")
    return number


def at_least_zero(text: str) -> float:
    """A finite number of at least 0."""
    number = real(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is too small: at least 0 is needed")
    return number


def real(text: str) -> float:
    """A finite number."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return number


def check_output(option: str, path: str | Path) -> None:
    """Check before the work that a file can be written after it.

    Raises:
        InputError: it can't be written, and why.
    """
    path = Path(path)
    folder = path.parent
    if path.exists() and not path.is_file():
        raise InputError(f"{option} {path} is a folder or a device, not a file.")
    if not folder.is_dir():
        raise InputError(f"{option} {path} can't be written: there is no folder {folder}.")
    if not os.access(folder, os.W_OK):
        raise InputError(f"{option} {path} can't be written: the folder {folder} is read-only.")


def check_figure(path: Path) -> None:
    """Check that a figure can be drawn in the format that its file's name ends in.

    Raises:
        InputError: another ending.
    """
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"--figure {path} ends in {path.suffix!r}: use .png, .svg or .pdf.")


def check_apart(options: argparse.Namespace, *reads: str | Path | None) -> None:
    """Check that no output would replace a file that is read, or one of a folder of checkpoints.

    Args:
        options: of any command.
        *reads: what is read beside the files that the options name.

    Raises:
        InputError: the output, and what it would replace.
    """

    def named(*names):
        return [(name, Path(value)) for name in names if (value := getattr(options, name, None)) is not None]

    files = [path for _, path in named("text", "csv", "npz")] + [Path(path) for path in reads if path is not None]
    folders = [path for _, path in named("folder", "checkpoint")]
    for name, output in named("output", "figure", "export", "metrics"):
        for path in files:
            if output.exists() and path.exists() and output.samefile(path):
                raise InputError(f"--{name} {output} is a file that is read: name another one.")
        for folder in folders:
            where, folder = output.resolve(), folder.resolve()
            if folder in where.parents and (where.parent != folder or where.name in _OF_TRAINING):
                raise InputError(f"--{name} {output} is where `train` writes: name another place.")


def write(option: str, path: str | Path, content: str | bytes) -> None:
    """Write an output whole.

    Raises:
        InputError: it can't be written, and why.
    """
    try:
        write_whole(path, content)
    except OSError as error:
        raise InputError(f"{option} {path} can't be written: {error.strerror or error}.") from None
