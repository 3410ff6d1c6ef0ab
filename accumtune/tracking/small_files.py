"""Reads small files that others may have written, and replaces files atomically."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def read_small(path: str | os.PathLike[str], most_bytes: int) -> bytes:
    """Reads a regular file, at most `most_bytes` + 1 bytes of it.

    Raises:
        OSError: it cannot be read, or is not a regular file: reading a pipe or a device may never end.
        ValueError: the path is not a valid file name.
    """
    # Without O_NONBLOCK, opening a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(None, "it is not a regular file", os.fspath(path))
        return file.read(most_bytes + 1)


@contextlib.contextmanager
def atomic_file(path: Path, *, outlives_a_power_cut: bool = True) -> Iterator[BinaryIO]:
    """Yields a file to write that replaces `path` when it is complete: a reader never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:100]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if outlives_a_power_cut:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # the disk may be full
        raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file so that a reader, or the next process after a kill, never sees a part of it."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file at a path that the user gave, atomically.

    A new file has the umask's permissions, an existing one keeps its own. A link is followed. A device or a pipe is
    written to as it is.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(path).resolve()
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        target.write_text(text, encoding="utf-8")
        return
    with atomic_file(target) as file:
        if mode is not None:
            os.fchmod(file.fileno(), stat.S_IMODE(mode))
        file.write(text.encode())
