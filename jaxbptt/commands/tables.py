"""The options that say how a CSV file is read, for every command that takes one."""

import argparse
from typing import Any

from jaxbptt.commands import arguments
from jaxbptt.tasks import InputError

_NAMES = ("delimiter", "decimal", "header", "encoding", "skip", "columns", "drop", "missing", "dates", "sort", "ragged")


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of `tasks.read_table`; none has a default here, since the file says most of it."""
    group = parser.add_argument_group(
        "how --csv is read", "Found out from the file and printed; a file that may be read in two ways needs an option."
    )
    a = group.add_argument
    a(
        "--delimiter",
        metavar="CHARACTER",
        help="between cells: a character, or tab, space (any number), none (one column)",
    )
    a("--decimal", choices=(".", ","), help="decimal mark")
    a("--header", choices=("yes", "no"), help="whether the first line has the names of the columns")
    a("--encoding", metavar="NAME", help="of the file, such as latin-1; UTF-8 unless given")
    a("--skip", type=arguments.count, metavar="N", help="lines above the table to leave out")
    a("--columns", nargs="+", metavar="NAME", help="columns to read, by name or position from 1; all unless given")
    a("--drop", nargs="+", metavar="NAME", help="columns to leave out, by name or position")
    a(
        "--missing",
        choices=("error", "hold", "interpolate", "mask"),
        help="missing cells: refuse them (unless given), repeat the last value, interpolate, which uses later values, or "
        "repeat the last value as an input and leave them out of the loss",
    )
    a("--dates", choices=("day-first", "month-first", "year-first"), help="order of dates such as 01/02/2020")
    a("--sort", action="store_true", help="sort the rows by date")
    a(
        "--ragged",
        choices=("error", "drop"),
        help="rows of another length: refuse them (unless given), or leave them out",
    )


def given(options: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments for `tasks.read_table`: those options that were given.

    Raises:
        InputError: if one is given without a CSV file.
    """
    values = {name: getattr(options, name, None) for name in _NAMES}
    found = {name: value for name, value in values.items() if value is not None and value is not False}
    if found and getattr(options, "csv", None) is None:
        name = next(iter(found))
        raise InputError(f"--{name} says how a CSV file is read, but there is none: name it with --csv.")
    if "header" in found:
        found["header"] = found["header"] == "yes"
    return found
