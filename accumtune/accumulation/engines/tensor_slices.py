"""Makes TensorFlow tensors: of batches, of their parts, and constants."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from keras import tree

from accumtune.accumulation.data.batches import MicroBatch, part_of


def has_static_batch(model: Any, iterator: Any) -> bool:
    """Returns whether a step knows the size of its batch, by which plain Keras then weights the logged losses."""
    if model.run_eagerly:
        return True
    spec = getattr(iterator, "element_spec", None)
    if spec is None:
        return True
    # The specification of an input that is None has no shape.
    shapes = [leaf.shape for leaf in tree.flatten(spec) if getattr(leaf, "shape", None) is not None]
    return bool(shapes) and shapes[0][:1].is_fully_defined()


def as_tensor(leaf: Any) -> Any:
    """Returns a leaf of a batch as a tensor; None stays None."""
    if leaf is None or isinstance(leaf, tf.experimental.Optional):
        return None
    return leaf if isinstance(leaf, (tf.Tensor, tf.RaggedTensor, tf.SparseTensor)) else tf.convert_to_tensor(leaf)


def cut(leaf: Any, part: slice) -> Any:
    """Returns a part of a tensor along its samples."""
    if isinstance(leaf, tf.SparseTensor):
        start = [part.start] + [0] * (len(leaf.shape) - 1)
        return tf.sparse.slice(leaf, start, [part.stop - part.start, *leaf.shape[1:]])
    if isinstance(leaf, tf.RaggedTensor):
        return leaf[part]
    with tf.device(leaf.device):  # otherwise slicing host memory would copy the whole window to the GPU
        return leaf[part]


def empty(column: list[MicroBatch]) -> MicroBatch:
    """Returns a micro-batch without samples, for replicas that have fewer than others in an epoch's last batch."""
    return MicroBatch(0, lambda: part_of(column[0].take(), slice(0, 0), cut))


def vector(values: Sequence[float]) -> Any:
    return _constant(tuple(values))


def scalar(value: float) -> Any:
    return _constant(float(value))


@functools.lru_cache(maxsize=4096)
def _constant(value: Any) -> Any:
    """Caches constants: windows are alike, and creating a tensor takes as long as a small layer."""
    with tf.init_scope():
        return tf.constant(value, tf.float64, shape=[len(value)] if isinstance(value, tuple) else [])
