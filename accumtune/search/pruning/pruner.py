"""Stops hopeless trials, by a forecast from their epochs or by one of Optuna's pruners.

The pruner runs in the search's process, where it sees all trials. A trial's process checks after each epoch whether it
was asked to stop. The next epoch may start before that, so a trial trains at most one epoch too many.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from typing import Any, Protocol

from accumtune.oracles.optuna_study import new_study
from accumtune.search.pruning.forecast import forecast
from accumtune.tracking.journal import read_trial
from accumtune.tracking.records import TrialRecord
from accumtune.worker.transport.outcome import Outcome
from accumtune.worker.transport.task_directory import TaskDirectory

_INTERVAL_SECONDS = 0.1


class Pruner(Protocol):
    """Receives the epochs and ends of trials, and decides which trials are hopeless."""

    def report(self, trial_id: str, epoch: int, value: float) -> None: ...

    def is_hopeless(self, trial_id: str, curve: Sequence[float], finished: Sequence[Sequence[float]]) -> bool: ...

    def end(self, trial_id: str, curve: Sequence[float], status: str) -> None: ...


class ForecastPruner:
    """Calls a trial hopeless where its forecast is."""

    def __init__(self, direction: str) -> None:
        self._direction = direction

    def report(self, trial_id: str, epoch: int, value: float) -> None:
        pass

    def is_hopeless(self, trial_id: str, curve: Sequence[float], finished: Sequence[Sequence[float]]) -> bool:
        found = forecast(curve, finished, self._direction)
        return found is not None and found.is_hopeless

    def end(self, trial_id: str, curve: Sequence[float], status: str) -> None:
        pass


class OptunaPruner:
    """Calls a trial hopeless where an `optuna.pruners.BasePruner` would prune it."""

    def __init__(self, pruner: Any, direction: str) -> None:
        self._study = new_study(direction, pruner=pruner)
        self._trials: dict[str, Any] = {}

    def report(self, trial_id: str, epoch: int, value: float) -> None:
        if trial_id not in self._trials:
            self._trials[trial_id] = self._study.ask()
        self._trials[trial_id].report(value, step=epoch)

    def is_hopeless(self, trial_id: str, curve: Sequence[float], finished: Sequence[Sequence[float]]) -> bool:
        return bool(self._trials[trial_id].should_prune())

    def end(self, trial_id: str, curve: Sequence[float], status: str) -> None:
        from optuna.trial import TrialState

        trial = self._trials.pop(trial_id)
        if status == "completed" and curve[-1] == curve[-1]:
            self._study.tell(trial, curve[-1])
        else:
            self._study.tell(trial, state=TrialState.PRUNED if status == "pruned" else TrialState.FAIL)


class PruningMonitor:
    """Collects the epochs of a search's trials and asks the pruner; may be used from several threads at once.

    Args:
        pruner: an `optuna.pruners.BasePruner`; `"forecast"` to stop a trial whose forecast is hopeless.
        objective: Keras Tuner's; trials are compared by its value after each epoch.
    """

    def __init__(self, pruner: Any, objective: Any) -> None:
        self._objective = objective
        direction = objective.direction
        self._pruner: Pruner = ForecastPruner(direction) if pruner == "forecast" else OptunaPruner(pruner, direction)
        # By epoch, because a trial that is restarted or resumed reports some epochs again.
        self._curves: dict[str, dict[int, float]] = {}
        self._finished: list[list[float]] = []
        self._forecasts: dict[str, float] = {}
        self._lock = threading.Lock()

    def is_hopeless(self, trial_id: str, epoch: int, logs: Mapping[str, float]) -> bool:
        """Reports an epoch of a trial and returns whether to stop the trial."""
        with self._lock:
            if not self._report(trial_id, epoch, logs):
                return False
            return self._pruner.is_hopeless(trial_id, self._curve(trial_id), self._finished)

    def forecast(self, trial_id: str) -> float | None:
        """Returns the objective that was forecast for a pruned trial, or None."""
        return self._forecasts.get(trial_id)

    def end(self, trial_id: str, status: str) -> None:
        """Notes that a trial `"completed"`, was `"pruned"`, or ended in another way and is not compared with."""
        with self._lock:
            if trial_id not in self._curves:
                return
            curve = self._curve(trial_id)
            del self._curves[trial_id]
            self._pruner.end(trial_id, curve, status)
            if status == "pruned" and (found := forecast(curve, self._finished, self._objective.direction)):
                self._forecasts[trial_id] = found.expected
            # Others are compared with completed trials alone: pruned ones would lower the bar.
            elif status == "completed":
                self._finished.append(curve)

    def remember(self, records: Iterable[TrialRecord]) -> None:
        """Adds the epochs of an earlier session's trials."""
        for record in records:
            if record.status != "completed":
                continue
            with self._lock:
                for epoch in record.epochs:
                    if epoch.execution == 0:
                        self._report(record.trial_id, epoch.epoch, epoch.logs)
            self.end(record.trial_id, "pruned" if is_pruned(record.reason) else "completed")

    def _report(self, trial_id: str, epoch: int, logs: Mapping[str, float]) -> bool:
        if not self._objective.has_value(logs):
            return False
        value = float(self._objective.get_value(logs))
        self._curves.setdefault(trial_id, {})[epoch] = value
        self._pruner.report(trial_id, epoch, value)
        return True

    def _curve(self, trial_id: str) -> list[float]:
        return [value for _, value in sorted(self._curves[trial_id].items())]


def watch_epochs(future: Future[Outcome], directory: TaskDirectory, monitor: PruningMonitor) -> Outcome:
    """Waits for a trial, passes its epochs to the monitor as they end, and asks it to stop if it is hopeless."""
    seen = size = 0
    trial_id = directory.path.name.removeprefix("trial_")
    is_done = False
    while not is_done:
        is_done = bool(wait([future], timeout=_INTERVAL_SECONDS).done)
        if (grown := _size(directory)) == size:
            continue
        size = grown
        epochs = [epoch for epoch in read_trial(directory.path).epochs if epoch.execution == 0]
        for epoch in epochs[seen:]:
            if monitor.is_hopeless(trial_id, epoch.epoch, epoch.logs) and not is_done:
                directory.prune_file.touch()
        seen = len(epochs)
    outcome = future.result()
    is_stopped = outcome.is_completed and outcome.result.get("pruned_after_epochs") is not None
    monitor.end(trial_id, "pruned" if is_stopped else outcome.status)
    return outcome


def _size(directory: TaskDirectory) -> int:
    try:
        return directory.journal_file.stat().st_size
    except FileNotFoundError:
        return 0


_PRUNED = "pruned after epoch "


def pruned_reason(epochs: int) -> str:
    """Returns the journaled reason of a trial that was stopped after so many epochs."""
    return f"{_PRUNED}{epochs}: compared with other trials at this epoch, it could not become the best"


_PAUSED = "paused after epoch "


def paused_reason(epochs: int) -> str:
    """Returns the journaled reason of a trial that was paused after so many epochs."""
    return f"{_PAUSED}{epochs}: others promised more"


def is_paused(reason: str) -> bool:
    """Returns whether a trial was paused, and can go on."""
    return reason.startswith(_PAUSED)


def is_pruned(reason: str) -> bool:
    """Returns whether a completed trial was stopped early."""
    return reason.startswith(_PRUNED)
