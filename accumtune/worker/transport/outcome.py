"""The outcome of a task: completed, out of memory, failed, killed, timed out, stopped or lost."""

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
    """In a task: the search has asked for the end, and the state is saved. Nothing of the user's may handle it."""


class Superseded(BaseException):
    """In a task: the search has given this process up and written the task anew for another."""


@dataclass(frozen=True)
class Outcome:
    """How a task ended. Three endings stay distinct: a result, an exception in the child, no word from the child.

    Args:
        status: `"completed"`, `"out_of_memory"`, `"failed"` (an exception), `"killed"` (by a signal), `"timed_out"`,
            `"stopped"` (it was asked to, and has saved its state) or `"lost"` (with its machine or its worker, of
            which it says nothing: the same task may be started again).
        result: what the task returned (JSON types).
        reason: one line for a person; empty when completed.
        traceback: of the exception in the child; for other endings the last lines of its log.
        pid: the process that it was.
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
        """Whether a task under a limit had too little memory; the kernel's SIGKILL counts as that."""
        return self.status == "out_of_memory" or (self.status == "killed" and "SIGKILL" in self.reason)


def read_outcome(
    directory: TaskDirectory, exit_code: int, pid: int | None = None, is_memory_limited: bool = False
) -> Outcome:
    """What became of a task whose process has ended with `exit_code` (negative: by a signal)."""
    log_tail = directory.log_tail()
    try:
        written = directory.read_outcome()
        if written is not None:
            return Outcome(pid=pid, **written)
    except (OSError, ValueError, TypeError) as error:  # a file system that is gone, a file that is damaged
        reason = f"its outcome cannot be read: {type(error).__name__}: {error}"
        return Outcome("failed", reason=reason, traceback=log_tail, pid=pid)
    # A SIGKILL may be anybody's; what asked for the task decides what it takes it for.
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


# What Keras and TensorFlow write before the cause: where it was, and how one comes there.
_IN_LAYER = "Exception encountered when calling "
_WHERE = (_IN_LAYER, "Graph execution error:", "Detected at node ", 'File "', "<stack traces")
_DECORATION = re.compile(r"\x1b\[[0-9;]*m|\{\{[^}]*\}\}")


def reason_of(error: BaseException) -> str:
    """The cause of an error, in one line for a person."""
    lines = [line.strip() for line in _DECORATION.sub("", str(error)).splitlines()]
    lines = [line for line in lines if line]
    cause = next((line for line in lines if not line.startswith(_WHERE)), "")
    text = cause or " ".join(lines[:1])
    if cause and lines[0].startswith(_IN_LAYER):
        text += f" (in {lines[0].removeprefix(_IN_LAYER).rstrip('.')})"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def finished(outcome: Outcome, what: str) -> Outcome:
    """The outcome, if the task completed.

    Raises:
        AccumtuneError: accumtune's own error from the child; for anything else a `BuildError` with its traceback.
    """
    if outcome.is_completed:
        return outcome
    if outcome.error is not None:
        kind = getattr(errors, outcome.error["class"], errors.BuildError)
        raise kind(*outcome.error["arguments"])
    if outcome.status == "timed_out":
        raise errors.BuildError(
            f"{what} did not come to an end: {outcome.reason}\n{outcome.traceback}".rstrip(),
            "a model that is built, and trains a few updates, in the time that a trial has.",
            "call it by hand and look where it waits; where it needs longer, raise trial_timeout_seconds.",
        )
    raise errors.BuildError(
        f"{what} failed in its process: {outcome.reason}\n{outcome.traceback}".rstrip(),
        "a build function that returns a compiled model which trains on the data.",
        "call it by hand: `model = build_model(keras_tuner.HyperParameters()); model.fit(x[:8], y[:8])`.",
    )
