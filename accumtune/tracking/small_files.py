"""Small files that others may have written, read without trust; and files that are replaced in one move."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path


def read_small(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """The content of a regular file, of which no more than `most_bytes` + 1 bytes are read.

    Raises:
        OSError: it cannot be read, or is a pipe, a device or a folder, which may never end.
        ValueError: the name is none.
    """
    # Without O_NONBLOCK, opening a pipe waits for someone who writes into it.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(None, "it is not a regular file", os.fspath(path))
        return file.read(most_bytes + 1)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file in one move: a reader sees the old file or the new one, never half of it.

    A new file has the permissions that the umask leaves, an existing one keeps its own; what a link leads to is
    written, and not the link; a device or a pipe is written into.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        target.write_text(text, encoding="utf-8")
        return
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with open(descriptor, "w", encoding="utf-8") as file:
            if mode is not None:
                os.fchmod(descriptor, stat.S_IMODE(mode))
            file.write(text)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
