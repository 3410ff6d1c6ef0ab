"""Passes numbers of rows to `fit` instead of arrays, so that each micro-step takes only the rows that it needs.

Keras puts a whole batch on the device, two if it prefetches, and under TensorFlow the whole data set. With accumulation
a batch is a window, of which only one micro-batch is needed at a time. So Keras's own adapter shuffles and splits the
numbers 0, 1, 2, … instead of the data: the same operations on the same seeds, hence the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# A batch of row numbers is a dictionary with this one key.
_KEY = "accumtune_rows"
# EIGEN_MAX_ALIGN_BYTES.
ALIGNMENT = 64


class Rows:
    """The arrays of a `fit`: x, y and sample weights, packed as Keras passes them to a train step.

    Args:
        packed: `(x, y, sample_weight)` or less, each a structure of NumPy arrays (or memory maps) and None.
    """

    def __init__(self, packed: Any) -> None:
        from keras import tree

        self.form = len(packed) if isinstance(packed, (tuple, list)) else 0  # as a step unpacks it
        self._columns = tree.map_structure(lambda array: None if array is None else Column(array), packed)
        self.samples = next(column.samples for column in tree.flatten(self._columns) if column is not None)

    def adapter(self, batch_size: int | None, shuffle: bool | str) -> Any:
        """Returns Keras's adapter for these arrays, but for the numbers of their rows."""
        return _index_adapter(np.arange(self.samples), batch_size, shuffle)

    def take(self, indices: np.ndarray) -> tuple[Any, Any, Any]:
        """Returns rows as `(x, y, sample_weight)`, tensors of the backend."""
        import keras
        from keras import tree

        convert = _converter(keras.backend.backend())
        taken = tree.map_structure(
            lambda column: None if column is None else convert(column.take(indices)), self._columns
        )
        if keras.backend.backend() == "tensorflow":
            taken = tree.lists_to_tuples(taken)  # as tf.data would
        return keras.utils.unpack_x_y_sample_weight(taken)


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


def row_numbers(batch: Any) -> np.ndarray | None:
    """Returns the numbers of the rows if `batch` comes from an adapter of `Rows`, else None."""
    if isinstance(batch, (tuple, list)) and batch:
        batch = batch[0]
    return np.asarray(batch[_KEY]) if isinstance(batch, Mapping) and set(batch) == {_KEY} else None


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
        self.row_shape = tuple(self._array.shape[1:])
        self.dtype = np.dtype(object) if self._array.dtype.kind in "OSU" else self._array.dtype
        # All floats become floatx, as in Keras's array_slicing.convert_to_sliceable.
        if self.dtype.kind != "O" and keras.backend.is_float_dtype(str(self.dtype)):
            self.dtype = _numpy_dtype(keras.config.floatx())

    def take(self, indices: np.ndarray) -> np.ndarray:
        """Returns the rows of these numbers, shape `(len(indices), *row_shape)`."""
        first, last = int(indices[0]), int(indices[-1])
        if last - first + 1 == len(indices) and np.array_equal(indices, np.arange(first, last + 1)):
            rows = self._array[first : last + 1]  # one contiguous read of a memory map
        else:
            rows = self._array[indices]
        return np.ascontiguousarray(rows, dtype=self.dtype)


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
        # A tensor of a NumPy array borrows its memory, which no allocator counts; a batch must count, so it is copied.
        return lambda array: tf.raw_ops.DeepCopy(x=aligned(array))
    if backend == "torch":
        from keras import ops

        return ops.convert_to_tensor
    return lambda array: array  # JAX's functions take NumPy's arrays


def aligned(array: np.ndarray, copy: bool = False) -> np.ndarray:
    """Returns an array, or a copy, at a multiple of 64 bytes: TensorFlow borrows such memory instead of copying it."""
    if array.dtype.hasobject or (array.ctypes.data % ALIGNMENT == 0 and not copy):
        return array
    memory = np.empty(array.nbytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    aligned = memory[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    aligned[...] = array
    return aligned


def _batches_on_the_host(batches: Iterator[Any]) -> Iterator[Any]:
    import keras

    while True:
        with keras.device("cpu"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch


def _index_adapter(indices: np.ndarray, batch_size: int | None, shuffle: bool | str) -> Any:
    from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

    class IndexAdapter(ArrayDataAdapter):
        def get_tf_dataset(self) -> Any:
            import tensorflow as tf

            # Autotuning is useless here, and its thread delays the end of an epoch by up to a second.
            options = tf.data.Options()
            options.autotune.enabled = False
            return super().get_tf_dataset().with_options(options)

        def get_torch_dataloader(self) -> Any:
            # The host reads the numbers: on a GPU it would have to wait for all of the GPU's pending work.
            return _batches_on_the_host(iter(super().get_torch_dataloader()))

    return IndexAdapter({_KEY: indices}, batch_size=batch_size, shuffle=shuffle)
