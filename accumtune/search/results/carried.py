"""What a training depends on beside hyperparameters and data: what of it a configuration carries, and what not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accumtune.tracking.records import TrialRecord
from accumtune.worker.data.hypermodel_fit_data import own_fit
from accumtune.worker.transport.task_directory import TaskDirectory

# Arguments of `fit` that change the result, with Keras's defaults.
_CARRIED = {
    "shuffle": True, "class_weight": None, "steps_per_epoch": None, "validation_split": 0.0, "validation_freq": 1,
    "validation_steps": None,
}  # fmt: skip
_DATA = ("x", "y", "validation_data", "epochs", "verbose", "batch_size")


def describe_fit(fit_kwargs: Mapping[str, Any], hypermodel: Any, compiled_with: Mapping[str, Any]) -> dict[str, Any]:
    """For the search's journal.

    Args:
        fit_kwargs: of `tuner.search`.
        hypermodel: the user's.
        compiled_with: the tuner's `optimizer`, `loss` and `metrics`.

    Returns:
        `options`, as a configuration's `fit_options`, and `not_carried`, sentences.
    """
    options = {name: fit_kwargs[name] for name, usual in _CARRIED.items() if fit_kwargs.get(name, usual) != usual}
    if "class_weight" in options:
        options["class_weight"] = {str(int(key)): float(value) for key, value in options["class_weight"].items()}
    not_carried = []
    for name, value in fit_kwargs.items():
        if name in (*_DATA, *_CARRIED) or value is None:
            continue
        names = [type(item).__name__ for item in value] if name == "callbacks" else []
        if names or name != "callbacks":
            not_carried.append(f"search() was given {name}" + (f": {', '.join(names)}" if names else ""))
    if own_fit(hypermodel) is not None:
        not_carried.append(f"{type(hypermodel).__name__}.fit, which may do more than model.fit")
    given = [name for name, value in compiled_with.items() if value is not None]
    if given:
        not_carried.append(f"the tuner compiled the models anew with its own {', '.join(given)}")
    return {"options": options, "not_carried": not_carried}


def of_trial(trial: TrialRecord, not_carried: list[str]) -> dict[str, Any]:
    """`seed` and `trial` of a configuration, from the task that the trial's process was given."""
    directory = TaskDirectory(Path(trial.folder))
    try:
        _, task = directory.read_task()
    except (OSError, ValueError, KeyError):
        task = {}
    weights = task.get("initial_weights")
    if weights:
        source = Path(weights).parent.name.removeprefix("trial_")
        epoch = (task.get("fit_overrides") or {}).get("initial_epoch", 0)
        not_carried = [*not_carried, f"it began at epoch {epoch} with the weights of trial {source}"]
    return {
        "seed": task.get("seed"),
        "trial": {
            "micro_batch_size": trial.micro_batch_size,
            "peak_memory_bytes": None if trial.peak_memory_bytes is None else int(trial.peak_memory_bytes),
            "executions": task.get("executions", 1),
            "best_epoch": trial.best_epoch,
            "weights": str(directory.weights_file) if directory.weights_file.exists() else None,
            "not_carried": not_carried,
        },
    }
