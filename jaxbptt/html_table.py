"""Results as small tables, in plain text and, for notebooks, in HTML: `_repr_html_ = fields_table` in a result type, or one made of `html_table`.

Colours, fonts and lines are the notebook's own, light or dark. Arrays are summarised, and traced ones only have a shape.
"""

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jaxbptt.trees import is_key, name
from jaxbptt.words import counted

# Shown of a long table, from its start and from its end.
_FIRST, _LAST = 10, 3
# Leaves shown of a tree, and numbers of an array.
_LEAVES, _NUMBERS = 8, 6
# Entries up to which an array is read for its range.
_READ = 10**7
_LONG = 1_000

_LEFT = "text-align: left"
_RIGHT = "text-align: right"


def html_table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    notes: Iterable[str] = (),
    words: bool = False,
) -> str:
    """A table: the first column on the left, all others on the right, or on the left too if they are words.

    Args:
        head: names of the columns.
        rows: a cell for each column, plain text. Of many rows of numbers, the first ten and the last three are shown.
        title: above the table.
        notes: sentences below it.
        words: whether the cells are words and not numbers.
    """
    rows = list(rows)
    gap = (f"… {len(rows) - _FIRST - _LAST:,} more", *[""] * (len(head) - 1))
    rows = rows if words else [gap if i is None else rows[i] for i in _ends(len(rows))]
    top = "".join(_cell("th", text, i, words) for i, text in enumerate(head))
    body = "".join(f"<tr>{''.join(_cell('td', text, i, words) for i, text in enumerate(row))}</tr>" for row in rows)
    above = f"<div><strong>{escape(title)}</strong></div>" if title else ""
    table = f"<table style='color: inherit'><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>" if rows else ""
    return (
        f"<div style='overflow-x: auto'>{above}{table}{''.join(f'<div>{escape(note)}</div>' for note in notes)}</div>"
    )


def text_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in plain text: the first column on the left, all others on the right."""
    columns = list(zip(head, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    padded = [
        [cell.rjust(width) if i else cell.ljust(width) for cell in column]
        for i, (column, width) in enumerate(zip(columns, widths, strict=True))
    ]
    return "\n".join(map("  ".join, zip(*padded, strict=True)))


def fields_table(result: Any) -> str:
    """A NamedTuple as a table: a row for each of its fields, or of the leaves of a field, with what its docstring says."""
    meanings = _attributes(type(result))
    rows = [
        (label, text, meanings.get(field, "") if i == 0 else "")
        for field, value in zip(result._fields, result, strict=True)
        for i, (label, text) in enumerate(_described(field, value))
    ]
    return html_table(("field", "value", "meaning"), rows, title=type(result).__name__, words=True)


def columns_table(result: Any, columns: Mapping[str, Any], *, notes: Iterable[str] = ()) -> str:
    """A result as a table of arrays along one axis, a column for each; its fields where they are traced or batched.

    Args:
        result: a NamedTuple.
        columns: arrays of one length, or sequences of words, by the name of the column.
        notes: sentences below the table.
    """
    if any(not is_known(values) or np.ndim(values) != 1 for values in columns.values()):
        return fields_table(result)
    arrays = [values if isinstance(values, list | range) else np.asarray(values) for values in columns.values()]
    length = len(arrays[0])
    rows = [tuple("" if i is None else in_words(array[i]) for array in arrays) for i in _ends(length)]
    if None in _ends(length):
        rows[_FIRST] = (f"… {length - _FIRST - _LAST:,} more", *rows[_FIRST][1:])
    return html_table(tuple(columns), rows, title=type(result).__name__, notes=notes)


def is_known(value: Any) -> bool:
    """Whether an array's numbers can be looked at: it is not traced, not a mere shape, not deleted, and all on this host."""
    if isinstance(value, Tracer | jax.ShapeDtypeStruct):
        return False
    return not isinstance(value, jax.Array) or (value.is_fully_addressable and not value.is_deleted())


def in_words(value: Any) -> str:
    """A number, a truth, a text, an array or a function in a few words."""
    if value is None:
        return "none"
    if isinstance(value, str):
        return value if len(value) <= _LONG else f"{value[:_LONG]}… ({counted(len(value), 'character')})"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | complex | np.inexact):
        return f"{value:.4g}"
    if isinstance(value, np.datetime64) and not np.isnat(value):
        return np.datetime_as_string(value, unit="auto").replace("T", " ")
    if isinstance(value, np.generic | np.dtype):
        return str(value)
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return _array_in_words(value)
    if callable(value):
        value = getattr(value, "func", value)  # of a functools.partial
        return f"function {getattr(value, '__name__', type(value).__name__)}"
    return type(value).__name__


def _array_in_words(array: Any) -> str:
    """Type, shape, and numbers: all of a few, the range of many."""
    kind = f"{array.dtype}[{', '.join(map(str, array.shape))}]"
    if not is_known(array) or is_key(array) or np.prod(array.shape, dtype=float) > _READ:
        return kind
    values = np.asarray(array)
    if jnp.issubdtype(values.dtype, jnp.floating):
        values = values.astype(np.float64)  # numpy has no range of bfloat16
    elif values.dtype.kind not in "biuc":
        return in_words(values[()]) if values.ndim == 0 else kind
    if values.ndim == 0:
        return in_words(values[()])
    if values.ndim == 1 and 0 < values.size <= _NUMBERS:
        return f"{kind}: {', '.join(map(in_words, values))}"
    if not values.size:
        return f"{kind}, empty"
    if values.dtype.kind == "b":
        return f"{kind}, {np.count_nonzero(values):,} true"
    what, sizes = ("absolute values", np.abs(values)) if values.dtype.kind == "c" else ("values", values)
    finite = sizes[np.isfinite(sizes)]
    bad = f", {values.size - finite.size:,} not finite" if finite.size < values.size else ""
    if not finite.size:
        return kind + bad
    low, high = in_words(finite.min()), in_words(finite.max())
    return f"{kind}, all {what} {low}{bad}" if low == high else f"{kind}, {what} from {low} to {high}{bad}"


def _described(field: str, value: Any) -> list[tuple[str, str]]:
    """Rows of label and words: one for the field, or one for each leaf if it is a tree."""
    plain = isinstance(value, tuple | list) and not hasattr(value, "_fields")
    if plain and all(isinstance(each, str | int | float | None) for each in value):
        return [(field, _listed(value))]
    if isinstance(value, Mapping) and all(isinstance(each, str | int | float | None) for each in value.values()):
        return [(field, _listed([f"{key} {in_words(each)}" for key, each in value.items()]))]
    leaves = [(name(field, path), in_words(leaf)) for path, leaf in jax.tree_util.tree_leaves_with_path(value)]
    left_out = [(f"{field}…", f"{len(leaves) - _LEAVES:,} more")] if len(leaves) > _LEAVES else []
    return leaves[:_LEAVES] + left_out or [(field, "none")]


def _listed(values: Sequence[Any]) -> str:
    words = [in_words(value) for value in values[:_FIRST]]
    return ", ".join([*words, f"… {len(values) - _FIRST:,} more"] if len(values) > _FIRST else words) or "none"


def _attributes(kind: type) -> dict[str, str]:
    """What the section `Attributes` of a docstring says of each field, on one line and without backticks."""
    _, _, section = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    found = re.findall(r"^ {4}(\w+): (.*(?:\n {6,}.*)*)", section, re.MULTILINE)
    return {field: " ".join(text.split()).replace("`", "") for field, text in found}


def _ends(length: int) -> list[int | None]:
    """The rows of a table to show, and `None` where others are left out."""
    if length <= _FIRST + _LAST + 1:
        return list(range(length))
    return [*range(_FIRST), None, *range(length - _LAST, length)]


def _cell(tag: str, text: str, column: int, words: bool) -> str:
    return f"<{tag} style='{_LEFT if words or column == 0 else _RIGHT}'>{escape(text)}</{tag}>"
