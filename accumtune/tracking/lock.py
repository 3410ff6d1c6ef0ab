"""Locks the directory of a search: one process at a time. `flock` is released when the process exits."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from accumtune.errors import SearchDirectoryError

LOCK_FILE = "search.lock"
# A disk without locks says so; NFS has them, but only for files that are open for writing (EBADF for others).
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}
_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


@contextlib.contextmanager
def only_search(folder: Path) -> Iterator[None]:
    """Holds a search's directory, which exists.

    Raises:
        SearchDirectoryError: another search holds it.
    """
    with held(folder) as is_held:
        if not is_held:
            raise running_already(folder)
        yield


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Holds a search's directory, which exists, unless another search does; yields whether it is held."""
    with open(folder / LOCK_FILE, "a+") as file:
        if not _take(file, folder):
            yield False
            return
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        try:
            yield True
        finally:
            file.truncate(0)


@contextlib.contextmanager
def abandoned(folder: Path) -> Iterator[bool]:
    """Whether the search was killed: nobody holds its directory, and nobody gave it back. Nobody takes it meanwhile.

    Of a search on another machine no one can tell: not every shared disk has locks.
    """
    try:
        file = open(folder / LOCK_FILE, "r+")
    except (FileNotFoundError, PermissionError):
        yield False
        return
    with file:
        yield _take(file, folder) and _holder(folder).get("host") == socket.gethostname()


def _take(file: IO[str], folder: Path) -> bool:
    """Locks the open lock file; without locks, what it says decides."""
    taken = try_lock(file.fileno())
    return _is_given_back(_holder(folder)) if taken is None else taken


def try_lock(descriptor: int) -> bool | None:
    """Whether a file that is open for writing is this process's alone now, until it is closed.

    Returns:
        None where the disk has no locks.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where nothing searches
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _TAKEN:
            return False
        if error.errno in _NO_LOCKS:
            return None
        raise
    return True


def _is_given_back(holder: dict[str, object]) -> bool:
    """Whether the process that a lock file names is known to be gone."""
    pid = holder.get("pid")
    if not isinstance(pid, int):
        return True
    if holder.get("host") != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _holder(folder: Path) -> dict[str, object]:
    try:
        holder = json.loads((folder / LOCK_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def running_already(folder: Path) -> SearchDirectoryError:
    """The error for a directory that another search holds."""
    holder = _holder(folder)
    who = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= set(holder) else "another process"
    return SearchDirectoryError(
        f"The search in {folder} is running already, in {who}.",
        "one search at a time in a directory.",
        "wait for it, stop it with Ctrl-C, or give this one a project_name= of its own. Where that process is gone and "
        f"the disk has no locks, delete {folder / LOCK_FILE}.",
    )
