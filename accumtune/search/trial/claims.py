"""The same training is done once, also where several trials of a search ask for it at the same time."""

from __future__ import annotations

import threading
from concurrent.futures import Future

from accumtune.search.trial.trial_result import TrialResult

Trained = tuple[str, TrialResult]  # by which trial, and how it ended


class Claims:
    """Who does which training; may be used from several threads at once.

    A key says which training it is (`feasibility.training_key`).
    """

    def __init__(self) -> None:
        self._trainings: dict[str, Future[Trained]] = {}
        self._lock = threading.Lock()

    def remember(self, key: str, trained: Trained) -> None:
        """A training that was done before."""
        future: Future[Trained] = Future()
        future.set_result(trained)
        self._trainings[key] = future

    def claim(self, key: str) -> Trained | Future[Trained]:
        """The finished training of this key, waiting for it if it runs; or a claim to do it, to be released then."""
        while True:
            with self._lock:
                known = self._trainings.get(key)
                if known is None:
                    claim: Future[Trained] = Future()
                    self._trainings[key] = claim
                    return claim
            try:
                return known.result()
            except _NotTrained:
                continue  # whoever had claimed it failed: this trial tries for itself

    def release(self, key: str, claim: Future[Trained], trained: Trained | None) -> None:
        """Gives the training to those who wait for it; with None one of them does it."""
        with self._lock:
            if trained is None:
                del self._trainings[key]
        if trained is None:
            claim.set_exception(_NotTrained())
        else:
            claim.set_result(trained)


class _NotTrained(Exception):
    """The trial that was to do a training has failed."""
