"""Replays journals into MLflow, idempotently: brings what is missing, and nothing twice."""

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
from accumtune.tracking.mlflow.server_health import Pulse
from accumtune.tracking.mlflow.store import PARENT, RunState, Store
from accumtune.tracking.records import SearchRecord, TrialRecord
from accumtune.tracking.redaction import redacted
from accumtune.tracking.report.report_files import NOTE_FILE, REPORT_FOLDER, name_run, source_of

LOG_FILE = "log.txt"
_LOCK_FILE = "tracking.lock"
_SYNCED_TAG = "accumtune.synced"
_MODEL_TAG = "accumtune.model_key"
# What is written for a record; raised when a later version writes more, so that a sync brings it to old runs too.
_CONTENT_VERSION = 1
_MAXIMUM_LOG_BYTES = 2**20
_LOCK_INTERVAL_SECONDS = 0.1


class Replay:
    """Brings one search's journals into one MLflow store.

    What it remembers only saves work: `run(is_fresh=True)` asks the store what it has and completes it.

    Args:
        folder: the search's.
        tracking_uri: MLflow's.
    """

    def __init__(self, folder: Path, tracking_uri: str) -> None:
        self.folder = folder
        self.tracking_uri = tracking_uri
        self.pulse = Pulse(is_local=tracking_uri.startswith("sqlite:"))
        self.experiment_id: str | None = None
        self.parent_run_id: str | None = None
        self.view_key: str | None = None
        self._view: str | None = None
        self._store: Store | None = None
        self._states: dict[str, RunState] = {}
        self._trials: dict[Path, tuple[int, TrialRecord]] = {}
        self._brought: dict[Path, tuple[int, bool]] = {}

    def run(self, is_fresh: bool, wait_seconds: float = 0.0) -> None:
        """Brings what is new. Any exception means that something is still missing; the next call goes on.

        Args:
            is_fresh: look into the store, rather than trusting what this process has written.
            wait_seconds: how long to wait while another process does the same.
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
        parent = self._bring_parent(store, search)
        trials = sorted(self._trials.items(), key=lambda item: (item[1][1].number, item[1][1].trial_id))
        is_changed = self._view is None
        for folder, (size, trial) in trials:
            key = (size, search.is_ended)
            if self._brought.get(folder) != key:
                self._bring_trial(store, folder, size, trial, search)
                self._brought[folder] = key
                is_changed = True
        self._bring_report(store, search)
        self._bring_model(store, search)
        store.end(self._states[PARENT], parent)
        if is_changed:
            self._bring_view(store, search, [trial for _, (_, trial) in trials])

    def _bring_view(self, store: Store, search: SearchRecord, trials: list[TrialRecord]) -> None:
        value = saved_view.encoded_view(search, trials)
        if value is not None and value != self._view:
            self.view_key = saved_view.bring_view(store.client, store.experiment_id, search, value)
            self._view = value

    def _open(self, search: SearchRecord, is_fresh: bool) -> Store:
        if self._store is None or is_fresh:
            self._store = Store(self.tracking_uri, search.name or "accumtune", self.pulse)
            self._states = self._store.runs(search.search_id)
            self._brought.clear()
            self._view = None
        else:
            self._store.check()
        self.experiment_id = self._store.experiment_id
        return self._store

    def _read_trials(self) -> None:
        """Only journals that have grown are read again, so a tick costs little however many trials there are."""
        for folder in trial_folders(self.folder):
            try:
                size = os.stat(folder / TRIAL_JOURNAL).st_size
            except FileNotFoundError:
                continue
            if self._trials.get(folder, (-1, None))[0] != size:
                trial = read_trial(folder)
                # An empty journal says nothing yet; one that only has an end belongs to a trial that failed early.
                if trial.proposed_at or trial.started_at or trial.ended_at:
                    self._trials[folder] = (size, trial)

    def _bring_parent(self, store: Store, search: SearchRecord) -> run_content.RunContent:
        statuses = run_content.count_statuses({folder: trial for folder, (_, trial) in self._trials.items()})
        if PARENT not in self._states:
            self._states[PARENT] = store.create(run_content.search_run(search, statuses, None))
        state = self._states[PARENT]
        self.parent_run_id = state.run_id
        if search.is_ended:
            name_run(self.folder / REPORT_FOLDER, state.run_id, self.tracking_uri)
        content = run_content.search_run(search, statuses, self._note(search))
        store.bring(state, content)
        store.bring_dataset(state, run_content.dataset(search))
        return content

    def _bring_trial(self, store: Store, folder: Path, size: int, trial: TrialRecord, search: SearchRecord) -> None:
        state = self._states.get(trial.trial_id)
        fingerprint = f"{_CONTENT_VERSION}:{size}" if trial.is_ended else ""
        if state is not None and fingerprint and state.tags.get(_SYNCED_TAG) == fingerprint:
            # The search's run may be another one than it was.
            store.set_tags(state, {"mlflow.parentRunId": self.parent_run_id or ""})
            return
        content = run_content.trial_run(trial, search)
        if state is None:
            state = store.create(content, self.parent_run_id)
        elif store.conflicts(state, content):
            state = store.replace(state, content, self.parent_run_id)
        self._states[trial.trial_id] = state
        store.bring(state, content)
        store.set_tags(state, {"mlflow.parentRunId": self.parent_run_id or ""})
        if trial.is_ended:
            store.bring_dataset(state, run_content.dataset(search))
            log = _read_log(folder / LOG_FILE)
            for name, text in {**content.texts, **({LOG_FILE: log} if log else {})}.items():
                store.client.log_text(state.run_id, text, name)
        store.end(state, content)
        if trial.is_ended:
            # Last, so that a run which has it has everything.
            store.set_tags(state, {_SYNCED_TAG: fingerprint})

    def _bring_report(self, store: Store, search: SearchRecord) -> None:
        """The files that the search has written for its parent run, whenever they are other ones."""
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

    def _bring_model(self, store: Store, search: SearchRecord) -> None:
        """The best model, where the search has saved one for the registry."""
        model = model_registry.wanted(self.folder)
        state = self._states[PARENT]
        if model is None or not search.is_ended or state.tags.get(_MODEL_TAG) == model["key"]:
            return
        version = model_registry.bring_model(store.client, state.run_id, self.folder)
        store.set_tags(state, {"accumtune.registered_model": version or "", _MODEL_TAG: model["key"]})

    def _note(self, search: SearchRecord) -> str | None:
        # While a resumed search runs, the report is that of the session before.
        if not search.is_ended:
            return None
        try:
            return (self.folder / REPORT_FOLDER / NOTE_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None


@contextlib.contextmanager
def _locked(path: Path, wait_seconds: float) -> Iterator[None]:
    """One process at a time, so that the search and `accumtune sync` do not both make a run."""
    end = time.monotonic() + wait_seconds
    with open(path, "a") as file:
        while try_lock(file.fileno()) is False:
            if time.monotonic() > end:
                raise TrackingError(
                    f"Another process is bringing {path.parent} into MLflow at this moment.",
                    "one at a time",
                    "wait a moment and try again, or leave it to the other one.",
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
    """The end of a trial's log, without secrets."""
    try:
        with open(path, "rb") as file:
            start = max(0, os.fstat(file.fileno()).st_size - _MAXIMUM_LOG_BYTES)
            file.seek(start)
            content = file.read()
    except FileNotFoundError:
        return ""
    if start:
        # Of the line in which the cut lies, the rest may be that of a secret. A progress bar ends lines with \r.
        content = b"".join(re.split(rb"[\r\n]", content, maxsplit=1)[1:])
    return redacted(content.decode(errors="replace"))
