"""Keeps the standard output for what was asked for; what a user's own code writes there goes to the standard error."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO


@contextlib.contextmanager
def only_the_answer() -> Iterator[TextIO]:
    """Yields the standard output; whatever else this process and its children write there meanwhile goes to the error.

    By descriptors: a library in C and a process that is started know no `sys.stdout`.
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
    """From now on nothing more is the answer: what is written when the interpreter ends goes to the standard error."""
    sys.stdout.flush()
    os.dup2(2, 1)
