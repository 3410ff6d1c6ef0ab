"""The training of one trial: attempts until one ends it, with less memory or anew where that is what it takes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from accumtune.errors import SearchError
from accumtune.execution.profiling import Profiler, out_of_memory
from accumtune.memory.prediction.profile import Measurement, Profile
from accumtune.search.feasibility import Pair, next_smaller
from accumtune.search.trial.settings import SearchSettings
from accumtune.search.trial.trainings import STOPPED, Trainings
from accumtune.search.trial.trial_result import TrialResult, judged
from accumtune.tracking.journal import Journal, read_trial
from accumtune.worker.transport.outcome import Outcome
from accumtune.worker.transport.task_directory import TaskDirectory

# A trial that takes the whole machine down with it would be run for ever, once after each resume.
_MAX_CRASHES = 5
# So may one that takes every machine of a cluster down.
_MAX_LOSSES = 10


class Attempts:
    """Trains trials and takes surprises as they come; may be used from several threads at once.

    Args:
        settings: what is the same for all trials.
        trainings: starts their processes.
        profiler: knows what models cost, and learns what they took.
        on_start: called with the trial's number, values and predicted peak when an attempt begins to train.
    """

    def __init__(
        self,
        settings: SearchSettings,
        trainings: Trainings,
        profiler: Profiler,
        on_start: Callable[[int, Mapping[str, Any], int | None], None],
    ) -> None:
        self._settings = settings
        self._trainings = trainings
        self._profiler = profiler
        self._on_start = on_start

    def train(
        self,
        directory: TaskDirectory,
        trial_id: str,
        number: int,
        space: dict[str, Any],
        pair: Pair,
        fit_overrides: Mapping[str, Any],
    ) -> TrialResult:
        """Trains a trial with this pair, or with a smaller micro-batch of the same effective batch.

        Args:
            directory: of the trial.
            trial_id: Keras Tuner's.
            number: counts trials from 1.
            space: Keras Tuner's configuration of the proposal: the space and the values.
            pair: the fastest whose predicted peak fits.
            fit_overrides: arguments of `fit` that this trial alone has.
        """
        journal = Journal(directory.journal_file)
        losses = 0
        facts = self._profiler.inspect(space)
        identity = self._identity(facts.identity)
        while True:
            profile = self._profiler.profile(space)
            budget = self._settings.memory_budget_bytes
            peak = profile.predict_peak_memory(pair.micro_batch_size, pair.accumulation_steps, budget)
            values = {**space["values"], **pair.as_hyperparameters()}
            journal.append(
                "proposed", trial_id=trial_id, number=number, **_proposal(profile, pair, values, peak),
                sample_shapes=facts.sample_shapes, identity=dict(facts.identity), versions=self._settings.versions,
            )  # fmt: skip
            attempt = read_trial(directory.path).attempt + 1
            finished = self._finished_before(directory, attempt, values, identity)
            if finished is not None:
                return _with_appeared(self._result(values, peak, profile.signature, pair, finished), directory)
            if _crashes(journal) >= _MAX_CRASHES:
                reason = f"the search was gone {_MAX_CRASHES} times while it ran: it may take the machine down"
                return TrialResult("failed", values, reason=reason, traceback=directory.log_tail())
            self._on_start(number, values, peak)
            outcome = self._trainings.train(directory, attempt, {**space, "values": values}, fit_overrides, identity)
            if outcome.status == "stopped" or (self._trainings.is_stopping and not outcome.is_completed):
                journal.append("stopped", attempt=attempt, why=STOPPED)
                return TrialResult("stopped", values, reason=STOPPED)
            if outcome.status == "lost":
                # Started anew by the search rather than by Ray: each start is an attempt, with epochs of its own.
                journal.append("stopped", attempt=attempt, why=outcome.reason)
                losses += 1
                if losses < _MAX_LOSSES:
                    continue
                reason = f"it was lost {losses} times, the last time because {outcome.reason}"
                return TrialResult("failed", values, reason=reason)
            if outcome.status != "out_of_memory":
                return _with_appeared(self._result(values, peak, profile.signature, pair, outcome), directory)
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

    def _identity(self, model: Mapping[str, str]) -> str:
        """Of a training: what the search's session and the model are, whichever batch it was inspected with."""
        session = self._settings.identity
        ignored = {"batch", "device"} | ({"optimizer's learning_rate"} if "learning_rate_scaling" in session else set())
        text = json.dumps([dict(session), {k: v for k, v in model.items() if k not in ignored}], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _finished_before(
        self, directory: TaskDirectory, attempt: int, values: Mapping[str, Any], identity: str
    ) -> Outcome | None:
        """What a child had written when the search was killed, before it could read it."""
        if attempt == 1 or (written := directory.read_outcome()) is None or written["status"] != "completed":
            return None
        if self._settings.executions_per_trial > 1:
            return None  # it is one of several, and the reports of the others went with the search
        _, arguments = directory.read_task()
        same = arguments["hyperparameters"]["values"] == values and arguments.get("identity", "") == identity
        return Outcome(**written) if same else None

    def _result(
        self, values: dict[str, Any], predicted: int, signature: str, pair: Pair, outcome: Outcome
    ) -> TrialResult:
        if not outcome.is_completed:
            if outcome.error is not None and outcome.error["class"] == SearchError.__name__:
                raise SearchError(*outcome.error["arguments"])
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


def _with_appeared(result: TrialResult, directory: TaskDirectory) -> TrialResult:
    """With the hyperparameters that were asked for only while the model trained."""
    record = read_trial(directory.path)
    values = {**record.hyperparameters, **result.values}
    return replace(result, values=values, space=record.appeared_space)


def _proposal(profile: Profile, pair: Pair, values: Mapping[str, Any], peak: int) -> dict[str, Any]:
    """What the journal says of an attempt before it begins."""
    throughput = profile.predict_throughput(pair.micro_batch_size, pair.accumulation_steps)
    return {
        "hyperparameters": values,
        "signature": profile.signature,
        "predicted_peak_memory_bytes": peak,
        "predicted_throughput_samples_per_second": throughput,
        "description": f"effective batch {pair}",
    }


def _crashes(journal: Journal) -> int:
    """How often the trial was started and neither ended nor was stopped: then the search was killed with it."""
    names = [event["event"] for event in journal.events()]
    return names.count("started") - names.count("stopped") - names.count("ended")
