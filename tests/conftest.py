"""Fixtures for all tests: a process that starts trials, small models and data."""

import fcntl
import gc
import os
import signal
import subprocess

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
# The same kernels on every CPU: TensorFlow's others take a workspace as large as the CPU's last cache, such as 32 MiB.
os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
# A retry of MLflow that outlives its test draws no random number between a seed and the model that it is for.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")

import forked
import pytest
from hypothesis import settings
from running import DIGITS, run_experiment

# A shell's background job, as CI may be, ignores SIGINT and so would its children: a terminal's do not.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No test asserts on time: hypothesis's own limit of 200 ms for an example would, on a busy machine.
settings.register_profile("any time", deadline=None)
settings.load_profile("any time")


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # one for all workers of pytest-xdist
        config.add_cleanup(forked.start())


def pytest_collection_finish():
    """A collection of garbage need not look at what is imported: with TensorFlow that takes a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def forked_fork_servers():
    """Starting one costs no import; `started_fork_servers` is for tests of just that."""
    forked.fork_the_fork_servers()


@pytest.fixture
def started_fork_servers(monkeypatch):
    """Fork servers begin as they do for users: with an interpreter of their own."""
    from accumtune.execution import fork_server_client

    monkeypatch.setattr(fork_server_client, "subprocess", subprocess)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """Runs the digits search once for all workers of pytest-xdist; gives its folder and what it printed."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "digits"
    folder.mkdir(exist_ok=True)
    printed = folder / "printed.txt"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            printed.write_text(run_experiment(folder, *DIGITS))
    return folder, printed.read_text()


@pytest.fixture(scope="session")
def executor():
    """One fork server for the whole session: starting it imports the framework."""
    from accumtune.execution.executors import LocalExecutor

    with LocalExecutor(os.environ["KERAS_BACKEND"]) as executor:
        yield executor


@pytest.fixture
def in_child(executor, tmp_path):
    """Runs functions in processes of their own, whose memory is measured and limited as a trial's is.

    `in_child(function, *arguments, budget_bytes=...)` gives the outcome. Define the function inside the test.
    """

    from accumtune.memory.device import memory_limit_environment
    from accumtune.worker.transport.payload import dump_payload
    from accumtune.worker.transport.task_directory import TaskDirectory

    def run(function, *arguments, budget_bytes=None):
        directory = TaskDirectory(tmp_path / function.__name__)
        payload = tmp_path / f"{function.__name__}.pkl"
        dump_payload({"function": function, "arguments": arguments}, payload)
        directory.write_task("call", {"payload": str(payload)})
        environment = memory_limit_environment(os.environ["KERAS_BACKEND"], budget_bytes)
        return executor.submit(directory, environment, 240).result(timeout=300)

    return run


@pytest.fixture
def value_in_child(in_child):
    """What the function returned."""

    def run(function, *arguments, budget_bytes=None):
        outcome = in_child(function, *arguments, budget_bytes=budget_bytes)
        assert outcome.is_completed, f"{outcome.reason}\n{outcome.traceback}"
        return outcome.result["value"]

    return run
