"""Reads the learning curves of a search's trials from their journals, for an oracle that pauses trials."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from accumtune.oracles.freeze_thaw_oracle import Curve
from accumtune.search.pruning.pruner import is_paused
from accumtune.tracking.journal import read_trial
from accumtune.worker.transport.task_directory import SearchDirectory


def trial_curves(files: SearchDirectory, objective: Any) -> Callable[[str], Curve]:
    """Returns what reads the curve of a trial; one that reused another's result has that one's, and cannot go on."""

    def curve_of(trial_id: str) -> Curve:
        record = read_trial(files.trial(trial_id).path)
        if record.reused_from:
            return replace(curve_of(record.reused_from), is_paused=False, trained=0)
        logs = [epoch.logs for epoch in record.epochs if objective.has_value(epoch.logs)]
        return Curve(tuple(float(objective.get_value(it)) for it in logs), is_paused(record.reason), len(logs))

    return curve_of
