"""Hides the notes that TensorFlow prints whenever it is imported."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

# TensorFlow 2.21 prints these before it reads TF_CPP_MIN_LOG_LEVEL. Only notes (severity I) are hidden: warnings,
# errors and all other lines are printed.
_NOTE = (
    r"^(I[0-9]{4} |WARNING: All log messages before absl::InitializeLog\(\) is called"
    r"|To enable the following instructions: .*, in other operations, rebuild TensorFlow)"
)
# How long to wait for the last lines; a process that was started meanwhile may keep the pipe open.
_SECONDS_FOR_THE_REST = 1.0


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """Keeps TensorFlow's notes off the standard error, until the context ends; other lines are passed on at once.

    They pass through a `grep` process, because a thread would lose the last lines of a process that crashes. Without
    `grep`, the notes are printed.
    """
    if "tensorflow" in sys.modules or shutil.which("grep") is None:  # printed already, or nothing to filter with
        yield
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    command = ["grep", "--text", "--invert-match", "--line-buffered", "--extended-regexp", _NOTE]
    # A session of its own, so that Ctrl-C does not end it.
    grep = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=terminal, start_new_session=True)
    assert grep.stdin is not None
    with grep.stdin:
        os.dup2(grep.stdin.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(terminal, 2)
        os.close(terminal)
        with contextlib.suppress(subprocess.TimeoutExpired):
            grep.wait(_SECONDS_FOR_THE_REST)
