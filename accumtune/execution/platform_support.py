"""Refuses systems other than Linux for everything that starts processes with limited memory."""

from __future__ import annotations

import sys

from accumtune.errors import WorkerError


def require_linux(what: str) -> None:
    """Raises an error on systems other than Linux.

    Args:
        what: the subject of the message.

    Raises:
        WorkerError: this is not Linux.
    """
    if sys.platform != "linux":
        raise WorkerError(
            f"{what} starts processes and limits their memory, which needs Linux; this system is {sys.platform!r}.",
            "Linux. accumulate(), batch_coupled_layers(), load_config() and config.build() work on every system.",
            "run it on Linux: on Windows in WSL 2, on macOS in a Linux container, or on a Linux machine.",
        )
