"""Passes arrays between a process and its fork in shared memory: a pipe would take milliseconds for each MB."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np

from accumtune.accumulation.data.row_indices import ALIGNMENT, aligned


@dataclass(frozen=True)
class ArrayLocation:
    """The place of an array in shared memory."""

    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int


class SharedArrays:
    """Holds the arrays of one message at a time. Create it before the fork; the writer enlarges it."""

    def __init__(self) -> None:
        self._file = _anonymous_file()
        os.ftruncate(self._file.fileno(), ALIGNMENT)
        self._memory = mmap.mmap(self._file.fileno(), ALIGNMENT)

    def put(self, arrays: Sequence[np.ndarray]) -> list[Any]:
        """Writes arrays, replacing those before.

        Returns:
            The argument of `take`, to be sent through a pipe: the places of the arrays; arrays of objects (strings)
            are in it themselves.
        """
        places: list[Any] = []
        end = 0
        for array in arrays:
            if array.dtype.hasobject:
                places.append(array)
                continue
            places.append(ArrayLocation(array.dtype, array.shape, end))
            end += -(-array.nbytes // ALIGNMENT) * ALIGNMENT
        if end > len(self._memory):
            os.ftruncate(self._file.fileno(), end)
        for place, array in zip(places, arrays, strict=True):
            if isinstance(place, ArrayLocation):
                self._at(place)[...] = array
        return places

    def take(self, places: Sequence[Any]) -> list[np.ndarray]:
        """Returns copies of the arrays that were put there last, aligned so that TensorFlow does not copy again."""
        return [aligned(self._at(place), copy=True) if isinstance(place, ArrayLocation) else place for place in places]

    def _at(self, place: ArrayLocation) -> np.ndarray:
        if (size := os.fstat(self._file.fileno()).st_size) > len(self._memory):
            self._memory = mmap.mmap(self._file.fileno(), size)
        return np.ndarray(place.shape, place.dtype, self._memory, place.offset)


def _anonymous_file() -> BinaryIO:
    if hasattr(os, "memfd_create"):  # Linux
        return os.fdopen(os.memfd_create("accumtune"), "w+b")
    return tempfile.TemporaryFile()
