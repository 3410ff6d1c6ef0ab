"""Decides whether a metric should be maximized or minimized, without creating the metric.

Keras Tuner creates the metric to find out, whose variables open the device in the search's process; but a GPU belongs
to the trials. Here Keras Tuner's own rule is applied to the class or function alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import keras_tuner
from keras_tuner.engine.metrics_tracking import infer_metric_direction
from keras_tuner.src.engine.objective import create_objective  # it has no public name


def metric_direction(name: str) -> str | None:
    """Returns `"min"` or `"max"` for a metric or loss of Keras, under any of its names; None for others.

    >>> metric_direction("val_accuracy"), metric_direction("mse"), metric_direction("my_metric")
    ('max', 'min', None)
    """
    import keras

    base = name.removeprefix("val_").removeprefix("weighted_")
    if base in ("loss", "crossentropy", "ce"):
        return "min"
    if base == "acc":
        return "max"
    for module in (keras.metrics, keras.losses):
        for known, value in vars(module).items():
            if callable(value) and _plain(known) == _plain(base):
                return _direction_of(value)
    try:
        return _direction_of(keras.losses.get(base))  # "mse" and other short names; losses have no variables
    except ValueError:
        return None


def described(objective: Any) -> dict[str, Any]:
    """Returns name and direction of an objective, and those of its `terms` if it adds up several."""
    terms = getattr(objective, "name_to_direction", None)
    return {"name": objective.name, "direction": objective.direction, **({"terms": dict(terms)} if terms else {})}


def objective_from(description: Mapping[str, Any]) -> Any:
    """Returns the objective that `described` describes."""
    terms = description.get("terms") or {}
    if terms:
        return create_objective([keras_tuner.Objective(name, direction) for name, direction in terms.items()])
    return keras_tuner.Objective(description["name"], description.get("direction", "min"))


def _direction_of(metric: Any) -> str | None:
    direction: str | None = infer_metric_direction(metric)
    return direction


def with_direction(objective: Any) -> Any:
    """Adds the direction to an objective, or a list of them, that is given as the name of a metric of Keras."""
    if isinstance(objective, list):
        return [with_direction(each) for each in objective]
    if not isinstance(objective, str):
        return objective
    direction = metric_direction(objective)
    return objective if direction is None else keras_tuner.Objective(objective, direction)


def _plain(name: str) -> str:
    return name.replace("_", "").lower()
