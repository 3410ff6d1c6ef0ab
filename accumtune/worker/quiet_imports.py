"""Keeps off the terminal what TensorFlow says of itself whenever it is imported."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator

# TensorFlow 2.21 writes these before it has read TF_CPP_MIN_LOG_LEVEL, so that no variable turns them off. Notes only
# (severity I): warnings, errors and all that is no log line pass.
_NOTE = (
    r"^(I[0-9]{4} |WARNING: All log messages before absl::InitializeLog\(\) is called"
    r"|To enable the following instructions: .*, in other operations, rebuild TensorFlow)"
)
# What has been written arrives at once; a process begun meanwhile, which still may write, is not waited for.
_SECONDS_FOR_THE_REST = 1.0


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """While this lasts, TensorFlow's notes do not reach the standard error; everything else does, line by line.

    It passes through a `grep`: the last words of a process that crashes are not lost with it, as they would be in a
    thread. Where there is none, notes are written as ever.
    """
    if "tensorflow" in sys.modules or shutil.which("grep") is None:  # they have been written, or nothing can drop them
        yield
        return
    sys.stderr.flush()
    terminal = os.dup(2)
    command = ["grep", "--text", "--invert-match", "--line-buffered", "--extended-regexp", _NOTE]
    # A session of its own: Ctrl-C is not for it.
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
