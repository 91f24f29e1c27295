"""Files that are replaced as a whole."""

import errno
import os
import secrets
from pathlib import Path


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Replace a file, or leave it as it was: the content goes to a temporary file beside it, which then takes its name.

    A link is followed. Text is written as UTF-8.

    Raises:
        OSError: it can't be written, or something that is not a regular file has that name.
    """
    path = Path(path).resolve()
    content = content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "it exists and is not a regular file")
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
