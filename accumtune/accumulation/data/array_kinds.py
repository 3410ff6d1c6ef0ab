"""Slices and joins, by rows, all kinds of arrays that Keras trains on: dense, pandas, scipy.sparse, ragged, sparse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from accumtune.accumulation.data.row_indices import as_array


def is_scipy_sparse(leaf: Any) -> bool:
    """Returns whether a leaf is a matrix or an array of `scipy.sparse`."""
    return type(leaf).__module__.startswith("scipy.sparse")


def is_tf_ragged(leaf: Any) -> bool:
    """Returns whether a leaf is a `tf.RaggedTensor`."""
    return type(leaf).__name__ == "RaggedTensor" and type(leaf).__module__.startswith("tensorflow.")


def is_tf_sparse(leaf: Any) -> bool:
    """Returns whether a leaf is a `tf.SparseTensor`."""
    return type(leaf).__name__ == "SparseTensor" and type(leaf).__module__.startswith("tensorflow.")


def is_dense(leaf: Any) -> bool:
    """Returns whether all samples of a leaf take the same memory."""
    return not (is_scipy_sparse(leaf) or is_tf_ragged(leaf) or is_tf_sparse(leaf))


def as_rows(leaf: Any) -> Any:
    """Returns a dense leaf as a NumPy array, and others in a kind that can be sliced."""
    if is_scipy_sparse(leaf):
        return leaf.tocsr()
    return as_array(leaf) if is_dense(leaf) else leaf


def part(leaf: Any, rows: slice) -> Any:
    """Returns a range of rows, as the same kind of array."""
    if is_tf_sparse(leaf):
        import tensorflow as tf

        start, stop, _ = rows.indices(int(leaf.shape[0]))
        others = [0] * (len(leaf.shape) - 1)
        return tf.sparse.slice(leaf, [start, *others], [stop - start, *leaf.shape[1:]])
    if hasattr(leaf, "iloc"):  # a frame or a series; the arrays of pandas' own types are sliced as NumPy's
        return leaf.iloc[rows]
    return leaf.tocsr()[rows] if is_scipy_sparse(leaf) else leaf[rows]


def joined(leaves: Sequence[Any]) -> Any:
    """Concatenates the rows of several leaves of one kind."""
    if is_scipy_sparse(leaves[0]):
        import scipy.sparse

        return scipy.sparse.vstack(leaves, format="csr")
    if is_tf_ragged(leaves[0]) or is_tf_sparse(leaves[0]):
        import tensorflow as tf

        return tf.concat(leaves, axis=0) if is_tf_ragged(leaves[0]) else tf.sparse.concat(0, list(leaves))
    return np.concatenate(leaves)


def first_rows(leaf: Any, count: int) -> Any:
    """Returns the first rows, repeated if there are too few; dense ones as a NumPy array."""
    available = int(leaf.shape[0])
    # Slicing first, because a slice of a memory map reads only its own rows.
    head = as_rows(part(leaf, slice(0, min(count, available))))
    if count <= available:
        return head
    if isinstance(head, np.ndarray):
        return head[np.arange(count) % available]
    rest = part(head, slice(0, count % available))
    return joined([head] * (count // available) + ([rest] if count % available else []))


def described(leaf: Any) -> list[Any]:
    """Returns the shape of a sample, the dtype and the kind, as plain data."""
    if is_dense(leaf):
        array = as_array(leaf)
        return [list(array.shape[1:]), str(array.dtype)]
    shape = [None if size is None else int(size) for size in leaf.shape[1:]]
    kind = "ragged" if is_tf_ragged(leaf) else "sparse"
    return [shape, leaf.dtype.name, kind]


def bytes_per_row(leaf: Any) -> int:
    """Returns the mean size of a sample on a device, in bytes."""
    if is_scipy_sparse(leaf):
        total = leaf.nnz * (leaf.dtype.itemsize + 8 * leaf.ndim)  # indices are 64 bits wide in a SparseTensor
    elif is_tf_sparse(leaf):
        total = int(leaf.indices.shape[0]) * (leaf.dtype.size + 8 * int(leaf.indices.shape[1]))
    elif is_tf_ragged(leaf):
        splits = sum(int(row_splits.shape[0]) for row_splits in leaf.nested_row_splits)
        total = int(np.prod(leaf.flat_values.shape)) * leaf.dtype.size + 8 * splits
    else:
        total = as_array(leaf).nbytes
    return int(-(-total // max(1, int(leaf.shape[0]))))
