"""Describes what a training depends on beside its hyperparameters: the data, and the arguments of `fit` and `compile`.

A configuration holds some of these; the others it lists by name, as not carried.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accumtune.tracking.data_digest import data_digest
from accumtune.tracking.records import TrialRecord
from accumtune.worker.data.hypermodel_fit_data import own_fit
from accumtune.worker.data.user_data import input_arguments
from accumtune.worker.transport.payload import is_data_function
from accumtune.worker.transport.task_directory import TaskDirectory

# Arguments of `fit` that change the result, with Keras's defaults.
_FIT_OPTIONS = {
    "shuffle": True, "class_weight": None, "steps_per_epoch": None, "validation_split": 0.0, "validation_freq": 1,
    "validation_steps": None, "validation_batch_size": None,
}  # fmt: skip
_DATA = ("x", "y", "validation_data", "epochs", "verbose", "batch_size")


def describe_fit(
    fit_kwargs: Mapping[str, Any],
    hypermodel: Any,
    compiled_with: Mapping[str, Any],
    test_step_batch_size: int | None = None,
) -> dict[str, Any]:
    """Describes the arguments of `fit` and `compile`, for the search's journal.

    Args:
        fit_kwargs: of `tuner.search`.
        hypermodel: the user's.
        compiled_with: the tuner's `optimizer`, `loss` and `metrics`.
        test_step_batch_size: see `SearchSpace.test_step_batch_size`.

    Returns:
        `options`: a configuration's `fit_options`. `not_carried`: a text for each argument that it cannot hold.
    """
    options = {name: fit_kwargs[name] for name, usual in _FIT_OPTIONS.items() if fit_kwargs.get(name, usual) != usual}
    if test_step_batch_size is not None:
        options.setdefault("validation_batch_size", test_step_batch_size)
    if "class_weight" in options:
        options["class_weight"] = {str(int(key)): float(value) for key, value in options["class_weight"].items()}
    not_carried = []
    for name, value in fit_kwargs.items():
        if name in (*_DATA, *_FIT_OPTIONS) or value is None:
            continue
        names = [type(item).__name__ for item in value] if name == "callbacks" else []
        if names or name != "callbacks":
            not_carried.append(f"search() was given {name}" + (f": {', '.join(names)}" if names else ""))
    if own_fit(hypermodel) is not None:
        not_carried.append(f"{type(hypermodel).__name__}.fit, which may do more than model.fit")
    given = [name for name, value in compiled_with.items() if value is not None]
    if given:
        not_carried.append(f"the tuner compiled the models with its own {', '.join(given)}")
    return {"options": options, "not_carried": not_carried}


def describe_data(fit_args: Sequence[Any], fit_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Returns shapes and digest of the training data; None for data that are not arrays."""
    x, y, _ = input_arguments(fit_args, fit_kwargs)
    return {"shapes": {"x": _shape(x), "y": _shape(y)}, "digest": data_digest(x, y)}


def count_samples(fit_args: Sequence[Any], fit_kwargs: Mapping[str, Any]) -> int | None:
    """Counts the training samples; None unless the data are arrays and none of them are split off for validation."""
    x, _, _ = input_arguments(fit_args, fit_kwargs)
    shape = _shape(x)
    while isinstance(shape, dict) or (isinstance(shape, list) and shape and isinstance(shape[0], list)):
        shape = next(iter(shape.values() if isinstance(shape, dict) else shape), None)
    return shape[0] if shape and not fit_kwargs.get("validation_split") else None


def _shape(tree: Any) -> Any:
    if tree is None or is_data_function(tree):
        return None
    if isinstance(tree, Mapping):
        return {str(key): _shape(value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return [_shape(value) for value in tree]
    shape = getattr(tree, "shape", None)
    return None if shape is None else [int(size) for size in shape]


def dependencies_of_trial(trial: TrialRecord, not_carried: list[str]) -> dict[str, Any]:
    """Returns `seed` and `trial` of a configuration, from the task of the trial's process."""
    directory = TaskDirectory(Path(trial.folder))
    try:
        _, task = directory.read_task()
    except (OSError, ValueError, KeyError):
        task = {}
    outcome = directory.read_outcome() or {}
    own_train_step = (outcome.get("result") or {}).get("own_train_step")
    weights = task.get("initial_weights")
    if weights:
        source = Path(weights).parent.name.removeprefix("trial_")
        epoch = (task.get("fit_overrides") or {}).get("initial_epoch", 0)
        not_carried = [*not_carried, f"the trial started at epoch {epoch} with the weights of trial {source}"]
    return {
        "seed": task.get("seed"),
        "trial": {
            "micro_batch_size": trial.micro_batch_size,
            "peak_memory_bytes": None if trial.peak_memory_bytes is None else int(trial.peak_memory_bytes),
            "executions": task.get("executions", 1),
            "best_epoch": trial.best_epoch,
            "weights": str(directory.weights_file) if directory.weights_file.exists() else None,
            "not_carried": not_carried,
            **({"own_train_step": own_train_step} if own_train_step else {}),
        },
    }
