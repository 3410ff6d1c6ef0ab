"""One trial from proposal to outcome: what was trained already, the pair that fits, and the training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from accumtune.errors import AccumtuneError, SearchError
from accumtune.execution.executors import Executor
from accumtune.execution.placement import Places
from accumtune.execution.profiling import Profiler
from accumtune.memory.budget import format_bytes
from accumtune.memory.prediction.profile import Profile
from accumtune.search.feasibility import realise, training_key
from accumtune.search.pruning.pruning import Pruning
from accumtune.search.trial.attempts import Attempts
from accumtune.search.trial.claims import Claims
from accumtune.search.trial.settings import SearchSettings
from accumtune.search.trial.trainings import STOPPED, Trainings
from accumtune.search.trial.trial_result import TrialResult, completed_result
from accumtune.tracking.journal import read_trial
from accumtune.worker.transport.task_directory import SearchDirectory, TaskDirectory


class TrialRunner:
    """Runs trials; `run` may be called from several threads at once.

    Args:
        settings: what is the same for all trials.
        directory: of the search.
        executor: where processes start.
        profiler: knows what models cost.
        places: which devices trials run on, one trial at a time on each.
        on_start: called with the trial's number, values and predicted peak when it begins to train.
        pruning: is told of each epoch and may say that the trial is hopeless; None trains all to their end.
    """

    def __init__(
        self,
        settings: SearchSettings,
        directory: SearchDirectory,
        executor: Executor,
        profiler: Profiler,
        on_start: Callable[[int, Mapping[str, Any], int | None], None] = lambda number, values, peak: None,
        places: Places | None = None,
        pruning: Pruning | None = None,
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._profiler = profiler
        self._places = places
        self._claims = Claims()
        self._trainings = Trainings(settings, directory, executor, pruning)
        self._attempts = Attempts(settings, self._trainings, profiler, on_start)

    def ask_to_stop(self, wait_seconds: float) -> None:
        """Asks trials that train to end with their epoch and to save their state; waits until they have.

        No other trial begins to train. Those that have not come to an end in time are left to `stop`.
        """
        self._trainings.ask_to_stop(wait_seconds)

    def stop(self) -> None:
        """Ends all trials that run, at once; they go on from their last epoch's checkpoint in a resumed search."""
        self._trainings.stop()

    def remember(self, trial_id: str, result: TrialResult) -> None:
        """A training of an earlier session that need not be done again."""
        self._claims.remember(training_key(result.values, self._settings.is_batch_coupled), (trial_id, result))

    def run(
        self, trial_id: str, number: int, space: Mapping[str, Any], fit_overrides: Mapping[str, Any]
    ) -> TrialResult:
        """Runs one proposal.

        Args:
            trial_id: Keras Tuner's.
            number: counts trials from 1.
            space: Keras Tuner's configuration of the proposal: the space and the values.
            fit_overrides: arguments of `fit` that this trial alone has (Hyperband's epochs).
        """
        directory = self._directory.trial(trial_id)
        try:
            with contextlib.nullcontext() if self._places is None else self._places.lease():
                facts = self._profiler.inspect(space)
                result = self._run(directory, trial_id, number, facts.completed(space), fit_overrides)
                return replace(result, space=[*facts.appeared["space"], *result.space])
        except AccumtuneError as error:
            if self._trainings.is_stopping:  # a probe that was ended with the search
                return TrialResult("stopped", dict(space["values"]), reason=STOPPED)
            if isinstance(error, SearchError):  # says nothing of this trial, and the next one would fare no better
                raise
            reason = str(error).splitlines()[0]
            return TrialResult("failed", dict(space["values"]), reason=reason, traceback=str(error))

    def _run(
        self,
        directory: TaskDirectory,
        trial_id: str,
        number: int,
        space: Mapping[str, Any],
        fit_overrides: Mapping[str, Any],
    ) -> TrialResult:
        values = dict(space["values"])
        earlier_result = self._ended_before(directory, values)
        if earlier_result is not None:
            return earlier_result
        parameters, most = self._profiler.inspect(space).parameters, self._settings.max_model_size
        if most and parameters > most:
            reason = f"its {parameters:,} parameters are more than max_model_size={most:,}"
            return TrialResult("infeasible", values, reason=reason)
        profile = self._profiler.profile(space)
        budget = self._settings.memory_budget_bytes
        pair = realise(
            profile,
            values["effective_batch_size"],
            self._settings.micro_batch_sizes,
            budget,
            largest_micro_batch_size=values.get("micro_batch_size") if self._settings.searches_pairs else None,
        )
        if pair is None:
            return TrialResult("infeasible", values, reason=_why_infeasible(profile, values, budget))
        values |= pair.as_hyperparameters()
        if self._settings.has_own_run_trial:
            return self._attempts.train(directory, trial_id, number, {**space, "values": values}, pair, fit_overrides)
        key = training_key(values, self._settings.is_batch_coupled)
        earlier = self._claims.claim(key)
        if isinstance(earlier, tuple):
            source, result = earlier
            reason = f"the same training as trial {source}"
            values = {**result.values, **values, **_batch_of(result)}
            return replace(result, status="reused", values=values, reason=reason, reused_from=source)
        try:
            result = self._attempts.train(directory, trial_id, number, {**space, "values": values}, pair, fit_overrides)
        except BaseException as error:
            self._claims.release(key, earlier, None)
            raise error
        trained = (trial_id, result) if result.status == "completed" else None
        self._claims.release(key, earlier, trained)
        if trained is not None and result.space:  # the next proposal of the same names them
            self.remember(trial_id, result)
        return result

    def _ended_before(self, directory: TaskDirectory, values: Mapping[str, Any]) -> TrialResult | None:
        """The result of a trial that had completed when the search was killed, before the oracle was told."""
        record = read_trial(directory.path)
        # The pair that ran may be a smaller one than was proposed.
        proposed = {name: value for name, value in values.items() if name not in _PAIR}
        same = all(record.hyperparameters.get(name) == value for name, value in proposed.items())
        return completed_result(record) if record.status == "completed" and same else None


_PAIR = ("micro_batch_size", "accumulation_steps")


def _batch_of(result: TrialResult) -> dict[str, Any]:
    return {name: result.values[name] for name in _PAIR}


def _why_infeasible(profile: Profile, values: Mapping[str, Any], budget: int | None) -> str:
    if not profile.measurements:
        why = "its parameters alone are larger"
    elif any(measurement.is_feasible for measurement in profile.measurements):
        effective = values["effective_batch_size"]
        predicted, kept = profile.predict_peak_memory(1, effective), profile.sample_bytes * effective
        why = f"predicted {format_bytes(predicted)}"
        if kept > predicted / 2:
            why += (
                f", of which {format_bytes(kept)} are what the effective batch keeps at once: its data, or the outputs "
                "for a loss over all of it; a smaller effective batch needs less"
            )
    else:
        why = "every probe ran out of memory"
    return f"not even micro-batch 1 fits in {format_bytes(budget or 0)} ({why})"
