"""Builds the model of a configuration, with accumulation, and makes a pipeline's batches those of the configuration."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, Any

from accumtune.accumulation.batch_pair import BATCH_HYPERPARAMETERS, ghost_batch_of
from accumtune.errors import DataError

if TYPE_CHECKING:
    from accumtune.config.training_config import TrainingConfig


def build(config: TrainingConfig, build_model: Any) -> Any:
    """See `TrainingConfig.build`."""
    import keras
    import keras_tuner

    if config.precision_policy not in (None, keras.config.dtype_policy().name):
        warnings.warn(
            f"The search trained with the precision policy {config.precision_policy!r}, but here it is "
            f"{keras.config.dtype_policy().name!r}. To train as in the search, call "
            f"keras.config.set_dtype_policy({config.precision_policy!r}) before building.",
            stacklevel=3,
        )
    hp = keras_tuner.HyperParameters()
    # For a hyperparameter that is declared later, Keras Tuner keeps the value that is set already.
    hp.values.update(replayed_values(config, config.micro_batch_size))
    return accumulate(config, builder_of(config, build_model).build_plain(hp))


def accumulate(config: TrainingConfig, model: Any) -> Any:
    """See `TrainingConfig.accumulate`."""
    from accumtune import accumulation
    from accumtune.worker.data.user_data import fit_by_default

    accumulating = accumulation.accumulate(
        model,
        micro_batch_size=config.micro_batch_size,
        whole_batch_loss=choice_of_loss(config),
        ghost_batch_size=ghost_batch_of(config.effective_batch_size, config.ghost_batch_size),
    )
    return fit_by_default(accumulating, config.fit_arguments()["batch_size"])


def choice_of_loss(config: TrainingConfig) -> bool | str:
    """As `accumtune.accumulate` takes it."""
    return "auto" if config.whole_batch_loss is None else config.whole_batch_loss


def builder_of(config: TrainingConfig, build_model: Any) -> Any:
    """Returns a builder that builds models as the search did."""
    from accumtune.worker.builder import ModelBuilder

    return ModelBuilder(
        build_model,
        learning_rate_scaling=config.learning_rate_scaling,
        base_effective_batch_size=config.base_effective_batch_size,
        whole_batch_loss=choice_of_loss(config),
    )


def replayed_values(config: TrainingConfig, micro_batch_size: int) -> dict[str, Any]:
    """Returns the values of hyperparameters for the build function."""
    return {**config.hyperparameters, **batch_values(micro_batch_size, config.effective_batch_size, config.replicas)}


def batch_values(micro_batch_size: int, effective_batch_size: int, replicas: int = 1) -> dict[str, Any]:
    """Returns the three batch sizes by name; micro-batch and steps are one replica's."""
    steps = -(-(effective_batch_size // replicas) // micro_batch_size)
    return dict(zip(BATCH_HYPERPARAMETERS, (effective_batch_size, micro_batch_size, steps), strict=True))


def installed_versions() -> dict[str, str]:
    """Returns the installed versions of the packages that decide the cost of a training step."""
    versions = {}
    for name in ("accumtune", "keras", "tensorflow", "jax", "torch", "numpy"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def dataset(config: TrainingConfig, pipeline: Any, is_batched: bool | None) -> Any:
    """See `TrainingConfig.dataset`."""
    from accumtune.worker.data.rebatch import rebatched
    from accumtune.worker.data.user_data import is_pipeline, is_tf_dataset

    if not is_pipeline(pipeline):
        raise DataError(
            f"Received data of type {type(pipeline).__module__}.{type(pipeline).__qualname__}.",
            "a tf.data.Dataset or a keras.utils.PyDataset.",
            "pass arrays to fit directly: model.fit(x, y, **config.fit_arguments()).",
        )
    if is_tf_dataset(pipeline) and is_batched is None:
        is_batched = _has_batches(pipeline, config.data_shapes)
    return rebatched(pipeline, config.effective_batch_size, is_batched is not False)


def _has_batches(pipeline: Any, data_shapes: Any) -> bool:
    """Returns whether a data set's elements are batches, by the rank of the inputs that the search trained on.

    Raises:
        DataError: the rank does not decide it.
    """
    import tensorflow as tf

    spec = pipeline.element_spec
    if any(leaf.shape.rank == 0 for leaf in tf.nest.flatten(spec)):
        return False  # a single number is not a batch
    searched = _first(data_shapes.get("x")) if isinstance(data_shapes, Mapping) else None
    here = _first(tf.nest.map_structure(lambda leaf: leaf.shape, spec[0] if isinstance(spec, tuple) else spec))
    rank = None if here is None else here.rank
    if searched is None or rank not in (len(searched), len(searched) - 1):
        raise DataError(
            f"Received a dataset with inputs of shape {here}; those of the search had "
            f"{'an unknown shape' if searched is None else f'the shape {tuple(searched)}'}.",
            "a dataset whose input shapes show whether its elements are samples or batches.",
            "give it: config.dataset(ds, is_batched=True), or False.",
        )
    return bool(rank == len(searched))


def _first(tree: Any) -> Any:
    """Returns the first shape of a structure of shapes, in the order of its keys."""
    if isinstance(tree, Mapping):
        return _first(tree[min(tree)]) if tree else None
    is_shape = hasattr(tree, "rank") or not any(isinstance(part, (Mapping, list, tuple)) for part in tree or ())
    return tree if is_shape or not tree else _first(tree[0])
