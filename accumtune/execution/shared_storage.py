"""Keeps what a trial needs to go on on another machine where all machines can reach it, through fsspec.

Only for workers that do not see the search's own folder. The worker copies a trial's checkpoint and its best weights to
`<url>/<search>/<trial>` as they are written, and takes them from there when it is the one that goes on with the trial;
the search removes them when the trial has ended. All else travels with the task and back.
"""

from __future__ import annotations

import sys
from pathlib import Path, PurePosixPath
from typing import Any

from accumtune.errors import SearchError, WorkerError
from accumtune.tracking.journal import read_search_journal
from accumtune.tracking.small_files import write_atomically
from accumtune.worker.transport.task_directory import TaskDirectory


class TaskStorage:
    """The files of one task under a URL.

    Args:
        url: of the task's folder, such as `"s3://bucket/searches/digits/trial_7"`.

    Raises:
        WorkerError: fsspec, or what it needs for this kind of URL, is not installed here.
    """

    def __init__(self, url: str) -> None:
        self._files, self._folder = _open(url)
        self._kept: dict[str, tuple[int, int]] = {}

    def fetch(self, directory: TaskDirectory) -> None:
        """Puts what an earlier worker has kept into the task's directory."""
        for file in _files_of(directory):
            try:
                write_atomically(file, self._files.cat_file(self._path(file.name)))
                self._kept[file.name] = _identity(file)
            except FileNotFoundError:
                continue
            except Exception as error:  # each kind of storage has its own: the training begins anew instead
                self._complain("read", error)

    def keep(self, directory: TaskDirectory) -> None:
        """Copies what is new. The training does not depend on it: where it fails, the worker's log says so."""
        for file in _files_of(directory):
            try:
                identity = _identity(file)
                if self._kept.get(file.name) != identity:
                    self._put(file)
                    self._kept[file.name] = identity
            except FileNotFoundError:  # it has not come to a checkpoint, or has none any more
                continue
            except Exception as error:
                self._complain("written", error)

    def forget(self) -> None:
        """Removes the files; the task has ended."""
        try:
            self._files.rm(self._folder, recursive=True)
        except FileNotFoundError:
            pass
        except Exception as error:
            self._complain("removed", error)

    def _put(self, file: Path) -> None:
        # Under another name first: who goes on must not find half a file, and few storages rename in one step only.
        new = self._path(f"new.{file.name}")
        self._files.makedirs(self._folder, exist_ok=True)
        self._files.pipe_file(new, file.read_bytes())
        self._files.mv(new, self._path(file.name))

    def _path(self, name: str) -> str:
        return str(PurePosixPath(self._folder) / name)

    def _complain(self, what: str, error: Exception) -> None:
        print(f"{self._folder} could not be {what}: {type(error).__name__}: {error}", file=sys.stderr)


def task_url(storage: str, directory: TaskDirectory) -> str:
    """Where a task's files are kept: the same place when the search is resumed, another one when it begins anew."""
    search = directory.path.parent
    identity = read_search_journal(search).search_id or ""
    return f"{storage.rstrip('/')}/{search.name}-{identity[:12]}/{directory.path.name}"


def check_storage(url: str) -> None:
    """Writes and removes a file, before anything depends on it.

    Raises:
        SearchError: the storage cannot be written to.
        WorkerError: fsspec, or what it needs for this kind of URL, is not installed here.
    """
    files, folder = _open(url)
    probe = str(PurePosixPath(folder) / ".accumtune")
    try:
        files.makedirs(folder, exist_ok=True)
        files.pipe_file(probe, b"accumtune")
        files.rm(probe)
    except Exception as error:  # each kind of storage has its own
        raise SearchError(
            f"Received storage={url!r}, which cannot be written to: {type(error).__name__}: {error}",
            "a URL that fsspec can write to from every machine.",
            "look at its credentials and at the name of the bucket or the folder.",
        ) from error


def _open(url: str) -> tuple[Any, str]:
    try:
        import fsspec

        files, folder = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise WorkerError(
            f"Received storage={url!r}, and fsspec says: {error}",
            "a URL such as s3://bucket/folder, gs://bucket/folder, or file:///shared/folder.",
            "pip install 'accumtune[ray]' and what fsspec names (s3fs, gcsfs, adlfs), on every machine.",
        ) from error
    return files, folder


def _files_of(directory: TaskDirectory) -> tuple[Path, ...]:
    # The weights first: those of an epoch that is trained once more are written once more, not the other way round.
    return directory.weights_file, directory.checkpoint_file


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_ino, status.st_mtime_ns
