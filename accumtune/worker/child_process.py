"""Ends forked processes: with an exit code, and together with the process that forked them."""

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
    """Runs a function in a forked process and ends the process with the exit code that it returns."""
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
        # Without the interpreter's shutdown, whose handlers belong to the process that was forked.
        os._exit(exit_code)


def die_with_parent() -> None:
    """Makes the kernel kill this process when the process that forked it ends."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def adopt_orphans() -> None:
    """Makes this process the parent of its tasks' orphans: a search that is PID 1 of a container would keep zombies."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value)
