"""Passes changed values and sums of gradients from one compiled JAX function to the next."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def changed(values: list[Any], before: list[Any]) -> list[Any]:
    """Replaces each value that a step has not changed by None; which ones is known while it is traced."""
    return [None if value is old else value for value, old in zip(values, before, strict=True)]


def with_changes(values: list[Any], before: list[Any]) -> list[Any]:
    """Undoes `changed`."""
    return [old if value is None else value for value, old in zip(values, before, strict=True)]


def zeros(shapes: Any) -> Any:
    """Returns arrays of zeros with these shapes and dtypes."""
    return jax.tree.map(lambda one: jnp.zeros(one.shape, one.dtype), shapes)


def copies(values: Any) -> Any:
    """Returns arrays of the same values that may be used up."""
    return jax.tree.map(lambda value: jnp.array(value, copy=True), values)


def as_sums(gradients: list[Any]) -> list[Any]:
    """Returns gradients as the first sums: in float32, or in float64 if they are."""
    return [gradient.astype(jnp.float64 if gradient.dtype == jnp.float64 else jnp.float32) for gradient in gradients]


def added(variables: list[Any], sums: list[Any], gradients: list[Any]) -> list[Any]:
    """Adds a gradient to each sum."""
    totals = []
    for variable, total, gradient in zip(variables, sums, gradients, strict=True):
        gradient = gradient.astype(total.dtype)
        # float8 scales are not summed: their "gradient" is a new value
        totals.append(gradient if getattr(variable, "overwrite_with_gradient", False) else total + gradient)
    return totals
