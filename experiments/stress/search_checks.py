"""What the faults of `crash.py` and `cluster_faults.py` must not undo, leave running, or change in MLflow."""

from __future__ import annotations

import json
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import mlflow

from accumtune.tracking.journal import Journal, read_search, read_trial, trial_folders


@dataclass(frozen=True)
class Snapshot:
    """What a kill must not undo."""

    journals: dict[Path, bytes]
    starts_of_completed: dict[Path, int]
    processes: tuple[int, ...]


def snapshot(folder: Path) -> Snapshot:
    files = [folder / "search.jsonl", *(trial / "journal.jsonl" for trial in trial_folders(folder))]
    journals = {file: file.read_bytes() for file in files if file.exists()}
    completed = [trial for trial in trial_folders(folder) if has_completed(trial)]
    pids = [trial.pid for trial in read_search(folder).trials if trial.pid]
    return Snapshot(journals, {trial: starts(trial) for trial in completed}, tuple(pids))


def has_completed(trial: Path) -> bool:
    if read_trial(trial).status == "completed":
        return True
    try:  # the child had written it, the search had not read it
        return json.loads((trial / "outcome.json").read_text())["status"] == "completed"
    except (OSError, ValueError):
        return False


def starts(trial: Path) -> int:
    return sum(event["event"] == "started" for event in Journal(trial / "journal.jsonl").events())


def compare(folder: Path, before: Snapshot) -> list[str]:
    """What a kill has undone."""
    faults = []
    for file, content in before.journals.items():
        whole = content[: content.rfind(b"\n") + 1]
        if not file.exists() or not file.read_bytes().startswith(whole):
            faults.append(f"{file.relative_to(folder)} lost lines")
    for trial, count in before.starts_of_completed.items():
        if starts(trial) != count:
            faults.append(f"{trial.name} had completed and was trained again")
    return faults


def left_over(pids: tuple[int, ...], seconds: float = 10.0) -> list[int]:
    """Processes of trials that outlive their search."""
    end = time.monotonic() + seconds
    while True:
        alive = [pid for pid in pids if Path(f"/proc/{pid}").exists() and b"accumtune" in _command(pid)]
        if not alive or time.monotonic() > end:
            return alive
        time.sleep(0.05)


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def look(folder: Path, uri: str) -> tuple[list[str], int, int]:
    """The faults of a finished search in MLflow, how many epochs were compared, and how many runs were replaced."""
    record, client = read_search(folder), mlflow.MlflowClient(tracking_uri=uri)
    (experiment,) = [item for item in client.search_experiments() if item.name == record.name]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    deleted = client.search_runs([experiment.experiment_id], run_view_type=mlflow.entities.ViewType.DELETED_ONLY)
    faults = [f"run {run.info.run_name!r} is {run.info.status}" for run in runs if run.info.status != "FINISHED"]
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    if len(parents) != 1:
        faults.append(f"{len(parents)} parent runs")
    children = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    if any(run.data.tags["mlflow.parentRunId"] != parents[0].info.run_id for run in children):
        faults.append("an orphaned run")
    names = Counter(run.data.tags.get("accumtune.trial_id") for run in children)
    if set(names) != {trial.trial_id for trial in record.trials} or any(count > 1 for count in names.values()):
        faults.append(f"runs {dict(names)} for trials {[trial.trial_id for trial in record.trials]}")
    by_trial = {run.data.tags.get("accumtune.trial_id"): run for run in children}
    epochs = 0
    for trial in record.trials:
        run = by_trial.get(trial.trial_id)
        if run is None:
            continue
        for name in ("loss", "val_loss"):
            expected = [(epoch.epoch, repr(epoch.logs[name])) for epoch in trial.epochs]
            found = client.get_metric_history(run.info.run_id, name) if expected else []
            # As text: a NaN is not even equal to itself.
            if sorted((metric.step, repr(metric.value)) for metric in found) != sorted(expected):
                faults.append(f"{run.info.run_name!r}: {name} is not what its journal says")
            epochs += len(expected)
    artifacts = {item.path for item in client.list_artifacts(parents[0].info.run_id)} if parents else set()
    faults += [f"no {name}" for name in ("note.md", "best_config.json", "pareto.png") if name not in artifacts]
    return faults, epochs // 2, len(deleted)

