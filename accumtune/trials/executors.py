"""Where tasks run: `submit(directory) -> Future[Outcome]`, each in a process of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from accumtune.errors import WorkerError
from accumtune.trials.devices import current_place
from accumtune.trials.directory import TaskDirectory
from accumtune.trials.outcome import Outcome, read_outcome

_START_SECONDS = 300.0  # importing TensorFlow from a cold disk has taken more than a minute


class Executor(Protocol):
    """What the search needs of a place where tasks run; see `LocalExecutor` for what the arguments mean."""

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
        backend: the Keras backend that is imported ahead, `"tensorflow"`, `"jax"` or `"torch"`.

    Raises:
        WorkerError: the process that starts the tasks could not be started.
    """

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self._lock = threading.Lock()
        self._tasks: dict[int, _Task] = {}
        self._next_number = 0
        self._is_closing = False
        self._log = tempfile.NamedTemporaryFile(prefix="accumtune-forkserver-", suffix=".log")
        self._connection, self._process = self._start_server()
        self._reader = threading.Thread(target=self._read, name="accumtune-executor", daemon=True)
        self._reader.start()

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
            is_memory_limited: whether the environment limits the allocator: then a crash is taken for the lack of
                memory that it is (TensorFlow's oneDNN kernels use a buffer that they did not get).
            path, cwd: where the child looks for modules, and where it runs; default: as this process.

        Returns:
            A future that always ends in an `Outcome`; `future.cancel()` has no effect on a task that runs, use
            `kill(directory)`.
        """
        future: Future[Outcome] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            if self._is_closing:
                future.set_result(Outcome("killed", reason="the search was stopped"))
                return future
            number = self._next_number
            self._next_number += 1
            self._tasks[number] = _Task(directory, future, is_memory_limited)
            request = {
                "start": number,
                "directory": str(directory.path.resolve()),
                "environment": {**(environment or {}), **current_place().environment},
                "path": list(path or sys.path),
                "cwd": cwd or os.getcwd(),
            }
            self._send(request)
            task = self._tasks[number]
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
                    self._send({"kill": number})

    def is_alive(self) -> bool:
        """Whether it can start tasks."""
        return not self._is_closing and self._process.poll() is None

    def close(self) -> None:
        """Ends every task and the server; returns when they are gone."""
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
        self._connection.shutdown(socket.SHUT_WR)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join(timeout=10)
        self._connection.close()
        self._log.close()

    def __enter__(self) -> LocalExecutor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _start_server(self) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "accumtune.trials.forkserver", str(theirs.fileno()), _preload(self.backend)]
        with theirs:
            process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                # Its own session: Ctrl-C in the terminal is for the search, which then decides about its trials.
                start_new_session=True,
                env={**os.environ, "KERAS_BACKEND": self.backend, "PYTHONPATH": _python_path()},
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
            )
        ours.settimeout(_START_SECONDS)
        try:
            ready = ours.recv(2**16)
        except TimeoutError:
            ready = b""
        if not ready:
            process.kill()
            raise self._broken(f"did not start within {_START_SECONDS:.0f} s or ended at once")
        ours.settimeout(None)
        return ours, process

    def _send(self, request: dict[str, Any]) -> None:
        try:
            self._connection.sendall(json.dumps(request).encode() + b"\n")
        except OSError as error:
            if not self._is_closing:
                raise self._broken(f"does not answer ({error})") from error

    def _read(self) -> None:
        received = b""
        while True:
            try:
                chunk = self._connection.recv(2**16)
            except OSError:
                chunk = b""
            if not chunk:
                break
            received += chunk
            *lines, received = received.split(b"\n")
            for line in lines:
                self._handle(json.loads(line))
        self._fail_the_rest()

    def _handle(self, message: dict[str, Any]) -> None:
        if "started" in message:
            self._tasks[message["started"]].pid = message["pid"]
            return
        with self._lock:
            task = self._tasks.pop(message["ended"])
        if task.timer is not None:
            task.timer.cancel()
        outcome = read_outcome(task.directory, message["exit_code"], task.pid, task.is_memory_limited)
        if task.timed_out_after is not None and not outcome.is_completed:
            reason = f"it was stopped after {task.timed_out_after:g} s (trial_timeout_seconds)"
            outcome = Outcome("timed_out", reason=reason, traceback=task.directory.log_tail(), pid=task.pid)
        task.future.set_result(outcome)

    def _time_out(self, number: int, seconds: float) -> None:
        with self._lock:
            if number in self._tasks:
                self._tasks[number].timed_out_after = seconds
                self._send({"kill": number})

    def _fail_the_rest(self) -> None:
        with self._lock:
            tasks, self._tasks = list(self._tasks.values()), {}
        for task in tasks:
            if self._is_closing:
                task.future.set_result(Outcome("killed", reason="the search was stopped", pid=task.pid))
            else:
                task.future.set_exception(self._broken("ended unexpectedly"))

    def _broken(self, what: str) -> WorkerError:
        log = Path(self._log.name).read_text(errors="replace").splitlines()[-15:]
        return WorkerError(
            f"The process that starts trials {what}. Its last lines:\n" + "\n".join(log),
            f'a Python environment in which `import keras` works with KERAS_BACKEND="{self.backend}".',
            "run `python -m accumtune.trials.forkserver` 's imports by hand: "
            f"{_preload(self.backend).replace(',', ', ')}.",
        )


@dataclass
class _Task:
    directory: TaskDirectory
    future: Future[Outcome]
    is_memory_limited: bool = False
    pid: int | None = None
    timer: threading.Timer | None = None
    timed_out_after: float | None = None


def _preload(backend: str) -> str:
    modules = [backend, "keras", "keras_tuner", "cloudpickle", f"accumtune.accumulation.{backend}"]
    if backend == "tensorflow":
        # Keras Tuner imports it in every trial.
        modules.append("tensorboard.plugins.hparams.api")
    ours = ("trials.worker", "trials.signature", "trials.fitting", "trials.checkpoint", "trials.callbacks")
    return ",".join([*modules, *(f"accumtune.{name}" for name in (*ours, f"memory.{backend}", "memory.watching"))])


def _python_path() -> str:
    # The server finds accumtune where this process found it, also when it is not installed.
    here = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
