"""Normalizes ghost batches on torch with torch's own operation, one group after the other.

Keras on torch uses an operation for each step of the formula. One fused operation per group is faster on a CPU, and
keeps less for the backward pass.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def normalized(inputs: Any, gamma: Any, beta: Any, axis: int, epsilon: float, size: int) -> tuple[Any, tuple[Any, ...]]:
    """Computes `BatchNormalization.call` in training, for groups of `size` samples and a smaller rest.

    Returns:
        The outputs; numbers, means and variances, `(groups, channels)` each.
    """
    rows = _in_rows(inputs, axis)
    per_sample = len(rows) // len(inputs)
    groups = rows.split(size * per_sample)
    parts = [torch.native_batch_norm(group, gamma, beta, None, None, True, 0.0, epsilon) for group in groups]
    outputs, means, inverses = zip(*parts, strict=True)
    with torch.no_grad():
        mean, inverse = torch.stack(means), torch.stack(inverses)
        variance = (inverse.square().reciprocal() - epsilon).clamp_(min=0)
        numbers = [math.prod(group.shape) // group.shape[1] for group in groups]
        number = torch.tensor(numbers, dtype=mean.dtype, device=mean.device)[:, None].expand_as(mean)
    return torch.cat(outputs).reshape(inputs.shape), (number, mean, variance)


def _in_rows(inputs: Any, axis: int) -> Any:
    """Returns inputs as `(rows, channels)` or `(rows, channels, rest)`, with the rows of a sample together."""
    axis %= inputs.ndim
    if axis == inputs.ndim - 1:
        return inputs.reshape(-1, inputs.shape[axis])
    return inputs.reshape(math.prod(inputs.shape[:axis]), inputs.shape[axis], -1)
