r"""Names of columns, and columns by their names."""

from collections.abc import Sequence
from pathlib import Path

from jaxbptt.tasks.files import InputError
from jaxbptt.tasks.tables.dialect import Reading
from jaxbptt.tasks.tables.lines import Lines


def names_of(reading: Reading) -> tuple[str, ...]:
    """Names of all columns, each once."""
    given = [reading.named(i) for i in range(len(reading.kinds))]
    names = [
        name if name and given.count(name) == 1 else f"{name} ({i})" if name else f"column {i}"
        for i, name in enumerate(given, start=1)
    ]
    while len({*names}) < len(names):  # such a name was there already
        names = [name if names.count(name) == 1 else f"{name} ({i})" for i, name in enumerate(names, start=1)]
    return tuple(names)


def chosen(reading: Reading, columns: Sequence[str | int], drop: Sequence[str | int], lines: Lines) -> tuple[int, ...]:
    """Positions of the columns to read: those chosen, and columns of dates."""
    names, places, file = names_of(reading), range(1, len(reading.kinds) + 1), Path(lines.path).name
    wanted = {find(name, names, places, file, "--columns") for name in columns} or set(range(len(names)))
    dropped = {find(name, names, places, file, "--drop") for name in drop}
    if wanted and wanted <= dropped:
        words = " ".join(
            f"--{option} {' '.join(map(str, given))}"
            for option, given in (("columns", columns), ("drop", drop))
            if given
        )
        raise InputError(f"{words}: no column of {file} is left.")
    wanted |= {i for i, kind in enumerate(reading.kinds) if kind == "date"}
    return tuple(sorted(wanted - dropped))


def find(name: str | int, names: Sequence[str], places: Sequence[int], file: str, option: str = "") -> int:
    """The index in `names` of a column given by name, or by its place in the file.

    Raises:
        InputError: a column that isn't there, with those that are.
    """
    if name in names:
        return names.index(str(name))
    if (isinstance(name, int) or name.isdecimal()) and int(name) in places:
        return places.index(int(name))
    there = ", ".join(f"{number} {each!r}" for number, each in zip(places[:20], names, strict=False))
    raise InputError(
        f"{option} {name}".strip() + f": {file} has no such column, but {there}{' …' if len(names) > 20 else ''}."
    )
