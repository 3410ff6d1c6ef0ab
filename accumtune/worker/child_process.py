"""Ends a forked process: with its own exit code, and with the process that forked it."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from accumtune.worker.transport.outcome import DISK_FULL_EXIT_CODE
from accumtune.worker.transport.task_directory import is_disk_full

# linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def end_process(run: Callable[[], int]) -> NoReturn:
    """Runs what a forked process is there for, and ends the process with the exit code that comes of it."""
    exit_code = 1
    try:
        exit_code = run()
    except BaseException as error:
        if is_disk_full(error):
            exit_code = DISK_FULL_EXIT_CODE
        with contextlib.suppress(OSError):
            traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        # No interpreter shutdown: the handlers of a forked copy belong to the process that it was forked from.
        os._exit(exit_code)


def die_with_parent() -> None:
    """Where the process that forked this one is killed, this one goes too."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """What tasks have started comes here when they end: a search that is PID 1 of a container would keep zombies."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value)
