"""Gathers the rows of the next micro-batch in a thread, while the device computes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np


class GatherAhead:
    """Calls a function for one argument ahead.

    Args:
        gather: from numbers of rows to arrays on the host. It is called in another thread, one call at a time.
    """

    def __init__(self, gather: Callable[[np.ndarray], Any]) -> None:
        self._gather = gather
        self._thread: ThreadPoolExecutor | None = None
        self._pending: tuple[np.ndarray, Future[Any]] | None = None

    def take(self, indices: np.ndarray, following: np.ndarray) -> Any:
        """Returns the arrays of `indices`, and begins to gather those of `following`, if it is not empty.

        An error is raised here, in the call that takes the rows.
        """
        pending, self._pending = self._pending, None
        is_there = pending is not None and np.array_equal(pending[0], indices)
        arrays = pending[1].result() if pending is not None and is_there else self._gather(indices)
        if len(following):
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "accumtune-rows")
            self._pending = following, self._thread.submit(self._gather, following)
        return arrays

    def close(self) -> None:
        """Ends the thread, and frees what it has gathered."""
        self._pending = None
        if self._thread is not None:
            self._thread.shutdown(cancel_futures=True)
            self._thread = None
