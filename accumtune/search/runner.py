"""One trial from proposal to outcome: find the pair that fits, train it, and take surprises as they come."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from accumtune.errors import AccumtuneError, WorkerError
from accumtune.memory.budget import format_bytes
from accumtune.memory.device import memory_limit_environment
from accumtune.memory.profile import Measurement, Profile
from accumtune.search.claims import Claims
from accumtune.search.feasibility import Pair, next_smaller, realise, training_key
from accumtune.search.pruning import Pruning, watch
from accumtune.search.trial_result import TrialResult, completed_result, judged
from accumtune.tracking.journal import Journal, read_trial
from accumtune.trials.devices import Places
from accumtune.trials.directory import SearchDirectory, TaskDirectory
from accumtune.trials.executions import run_executions
from accumtune.trials.executors import Executor
from accumtune.trials.outcome import Outcome
from accumtune.trials.profiling import Profiler, out_of_memory

# A trial that takes the whole machine down with it would be run for ever, once after each resume.
_MAX_CRASHES = 5
# So may one that takes every machine of a cluster down.
_MAX_LOSSES = 10


@dataclass(frozen=True)
class SearchSettings:
    """What is the same for all trials of a search."""

    memory_budget_bytes: int | None
    micro_batch_sizes: tuple[int, ...]
    searches_pairs: bool
    is_batch_coupled: bool
    executions_per_trial: int
    seed: int
    objective_name: str
    trial_timeout_seconds: float | None


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
        self._executor = executor
        self._profiler = profiler
        self._on_start = on_start
        self._pruning = pruning
        self._claims = Claims()
        self._lock = threading.Lock()
        self._places = places
        self._training: set[TaskDirectory] = set()  # whose processes run
        self._is_stopping = False

    def ask_to_stop(self, wait_seconds: float) -> None:
        """Asks trials that train to end with their epoch and to save their state; waits until they have.

        No other trial begins to train. Those that have not come to an end in time are left to `stop`.
        """
        with self._lock:
            self._is_stopping = True
            for directory in self._training:
                directory.ask_to_stop()
        deadline = time.monotonic() + wait_seconds
        while self._training and time.monotonic() < deadline:
            time.sleep(0.05)

    def stop(self) -> None:
        """Ends all trials that run, at once; they go on from their last epoch's checkpoint in a resumed search."""
        self._is_stopping = True
        self._executor.close()

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
                return self._run(directory, trial_id, number, space, fit_overrides)
        except AccumtuneError as error:
            if self._is_stopping:  # a probe that was ended with the search
                return TrialResult("stopped", dict(space["values"]), reason=_STOPPED)
            if isinstance(error, WorkerError):  # says nothing of this trial, and the next one would fare no better
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
        key = training_key(values, self._settings.is_batch_coupled)
        earlier = self._claims.claim(key)
        if isinstance(earlier, tuple):
            source, result = earlier
            reason = f"the same training as trial {source}"
            return replace(
                result, status="reused", values={**values, **_batch_of(result)}, reason=reason, reused_from=source
            )
        try:
            result = self._train(directory, trial_id, number, {**space, "values": values}, pair, fit_overrides)
        except BaseException as error:
            self._claims.release(key, earlier, None)
            raise error
        self._claims.release(key, earlier, (trial_id, result) if result.status == "completed" else None)
        return result

    def _ended_before(self, directory: TaskDirectory, values: Mapping[str, Any]) -> TrialResult | None:
        """The result of a trial that had completed when the search was killed, before the oracle was told."""
        record = read_trial(directory.path)
        # The pair that ran may be a smaller one than was proposed.
        proposed = {name: value for name, value in values.items() if name not in _PAIR}
        same = all(record.hyperparameters.get(name) == value for name, value in proposed.items())
        return completed_result(record) if record.status == "completed" and same else None

    def _train(
        self,
        directory: TaskDirectory,
        trial_id: str,
        number: int,
        space: dict[str, Any],
        pair: Pair,
        fit_overrides: Mapping[str, Any],
    ) -> TrialResult:
        journal = Journal(directory.journal_file)
        losses = 0
        while True:
            profile = self._profiler.profile(space)
            peak = profile.predict_peak_memory(pair.micro_batch_size, pair.accumulation_steps)
            values = {**space["values"], **pair.as_hyperparameters()}
            journal.append(
                "proposed",
                trial_id=trial_id,
                number=number,
                hyperparameters=values,
                signature=profile.signature,
                predicted_peak_memory_bytes=peak,
                predicted_throughput_samples_per_second=profile.predict_throughput(
                    pair.micro_batch_size, pair.accumulation_steps
                ),
                description=f"effective batch {pair}",
            )
            attempt = read_trial(directory.path).attempt + 1
            finished = self._finished_before(directory, attempt, values)
            if finished is not None:
                return self._result(values, peak, profile.signature, pair, finished)
            if _crashes(journal) >= _MAX_CRASHES:
                reason = f"the search was gone {_MAX_CRASHES} times while it ran: it may take the machine down"
                return TrialResult("failed", values, reason=reason, traceback=directory.log_tail())
            self._on_start(number, values, peak)
            outcome = self._start(directory, attempt, {**space, "values": values}, fit_overrides)
            if outcome.status == "stopped" or (self._is_stopping and not outcome.is_completed):
                journal.append("stopped", attempt=attempt, why=_STOPPED)
                return TrialResult("stopped", values, reason=_STOPPED)
            if outcome.status == "lost":
                # Started anew by the search rather than by Ray: each start is an attempt, with epochs of its own.
                journal.append("stopped", attempt=attempt, why=outcome.reason)
                losses += 1
                if losses < _MAX_LOSSES:
                    continue
                reason = f"it was lost {losses} times, the last time because {outcome.reason}"
                return TrialResult("failed", values, reason=reason)
            if outcome.status != "out_of_memory":
                return self._result(values, peak, profile.signature, pair, outcome)
            journal.append("stopped", attempt=attempt, why="out of memory")
            # A surprise: the profile learns it, and the same effective batch is tried with a smaller micro-batch.
            self._profiler.learn(
                profile.signature,
                out_of_memory(pair.micro_batch_size, pair.accumulation_steps, self._settings.memory_budget_bytes),
            )
            smaller = next_smaller(pair, self._settings.micro_batch_sizes, self._settings.searches_pairs)
            if smaller is None:
                return TrialResult(
                    "infeasible",
                    values,
                    reason=f"micro-batch {pair.micro_batch_size} ran out of memory, and there is no smaller one",
                )
            pair = smaller

    def _finished_before(self, directory: TaskDirectory, attempt: int, values: Mapping[str, Any]) -> Outcome | None:
        """What a child had written when the search was killed, before it could read it."""
        if attempt == 1 or (written := directory.read_outcome()) is None or written["status"] != "completed":
            return None
        if self._settings.executions_per_trial > 1:
            return None  # it is one of several, and the reports of the others went with the search
        _, arguments = directory.read_task()
        return Outcome(**written) if arguments["hyperparameters"]["values"] == values else None

    def _start(
        self, directory: TaskDirectory, attempt: int, space: dict[str, Any], fit_overrides: Mapping[str, Any]
    ) -> Outcome:
        """Trains as often as the search asks, within the time that a trial has."""
        timeout_seconds = self._settings.trial_timeout_seconds
        started = time.monotonic()

        def run(execution: int, earlier: list[dict[str, Any]]) -> Outcome:
            arguments = self._arguments(attempt, space, fit_overrides, execution, earlier)
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
            "payload": str(self._directory.payload_file.resolve()),
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
            arguments["initial_weights"] = str(self._directory.trial(source).weights_file.resolve())
        return arguments

    def _execute(self, directory: TaskDirectory, arguments: dict[str, Any], timeout_seconds: float | None) -> Outcome:
        budget = self._settings.memory_budget_bytes
        environment = memory_limit_environment(self._executor.backend, budget)
        with self._lock:
            if self._is_stopping:
                return Outcome("stopped", reason=_STOPPED)
            directory.write_task("train", arguments)
            self._training.add(directory)
        try:
            future = self._executor.submit(
                directory, environment, timeout_seconds, is_memory_limited=budget is not None
            )
            if self._pruning is None or arguments["execution"] > 0:
                return future.result()
            return watch(future, directory, self._pruning)
        finally:
            with self._lock:
                self._training.discard(directory)

    def _result(
        self, values: dict[str, Any], predicted: int, signature: str, pair: Pair, outcome: Outcome
    ) -> TrialResult:
        if not outcome.is_completed:
            return TrialResult("failed", values, reason=outcome.reason, traceback=outcome.traceback)
        report = outcome.result
        measurement = Measurement(
            micro_batch_size=pair.micro_batch_size,
            accumulation_steps=pair.accumulation_steps,
            peak_memory_bytes=report["peak_memory_bytes"],
            seconds_per_update=report["seconds_per_update"],
            memory_source=report["memory_source"],
            memory_limit_bytes=self._settings.memory_budget_bytes,
        )
        self._profiler.learn(signature, measurement)
        settings = self._settings
        return judged(values, predicted, report, settings.objective_name, settings.memory_budget_bytes)


def _crashes(journal: Journal) -> int:
    """How often the trial was started and neither ended nor was stopped: then the search was killed with it."""
    names = [event["event"] for event in journal.events()]
    return names.count("started") - names.count("stopped") - names.count("ended")


_STOPPED = "the search was stopped"
_PAIR = ("micro_batch_size", "accumulation_steps")


def _batch_of(result: TrialResult) -> dict[str, Any]:
    return {name: result.values[name] for name in _PAIR}


def _why_infeasible(profile: Profile, values: Mapping[str, Any], budget: int | None) -> str:
    if not profile.measurements:
        why = "its parameters alone are larger"
    elif any(measurement.is_feasible for measurement in profile.measurements):
        why = f"predicted {format_bytes(profile.predict_peak_memory(1, values['effective_batch_size']))}"
    else:
        why = "every probe ran out of memory"
    return f"not even micro-batch 1 fits in {format_bytes(budget or 0)} ({why})"
