"""The content of an MLflow store after a sync, read through MLflow's client."""

import re
import sqlite3
import time
from pathlib import Path

from accumtune.tracking.mlflow.tracker import Tracker


class Runs:
    """What a store holds, by trial id; the parent under "parent"."""

    def __init__(self, uri, experiment="made"):
        from mlflow import MlflowClient

        self.client = MlflowClient(tracking_uri=uri)
        self.experiment = self.client.get_experiment_by_name(experiment)
        runs = list(self.client.search_runs([self.experiment.experiment_id])) if self.experiment else []
        self.by_id = {run.data.tags.get("accumtune.trial_id", "parent"): run for run in runs}
        assert len(self.by_id) == len(runs), "a run is there twice"

    def __getitem__(self, name):
        return self.by_id[name]

    def history(self, name, metric):
        return [(it.step, it.value) for it in self.client.get_metric_history(self[name].info.run_id, metric)]

    def artifacts(self, name):
        return {file.path for file in self.client.list_artifacts(self[name].info.run_id)}

    def text(self, name, artifact):
        return Path(self.client.download_artifacts(self[name].info.run_id, artifact)).read_text()

    def content(self):
        """Everything that does not differ from one store to another, to compare stores with."""
        told = {}
        for name, run in self.by_id.items():
            tags = {key: value for key, value in run.data.tags.items() if not re.search("parentRunId|best_run_id", key)}
            curves = {metric: self.history(name, metric) for metric in run.data.metrics}
            info = (run.info.run_name, run.info.status, run.info.start_time, run.info.end_time)
            data = [it.dataset.digest for it in run.inputs.dataset_inputs]
            told[name] = repr((info, sorted(run.data.params.items()), sorted(tags.items()), sorted(curves.items()),
                               sorted(self.artifacts(name)), data))  # fmt: skip
        return told


def dump(uri):
    """Every row of the database."""
    with sqlite3.connect(uri.removeprefix("sqlite:///")) as connection:
        return list(connection.iterdump())


def sync(made, uri):
    Tracker(made.folder, uri).sync()
    return Runs(uri, made.name)


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
