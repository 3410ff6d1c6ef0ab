"""Runs a task in a process of its own on an executor's worker, on any machine.

Only `run_here` is sent to an executor, by its name, so accumtune must be installed on the worker. A `LocalExecutor` in
the worker's process forks the task's process: memory limits, time-outs, crashes and outcomes are the same as on one
machine. If the worker is killed, its tasks end too.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import tempfile
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from pathlib import Path

from accumtune.execution.executors import LocalExecutor
from accumtune.execution.shared_storage import TaskStorage
from accumtune.tracking.small_files import write_atomically
from accumtune.worker.transport.outcome import Outcome
from accumtune.worker.transport.task_directory import TaskDirectory

_WATCH_SECONDS = 0.25
# Variables by which the executor selects this worker's devices; an older fork server does not have them.
_DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_lock = threading.Lock()


@dataclass(frozen=True)
class Request:
    """A task for a worker.

    Args:
        directory: of the task, which the worker may or may not see.
        task: the content of its task file, by which the worker recognizes the directory.
        environment, timeout_seconds, is_memory_limited, path, cwd: as for `LocalExecutor.submit`.
        storage_url: where a worker that does not see the directory keeps checkpoints.
    """

    backend: str
    directory: str
    task: str
    environment: Mapping[str, str]
    timeout_seconds: float | None
    is_memory_limited: bool
    path: tuple[str, ...]
    cwd: str
    storage_url: str | None = None


@dataclass(frozen=True)
class Files:
    """The contents of a task's files by their names, for a worker that does not share the search's storage."""

    task: Mapping[str, bytes]
    initial_weights: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Reply:
    """A worker's answer.

    Args:
        outcome: None if the worker neither sees the task's directory nor was sent the files.
        files: the files that the task has written, if the directory is not shared; of the journal only the new part.
    """

    outcome: Outcome | None
    files: Mapping[str, bytes] = field(default_factory=dict)


def run_here(request: Request, payload: Mapping[str, bytes] | None = None, files: Files | None = None) -> Reply:
    """Runs a task in a process of its own and waits for its end.

    Args:
        request: the task.
        payload: the hypermodel and the data, if storage is not shared; a separate argument, because Ray sends it to
            each machine once.
        files: the other files, if storage is not shared.
    """
    directory = TaskDirectory(Path(request.directory))
    if _is_here(directory, request.task):
        return Reply(_run(request, directory))
    if files is None or payload is None:
        return Reply(None)
    with tempfile.TemporaryDirectory(prefix="accumtune-task-") as folder:
        directory = _unpack(request, payload, files, Path(folder))
        storage = None if request.storage_url is None else TaskStorage(request.storage_url)
        if storage is not None:
            storage.fetch(directory)
        outcome = _run(request, directory, storage)
        return Reply(outcome, _pack_results(directory, files))


def read_folder(folder: Path) -> dict[str, bytes]:
    """Returns the contents of a folder's files, by their names relative to it."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Writes the files that `read_folder` returned."""
    for name, content in files.items():
        write_atomically(folder / name, content)


def _is_here(directory: TaskDirectory, task: str) -> bool:
    try:
        return directory.task_file.read_text() == task
    except OSError:
        return False


def _run(request: Request, directory: TaskDirectory, storage: TaskStorage | None = None) -> Outcome:
    executor = _local_executor(request.backend)
    devices = {name: os.environ[name] for name in _DEVICE_VARIABLES if name in os.environ}
    future = executor.submit(
        directory,
        {**request.environment, **devices},
        request.timeout_seconds,
        request.is_memory_limited,
        path=_importable(request.path),
        cwd=request.cwd if Path(request.cwd).is_dir() else os.getcwd(),
    )
    try:
        return _watch(future, executor, directory, storage)
    except BaseException:  # Ray's cancellation, or Ctrl-C: the outcome is no longer needed
        executor.kill(directory)
        raise


def _watch(
    future: Future[Outcome], executor: LocalExecutor, directory: TaskDirectory, storage: TaskStorage | None
) -> Outcome:
    parent = multiprocessing.parent_process()
    while True:
        try:
            return future.result(timeout=_WATCH_SECONDS)
        except FutureTimeoutError:
            if storage is not None:
                storage.keep(directory)
            # A process pool's busy workers outlive a search that is killed.
            if directory.is_to_stop_at_once() or (parent is not None and not parent.is_alive()):
                executor.kill(directory)


def _importable(path: tuple[str, ...]) -> list[str]:
    """Returns this process's `sys.path`, followed by those entries of the search's that exist here."""
    import sys

    return list(dict.fromkeys([*sys.path, *(entry for entry in path if os.path.exists(entry))]))


@functools.cache
def _executor_of_process(backend: str, pid: int) -> LocalExecutor:
    return LocalExecutor(backend)


def _local_executor(backend: str) -> LocalExecutor:
    """Returns the executor of this process, which all its tasks share, because importing the framework is slow."""
    with _lock:
        return _executor_of_process(backend, os.getpid())


def _unpack(request: Request, payload: Mapping[str, bytes], files: Files, folder: Path) -> TaskDirectory:
    """Creates the task's directory from the files that were sent, and adapts the paths in its task."""
    # The directory keeps its name, which is that of the trial.
    directory = TaskDirectory(folder / "task" / Path(request.directory).name)
    write_folder(folder / "payload", payload)
    write_folder(folder / "initial", files.initial_weights)
    write_folder(directory.path, files.task)
    task = json.loads(request.task)
    arguments = task["arguments"]
    arguments["payload"] = str(folder / "payload" / Path(arguments["payload"]).name)
    if arguments.get("initial_weights"):
        arguments["initial_weights"] = str(folder / "initial" / Path(arguments["initial_weights"]).name)
    directory.write_task(task["task"], arguments)
    return directory


def _pack_results(directory: TaskDirectory, sent: Files) -> dict[str, bytes]:
    results = read_folder(directory.path)
    results.pop(directory.task_file.name, None)
    journal = directory.journal_file.name
    if journal in results:
        results[journal] = results[journal][len(sent.task.get(journal, b"")) :]
    return results
