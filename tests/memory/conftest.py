"""A function in a process of its own, whose memory is measured and limited as a trial's is."""

import os

import pytest

from accumtune.memory.device import memory_limit_environment
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import TaskDirectory

BACKEND = os.environ["KERAS_BACKEND"]


@pytest.fixture
def in_child(executor, tmp_path):
    """`in_child(function, *arguments, budget_bytes=...)` gives the outcome. Define the function inside the test."""

    def run(function, *arguments, budget_bytes=None):
        directory = TaskDirectory(tmp_path / function.__name__)
        payload = tmp_path / f"{function.__name__}.pkl"
        dump_payload({"function": function, "arguments": arguments}, payload)
        directory.write_task("call", {"payload": str(payload)})
        environment = memory_limit_environment(BACKEND, budget_bytes)
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
