"""Detects, in a thread, that a process has run out of its memory budget, if its framework says so late or never.

JAX and torch have no limit on a CPU: there the peak is compared with the budget at intervals.

TensorFlow has a limit, but retries an allocation that does not fit for ten seconds, in case something is freed (its
`AllocatorRetry`, which has no setting). In a step on a CPU nothing else frees memory, and every thread of the process
sleeps meanwhile. That sleep is detected: a thread that computes, waits for a core or reads from a disk does not sleep.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from accumtune.memory.device import Device

PATIENCE_SECONDS = 2.0
_LOOK_EVERY_SECONDS = 0.2
# Less computing time than this between two looks is a timer, not work.
_BUSY_NANOSECONDS = 1_000_000


@contextlib.contextmanager
def watched(device: Device, on_out_of_memory: Callable[[], None], *, may_wait: bool = True) -> Iterator[None]:
    """Calls `on_out_of_memory`, in another thread, when the process runs out of memory in the body of the `with`.

    Args:
        device: opened with a budget; without one nothing is watched.
        on_out_of_memory: must end the process, because a thread that waits for memory cannot be interrupted.
        may_wait: whether the body may sleep for other reasons, such as waiting for data. TensorFlow's own error is
            then awaited.
    """
    if device.budget_bytes is None:
        watch: Callable[[threading.Event], bool] | None = None
    elif not device.has_limits:
        watch = functools.partial(_exceeds, device, device.budget_bytes)
    elif device.backend == "tensorflow" and device.name.startswith("CPU") and not may_wait:
        watch = _sleeps  # with a GPU a process may sleep while the device works
    else:
        watch = None
    if watch is None:
        yield
        return
    is_over = threading.Event()
    watcher = threading.Thread(target=_watch, args=(watch, is_over, on_out_of_memory), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        is_over.set()
        watcher.join()


def _watch(
    watch: Callable[[threading.Event], bool], is_over: threading.Event, on_out_of_memory: Callable[[], None]
) -> None:
    if watch(is_over):
        on_out_of_memory()


def _exceeds(device: Device, budget_bytes: int, is_over: threading.Event) -> bool:
    """Waits until the peak is above the budget, and returns True; False when the body is over."""
    while not is_over.wait(_LOOK_EVERY_SECONDS):
        try:
            peak = device.peak_memory_bytes()
        except RuntimeError:  # JAX: an array was deleted meanwhile
            continue
        if peak > budget_bytes:
            return True
    return False


def _sleeps(is_over: threading.Event) -> bool:
    """Waits until all threads have slept for `PATIENCE_SECONDS`, and returns True; False when the body is over."""
    own = str(threading.get_native_id())
    before, since = _work_done(own), time.monotonic()
    while not is_over.wait(_LOOK_EVERY_SECONDS):
        now = _work_done(own)
        if now is None or before is None or abs(now - before) > _BUSY_NANOSECONDS:
            since = time.monotonic()
        before = now
        if time.monotonic() - since > PATIENCE_SECONDS:
            return not is_over.is_set()
    return False


def _work_done(own: str) -> int | None:
    """Returns the nanoseconds that the other threads have run so far; None while one of them runs or is ready to."""
    total = 0
    try:
        for thread in Path("/proc/self/task").iterdir():
            if thread.name != own:
                state = (thread / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "S":
                    return None
                total += int((thread / "schedstat").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None  # a thread has ended meanwhile, or this is not Linux
    return total
