"""Runs each training of a search once, also if several trials need it at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from accumtune.search.trial.trial_result import TrialResult

# The id of the trial that trained, and its result.
Trained = tuple[str, TrialResult]


class TrainingCache:
    """Results by key (`feasibility.training_key`); may be used from several threads at once."""

    def __init__(self) -> None:
        self._trainings: dict[str, Future[Trained | None]] = {}
        self._lock = threading.Lock()

    def add(self, key: str, trial_id: str, result: TrialResult) -> None:
        """Adds a training that is done."""
        self._trainings[key] = Future()
        self._trainings[key].set_result((trial_id, result))

    def forget_paused(self, trial_id: str) -> None:
        """Forgets the result of a paused trial, which goes on."""
        with self._lock:
            for key, known in list(self._trainings.items()):
                trained = known.result() if known.done() else None
                if trained is not None and trained[0] == trial_id and trained[1].is_paused:
                    del self._trainings[key]

    def get_or_train(self, key: str, trial_id: str, train: Callable[[], TrialResult]) -> Trained:
        """Returns the completed training of this key; waits if another trial is running it, and trains if none is.

        Only completed trainings are kept: if another trial's training fails, one of the waiting trials trains.
        """
        while True:
            with self._lock:
                known = self._trainings.get(key)
                if known is None:
                    own = self._trainings[key] = Future()
                    break
            trained = known.result()
            if trained is not None:
                return trained
        completed = None
        try:
            result = train()
            if result.status == "completed":
                completed = (trial_id, result)
            return trial_id, result
        finally:
            if completed is None:
                with self._lock:
                    del self._trainings[key]
            own.set_result(completed)
