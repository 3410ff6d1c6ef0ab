"""Normalizes ghost batches on JAX, with a custom gradient that keeps only the inputs and the moments.

Inputs are scaled and shifted, as Keras does on JAX. The mean is never subtracted from them first: XLA would keep the
difference beside the inputs, a quarter more memory for a U-Net.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp


def normalized(inputs: Any, gamma: Any, beta: Any, axis: int, epsilon: float, size: int) -> tuple[Any, tuple[Any, ...]]:
    """Computes `BatchNormalization.call` in training, for groups of `size` samples and a smaller rest.

    Returns:
        The outputs; numbers, means and variances, `(groups, channels)` each.
    """
    axis %= inputs.ndim
    channels, dtype = inputs.shape[axis], inputs.dtype
    gamma = jnp.ones(channels, dtype) if gamma is None else gamma
    beta = jnp.zeros(channels, dtype) if beta is None else beta
    whole = len(inputs) // size * size
    parts = [inputs] if whole in (0, len(inputs)) else [inputs[:whole], inputs[whole:]]
    outputs, numbers, means, variances = [], [], [], []
    for part in parts:
        samples = min(size, len(part))
        output, mean, variance = _groups(part, gamma, beta, axis, epsilon, samples)
        outputs.append(output)
        means.append(jax.lax.stop_gradient(mean).reshape(-1, channels))
        variances.append(jax.lax.stop_gradient(variance).reshape(-1, channels))
        numbers.append(jnp.full(means[-1].shape, samples * math.prod(part.shape[1:]) // channels, dtype))
    output = outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs)
    return output, (jnp.concatenate(numbers), jnp.concatenate(means), jnp.concatenate(variances))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _groups(inputs: Any, gamma: Any, beta: Any, axis: int, epsilon: float, samples: int) -> tuple[Any, Any, Any]:
    """Returns outputs, and mean and variance of each group."""
    return _forward(inputs, gamma, beta, axis, epsilon, samples)[0]


def _forward(inputs: Any, gamma: Any, beta: Any, axis: int, epsilon: float, samples: int) -> tuple[Any, Any]:
    blocks, over, shape = _in_groups(inputs, axis, samples)
    mean = jnp.mean(blocks, over, keepdims=True)
    variance = jnp.mean(jnp.square(blocks - mean), over, keepdims=True)
    inverse = jax.lax.rsqrt(variance + epsilon)
    scale = inverse * gamma.reshape(shape)
    outputs = blocks * scale + (beta.reshape(shape) - mean * scale)
    return (outputs.reshape(inputs.shape), mean, variance), (inputs, gamma, mean, inverse)


def _backward(axis: int, epsilon: float, samples: int, kept: Any, upstreams: Any) -> tuple[Any, Any, Any]:
    inputs, gamma, mean, inverse = kept
    blocks, over, shape = _in_groups(inputs, axis, samples)
    upstream = upstreams[0].reshape(blocks.shape)
    number = math.prod(blocks.shape[other] for other in over)
    scale = inverse * gamma.reshape(shape)
    beta_sum = jnp.sum(upstream, over, keepdims=True)
    gamma_sum = (jnp.sum(upstream * blocks, over, keepdims=True) - mean * beta_sum) * inverse
    through_variance = scale * inverse * gamma_sum / number
    of_inputs = upstream * scale - blocks * through_variance + (mean * through_variance - scale * beta_sum / number)
    channels = gamma.shape
    return of_inputs.reshape(inputs.shape), gamma_sum.sum(0).reshape(channels), beta_sum.sum(0).reshape(channels)


_groups.defvjp(_forward, _backward)


def _in_groups(inputs: Any, axis: int, samples: int) -> tuple[Any, tuple[int, ...], tuple[int, ...]]:
    """Returns inputs with a leading axis of groups, the axes to normalize over, and the shape of values per channel."""
    blocks = inputs.reshape(-1, samples, *inputs.shape[1:])
    over = tuple(other for other in range(1, blocks.ndim) if other != axis + 1)
    return blocks, over, tuple(1 if other != axis + 1 else blocks.shape[other] for other in range(blocks.ndim))
