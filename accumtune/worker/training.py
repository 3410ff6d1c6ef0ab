"""Trains one set of hyperparameters in its process: measured, reported epoch by epoch, and gone on with."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
from keras_tuner import errors as tuner_errors
from keras_tuner.src.engine import tuner_utils  # how Keras Tuner reads what fit() returns; it has no public name

from accumtune.accumulation.own_step.own_train_step import certificate_of
from accumtune.errors import SearchError
from accumtune.memory.budget import format_bytes
from accumtune.memory.compilation import PeakWithoutCompiling
from accumtune.memory.device import Device
from accumtune.memory.memory_watch import watched
from accumtune.tracking.journal import Journal
from accumtune.tracking.small_files import write_atomically
from accumtune.worker.callbacks import (
    JournalWriter,
    SaveBestEpoch,
    StopWhenHopeless,
    copy_callbacks,
    noise_scale_callbacks,
)
from accumtune.worker.checkpoint.training_state import CannotContinue
from accumtune.worker.checkpoint.trial_checkpoint import TrialCheckpoint
from accumtune.worker.process_setup import open_payload
from accumtune.worker.transport.hyperparameters import appeared, hyperparameters_from
from accumtune.worker.transport.task_directory import TaskDirectory
from accumtune.worker.trial_weights import build_as_trained, build_config_of, load_weights


def train(
    directory: TaskDirectory,
    payload: str,
    hyperparameters: dict[str, Any],
    memory_budget_bytes: int | None,
    seed: int,
    attempt: int,
    execution: int = 0,
    executions: int = 1,
    earlier: Sequence[dict[str, Any]] = (),
    fit_overrides: dict[str, Any] | None = None,
    initial_weights: str | None = None,
    identity: str = "",
) -> dict[str, Any]:
    """Trains one set of hyperparameters and reports each epoch to the journal.

    Args:
        directory: the trial's.
        payload: the file with hypermodel, data and arguments of `fit`.
        hyperparameters: Keras Tuner's configuration of them.
        memory_budget_bytes: the allocator's limit.
        seed: of the first execution.
        attempt: how often the trial was begun, this time included.
        execution: which of the `executions` trainings of this trial it is (see `execution.repeated_training`).
        earlier: the reports of those before. The best epoch of all of them is kept, as in Keras Tuner.
        fit_overrides: arguments of `fit` that this trial alone has.
        initial_weights: of an earlier trial, to go on from.
        identity: of the search and the model; a saved state of another is not gone on with.
    """
    content, device, pipelines = open_payload(payload, memory_budget_bytes, seed + execution, has_pipelines=True)
    content["fit_kwargs"] = {**content["fit_kwargs"], **(fit_overrides or {}), "verbose": 0}
    if execution == 0:
        found = {"device": device.name, "memory_source": device.memory_source}
        Journal(directory.journal_file).append("started", attempt=attempt, pid=os.getpid(), **found)
    numbers = {name: value for name, value in content["fit_kwargs"].items() if isinstance(value, (int, float, str))}
    same_training = {"values": hyperparameters["values"], "seed": seed, "executions": executions, "fit": numbers}
    same_training |= {"identity": identity} if identity else {}

    def opened() -> TrialCheckpoint:
        return TrialCheckpoint(directory, attempt, same_training, execution, earlier, pipelines=pipelines)

    def run(state: TrialCheckpoint) -> dict[str, Any]:
        hp = hyperparameters_from(hyperparameters)
        try:
            return _fit(directory, content, hp, device, state, seed, initial_weights)
        finally:  # a HyperModel's fit, a model that is first called, a callback may ask for more: also where one fails
            found = appeared(hp, hyperparameters)
            if found["space"]:
                Journal(directory.journal_file).append("appeared", **found)

    state = opened()
    if execution == 0:
        state.repeat_epochs()
    try:
        return state.known_result() or run(state)
    except CannotContinue as error:
        print(f"The saved state is not that of this model ({error}): the training begins anew.")
        directory.checkpoint_file.unlink()
        return run(opened())


def _fit(
    directory: TaskDirectory,
    content: Mapping[str, Any],
    hp: Any,
    device: Device,
    state: TrialCheckpoint,
    seed: int,
    initial_weights: str | None,
) -> dict[str, Any]:
    """Builds a model and trains it, from where an earlier process was interrupted; returns the report of `train`."""
    hypermodel, objective = content["hypermodel"], content["objective"]
    # Every trial starts from the same seed, so that two trials differ by their hyperparameters alone.
    keras.utils.set_random_seed(seed + state.execution)
    model = hypermodel.build(hp)
    if initial_weights is not None:
        _start_from(model, Path(initial_weights))
    arguments = dict(content["fit_kwargs"])
    callbacks = copy_callbacks(arguments.pop("callbacks", None), directory.path.name, state.execution)
    callbacks += noise_scale_callbacks(callbacks, hp.values.get("accumulation_steps", 1))
    state.attach(model)
    device.reset_peak()
    measured = _Measurement(directory, objective, device, state)
    with watched(device, functools.partial(_end_out_of_memory, directory, device.budget_bytes)):
        history = hypermodel.fit(
            hp, model, *content["fit_args"], **arguments, callbacks=[*callbacks, *measured.callbacks()]
        )
    _refuse_own_loop(model, state)
    report = measured.report(hp.values.get("effective_batch_size", 0))
    metrics, best_epoch = _results(history, objective, content.get("is_scored_later", False))
    _save_build_config(model, directory)
    certificate = certificate_of(model)
    if certificate is not None:
        report["own_train_step"] = certificate.reduction
    return {"metrics": {name: float(value) for name, value in metrics.items()}, "best_epoch": best_epoch, **report}


def _refuse_own_loop(model: Any, state: TrialCheckpoint) -> None:
    """Refuses a trial whose batches were not those that the search has chosen.

    Raises:
        SearchError: the model was not trained by Keras: every trial would end so.
    """
    if state.has_fitted or model.train_function is not None:  # the second: by train_on_batch
        return
    raise SearchError(
        "Received a HyperModel.fit that does not train the model that it is given with model.fit: it trains in a loop "
        "of its own, or other models, with batches that nothing accumulates or measures.",
        "a fit that calls model.fit(*args, **kwargs) of its third argument, once or several times.",
        "compile the model with the loss and the optimizer of the loop, and end with "
        "`return model.fit(*args, **kwargs)`; several trainings of a trial: executions_per_trial=.",
    )


class _Measurement:
    """What is measured and kept of one fit, by callbacks."""

    def __init__(self, directory: TaskDirectory, objective: Any, device: Device, state: TrialCheckpoint) -> None:
        self._device, self._state = device, state
        self._peak = PeakWithoutCompiling(device)
        self._stop = StopWhenHopeless(directory.prune_file)
        self._writer = JournalWriter(Journal(directory.journal_file), state.attempt, state.execution)
        self._save_best = SaveBestEpoch(objective=objective, filepath=str(directory.weights_file))
        if state.earlier and state.earlier[-1]["best_value"] is not None:
            self._save_best.best_value = state.earlier[-1]["best_value"]

    def callbacks(self) -> list[Any]:
        return [self._writer, self._save_best, self._stop, *self._peak.callbacks()]

    def report(self, effective_batch_size: int) -> dict[str, Any]:
        best, seconds = self._save_best.best_value, self._writer.seconds_per_update
        return {
            "best_value": best if math.isfinite(best) else None,
            "pruned_after_epochs": self._stop.epochs,
            "peak_memory_bytes": int(self._peak.peak_bytes()),
            "compile_peak_memory_bytes": self._peak.compile_peak_bytes,
            "memory_source": self._device.memory_source,
            "device": self._device.name,
            "seconds_per_update": seconds,
            "throughput_samples_per_second": effective_batch_size / seconds if seconds else None,
            "updates": self._writer.updates,
            "training_seconds": self._state.seconds,
            "precision_policy": keras.config.dtype_policy().name,
        }


def _results(returned: Any, objective: Any, is_scored_later: bool) -> tuple[dict[str, Any], int]:
    """The metrics of the best epoch and which it was, from what `fit` has returned.

    Raises:
        SearchError: Keras Tuner has no use for it: every trial would end so.
    """
    if isinstance(returned, keras.callbacks.History) and returned.history:
        last = {name: values[-1] for name, values in returned.history.items()}
        if not objective.has_value(last):
            if is_scored_later:  # by a subclass's run_trial
                return last, len(returned.epoch) - 1
            raise SearchError(
                f"Received the objective {objective.name!r}, and a training that reports {', '.join(last)}.",
                "an objective that the training reports.",
                "compile the model with that metric, give search() validation_data, or take another objective.",
            )
    try:
        tuner_utils.validate_trial_results(returned, objective, "HyperModel.fit()")
    except tuner_errors.FatalError as error:
        raise SearchError(
            f"Received {returned!r} of type {type(returned).__name__} from HyperModel.fit. {error}",
            f"what model.fit returned, a number, or a dict with {objective.name!r}.",
            "end it with `return model.fit(*args, **kwargs)`.",
        ) from error
    # A list, as Keras Tuner makes it of a trial's executions.
    metrics = tuner_utils.convert_to_metrics_dict([returned], objective)
    return metrics, int(tuner_utils.get_best_step([returned], objective))


def _end_out_of_memory(directory: TaskDirectory, budget_bytes: int | None) -> None:
    """Ends a process that its framework cannot limit, with the outcome that it would have had under a limit."""
    directory.write_outcome(
        {"status": "out_of_memory", "reason": f"it held more than its budget of {format_bytes(budget_bytes or 0)}"}
    )
    os._exit(0)


def _start_from(model: Any, weights_file: Path) -> None:
    build_as_trained(model, weights_file)
    # Without its slots the optimizer would begin anew: Keras passes over what is not there yet.
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    load_weights(model, weights_file)


def _save_build_config(model: Any, directory: TaskDirectory) -> None:
    """Keras Tuner reads it in `load_model`, to make the variables of a model that is built by its first call."""
    write_atomically(directory.build_config_file, json.dumps(build_config_of(model)))
