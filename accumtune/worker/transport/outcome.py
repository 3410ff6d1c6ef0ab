"""Describes the outcome of a task: completed, out of memory, failed, killed, timed out, stopped or lost."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from typing import Any

from accumtune import errors
from accumtune.memory.out_of_memory import died_of_memory
from accumtune.worker.transport.task_directory import TaskDirectory

DISK_FULL_EXIT_CODE = 74  # EX_IOERR of sysexits.h


class StopRequested(BaseException):
    """Raised in a task: the search has asked it to stop, and its state is saved.

    A BaseException, so that the user's code does not catch it.
    """


class Superseded(BaseException):
    """Raised in a task: the search no longer waits for this process and has given the task to another."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended: with a result, with an exception in the child, or without an answer from the child.

    Args:
        status: `"completed"`, `"out_of_memory"`, `"failed"` (an exception), `"killed"` (by a signal), `"timed_out"`,
            `"stopped"` (it was asked to, and has saved its state) or `"lost"` (with its machine or its worker, through
            no fault of its own: the same task may be started again).
        result: what the task returned (JSON types).
        reason: one line for the user; empty when completed.
        traceback: of the exception in the child; for other endings the last lines of its log.
        pid: of its process.
        error: class and arguments of an `AccumtuneError` that the child raised.
    """

    status: str
    result: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    traceback: str = ""
    pid: int | None = None
    error: dict[str, Any] | None = None

    @property
    def is_completed(self) -> bool:
        return self.status == "completed"

    @property
    def ran_out_of_memory(self) -> bool:
        """Whether a task under a limit had too little memory; a SIGKILL, as from the kernel, counts as that."""
        return self.status == "out_of_memory" or (self.status == "killed" and "SIGKILL" in self.reason)


def read_outcome(
    directory: TaskDirectory, exit_code: int, pid: int | None = None, is_memory_limited: bool = False
) -> Outcome:
    """Returns the outcome of a task whose process has ended with `exit_code` (negative: by a signal)."""
    log_tail = directory.log_tail()
    try:
        written = directory.read_outcome()
        if written is not None:
            return Outcome(pid=pid, **written)
    except (OSError, ValueError, TypeError) as error:  # a lost file system, or a damaged file
        reason = f"its outcome cannot be read: {type(error).__name__}: {error}"
        return Outcome("failed", reason=reason, traceback=log_tail, pid=pid)
    # A SIGKILL may come from anybody, so the caller decides what it means.
    if exit_code < 0 and exit_code != -signal.SIGKILL:
        if died_of_memory(-exit_code, log_tail, is_limited=is_memory_limited):
            reason = f"its process ran out of memory and ended by {_signal_name(-exit_code)}"
            return Outcome("out_of_memory", reason=reason, traceback=log_tail, pid=pid)
    if exit_code < 0:
        name = _signal_name(-exit_code)
        hint = " (the kernel does this when the machine runs out of memory)" if name == "SIGKILL" else ""
        return Outcome("killed", reason=f"its process was killed by {name}{hint}", traceback=log_tail, pid=pid)
    why = " (there is no space left on the disk)" if exit_code == DISK_FULL_EXIT_CODE else ""
    return Outcome(
        "failed",
        reason=f"its process ended with exit code {exit_code} and left no outcome{why}",
        traceback=log_tail,
        pid=pid,
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # most real-time signals have none
        return f"signal {number}"


# What Keras and TensorFlow print before the cause of an error: its place.
_IN_LAYER = "Exception encountered when calling "
_WHERE = (_IN_LAYER, "Graph execution error:", "Detected at node ", 'File "', "<stack traces")
_DECORATION = re.compile(r"\x1b\[[0-9;]*m|\{\{[^}]*\}\}")


def reason_of(error: BaseException) -> str:
    """Returns the cause of an error, in one line for the user."""
    lines = [line.strip() for line in _DECORATION.sub("", str(error)).splitlines()]
    lines = [line for line in lines if line]
    cause = next((line for line in lines if not line.startswith(_WHERE)), "")
    text = cause or " ".join(lines[:1])
    if cause and lines[0].startswith(_IN_LAYER):
        text += f" (in {lines[0].removeprefix(_IN_LAYER).rstrip('.')})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def finished(outcome: Outcome, what: str) -> Outcome:
    """Returns the outcome if the task completed.

    Raises:
        AccumtuneError: the child's own AccumtuneError; for any other end a `BuildError` with its traceback.
    """
    if outcome.is_completed:
        return outcome
    if outcome.error is not None:
        kind = getattr(errors, outcome.error["class"], errors.BuildError)
        raise kind(*outcome.error["arguments"])
    if outcome.status == "timed_out":
        raise errors.BuildError(
            f"{what} did not finish in time: {outcome.reason}\n{outcome.traceback}".rstrip(),
            "a model that is built, and trains a few updates, within a trial's time limit.",
            "call it yourself to see where it waits; if it needs more time, raise trial_timeout_seconds.",
        )
    raise errors.BuildError(
        f"{what} failed in its process: {outcome.reason}\n{outcome.traceback}".rstrip(),
        "a build function that returns a compiled model which trains on the data.",
        "call it yourself: `model = build_model(keras_tuner.HyperParameters()); model.fit(x[:8], y[:8])`.",
    )
