"""Computes a signature of everything that decides a model's memory: models with the same one share a profile."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import numpy as np

from accumtune.accumulation.data.array_kinds import bytes_per_row, described
from accumtune.worker.data.trees import leaves, map_tree
from accumtune.worker.identity.object_description import describe, plain_attributes

# The version of the measurement. A new one discards cached profiles.
_HOW_IT_IS_MEASURED = 6
# Variables that select other kernels and compilers, with other workspaces.
_ENVIRONMENT = ("TF_ENABLE_ONEDNN_OPTS", "TF_XLA_FLAGS", "XLA_FLAGS", "PYTORCH_CUDA_ALLOC_CONF", "TF_GPU_ALLOCATOR")


def describe_model(
    model: Any,
    sample: Any,
    device: str,
    hyperparameters: Mapping[str, Any],
    *,
    is_pipeline: bool = False,
    validated_at_once: int | None = None,
) -> dict[str, Any]:
    """Returns the facts about a model that a search needs before it trains.

    Args:
        model: a compiled Keras model.
        sample: one sample, `(x, y, sample_weight)`.
        device: where it will run.
        hyperparameters: the values that it was built with.
        is_pipeline: whether training gets whole batches, instead of taking samples from arrays.
        validated_at_once: the samples of a batch of validation; None: those of a micro-batch.

    Returns:
        `signature` (32 hexadecimal digits); `device`; `parameters`, the number of trainable ones; `static_bytes`, their
        size, which any training needs; `activation_bytes`, the size of all layers' outputs for a sample, 0 if unknown;
        `sample_bytes`, the size of one sample's data if a window's data are on the device at once (0 for arrays), and
        of what a loss over the whole effective batch keeps; `batch_coupled_layers`; `precision_policy`;
        `sample_shapes`.
    """
    import keras

    from accumtune.accumulation import batch_coupled_layers
    from accumtune.accumulation.data.batches import prepares_its_data
    from accumtune.accumulation.data.row_indices import rows_of
    from accumtune.accumulation.losses.whole_batch_loss import is_wanted

    outputs = _bytes_of_outputs(model, sample) if is_wanted(model) else 0
    takes_rows = not (is_pipeline or prepares_its_data(model)) and rows_of(*sample) is not None
    facts = {
        "architecture": _architecture(model, hyperparameters),
        # Not in a configuration: rematerialization, the kernel that an LSTM uses, the code of the user's layers.
        "layers": [[plain_attributes(layer), _remat_mode(layer)] for layer in _layers(model)],
        "variables": [(list(v.shape), str(v.dtype), bool(v.trainable)) for v in model.variables],
        "optimizer": describe(model.optimizer),
        "compiled": _compiled(model),
        "sample": map_tree(described, sample),
        "is_pipeline": is_pipeline,
        "policy": keras.config.dtype_policy().name,
        "settings": [keras.config.floatx(), keras.config.image_data_format(), _flash_attention()],
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "backend": keras.config.backend(),
        "keras": keras.__version__,
        "backend_version": version(keras.config.backend()),
        "measured_as": _HOW_IT_IS_MEASURED,
        "device": device,
    }
    if validated_at_once is not None:
        facts["validated_at_once"] = validated_at_once
    if outputs:
        facts["outputs"] = outputs
    if hyperparameters.get("ghost_batch_size") is not None:
        facts["ghost_batch_size"] = hyperparameters["ghost_batch_size"]
    text = json.dumps(facts, sort_keys=True)
    return {
        "signature": hashlib.sha256(text.encode()).hexdigest()[:32],
        "device": device,
        "sample_bytes": outputs + (0 if takes_rows else sum(map(bytes_per_row, leaves(sample)))),
        "parameters": sum(int(np.prod(v.shape)) for v in model.trainable_variables),
        "static_bytes": sum(int(np.prod(v.shape)) * _bytes_per_element(v.dtype) for v in model.trainable_variables),
        "activation_bytes": _activation_bytes(model),
        "batch_coupled_layers": [str(layer) for layer in batch_coupled_layers(model)],
        "precision_policy": facts["policy"],
        "sample_shapes": facts["sample"],
    }


def _architecture(model: Any, hyperparameters: Mapping[str, Any]) -> Any:
    """Returns the model's configuration; for a subclass with none, all hyperparameters, any of which may matter."""
    chosen = describe(hyperparameters)
    try:
        config = describe(model.get_config())
    except Exception:  # whatever a user's get_config raises: this only costs a probe
        return {"class": describe(type(model)), "hyperparameters": chosen}
    if not hasattr(model, "inputs") or not model.inputs:
        # A subclass's call() may depend on more than its configuration.
        return {"config": config, "hyperparameters": chosen}
    return config


def _layers(model: Any) -> list[Any]:
    return list(model._flatten_layers(include_self=True))


def _remat_mode(layer: Any) -> Any:
    mode = getattr(layer, "_remat_mode", None)
    return None if mode is None else describe(tuple(mode))


def _compiled(model: Any) -> dict[str, Any]:
    """Describes the arguments of `compile` as objects, because Keras serializes a user's function by its name alone."""
    given = getattr(getattr(model, "_compile_config", None), "config", {})
    described = {name: describe(value) for name, value in given.items() if name != "optimizer"}
    return {**described, "jit_compile": bool(model.jit_compile), "run_eagerly": bool(model.run_eagerly)}


def _flash_attention() -> Any:
    import keras

    return getattr(keras.config, "is_flash_attention_enabled", lambda: None)()


def _activation_bytes(model: Any) -> int:
    """Returns the size of the layers' outputs for one sample; 0 if they are unknown, as in a subclass of Model.

    An unknown dimension, such as the length of a text, counts as 1.
    """
    import keras

    total = 0
    for layer in model.layers:
        inside = _activation_bytes(layer) if isinstance(layer, keras.Model) else 0
        total += inside or _bytes_of_output(layer)
    return total


def _bytes_of_output(layer: Any) -> int:
    import keras

    try:
        outputs = keras.tree.flatten(layer.output)
    except (AttributeError, ValueError):  # it was never called on symbolic inputs
        return 0
    return sum(math.prod(size or 1 for size in out.shape[1:]) * _bytes_per_element(out.dtype) for out in outputs)


def _bytes_of_outputs(model: Any, sample: Any) -> int:
    """Returns the bytes that a loss over the whole effective batch keeps per sample.

    These are the outputs and their gradient, the targets and the weight.
    """
    import keras

    from accumtune.accumulation.losses.whole_batch_loss import reads_inputs

    def spec(leaf: Any) -> Any:
        if leaf is None:
            return None
        return keras.KerasTensor((1, *leaf.shape[1:]), keras.backend.standardize_dtype(leaf.dtype))

    x, y, sample_weight = sample
    try:
        outputs = keras.tree.flatten(model.compute_output_spec(keras.tree.map_structure(spec, x)))
        sizes = [math.prod(leaf.shape[1:]) * _bytes_per_element(leaf.dtype) for leaf in outputs if leaf is not None]
    except Exception:  # a user's model may not know its outputs; the targets often have the same size
        sizes = [sum(map(bytes_per_row, leaves(y)))]
    inputs = x if reads_inputs(model) else None
    return int(2 * sum(sizes) + sum(map(bytes_per_row, leaves((inputs, y, sample_weight)))))


def _bytes_per_element(dtype: Any) -> int:
    name = str(dtype)
    digits = re.search(r"\d+", name)
    return max(1, int(digits[0]) // 8) if digits else 4
