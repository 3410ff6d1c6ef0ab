"""Wraps an MLflow store: finds the runs of one experiment by their tags, and writes what they lack.

Everything goes through an explicit `MlflowClient`: no global state, no active run, no autologging. Runs are found by
tags, so that a new process finds them after a kill, and creates them again if they were deleted.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accumtune.errors import TrackingError
from accumtune.tracking.mlflow.run_content import (
    ATTEMPT_TAG,
    REASON_TAG,
    REUSED_TAG,
    SEARCH_TAG,
    TRIAL_TAG,
    Point,
    RunContent,
)
from accumtune.tracking.mlflow.server_health import Heartbeat, MonitoredClient, check_reachable, refuse_other_server
from accumtune.tracking.tracking_uri import absolute_uri, sqlite_path

# The key of the search's run, the parent; trials' runs have their ids as keys.
PARENT = ""
# MLflow accepts 1000 values in one call, of which at most 100 parameters and 100 tags.
_METRICS_PER_BATCH = 900
_ITEMS_PER_BATCH = 100


class RunState:
    """The known content of one MLflow run."""

    def __init__(self, run: Any) -> None:
        self.run_id: str = run.info.run_id
        self.name: str = run.info.run_name
        self.status: str = run.info.status
        self.tags: dict[str, str] = dict(run.data.tags)
        self.params: dict[str, str] = dict(run.data.params)
        self.metrics: dict[str, float] = dict(run.data.metrics)
        self.has_dataset = bool(run.inputs and run.inputs.dataset_inputs)
        # (name, step) of every point of a curve; None until they were read from the store.
        self.points: set[tuple[str, int]] | None = None if self.metrics else set()


class Store:
    """The experiment of one search.

    Args:
        tracking_uri: of the store.
        experiment_name: the experiment is created if it does not exist, and restored if it was deleted.
        heartbeat: beats with each answer of the store.

    Raises:
        TrackingError: the server does not answer.
    """

    def __init__(self, tracking_uri: str, experiment_name: str, heartbeat: Heartbeat) -> None:
        self.uri = absolute_uri(tracking_uri)
        self._database = sqlite_path(self.uri)
        check_reachable(self.uri)
        if self._database is not None:
            self._database.parent.mkdir(parents=True, exist_ok=True)
            if not self._database.exists():
                _make_database(self._database)
        from mlflow import MlflowClient

        self.client: Any = MonitoredClient(MlflowClient(tracking_uri=self.uri, registry_uri=self.uri), heartbeat)
        heartbeat.beat()
        self.experiment_id = self._experiment(experiment_name)

    def check(self) -> None:
        """Checks that the store can still be written to.

        Raises:
            TrackingError: the server does not answer, or the database's file was deleted, into which SQLite would
                write without an error.
        """
        if self._database is not None and not self._database.exists():
            raise TrackingError(
                f"The tracking database {self._database} was removed while it was in use.",
                "a database that stays where it is.",
                "run the search again, or `accumtune sync`: it creates a new database with all results.",
            )
        check_reachable(self.uri)

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name, artifact_location=self._artifact_location()))
            except MlflowException:
                # Another search has just created it.
                found = self.client.get_experiment_by_name(name)
                if found is None:
                    raise
        refuse_other_server(self.uri, found.artifact_location)
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        return str(found.experiment_id)

    def _artifact_location(self) -> str | None:
        if self._database is not None:
            return (self._database.parent / "artifacts").resolve().as_uri()
        # A server chooses its own. For a database MLflow's default is "./mlruns", which a UI that was started in
        # another folder does not find.
        is_served = self.uri.startswith(("http:", "https:", "databricks", "uc:"))
        return None if is_served else (Path("mlruns") / "artifacts").resolve().as_uri()

    def runs(self, search_id: str) -> dict[str, RunState]:
        """Returns the runs of a search by trial id, the parent under `PARENT`.

        If two processes have created the same run, the one that holds less is deleted.
        """
        found: dict[str, RunState] = {}
        for run in self._search(f"tags.`{SEARCH_TAG}` = '{search_id}'"):
            state = RunState(run)
            key = state.tags.get(TRIAL_TAG, PARENT)
            other = found.get(key)
            if other is not None:
                state, duplicate = sorted((other, state), key=lambda it: (-len(it.tags), -len(it.metrics), it.run_id))
                self.client.delete_run(duplicate.run_id)
            found[key] = state
        return found

    def _search(self, query: str) -> Iterator[Any]:
        token = None
        while True:
            page = self.client.search_runs([self.experiment_id], query, max_results=1000, page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def create(self, content: RunContent, parent_run_id: str | None = None) -> RunState:
        """Creates a run with its tags, by which it is found again."""
        tags = dict(content.tags)
        if content.curves:
            tags[ATTEMPT_TAG] = str(content.attempt)
        if parent_run_id is not None:
            tags["mlflow.parentRunId"] = parent_run_id
        run = self.client.create_run(
            self.experiment_id, start_time=content.started_milliseconds, tags=tags, run_name=content.name
        )
        return RunState(run)

    def conflicts(self, state: RunState, content: RunContent) -> bool:
        """Returns whether a run differs in what MLflow cannot change: parameters, or epochs of an earlier attempt."""
        if any(state.params.get(name, value) != value for name, value in content.params.items()):
            return True
        if any(not _same(state.metrics.get(point.name, point.value), point.value) for point in content.scalars):
            return True
        return state.tags.get(ATTEMPT_TAG, str(content.attempt)) != str(content.attempt)

    def replace(self, state: RunState, content: RunContent, parent_run_id: str | None) -> RunState:
        """Deletes a run that conflicts with the present attempt, and creates another."""
        self.client.delete_run(state.run_id)
        return self.create(content, parent_run_id)

    def log_missing(self, state: RunState, content: RunContent) -> None:
        """Writes what a run lacks or has differently. Its end is left to `end`, after its files are uploaded."""
        from mlflow.entities import Metric, Param, RunTag

        points = self._missing_points(state, content)
        tags = {name: value for name, value in content.tags.items() if state.tags.get(name) != value}
        if content.curves:
            # Before the first point, so that the epochs' attempt is known.
            self.set_tags(state, {ATTEMPT_TAG: str(content.attempt)})
        params = {name: value for name, value in content.params.items() if name not in state.params}
        heads = [*(Param(*item) for item in params.items()), *(RunTag(*item) for item in tags.items())]
        # Each call is a transaction that waits for the disk, so there are as few as MLflow's limits allow.
        chunks = _chunks(heads, _ITEMS_PER_BATCH), _chunks(points, _METRICS_PER_BATCH)
        parts: Iterator[tuple[list[Any], list[Point]]] = itertools.zip_longest(*chunks, fillvalue=[])
        for some, part in parts:
            self.client.log_batch(
                state.run_id,
                metrics=[Metric(point.name, point.value, point.milliseconds, point.step) for point in part],
                params=[item for item in some if isinstance(item, Param)],
                tags=[item for item in some if isinstance(item, RunTag)],
            )
            self._remember(state, part)
        for name in (REASON_TAG, REUSED_TAG):
            # Left from an earlier attempt or session.
            if name in state.tags and name not in content.tags:
                self.client.delete_tag(state.run_id, name)
                del state.tags[name]
        state.tags |= tags
        state.params |= params
        if state.name != content.name:
            self.client.update_run(state.run_id, name=content.name)
            state.name = content.name
        if content.status == "RUNNING":
            self.end(state, content)

    def _missing_points(self, state: RunState, content: RunContent) -> list[Point]:
        if state.points is None:
            known = {point.name for point in content.curves} & set(state.metrics)
            history = [(name, self.client.get_metric_history(state.run_id, name)) for name in sorted(known)]
            state.points = {(name, metric.step) for name, metrics in history for metric in metrics}
        missing = [point for point in content.scalars if point.name not in state.metrics]
        return missing + [point for point in content.curves if (point.name, point.step) not in state.points]

    def _remember(self, state: RunState, points: list[Point]) -> None:
        state.metrics |= {point.name: point.value for point in points}
        assert state.points is not None
        state.points |= {(point.name, point.step) for point in points}

    def end(self, state: RunState, content: RunContent) -> None:
        """Sets the status, after everything else, so that a run is complete once it is finished."""
        if state.status == content.status:
            return
        if content.status == "RUNNING":
            self.client.update_run(state.run_id, status="RUNNING")
        else:
            self._terminate(state.run_id, content.status, content.ended_milliseconds)
        state.status = content.status

    def _terminate(self, run_id: str, status: str, ended_milliseconds: int | None) -> None:
        from mlflow.entities import RunStatus

        # `set_terminated` prints the address of each run, among the search's own lines.
        store = getattr(getattr(self.client, "_tracking_client", None), "store", None)
        if store is None:
            self.client.set_terminated(run_id, status, ended_milliseconds)
        else:
            store.update_run_info(run_id, RunStatus.from_string(status), ended_milliseconds, None)

    def set_tags(self, state: RunState, tags: Mapping[str, str]) -> None:
        """Sets the tags that differ."""
        for name, value in tags.items():
            if state.tags.get(name) != value:
                self.client.set_tag(state.run_id, name, value)
                state.tags[name] = value

    def log_dataset(self, state: RunState, dataset: Mapping[str, str] | None) -> None:
        """Logs the training data as the run's input, once."""
        if dataset is None or state.has_dataset:
            return
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entity = Dataset(
            name=dataset["name"], digest=dataset["digest"], source_type="code", source="{}", profile=dataset["profile"]
        )
        context = InputTag("mlflow.data.context", "training")
        self.client.log_inputs(state.run_id, datasets=[DatasetInput(dataset=entity, tags=[context])])
        state.has_dataset = True


def _make_database(path: Path) -> None:
    """Creates an SQLite store in a temporary folder and moves it to its place when it is complete.

    MLflow creates some forty tables one by one. If the process is killed in between, or two processes do it at once,
    no MLflow opens the database again ("table ... already exists").
    """
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        made, whole = Path(folder) / "made.db", Path(folder) / "whole.db"
        MlflowClient(tracking_uri=f"sqlite:///{made}", registry_uri=f"sqlite:///{made}").search_experiments()
        # A copy, because MLflow keeps a connection to the file that it has created.
        shutil.copyfile(made, whole)
        with contextlib.suppress(FileExistsError):  # another process has created it
            os.link(whole, path)


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


def _chunks(items: list[Any], size: int) -> Iterator[list[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
