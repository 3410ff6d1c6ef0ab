"""What functions on JAX hand on to each other: values that have changed, and sums."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp


def changed(values: list[Any], before: list[Any]) -> list[Any]:
    """The values, with None in place of each that a step has handed through: known while it is traced."""
    return [None if value is old else value for value, old in zip(values, before, strict=True)]


def with_changes(values: list[Any], before: list[Any]) -> list[Any]:
    """Undoes `changed`."""
    return [old if value is None else value for value, old in zip(values, before, strict=True)]


def as_sums(gradients: list[Any]) -> list[Any]:
    """Gradients as the first summands: in float32, whatever less they have."""
    return [gradient.astype(jnp.float64 if gradient.dtype == jnp.float64 else jnp.float32) for gradient in gradients]


def added(variables: list[Any], sums: list[Any], gradients: list[Any]) -> list[Any]:
    """The sums with one more gradient each."""
    totals = []
    for variable, total, gradient in zip(variables, sums, gradients, strict=True):
        gradient = gradient.astype(total.dtype)
        # float8 scales are not summed: their "gradient" is a new value
        totals.append(gradient if getattr(variable, "overwrite_with_gradient", False) else total + gradient)
    return totals
