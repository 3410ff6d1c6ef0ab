"""Keeps the files with which another machine can resume a trial in a shared storage, through fsspec.

It is used by workers that do not see the search's own folder. A worker copies a trial's checkpoint and its best weights
to `<url>/<search>/<trial>` whenever they are written; a worker that resumes the trial fetches them. The search removes
them when the trial has ended. All other files are sent with the task and back.
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
        WorkerError: fsspec, or its package for this kind of URL, is not installed here.
    """

    def __init__(self, url: str) -> None:
        self._files, self._folder = _open(url)
        self._kept: dict[str, tuple[int, int]] = {}

    def fetch(self, directory: TaskDirectory) -> None:
        """Copies the files that an earlier worker has kept into the task's directory."""
        for file in _files_of(directory):
            try:
                write_atomically(file, self._files.cat_file(self._path(file.name)))
                self._kept[file.name] = _identity(file)
            except FileNotFoundError:
                continue
            except Exception as error:  # each kind of storage has its own; training starts from the beginning then
                self._complain("read", error)

    def keep(self, directory: TaskDirectory) -> None:
        """Copies files that have changed. A failure does not affect the training; it is printed to the worker's log."""
        for file in _files_of(directory):
            try:
                identity = _identity(file)
                if self._kept.get(file.name) != identity:
                    self._put(file)
                    self._kept[file.name] = identity
            except FileNotFoundError:  # there is no checkpoint yet, or no longer
                continue
            except Exception as error:
                self._complain("written", error)

    def forget(self) -> None:
        """Removes the files, after the task has ended."""
        try:
            self._files.rm(self._folder, recursive=True)
        except FileNotFoundError:
            pass
        except Exception as error:
            self._complain("removed", error)

    def _put(self, file: Path) -> None:
        # Under another name first, so that a worker that resumes never finds an incomplete file.
        new = self._path(f"new.{file.name}")
        self._files.makedirs(self._folder, exist_ok=True)
        self._files.pipe_file(new, file.read_bytes())
        self._files.mv(new, self._path(file.name))

    def _path(self, name: str) -> str:
        return str(PurePosixPath(self._folder) / name)

    def _complain(self, what: str, error: Exception) -> None:
        print(f"{self._folder} could not be {what}: {type(error).__name__}: {error}", file=sys.stderr)


def task_url(storage: str, directory: TaskDirectory) -> str:
    """Returns the URL of a task's files, which stays the same in a resumed search and differs in a new one."""
    search = directory.path.parent
    identity = read_search_journal(search).search_id or ""
    return f"{storage.rstrip('/')}/{search.name}-{identity[:12]}/{directory.path.name}"


def check_storage(url: str) -> None:
    """Checks that a storage can be written to, by writing and removing a file.

    Raises:
        SearchError: the storage cannot be written to.
        WorkerError: fsspec, or its package for this kind of URL, is not installed here.
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
            "check the credentials and the name of the bucket or the folder.",
        ) from error


def _open(url: str) -> tuple[Any, str]:
    try:
        import fsspec

        files, folder = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise WorkerError(
            f"Received storage={url!r}, and fsspec says: {error}",
            "a URL such as s3://bucket/folder, gs://bucket/folder, or file:///shared/folder.",
            "pip install 'accumtune[ray]' and the package that fsspec names (s3fs, gcsfs, adlfs), on every machine.",
        ) from error
    return files, folder


def _files_of(directory: TaskDirectory) -> tuple[Path, ...]:
    # The weights first: if the checkpoint is older, its next epoch is trained again and writes its weights again.
    return directory.weights_file, directory.checkpoint_file


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_ino, status.st_mtime_ns
