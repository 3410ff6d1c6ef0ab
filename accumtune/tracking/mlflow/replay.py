"""Replays a search's journals into MLflow, idempotently: it writes what is missing, and nothing twice."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from accumtune.errors import TrackingError
from accumtune.tracking.journal import TRIAL_JOURNAL, read_search_journal, read_trial, trial_folders
from accumtune.tracking.lock import try_lock
from accumtune.tracking.mlflow import model_registry, run_content, saved_view
from accumtune.tracking.mlflow.server_health import Heartbeat
from accumtune.tracking.mlflow.store import PARENT, RunState, Store
from accumtune.tracking.records import SearchRecord, TrialRecord
from accumtune.tracking.redaction import redacted
from accumtune.tracking.report.report_files import NOTE_FILE, REPORT_FOLDER, name_run, source_of

LOG_FILE = "log.txt"
_LOCK_FILE = "tracking.lock"
_SYNCED_TAG = "accumtune.synced"
_MODEL_TAG = "accumtune.model_key"
# The version of what is written for a record. A higher one makes a sync complete old runs too.
_CONTENT_VERSION = 1
_MAXIMUM_LOG_BYTES = 2**20
_LOCK_INTERVAL_SECONDS = 0.1


class Replay:
    """Replays one search's journals into one MLflow store.

    It remembers what it has written, to save work; `run(is_fresh=True)` reads the store instead.

    Args:
        folder: the search's.
        tracking_uri: of the store.
    """

    def __init__(self, folder: Path, tracking_uri: str) -> None:
        self.folder = folder
        self.tracking_uri = tracking_uri
        self.heartbeat = Heartbeat(is_local=tracking_uri.startswith("sqlite:"))
        self.experiment_id: str | None = None
        self.parent_run_id: str | None = None
        self.view_key: str | None = None
        self._view: str | None = None
        self._store: Store | None = None
        self._states: dict[str, RunState] = {}
        self._trials: dict[Path, tuple[int, TrialRecord]] = {}
        self._synced: dict[Path, tuple[int, bool]] = {}

    def run(self, is_fresh: bool, wait_seconds: float = 0.0) -> None:
        """Writes what is missing. After an exception, the next call writes the rest.

        Args:
            is_fresh: read the store, instead of relying on what this process has written.
            wait_seconds: how long to wait for another process that replays the same search.
        """
        with _locked(self.folder / _LOCK_FILE, wait_seconds):
            try:
                self._run(is_fresh)
            except BaseException:
                self._store = None
                raise

    def _run(self, is_fresh: bool) -> None:
        search = read_search_journal(self.folder)
        if not search.search_id:
            return
        store = self._open(search, is_fresh)
        self._read_trials()
        parent = self._sync_parent(store, search)
        trials = sorted(self._trials.items(), key=lambda item: (item[1][1].number, item[1][1].trial_id))
        is_changed = self._view is None
        for folder, (size, trial) in trials:
            key = (size, search.is_ended)
            if self._synced.get(folder) != key:
                self._sync_trial(store, folder, size, trial, search)
                self._synced[folder] = key
                is_changed = True
        self._sync_report(store, search)
        self._sync_model(store, search)
        store.end(self._states[PARENT], parent)
        if is_changed:
            self._sync_view(store, search, [trial for _, (_, trial) in trials])

    def _sync_view(self, store: Store, search: SearchRecord, trials: list[TrialRecord]) -> None:
        value = saved_view.encoded_view(search, trials)
        if value is not None and value != self._view:
            self.view_key = saved_view.save_view(store.client, store.experiment_id, search, value)
            self._view = value

    def _open(self, search: SearchRecord, is_fresh: bool) -> Store:
        if self._store is None or is_fresh:
            self._store = Store(self.tracking_uri, search.name or "accumtune", self.heartbeat)
            self._states = self._store.runs(search.search_id)
            self._synced.clear()
            self._view = None
        else:
            self._store.check()
        self.experiment_id = self._store.experiment_id
        return self._store

    def _read_trials(self) -> None:
        """Reads the journals that have grown since the last call."""
        for folder in trial_folders(self.folder):
            try:
                size = os.stat(folder / TRIAL_JOURNAL).st_size
            except FileNotFoundError:
                continue
            if self._trials.get(folder, (-1, None))[0] != size:
                trial = read_trial(folder)
                # Not an empty journal; one with an end alone is that of a trial that failed early.
                if trial.proposed_at or trial.started_at or trial.ended_at:
                    self._trials[folder] = (size, trial)

    def _sync_parent(self, store: Store, search: SearchRecord) -> run_content.RunContent:
        statuses = run_content.count_statuses({folder: trial for folder, (_, trial) in self._trials.items()})
        if PARENT not in self._states:
            self._states[PARENT] = store.create(run_content.search_run(search, statuses, None))
        state = self._states[PARENT]
        self.parent_run_id = state.run_id
        if search.is_ended:
            name_run(self.folder / REPORT_FOLDER, state.run_id, self.tracking_uri)
        content = run_content.search_run(search, statuses, self._note(search))
        store.log_missing(state, content)
        store.log_dataset(state, run_content.dataset(search))
        return content

    def _sync_trial(self, store: Store, folder: Path, size: int, trial: TrialRecord, search: SearchRecord) -> None:
        state = self._states.get(trial.trial_id)
        fingerprint = f"{_CONTENT_VERSION}:{size}" if trial.is_ended else ""
        if state is not None and fingerprint and state.tags.get(_SYNCED_TAG) == fingerprint:
            # The search's run may have been replaced.
            store.set_tags(state, {"mlflow.parentRunId": self.parent_run_id or ""})
            return
        content = run_content.trial_run(trial, search)
        if state is None:
            state = store.create(content, self.parent_run_id)
        elif store.conflicts(state, content):
            state = store.replace(state, content, self.parent_run_id)
        self._states[trial.trial_id] = state
        store.log_missing(state, content)
        store.set_tags(state, {"mlflow.parentRunId": self.parent_run_id or ""})
        if trial.is_ended:
            store.log_dataset(state, run_content.dataset(search))
            log = _read_log(folder / LOG_FILE)
            for name, text in {**content.texts, **({LOG_FILE: log} if log else {})}.items():
                store.client.log_text(state.run_id, text, name)
        store.end(state, content)
        if trial.is_ended:
            # Last: a run with this tag is complete.
            store.set_tags(state, {_SYNCED_TAG: fingerprint})

    def _sync_report(self, store: Store, search: SearchRecord) -> None:
        """Uploads the report's files to the search's run, if they have changed."""
        if not search.is_ended:
            return
        state, report = self._states[PARENT], self.folder / REPORT_FOLDER
        fingerprint = f"{_CONTENT_VERSION}:{_digest(report)}"
        if state.tags.get(_SYNCED_TAG) != fingerprint:
            for file in _files(report):
                store.client.log_artifact(state.run_id, str(file))
        tags = {_SYNCED_TAG: fingerprint}
        best = source_of(report).get("trial_id")
        if best in self._states:
            tags = {"accumtune.best_trial_id": best, "accumtune.best_run_id": self._states[best].run_id} | tags
        store.set_tags(state, tags)

    def _sync_model(self, store: Store, search: SearchRecord) -> None:
        """Registers the best model, if the search has saved one for the registry."""
        model = model_registry.wanted(self.folder)
        state = self._states[PARENT]
        if model is None or not search.is_ended or state.tags.get(_MODEL_TAG) == model["key"]:
            return
        version = model_registry.register_model(store.client, state.run_id, self.folder)
        store.set_tags(state, {"accumtune.registered_model": version or "", _MODEL_TAG: model["key"]})

    def _note(self, search: SearchRecord) -> str | None:
        # While a resumed search runs, the report is still that of the session before.
        if not search.is_ended:
            return None
        try:
            return (self.folder / REPORT_FOLDER / NOTE_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None


@contextlib.contextmanager
def _locked(path: Path, wait_seconds: float) -> Iterator[None]:
    """Lets one process at a time in, so that the search and `accumtune sync` do not create the same run twice."""
    end = time.monotonic() + wait_seconds
    with open(path, "a") as file:
        while try_lock(file.fileno()) is False:
            if time.monotonic() > end:
                raise TrackingError(
                    f"Another process is copying {path.parent} to MLflow at this moment.",
                    "one process at a time",
                    "try again in a moment, or leave it to the other process.",
                )
            time.sleep(_LOCK_INTERVAL_SECONDS)
        yield


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for file in _files(folder):
        digest.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:16]


def _read_log(path: Path) -> str:
    """Reads the end of a trial's log, without secrets."""
    try:
        with open(path, "rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - _MAXIMUM_LOG_BYTES)
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return ""
    if start:
        # Drops the incomplete first line, which may hold part of a secret. A progress bar ends lines with \r.
        content = b"".join(re.split(rb"[\r\n]", content, maxsplit=1)[1:])
    return redacted(content.decode(errors="replace"))
