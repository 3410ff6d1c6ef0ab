"""What decides how much memory a model takes, as one short text: models that share it share a profile."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

# Raised when figures of the same model are no longer comparable: cached profiles are then measured anew.
_HOW_IT_IS_MEASURED = 4
_ADDRESS = re.compile(r"0x[0-9a-f]+")


def describe_model(
    model: Any, sample: Any, device: str, hyperparameters: Mapping[str, Any], *, is_pipeline: bool = False
) -> dict[str, Any]:
    """What the search must know about a model before it trains.

    Args:
        model: a compiled Keras model.
        sample: one sample, `(x, y, sample_weight)`.
        device: where it will run.
        hyperparameters: the values it was built with.
        is_pipeline: whether training gets whole batches, or takes rows from arrays.

    Returns:
        `signature` (32 hexadecimal digits), `device`, `static_bytes` (trainable parameters: less than any training
        needs), `sample_bytes` (of the data that waits on the device until its micro-step; 0 for arrays, of which
        rows are taken as needed), `batch_coupled_layers`, `precision_policy`, `sample_shapes`.
    """
    import keras

    from accumtune.accumulation import batch_coupled_layers
    from accumtune.accumulation.rows import rows_of

    facts = {
        "architecture": _architecture(model, hyperparameters),
        "variables": [(list(v.shape), str(v.dtype), bool(v.trainable)) for v in model.variables],
        "optimizer": _without_magnitudes(keras.saving.serialize_keras_object(model.optimizer)),
        "loss": _plain(model.loss),
        "jit_compile": bool(model.jit_compile),
        "sample": _shapes(sample),
        "is_pipeline": is_pipeline,
        "policy": keras.config.dtype_policy().name,
        "backend": keras.config.backend(),
        "keras": keras.__version__,
        "backend_version": version(keras.config.backend()),
        "measured_as": _HOW_IT_IS_MEASURED,
        "device": device,
    }
    text = json.dumps(facts, sort_keys=True, default=_plain)
    return {
        "signature": hashlib.sha256(text.encode()).hexdigest()[:32],
        "device": device,
        "sample_bytes": _sample_bytes(sample) if is_pipeline or rows_of(*sample) is None else 0,
        "static_bytes": sum(int(np.prod(v.shape)) * _bytes_per_element(v.dtype) for v in model.trainable_variables),
        "batch_coupled_layers": [str(layer) for layer in batch_coupled_layers(model)],
        "precision_policy": facts["policy"],
        "sample_shapes": facts["sample"],
    }


def _architecture(model: Any, hyperparameters: Mapping[str, Any]) -> Any:
    """The model's configuration; for a subclass that has none, every hyperparameter may matter."""
    try:
        config = model.get_config()
        json.dumps(config, default=_plain)
    except Exception:  # whatever a user's get_config raises: it only costs a probe
        return {"class": _plain(type(model)), "hyperparameters": dict(hyperparameters)}
    if not hasattr(model, "inputs") or not model.inputs:
        # A subclass may hide in its call() what its configuration does not show.
        batch = {"effective_batch_size", "micro_batch_size", "accumulation_steps", "learning_rate"}
        config = {**config, "hyperparameters": {k: v for k, v in hyperparameters.items() if k not in batch}}
    return _without_magnitudes(config)


def _without_magnitudes(config: Any) -> Any:
    """A real number (a learning rate, a dropout rate) takes no memory, but whether it is zero may matter."""
    if isinstance(config, Mapping):
        return {str(key): _without_magnitudes(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [_without_magnitudes(value) for value in config]
    if isinstance(config, float):
        return config != 0.0
    return config


def _plain(value: Any) -> str:
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    return _ADDRESS.sub("", repr(value))


def _shapes(tree: Any) -> Any:
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {str(key): _shapes(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_shapes(value) for value in tree]
    array = np.asarray(tree)
    return [list(array.shape[1:]), str(array.dtype)]


def _sample_bytes(tree: Any) -> int:
    if tree is None:
        return 0
    if isinstance(tree, Mapping):
        return sum(_sample_bytes(value) for value in tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(_sample_bytes(value) for value in tree)
    array = np.asarray(tree)
    return int(array.nbytes // max(1, len(array)))


def _bytes_per_element(dtype: Any) -> int:
    name = str(dtype)
    digits = re.search(r"\d+", name)
    return max(1, int(digits[0]) // 8) if digits else 4
