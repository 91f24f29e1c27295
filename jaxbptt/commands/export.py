r"""`python -m jaxbptt export` writes the weights of a trained model to a file that other programs read."""

import argparse
from typing import Any

import jax

from jaxbptt.commands import arguments
from jaxbptt.models import export
from jaxbptt.models.model import Model
from jaxbptt.tasks import InputError
from jaxbptt.words import counted


def add_parser(commands: Any) -> None:
    """The command's options."""
    parser = commands.add_parser(
        "export",
        help="write the weights of a model that `train` has trained, for other programs",
        description="Writes every weight by its name, the read-out's too, with the sizes of the network and the bytes or "
        "the columns that it reads. For torch, see jaxbptt.interop.to_torch.",
        formatter_class=arguments.HelpFormatter,
    )
    parser.set_defaults(run=run)
    arguments.add_model(parser)
    parser.add_argument(
        "--output",
        metavar="FILE",
        required=True,
        help=".safetensors, read by the library of that name in any framework, or .npz, read by numpy",
    )


def run(options: argparse.Namespace) -> int:
    """Load the model, write the weights, print their names."""
    check("--output", options.output)
    with jax.enable_x64(False):
        model = arguments.load_model(options)
    write("--output", options.output, model)
    weights = export.named_weights(model.params)
    for name, array in weights.items():
        print(f"{name} {list(array.shape)}")
    numbers = sum(array.size for array in weights.values())
    print(f"{options.output}: {counted(numbers, 'number')}, after {counted(model.step, 'update')}")
    return 0


def check(option: str, path: str) -> None:
    """Check before the work that weights can be written to a file.

    Raises:
        InputError: they can't, and why.
    """
    try:
        export.check(path)
    except ValueError as error:
        raise InputError(f"{option} {error}") from None
    except ImportError as error:
        raise InputError(str(error)) from None
    arguments.check_output(option, path)


def write(option: str, path: str, model: Model) -> None:
    """The weights of a model, and what it reads, to a file.

    Raises:
        InputError: it can't be written, and why.
    """
    described = {key: model.settings[key] for key in ("architecture", "vocabulary", "columns")}
    metadata = {key: value for key, value in described.items() if value is not None} | {
        "updates": model.step,
        "written_by": arguments.versions(),
    }
    try:
        export.save_weights(path, model.params, metadata)
    except OSError as error:
        raise InputError(f"{option} {path} can't be written: {error.strerror or error}.") from None
