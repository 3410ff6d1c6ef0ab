"""A small process that has the framework imported and forks a child for each task.

Importing TensorFlow takes ten seconds, forking a process that has imported it takes milliseconds. `multiprocessing`'s
fork server imports the user's script again in every child (so the script needs an `if __name__ == "__main__"` guard);
this one does not.

The search starts it with one end of a socket pair and writes a line of JSON per request. The function in the request
gets the directory and returns an exit code.

    {"start": 7, "run": "module:function", "directory": "...", "temporary": "...", "environment": {...}, "path": [...],
     "cwd": "..."}
    {"kill": 7}

It answers `{"started": 7, "pid": 4242}` and `{"ended": 7, "exit_code": 0}` (a signal's number is negative, as in
`subprocess`), or `{"ended": 7, "error": "..."}` if no process could be forked. When the search ends, the socket closes,
and the server kills all children and ends.

Forking after the import is safe as long as no operation has run and no device was listed; the server only imports.
(Keras asks torch for a GPU when it is imported. PYTORCH_NVML_BASED_CUDA_CHECK makes torch ask the driver's NVML instead
of CUDA, which does not survive a fork; see torch's notes on CUDA semantics.)
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path
from typing import Any

from accumtune.execution.placement import apply_place
from accumtune.worker.child_process import adopt_orphans, die_with_parent, end_process
from accumtune.worker.quiet_imports import without_notes

_FORK_TRIES, _FORK_PAUSE_SECONDS = 5, 0.5
_ORPHAN_SECONDS = 2.0


class _Server:
    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._received = b""
        self._children: dict[int, tuple[int, Path]] = {}  # process id -> task and its temporary files

    def serve(self) -> None:
        wake_reader, wake_writer = os.pipe()
        os.set_blocking(wake_reader, False)
        os.set_blocking(wake_writer, False)
        signal.set_wakeup_fd(wake_writer, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        self._send({"ready": True})
        while True:
            connection = self._connection.fileno()
            readable, _, _ = select.select([connection, wake_reader], [], [])
            if wake_reader in readable:
                os.read(wake_reader, 4096)
            self._reap()
            if connection in readable and not self._receive():
                break
        for pid in self._children:
            _kill_group(pid)
        for pid in self._children:
            os.waitpid(pid, 0)
        deadline = time.monotonic() + _ORPHAN_SECONDS
        while _wait_for_any() is not None and time.monotonic() < deadline:
            time.sleep(0.01)

    def _receive(self) -> bool:
        """Handles the requests that have come in; returns False when the search has ended."""
        try:
            chunk = self._connection.recv(2**16)
        except ConnectionError:
            return False
        self._received += chunk
        *lines, self._received = self._received.split(b"\n")
        for line in lines:
            request = json.loads(line)
            if "start" in request:
                self._start(request)
            elif "kill" in request:
                for pid, (task, _) in self._children.items():
                    if task == request["kill"]:
                        _kill_group(pid)
        return bool(chunk)

    def _start(self, request: dict[str, Any]) -> None:
        try:
            pid = _fork()
        except OSError as error:
            self._send({"ended": request["start"], "error": str(error)})
            return
        if pid == 0:
            self._connection.close()
            _run_child(request)
        _make_group(pid)
        self._children[pid] = (request["start"], Path(request["temporary"]))
        self._send({"started": request["start"], "pid": pid})

    def _reap(self) -> None:
        while ended := _wait_for_any():
            pid, status = ended
            if pid not in self._children:
                continue  # an orphan of a task, which this process has inherited
            # The task's own children must not outlive it.
            _kill_group(pid)
            task, temporary = self._children.pop(pid)
            shutil.rmtree(temporary, ignore_errors=True)
            self._send({"ended": task, "exit_code": os.waitstatus_to_exitcode(status)})

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self._connection.sendall(json.dumps(message).encode() + b"\n")
        except ConnectionError:
            pass  # the search has ended, which the next read finds too


def _fork() -> int:
    for _ in range(_FORK_TRIES - 1):
        try:
            return os.fork()
        except OSError:  # no memory, or too many processes, at the moment
            time.sleep(_FORK_PAUSE_SECONDS)
    return os.fork()


def _wait_for_any() -> tuple[int, int] | tuple[()] | None:
    """Returns the process id and status of a child that has ended, () if all still run, None if there is none."""
    try:
        pid, status = os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return None
    return (pid, status) if pid else ()


def _make_group(pid: int) -> None:
    # Both parent and child call this, as shells do, so that the group exists when it is to be killed.
    try:
        os.setpgid(pid, pid)
    except (ProcessLookupError, PermissionError):
        pass


def _kill_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    except PermissionError:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _run_child(request: dict[str, Any]) -> None:
    """Runs one task in a forked child and never returns."""

    def run() -> int:
        _settle_child(request)
        module, _, function = request["run"].partition(":")
        exit_code: int = getattr(importlib.import_module(module), function)(Path(request["directory"]))
        return exit_code

    end_process(run)


def _settle_child(request: dict[str, Any]) -> None:
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    _make_group(0)
    die_with_parent()
    directory = Path(request["directory"])
    log = os.open(directory / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(request["environment"])
    # A forked child ends without the interpreter's shutdown, or is killed. A folder of its own for temporary files
    # (TensorFlow's autograph leaves a module per function) can be removed afterwards.
    os.makedirs(request["temporary"], exist_ok=True)
    os.environ["TMPDIR"] = request["temporary"]
    tempfile.tempdir = None
    os.chdir(request["cwd"])
    sys.path[:] = request["path"]
    apply_place()


def main() -> None:
    """Runs as `python -P -c ... FILE_DESCRIPTOR MODULE,MODULE,... FOLDER`, see `fork_server_client`."""
    _, descriptor, modules, folder = sys.argv
    connection = socket.socket(fileno=int(descriptor))
    connection.set_inheritable(False)
    os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")
    for module in modules.split(","):
        try:
            with warnings.catch_warnings(), without_notes():
                warnings.simplefilter("ignore")
                importlib.import_module(module)
        except ImportError:
            traceback.print_exc()  # a task that needs it will fail with its own traceback
    # Excludes the imported modules from garbage collection, which would copy all their pages in each child.
    gc.collect()
    gc.freeze()
    adopt_orphans()
    _Server(connection).serve()
    shutil.rmtree(folder, ignore_errors=True)
    # Without the interpreter's shutdown, which takes seconds with a framework.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
