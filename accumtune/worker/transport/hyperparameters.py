"""Keras Tuner's hyperparameters from their configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any


def hyperparameters_from(config: Mapping[str, Any]) -> Any:
    """`HyperParameters.from_config`, which puts objects in the place of the conditions in what it is given."""
    import keras_tuner

    return keras_tuner.HyperParameters.from_config(copy.deepcopy(dict(config)))
