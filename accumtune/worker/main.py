"""Runs the task of a directory: the entry point of every process that the fork server starts.

A task is read from `task.json` in its directory and leaves `outcome.json`.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from accumtune.errors import AccumtuneError
from accumtune.memory.device import is_out_of_memory
from accumtune.worker.transport.global_settings import apply_global_settings
from accumtune.worker.transport.outcome import StopRequested, Superseded, reason_of
from accumtune.worker.transport.payload import load_payload, read_header
from accumtune.worker.transport.task_directory import TaskDirectory

_MODULES = {
    "discover": "accumtune.worker.inspection",
    "inspect": "accumtune.worker.inspection",
    "describe_data": "accumtune.worker.inspection",
    "probe": "accumtune.worker.inspection",
    "train": "accumtune.worker.training",
    "call": __name__,
}


def run_task(path: Path) -> int:
    """Runs the task of a directory and writes its outcome.

    Returns:
        The exit code for the process: 0 unless not even an outcome could be written.
    """
    directory = TaskDirectory(path)
    name, arguments = directory.read_task()
    try:
        result = task_function(name)(directory, **arguments)
    except StopRequested:
        directory.write_outcome({"status": "stopped", "reason": "the search was stopped; its state is saved"})
    except Superseded:
        pass  # another process writes the outcome
    except Exception as error:
        directory.write_outcome(_describe(error))
    else:
        directory.write_outcome({"status": "completed", "result": result})
    return 0


def call(directory: TaskDirectory, payload: str) -> dict[str, Any]:
    """Runs a function of the payload in this process, for any work that needs a process of its own.

    It does not open a device.
    """
    apply_global_settings(read_header(Path(payload)).settings)
    content = load_payload(Path(payload))
    return {"value": content["function"](*content.get("arguments", ()))}


def task_function(name: str) -> Callable[..., dict[str, Any]]:
    """Returns the function of a task. Its module, with the framework, is imported here: an error is then an outcome."""
    function: Callable[..., dict[str, Any]] = getattr(importlib.import_module(_MODULES[name]), name)
    return function


def _describe(error: Exception) -> dict[str, Any]:
    return {
        "status": "out_of_memory" if is_out_of_memory(error) else "failed",
        "reason": reason_of(error),
        "traceback": "".join(traceback.format_exception(error)),
        "error": (
            {"class": type(error).__name__, "arguments": list(error.args)}
            if isinstance(error, AccumtuneError)
            else None
        ),
    }
