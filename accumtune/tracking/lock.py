"""One process searches in a directory at a time; the kernel takes the lock back however that process ends."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

from accumtune.errors import SearchDirectoryError

LOCK_FILE = "search.lock"


@contextlib.contextmanager
def only_search(folder: Path) -> Iterator[None]:
    """Holds a search's directory, which exists.

    Raises:
        SearchDirectoryError: another search holds it.
    """
    with open(folder / LOCK_FILE, "a+") as file:
        if not try_lock(file.fileno()):
            raise _is_held(folder, _holder(folder))
        file.truncate(0)
        file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname()}))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def refuse_held(folder: Path) -> None:
    """Raises SearchDirectoryError where a search holds the directory."""
    with contextlib.suppress(FileNotFoundError), open(folder / LOCK_FILE) as file:
        if not try_lock(file.fileno()):
            raise _is_held(folder, _holder(folder))


@contextlib.contextmanager
def abandoned(folder: Path) -> Iterator[bool]:
    """Whether the search was killed: nobody holds its directory, and nobody gave it back. Nobody takes it meanwhile.

    Of a search on another machine no one can tell: not every shared disk has locks.
    """
    try:
        file = open(folder / LOCK_FILE)
    except FileNotFoundError:
        yield False
        return
    with file:
        yield try_lock(file.fileno()) and _holder(folder).get("host") == socket.gethostname()


def try_lock(descriptor: int) -> bool:
    """Whether an open file is this process's alone now, until it is closed."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a disk without locks
        return True
    return True


def _holder(folder: Path) -> dict[str, object]:
    try:
        holder = json.loads((folder / LOCK_FILE).read_text())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _is_held(folder: Path, holder: dict[str, object]) -> SearchDirectoryError:
    who = f"process {holder['pid']} on {holder['host']}" if {"pid", "host"} <= set(holder) else "another process"
    return SearchDirectoryError(
        f"The search in {folder} is running already, in {who}.",
        "one search at a time in a directory.",
        "wait for it, stop it with Ctrl-C, or give this one a project_name= of its own.",
    )
