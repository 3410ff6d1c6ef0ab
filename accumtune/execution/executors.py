"""Runs tasks, each in a process of its own: `submit(directory) -> Future[Outcome]`."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from accumtune.execution.fork_server_client import ForkServerClient
from accumtune.execution.placement import current_place
from accumtune.execution.platform_support import require_linux
from accumtune.worker.transport.outcome import Outcome, read_outcome
from accumtune.worker.transport.task_directory import TaskDirectory

# The function that a forked process runs.
_ENTRY_POINT = "accumtune.worker.main:run_task"
_MAX_LOSSES = 2
_STOPPED = Outcome("killed", reason="the search was stopped")


class Executor(Protocol):
    """Runs a search's tasks; `LocalExecutor` documents the arguments."""

    backend: str

    def submit(
        self,
        directory: TaskDirectory,
        environment: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
        is_memory_limited: bool = False,
    ) -> Future[Outcome]: ...

    def kill(self, directory: TaskDirectory) -> None: ...

    def close(self) -> None: ...


class LocalExecutor:
    """Runs tasks in forked processes on this machine.

    Args:
        backend: the Keras backend that is imported in advance, `"tensorflow"`, `"jax"` or `"torch"`.

    Raises:
        WorkerError: the process that starts the tasks could not be started, or this is not Linux.
    """

    def __init__(self, backend: str) -> None:
        require_linux("What runs a model in a process of its own")
        self.backend = backend
        self._lock = threading.RLock()
        self._tasks: dict[int, _Task] = {}
        self._next_number = 0
        self._is_closing = False
        # Among the system's temporary files, because a socket's path may have at most 107 characters.
        self._folder = tempfile.TemporaryDirectory(prefix="accumtune-", ignore_cleanup_errors=True)
        self._server = self._start_server()

    def submit(
        self,
        directory: TaskDirectory,
        environment: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
        is_memory_limited: bool = False,
        *,
        path: Sequence[str] | None = None,
        cwd: str | None = None,
    ) -> Future[Outcome]:
        """Starts the task that was written into `directory`, on the `current_place()` of the thread that calls.

        Args:
            directory: a directory with a task file.
            environment: variables that the child sets before it uses the framework.
            timeout_seconds: after this time the task is killed; its outcome is `"timed_out"`.
            is_memory_limited: whether the environment limits the allocator. A crash then counts as out of memory,
                because TensorFlow's oneDNN kernels do not check whether they got their buffer.
            path, cwd: the child's `sys.path` and working directory; default: those of this process.

        Returns:
            A future that ends in an `Outcome`, or in a WorkerError if processes can no longer be started.
            `future.cancel()` does not end a running task; use `kill(directory)`.
        """
        future: Future[Outcome] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._is_closing:
                future.set_result(_STOPPED)
                return future
            number = self._next_number
            self._next_number += 1
            request = {
                "start": number,
                "run": _ENTRY_POINT,
                "directory": str(directory.path.resolve()),
                "temporary": str(self._temporary(number)),
                "environment": {**(environment or {}), **current_place().environment},
                # Python ignores entries that are not texts.
                "path": [entry for entry in (path or sys.path) if isinstance(entry, str)],
                "cwd": cwd or os.getcwd(),
            }
            task = _Task(directory, future, request, is_memory_limited)
            self._begin(number, task)
        if timeout_seconds is not None:
            timer = threading.Timer(timeout_seconds, self._time_out, (number, timeout_seconds))
            timer.daemon = True
            task.timer = timer
            timer.start()
        return future

    def kill(self, directory: TaskDirectory) -> None:
        """Ends a task's process and all that it has started."""
        with self._lock:
            for number, task in self._tasks.items():
                if task.directory == directory:
                    self._server.send({"kill": number})

    def close(self) -> None:
        """Ends every task and the server, and waits for that."""
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
        self._server.close()
        self._folder.cleanup()

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start_server(self) -> ForkServerClient:
        return ForkServerClient(self.backend, Path(self._folder.name), self._handle, self._take_over)

    def _begin(self, number: int, task: _Task) -> None:
        if not self._server.is_alive():
            self._server = self._start_server()
        task.server = self._server
        self._tasks[number] = task
        self._server.send(task.request)

    def _handle(self, message: dict[str, Any]) -> None:
        with self._lock:
            if "started" in message:
                self._tasks[message["started"]].pid = message["pid"]
                return
            task = self._tasks.pop(message["ended"])
        try:
            if "error" in message:
                reason = f"no process could be started for it: {message['error']}"
                self._end(task, Outcome("lost", reason=reason))
            else:
                self._end(task, _outcome(task, message["exit_code"]))
        except Exception as error:  # for the thread that waits
            task.future.set_exception(error)

    def _end(self, task: _Task, outcome: Outcome) -> None:
        if task.timer is not None:
            task.timer.cancel()
        if task.timed_out_after is not None and not outcome.is_completed:
            reason = f"it was stopped after {task.timed_out_after:g} s (see trial_timeout_seconds)"
            outcome = Outcome("timed_out", reason=reason, traceback=task.directory.log_tail(), pid=task.pid)
        task.future.set_result(outcome)

    def _time_out(self, number: int, seconds: float) -> None:
        with self._lock:
            if number in self._tasks:
                self._tasks[number].timed_out_after = seconds
                self._server.send({"kill": number})

    def _take_over(self, server: ForkServerClient) -> None:
        """Handles the tasks of a server that has ended: they have an outcome, or start again, or end as lost."""
        with self._lock:
            tasks = {number: task for number, task in self._tasks.items() if task.server is server}
            for number in tasks:
                del self._tasks[number]
        for number, task in tasks.items():
            shutil.rmtree(self._temporary(number), ignore_errors=True)
            try:
                self._end_or_repeat(number, task)
            except Exception as error:  # for the thread that waits
                task.future.set_exception(error)

    def _end_or_repeat(self, number: int, task: _Task) -> None:
        outcome = _outcome(task, None)
        with self._lock:
            if outcome.status == "lost" and not self._is_closing and self._may_repeat(task):
                self._begin(number, task)
                return
        if outcome.status == "lost" and self._is_closing:
            outcome = replace(_STOPPED, pid=task.pid)
        self._end(task, outcome)

    def _may_repeat(self, task: _Task) -> bool:
        """Returns whether to repeat a task here. Trainings are left to the search: a new start is a new attempt."""
        task.losses += 1
        if task.losses > _MAX_LOSSES or task.timed_out_after is not None:
            return False
        return task.directory.read_task()[0] != "train"

    def _temporary(self, number: int) -> Path:
        return Path(self._folder.name) / str(number)


@dataclass
class _Task:
    directory: TaskDirectory
    future: Future[Outcome]
    request: dict[str, Any]
    is_memory_limited: bool = False
    server: ForkServerClient | None = None
    pid: int | None = None
    timer: threading.Timer | None = None
    timed_out_after: float | None = None
    losses: int = 0


def _outcome(task: _Task, exit_code: int | None) -> Outcome:
    """Returns the outcome of a task; the exit code is None if its end was not seen."""
    if exit_code is None and not task.directory.outcome_file.exists():
        return Outcome("lost", reason="the process that starts trials ended unexpectedly", pid=task.pid)
    return read_outcome(task.directory, exit_code or 0, task.pid, task.is_memory_limited)
