"""One training inside the process of a task, measured and reported."""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accumtune.memory.budget import format_bytes
from accumtune.worker.transport.task_directory import TaskDirectory, write_atomically
from accumtune.worker.trial_weights import build_as_trained, load_weights


def execute(
    directory: TaskDirectory,
    content: Mapping[str, Any],
    hp: Any,
    device: Any,
    state: Any,
    seed: int,
    initial_weights: str | None = None,
) -> dict[str, Any]:
    """Builds a model and trains it, from where an earlier process was interrupted.

    Args:
        directory: the trial's.
        content: of the payload: hypermodel, data, arguments of `fit`, objective.
        hp: Keras Tuner's hyperparameters.
        device: that is measured.
        state: the `Continuation` of this training.
        seed: of the trial's first training.
        initial_weights: of an earlier trial, to go on from.

    Returns:
        The report that `accumtune.worker.main.train` returns.
    """
    import keras

    from accumtune.memory.compilation import PeakWithoutCompiling
    from accumtune.memory.memory_watch import watched
    from accumtune.tracking.journal import Journal
    from accumtune.worker.callbacks import (
        JournalWriter,
        SaveBestEpoch,
        StopWhenHopeless,
        copy_callbacks,
        noise_scale_callbacks,
    )

    hypermodel, objective = content["hypermodel"], content["objective"]
    save_best = SaveBestEpoch(objective=objective, filepath=str(directory.weights_file))
    if state.earlier and state.earlier[-1]["best_value"] is not None:
        save_best.best_value = state.earlier[-1]["best_value"]
    # Every trial starts from the same seed, so that two trials differ by their hyperparameters alone.
    keras.utils.set_random_seed(seed + state.execution)
    model = hypermodel.build(hp)
    if initial_weights is not None:
        weights_file = Path(initial_weights)
        build_as_trained(model, weights_file)
        # Without its slots the optimizer would begin anew: Keras passes over what is not there yet.
        if not model.optimizer.built:
            model.optimizer.build(model.trainable_variables)
        load_weights(model, weights_file)
    writer = JournalWriter(Journal(directory.journal_file), attempt=state.attempt, execution=state.execution)
    stop = StopWhenHopeless(directory.prune_file)
    arguments = dict(content["fit_kwargs"])
    callbacks = copy_callbacks(arguments.pop("callbacks", None), directory.path.name, state.execution)
    callbacks += noise_scale_callbacks(callbacks, hp.values.get("accumulation_steps", 1))
    state.attach(model)
    device.reset_peak()
    peak_of_training = PeakWithoutCompiling(device)
    own_callbacks = [writer, save_best, stop, *peak_of_training.callbacks()]
    with watched(device, functools.partial(_end_out_of_memory, directory, device.budget_bytes)):
        history = hypermodel.fit(
            hp, model, *content["fit_args"], **arguments, callbacks=[*callbacks, *own_callbacks]
        )
    peak = peak_of_training.peak_bytes()
    metrics, best_epoch = _results(history, objective, content.get("is_scored_later", False))
    _save_build_config(model, directory)
    effective_batch_size = hp.values.get("effective_batch_size", 0)
    seconds_per_update = writer.seconds_per_update
    return {
        "metrics": {name: float(value) for name, value in metrics.items()},
        "best_epoch": best_epoch,
        "best_value": save_best.best_value if math.isfinite(save_best.best_value) else None,
        "pruned_after_epochs": stop.epochs,
        "peak_memory_bytes": int(peak),
        "compile_peak_memory_bytes": peak_of_training.compile_peak_bytes,
        "memory_source": device.memory_source,
        "device": device.name,
        "seconds_per_update": seconds_per_update,
        "throughput_samples_per_second": effective_batch_size / seconds_per_update if seconds_per_update else None,
        "updates": writer.updates,
        "training_seconds": state.seconds,
        "precision_policy": keras.config.dtype_policy().name,
    }


def _results(returned: Any, objective: Any, is_scored_later: bool) -> tuple[dict[str, Any], int]:
    """The metrics of the best epoch and which it was, from what `fit` has returned.

    Raises:
        SearchError: Keras Tuner has no use for it: every trial would end so.
    """
    import keras
    from keras_tuner import errors as kerass
    from keras_tuner.src.engine import tuner_utils  # how Keras Tuner reads what fit() returns; it has no public name

    from accumtune.errors import SearchError

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
    except kerass.FatalError as error:
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


def _save_build_config(model: Any, directory: TaskDirectory) -> None:
    """Keras Tuner reads it in `load_model`, to make the variables of a model that is built by its first call."""
    write_atomically(directory.build_config_file, json.dumps(model.get_build_config()))
