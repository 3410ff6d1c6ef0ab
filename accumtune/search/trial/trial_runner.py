"""Runs one trial: chooses a pair that fits, and trains with it, in several attempts if need be.

A trial passes through these states; each arrow is a method of `TrialRunner`:

    Proposal ── run ──> Attempt ── _next_state ──> TrialResult     completed, failed, infeasible, stopped
                           ^            │
                           └────────────┘  out of memory: the same effective batch with a smaller micro-batch
                                           lost with its machine: the same again

A proposal can also end at once: as `reused` (the same training as an earlier trial), `infeasible` (no pair fits), or
`completed` (in an earlier session that was killed before the oracle had the result).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from accumtune.accumulation.batch_pair import BatchPair, ghost_batch_of
from accumtune.errors import AccumtuneError, SearchError
from accumtune.execution.executors import Executor
from accumtune.execution.placement import Places
from accumtune.execution.profiling import ModelFacts, Profiler, out_of_memory
from accumtune.memory.budget import format_bytes
from accumtune.memory.prediction.profile import Measurement, Profile
from accumtune.search.feasibility import next_smaller_pair, pair_for_proposal, training_key
from accumtune.search.pruning.pruner import PruningMonitor, is_paused
from accumtune.search.trial.training_cache import TrainingCache
from accumtune.search.trial.training_process import STOPPED, TrainingProcesses
from accumtune.search.trial.trial_result import TrialResult, completed_result, trained_result
from accumtune.search.trial.trial_settings import TrialSettings
from accumtune.tracking.journal import Journal, read_trial
from accumtune.worker.transport.outcome import Outcome
from accumtune.worker.transport.task_directory import SearchDirectory, TaskDirectory

# Limits a trial that crashes the machine: otherwise each resumed search would run it again.
_MAX_CRASHES = 5
# Limits a trial that crashes the machines of a cluster.
_MAX_LOSSES = 10


@dataclass(frozen=True)
class Proposal:
    """A trial that the oracle proposes.

    Args:
        trial_id: Keras Tuner's.
        number: counts trials from 1.
        directory: of the trial.
        space: Keras Tuner's configuration of the hyperparameters: the space and the values.
        fit_overrides: arguments of `fit` for this trial alone (Hyperband's epochs).
        pause_after: the number of epochs after which its training pauses; None: it trains to its end.
    """

    trial_id: str
    number: int
    directory: TaskDirectory
    space: Mapping[str, Any]
    fit_overrides: Mapping[str, Any]
    pause_after: int | None = None

    @property
    def values(self) -> dict[str, Any]:
        return dict(self.space["values"])


@dataclass(frozen=True)
class Attempt:
    """One start of a trial's training.

    Args:
        pair: what it trains with.
        losses: how many earlier attempts were lost with their machines.
    """

    pair: BatchPair
    losses: int = 0


class TrialRunner:
    """Runs trials; `run` may be called from several threads at once.

    Args:
        settings: the same for all trials.
        directory: of the search.
        executor: where processes start.
        profiler: predicts memory and throughput, and learns from what trials took.
        on_start: called with the trial's number, values and predicted peak when an attempt starts to train.
        places: the devices that trials run on, one trial at a time on each.
        pruning: decides after each epoch whether to stop a trial; None trains all to their end.
    """

    def __init__(
        self,
        settings: TrialSettings,
        directory: SearchDirectory,
        executor: Executor,
        profiler: Profiler,
        on_start: Callable[[int, Mapping[str, Any], int | None], None] = lambda number, values, peak: None,
        places: Places | None = None,
        pruning: PruningMonitor | None = None,
    ) -> None:
        self._settings = settings
        self._directory = directory
        self._profiler = profiler
        self._on_start = on_start
        self._places = places
        self._cache = TrainingCache()
        self.processes = TrainingProcesses(settings, directory, executor, pruning)

    def remember(self, trial_id: str, result: TrialResult) -> None:
        """Adds a training of an earlier session, which is not repeated."""
        self._cache.add(training_key(result.values, self._settings.is_batch_coupled), trial_id, result)

    def run(
        self,
        trial_id: str,
        number: int,
        space: Mapping[str, Any],
        fit_overrides: Mapping[str, Any],
        pause_after: int | None = None,
    ) -> TrialResult:
        """Runs one proposal to its end; the arguments are those of `Proposal`."""
        proposal = Proposal(trial_id, number, self._directory.trial(trial_id), space, fit_overrides, pause_after)
        self._cache.forget_paused(trial_id)
        try:
            with contextlib.nullcontext() if self._places is None else self._places.lease():
                facts = self._profiler.inspect(space)
                result = self._run(replace(proposal, space=facts.completed(space)), facts)
                return replace(result, space=[*facts.appeared["space"], *result.space])
        except AccumtuneError as error:
            if self.processes.is_stopping:  # a probe that was ended with the search
                return TrialResult("stopped", proposal.values, reason=STOPPED)
            if isinstance(error, SearchError):  # not this trial's fault: every other trial would raise it too
                raise
            reason = str(error).splitlines()[0]
            return TrialResult("failed", proposal.values, reason=reason, traceback=str(error))

    def _run(self, proposal: Proposal, facts: ModelFacts) -> TrialResult:
        values = proposal.values
        earlier_result = _ended_before(proposal)
        if earlier_result is not None:
            return earlier_result
        most = self._settings.max_model_size
        if most and facts.parameters > most:
            reason = f"its {facts.parameters:,} parameters are more than max_model_size={most:,}"
            return TrialResult("infeasible", values, reason=reason)
        profile = self._profiler.profile(proposal.space)
        budget = self._settings.memory_budget_bytes
        pair = pair_for_proposal(
            profile,
            values["effective_batch_size"],
            self._settings.micro_batch_sizes,
            budget,
            values.get("micro_batch_size") if self._settings.searches_pairs else None,
            self._settings.ghost_batch_size,
        )
        paused = read_trial(proposal.directory.path)
        if is_paused(paused.reason):  # its state is that of the pair that ran
            pair = BatchPair.of_values(paused.hyperparameters) or pair
        if pair is None:
            smallest = ghost_batch_of(values["effective_batch_size"], self._settings.ghost_batch_size) or 1
            return TrialResult("infeasible", values, reason=_why_infeasible(profile, values, budget, smallest))
        values |= pair.as_hyperparameters()
        if self._settings.has_own_run_trial:
            return self._train(proposal, facts, pair)
        return self._train_once(proposal, facts, pair, values)

    def _train_once(
        self, proposal: Proposal, facts: ModelFacts, pair: BatchPair, values: dict[str, Any]
    ) -> TrialResult:
        """Trains, or reuses the result of another trial with the same training."""
        key = training_key(values, self._settings.is_batch_coupled)
        source, result = self._cache.get_or_train(key, proposal.trial_id, lambda: self._train(proposal, facts, pair))
        if source != proposal.trial_id:
            reason = f"the same training as trial {source}"
            ran = BatchPair.of_values(result.values) or pair
            values = {**result.values, **values, **ran.as_hyperparameters()}
            return replace(result, status="reused", values=values, reason=reason, reused_from=source)
        if result.status == "completed" and result.space:  # training has declared hyperparameters: the key has them now
            self.remember(proposal.trial_id, result)
        return result

    # Attempts

    def _train(self, proposal: Proposal, facts: ModelFacts, pair: BatchPair) -> TrialResult:
        state: Attempt | TrialResult = Attempt(pair)
        while isinstance(state, Attempt):
            state = self._next_state(proposal, facts, state)
        return state

    def _next_state(self, proposal: Proposal, facts: ModelFacts, attempt: Attempt) -> Attempt | TrialResult:
        """Trains once; returns the trial's result, or the next attempt."""
        directory, pair = proposal.directory, attempt.pair
        journal = Journal(directory.journal_file)
        profile = self._profiler.profile(proposal.space)
        budget = self._settings.memory_budget_bytes
        peak = profile.predict_peak_memory(pair.micro_batch_size, pair.accumulation_steps, budget)
        values = {**proposal.values, **pair.as_hyperparameters()}
        self._write_proposed(journal, proposal, facts, profile, pair, peak)
        number = read_trial(directory.path).attempt + 1
        identity = _training_digest(self._settings.identity, facts.identity)
        outcome = self._finished_before(directory, number, values, identity, proposal.pause_after)
        if outcome is None:
            if _crashes(journal) >= _MAX_CRASHES:
                reason = f"the search was killed {_MAX_CRASHES} times while it ran: it may crash the machine"
                return TrialResult("failed", values, reason=reason, traceback=directory.log_tail())
            self._on_start(proposal.number, values, peak)
            outcome = self.processes.train(
                directory, number, {**proposal.space, "values": values}, proposal.fit_overrides, identity,
                proposal.pause_after,
            )  # fmt: skip
            if outcome.status == "stopped" or (self.processes.is_stopping and not outcome.is_completed):
                journal.append("stopped", attempt=number, why=STOPPED)
                return TrialResult("stopped", values, reason=STOPPED)
            if outcome.status == "lost":
                # Restarted by the search and not by Ray, so that each start is an attempt with its own epochs.
                journal.append("stopped", attempt=number, why=outcome.reason)
                return _repeat_after_lost_machine(attempt, values, outcome)
            if outcome.status == "out_of_memory":
                journal.append("stopped", attempt=number, why="out of memory")
                return self._repeat_with_smaller_micro_batch(attempt, values, profile)
        return _with_appeared(self._ended(values, peak, profile.signature, pair, outcome), directory)

    def _write_proposed(
        self, journal: Journal, proposal: Proposal, facts: ModelFacts, profile: Profile, pair: BatchPair, peak: int
    ) -> None:
        journal.append(
            "proposed",
            trial_id=proposal.trial_id,
            number=proposal.number,
            hyperparameters={**proposal.values, **pair.as_hyperparameters()},
            signature=profile.signature,
            predicted_peak_memory_bytes=peak,
            predicted_throughput_samples_per_second=profile.predict_throughput(
                pair.micro_batch_size, pair.accumulation_steps
            ),
            description=f"effective batch {pair}",
            sample_shapes=facts.sample_shapes,
            identity=dict(facts.identity),
            versions=self._settings.versions,
        )

    def _finished_before(
        self,
        directory: TaskDirectory,
        number: int,
        values: Mapping[str, Any],
        identity: str,
        pause_after: int | None,
    ) -> Outcome | None:
        """Returns the outcome of a process that completed after the search was killed, if it is still valid."""
        if number == 1 or (written := directory.read_outcome()) is None or written["status"] != "completed":
            return None
        if self._settings.executions_per_trial > 1:
            return None  # one of several, and the reports of the others are lost
        _, arguments = directory.read_task()
        same = arguments["hyperparameters"]["values"] == values and arguments.get("identity", "") == identity
        return Outcome(**written) if same and arguments.get("pause_after") == pause_after else None

    def _repeat_with_smaller_micro_batch(
        self, attempt: Attempt, values: Mapping[str, Any], profile: Profile
    ) -> Attempt | TrialResult:
        """Records in the profile that the pair ran out of memory, and returns the next smaller micro-batch."""
        pair, settings = attempt.pair, self._settings
        failed = out_of_memory(pair.micro_batch_size, pair.accumulation_steps, settings.memory_budget_bytes)
        self._profiler.learn(profile.signature, failed)
        if profile.is_failure_of_the_loss(failed):
            takes = format_bytes(profile.window.at_once(pair.effective_batch_size))
            if profile.is_peak_of_validation(pair.micro_batch_size, pair.accumulation_steps):
                reason = (
                    f"validation ran out of memory: its loss over validation_batch_size samples at once takes about "
                    f"{takes} with them, whatever the batches of training; a smaller validation_batch_size needs less"
                )
                return TrialResult("infeasible", values, reason=reason)
            reason = (
                f"the loss over all {pair.effective_batch_size} samples at once, which takes about {takes} by itself, "
                "ran out of memory; no smaller micro-batch needs less, a smaller effective batch does"
            )
            return TrialResult("infeasible", values, reason=reason)
        smaller = next_smaller_pair(
            pair, settings.micro_batch_sizes, settings.searches_pairs, settings.ghost_batch_size
        )
        if smaller is None:
            least = pair.micro_batch_size
            unforeseen = _unforeseen(profile, pair, settings.memory_budget_bytes)
            reason = f"micro-batch {least} ran out of memory, and there is no smaller one{unforeseen}"
            return TrialResult("infeasible", values, reason=reason)
        return replace(attempt, pair=smaller)

    def _ended(
        self, values: dict[str, Any], predicted: int, signature: str, pair: BatchPair, outcome: Outcome
    ) -> TrialResult:
        if not outcome.is_completed:
            if outcome.error is not None and outcome.error["class"] == SearchError.__name__:
                raise SearchError(*outcome.error["arguments"])
            return TrialResult("failed", values, reason=outcome.reason, traceback=outcome.traceback)
        report, settings = outcome.result, self._settings
        measurement = Measurement(
            micro_batch_size=pair.micro_batch_size,
            accumulation_steps=pair.accumulation_steps,
            peak_memory_bytes=report["peak_memory_bytes"],
            seconds_per_update=report["seconds_per_update"],
            memory_source=report["memory_source"],
            memory_limit_bytes=settings.memory_budget_bytes,
        )
        self._profiler.learn(signature, measurement)
        return trained_result(values, predicted, report, settings.objective_name, settings.memory_budget_bytes)


def _repeat_after_lost_machine(attempt: Attempt, values: Mapping[str, Any], outcome: Outcome) -> Attempt | TrialResult:
    losses = attempt.losses + 1
    if losses < _MAX_LOSSES:
        return replace(attempt, losses=losses)
    reason = f"it was lost {losses} times, the last time because {outcome.reason}"
    return TrialResult("failed", values, reason=reason)


def _ended_before(proposal: Proposal) -> TrialResult | None:
    """Returns the result of a trial that completed in a session that was killed before the oracle had it."""
    record = read_trial(proposal.directory.path)
    if is_paused(record.reason):
        return None
    # The pair that ran may be smaller than the proposed one.
    pair = {"micro_batch_size", "accumulation_steps"}
    proposed = {name: value for name, value in proposal.values.items() if name not in pair}
    same = all(record.hyperparameters.get(name) == value for name, value in proposed.items())
    return completed_result(record) if record.status == "completed" and same else None


def _training_digest(session: Mapping[str, str], model: Mapping[str, str]) -> str:
    """Returns a digest that is equal for trainings that may share a checkpoint."""
    ignored = {"batch", "device"} | ({"optimizer's learning_rate"} if "learning_rate_scaling" in session else set())
    text = json.dumps([dict(session), {k: v for k, v in model.items() if k not in ignored}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _with_appeared(result: TrialResult, directory: TaskDirectory) -> TrialResult:
    """Adds the hyperparameters that were declared only while the model trained."""
    record = read_trial(directory.path)
    values = {**record.hyperparameters, **result.values}
    return replace(result, values=values, space=record.appeared_space)


def _crashes(journal: Journal) -> int:
    """Counts the starts of a trial that neither ended nor were stopped: the search was killed during them."""
    names = [event["event"] for event in journal.events()]
    return names.count("started") - names.count("stopped") - names.count("ended")


def _unforeseen(profile: Profile, pair: BatchPair, budget: int | None) -> str:
    """Returns part of a message if a pair should fit by its prediction, and yet ran out of memory."""
    has_failed = any(not measurement.is_feasible for measurement in profile.measurements)
    predicted = profile.predict_peak_memory(pair.micro_batch_size, pair.accumulation_steps)
    if not has_failed or budget is None or predicted > budget:
        return ""
    return (
        "; a training took more than was predicted: something that the short probes do not see, such as a callback, or "
        "a metric over the batch (smaller effective batches, or a smaller validation_batch_size, need less)"
    )


def _why_infeasible(profile: Profile, values: Mapping[str, Any], budget: int | None, smallest: int) -> str:
    has_run = any(measurement.is_feasible for measurement in profile.measurements)
    if not has_run and profile.validation_bytes > (budget or 0) / 2:
        why = (
            f"validation's samples and their loss take about {format_bytes(profile.validation_bytes)} at once; a "
            "smaller validation_batch_size needs less"
        )
    elif not profile.measurements:
        why = "its parameters alone are larger"
    elif has_run:
        effective = values["effective_batch_size"]
        pair = BatchPair(smallest, effective // smallest)
        predicted = profile.predict_peak_memory(smallest, pair.accumulation_steps)
        share = profile.window.share_of(predicted, effective) or _unforeseen(profile, pair, budget)
        why = f"predicted {format_bytes(predicted)}{share}"
    else:
        why = "every probe ran out of memory"
    least = "micro-batch 1" if smallest == 1 else f"a micro-batch of one ghost batch ({smallest} samples)"
    return f"not even {least} fits in {format_bytes(budget or 0)} ({why})"
