"""Starts the processes that train trials, within the budget and the time limit, and stops them."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from accumtune.execution.executors import Executor
from accumtune.execution.repeated_training import run_executions
from accumtune.memory.device import memory_limit_environment
from accumtune.search.pruning.pruner import PruningMonitor, watch_epochs
from accumtune.search.trial.trial_settings import TrialSettings
from accumtune.tracking.journal import read_trial
from accumtune.worker.transport.outcome import Outcome
from accumtune.worker.transport.task_directory import SearchDirectory, TaskDirectory

STOPPED = "the search was stopped"


class TrainingProcesses:
    """Starts trials' processes and stops those that run; may be used from several threads at once.

    Args:
        settings: the same for all trials.
        directory: of the search.
        executor: where processes start.
        pruning: decides after each epoch whether to stop a trial; None trains all to their end.
    """

    def __init__(
        self,
        settings: TrialSettings,
        directory: SearchDirectory,
        executor: Executor,
        pruning: PruningMonitor | None = None,
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._executor = executor
        self._pruning = pruning
        self._lock = threading.Lock()
        self._running: set[TaskDirectory] = set()
        self._is_stopping = False

    @property
    def is_stopping(self) -> bool:
        return self._is_stopping

    def ask_to_stop(self, wait_seconds: float) -> None:
        """Asks running trials to end after their epoch and save their state, and waits for that.

        No other trial starts to train. Trials that take longer are left to `stop`.
        """
        with self._lock:
            self._is_stopping = True
            for directory in self._running:
                directory.ask_to_stop()
        deadline = time.monotonic() + wait_seconds
        while self._running and time.monotonic() < deadline:
            time.sleep(0.05)

    def stop(self) -> None:
        """Kills all running trials; a resumed search continues them from their last checkpoint."""
        self._is_stopping = True
        self._executor.close()

    def train(
        self,
        directory: TaskDirectory,
        attempt: int,
        space: dict[str, Any],
        fit_overrides: Mapping[str, Any],
        identity: str = "",
        pause_after: int | None = None,
    ) -> Outcome:
        """Trains a trial `executions_per_trial` times, within its time limit.

        `identity` is that of the training: a checkpoint that was saved under another one is not used. The training
        pauses after `pause_after` epochs, if that is given.
        """
        timeout_seconds = self._settings.trial_timeout_seconds
        started = time.monotonic()

        def run(execution: int, earlier: list[dict[str, Any]]) -> Outcome:
            arguments = self._arguments(attempt, space, fit_overrides, execution, earlier)
            arguments |= {"identity": identity} | ({} if pause_after is None else {"pause_after": pause_after})
            left = timeout_seconds
            if timeout_seconds is not None and earlier:
                left = max(0.1, timeout_seconds - (time.monotonic() - started))
            return self._execute(directory, arguments, left)

        return run_executions(run, self._settings.executions_per_trial)

    def _arguments(
        self,
        attempt: int,
        space: dict[str, Any],
        fit_overrides: Mapping[str, Any],
        execution: int,
        earlier: list[dict[str, Any]],
    ) -> dict[str, Any]:
        arguments: dict[str, Any] = {
            "payload": space.get("payload") or str(self._directory.payload_file.resolve()),
            "hyperparameters": space,
            "memory_budget_bytes": self._settings.memory_budget_bytes,
            "seed": self._settings.seed,
            "attempt": attempt,
            "execution": execution,
            "executions": self._settings.executions_per_trial,
            "earlier": earlier,
            "fit_overrides": dict(fit_overrides),
        }
        source = space["values"].get("tuner/trial_id")
        if source:
            arguments["initial_weights"] = str(self._trained(source).weights_file.resolve())
        return arguments

    def _trained(self, trial_id: str) -> TaskDirectory:
        """Returns the directory of a trial, or of the one that trained in its place."""
        directory = self._directory.trial(trial_id)
        earlier = read_trial(directory.path).reused_from
        return directory if earlier is None else self._trained(earlier)

    def _execute(self, directory: TaskDirectory, arguments: dict[str, Any], timeout_seconds: float | None) -> Outcome:
        budget = self._settings.memory_budget_bytes
        environment = memory_limit_environment(self._executor.backend, budget)
        with self._lock:
            if self._is_stopping:
                return Outcome("stopped", reason=STOPPED)
            directory.write_task("train", arguments)
            self._running.add(directory)
        try:
            future = self._executor.submit(
                directory, environment, timeout_seconds, is_memory_limited=budget is not None
            )
            if self._pruning is None or arguments["execution"] > 0:
                return future.result()
            return watch_epochs(future, directory, self._pruning)
        finally:
            with self._lock:
                self._running.discard(directory)
