"""Names the files of a task (a trial, a probe) and of a search, and explains errors in writing them."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accumtune.errors import SearchDirectoryError
from accumtune.tracking.small_files import write_atomically


def check_writable(folder: Path) -> None:
    """Creates a folder and checks that it can be written to.

    Raises:
        SearchDirectoryError: it cannot be written to.
    """
    with clear_disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".writable.{os.getpid()}"
        try:
            probe.write_bytes(b"\0" * 4096)
        finally:
            probe.unlink(missing_ok=True)


@contextlib.contextmanager
def clear_disk_errors(folder: Path) -> Iterator[None]:
    """Replaces the operating system's error about a read-only folder or a full disk by one that says what to do.

    Raises:
        SearchDirectoryError: the folder cannot be written to.
    """
    try:
        yield
    except OSError as error:
        where = Path(error.filename).resolve() if isinstance(error.filename, str) else folder.resolve()
        if error.errno not in _DISK_ERRORS or not where.is_relative_to(folder.resolve()):
            raise
        full = is_disk_full(error)
        raise SearchDirectoryError(
            f"The search directory {folder} cannot be written to: {error.strerror} ({error.filename or folder}).",
            "a folder on a disk with space left" if full else "a folder that can be written to",
            ("free some space" if full else "correct its permissions, or give another directory=")
            + ", then run the same script again: completed trials are kept.",
        ) from error


def is_disk_full(error: BaseException) -> bool:
    """Returns whether an error says that there is no space left, on the disk or in the user's quota."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST)


@dataclass(frozen=True)
class TaskDirectory:
    """The directory of one task, which is one process, and the names of all files in it.

    Args:
        path: the directory. It is created when something is written.
    """

    path: Path

    @property
    def task_file(self) -> Path:
        """The name of a task and its arguments (JSON), written by the search."""
        return self.path / "task.json"

    @property
    def outcome_file(self) -> Path:
        """How the task ended (JSON), written by the child; missing if the child could not write it."""
        return self.path / "outcome.json"

    @property
    def prune_file(self) -> Path:
        """Written by the search to end a hopeless trial after its present epoch, as completed."""
        return self.path / "prune"

    @property
    def log_file(self) -> Path:
        """Everything that the child printed."""
        return self.path / "log.txt"

    @property
    def journal_file(self) -> Path:
        """The trial's events (see `accumtune.tracking.journal`)."""
        return self.path / "journal.jsonl"

    @property
    def weights_file(self) -> Path:
        """The weights of the best epoch, under Keras Tuner's own name."""
        return self.path / "checkpoint.weights.h5"

    @property
    def build_config_file(self) -> Path:
        """Keras's build configuration, under Keras Tuner's own name."""
        return self.path / "build_config.json"

    @property
    def checkpoint_file(self) -> Path:
        """The state of an interrupted training (see `worker.checkpoint`); deleted when it has ended."""
        return self.path / "continue.npz"

    @property
    def stop_file(self) -> Path:
        """While it exists, the task is asked to save its state after its present epoch and to end."""
        return self.path / "stop"

    def ask_to_stop(self, at_once: bool = False) -> None:
        """Writes the stop file; `at_once` asks the process that supervises the task to kill it."""
        with contextlib.suppress(OSError):  # without the directory there is nothing to stop
            write_atomically(self.stop_file, "at once" if at_once else "after this epoch")

    def is_to_stop_at_once(self) -> bool:
        try:
            return self.stop_file.read_text() == "at once"
        except OSError:
            return False

    def write_task(self, name: str, arguments: dict[str, Any]) -> None:
        """Prepares the directory for a new process, and deletes the outcome of an earlier one."""
        self.path.mkdir(parents=True, exist_ok=True)
        self.outcome_file.unlink(missing_ok=True)
        self.stop_file.unlink(missing_ok=True)
        self.prune_file.unlink(missing_ok=True)
        write_atomically(self.task_file, json.dumps({"task": name, "arguments": arguments}))

    def read_task(self) -> tuple[str, dict[str, Any]]:
        task = json.loads(self.task_file.read_text())
        return task["task"], task["arguments"]

    def write_outcome(self, outcome: dict[str, Any]) -> None:
        write_atomically(self.outcome_file, json.dumps(outcome))

    def read_outcome(self) -> dict[str, Any] | None:
        try:
            outcome: dict[str, Any] = json.loads(self.outcome_file.read_text())
        except FileNotFoundError:
            return None
        return outcome

    def log_tail(self, lines: int = 20) -> str:
        """Returns the last lines that the child printed."""
        try:
            return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-lines:])
        except OSError:  # not written, or on a lost file system
            return ""


@dataclass(frozen=True)
class SearchDirectory:
    """The directory of a search: Keras Tuner's files, a directory for each trial, and files that trials share.

    Args:
        path: `<directory>/<project_name>`.
    """

    path: Path

    @property
    def journal_file(self) -> Path:
        return self.path / "search.jsonl"

    @property
    def payload_file(self) -> Path:
        """The hypermodel and the data, for all trials. Its arrays are in `payload/arrays`."""
        return self.path / "payload" / "payload.pkl"

    @property
    def profiles_folder(self) -> Path:
        """The profiles of models, a file for each memory signature."""
        return self.path / "profiles"

    @property
    def report_folder(self) -> Path:
        return self.path / "report"

    @property
    def scratch_folder(self) -> Path:
        """The directories of tasks that are not trials: discovering the space, inspecting and probing models."""
        return self.path / "scratch"

    def trial(self, trial_id: str) -> TaskDirectory:
        """The directory of a trial, under Keras Tuner's own name."""
        return TaskDirectory(self.path / f"trial_{trial_id}")
