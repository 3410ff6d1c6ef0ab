"""Finds the optimizers that change a model's variables: some of Keras's pass gradients on to others."""

from __future__ import annotations

from typing import Any

from accumtune.errors import ModelError


def updating(optimizer: Any) -> list[Any]:
    """Returns the optimizers that change variables: `optimizer`, or those in a LossScaleOptimizer or MultiOptimizer.

    A MultiOptimizer that chooses by a function knows all of them only after it is built.
    """
    inner = getattr(optimizer, "inner_optimizer", None)
    inner = list(getattr(optimizer, "optimizers", ())) if inner is None else [inner]
    return [one for handed_to in inner for one in updating(handed_to)] or [optimizer]


def check(optimizer: Any) -> None:
    """Raises ModelError if one of them accumulates gradients itself."""
    for one in updating(optimizer):
        if getattr(one, "gradient_accumulation_steps", None):
            raise ModelError(
                f"Received an optimizer with gradient_accumulation_steps={one.gradient_accumulation_steps}.",
                "an optimizer that updates at every step.",
                "leave out gradient_accumulation_steps; accumulate() does the accumulation.",
            )
