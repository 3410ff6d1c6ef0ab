"""Describes everything that decides the results of a search: its identity, which each session journals."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accumtune.errors import AccumtuneError
from accumtune.execution.profiling import Profiler
from accumtune.tracking.records import SearchRecord
from accumtune.worker.identity.data_identity import describe_arrays
from accumtune.worker.identity.training_identity import is_code, text_of, text_of_method
from accumtune.worker.transport.payload import is_data_function

_FORMAT = 1
# Keras's defaults of `fit`: an argument that is given its default counts as left out.
_FIT_DEFAULTS = {
    "epochs": 1, "shuffle": True, "class_weight": None, "validation_split": 0.0, "steps_per_epoch": None,
    "validation_steps": None, "validation_freq": 1, "initial_epoch": 0, "validation_batch_size": 32,
}  # fmt: skip
_NOT_DECISIVE = ("x", "y", "sample_weight", "validation_data", "callbacks", "verbose", "batch_size")
# Callbacks that only record training.
_LOGGERS = {
    "BackupAndRestore", "CSVLogger", "History", "ModelCheckpoint", "ProgbarLogger", "RemoteMonitor", "TensorBoard",
}  # fmt: skip
# These change peak memory and throughput, but not the results of training.
NOTED = ("device", "versions", "tuner")


def identify_session(
    settings: Mapping[str, Any],
    fit_args: Sequence[Any],
    fit_kwargs: Mapping[str, Any],
    hypermodel: Any,
    before: Mapping[str, str],
    open_profiler: Callable[[], Profiler],
) -> dict[str, str]:
    """Describes everything that decides the results of a session, under names that the user knows.

    Args:
        settings: of the tuner; those that are None are left out.
        fit_args, fit_kwargs: of `search`.
        hypermodel: the user's.
        before: the identity of the session before.
        open_profiler: returns the profiler, whose processes call functions that return data.
    """
    identity = _known_here(settings, fit_args, fit_kwargs, hypermodel)
    if not _has_data_functions(fit_args, fit_kwargs):
        return identity
    return {**identity, **_data_of_functions(before, open_profiler(), bool(fit_kwargs.get("validation_split")))}


def _known_here(
    settings: Mapping[str, Any], fit_args: Sequence[Any], fit_kwargs: Mapping[str, Any], hypermodel: Any
) -> dict[str, str]:
    """Describes everything but the data that functions return."""
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
        fit["HyperModel.fit"] = text_of_method(hypermodel, "fit")
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


def _has_data_functions(fit_args: Sequence[Any], fit_kwargs: Mapping[str, Any]) -> bool:
    """Returns whether data come from functions, so that only a process that calls them knows the content."""
    validation_data = fit_kwargs.get("validation_data")
    parts = validation_data if isinstance(validation_data, (tuple, list)) else (validation_data,)
    return any(map(is_data_function, (*fit_args[:2], fit_kwargs.get("x"), fit_kwargs.get("y"), *parts)))


def _described(name: str, tree: Any, is_ordered: bool) -> dict[str, str]:
    parts = tree if isinstance(tree, (tuple, list)) else (tree,)
    if any(map(is_data_function, parts)) or all(part is None for part in parts):
        return {}  # `_data_of_functions` describes data functions
    return {f"{name}: {part}": text for part, text in describe_arrays(tree, is_ordered=is_ordered).items()}


def _equals(value: Any, default: Any) -> bool:
    return value is None or (isinstance(value, (bool, int, float)) and value == default)


def _is_logger(callback: Any) -> bool:
    kind = type(callback)
    return kind.__module__.split(".")[0] == "keras" and kind.__name__ in _LOGGERS


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns one line for each difference."""
    is_comparable = before.get("format") == now.get("format")
    names = before.keys() | now.keys() if is_comparable else before.keys() & now.keys()
    lines = []
    for name in sorted(names - {"format", "python", "batch", *NOTED}):
        old, new = before.get(name), now.get(name)
        if old == new or (is_code(old) and is_code(new) and before.get("python") != now.get("python")):
            continue
        is_digest = is_code(old or new) or name.endswith("content")
        lines.append(f"{name}: code or values have changed" if is_digest and old and new else f"{name}: {old} → {new}")
    return lines


def known_identity(record: SearchRecord) -> dict[str, str]:
    """Returns the identity of the latest session, or as much of it as an older accumtune has journaled."""
    if record.identity:
        return {str(name): str(value) for name, value in record.identity.items()}
    return {
        "objective": f"{record.objective_name} ({record.objective_direction})",
        **({"backend": record.backend} if record.backend else {}),
        **({"learning_rate_scaling": record.learning_rate_scaling} if record.learning_rate_scaling else {}),
    }


def _data_of_functions(before: Mapping[str, str], profiler: Profiler, is_ordered: bool) -> dict[str, str]:
    """Describes the data that functions return. Data that differ from call to call count as unchanged."""
    try:
        described = profiler.describe_data(1, is_ordered)
        if any(before.get(name, text) != text for name, text in described.items()):
            again = profiler.describe_data(2, is_ordered)
            described = {name: before.get(name, text) if again.get(name) != text else text
                         for name, text in described.items()}  # fmt: skip
    except AccumtuneError:  # the trials will fail with a better message
        return {}
    return described
