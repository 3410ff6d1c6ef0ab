"""Measures the memory of a loss over the whole effective batch, which may grow with the pairs of its samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import tree

from accumtune.accumulation.losses import whole_batch_loss
from accumtune.memory.device import Device
from accumtune.memory.prediction.window_bytes import NO_LOSS, bytes_of

# The loss is measured on this many samples, twice and four times as many; fewer if their outputs take more than this.
# A loss over all triples of 256 samples takes 64 MiB; none is tried that might take more than the third.
_SAMPLES, _MOST_OUTPUT_BYTES, _MOST_BYTES = 64, 2**24, 2**28
# On JAX nothing runs. XLA plans small matrices differently, because it fuses their products.
_PLANNED_SAMPLES = 512
# A term with a smaller share of the largest batch's peak is rounding of the allocator.
_LEAST_SHARE = 0.1

LossBytes = tuple[float, float, float]


def loss_bytes(model: Any, sample: tuple[Any, Any, Any], device: Device) -> tuple[LossBytes, str]:
    """Returns the bytes of the loss and its gradient per sample, per pair and per triple of samples, outputs included.

    Args:
        model: a compiled model whose loss is that of the whole effective batch.
        sample: `(x, y, sample_weight)` of one sample.
        device: the opened device, without a limit.

    Returns:
        The bytes: zeros if the loss fails on random outputs, or if the device counts pages of the process; and the
        failure, which is empty if there is none.
    """
    if device.memory_source == "process high-water mark":
        return NO_LOSS, ""
    try:
        outputs = _outputs(model, sample)
        if keras.backend.backend() == "jax":
            smallest = _PLANNED_SAMPLES
            peaks = [_planned_bytes(model, sample, outputs, smallest * factor) for factor in (1, 2, 4)]
        else:
            row_bytes = sum(math.prod(leaf.shape[1:]) * 8 for leaf in tree.flatten(outputs) if leaf is not None)
            most = max(2, _MOST_OUTPUT_BYTES // (4 * max(row_bytes, 1)))
            smallest = min(_SAMPLES, most)
            peaks = [_peak_bytes(model, sample, outputs, smallest * factor, device) for factor in (1, 2, 4)]
            # Of larger batches the allocator's rounding is a smaller share. All triples would take 64 times as much.
            while 4 * smallest <= most and 64 * peaks[-1] <= _MOST_BYTES:
                smallest *= 4
                peaks = [_peak_bytes(model, sample, outputs, smallest * factor, device) for factor in (1, 2, 4)]
    except Exception as error:  # whatever a user's loss raises for numbers that mean nothing
        return NO_LOSS, f"{type(error).__name__}: {error}".splitlines()[0]
    return fitted(smallest, *peaks), ""


def validation_loss_bytes(
    model: Any, sample: tuple[Any, Any, Any], device: Device, samples: int, in_training: LossBytes
) -> int:
    """Returns the bytes of the loss of so many samples without a gradient, outputs and data included.

    Args:
        in_training: what `loss_bytes` has returned. The loss is not computed of samples that would need too much
            memory in training: then it takes the same share of that as with fewer samples.
    """
    if not any(in_training):
        return 0
    measured = samples
    while measured > 2 and keras.backend.backend() != "jax" and bytes_of(in_training, measured) > _MOST_BYTES:
        measured //= 2
    outputs = _outputs(model, sample)
    if keras.backend.backend() == "jax":
        found = _planned_bytes(model, sample, outputs, measured, has_gradient=False)
    else:
        found = _peak_bytes(model, sample, outputs, measured, device, has_gradient=False)
    return math.ceil(found * bytes_of(in_training, samples) / bytes_of(in_training, measured))


def fitted(samples: int, one: float, two: float, four: float) -> tuple[float, float, float]:
    """Returns the bytes per sample, pair and triple, from the peaks of a batch, one twice and one four times as large.

    Only differences count, for something is there without any sample. Of two of them there are two terms: the first
    two, or, where that grows faster than pairs do, the last two.
    """
    first, second, largest = two - one, four - two, 4 * samples
    triples = max(0.0, (second - 4 * first) / (28 * samples**3))
    if triples * largest**3 >= _LEAST_SHARE * four:
        return 0.0, max(0.0, (first - 7 * samples**3 * triples) / (3 * samples**2)), triples
    pairs = max(0.0, min((second - 2 * first) / (6 * samples**2), second / (12 * samples**2)))
    if pairs * largest**2 >= _LEAST_SHARE * four:
        return max(0.0, (first - 3 * samples**2 * pairs) / samples), pairs, 0.0
    return four / largest, 0.0, 0.0


def _outputs(model: Any, sample: tuple[Any, Any, Any]) -> Any:
    return model.compute_output_spec(tree.map_structure(_spec, sample[0]))


def _spec(leaf: Any) -> Any:
    if leaf is None:
        return None
    return keras.KerasTensor((1, *leaf.shape[1:]), keras.backend.standardize_dtype(leaf.dtype))


def _peak_bytes(
    model: Any, sample: tuple[Any, Any, Any], outputs: Any, samples: int, device: Device, has_gradient: bool = True
) -> int:
    generator = np.random.default_rng(0)

    def predicted(spec: Any) -> Any:
        values = generator.uniform(0.1, 0.9, (samples, *spec.shape[1:]))
        return keras.ops.convert_to_tensor(values, dtype=spec.dtype)

    def repeated(leaf: Any) -> Any:
        return None if leaf is None else keras.ops.convert_to_tensor(np.repeat(np.asarray(leaf)[:1], samples, axis=0))

    before = device.current_memory_bytes()
    device.reset_peak()
    x, y, sample_weight = tree.map_structure(repeated, sample)
    x = x if whole_batch_loss.reads_inputs(model) else None
    y_pred = tree.map_structure(predicted, outputs)

    def loss(y_pred: Any) -> Any:
        return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=has_gradient)

    _COMPUTATIONS[keras.backend.backend()](loss, y_pred, model, has_gradient)
    return device.peak_memory_bytes() - before


def _computed_by_tensorflow(loss: Callable[[Any], Any], y_pred: Any, model: Any, has_gradient: bool) -> Any:
    import tensorflow as tf

    def gradients(y_pred: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(y_pred)
            value = loss(y_pred)
        return value, tape.gradient(value, tree.flatten(y_pred))

    function = gradients if has_gradient else loss
    return tf.function(function, jit_compile=model.jit_compile, autograph=False)(y_pred)


def _computed_by_torch(loss: Callable[[Any], Any], y_pred: Any, model: Any, has_gradient: bool) -> Any:
    import torch

    if not has_gradient:
        with torch.no_grad():
            return loss(y_pred)
    leaves = [leaf.requires_grad_() for leaf in tree.flatten(y_pred) if leaf.is_floating_point()]
    loss(y_pred).backward()
    return [leaf.grad for leaf in leaves]


_COMPUTATIONS = {"tensorflow": _computed_by_tensorflow, "torch": _computed_by_torch}


def _planned_bytes(
    model: Any, sample: tuple[Any, Any, Any], outputs: Any, samples: int, has_gradient: bool = True
) -> int:
    """Returns the bytes that XLA plans for the loss and, if asked for, its gradient, arguments included."""
    import jax

    def spec(leaf: Any) -> Any:
        if leaf is None:
            return None
        return jax.ShapeDtypeStruct((samples, *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype))

    def loss(y_pred: Any, x: Any, y: Any, sample_weight: Any) -> Any:
        with keras.StatelessScope():
            return model._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=has_gradient)

    x, y, sample_weight = tree.map_structure(spec, sample)
    x = x if whole_batch_loss.reads_inputs(model) else None
    given = tree.map_structure(spec, outputs), x, y, sample_weight
    stats = jax.jit(jax.value_and_grad(loss) if has_gradient else loss).lower(*given).compile().memory_analysis()
    return int(stats.argument_size_in_bytes + stats.temp_size_in_bytes + stats.output_size_in_bytes)
