"""Reads what a search has found from its journals and profiles."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from accumtune.accumulation.batch_pair import BATCH_HYPERPARAMETERS, BatchPair
from accumtune.config import TrainingConfig
from accumtune.errors import NoResultError
from accumtune.memory.prediction.profile import Profile
from accumtune.search.feasibility import effective_batch_sizes, feasible_pairs
from accumtune.search.results.selection import Candidate, Choice, Policy, pareto_front, select
from accumtune.search.results.training_dependencies import dependencies_of_trial
from accumtune.search.results.winner_verification import predicted_choice, verified_choice
from accumtune.tracking.journal import read_search
from accumtune.tracking.mlflow.tracker import read_cache
from accumtune.tracking.records import SearchRecord, TrialRecord
from accumtune.tracking.report import writer
from accumtune.tracking.report.accumulation_gain import accumulation_gain
from accumtune.tracking.report.candidate_tables import ordered
from accumtune.tracking.report.noise_scale_note import noise_scale_of
from accumtune.worker.transport.task_directory import SearchDirectory

Best = tuple[Choice, TrainingConfig]


class SearchResults:
    """Reads the results of one search.

    Args:
        files: the search's directory.
        objective: Keras Tuner's.
    """

    def __init__(self, files: SearchDirectory, objective: Any) -> None:
        self._files = files
        self._objective = objective

    def record(self) -> SearchRecord:
        return read_search(self._files.path)

    def candidates(self) -> list[Candidate]:
        return candidates(self.record(), self._files.profiles_folder)

    def pareto_front(self) -> list[Candidate]:
        return pareto_front(self.candidates(), self._objective.direction)

    def summary(self, limit: int) -> str:
        return summary(self.record(), self.candidates(), limit)

    def choose(self, policy: Policy, tolerance: float, runs: Callable[[Candidate], bool] | None) -> Choice:
        """Chooses the candidate to train with.

        Args:
            policy, tolerance: as in `Tuner.get_best_config`.
            runs: trains a candidate for a few updates and returns whether it fits the budget; None if there are no
                data to train with.

        Raises:
            NoResultError: no trial has completed within the budget.
        """

        def choose(found: Sequence[Candidate]) -> Choice:
            return select(found, policy, tolerance, self._objective.direction, objective_name=self._objective.name)

        if runs is None:
            return predicted_choice(choose(self.candidates()))
        return verified_choice(self.candidates, choose, runs)

    def config(self, choice: Choice) -> TrainingConfig:
        return training_config(self.record(), choice)

    def try_best(self, runs: Callable[[Candidate], bool] | None) -> Best | None:
        """Returns the best candidate and its configuration, or None if there is no candidate."""
        try:
            choice = self.choose("quality", 0.01, runs)
        except NoResultError:
            return None
        return choice, self.config(choice)

    def write_report(self, best: Best | None, status: str, reason: str) -> None:
        """Writes pictures, table and note into the search's folder; if `best` is None, chooses it first."""
        record = replace(self.record(), status=status, reason=reason)
        write_report(self._files, record, best or self.try_best(None))


def candidates(record: SearchRecord, profiles_folder: Path) -> list[Candidate]:
    """Returns the trained configurations within the budget; with exact accumulation, in their other micro-batches too.

    Args:
        record: the search.
        profiles_folder: where the models' profiles are.
    """
    completed = record.with_status("completed")
    trained = [_trained(trial) for trial in completed if _is_within(trial, record)]
    if not _is_exact(record):
        return trained
    signatures = {trial.trial_id: trial.signature for trial in record.trials}
    others: list[Candidate] = []
    # All that completed, also under a larger budget: in a smaller micro-batch they may fit this one.
    for candidate in map(_trained, completed):
        profile = load_profile(profiles_folder, signatures.get(candidate.trial_id))
        if profile is not None:
            others.extend(_untrained(candidate, profile, record))
    return trained + others


def load_profile(profiles_folder: Path, signature: str | None) -> Profile | None:
    """Reads the profile of a model signature; None if there is none."""
    try:
        return Profile.from_dict(json.loads((profiles_folder / f"{signature}.json").read_text()))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def training_config(record: SearchRecord, choice: Choice) -> TrainingConfig:
    """Makes the configuration that production loads, from the chosen candidate."""
    candidate, tracked = choice.candidate, read_cache(record.folder)
    trial = next(trial for trial in record.trials if trial.trial_id == candidate.trial_id)
    return TrainingConfig(
        micro_batch_size=candidate.micro_batch_size,
        accumulation_steps=candidate.accumulation_steps,
        effective_batch_size=candidate.effective_batch_size,
        # Hyperband's bookkeeping belongs to the search.
        hyperparameters={k: v for k, v in candidate.hyperparameters.items() if not k.startswith("tuner/")},
        memory_budget_bytes=record.memory_budget_bytes,
        peak_memory_bytes=None if candidate.peak_memory_bytes is None else int(candidate.peak_memory_bytes),
        memory_source=candidate.memory_source,
        throughput_samples_per_second=candidate.throughput_samples_per_second,
        objective={
            **record.objective,
            "name": record.objective_name,
            "direction": record.objective_direction,
            "value": candidate.objective,
        },
        learning_rate_scaling=record.learning_rate_scaling,
        base_effective_batch_size=record.base_effective_batch_size
        or min(effective_batch_sizes(record.micro_batch_sizes, record.accumulation_steps)),
        ghost_batch_size=record.ghost_batch_size,
        epochs=max((epoch.epoch for epoch in trial.epochs), default=-1) + 1 or None,
        fit_options=dict(record.fit.get("options") or {}),
        **dependencies_of_trial(trial, list(record.fit.get("not_carried") or [])),
        precision_policy=trial.precision_policy,
        backend=record.backend,
        versions=dict(trial.versions or record.versions),
        device=trial.device,
        data_shapes=_data_shapes(record, trial),
        batch_coupled_layers=list(record.batch_coupled_layers),
        whole_batch_loss=record.whole_batch_loss,
        policy=choice.policy,
        reason=choice.reason,
        source={
            "experiment": record.name,
            "run_id": tracked.get("parent_run_id"),
            "search_id": record.search_id,
            "trial_id": candidate.trial_id,
            "tracking_uri": tracked.get("tracking_uri"),
        },
    )


def write_report(files: SearchDirectory, record: SearchRecord, best: tuple[Choice, TrainingConfig] | None) -> None:
    """Writes pictures, table and note into the search's folder."""
    found = candidates(record, files.profiles_folder)
    writer.write_report(
        files.report_folder,
        record=record,
        candidates=found,
        front=pareto_front(found, record.objective_direction),
        best=None if best is None else best[0],
        config_json=None if best is None else best[1].to_json(),
        profile_points=_profile_points(record, files.profiles_folder, None if best is None else best[0].candidate),
    )


def summary(record: SearchRecord, found: Sequence[Candidate], limit: int, most_rows: int | None = None) -> str:
    """Returns the table of candidates for the terminal, best first, and the number of trials by status.

    Args:
        limit: the number of trained candidates to show. Untrained ones are shown if they are on the Pareto front.
        most_rows: the largest number of rows in all; None for no limit.
    """
    direction = record.objective_direction
    front = pareto_front(found, direction)
    trained = [candidate for candidate in found if candidate.is_trained]
    sign = -1 if direction == "max" else 1
    shown = sorted(trained, key=lambda item: sign * (item.objective if item.objective is not None else np.inf))[:limit]
    shown += [candidate for candidate in front if not candidate.is_trained]
    counts = {status: len(record.with_status(status)) for status in ("completed", "reused", "infeasible", "failed")}
    lines = [
        f"Results of search {record.name!r}: "
        + ", ".join(f"{count} {status}" for status, count in counts.items() if count),
        writer.candidates_table(ordered(shown, direction)[:most_rows], front, direction),
        "* on the Pareto front of objective, peak memory and throughput",
    ]
    best = shown[0] if shown else None
    lines += [] if best is None else [accumulation_gain(found, best, record.objective_name, direction)]
    noise = noise_scale_of(record, best)
    lines += [] if noise is None else [noise.advice(best)]
    return "\n".join(lines)


def _data_shapes(record: SearchRecord, trial: TrialRecord) -> Any:
    """Returns the shapes of the search's arrays; for data from a function, those of a sample after a None."""
    known = record.data.get("shapes") or {}
    if known.get("x") is not None or not trial.sample_shapes:
        return record.data.get("shapes")
    x, y, *_ = map(_batch_shape, trial.sample_shapes)
    return {"x": x, "y": y}


def _batch_shape(sample: Any) -> Any:
    if isinstance(sample, Mapping):
        return {name: _batch_shape(value) for name, value in sample.items()}
    if sample and isinstance(sample[-1], str):  # a shape and the type of its values
        return [None, *sample[0]]
    return None if sample is None else [_batch_shape(value) for value in sample]


def _is_exact(record: SearchRecord) -> bool:
    """Returns whether all pairs of one effective batch train the same."""
    return not record.batch_coupled_layers


def _is_within(trial: TrialRecord, record: SearchRecord) -> bool:
    budget, peak = record.memory_budget_bytes, trial.peak_memory_bytes
    return budget is None or peak is None or peak <= budget


def _trained(trial: TrialRecord) -> Candidate:
    batch = {name: int(trial.hyperparameters[name]) for name in BATCH_HYPERPARAMETERS}
    return Candidate(
        objective=trial.objective_value,
        peak_memory_bytes=trial.peak_memory_bytes,
        throughput_samples_per_second=trial.throughput_samples_per_second,
        hyperparameters=dict(trial.hyperparameters),
        trial_id=trial.trial_id,
        is_trained=True,
        is_measured=True,
        memory_source=trial.memory_source,
        **batch,
    )


def _untrained(candidate: Candidate, profile: Profile, record: SearchRecord) -> list[Candidate]:
    """Returns a candidate's other pairs of the same effective batch, with memory and speed from the profile."""
    pairs = feasible_pairs(
        profile,
        candidate.effective_batch_size,
        record.micro_batch_sizes,
        record.memory_budget_bytes,
        record.ghost_batch_size,
    )
    untrained = [pair for pair in pairs if pair.micro_batch_size != candidate.micro_batch_size]
    budget = record.memory_budget_bytes
    others = [_in_pair(candidate, profile, pair, budget) for pair in untrained]
    # Without an allocator limit, a measured run may have taken more than the budget.
    return [other for other in others if budget is None or (other.peak_memory_bytes or 0) <= budget]


def _in_pair(candidate: Candidate, profile: Profile, pair: BatchPair, budget_bytes: int | None) -> Candidate:
    """Returns a candidate in another pair, with memory and speed as measured if that pair has run, or as predicted."""
    micro, steps = pair.micro_batch_size, pair.accumulation_steps
    same = [it for it in profile.measurements if (it.micro_batch_size, it.accumulation_steps) == (micro, steps)]
    other = replace(
        candidate,
        micro_batch_size=micro,
        accumulation_steps=steps,
        peak_memory_bytes=profile.predict_peak_memory(micro, steps, budget_bytes),
        throughput_samples_per_second=profile.predict_throughput(micro, steps),
        hyperparameters={**candidate.hyperparameters, **pair.as_hyperparameters()},
        is_trained=False,
        memory_source="profile",
    )
    if not same or same[0].peak_memory_bytes is None or not same[0].seconds_per_update:
        return other
    return replace(
        other,
        peak_memory_bytes=same[0].peak_memory_bytes,
        throughput_samples_per_second=pair.effective_batch_size / same[0].seconds_per_update,
        memory_source=same[0].memory_source,
        is_measured=True,
    )


def _profile_points(record: SearchRecord, profiles_folder: Path, best: Candidate | None) -> list[dict[str, Any]]:
    """Returns the winning model's predicted peak memory at each micro-batch size, for the picture."""
    if best is None:
        return []
    trial = next(trial for trial in record.trials if trial.trial_id == best.trial_id)
    profile = load_profile(profiles_folder, trial.signature)
    if profile is None:
        return []
    return [
        {
            "micro_batch_size": size,
            "accumulation_steps": 2,
            "predicted_peak_memory_bytes": profile.predict_peak_memory(size, 2, record.memory_budget_bytes),
            "predicted_throughput_samples_per_second": profile.predict_throughput(size, 2),
        }
        for size in record.micro_batch_sizes
    ]

