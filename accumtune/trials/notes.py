"""What TensorFlow says of itself whenever it is imported, and nobody asked: kept off the terminal."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator

# TensorFlow 2.21 writes these before it has read TF_CPP_MIN_LOG_LEVEL, so that no variable turns them off. Notes only
# (severity I): warnings, errors and all that is no log line pass.
_NOTE = re.compile(
    rb"I\d{4} |WARNING: All log messages before absl::InitializeLog\(\) is called"
    rb"|To enable the following instructions: .*, in other operations, rebuild TensorFlow"
)

_END = b"\0end of what was written while notes were dropped\n"


@contextlib.contextmanager
def without_notes() -> Iterator[None]:
    """While this lasts, TensorFlow's notes do not reach the standard error; everything else does, line by line.

    A process of its own passes the lines on, so that the last words of one that crashes are not lost with it.
    """
    if "tensorflow" in sys.modules or not hasattr(os, "fork"):  # they have been written, or nothing can pass them on
        yield
        return
    sys.stderr.flush()
    reader, writer = os.pipe()
    done_reader, done_writer = os.pipe()
    child = os.fork()
    if child == 0:
        # Forked twice: nobody's child that has to be waited for, as long as a process begun meanwhile may write.
        if os.fork() == 0:
            os.close(writer)
            _pass_on(reader, done_writer)
        os._exit(0)
    os.waitpid(child, 0)
    os.close(reader)
    os.close(done_writer)
    terminal = os.dup(2)
    os.dup2(writer, 2)
    os.close(writer)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.write(2, _END)
        os.dup2(terminal, 2)
        os.close(terminal)
        os.read(done_reader, 1)  # until all has been passed on
        os.close(done_reader)


def _pass_on(reader: int, done: int) -> None:
    """Never returns."""
    try:
        with os.fdopen(reader, "rb") as lines:
            for line in lines:
                if line.endswith(_END):
                    line = line.removesuffix(_END)
                    os.write(2, line)
                    os.close(done)
                elif not _NOTE.match(line):
                    os.write(2, line)
    finally:
        os._exit(0)
