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
# Errors of a file system without locks. (NFS has locks, but only for files that are open for writing.)
_NO_LOCKS = {errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.ENOLCK}
_TAKEN = {errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES}


@contextlib.contextmanager
def only_search(folder: Path) -> Iterator[None]:
    """Locks a search's directory, which exists.

    Raises:
        SearchDirectoryError: another search has locked it.
    """
    with held(folder) as is_held:
        if not is_held:
            raise running_already(folder)
        yield


@contextlib.contextmanager
def held(folder: Path) -> Iterator[bool]:
    """Locks a search's directory, which exists, unless another search has; yields whether it is locked by this one."""
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
    """Yields whether a search was killed: its directory is not locked, but was never released. Locks it meanwhile.

    False for a search on another machine, because not every shared disk has locks.
    """
    try:
        file = open(folder / LOCK_FILE, "r+")
    except (FileNotFoundError, PermissionError):
        yield False
        return
    with file:
        yield _take(file, folder) and _holder(folder).get("host") == socket.gethostname()


def _take(file: IO[str], folder: Path) -> bool:
    """Locks the open lock file; on a disk without locks, its content decides whether that succeeds."""
    taken = try_lock(file.fileno())
    return _is_released(_holder(folder)) if taken is None else taken


def try_lock(descriptor: int) -> bool | None:
    """Locks a file that is open for writing, until it is closed; returns whether that succeeded.

    Returns:
        None if the disk has no locks.
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


def _is_released(holder: dict[str, object]) -> bool:
    """Returns whether the process in a lock file's content is known to have ended."""
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
    """Makes the error for a directory that another search has locked."""
    holder = _holder(folder)
    who = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= set(holder) else "another process"
    return SearchDirectoryError(
        f"The search in {folder} is running already, in {who}.",
        "one search at a time in a directory.",
        "wait for it, stop it with Ctrl-C, or give this one another project_name. If that process has ended and the "
        f"disk has no locks, delete {folder / LOCK_FILE}.",
    )
