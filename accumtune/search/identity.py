"""What decides the results of a search, written down with each session; what another session has changed of it."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from accumtune.errors import BuildError, SearchDirectoryError
from accumtune.execution.profiling import ModelFacts
from accumtune.search.feasibility import BATCH_HYPERPARAMETERS
from accumtune.tracking.records import SearchRecord, TrialRecord
from accumtune.worker.identity.data_identity import describe_arrays
from accumtune.worker.identity.training_identity import is_code, text_of
from accumtune.worker.transport.payload import is_data_function

_FORMAT = 1
# Of `fit`, with Keras's defaults: left out and given as the default are one thing.
_FIT_DEFAULTS = {
    "epochs": 1, "shuffle": True, "class_weight": None, "validation_split": 0.0, "steps_per_epoch": None,
    "validation_steps": None, "validation_freq": 1, "initial_epoch": 0,
}  # fmt: skip
_NOT_DECISIVE = ("x", "y", "sample_weight", "validation_data", "callbacks", "verbose", "batch_size",
                 "validation_batch_size")  # fmt: skip
# They write down what happens, and decide nothing of it.
_LOGGERS = {
    "BackupAndRestore", "CSVLogger", "History", "ModelCheckpoint", "ProgbarLogger", "RemoteMonitor", "TensorBoard",
}  # fmt: skip
# Other devices and versions are no other training, but other speeds and peaks.
_NOTED = ("device", "versions", "tuner")


_SEEDS = (
    " Data that are split or drawn without a seed are other data in each run: "
    "train_test_split(..., random_state=1), numpy.random.default_rng(1)."
)


def session_identity(
    settings: Mapping[str, Any], fit_args: Sequence[Any], fit_kwargs: Mapping[str, Any], hypermodel: Any
) -> dict[str, str]:
    """What decides the results of a session, by the name that a person knows it by.

    Args:
        settings: of the tuner; None is left out.
        fit_args, fit_kwargs: of `search`.
        hypermodel: the user's.
    """
    import keras
    import keras_tuner

    names = list(inspect.signature(keras.Model.fit).parameters)[1:]
    given = {**dict(zip(names, fit_args, strict=False)), **fit_kwargs}
    fit = {
        name: text_of(value, by_source=True)
        for name, value in given.items()
        if name not in _NOT_DECISIVE and not (name in _FIT_DEFAULTS and _equals(value, _FIT_DEFAULTS[name]))
    }
    fit |= {name: text_of(value) for name, value in given.items() if name in ("epochs",)}
    callbacks = given.get("callbacks") or []
    decisive = [it for it in (callbacks if isinstance(callbacks, (list, tuple)) else [callbacks]) if not _is_logger(it)]
    own_fit = getattr(type(hypermodel), "fit", keras_tuner.HyperModel.fit)
    if own_fit is not keras_tuner.HyperModel.fit:
        fit["HyperModel.fit"] = text_of(own_fit, by_source=True)
    for index, callback in enumerate(decisive):
        fit[f"callbacks[{index}]"] = f"{type(callback).__name__} {text_of(callback, by_source=True)}"
    is_ordered = given.get("shuffle", True) is not True or bool(given.get("validation_split"))
    data = {
        **_described("data", (given.get("x"), given.get("y"), given.get("sample_weight")), is_ordered),
        **_described("validation data", given.get("validation_data"), True),
    }
    policy = {"dtype policy": keras.config.dtype_policy().name, "image data format": keras.config.image_data_format()}
    return {
        "format": str(_FORMAT),
        "python": f"{sys.version_info.major}.{sys.version_info.minor}",
        **{name: value if isinstance(value, str) else text_of(value, by_source=True)
           for name, value in settings.items() if value is not None},
        **policy, **fit, **data,
    }  # fmt: skip


def has_data_functions(fit_args: Sequence[Any], fit_kwargs: Mapping[str, Any]) -> bool:
    """Whether data come from functions, so that only a process that calls them knows the content."""
    validation_data = fit_kwargs.get("validation_data")
    parts = validation_data if isinstance(validation_data, (tuple, list)) else (validation_data,)
    return any(map(is_data_function, (*fit_args[:2], fit_kwargs.get("x"), fit_kwargs.get("y"), *parts)))


def _described(name: str, tree: Any, is_ordered: bool) -> dict[str, str]:
    parts = tree if isinstance(tree, (tuple, list)) else (tree,)
    if any(map(is_data_function, parts)) or all(part is None for part in parts):
        return {}  # a process that calls it tells
    return {f"{name}: {part}": text for part, text in describe_arrays(tree, is_ordered=is_ordered).items()}


def _equals(value: Any, default: Any) -> bool:
    return isinstance(value, (bool, int, float, type(None))) and value == default


def _is_logger(callback: Any) -> bool:
    kind = type(callback)
    return kind.__module__.split(".")[0] == "keras" and kind.__name__ in _LOGGERS


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What is not as it was, a line each."""
    is_comparable = before.get("format") == now.get("format")
    names = before.keys() | now.keys() if is_comparable else before.keys() & now.keys()
    lines = []
    for name in sorted(names - {"format", "python", "batch", *_NOTED}):
        old, new = before.get(name), now.get(name)
        if old == new or (is_code(old) and is_code(new) and before.get("python") != now.get("python")):
            continue
        is_digest = is_code(old or new) or name.endswith("content")
        lines.append(f"{name}: edited or other values" if is_digest and old and new else f"{name}: {old} → {new}")
    return lines


def changed_notes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """What a session that goes on says of changes that leave its trials comparable."""
    changed = [f"{name}: {before[name]} → {now[name]}" for name in _NOTED if name in before and name in now
               and before[name] != now[name]]  # fmt: skip
    if not changed:
        return []
    return [f"This session has changed ({'; '.join(changed)}). Peaks and speeds of earlier trials are those of then."]


def known_identity(record: SearchRecord) -> dict[str, str]:
    """Of the latest session; what the journal of an older accumtune says of it."""
    if record.identity:
        return {str(name): str(value) for name, value in record.identity.items()}
    return {
        "objective": f"{record.objective_name} ({record.objective_direction})",
        **({"backend": record.backend} if record.backend else {}),
        **({"learning_rate_scaling": record.learning_rate_scaling} if record.learning_rate_scaling else {}),
    }


def trained_trials(record: SearchRecord) -> list[TrialRecord]:
    """Those whose results another session would be compared with."""
    return [trial for trial in record.trials if trial.status in ("completed", "reused")]


def changed_model(
    trials: Iterable[TrialRecord],
    direction: str,
    space_of: Callable[[str], Mapping[str, Any]],
    inspect_anew: Callable[[Mapping[str, Any]], ModelFacts],
    note: Callable[[Sequence[str]], None] = lambda lines: None,
) -> list[str]:
    """What the newest and the best trained trial's hyperparameters now make another model in.

    A build function is code: whether an edit matters is found out by building. A value that is added to a
    hyperparameter, or a line that prints, changes no model.

    Args:
        trials: of the sessions before.
        direction: of the objective.
        space_of: Keras Tuner's configuration of a trial's hyperparameters.
        inspect_anew: builds a model in a process of its own and describes it.
        note: is told of what has changed and leaves trials comparable.
    """
    trained = [trial for trial in trials if trial.status == "completed" and trial.identity]
    if not trained:
        return []
    sign = -1 if direction == "max" else 1
    newest = max(trained, key=lambda trial: trial.ended_at or 0.0)
    best = min(trained, key=lambda trial: sign * (trial.objective_value or 0.0))
    for trial in {trial.trial_id: trial for trial in (newest, best)}.values():
        space = _space_as_inspected(trial, space_of(trial.trial_id))
        try:
            now = inspect_anew(space).identity
            lines = differences(trial.identity, now)
            note(changed_notes(trial.identity, now))
            if lines and inspect_anew(space).identity != now:
                continue  # it is another model every time
        except BuildError as error:
            return [f"the model of trial {trial.trial_id} can no longer be built ({str(error).splitlines()[0]})"]
        if lines:
            return [f"the model of trial {trial.trial_id}, {line}" for line in lines]
    return []


def _space_as_inspected(trial: TrialRecord, space: Mapping[str, Any]) -> dict[str, Any]:
    values = {name: value for name, value in trial.hyperparameters.items() if name not in BATCH_HYPERPARAMETERS}
    return {**space, "values": {**values, **json.loads(trial.identity.get("batch") or "{}")}}


def refuse_changes(folder: Any, changed: Sequence[str], trained: int) -> None:
    """Refuses to compare what cannot be compared.

    Raises:
        SearchDirectoryError: something has changed.
    """
    if changed:
        raise SearchDirectoryError(
            f"Received another search than the one in {folder}, of which {trained} trials have trained:\n  "
            + "\n  ".join(changed),
            "what these trials were trained with: their results and new ones could not be compared.",
            "give another project_name to search beside it, overwrite=True to begin anew, or undo the change."
            + (_SEEDS if any(line.startswith(("data: ", "validation data: ")) for line in changed) else ""),
        )


def grown_space(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of a space was not only added to, a line each.

    Args:
        before, now: Keras Tuner's configurations of hyperparameters, which are looked at where both have them.
    """
    known = {_key_of(entry): entry["config"] for entry in before}
    lines = []
    for entry in now:
        old, new = known.get(_key_of(entry)), entry["config"]
        if old is not None and not _is_grown(old, new):
            lines.append(f"hyperparameter {new['name']}: {_range_of(old)} → {_range_of(new)}")
        elif old is None and (same := [it["config"] for it in before if it["config"]["name"] == new["name"]]):
            if any(it["class_name"] != entry["class_name"] for it in before if it["config"]["name"] == new["name"]):
                lines.append(f"hyperparameter {new['name']}: {_range_of(same[0])} → {_range_of(new)}")
    return lines


def with_space(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A space as it is now; what only some models have asked for stays."""
    new = {_key_of(entry): entry for entry in now}
    kept = [new.pop(_key_of(entry), entry) for entry in before]
    return [*kept, *new.values()]


def _key_of(entry: Mapping[str, Any]) -> str:
    return repr((entry["class_name"], entry["config"]["name"], entry["config"].get("conditions")))


def _is_grown(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    if "values" in old:
        return all(value in new["values"] for value in old["values"])
    if "min_value" in old:
        same = all(old.get(name) == new.get(name) for name in ("step", "sampling"))
        return same and new["min_value"] <= old["min_value"] and new["max_value"] >= old["max_value"]
    return old.get("value") == new.get("value")


def _range_of(config: Mapping[str, Any]) -> str:
    if "values" in config:
        return str(list(config["values"]))
    if "min_value" in config:
        return f"{config['min_value']} to {config['max_value']}, step {config.get('step')}, {config.get('sampling')}"
    return str(config.get("value", config.get("default")))
