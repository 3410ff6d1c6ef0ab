"""Asks for the device of this machine in a process of its own, so that the caller's process does not open it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from accumtune.execution.executors import LocalExecutor
from accumtune.execution.timeouts import DEFAULT_SECONDS
from accumtune.memory.device import memory_limit_environment
from accumtune.worker.transport.outcome import finished
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import TaskDirectory


def current_backend() -> str:
    """Returns Keras's backend in this process; imports Keras if need be."""
    import keras

    return str(keras.config.backend())


def free_device_memory_bytes() -> int:
    """Returns the free memory, in bytes, of the device that Keras would train on.

    Raises:
        BudgetError: a GPU's driver does not know.
    """
    backend = current_backend()
    with tempfile.TemporaryDirectory(prefix="accumtune-device-") as folder, LocalExecutor(backend) as executor:
        directory = TaskDirectory(Path(folder) / "device")
        payload_file = Path(folder) / "payload.pkl"
        dump_payload({"function": _free_memory_bytes, "arguments": ()}, payload_file)
        directory.write_task("call", {"payload": str(payload_file)})
        outcome = executor.submit(directory, memory_limit_environment(backend, None), DEFAULT_SECONDS).result()
        return int(finished(outcome, "Looking at the device").result["value"])


def _free_memory_bytes() -> int:
    from accumtune.memory.device import open_device
    from accumtune.memory.machine import available_memory_bytes

    return available_memory_bytes(open_device().name)
