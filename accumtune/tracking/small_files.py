"""Reads small files that others may have written, without trust, and replaces files in one move."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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


@contextlib.contextmanager
def atomic_file(path: Path, *, outlives_a_power_cut: bool = True) -> Iterator[BinaryIO]:
    """A file to write, of which a reader, or the next process after a kill, sees all or nothing."""
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
        temporary.unlink(missing_ok=True)  # of a disk that is full, the space is wanted
        raise


def write_atomically(path: Path, content: bytes | str) -> None:
    """Writes a file so that a reader, or the next process after a kill, sees all of it or none of it."""
    with atomic_file(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file of the user's in one move: a reader sees the old file or the new one, never half of it.

    A new file has the permissions that the umask leaves, an existing one keeps its own; what a link leads to is
    written, and not the link; a device or a pipe is written into.

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
