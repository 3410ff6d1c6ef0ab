"""Feeds arrays and memory maps to `fit` and `evaluate` batch by batch.

Keras puts arrays into one big TensorFlow tensor. With a memory budget on the allocator that tensor would count, and a
data set larger than the budget could not be trained on. Here only batches are in the allocator. They come in the order
of Keras's own array adapter, so that training is the same, bit for bit. Under JAX and torch, Keras itself slices NumPy
arrays lazily.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from accumtune.accumulation.data.array_kinds import is_scipy_sparse, is_tf_ragged, is_tf_sparse
from accumtune.accumulation.data.row_indices import Column, aligned
from accumtune.errors import DataError


def batch_source(
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int,
    shuffle: bool | str = False,
    class_weight: dict[int, float] | None = None,
) -> Any:
    """Returns data for `fit(x=...)` and `evaluate(x=...)` that yield arrays batch by batch, not all on the device.

    Args:
        x: inputs: an array, `np.memmap`, or dicts, tuples and lists of them.
        y: targets, likewise, or `None`.
        sample_weight: one weight per sample, or one array per output, or `None`.
        batch_size: samples per batch; the last one may be smaller.
        shuffle: as in `fit`: `True`, `False` or `"batch"`.
        class_weight: as in `fit`.

    Returns:
        A `tf.data.Dataset` under TensorFlow; Keras's own adapter under JAX and torch, and for ragged or sparse tensors,
        which are on the device already. Pass it to `fit(x=..., shuffle=False)`: it shuffles and has the class weights.

    Raises:
        DataError: the arrays do not have the same number of samples, or cannot be sliced.
    """
    import keras
    from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

    _check(x, y, sample_weight, batch_size)
    leaves = [leaf for leaf in keras.tree.flatten((x, y, sample_weight)) if leaf is not None]
    is_on_device = any(is_tf_ragged(leaf) or is_tf_sparse(leaf) for leaf in leaves)
    if keras.backend.backend() != "tensorflow" or is_on_device:
        return ArrayDataAdapter(x, y, sample_weight, batch_size=batch_size, shuffle=shuffle, class_weight=class_weight)
    # The adapter checks the arguments like fit, and turns class weights into sample weights.
    packed = ArrayDataAdapter(x, y, sample_weight, batch_size=batch_size, class_weight=class_weight)._inputs
    return _tensorflow_batches(packed, batch_size, shuffle)


def training_arguments(
    model: Any,
    x: Any,
    y: Any = None,
    sample_weight: Any = None,
    *,
    batch_size: int,
    shuffle: bool | str = False,
    class_weight: dict[int, float] | None = None,
) -> dict[str, Any]:
    """Returns arguments of `model.fit` that train with these arrays and need the least memory.

    An accumulating model takes the rows of each micro-batch from the arrays. Other models, and arrays that are not
    NumPy arrays of numbers, use the whole batches of a `batch_source`. A class with its own `fit` gets the arrays.
    """
    from accumtune.accumulation import accumulation_of
    from accumtune.accumulation.data.batches import has_stock_fit, prepares_its_data
    from accumtune.accumulation.data.row_indices import rows_of

    _check(x, y, sample_weight, batch_size)
    if prepares_its_data(model):
        given = {"x": x, "y": y, "sample_weight": sample_weight, "class_weight": class_weight}
        return {name: value for name, value in given.items() if value is not None} | {"batch_size": batch_size}
    if accumulation_of(model) is None or not has_stock_fit(model) or rows_of(x, y, sample_weight, class_weight) is None:
        source = batch_source(x, y, sample_weight, batch_size=batch_size, shuffle=shuffle, class_weight=class_weight)
        return {"x": source, "shuffle": False}  # the source shuffles, and has the weights
    arrays = {"x": x, "y": y, "sample_weight": sample_weight}
    return {**arrays, "batch_size": batch_size, "shuffle": shuffle, "class_weight": class_weight}


def validation_source(model: Any, x: Any, y: Any = None, sample_weight: Any = None, *, batch_size: int) -> Any:
    """Returns `validation_data` for `fit`: a `batch_source`, or the arrays for a class that prepares its data."""
    from accumtune.accumulation.data.batches import prepares_its_data

    if not prepares_its_data(model):
        return batch_source(x, y, sample_weight, batch_size=batch_size)
    return (x, y) if sample_weight is None else (x, y, sample_weight)


def takes_batch_source(model: Any) -> bool:
    """Returns whether the model's `fit` takes a `batch_source`: its own `fit` may not know Keras's adapters."""
    import keras

    from accumtune.accumulation.data.batches import prepares_its_data

    return keras.backend.backend() == "tensorflow" or not prepares_its_data(model)


def _check(x: Any, y: Any, sample_weight: Any, batch_size: int) -> None:
    import keras

    arrays = [array for array in keras.tree.flatten((x, y, sample_weight)) if array is not None]
    for array in arrays:
        if not hasattr(array, "shape") or len(array.shape) < 1:
            raise DataError(
                f"Received {type(array).__name__} among the arrays of x, y and sample_weight.",
                "arrays with samples along their first axis",
                "convert it with numpy.asarray.",
            )
    sizes = sorted({int(array.shape[0]) for array in arrays})
    if len(sizes) != 1 or sizes[0] < 1:
        raise DataError(
            f"Received arrays with {' and '.join(map(str, sizes)) or 'no'} samples.",
            "the same number of samples, at least 1, in every array of x, y and sample_weight",
            "check the shapes of the arrays.",
        )
    if batch_size < 1:
        raise DataError(f"Received {batch_size=}.", "at least 1", "raise batch_size.")


def _tensorflow_batches(packed: Any, batch_size: int, shuffle: bool | str) -> Any:
    import keras
    import tensorflow as tf
    from keras.src.trainers.data_adapters.array_data_adapter import ArrayDataAdapter

    leaves = [
        _SparseColumn(array) if is_scipy_sparse(array) else _DenseColumn(array)
        for array in keras.tree.flatten(packed)
        if array is not None
    ]
    samples = leaves[0].samples
    # Keras's own adapter shuffles indices instead of the data: the same operations with the same seeds.
    indices = ArrayDataAdapter(np.arange(samples), batch_size=batch_size, shuffle=shuffle).get_tf_dataset()

    def gather(rows: Any) -> Any:
        full = rows.shape[0]  # None where the last batch is smaller
        specs = [spec for leaf in leaves for spec in leaf.specs(full)]
        tensors = iter(counted_tensors(lambda i: [array for leaf in leaves for array in leaf.arrays(i)], rows, specs))
        remaining = iter(leaf.tensor(tensors) for leaf in leaves)
        structure = keras.tree.map_structure(lambda array: None if array is None else next(remaining), packed)
        return keras.tree.lists_to_tuples(structure)

    as_it_is = tf.autograph.experimental.do_not_convert(gather)  # autograph would take a tenth of a second
    dataset = one_at_a_time(indices.map(as_it_is, num_parallel_calls=None))
    if shuffle:
        options = tf.data.Options()
        options.experimental_external_state_policy = tf.data.experimental.ExternalStatePolicy.IGNORE
        dataset = dataset.with_options(options)
    return dataset.apply(tf.data.experimental.assert_cardinality(-(-samples // batch_size)))


class _DenseColumn(Column):
    """An array whose rows are one tensor."""

    def specs(self, rows: int | None) -> list[Any]:
        import tensorflow as tf

        return [tf.TensorSpec((rows, *self.row_shape), _tensor_type(self.dtype))]

    def arrays(self, indices: np.ndarray) -> list[np.ndarray]:
        return [self.take(indices)]

    def tensor(self, tensors: Iterator[Any]) -> Any:
        return next(tensors)


class _SparseColumn:
    """A matrix of scipy.sparse, whose rows become a `tf.SparseTensor`: indices, values and shape."""

    def __init__(self, matrix: Any) -> None:
        self._matrix = matrix.tocsr()
        self.samples = int(matrix.shape[0])
        empty = np.zeros((0, matrix.shape[1]), matrix.dtype)
        self.dtype = Column(empty).dtype

    def specs(self, rows: int | None) -> list[Any]:
        import tensorflow as tf

        value = tf.TensorSpec((None,), _tensor_type(self.dtype))
        return [tf.TensorSpec((None, 2), tf.int64), value, tf.TensorSpec((2,), tf.int64)]

    def arrays(self, indices: np.ndarray) -> list[np.ndarray]:
        rows = self._matrix[indices]
        rows.sort_indices()  # in TensorFlow's order: by rows, then by columns
        rows = rows.tocoo()
        places = np.stack([rows.row, rows.col], axis=1).astype(np.int64)
        return [places, rows.data.astype(self.dtype), np.array(rows.shape, np.int64)]

    def tensor(self, tensors: Iterator[Any]) -> Any:
        import tensorflow as tf

        places, values, shape = next(tensors), next(tensors), next(tensors)
        columns = self._matrix.shape[1]
        return tf.sparse.reshape(tf.SparseTensor(places, values, shape), tf.stack([shape[0], columns]))


def counted_tensors(
    function: Callable[[np.ndarray], list[np.ndarray]], argument: Any, specs: Sequence[Any]
) -> list[Any]:
    """Calls a function in a TensorFlow graph, and returns its arrays as tensors that the device's allocator counts.

    Args:
        function: from the value of `argument` to one array for each of `specs`.
        argument: a tensor.
        specs: a `tf.TensorSpec` for each array.
    """
    import tensorflow as tf

    # One numpy_function for all arrays. It uses NumPy's own buffer if that is aligned, which no allocator counts;
    # a batch must count, so it is copied.
    types = [spec.dtype for spec in specs]
    tensors = tf.numpy_function(lambda value: [aligned(array) for array in function(value)], [argument], types)
    for tensor, spec in zip(tensors, specs, strict=True):
        tensor.set_shape(spec.shape)
    return [tensor if tensor.dtype == tf.string else tf.raw_ops.DeepCopy(x=tensor) for tensor in tensors]


def one_at_a_time(dataset: Any) -> Any:
    """Makes a `tf.data.Dataset` produce a batch only on request: one in advance would be a whole window of memory."""
    import tensorflow as tf

    options = tf.data.Options()
    options.experimental_optimization.apply_default_optimizations = False
    options.autotune.enabled = False
    return dataset.with_options(options)


def _tensor_type(dtype: np.dtype) -> Any:
    import tensorflow as tf

    return tf.string if dtype.kind == "O" else tf.as_dtype(dtype)
