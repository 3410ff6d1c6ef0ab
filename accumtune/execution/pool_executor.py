"""Runs tasks on anything with `submit(function, *arguments) -> Future`: Ray, Dask, a pool of threads or processes.

Workers need not share the search's storage. A worker that sees the task's directory uses it, and an interrupted trial
continues from its last checkpoint. Otherwise the task's files are sent with the task, and the files that it writes come
back with its outcome; checkpoints are then kept in the pool's `storage`, if it has one.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accumtune.errors import WorkerError
from accumtune.execution.placement import Place, at_place, current_place
from accumtune.execution.remote_task import Files, Reply, Request, read_folder, run_here, write_folder
from accumtune.execution.shared_storage import TaskStorage, check_storage, task_url
from accumtune.worker.transport.outcome import Outcome
from accumtune.worker.transport.task_directory import TaskDirectory

_MAX_LOSSES = 10
_STOPPED = Outcome("killed", reason="the search was stopped")


class PoolExecutor:
    """Sends tasks to a pool and returns their outcomes.

    Args:
        pool: has `submit(function, *arguments) -> concurrent.futures.Future`. It may also have: `share(value)`, for an
            argument of many tasks; `kill(future)`; `is_loss(error)`, whether an error means that the worker was lost;
            `close_connection()`; `storage`, a URL that fsspec can write to from every machine.
        backend: the Keras backend of the tasks.

    Raises:
        SearchError: the pool's storage cannot be written to.
    """

    def __init__(self, pool: Any, backend: str) -> None:
        self.backend = backend
        self._pool = pool
        self._storage: str | None = getattr(pool, "storage", None)
        if self._storage is not None:
            check_storage(self._storage)
        self._lock = threading.Lock()
        self._tasks: dict[Future[Outcome], _Task] = {}
        self._payloads: dict[tuple[str, int], Any] = {}
        self._is_shared = True
        self._is_closing = False

    def submit(
        self,
        directory: TaskDirectory,
        environment: Mapping[str, str] | None = None,
        timeout_seconds: float | None = None,
        is_memory_limited: bool = False,
    ) -> Future[Outcome]:
        """Starts a task, as `LocalExecutor.submit`; if its worker or machine is lost, it ends as `"lost"`.

        Raises:
            WorkerError: the pool accepts no tasks.
        """
        place = current_place()
        request = Request(
            self.backend,
            str(directory.path.resolve()),
            directory.task_file.read_text(),
            {**(environment or {}), **place.environment},
            timeout_seconds,
            is_memory_limited,
            tuple(sys.path),
            os.getcwd(),
            None if self._storage is None else task_url(self._storage, directory),
        )
        future: Future[Outcome] = Future()
        future.set_running_or_notify_cancel()
        task = _Task(directory, request, place)
        with self._lock:
            if self._is_closing:
                future.set_result(_STOPPED)
                return future
            self._tasks[future] = task
        try:
            self._send(future, task)
        except BaseException:
            self._forget(future)
            raise
        return future

    def kill(self, directory: TaskDirectory) -> None:
        """Ends a task's process; it may take a moment."""
        with self._lock:
            tasks = [task for task in self._tasks.values() if task.directory == directory]
        for task in tasks:
            self._kill(task)

    def close(self) -> None:
        """Ends every task and completes all futures. The pool itself is not closed, except for a connection to Ray."""
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
            tasks = dict(self._tasks)
        for task in tasks.values():
            self._kill(task)
        for future in tasks:
            if not future.done():
                self._end(future, _STOPPED)
        close = getattr(self._pool, "close_connection", None)
        if close is not None:
            close()

    def _kill(self, task: _Task) -> None:
        task.directory.ask_to_stop(at_once=True)  # read by the worker, if storage is shared
        if task.sent is not None:
            kill = getattr(self._pool, "kill", None)
            if kill is not None:
                kill(task.sent)
            else:
                task.sent.cancel()

    def _send(self, future: Future[Outcome], task: _Task) -> None:
        arguments: tuple[Any, ...] = (task.request,)
        if not self._is_shared:
            arguments = (task.request, self._payload(task), _files(task))
        try:
            with at_place(task.place):
                sent = self._pool.submit(run_here, *arguments)
        except Exception as error:
            raise WorkerError(
                f"The executor {type(self._pool).__name__} accepts no more trials: {type(error).__name__}: {error}",
                "an executor that is open, with workers.",
                "restart it, then run the same script again: completed trials are kept.",
            ) from error
        task.sent = sent
        sent.add_done_callback(lambda done: self._receive(future, task, done))

    def _receive(self, future: Future[Outcome], task: _Task, done: Any) -> None:
        try:
            outcome = self._outcome(task, done)
            if outcome is None:
                self._send(future, task)
            elif self._is_closing and not outcome.is_completed and outcome.status != "stopped":
                self._end(future, _STOPPED)
            else:
                self._end(future, outcome)
        except BaseException as error:  # for the thread that waits
            self._end(future, error)

    def _outcome(self, task: _Task, done: Any) -> Outcome | None:
        """Returns a worker's answer; None if the task must be sent again."""
        try:
            reply: Reply = done.result()
        except BaseException as error:  # whatever a pool raises
            if not self._is_loss(error):
                raise
            if self._may_send_again(task):
                return None
            return Outcome("lost", reason=f"its worker was lost ({_first_line(error)})")
        if reply.outcome is None:
            self._is_shared = False  # the worker does not see the storage: from now on all tasks are sent with files
            return None
        _keep(task.directory, reply.files)
        if task.request.storage_url and reply.outcome.status != "stopped" and not self._is_closing:
            TaskStorage(task.request.storage_url).forget()  # the task will not be resumed
        return reply.outcome

    def _may_send_again(self, task: _Task) -> bool:
        """Returns whether to repeat a lost task. Trainings are left to the search: a new start is a new attempt."""
        task.losses += 1
        return not self._is_closing and task.losses < _MAX_LOSSES and json.loads(task.request.task)["task"] != "train"

    def _is_loss(self, error: BaseException) -> bool:
        if isinstance(error, (WorkerError, ImportError)):
            return False
        is_loss = getattr(self._pool, "is_loss", None)
        return isinstance(error, (Exception, CancelledError)) if is_loss is None else is_loss(error)

    def _end(self, future: Future[Outcome], result: Outcome | BaseException) -> None:
        if not self._forget(future):
            return
        if isinstance(result, Outcome):
            future.set_result(result)
        else:
            future.set_exception(_not_our_worker(result))

    def _forget(self, future: Future[Outcome]) -> bool:
        """Removes a task; returns False if it had ended already."""
        with self._lock:
            return self._tasks.pop(future, None) is not None

    def _payload(self, task: _Task) -> Any:
        """Returns the hypermodel and the data; they are read and shared once, until they change."""
        path = Path(json.loads(task.request.task)["arguments"]["payload"])
        key = str(path), path.stat().st_mtime_ns
        with self._lock:
            if key not in self._payloads:
                share = getattr(self._pool, "share", lambda value: value)
                self._payloads = {key: share(read_folder(path.parent))}
            return self._payloads[key]


@dataclass
class _Task:
    directory: TaskDirectory
    request: Request
    place: Place
    sent: Any = None
    losses: int = 0


def _files(task: _Task) -> Files:
    files = {name: content for name, content in read_folder(task.directory.path).items() if "/" not in name}
    initial = json.loads(task.request.task)["arguments"].get("initial_weights")
    if not initial:
        return Files(files)
    source = TaskDirectory(Path(initial).parent)
    paths = (path for path in (source.weights_file, source.build_config_file) if path.exists())
    return Files(files, {path.name: path.read_bytes() for path in paths})


def _keep(directory: TaskDirectory, files: Mapping[str, bytes]) -> None:
    """Writes the files that came back into the task's directory, and appends new lines to its journal."""
    files = dict(files)
    new_lines = files.pop(directory.journal_file.name, b"")
    if new_lines:
        with open(directory.journal_file, "ab") as journal:
            journal.write(new_lines)
    write_folder(directory.path, files)


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _not_our_worker(error: BaseException) -> BaseException:
    if isinstance(error, WorkerError):
        return error
    return WorkerError(
        f"A worker of the executor could not run a trial: {_first_line(error)}",
        "workers on which accumtune and your own modules can be imported.",
        "install the same packages on every machine, or give Ray a runtime_env.",
    )
