"""Translates the records of a search and its trials to the content of MLflow runs. Pure functions.

Names are flat and the same for every trial, so that MLflow's tables and charts work. Memory is in MiB.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from accumtune.accumulation.batch_pair import BATCH_HYPERPARAMETERS
from accumtune.memory.budget import format_bytes, mib
from accumtune.tracking.records import SearchRecord, TrialRecord
from accumtune.tracking.redaction import first_line, redacted, redacted_value

SEARCH_TAG = "accumtune.search_id"
TRIAL_TAG = "accumtune.trial_id"
REASON_TAG = "accumtune.reason"
REUSED_TAG = "accumtune.reused_from"
KIND_TAG = "accumtune.kind"
ATTEMPT_TAG = "accumtune.attempt"
NOTE_TAG = "mlflow.note.content"
STATUSES = ("completed", "reused", "infeasible", "failed", "running")

_KNOWN_BEFORE = (*BATCH_HYPERPARAMETERS, "predicted_peak_memory_mib", "predicted_throughput_samples_per_second")

# MLflow's limits (mlflow.utils.validation): longer parameters, tags and names are refused.
_MAXIMUM_PARAM, _MAXIMUM_TAG, _MAXIMUM_KEY = 6000, 8000, 250
_LARGEST = 1.7976931348623157e308


@dataclass(frozen=True)
class Point:
    """One value of a metric."""

    name: str
    value: float
    step: int
    milliseconds: int


@dataclass(frozen=True)
class RunContent:
    """Everything that one MLflow run should hold, except for its artifacts."""

    name: str
    tags: Mapping[str, str]
    params: Mapping[str, str]
    scalars: tuple[Point, ...] = ()
    curves: tuple[Point, ...] = ()
    status: str = "RUNNING"
    started_milliseconds: int = 0
    ended_milliseconds: int | None = None
    attempt: int = 0
    texts: Mapping[str, str] = field(default_factory=dict)


def trial_run(trial: TrialRecord, search: SearchRecord) -> RunContent:
    """Returns the content of one trial's run."""
    of_all = {} if search.whole_batch_loss is None else {"whole_batch_loss": search.whole_batch_loss}
    params = {clean_name(name): _param(name, value) for name, value in {**of_all, **trial.hyperparameters}.items()}
    scalars = _scalars(trial, search)
    # A user's metric with one of these names is renamed, so that the two are not mixed.
    taken = set(_scalar_values(trial, search))
    started = trial.proposed_at or trial.started_at or trial.ended_at or search.started_at or 0.0
    texts = {"traceback.txt": redacted(trial.traceback)} if trial.traceback else {}
    return RunContent(
        name=_trial_name(trial),
        tags=_trial_tags(trial, search),
        params=params,
        scalars=scalars,
        curves=_curves(trial, taken),
        status=_trial_status(trial, search),
        started_milliseconds=_milliseconds(started),
        ended_milliseconds=_milliseconds(trial.ended_at or search.ended_at or started),
        attempt=trial.attempt,
        texts=texts,
    )


def search_run(search: SearchRecord, statuses: Mapping[str, int], note: str | None) -> RunContent:
    """Returns the content of the search's run, the parent of its trials' runs.

    Args:
        search: the search; its trials are not used.
        statuses: the number of trials by status.
        note: the report's Markdown; None before there is one: then a line of progress replaces it.
    """
    budget = search.memory_budget_bytes
    params = {
        "memory_budget": "none" if budget is None else format_bytes(budget),
        "objective": f"{search.objective_name} ({search.objective_direction})",
        "micro_batch_sizes": ", ".join(map(str, search.micro_batch_sizes)),
        "accumulation_steps_searched": ", ".join(map(str, search.accumulation_steps)),
        "search_over": search.search_over,
        "whole_batch_loss": search.whole_batch_loss,
        "own_train_step": search.own_train_step,
        "learning_rate_scaling": search.learning_rate_scaling,
        "ghost_batch_size": search.ghost_batch_size,
        "tuner": search.tuner,
        "max_trials": search.max_trials,
        "backend": search.backend,
    }
    tags = {
        SEARCH_TAG: search.search_id,
        KIND_TAG: "search",
        "accumtune.status": search.status,
        NOTE_TAG: (note or progress_note(search, statuses))[:_MAXIMUM_TAG],
        **{f"accumtune.trials_{status}": str(statuses.get(status, 0)) for status in STATUSES},
        **{f"accumtune.version.{name}": str(version) for name, version in search.versions.items()},
    }
    if len(search.resumed_at):  # MLflow's parameters cannot change: they are those of the first session
        tags |= {f"accumtune.{name}": str(params[name]) for name in _CHANGEABLE if params[name] is not None}
    if search.reason:
        tags[REASON_TAG] = redacted(search.reason)
    status = {"running": "RUNNING", "finished": "FINISHED", "interrupted": "KILLED"}.get(search.status, "FAILED")
    return RunContent(
        name=search.name or "search",
        tags=_clean_tags(tags),
        params={name: _param(name, value) for name, value in params.items() if value not in (None, "")},
        status=status,
        started_milliseconds=_milliseconds(search.started_at or 0.0),
        ended_milliseconds=_milliseconds(search.ended_at or search.started_at or 0.0),
    )


# The parameters that a later session may change.
_CHANGEABLE = ("memory_budget", "max_trials", "micro_batch_sizes", "accumulation_steps_searched")


def progress_note(search: SearchRecord, statuses: Mapping[str, int]) -> str:
    """Returns the description of the search's run until there is a report."""
    counts = ", ".join(f"{count} {status}" for status, count in sorted(statuses.items())) or "none yet"
    budget = search.memory_budget_bytes
    within = "no memory budget" if budget is None else f"a memory budget of {format_bytes(budget)}"
    return f"**{search.status.capitalize()}**: {search.tuner or 'search'} with {within}. Trials: {counts}."


def count_statuses(trials: Mapping[Any, TrialRecord]) -> Counter[str]:
    """Returns the number of trials by status."""
    return Counter(trial.status for trial in trials.values())


def dataset(search: SearchRecord) -> dict[str, str] | None:
    """Returns the training data as an MLflow dataset: name, digest and shapes; None if nothing is known."""
    shapes = search.data.get("shapes")
    if not search.data.get("name") and not shapes:
        return None
    text = json.dumps(shapes, sort_keys=True, default=str)
    # MLflow requires a digest; without one of the content, it is one of the shapes.
    digest = search.data.get("digest") or f"shapes-{_crc(text)}"
    return {
        "name": str(search.data.get("name") or search.name)[:500],
        "digest": str(digest)[:36],
        "profile": json.dumps({"shapes": shapes}, default=str),
    }


@functools.lru_cache(maxsize=4096)  # the same names recur in every epoch
def clean_name(name: str) -> str:
    """Returns a name that MLflow accepts: letters, digits and `_ - . : / space`, without `.` and `..` as parts.

    A changed name ends with a digest of the original, so that `a|b` and `a*b` stay different.
    """
    cleaned = re.sub(r"[^\w\-.: /]", "_", name)[:_MAXIMUM_KEY]
    # MLflow refuses what os.path.normpath would change.
    cleaned = "/".join(part for part in cleaned.split("/") if part.strip() not in ("", ".", "..")) or "_"
    return cleaned if cleaned == name else f"{cleaned[: _MAXIMUM_KEY - 9]}-{_crc(name)}"


def _param(name: str, value: Any) -> str:
    return str(redacted_value(name, value))[:_MAXIMUM_PARAM]


def _trial_name(trial: TrialRecord) -> str:
    """Returns the run's name: the trial as the search's table names it, and its batch sizes."""
    label = f"infeasible {trial.number}" if trial.status == "infeasible" else f"trial {trial.trial_id}"
    if not trial.effective_batch_size:
        return label
    batch = f"{trial.effective_batch_size}"
    if trial.micro_batch_size and trial.accumulation_steps:
        batch += f" = {trial.micro_batch_size} × {trial.accumulation_steps}"
    return f"{label}: {batch}"


def _trial_tags(trial: TrialRecord, search: SearchRecord) -> dict[str, str]:
    tags = {
        SEARCH_TAG: search.search_id,
        TRIAL_TAG: trial.trial_id,
        KIND_TAG: "trial",
        "accumtune.status": trial.status,
        "accumtune.memory_source": trial.memory_source,
        "accumtune.device": trial.device,
        REUSED_TAG: trial.reused_from,
        REASON_TAG: redacted(trial.reason),
        NOTE_TAG: _trial_note(trial, search),
    }
    return _clean_tags(tags)


def _clean_tags(tags: Mapping[str, str | None]) -> dict[str, str]:
    return {clean_name(name): value[:_MAXIMUM_TAG] for name, value in tags.items() if value}


def _trial_note(trial: TrialRecord, search: SearchRecord) -> str:
    """Returns the run's description: one line, because MLflow's table shows it too."""
    parts = []
    if trial.objective_value is not None:
        parts.append(f"{search.objective_name} {trial.objective_value:.4g}")
    if trial.peak_memory_bytes is not None:
        parts.append(f"peak {format_bytes(trial.peak_memory_bytes)}")
    if trial.predicted_peak_memory_bytes is not None:
        parts.append(f"predicted {format_bytes(trial.predicted_peak_memory_bytes)}")
    if trial.throughput_samples_per_second is not None:
        parts.append(f"{trial.throughput_samples_per_second:,.0f} samples/s")
    if trial.reused_from:
        parts.append(f"reused from trial {trial.reused_from}")
    if trial.reason and trial.status != "completed":
        parts.append(first_line(trial.reason))
    status = trial.status.capitalize()
    return f"{status}: {', '.join(parts)}" if parts else f"{status} ({trial.description or 'no result yet'})"


def _trial_status(trial: TrialRecord, search: SearchRecord) -> str:
    """Returns MLflow's status. It has none for "infeasible"; KILLED means: no result, and no error."""
    if trial.is_ended:
        return {"completed": "FINISHED", "reused": "FINISHED", "infeasible": "KILLED"}.get(trial.status, "FAILED")
    return "KILLED" if search.is_ended else "RUNNING"


def _scalar_values(trial: TrialRecord, search: SearchRecord) -> dict[str, Any]:
    predicted, peak = trial.predicted_peak_memory_bytes, trial.peak_memory_bytes
    return {
        **{name: trial.hyperparameters.get(name) for name in BATCH_HYPERPARAMETERS},
        # To the nearest KiB: tables show every digit.
        "predicted_peak_memory_mib": None if predicted is None else round(mib(predicted), 3),
        "predicted_throughput_samples_per_second": _rounded(trial.predicted_throughput_samples_per_second),
        "peak_memory_mib": None if peak is None else round(mib(peak), 3),
        "throughput_samples_per_second": _rounded(trial.throughput_samples_per_second),
        f"best_{search.objective_name}": trial.objective_value,
        "best_epoch": trial.best_epoch,
        "updates": trial.updates,
        "training_seconds": _rounded(trial.training_seconds, 3),
    }


def _rounded(value: float | None, digits: int = 1) -> float | None:
    return None if value is None else round(float(value), digits)


def _scalars(trial: TrialRecord, search: SearchRecord) -> tuple[Point, ...]:
    proposed = _milliseconds(trial.proposed_at or search.started_at or 0.0)
    ended = _milliseconds(trial.ended_at) if trial.ended_at else proposed
    return tuple(
        Point(clean_name(name), _storable(value), 0, proposed if name in _KNOWN_BEFORE else ended)
        for name, value in _scalar_values(trial, search).items()
        if isinstance(value, (int, float))
    )


def _curves(trial: TrialRecord, taken: set[str]) -> tuple[Point, ...]:
    points = []
    for epoch in trial.epochs:
        # The first execution has no prefix: all trials have one, so their curves compare.
        prefix = f"execution_{epoch.execution}/" if epoch.execution else ""
        for name, value in epoch.logs.items():
            name = clean_name(prefix + (f"epoch_{name}" if name in taken else name))
            points.append(Point(name, _storable(value), epoch.epoch, _milliseconds(epoch.time)))
    if not points and trial.reused_logs:
        step, when = trial.best_epoch or 0, _milliseconds(trial.ended_at or 0.0)
        points = [Point(clean_name(name), _storable(value), step, when) for name, value in trial.reused_logs.items()]
    return tuple(points)


def _storable(value: float) -> float:
    """Replaces infinities by the largest number, as MLflow's databases do, so that stored values compare as equal."""
    value = float(value)
    return value if math.isnan(value) else max(-_LARGEST, min(_LARGEST, value))


def _milliseconds(seconds: float | None) -> int:
    return int((seconds or 0.0) * 1000)


def _crc(text: str) -> str:
    import zlib

    return f"{zlib.crc32(text.encode(errors='surrogatepass')):08x}"
