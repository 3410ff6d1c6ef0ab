"""A `PyDataset` whose batches are cut anew."""

from __future__ import annotations

import math
from typing import Any

import keras
import numpy as np

from accumtune.errors import DataError


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
        self._samples = last * self._inner_batch_size + _rows(dataset[last])

    def __len__(self) -> int:
        return math.ceil(self._samples / self._batch_size)

    def __getitem__(self, index: int) -> Any:
        start = index * self._batch_size
        end = min(start + self._batch_size, self._samples)
        first, last = start // self._inner_batch_size, (end - 1) // self._inner_batch_size
        batches = [self._dataset[inner] for inner in range(first, last + 1)]
        offset = start - first * self._inner_batch_size
        rows = slice(offset, offset + end - start)
        return keras.tree.map_structure(lambda *parts: np.concatenate(parts)[rows], *batches)

    def on_epoch_begin(self) -> None:
        self._dataset.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._dataset.on_epoch_end()


def _rows(batch: Any) -> int:
    return len(keras.tree.flatten(batch)[0])
