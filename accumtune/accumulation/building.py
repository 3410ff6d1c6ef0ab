"""Creates the variables of a model that do not exist before its first batch."""

from __future__ import annotations

from typing import Any


def is_built(model: Any) -> bool:
    """Returns whether the variables of model, loss, metrics and optimizer exist."""
    compiled = [part for part in (model._compile_loss, model._compile_metrics) if part is not None]
    return all(part.built for part in (*compiled, model.optimizer, *model._flatten_layers()))


def build(model: Any, micro_batch: Any) -> None:
    """Creates the missing variables of model, loss, metrics and optimizer, without computing anything."""
    if not is_built(model):
        model._symbolic_build(data_batch=micro_batch)
