"""Saves the best model of a search for MLflow's registry, in a process of its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accumtune.execution.executors import Executor
from accumtune.execution.timeouts import DEFAULT_SECONDS
from accumtune.memory.device import memory_limit_environment
from accumtune.tracking.data_digest import file_digest
from accumtune.tracking.mlflow.model_registry import MODEL_FILE, MODEL_FOLDER
from accumtune.tracking.small_files import write_atomically
from accumtune.worker.transport.hyperparameters import hyperparameters_from
from accumtune.worker.transport.outcome import finished
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import SearchDirectory, TaskDirectory

_SAMPLES = 2


def export_best_model(
    files: SearchDirectory, executor: Executor, payload: Mapping[str, Any], trial_id: str, name: str
) -> None:
    """Saves the model of a trial, with the weights of its best epoch, where the tracker finds it.

    Args:
        files: the search's directory.
        executor: where the process starts.
        payload: what the search sends to its trials: hypermodel and data.
        trial_id: the trial.
        name: of the registered model.

    Raises:
        AccumtuneError: the process failed.
    """
    trial = files.trial(trial_id)
    key = file_digest(trial.weights_file)
    wanted = {"name": name, "trial_id": trial_id, "key": key}
    marker, folder = files.path / MODEL_FILE, files.path / MODEL_FOLDER
    if marker.exists() and json.loads(marker.read_text()) == wanted:
        return
    marker.unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)
    directory = TaskDirectory(files.scratch_folder / "register")
    _, arguments = trial.read_task()
    payload_file = directory.path / "payload.pkl"
    function_arguments = (
        payload["hypermodel"], arguments["hyperparameters"], str(trial.weights_file.resolve()),
        payload["fit_args"], payload["fit_kwargs"], str(folder.resolve()),
    )  # fmt: skip
    dump_payload({"function": save_with_signature, "arguments": function_arguments}, payload_file)
    directory.write_task("call", {"payload": str(payload_file.resolve())})
    environment = memory_limit_environment(executor.backend, None)
    finished(executor.submit(directory, environment, DEFAULT_SECONDS).result(), "Saving the best model")
    shutil.rmtree(directory.path, ignore_errors=True)
    write_atomically(marker, json.dumps(wanted))


def save_with_signature(
    hypermodel: Any, hyperparameters: dict[str, Any], weights: str, fit_args: Any, fit_kwargs: Any, folder: str
) -> None:
    """Builds the model, loads the weights, and saves both in MLflow's format; runs in the process of its own."""
    import keras
    import mlflow.keras
    import numpy as np

    from accumtune.worker.data.user_data import first_samples, has_batches, input_arguments, is_tf_dataset, resolve
    from accumtune.worker.trial_weights import build_as_trained, load_weights

    model = hypermodel.build_plain(hyperparameters_from(hyperparameters))
    build_as_trained(model, Path(weights))
    load_weights(model, weights)
    x, y, sample_weight = resolve(*input_arguments(fit_args, fit_kwargs))
    is_batched = not is_tf_dataset(x) or has_batches(model, x)
    sample = first_samples(x, y, sample_weight, count=_SAMPLES, is_batched=is_batched)[0]
    output = model.predict(sample, batch_size=_SAMPLES, verbose=0)
    packages = {"keras": keras.__version__, "numpy": np.__version__}
    backend = keras.backend.backend()
    packages[backend] = __import__(backend).__version__.split("+")[0]
    mlflow.keras.save_model(
        model, folder, signature=_signature(sample, output),
        # Given, because MLflow would otherwise start a process that imports the model to find them.
        pip_requirements=[f"{name}=={version}" for name, version in packages.items()],
    )  # fmt: skip


def _signature(sample: Any, output: Any) -> Any:
    from mlflow.models import infer_signature

    return infer_signature(_named(sample, "input"), _named(output, "output"))


def _named(tree: Any, name: str) -> Any:
    """Turns lists and tuples into dicts: MLflow's signatures have arrays and dicts of arrays alone."""
    return {f"{name}_{index}": item for index, item in enumerate(tree)} if isinstance(tree, (list, tuple)) else tree
