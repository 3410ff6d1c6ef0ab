"""A task is a process: it ends with a result, an exception or without a message, and affects no other process."""

import os
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
from running import wait_until_gone

from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import TaskDirectory


@pytest.fixture
def run(executor, tmp_path):
    """Runs a function in a process of its own and returns the outcome."""

    def run(function, *arguments, environment=None, timeout_seconds=None):
        directory = TaskDirectory(tmp_path / function.__name__)
        payload = tmp_path / f"{function.__name__}.pkl"
        dump_payload({"function": function, "arguments": arguments}, payload)
        directory.write_task("call", {"payload": str(payload)})
        return executor.submit(directory, environment, timeout_seconds).result(timeout=60)

    return run


def test_result_comes_back_and_prints_go_to_the_log(run, tmp_path):
    def add(a, b):
        print("adding")
        return a + b

    outcome = run(add, 2, 3)
    assert outcome.is_completed and outcome.result == {"value": 5}
    assert "adding" in (tmp_path / "add" / "log.txt").read_text()


def test_a_path_object_in_sys_path_is_passed_over_as_python_does(run, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [tmp_path, *sys.path])

    def look():
        import sys

        return [type(entry).__name__ for entry in sys.path]

    assert set(run(look).result["value"]) == {"str"}


def test_a_child_has_the_framework_already_and_the_parent_is_not_touched(run):
    def look():
        import sys

        return [os.getpid(), "keras" in sys.modules, os.environ.get("COLOUR")]

    outcome = run(look, environment={"COLOUR": "blue"})
    pid, has_keras, colour = outcome.result["value"]
    assert pid != os.getpid() and has_keras and colour == "blue"
    assert "COLOUR" not in os.environ


def test_an_exception_keeps_its_traceback(run):
    def stumble():
        raise KeyError("width")

    outcome = run(stumble)
    assert outcome.status == "failed"
    assert outcome.reason == "KeyError: 'width'"
    assert "in stumble" in outcome.traceback


def test_a_kill_is_told_apart_from_an_exception(run):
    def die():
        print("last words", flush=True)
        os.kill(os.getpid(), 9)

    outcome = run(die)
    assert outcome.status == "killed"
    assert "SIGKILL" in outcome.reason and "last words" in outcome.traceback


def test_an_exit_without_an_outcome(run):
    def leave():
        os._exit(3)

    outcome = run(leave)
    assert outcome.status == "failed" and "exit code 3" in outcome.reason


def test_a_hanging_task_is_stopped_with_all_that_it_started(run, tmp_path):
    pid_file = tmp_path / "pid"

    def hang():
        child = subprocess.Popen(["sleep", "600"])
        pid_file.write_text(str(child.pid))
        time.sleep(600)

    outcome = run(hang, timeout_seconds=1.0)
    assert outcome.status == "timed_out" and "1 s" in outcome.reason
    assert wait_until_gone(int(pid_file.read_text()))


def test_a_task_in_time_is_not_stopped(run):
    def quick():
        return "done"

    assert run(quick, timeout_seconds=30.0).is_completed


def test_large_arrays_arrive_as_memory_maps(run):
    def describe(array, small):
        return [type(array).__name__, float(array.sum()), type(small).__name__, array.flags.writeable]

    outcome = run(describe, np.ones((100, 1000)), np.ones(3))
    assert outcome.result["value"] == ["memmap", 100_000.0, "ndarray", False]


@pytest.mark.slow
def test_a_script_without_a_main_guard_runs_once_and_its_children_die_with_it(tmp_path):
    """multiprocessing's own fork server imports the script again in every child, which would start searches again."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, pathlib, time
            from accumtune.worker.transport.task_directory import TaskDirectory
            from accumtune.execution.executors import LocalExecutor
            from accumtune.worker.transport.payload import dump_payload

            folder = pathlib.Path(__file__).parent
            with open(folder / "runs", "a") as file:
                file.write("x")

            def wait():
                (folder / "child").write_text(str(os.getpid()))
                time.sleep(600)

            executor = LocalExecutor("tensorflow")
            dump_payload({"function": wait}, folder / "payload.pkl")
            directory = TaskDirectory(folder / "task")
            directory.write_task("call", {"payload": str(folder / "payload.pkl")})
            executor.submit(directory)
            while not (folder / "child").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), 9)
            """
        )
    )
    done = subprocess.run([sys.executable, str(script)], timeout=120)
    assert done.returncode == -9
    assert (tmp_path / "runs").read_text() == "x"
    assert wait_until_gone(int((tmp_path / "child").read_text()))
