"""Trains a trial several times, each in a process of its own, and combines the reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

from accumtune.worker.transport.outcome import Outcome


def run_executions(run: Callable[[int, list[dict[str, Any]]], Outcome], executions: int) -> Outcome:
    """Trains several times, each time in a process of its own: TensorFlow keeps the variables of a deleted model
    (keras-tuner #395).

    Args:
        run: trains once, given the number of the execution and the reports of those before.
        executions: at least 1. After one that did not complete or was pruned, the others are left out.
    """
    reports: list[dict[str, Any]] = []
    for execution in range(executions):
        outcome = run(execution, list(reports))
        if not outcome.is_completed:
            return outcome
        reports.append(outcome.result)
        if outcome.result.get("pruned_after_epochs") is not None:
            break
    return replace(outcome, result=combined(reports))


def combined(reports: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Combines the reports of a trial's executions.

    The metrics of each execution's best epoch are averaged, as in Keras Tuner; times and updates are summed; the peak
    is the highest.
    """
    if len(reports) == 1:
        return dict(reports[0])
    names = reports[0]["metrics"]
    seconds = [report["seconds_per_update"] for report in reports if report["seconds_per_update"]]
    speeds = [report["throughput_samples_per_second"] for report in reports if report["throughput_samples_per_second"]]
    return {
        **reports[-1],
        "metrics": {name: fmean(report["metrics"][name] for report in reports) for name in names},
        "best_epoch": int(fmean(report["best_epoch"] for report in reports)),
        "peak_memory_bytes": max(report["peak_memory_bytes"] for report in reports),
        "seconds_per_update": median(seconds) if seconds else None,
        "throughput_samples_per_second": median(speeds) if speeds else None,
        "updates": sum(report["updates"] for report in reports),
        "training_seconds": sum(report["training_seconds"] for report in reports),
    }
