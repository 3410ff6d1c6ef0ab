"""Refuses systems other than Linux, where processes of trials are not forked, limited and watched."""

from __future__ import annotations

import sys

from accumtune.errors import WorkerError


def require_linux(what: str) -> None:
    """Says at once that something runs on Linux only.

    Args:
        what: begins the sentence.

    Raises:
        WorkerError: this is another system.
    """
    if sys.platform != "linux":
        raise WorkerError(
            f"{what} starts processes, limits their memory and watches over them; this system is {sys.platform!r}.",
            "Linux. accumulate(), batch_coupled_layers(), load_config() and config.build() work on every system.",
            "run it on Linux: on Windows in WSL 2, on macOS in a Linux container, or on a Linux machine.",
        )
