"""Starts a fork server, sends it requests, reads its answers, and ends it."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accumtune.errors import WorkerError

_START_SECONDS = 300.0  # importing TensorFlow from a cold disk has taken more than a minute
_REAP_SECONDS = 10.0
# -P, and no `-m`, keep the working directory off sys.path: a cloudpickle.py in it would be imported.
_START = """\
import sys
folder = sys.argv.pop(1)
if folder not in sys.path:
    sys.path.insert(0, folder)
from accumtune.execution.fork_server import main
main()
"""


class ForkServerClient:
    """Starts `accumtune.execution.fork_server` and communicates with it.

    Args:
        backend: the Keras backend that it imports.
        folder: for its log and its tasks' temporary files.
        on_message: called with each answer, in a thread of this object.
        on_end: called in that thread after the server's process has ended, for any reason.

    Raises:
        WorkerError: it could not be started.
    """

    def __init__(
        self,
        backend: str,
        folder: Path,
        on_message: Callable[[dict[str, Any]], None],
        on_end: Callable[[ForkServerClient], None],
    ) -> None:
        self._backend = backend
        self._log = folder / "forkserver.log"
        self._on_message, self._on_end = on_message, on_end
        self._connection, self._process = self._start(folder)
        self._is_open = True
        self._reader = threading.Thread(target=self._read, name="accumtune-executor", daemon=True)
        self._reader.start()

    def is_alive(self) -> bool:
        """Returns whether the server runs and its answers are read."""
        return self._is_open and self._process.poll() is None

    def send(self, request: dict[str, Any]) -> None:
        """Sends a request; if the server has ended, `on_end` is called instead of an error."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps(request).encode() + b"\n")

    def close(self) -> None:
        """Ends the server and all of its tasks, and waits for that."""
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_WR)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if threading.current_thread() is not self._reader:
            self._reader.join(timeout=10)
        self._connection.close()

    def broken(self, what: str) -> WorkerError:
        """Makes an error with the last lines of the server's log."""
        with contextlib.suppress(OSError):
            what += ". Its last lines:\n" + "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])
        return WorkerError(
            f"The process that starts trials {what}",
            f'a Python environment in which `import keras` works with KERAS_BACKEND="{self._backend}".',
            f"check that these can be imported: {_preload(self._backend).replace(',', ', ')}.",
        )

    def _start(self, folder: Path) -> tuple[socket.socket, subprocess.Popen[bytes]]:
        here = str(Path(__file__).resolve().parents[2])
        ours, theirs = socket.socketpair()
        arguments = [here, str(theirs.fileno()), _preload(self._backend), str(folder)]
        try:
            with theirs, open(self._log, "ab") as log:
                process = subprocess.Popen(
                    [sys.executable, "-P", "-c", _START, *arguments],
                    pass_fds=[theirs.fileno()],
                    # Its own session, so that Ctrl-C reaches only the search, which then stops its trials.
                    start_new_session=True,
                    env={**os.environ, "KERAS_BACKEND": self._backend},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
        except OSError as error:
            ours.close()
            raise self.broken(f"could not be started ({error})") from error
        ours.settimeout(_START_SECONDS)
        try:
            ready = ours.recv(2**16)
        except OSError:
            ready = b""
        if not ready:
            process.kill()
            process.wait()
            ours.close()
            raise self.broken(f"did not start within {_START_SECONDS:.0f} s or ended at once")
        ours.settimeout(None)
        return ours, process

    def _read(self) -> None:
        received = b""
        try:
            while chunk := self._receive():
                received += chunk
                *lines, received = received.split(b"\n")
                for line in lines:
                    self._on_message(json.loads(line))
        finally:  # without a reader, every later task would wait for ever
            self._is_open = False
            self._end_process()
            self._on_end(self)

    def _receive(self) -> bytes:
        try:
            return self._connection.recv(2**16)
        except OSError:
            return b""

    def _end_process(self) -> None:
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _reap_session(self._process.pid)


def _reap_session(session: int) -> None:
    """Reaps the server's tasks that this process has inherited, as PID 1 of a container does."""
    deadline = time.monotonic() + _REAP_SECONDS
    while (pids := _inherited(session)) and time.monotonic() < deadline:
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.01)


def _inherited(session: int) -> list[int]:
    found = []
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # ended meanwhile
            # After the name in parentheses: state, parent, process group, session.
            _, parent, _, its_session = file.read_text().rsplit(")", 1)[1].split()[:4]
            if (int(parent), int(its_session)) == (os.getpid(), session):
                found.append(int(file.parent.name))
    return found


def _preload(backend: str) -> str:
    """Returns what a task would otherwise import anew in its process; a module that is missing is left out."""
    # Keras imports TensorFlow on any backend when it first describes a model: 4 s and 500 MB, counted as the model's.
    modules = [backend, "tensorflow", "keras", "keras_tuner", "cloudpickle"]
    if backend == "tensorflow":
        modules.append("tensorboard.plugins.hparams.api")  # Keras Tuner does in every trial
    if backend == "jax":
        modules.append("jaxlib.mlir.dialects.mhlo")  # JAX does at the first compilation
    ours = (
        f"accumulation.engines.engine_{backend}", "accumulation.coupling.loss_trials", "accumulation.validation",
        "hypermodel", "worker.main", "worker.inspection", "worker.training", f"memory.device_{backend}",
    )  # fmt: skip
    return ",".join([*dict.fromkeys(modules), *(f"accumtune.{name}" for name in ours)])
