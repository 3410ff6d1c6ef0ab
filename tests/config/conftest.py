"""Functions of these tests in a process of their own."""

import pytest

from accumtune.worker.transport.outcome import finished
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import TaskDirectory


@pytest.fixture
def run_in_child(executor, tmp_path):
    """Calls a function in a fresh process that has the framework, and returns what it returned (JSON)."""

    def run(function, *arguments):
        directory = TaskDirectory(tmp_path / f"child{len(list(tmp_path.iterdir()))}")
        payload_file = directory.path / "payload.pkl"
        dump_payload({"function": function, "arguments": arguments}, payload_file)
        directory.write_task("call", {"payload": str(payload_file.resolve())})
        return finished(executor.submit(directory).result(), "The function").result["value"]

    return run
