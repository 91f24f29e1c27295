r"""The command line: `python -m jaxbptt`, or `jaxbptt` where the package is installed, and the name of a command."""

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from jaxbptt import tasks
from jaxbptt.commands import arguments as checks
from jaxbptt.commands import export, forecast, report, sample, train
from jaxbptt.training.checkpoints import CheckpointError


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with code 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(arguments)
    options.arguments = tuple(arguments)
    try:
        checks.check_apart(options)
        return options.run(options)
    except (tasks.InputError, CheckpointError) as error:
        print(f"jaxbptt {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\njaxbptt {options.command}: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxbptt", description="The gradient of a recurrent network through time, by every method.")
    parser.add_argument("--version", action="version", version=checks.versions())
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)
    report.add_parser(commands)
    train.add_parser(commands)
    sample.add_parser(commands)
    forecast.add_parser(commands)
    export.add_parser(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
