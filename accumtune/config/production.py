"""A configuration put to work: the best hyperparameters, accumulation on."""

from __future__ import annotations

import warnings
from typing import Any

from accumtune.config.validation import BATCH_HYPERPARAMETERS
from accumtune.config.value import ConfigValue

# Kept here for those who look for it where it was.
from accumtune.config.versions import installed_versions

__all__ = ["build", "installed_versions"]


def build(config: ConfigValue, build_model: Any) -> Any:
    """See `TrainingConfig.build`."""
    import keras
    import keras_tuner

    if config.precision_policy not in (None, keras.config.dtype_policy().name):
        warnings.warn(
            f"The search trained with the precision policy {config.precision_policy!r}, here it is "
            f"{keras.config.dtype_policy().name!r}; keras.config.set_dtype_policy({config.precision_policy!r}) before "
            "building makes them equal.",
            stacklevel=3,
        )
    hp = keras_tuner.HyperParameters()
    # Keras Tuner takes a value that is there already instead of a hyperparameter's default.
    hp.values.update(replayed_values(config, config.micro_batch_size))
    return accumulate(config, builder_of(config, build_model).build_plain(hp))


def accumulate(config: ConfigValue, model: Any) -> Any:
    """See `TrainingConfig.accumulate`."""
    from accumtune import accumulation
    from accumtune.worker.data.user_data import fit_by_default

    accumulating = accumulation.accumulate(model, micro_batch_size=config.micro_batch_size)
    return fit_by_default(accumulating, config.fit_arguments()["batch_size"])


def builder_of(config: ConfigValue, build_model: Any) -> Any:
    """What builds models as the search did."""
    from accumtune.worker.builder import ModelBuilder

    return ModelBuilder(
        build_model,
        learning_rate_scaling=config.learning_rate_scaling,
        base_effective_batch_size=config.base_effective_batch_size,
    )


def replayed_values(config: ConfigValue, micro_batch_size: int) -> dict[str, Any]:
    """The hyperparameters' values that a build function is given."""
    return {**config.hyperparameters, **batch_values(micro_batch_size, config.effective_batch_size, config.replicas)}


def batch_values(micro_batch_size: int, effective_batch_size: int, replicas: int = 1) -> dict[str, Any]:
    """The three batch sizes by name; micro-batch and steps are one replica's."""
    steps = -(-(effective_batch_size // replicas) // micro_batch_size)
    return dict(zip(BATCH_HYPERPARAMETERS, (micro_batch_size, steps, effective_batch_size), strict=True))
