"""Replays a search's journals into MLflow in the background, and returns the command that shows them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, cast

from accumtune.errors import AccumtuneError, TrackingError
from accumtune.tracking.mlflow import ui
from accumtune.tracking.mlflow.replay import Replay
from accumtune.tracking.mlflow.server_health import is_answering
from accumtune.tracking.mlflow.ui import UI_PORT
from accumtune.tracking.redaction import error_line
from accumtune.tracking.small_files import read_small, write_atomically
from accumtune.tracking.tracking_uri import (
    DEFAULT_TRACKING_URI,
    absolute_uri,
    default_tracking_uri,
    without_credentials,
)

__all__ = ["DEFAULT_TRACKING_URI", "Tracker"]

CACHE_FILE = "tracking.json"
_INTERVAL_SECONDS = 2.0
_STOP_SECONDS = 60.0
# `stop` does not wait for a server that has not answered for so long ...
_SILENCE_SECONDS = 20.0
# ... beyond this time after the search has ended.
_SILENT_STOP_SECONDS = 1.0
_JOIN_SECONDS = 0.1
_MOST_CACHE_BYTES = 2**16
_LAST_ATTEMPTS = 3
_RETRY_SECONDS = 0.2
# How long `sync` waits for another process that replays the same search.
_WAIT_SECONDS = 60.0


class Tracker:
    """Keeps the MLflow runs of one search equal to its journals.

    A failing store does not affect the search: the journals hold everything, and a later replay writes each missing
    value once.

    Args:
        search_folder: the search's folder, with `search.jsonl`.
        tracking_uri: of the store. None: `MLFLOW_TRACKING_URI`, else `sqlite:///mlruns/mlflow.db` with artifacts in
            `mlruns/artifacts`. False: no tracking.
        interval_seconds: the time between two replays in the background.
        stop_seconds: how long `stop` waits for the last replay, as long as the store answers.

    Example:

    >>> tracker = Tracker(folder)
    >>> tracker.start()
    >>> ...
    >>> message = tracker.stop()  # "" if MLflow has everything
    """

    def __init__(
        self,
        search_folder: str | os.PathLike[str],
        tracking_uri: str | Literal[False] | None = None,
        *,
        interval_seconds: float = _INTERVAL_SECONDS,
        stop_seconds: float = _STOP_SECONDS,
    ) -> None:
        self.folder = Path(search_folder).resolve()
        self.tracking_uri = self._resolve(tracking_uri)
        self._interval_seconds = interval_seconds
        self._stop_seconds = stop_seconds
        self._replay = None if self.tracking_uri is None else Replay(self.folder, self.tracking_uri)
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        self._fault = ""

    @staticmethod
    def _resolve(tracking_uri: str | Literal[False] | None) -> str | None:
        if tracking_uri is False:
            return None
        # Absolute, because the user's code may change the working directory.
        return absolute_uri(tracking_uri or default_tracking_uri())

    @property
    def parent_run_id(self) -> str | None:
        """The id of the search's run; None before the store has created it."""
        return self._known("parent_run_id")

    @property
    def experiment_id(self) -> str | None:
        return self._known("experiment_id")

    def sync(self) -> None:
        """Copies everything that the journals hold to MLflow. A second call changes nothing.

        Raises:
            TrackingError: the store cannot be reached, or refuses a value; nothing is lost.
        """
        if self._replay is None:
            return
        uri = self._replay.tracking_uri
        for attempt in range(1, _LAST_ATTEMPTS + 1):
            try:
                return self._run(is_fresh=True, wait_seconds=_WAIT_SECONDS)
            except AccumtuneError:
                raise
            except Exception as error:  # whatever the store's driver raises: SQLAlchemy's, requests', MLflow's
                if attempt == _LAST_ATTEMPTS:
                    raise TrackingError(
                        f"MLflow at {without_credentials(uri)} refused: {error_line(error, uri)}",
                        "a store that can be written to",
                        f"repair it, then run `{self._sync_command()}`: nothing is lost.",
                    ) from error
            # Another search may have locked the database for a moment.
            time.sleep(_RETRY_SECONDS)

    def start(self) -> None:
        """Starts to replay in the background; returns at once, and never raises because of the store."""
        if self._replay is None or self._thread is not None:
            return
        # So that `accumtune sync` knows the store even if it never answers.
        with contextlib.suppress(OSError):
            self._remember()
        self._stopping.clear()
        self._thread = threading.Thread(target=self._loop, name="accumtune-tracking", daemon=True)
        self._thread.start()

    def stop(self) -> str:
        """Replays once more and ends the background; waits at most `stop_seconds`.

        Returns:
            "" if MLflow has everything, otherwise a message for the user.
        """
        if self._thread is None or self._replay is None:
            return ""
        self._stopping.set()
        self._await_end(self._thread, self._replay)
        fault = "it takes too long" if self._thread.is_alive() else self._fault
        self._thread = None
        if not fault:
            return ""
        return (
            f"MLflow at {without_credentials(self._replay.tracking_uri)} does not have everything yet ({fault}). "
            f"Nothing is lost: `{self._sync_command()}` copies the rest later."
        )

    def _await_end(self, thread: threading.Thread, replay: Replay) -> None:
        """Waits for the last replay of the background, unless the server does not answer."""
        began = time.monotonic()
        while thread.is_alive() and (waited := time.monotonic() - began) < self._stop_seconds:
            if waited > _SILENT_STOP_SECONDS and replay.heartbeat.silent_seconds() > _SILENCE_SECONDS:
                if not is_answering(replay.tracking_uri):
                    return
                replay.heartbeat.beat()
            thread.join(min(_JOIN_SECONDS, self._stop_seconds - waited))

    def ui_command(self, port: int = UI_PORT) -> str:
        """Returns the command that starts the MLflow UI; "" if a server serves it already, or without tracking."""
        return "" if self.tracking_uri is None else ui.ui_command(self.tracking_uri, port)

    def ui_address(self, port: int = UI_PORT) -> str:
        """Returns the address of this search in the UI, with its saved view.

        "" before the store has an experiment for it, or without tracking.
        """
        if self.tracking_uri is None or self.experiment_id is None:
            return ""
        return ui.ui_address(self.tracking_uri, self.experiment_id, self._known("view_key"), port)

    def _sync_command(self) -> str:
        folder = self.folder.relative_to(Path.cwd()) if self.folder.is_relative_to(Path.cwd()) else self.folder
        command = ["accumtune", "sync", str(folder)]
        uri = self.tracking_uri or ""
        if uri != absolute_uri(default_tracking_uri()):
            # Passwords are not printed: the user adds the address with its credentials.
            command += ["--tracking-uri", uri if uri == without_credentials(uri) else "ADDRESS"]
        return shlex.join(command)

    def _loop(self) -> None:
        is_fresh = True
        while not self._stopping.is_set():
            is_fresh = not self._try(is_fresh)
            self._stopping.wait(self._interval_seconds)
        for _ in range(_LAST_ATTEMPTS):
            if self._try(is_fresh=True):
                return
            time.sleep(_RETRY_SECONDS)

    def _try(self, is_fresh: bool) -> bool:
        try:
            self._run(is_fresh)
        except Exception as error:  # the search continues; `stop` returns the message
            self._fault = error_line(error, str(self.tracking_uri))
            return False
        self._fault = ""
        return True

    def _run(self, is_fresh: bool, wait_seconds: float = 0.0) -> None:
        assert self._replay is not None
        with self._lock, _quiet_thread():
            self._replay.run(is_fresh, wait_seconds)
            self._remember()

    def _remember(self) -> None:
        """Saves where the runs are, for commands that do not ask the store."""
        assert self.tracking_uri is not None
        content: dict[str, str | None] = {"tracking_uri": without_credentials(self.tracking_uri)}
        content |= {name: self._known(name) for name in ("experiment_id", "parent_run_id", "view_key")}
        if content != self._cache():
            write_atomically(self.folder / CACHE_FILE, json.dumps(content, indent=2))

    def _known(self, name: Literal["parent_run_id", "experiment_id", "view_key"]) -> str | None:
        """Returns what the store said, or before it was asked, what it said to an earlier process."""
        if self._replay is None:
            return None
        if self._replay.parent_run_id is not None:
            return cast(str | None, getattr(self._replay, name))
        cache = self._cache()
        is_same = cache.get("tracking_uri") == without_credentials(self.tracking_uri or "")
        return cache.get(name) if is_same else None

    def _cache(self) -> dict[str, str | None]:
        return read_cache(self.folder)


def read_cache(folder: Path) -> dict[str, str | None]:
    """Reads where a search's runs are: `tracking_uri` (without credentials), `experiment_id`, `parent_run_id`."""
    try:
        content = json.loads(read_small(Path(folder) / CACHE_FILE, _MOST_CACHE_BYTES))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


@contextlib.contextmanager
def _quiet_thread() -> Iterator[None]:
    """Silences, in this thread alone, what MLflow logs about migrations of a new database and about retries."""
    thread = threading.get_ident()

    def is_elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread or record.levelno > logging.WARNING

    for name in _LOUD_LOGGERS:
        logging.getLogger(name).addFilter(is_elsewhere)
    try:
        yield
    finally:
        for name in _LOUD_LOGGERS:
            logging.getLogger(name).removeFilter(is_elsewhere)


_LOUD_LOGGERS = ("mlflow.store.db.utils", "alembic.runtime.migration", "urllib3.connectionpool")
