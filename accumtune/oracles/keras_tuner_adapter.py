"""Asks and tells Keras Tuner's oracles, of any class.

An oracle keeps its own class and algorithm; accumtune uses its public methods and works around four faults:

- it writes its state non-atomically, so a kill leaves a truncated file (see `accumtune.oracles.persistent_oracle`);
- three failures in a row raise inside `end_trial`, which leaves the trial RUNNING and a lock held for ever: accumtune
  lifts this limit inside the oracle and counts failures itself;
- it creates a metric to learn its direction, which occupies the device (see `accumtune.oracles.metric_direction`);
- it compares values to find duplicates: the pair that ran is therefore written into a trial's values only after the
  oracle has recorded its proposal.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from keras_tuner.engine.trial import TrialStatus

from accumtune.errors import SearchError
from accumtune.oracles.metric_direction import metric_direction
from accumtune.oracles.persistent_oracle import is_grid
from accumtune.worker.transport.hyperparameters import hyperparameters_from

# After so many random draws, a space is assumed to have nothing new, or nothing feasible. Keras Tuner's limit is 20.
MAX_DRAWS = 20


def learn_space(oracle: Any, trial: Any, space: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> None:
    """Adds hyperparameters that appeared when a trial's model was built, as Keras Tuner does after training.

    Args:
        oracle: its space grows, unless it was made with `tune_new_entries=False`.
        trial: gets them, with their defaults.
        space, values: as in the configuration of Keras Tuner's `HyperParameters`.

    Raises:
        SearchError: the oracle was made with `allow_new_entries=False`.
    """
    found = hyperparameters_from({"space": list(space), "values": {}})
    own = trial.hyperparameters
    own.merge(found)
    own.values.update({hp.name: values[hp.name] for hp in found.space if hp.name in values})
    unknown = [hp.name for hp in own.space if not oracle.hyperparameters._exists(hp.name, hp.conditions)]
    if unknown and not oracle.allow_new_entries:
        raise SearchError(
            f"Received allow_new_entries=False, but the build function also declares {', '.join(unknown)}.",
            "a build function that declares only the hyperparameters in `hyperparameters`.",
            "add these to `hyperparameters`, or allow new entries.",
        )
    oracle.update_space(own)


def redraw(oracle: Any, trial: Any) -> dict[str, Any] | None:
    """Gives a trial that has not started other values, at random; Hyperband's entries stay.

    Returns:
        The new values, or None if nothing new is left.
    """
    return _give(oracle, trial, oracle._random_values())


def replace_infeasible(oracle: Any, trial: Any) -> dict[str, Any] | None:
    """Gives a trial that does not fit other values: the oracle's next proposal if it supports that, or random ones.

    Returns:
        The new values, or None if nothing new is left.
    """
    if not hasattr(oracle, "note_infeasible"):  # Keras Tuner's own oracles would propose the same again
        return redraw(oracle, trial)
    oracle.note_infeasible(trial)
    return _give(oracle, trial, oracle.other_values(trial))


def _give(oracle: Any, trial: Any, values: dict[str, Any] | None) -> dict[str, Any] | None:
    if values is None:
        return None
    kept = {name: value for name, value in trial.hyperparameters.values.items() if name.startswith("tuner/")}
    if kept.pop("tuner/trial_id", None):  # a promoted trial: the weights belong to its earlier values
        kept["tuner/initial_epoch"] = 0
    trial.hyperparameters.values = {**values, **kept}
    oracle._record_values(trial)
    oracle._save_trial(trial)
    return dict(trial.hyperparameters.values)


def has_nothing_new(oracle: Any) -> bool:
    """Returns whether random draws give only values that were proposed before."""
    return oracle._random_values() is None


def can_redraw(oracle: Any) -> bool:
    """Returns whether random values may replace a proposal: not in a grid, which proposes all values in order."""
    return not is_grid(oracle)


def pauses_trials(oracle: Any) -> bool:
    """Returns whether an oracle pauses trials and goes on with them; its `pause_after` says after which epoch."""
    return hasattr(oracle, "pause_after")


def learn_micro_batch(oracle: Any, trial: Any, batch: Mapping[str, Any]) -> None:
    """Lets the oracle learn from the micro-batch that ran, if it searches the micro-batch and is not a grid."""
    if not can_redraw(oracle):
        return
    searched = {hp.name: getattr(hp, "values", ()) for hp in oracle.hyperparameters.space}
    for name, value in batch.items():
        if value in searched.get(name, ()):
            trial.hyperparameters.values[name] = value


def end_completed(oracle: Any, trial: Any, metrics: dict[str, float], best_epoch: int) -> bool:
    """Tells the oracle a trial's metrics; returns False if the objective is NaN, which ends the trial as failed."""
    _register(oracle, trial.trial_id, metrics)
    # Without other metrics that are NaN, as a noise scale can be: NumPy would warn. The journal has them.
    objectives = _objective_names(oracle)
    reported = {name: value for name, value in metrics.items() if name in objectives or not math.isnan(value)}
    oracle.update_trial(trial.trial_id, reported, step=best_epoch)
    trial.status = TrialStatus.COMPLETED
    _end(oracle, trial)
    return bool(oracle.trials[trial.trial_id].status == TrialStatus.COMPLETED)


def _register(oracle: Any, trial_id: str, metrics: Mapping[str, float]) -> None:
    """Registers the directions of the other metrics; Keras Tuner would create each metric on the device to find it."""
    known = oracle.trials[trial_id].metrics
    objectives = _objective_names(oracle)
    for name in metrics:
        if name not in objectives and not known.exists(name) and (direction := metric_direction(name)):
            known.register(name, direction=direction)


def _objective_names(oracle: Any) -> Collection[str]:
    """Returns the objective's name, or those that Keras Tuner's multi-objective adds up."""
    return getattr(oracle.objective, "name_to_direction", {oracle.objective.name})


def end_failed(oracle: Any, trial: Any, message: str) -> None:
    """Ends a trial without a result; Keras Tuner may try it again (`max_retries_per_trial`)."""
    trial.status = TrialStatus.INVALID
    trial.message = message
    _end(oracle, trial)


def end_without_counting(oracle: Any, trial: Any, message: str) -> None:
    """Ends a trial that never trained: it counts neither as a failure nor towards `max_trials`."""
    trial.status = TrialStatus.FAILED
    trial.message = message
    if hasattr(oracle, "note_infeasible"):
        oracle.note_infeasible(trial)
    _end(oracle, trial)
    grant_another_trial(oracle)


def grant_another_trial(oracle: Any) -> None:
    """Raises the oracle's limit by one, because `max_trials` counts only trials that train."""
    if oracle.max_trials:
        oracle.max_trials += 1
        oracle.granted_trials = getattr(oracle, "granted_trials", 0) + 1


def asked_trials(oracle: Any) -> int | None:
    """Returns `max_trials` as the user gave it."""
    given: int | None = oracle.max_trials
    return given - getattr(oracle, "granted_trials", 0) if given else given


def take_back_grants(oracle: Any) -> None:
    """Resets `max_trials` to the user's value: each session counts the trials that did not train again."""
    oracle.max_trials, oracle.granted_trials = asked_trials(oracle), 0


# Settings of oracles that decide what is proposed, but not the results of trials. Keras Tuner saves them with its state
# and would restore those of the session before.
_OF_THE_SAMPLER = ("num_initial_points", "alpha", "beta", "hyperband_iterations")


def sampler_settings(oracle: Any) -> dict[str, Any]:
    """Returns the oracle's settings that a session may change."""
    return {name: getattr(oracle, name) for name in _OF_THE_SAMPLER if hasattr(oracle, name)}


def allow_again(oracle: Any, trial_ids: Collection[str]) -> None:
    """Lets an oracle propose infeasible values again, after the budget has grown."""
    kept = {value for trial_id, value in oracle._id_to_hash.items() if trial_id not in trial_ids}
    oracle._tried_so_far = kept
    if hasattr(oracle, "forget_infeasible"):
        oracle.forget_infeasible()


def replace_space(oracle: Any, space: Sequence[Mapping[str, Any]]) -> None:
    """Replaces an oracle's hyperparameters by those that are declared now."""
    config = {**oracle.hyperparameters.get_config(), "space": list(space)}
    oracle.hyperparameters = hyperparameters_from(config)
    for hp in oracle.hyperparameters.space:
        if hp.name not in oracle.hyperparameters.values:
            oracle.hyperparameters.values[hp.name] = hp.default


def write_pair_that_ran(oracle: Any, trial_id: str, batch: dict[str, int]) -> None:
    """Writes the pair that ran into an ended trial's values."""
    trial = oracle.trials[trial_id]
    proposal = dict(trial.hyperparameters.values)
    trial.hyperparameters.values.update(batch)
    if not can_redraw(oracle) and any(proposal.get(name, value) != value for name, value in batch.items()):
        oracle.replaced_proposals[trial_id] = proposal
        oracle.save()  # first: after a kill in between, a grid would continue from values that it did not propose
    oracle._save_trial(trial)


def consecutive_failures(oracle: Any) -> list[Any]:
    """Returns the failed trials since the last one that completed, newest last."""
    failed: list[Any] = []
    for trial_id in reversed(oracle.end_order):
        trial = oracle.trials[trial_id]
        if trial.status != TrialStatus.FAILED:
            break
        failed.insert(0, trial)
    return failed


def _end(oracle: Any, trial: Any) -> None:
    proposed = oracle._id_to_hash.get(trial.trial_id)
    limit, oracle.max_consecutive_failed_trials = oracle.max_consecutive_failed_trials, math.inf
    try:
        oracle.end_trial(trial)
    finally:
        oracle.max_consecutive_failed_trials = limit
    if proposed is not None:  # Keras Tuner forgets it if another pair ran, and would propose it for ever
        oracle._tried_so_far.add(proposed)
