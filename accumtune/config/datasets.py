"""Production's own pipeline, in batches of the configuration's size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from accumtune.config.value import ConfigValue
from accumtune.errors import DataError


def dataset(config: ConfigValue, pipeline: Any, is_batched: bool | None) -> Any:
    """See `TrainingConfig.dataset`."""
    from accumtune.worker.data.rebatch import rebatched
    from accumtune.worker.data.user_data import is_pipeline, is_tf_dataset

    if not is_pipeline(pipeline):
        raise DataError(
            f"Received data of type {type(pipeline).__module__}.{type(pipeline).__qualname__}.",
            "a tf.data.Dataset or a keras.utils.PyDataset.",
            "arrays need no batches of their own: model.fit(x, y, **config.fit_arguments()).",
        )
    if is_tf_dataset(pipeline) and is_batched is None:
        is_batched = _has_batches(pipeline, config.data_shapes)
    return rebatched(pipeline, config.effective_batch_size, is_batched is not False)


def _has_batches(pipeline: Any, data_shapes: Any) -> bool:
    """Whether its elements are batches, told by the rank of the inputs that the search trained on.

    Raises:
        DataError: it cannot be told.
    """
    import tensorflow as tf

    spec = pipeline.element_spec
    if any(leaf.shape.rank == 0 for leaf in tf.nest.flatten(spec)):
        return False  # a number cannot be a batch
    searched = _first(data_shapes.get("x")) if isinstance(data_shapes, Mapping) else None
    here = _first(tf.nest.map_structure(lambda leaf: leaf.shape, spec[0] if isinstance(spec, tuple) else spec))
    rank = None if here is None else here.rank
    if searched is None or rank not in (len(searched), len(searched) - 1):
        raise DataError(
            f"Received a dataset with inputs of shape {here}; those of the search had "
            f"{'an unknown shape' if searched is None else f'the shape {tuple(searched)}'}.",
            "a dataset of which can be told whether its elements are samples or batches.",
            "say it: config.dataset(ds, is_batched=True), or False.",
        )
    return bool(rank == len(searched))


def _first(tree: Any) -> Any:
    """The first shape of a structure of shapes, by the names of its keys."""
    if isinstance(tree, Mapping):
        return _first(tree[min(tree)]) if tree else None
    is_shape = hasattr(tree, "rank") or not any(isinstance(part, (Mapping, list, tuple)) for part in tree or ())
    return tree if is_shape or not tree else _first(tree[0])
