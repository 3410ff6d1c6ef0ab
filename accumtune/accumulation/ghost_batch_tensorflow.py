"""Normalizes ghost batches on TensorFlow, with a custom gradient that keeps only the inputs and the moments.

For each layer and group a graph keeps two values per channel. A constant of that size, such as the zeros that are no
gradient, would add up to a megabyte in a network of fifty normalizations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from keras import ops


def normalized(inputs: Any, gamma: Any, beta: Any, axis: int, epsilon: float, size: int) -> tuple[Any, tuple[Any, ...]]:
    """Computes `BatchNormalization.call` in training, for groups of `size` samples and a smaller rest.

    Returns:
        The outputs; numbers, means and variances of groups, `(groups, 1)` and `(groups, channels)`.
    """
    rows = ops.shape(inputs)[0]
    whole = rows // size * size
    outputs, numbers, means, variances = [], [], [], []
    for part, groups, samples in (
        (slice(0, whole), rows // size, size),
        (slice(whole, None), 1, rows - whole),
    ):
        if isinstance(rows, int) and (groups == 0 or samples == 0):
            continue
        is_all = isinstance(rows, int) and groups * samples == rows
        values = inputs if is_all else inputs[part]
        output, number, mean, variance = _groups(values, gamma, beta, axis, epsilon, groups, samples)
        outputs.append(output)
        numbers.append(tf.fill([groups, 1], tf.cast(number, inputs.dtype)))
        means.append(tf.reshape(mean, [groups, inputs.shape[axis]]))
        variances.append(tf.reshape(variance, [groups, inputs.shape[axis]]))
    return _joined(outputs), (_joined(numbers), _joined(means), _joined(variances))


def _joined(parts: list[Any]) -> Any:
    return parts[0] if len(parts) == 1 else tf.concat(parts, 0)


def _groups(
    inputs: Any, gamma: Any, beta: Any, axis: int, epsilon: float, groups: Any, samples: Any
) -> tuple[Any, Any, Any, Any]:
    """Returns outputs, and of each group the number of entries per channel, the mean and the variance."""
    sizes = ops.shape(inputs)
    shape, over = _in_groups(sizes[1:], groups, samples, axis % len(sizes) - 1)
    number = math.prod(shape[other] for other in over)
    # A rest of dynamic size may have no samples.
    divisor = tf.cast(max(number, 1) if isinstance(number, int) else tf.maximum(number, 1), inputs.dtype)
    held = tf.stop_gradient(tf.reshape(inputs, shape))
    mean = tf.reduce_sum(held, over, keepdims=True) / divisor
    variance = tf.reduce_sum(tf.math.squared_difference(held, mean), over, keepdims=True) / divisor
    inverse = tf.math.rsqrt(variance + epsilon)  # tf.cast would round a Python number to float32
    weights = [tf.reshape(weight, mean.shape[1:]) for weight in (gamma, beta) if weight is not None]
    scale = inverse if gamma is None else inverse * weights[0]

    def normalize(blocks: Any, *weights: Any) -> Any:
        outputs = (blocks - mean) * scale
        outputs = outputs if beta is None else outputs + weights[-1]

        def gradient(upstream: Any) -> tuple[Any, ...]:
            beta_sum = tf.reduce_sum(upstream, over, keepdims=True)
            gamma_sum = tf.reduce_sum((blocks - mean) * upstream, over, keepdims=True) * inverse
            # Needs the sums from the start, so that it can take the memory of `upstream`.
            of_blocks = upstream - (blocks - mean) * (inverse * gamma_sum / divisor) - beta_sum / divisor
            of_weights = [
                tf.reduce_sum(total, 0)
                for total, weight in ((gamma_sum, gamma), (beta_sum, beta))
                if weight is not None
            ]
            return of_blocks * scale, *of_weights

        return outputs, gradient

    outputs = tf.custom_gradient(normalize)(tf.reshape(inputs, shape), *weights)
    return tf.reshape(outputs, sizes), number, mean, variance


def _in_groups(
    sample: Sequence[Any], groups: Any, samples: Any, axis: int
) -> tuple[tuple[Any, ...], tuple[int, ...]]:
    """Returns the shape of inputs in groups, and the axes to normalize over; `axis` is that of a sample's channels."""
    before, after = math.prod(sample[:axis]), math.prod(sample[axis + 1 :])
    if axis == len(sample) - 1:
        return (groups, samples * before, sample[axis]), (1,)
    return (groups, samples * before, sample[axis], after), (1, 3)
