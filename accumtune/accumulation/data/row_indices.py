"""Passes numbers of rows to `fit` instead of arrays, so that each micro-step takes only the rows that it needs.

Keras puts a whole batch on the device, two if it prefetches, and under TensorFlow the whole data set. With accumulation
a batch is a window, of which only one micro-batch is needed at a time. So Keras's own adapter shuffles and splits the
numbers 0, 1, 2, … instead of the data: the same operations on the same seeds, hence the same order.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from accumtune.accumulation.data.gather_ahead import GatherAhead

# A batch of row numbers is a dictionary of its own and those of the batch after it, none if that is unknown.
_KEY, _FOLLOWING = "accumtune_rows", "accumtune_following_rows"
# EIGEN_MAX_ALIGN_BYTES.
ALIGNMENT = 64
# Handing rows over to another thread and back takes 0.02 to 0.1 ms, about as long as gathering so many bytes.
LEAST_BYTES_AHEAD = 2**19
_NONE = np.zeros(0, np.int64)
# Whether rows may wait on the host; memory/device_torch.py forbids it where the host's memory is the device's.
may_gather_ahead = True


class Rows:
    """The arrays of a `fit`: x, y and sample weights, packed as Keras passes them to a train step.

    Args:
        packed: `(x, y, sample_weight)` or less, each a structure of NumPy arrays (or memory maps) and None.
    """

    def __init__(self, packed: Any) -> None:
        import keras
        from keras import tree

        self.form = len(packed) if isinstance(packed, (tuple, list)) else 0  # as a step unpacks it
        self._structure = packed = tree.map_structure(lambda array: None if array is None else Column(array), packed)
        self._columns = [column for column in tree.flatten(packed) if column is not None]
        self.samples = self._columns[0].samples
        self._bytes_per_row = sum(column.bytes_per_row for column in self._columns)
        self._ahead = GatherAhead(self._gathered)
        self._is_tensorflow = keras.backend.backend() == "tensorflow"
        self._convert = _converter(keras.backend.backend())

    def adapter(self, batch_size: int | None, shuffle: bool | str) -> Any:
        """Returns Keras's adapter for these arrays, but for the numbers of their rows."""
        return _index_adapter(np.arange(self.samples), batch_size, shuffle)

    def take(self, indices: np.ndarray, following: np.ndarray = _NONE) -> tuple[Any, Any, Any]:
        """Returns rows as `(x, y, sample_weight)`, tensors of the backend.

        Args:
            indices: the numbers of the rows.
            following: those that are probably taken next: they are gathered on the host meanwhile.
        """
        import keras
        from keras import tree

        is_worth_it = may_gather_ahead and len(following) * self._bytes_per_row >= LEAST_BYTES_AHEAD
        arrays = self._ahead.take(indices, following if is_worth_it else _NONE)
        # By column, because a structure is not mapped in the order in which it is flattened (torch, dictionaries).
        of_column = dict(zip(self._columns, arrays, strict=True))
        taken = tree.map_structure(
            lambda column: None if column is None else self._convert(of_column[column]), self._structure
        )
        if self._is_tensorflow:
            taken = tree.lists_to_tuples(taken)  # as tf.data would
        return keras.utils.unpack_x_y_sample_weight(taken)

    def close(self) -> None:
        """Ends the thread that gathers rows."""
        self._ahead.close()

    def _gathered(self, indices: np.ndarray) -> list[np.ndarray]:
        return [
            column.read(indices) if self._is_tensorflow or column.is_mapped else column.take(indices)
            for column in self._columns
        ]


def rows_of(x: Any, y: Any = None, sample_weight: Any = None, class_weight: Any = None) -> Rows | None:
    """Returns the data of `fit` as rows, or None if they are not NumPy arrays of numbers; checks them like Keras."""
    from keras import tree
    from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

    leaves = [leaf for leaf in tree.flatten((x, y, sample_weight)) if leaf is not None]
    if not leaves or not all(_has_plain_rows(leaf) for leaf in leaves):
        return None
    # It checks the arguments, and turns class weights into sample weights.
    rows = Rows(ArrayDataAdapter(x, y, sample_weight, class_weight=class_weight)._inputs)
    return rows if rows.samples else None


def _has_plain_rows(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) and leaf.ndim > 0 and leaf.dtype.kind in "biufc"


def row_numbers(batch: Any) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the numbers of a batch's rows and of the next batch's, if it comes from an adapter of `Rows`, else None.

    Those of the next batch are empty if it is unknown.
    """
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    if not isinstance(batch, Mapping) or _KEY not in batch:
        return None
    return np.asarray(batch[_KEY]), np.asarray(batch.get(_FOLLOWING, _NONE))


class Column:
    """An array whose rows are taken in the dtype in which Keras would feed them.

    Args:
        array: any array that Keras takes; of a memory map, only the taken rows are read.
    """

    def __init__(self, array: Any) -> None:
        import keras

        self._array = as_array(array)
        if type(array).__name__ == "Series" and self._array.ndim == 1:  # pandas: Keras makes a column of it
            self._array = self._array[:, None]
        self.samples = int(self._array.shape[0])
        self.is_mapped = isinstance(self._array, np.memmap)
        self.row_shape = tuple(self._array.shape[1:])
        self.dtype = np.dtype(object) if self._array.dtype.kind in "OSU" else self._array.dtype
        # All floats become floatx, as in Keras's array_slicing.convert_to_sliceable.
        if self.dtype.kind != "O" and keras.backend.is_float_dtype(str(self.dtype)):
            self.dtype = _numpy_dtype(keras.config.floatx())
        self.bytes_per_row = math.prod(self.row_shape) * self.dtype.itemsize

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Returns the rows of these numbers, shape `(len(indices), *row_shape)`."""
        return np.ascontiguousarray(self._array[_slice_or(indices)], dtype=self.dtype)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """As `take`, in memory of its own, at a multiple of 64 bytes; reads a memory map."""
        rows = _aligned_memory((len(indices), *self.row_shape), self.dtype)
        chosen = _slice_or(indices)
        is_plain = type(self._array) in (np.ndarray, np.memmap) and self._array.dtype == self.dtype
        if is_plain and not isinstance(chosen, slice):
            self._array.take(indices, axis=0, out=rows, mode="clip")  # "raise" would make a copy more
        else:
            rows[...] = self._array[chosen]
        return rows


def _slice_or(indices: np.ndarray) -> Any:
    """Returns a slice if the numbers are consecutive: one contiguous read of a memory map."""
    first, last = int(indices[0]), int(indices[-1])
    is_range = last - first + 1 == len(indices) and np.array_equal(indices, np.arange(first, last + 1))
    return slice(first, last + 1) if is_range else indices


def as_array(leaf: Any) -> np.ndarray:
    """Returns a NumPy array; of numbers for a pandas frame, even if its columns have different or nullable dtypes."""
    import keras

    if isinstance(leaf, np.ndarray):
        return leaf
    array = np.asarray(leaf)
    if array.dtype.kind != "O" or type(leaf).__module__.split(".")[0] != "pandas":
        return array
    try:
        return np.asarray(leaf.to_numpy(dtype=keras.config.floatx(), na_value=np.nan))
    except (TypeError, ValueError):  # texts
        return array


def _numpy_dtype(name: str) -> np.dtype:
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)


def _converter(backend: str) -> Any:
    if backend == "tensorflow":
        import tensorflow as tf

        if tf.config.list_physical_devices("GPU"):
            return tf.convert_to_tensor
        # An operation borrows the memory of an array at such an address, which no allocator counts. Where a device's
        # allocator is used on a CPU, it must count a batch.
        is_counted = os.environ.get("TF_CPU_ALLOCATOR_USE_BFC") == "true"
        return lambda rows: tf.raw_ops.DeepCopy(x=rows) if is_counted else tf.raw_ops.Identity(input=rows)
    if backend == "torch":
        from keras import ops

        return ops.convert_to_tensor
    return lambda array: array  # JAX's functions take NumPy's arrays


def aligned(array: np.ndarray, copy: bool = False) -> np.ndarray:
    """Returns an array, or a copy, at a multiple of 64 bytes: TensorFlow borrows such memory instead of copying it."""
    if array.dtype.hasobject or (array.ctypes.data % ALIGNMENT == 0 and not copy):
        return array
    result = _aligned_memory(array.shape, array.dtype)
    result[...] = array
    return result


def _aligned_memory(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def _batches_on_the_host(batches: Iterator[Any]) -> Iterator[Any]:
    import keras

    while True:
        with keras.device("cpu"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _with_following(batches: Iterator[Any]) -> Iterator[Any]:
    """Adds the numbers of the next batch's rows to each batch."""
    batch = next(batches, None)
    while batch is not None:
        following = next(batches, None)
        yield batch if following is None else {**batch, _FOLLOWING: following[_KEY]}
        batch = following


def _with_following_in_dataset(dataset: Any) -> Any:
    """As `_with_following`, for a `tf.data.Dataset`; after its last batch come no rows."""
    import tensorflow as tf

    shape = dataset.element_spec[_KEY].shape
    end = tf.zeros([0], dataset.element_spec[_KEY].dtype)

    def paired(before: Any, batch: Any) -> Any:
        return batch[_KEY], {_KEY: before, _FOLLOWING: batch[_KEY]}

    def shaped(pair: Any) -> Any:
        return {**pair, _KEY: tf.ensure_shape(pair[_KEY], shape)}

    dataset = dataset.concatenate(tf.data.Dataset.from_tensors({_KEY: end}))
    return dataset.scan(end, paired).skip(1).map(shaped)


def _index_adapter(indices: np.ndarray, batch_size: int | None, shuffle: bool | str) -> Any:
    from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

    # Each batch is shuffled when it is read, by NumPy's or torch's generator, from which others draw meanwhile.
    look_ahead = iter if shuffle == "batch" else _with_following

    class IndexAdapter(ArrayDataAdapter):
        def get_tf_dataset(self) -> Any:
            import tensorflow as tf

            # Autotuning is useless here, and its thread delays the end of an epoch by up to a second.
            options = tf.data.Options()
            options.autotune.enabled = False
            return _with_following_in_dataset(super().get_tf_dataset()).with_options(options)

        def get_jax_iterator(self) -> Any:
            return look_ahead(iter(super().get_jax_iterator()))

        def get_torch_dataloader(self) -> Any:
            # The host reads the numbers: on a GPU it would have to wait for all of the GPU's pending work.
            return look_ahead(_batches_on_the_host(iter(super().get_torch_dataloader())))

    return IndexAdapter({_KEY: indices}, batch_size=batch_size, shuffle=shuffle)
