"""Trains one set of hyperparameters in its process: measures it, reports its epochs, and resumes it."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras

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
from accumtune.worker.fit_result import result_of
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
    pause_after: int | None = None,
) -> dict[str, Any]:
    """Trains one set of hyperparameters and reports each epoch to the journal.

    Args:
        directory: the trial's.
        payload: the file with hypermodel, data and arguments of `fit`.
        hyperparameters: Keras Tuner's configuration of them.
        memory_budget_bytes: the allocator's limit.
        seed: of the first execution.
        attempt: how often the trial was started, this time included.
        execution: which of the trial's `executions` this is (see `execution.repeated_training`).
        earlier: the reports of earlier executions. The best epoch of all executions is kept, as in Keras Tuner.
        fit_overrides: arguments of `fit` for this trial alone.
        initial_weights: of an earlier trial, to start from.
        identity: of the search and the model; a saved state with another identity is not resumed.
        pause_after: the number of epochs after which the training pauses; None: it does not.
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
        return TrialCheckpoint(
            directory, attempt, same_training, execution, earlier, pipelines=pipelines, pause_after=pause_after
        )

    def run(state: TrialCheckpoint) -> dict[str, Any]:
        hp = hyperparameters_from(hyperparameters)
        try:
            return _fit(directory, content, hp, device, state, seed, initial_weights)
        finally:  # training may have declared hyperparameters, in a HyperModel's fit for example, even if it failed
            found = appeared(hp, hyperparameters)
            if found["space"]:
                Journal(directory.journal_file).append("appeared", **found)

    state = opened()
    if execution == 0:
        state.repeat_epochs()
    try:
        return state.known_result() or run(state)
    except CannotContinue as error:
        print(f"The saved state is not that of this model ({error}): the training starts from the beginning.")
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
    """Builds a model and trains it, from an earlier process's state if there is one; returns the report of `train`."""
    hypermodel, objective = content["hypermodel"], content["objective"]
    # All trials have the same seed, so that they differ by their hyperparameters alone.
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
    metrics, best_epoch = result_of(
        history, objective, content.get("is_scored_later", False), state.paused_after is not None
    )
    _save_build_config(model, directory)
    certificate = certificate_of(model)
    if certificate is not None:
        report["own_train_step"] = certificate.reduction
    return {"metrics": {name: float(value) for name, value in metrics.items()}, "best_epoch": best_epoch, **report}


def _refuse_own_loop(model: Any, state: TrialCheckpoint) -> None:
    """Refuses a trial that did not train with the search's batches.

    Raises:
        SearchError: Keras did not train the model. This would happen in every trial.
    """
    if state.has_fitted or model.train_function is not None:  # the second: by train_on_batch
        return
    raise SearchError(
        "Received a HyperModel.fit that does not call the fit of the model that it is given: it trains in a loop of "
        "its own, or trains other models, which accumtune neither accumulates nor measures.",
        "a HyperModel.fit that calls model.fit(*args, **kwargs), once or several times.",
        "compile the model with the loss and the optimizer of the loop, and end with "
        "`return model.fit(*args, **kwargs)`; to train a trial several times, use executions_per_trial=.",
    )


class _Measurement:
    """Measures one fit, and keeps its best epoch, by callbacks."""

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
            "paused_after_epochs": self._state.paused_after,
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


def _end_out_of_memory(directory: TaskDirectory, budget_bytes: int | None) -> None:
    """Ends a process whose framework has no memory limit, with the outcome that a limit would have caused."""
    directory.write_outcome(
        {"status": "out_of_memory", "reason": f"it held more than its budget of {format_bytes(budget_bytes or 0)}"}
    )
    os._exit(0)


def _start_from(model: Any, weights_file: Path) -> None:
    build_as_trained(model, weights_file)
    # Keras does not load an optimizer's slots before they exist.
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    load_weights(model, weights_file)


def _save_build_config(model: Any, directory: TaskDirectory) -> None:
    """Writes the file from which `load_model` creates the variables of a model that is built by its first call."""
    write_atomically(directory.build_config_file, json.dumps(build_config_of(model)))
