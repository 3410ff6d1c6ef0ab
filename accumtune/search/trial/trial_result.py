"""Describes how a trial ended, for the oracle, the journal and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accumtune.memory.budget import format_bytes
from accumtune.search.pruning.pruner import is_paused, paused_reason, pruned_reason
from accumtune.tracking.journal import Journal
from accumtune.tracking.records import TrialRecord
from accumtune.worker.transport.task_directory import TaskDirectory

# The part of the report of a trial's process that the journal keeps.
_REPORTED = (
    "peak_memory_bytes", "memory_source", "device", "throughput_samples_per_second", "updates", "training_seconds",
    "precision_policy",
)  # fmt: skip


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended.

    Args:
        status: `"completed"`, `"reused"`, `"infeasible"`, `"failed"`, or `"stopped"` together with the search, which
            can resume it.
        reason: one line for the user; empty for a completed trial, unless it was pruned.
        values: the hyperparameters that ran, the three batch sizes included.
        metrics: of the best epoch, by name.
        space: Keras Tuner's configuration of the hyperparameters that were first declared while this trial's model was
            built or trained.
    """

    status: str
    values: Mapping[str, Any]
    reason: str = ""
    traceback: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    best_epoch: int = 0
    predicted_peak_memory_bytes: float | None = None
    report: Mapping[str, Any] = field(default_factory=dict)
    reused_from: str | None = None
    space: Sequence[Mapping[str, Any]] = ()

    @property
    def is_paused(self) -> bool:
        """Whether the trial has completed only for now."""
        return self.status == "completed" and is_paused(self.reason)


def trained_result(
    values: Mapping[str, Any],
    predicted_peak_memory_bytes: int,
    report: Mapping[str, Any],
    objective_name: str,
    memory_budget_bytes: int | None,
) -> TrialResult:
    """Decides the status of a training that ran to its end, from the report of its process."""
    pruned_after, paused_after = report.get("pruned_after_epochs"), report.get("paused_after_epochs")
    reason = "" if pruned_after is None else pruned_reason(pruned_after)
    result = TrialResult(
        "completed", values, metrics=report["metrics"], best_epoch=report["best_epoch"],
        predicted_peak_memory_bytes=predicted_peak_memory_bytes, report=report,
        reason=reason if paused_after is None else paused_reason(paused_after),
    )  # fmt: skip
    value, peak = report["metrics"].get(objective_name), report["peak_memory_bytes"]
    if value is not None and not math.isfinite(value):
        was = "was NaN in every epoch" if value != value else "was infinite"
        reason = f"{objective_name} {was}: the training diverged (a smaller learning rate may help)"
        return replace(result, status="failed", reason=reason)
    if memory_budget_bytes is not None and peak > memory_budget_bytes:
        # Possible where the backend cannot limit its allocator and the process's memory was measured.
        reason = f"it took {format_bytes(peak)}, more than the budget of {format_bytes(memory_budget_bytes)}"
        return replace(result, status="infeasible", reason=reason)
    return result


def completed_result(record: TrialRecord) -> TrialResult:
    """Makes the result of a completed trial from its journal."""
    return TrialResult(
        "completed",
        dict(record.hyperparameters),
        reason=record.reason,
        metrics=dict(record.metrics),
        best_epoch=record.best_epoch or 0,
        predicted_peak_memory_bytes=record.predicted_peak_memory_bytes,
        report={name: getattr(record, name) for name in _REPORTED},
        space=record.appeared_space,
    )


def write_result(
    directory: TaskDirectory, trial_id: str, number: int, result: TrialResult, objective_name: str
) -> None:
    """Appends a trial's end to its journal, after its proposal if it never trained."""
    journal = Journal(directory.journal_file)
    if not any(event["event"] == "proposed" for event in journal.events()):
        journal.append(
            "proposed", trial_id=trial_id, number=number, hyperparameters=dict(result.values),
            predicted_peak_memory_bytes=result.predicted_peak_memory_bytes,
        )  # fmt: skip
    journal.append(
        "ended", status=result.status, reason=result.reason, traceback=result.traceback,
        objective_value=result.metrics.get(objective_name), best_epoch=result.best_epoch,
        reused_from=result.reused_from, metrics=dict(result.metrics),
        **{name: result.report.get(name) for name in _REPORTED},
    )  # fmt: skip
