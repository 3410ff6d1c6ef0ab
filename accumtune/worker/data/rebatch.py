"""Changes the batch size of pipelines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np

from accumtune.accumulation.data.array_kinds import as_rows, joined, part
from accumtune.accumulation.data.batches import check_samples, samples_of
from accumtune.errors import DataError


def rebatched(pipeline: Any, batch_size: int, is_batched: bool = True, first: int | None = None) -> Any:
    """Returns the same samples in the same order, in batches of `batch_size`; the last of an epoch may be smaller.

    Args:
        pipeline: a `tf.data.Dataset`, a `keras.utils.PyDataset` or a torch `DataLoader`.
        batch_size: samples per batch from now on.
        is_batched: whether the elements of a `tf.data.Dataset` are batches instead of samples.
        first: the number of elements of the pipeline to use; None: all.
    """
    if type(pipeline).__module__.startswith("torch.") or hasattr(pipeline, "batch_sampler"):
        return _torch_loader(pipeline, batch_size, first)
    if not hasattr(pipeline, "element_spec"):
        return RebatchedDataset(pipeline, batch_size, first)
    pipeline = pipeline if first is None else pipeline.take(first)
    cut = pipeline.rebatch(batch_size) if is_batched else pipeline.batch(batch_size)
    if hasattr(cut, "as_tf_dataset"):  # a pipeline in a process of its own, which also counts the batches
        return cut.as_tf_dataset()
    return _with_cardinality(cut, pipeline, batch_size) if is_batched else cut


def _torch_loader(loader: Any, batch_size: int, first: int | None) -> Any:
    """Returns a `DataLoader` with another batch size and the same sampler."""
    from torch.utils.data import BatchSampler, DataLoader, IterableDataset

    streams = isinstance(loader.dataset, IterableDataset)
    if loader.batch_size is None or (not streams and type(loader.batch_sampler) is not BatchSampler):
        raise DataError(
            "Received a torch DataLoader that makes its batches itself (batch_sampler=, or batch_size=None).",
            "a DataLoader with batch_size=, because a search makes batches of other sizes from its samples.",
            "pass sampler= for the order of samples and leave batch_sampler out.",
        )
    if streams and first is not None:
        raise DataError(
            f"Received validation_steps={first} and a torch DataLoader of an IterableDataset.",
            "data that end by themselves, or a data set with a length: a search makes batches of other sizes.",
            "let the IterableDataset end where validation should end, and leave validation_steps out.",
        )
    sampler = None if streams else loader.sampler
    return DataLoader(
        loader.dataset,
        batch_size=batch_size,
        sampler=sampler if first is None else _first_of_sampler(sampler, first * loader.batch_size),
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
    )


def _first_of_sampler(sampler: Any, samples: int) -> Any:
    from torch.utils.data import Sampler

    class FirstOfSampler(Sampler[Any]):
        def __iter__(self) -> Iterator[Any]:
            return itertools.islice(iter(sampler), samples)

        def __len__(self) -> int:
            return min(samples, len(sampler))

    return FirstOfSampler()


def _with_cardinality(rebatched: Any, source: Any, batch_size: int) -> Any:
    """Sets the number of batches, which `Dataset.rebatch` does not (TensorFlow 2.21), if the samples can be counted."""
    import tensorflow as tf

    if int(source.cardinality()) == tf.data.INFINITE_CARDINALITY:
        number = tf.data.INFINITE_CARDINALITY
    elif (samples := _number_of_samples(source)) is not None:
        number = math.ceil(samples / batch_size)
    else:
        return rebatched
    return rebatched.apply(tf.data.experimental.assert_cardinality(number))


def _number_of_samples(batches: Any) -> int | None:
    """Counts the samples in a data set of batches: all batches have one static size, or the unbatched set has a length.

    None if neither holds.
    """
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
    # With drop_remainder the size is static, which is handled above.
    return counted if counted >= 0 and not bool(batches._drop_remainder) else None


class RebatchedDataset(keras.utils.PyDataset):
    """Batches of another size from a `PyDataset`.

    The data set's batches all have one size (the last may be smaller), or it has an attribute `batch_sizes` with the
    size of each.

    Args:
        dataset: the user's data set.
        batch_size: samples per batch from now on.
        first: the number of its batches to use; None: all.

    Attributes:
        refusal: the error that a batch of an unexpected size has raised, in case Keras hides it.
    """

    def __init__(self, dataset: Any, batch_size: int, first: int | None = None) -> None:
        super().__init__()
        if not dataset.num_batches:
            raise DataError(
                "Received a PyDataset without a length.", "a PyDataset that has `__len__`.", "add `__len__` to it."
            )
        self._dataset = dataset
        self._batch_size = batch_size
        self._sizes = _sizes(dataset)[:first]
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._samples = int(self._starts[-1])
        self.refusal: DataError | None = None

    def __len__(self) -> int:
        return math.ceil(self._samples / self._batch_size)

    def __getitem__(self, index: int) -> Any:
        start = index * self._batch_size
        end = min(start + self._batch_size, self._samples)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, end, side="left")) - 1
        batches = [self._batch(inner) for inner in range(first, last + 1)]
        offset = start - int(self._starts[first])
        rows = slice(offset, offset + end - start)
        return keras.tree.map_structure(lambda *parts: part(joined([as_rows(leaf) for leaf in parts]), rows), *batches)

    def _batch(self, index: int) -> Any:
        batch = self._dataset[index]
        try:
            if _rows(batch) != self._sizes[index]:
                raise _unequal(_rows(batch), index, self._sizes[index])
        except DataError as refusal:
            self.refusal = refusal
            raise
        return batch

    def on_epoch_begin(self) -> None:
        self._dataset.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._dataset.on_epoch_end()


def _sizes(dataset: Any) -> list[int]:
    """Returns the number of samples of each batch, reading at most two batches."""
    number = int(dataset.num_batches)
    given = getattr(dataset, "batch_sizes", None)
    if given is not None:
        sizes = [int(size) for size in given]
        if len(sizes) != number or sum(sizes) < 1:
            raise DataError(
                f"Received a PyDataset of {number} batches with {len(sizes)} batch_sizes of {sum(sizes)} samples.",
                "the number of samples of each batch.",
                "set batch_sizes to a list of these numbers, as long as the data set.",
            )
        return sizes
    first, last = _rows(dataset[0]), _rows(dataset[number - 1])
    if not 0 < last <= first:
        raise _unequal(last, number - 1, first)
    return [first] * (number - 1) + [last]


def _unequal(rows: int, index: int, expected: int) -> DataError:
    return DataError(
        f"Received a PyDataset whose batch {index} has {rows} samples, where {expected} were expected.",
        "batches of one size (the last may be smaller): a search makes batches of other sizes, and must know which "
        "batch has a sample.",
        "give the data set an attribute `batch_sizes`: a list with the number of samples of each batch.",
    )


def _rows(batch: Any) -> int:
    check_samples(batch)
    return samples_of(batch)
