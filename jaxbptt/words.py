"""Wording of messages."""

from typing import Any


def counted(number: Any, one: str, many: str | None = None) -> str:
    """A count with its noun: `1 step`, `1,000 steps`, and for a symbolic number `b steps`."""
    count = f"{number:,}" if isinstance(number, int) else str(number)
    return f"{count} {one if count == '1' else many or one + 's'}"
