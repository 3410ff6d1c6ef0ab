"""Reads Keras Tuner's hyperparameters from their configuration, and finds those that were declared since."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def hyperparameters_from(config: Mapping[str, Any]) -> Any:
    """Returns `HyperParameters.from_config` of a copy, because it changes the conditions in its argument."""
    import keras_tuner

    return keras_tuner.HyperParameters.from_config(copy.deepcopy(dict(config)))


def appeared(hp: Any, given: dict[str, Any]) -> dict[str, Any]:
    """Returns what was declared beyond `given`: `space` and `values`, as in Keras Tuner's configuration."""
    config = hp.get_config()
    known = len(hyperparameters_from(given).space)
    values = {name: value for name, value in config["values"].items() if name not in given["values"]}
    return {"space": config["space"][known:], "values": values}
