"""The next task starts, whatever happens to a task, to the process that forks it or to a file system."""

import ctypes
import errno
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import keras  # noqa: F401 - importing TensorFlow fails while sys.path has the Path of a test
import pytest

from accumtune.execution import fork_server as forkserver
from accumtune.execution import fork_server_client
from accumtune.execution.executors import LocalExecutor
from accumtune.worker.transport.outcome import DISK_FULL_EXIT_CODE, read_outcome
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import TaskDirectory

PR_SET_CHILD_SUBREAPER = 36


@pytest.fixture
def run(tmp_path):
    def run(executor, function, *arguments, task="call"):
        directory = TaskDirectory(tmp_path / function.__name__)
        payload = tmp_path / f"{function.__name__}.pkl"
        dump_payload({"function": function, "arguments": arguments}, payload)
        directory.write_task(task, {"payload": str(payload)})
        return executor.submit(directory).result(timeout=120)

    return run


def zombies():
    found = []
    for folder in Path("/proc").iterdir():
        try:
            state, parent = (folder / "stat").read_text().rsplit(")", 1)[1].split()[:2]
        except (OSError, IndexError):
            continue
        if folder.name.isdigit() and state == "Z" and int(parent) == os.getpid():
            found.append((folder.name, (folder / "stat").read_text()))
    return found


def settled(condition):
    deadline = time.monotonic() + 30
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


@pytest.fixture
def own_executor(tmp_path, monkeypatch, started_fork_servers):
    """A server of one's own, and a process that inherits orphans as PID 1 does."""
    (tmp_path / "cloudpickle.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w').close()")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, tmp_path / "modules"])
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    with LocalExecutor(os.environ["KERAS_BACKEND"]) as executor:
        yield executor
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 0)
    assert not zombies()


@pytest.mark.slow
def test_a_server_that_is_killed_is_started_anew_and_leaves_no_zombies(own_executor, run, tmp_path):
    def leave_a_child():
        subprocess.Popen(["sleep", "600"])
        os.kill(os.getpid(), signal.SIGKILL)

    def end_the_server_once():
        if not Path("ended").exists():
            Path("ended").touch()
            os.kill(os.getppid(), signal.SIGKILL)
            time.sleep(600)
        return "here"

    assert "SIGKILL" in run(own_executor, leave_a_child).reason
    assert settled(lambda: not zombies())
    outcome = run(own_executor, end_the_server_once)
    assert outcome.is_completed and outcome.result == {"value": "here"}
    assert settled(lambda: not zombies())
    assert not (tmp_path / "executed").exists()  # ./cloudpickle.py is not the package


def test_the_signals_without_a_name(executor, run):
    def end():
        os.kill(os.getpid(), 40)

    def go_on():
        return 1

    outcome = run(executor, end)
    assert outcome.status == "killed" and "signal 40" in outcome.reason
    assert run(executor, go_on).is_completed


def test_a_file_system_that_is_gone_is_an_outcome(executor, run, monkeypatch):
    def stale(directory):
        raise OSError(errno.ESTALE, "Stale file handle")

    def one():
        return 1

    def other():
        return 2

    with monkeypatch.context() as patch:
        patch.setattr(TaskDirectory, "read_outcome", stale)
        outcome = run(executor, one)
    assert outcome.status == "failed" and "Stale file handle" in outcome.reason
    assert run(executor, other).is_completed


def test_an_outcome_that_is_damaged(tmp_path):
    directory = TaskDirectory(tmp_path)
    for content in ('{"status": "comp', '{"state": "completed"}', "[]"):
        directory.outcome_file.write_text(content)
        assert "cannot be read" in read_outcome(directory, 0).reason


@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_what_the_server_imports_ahead_is_there(backend):
    """A missing module would only be written to the log, and each task would import it again."""
    ahead = [name for name in fork_server_client._preload(backend).split(",") if name.startswith("accumtune.")]
    assert "accumtune.worker.training" in ahead
    for name in ahead:
        assert importlib.util.find_spec(name), name


def test_a_fork_that_fails_is_an_outcome(monkeypatch, tmp_path):
    def fork():
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", fork)
    monkeypatch.setattr(forkserver, "_FORK_PAUSE_SECONDS", 0.0)
    ours, theirs = socket.socketpair()
    with ours, theirs:
        forkserver._Server(theirs)._start({"start": 7, "directory": str(tmp_path), "temporary": str(tmp_path / "7")})
        answer = json.loads(ours.recv(4096))
    assert answer["ended"] == 7 and "temporarily unavailable" in answer["error"]


def test_a_task_whose_process_cannot_be_forked_may_be_started_again(executor, tmp_path, monkeypatch):
    directory = TaskDirectory(tmp_path / "task")
    directory.write_task("call", {"payload": "none"})
    message = {"error": "[Errno 12] Cannot allocate memory"}
    monkeypatch.setattr(
        executor._server, "send", lambda request: executor._handle({"ended": request["start"], **message})
    )
    outcome = executor.submit(directory).result(timeout=60)
    assert outcome.status == "lost" and "Cannot allocate memory" in outcome.reason


def test_a_task_on_a_full_disk_says_so(tmp_path):
    assert "no space left" in read_outcome(TaskDirectory(tmp_path), DISK_FULL_EXIT_CODE).reason


def test_a_socket_in_a_trial_of_a_long_path(executor, tmp_path):
    def listen():
        import multiprocessing.connection

        with multiprocessing.connection.Listener(family="AF_UNIX"):
            return True

    directory = TaskDirectory(tmp_path / ("project" * 12) / "trial_0001")
    payload = tmp_path / "payload.pkl"
    dump_payload({"function": listen, "arguments": ()}, payload)
    directory.write_task("call", {"payload": str(payload)})
    outcome = executor.submit(directory).result(timeout=60)
    assert outcome.is_completed, outcome
