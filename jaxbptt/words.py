"""Words for whoever reads a message."""

from typing import Any


def counted(number: Any, one: str, many: str | None = None) -> str:
    """How many of what: `1 step`, `1,000 steps`, and of an unknown number `b steps`."""
    count = f"{number:,}" if isinstance(number, int) else str(number)
    return f"{count} {one if count == '1' else many or one + 's'}"
