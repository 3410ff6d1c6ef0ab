"""How a trial ended, for the oracle, the journal and the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from accumtune.memory.budget import format_bytes
from accumtune.search.pruning.pruning import pruned_reason
from accumtune.tracking.records import TrialRecord


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended.

    Args:
        status: `"completed"`, `"reused"`, `"infeasible"`, `"failed"`, or `"stopped"`: with the search, which will
            go on with it.
        reason: one line for a person; of a completed trial only where it was pruned.
        values: the hyperparameters that really ran, the three batch sizes included.
        metrics: the best epoch's, by name.
        space: of the hyperparameters that appeared when the model was built or trained, as in Keras Tuner's
            configuration.
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


def judged(
    values: Mapping[str, Any],
    predicted_peak_memory_bytes: int,
    report: Mapping[str, Any],
    objective_name: str,
    memory_budget_bytes: int | None,
) -> TrialResult:
    """What a training that came to its end counts as, from what its process reported."""
    pruned_after = report.get("pruned_after_epochs")
    result = TrialResult(
        "completed", values, metrics=report["metrics"], best_epoch=report["best_epoch"],
        predicted_peak_memory_bytes=predicted_peak_memory_bytes, report=report,
        reason="" if pruned_after is None else pruned_reason(pruned_after),
    )  # fmt: skip
    value, peak = report["metrics"].get(objective_name), report["peak_memory_bytes"]
    if value is not None and not math.isfinite(value):
        was = "was NaN in every epoch" if value != value else "was infinite"
        reason = f"{objective_name} {was}: the training diverged (a smaller learning rate may help)"
        return replace(result, status="failed", reason=reason)
    if memory_budget_bytes is not None and peak > memory_budget_bytes:
        # Where the backend has no allocator limit on this device, the process is measured instead.
        reason = f"it took {format_bytes(peak)}, more than the budget of {format_bytes(memory_budget_bytes)}"
        return replace(result, status="infeasible", reason=reason)
    return result


def completed_result(record: TrialRecord) -> TrialResult:
    """The result of a completed trial, from its journal."""
    names = ("peak_memory_bytes", "throughput_samples_per_second", "memory_source", "device", "updates",
             "training_seconds", "precision_policy")  # fmt: skip
    return TrialResult(
        "completed",
        dict(record.hyperparameters),
        reason=record.reason,
        metrics=dict(record.metrics),
        best_epoch=record.best_epoch or 0,
        predicted_peak_memory_bytes=record.predicted_peak_memory_bytes,
        report={name: getattr(record, name) for name in names},
        space=record.appeared_space,
    )
