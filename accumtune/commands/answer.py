"""Keeps the standard output for a command's result: what the user's own code prints goes to the standard error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def only_the_answer() -> Iterator[TextIO]:
    """Yields the standard output; meanwhile everything else that this process and its children print goes to stderr.

    It redirects the file descriptor, because C libraries and child processes do not use `sys.stdout`.
    """
    sys.stdout.flush()
    saved = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(saved), "w", encoding="utf-8") as answer, contextlib.redirect_stdout(sys.stderr):
            yield answer
    finally:
        os.dup2(saved, 1)
        os.close(saved)


def close_standard_output() -> None:
    """Sends to the standard error what is still printed while the interpreter exits."""
    sys.stdout.flush()
    os.dup2(2, 1)
