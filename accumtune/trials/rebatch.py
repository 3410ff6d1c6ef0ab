"""Pipelines whose batches are cut anew, to another size."""

from __future__ import annotations

import math
from typing import Any

import keras

from accumtune.errors import DataError
from accumtune.memory.leaves import as_rows, joined, part
from accumtune.trials.pipeline_process import PipelineElsewhere


def rebatched(pipeline: Any, batch_size: int, is_batched: bool = True) -> Any:
    """The same samples in the same order, in batches of `batch_size`; the last of an epoch may be smaller.

    Args:
        pipeline: a `tf.data.Dataset`, a `keras.utils.PyDataset` or a torch `DataLoader`.
        batch_size: samples per batch from now on.
        is_batched: whether the elements of a `tf.data.Dataset` are batches, rather than samples.
    """
    if type(pipeline).__module__.startswith("torch.") or hasattr(pipeline, "batch_sampler"):
        return _torch_loader(pipeline, batch_size)
    if not hasattr(pipeline, "element_spec"):
        return RebatchedDataset(pipeline, batch_size)
    if isinstance(pipeline, PipelineElsewhere):
        return (pipeline.rebatch(batch_size) if is_batched else pipeline.batch(batch_size)).as_tf_dataset()
    if not is_batched:
        return pipeline.batch(batch_size)
    return _with_cardinality(pipeline.rebatch(batch_size), pipeline, batch_size)


def _torch_loader(loader: Any, batch_size: int) -> Any:
    """The same samples in the order of the same sampler."""
    from torch.utils.data import BatchSampler, DataLoader, IterableDataset

    streams = isinstance(loader.dataset, IterableDataset)
    if loader.batch_size is None or (not streams and type(loader.batch_sampler) is not BatchSampler):
        raise DataError(
            "Received a torch DataLoader that makes batches in its own way (batch_sampler=, or batch_size=None).",
            "a DataLoader with batch_size=: a search cuts batches anew, to the sizes that it tries.",
            "pass sampler= for the order of samples and leave batch_sampler out.",
        )
    return DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=None if streams else loader.sampler,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
    )


def _with_cardinality(rebatched: Any, source: Any, batch_size: int) -> Any:
    """`Dataset.rebatch` forgets the number of batches (TensorFlow 2.21), also where the samples can be counted."""
    import tensorflow as tf

    if int(source.cardinality()) == tf.data.INFINITE_CARDINALITY:
        number = tf.data.INFINITE_CARDINALITY
    elif (samples := _number_of_samples(source)) is not None:
        number = math.ceil(samples / batch_size)
    else:
        return rebatched
    return rebatched.apply(tf.data.experimental.assert_cardinality(number))


def _number_of_samples(batches: Any) -> int | None:
    """In a data set of batches: where all have one static size, or where it was counted before it was batched."""
    import tensorflow as tf

    count = int(batches.cardinality())
    if count < 0:
        return None
    sizes = {leaf.shape[0] for leaf in tf.nest.flatten(batches.element_spec)}
    if len(sizes) == 1 and None not in sizes:
        return count * int(sizes.pop())
    while type(batches).__name__ in ("_PrefetchDataset", "_OptionsDataset", "_CacheDataset"):
        (batches,) = batches._inputs()
    if type(batches).__name__ not in ("_BatchDataset", "_ParallelBatchDataset"):
        return None
    (samples,) = batches._inputs()
    counted = int(samples.cardinality())
    # With drop_remainder the size is static, seen above.
    return counted if counted >= 0 and not bool(batches._drop_remainder) else None


class RebatchedDataset(keras.utils.PyDataset):
    """Batches of another size from a `PyDataset` whose batches all have one size (the last may be smaller).

    Args:
        dataset: the user's data set.
        batch_size: samples per batch from now on.
    """

    def __init__(self, dataset: Any, batch_size: int) -> None:
        super().__init__()
        if dataset.num_batches is None:
            raise DataError(
                "Received a PyDataset without a length.", "a PyDataset that has `__len__`.", "add `__len__` to it."
            )
        self._dataset = dataset
        self._batch_size = batch_size
        self._inner_batch_size = _rows(dataset[0])
        last = dataset.num_batches - 1
        self._samples: int = last * self._inner_batch_size + _rows(dataset[last])

    def __len__(self) -> int:
        return math.ceil(self._samples / self._batch_size)

    def __getitem__(self, index: int) -> Any:
        start = index * self._batch_size
        end = min(start + self._batch_size, self._samples)
        first, last = start // self._inner_batch_size, (end - 1) // self._inner_batch_size
        batches = [self._dataset[inner] for inner in range(first, last + 1)]
        offset = start - first * self._inner_batch_size
        rows = slice(offset, offset + end - start)
        return keras.tree.map_structure(lambda *parts: part(joined([as_rows(leaf) for leaf in parts]), rows), *batches)

    def on_epoch_begin(self) -> None:
        self._dataset.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._dataset.on_epoch_end()


def _rows(batch: Any) -> int:
    return int(keras.tree.flatten(batch)[0].shape[0])
