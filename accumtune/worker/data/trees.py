"""Maps, joins and counts trees of arrays: an array, dicts, lists and tuples of them, or None."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from accumtune.accumulation.data.array_kinds import joined
from accumtune.errors import DataError


def join_trees(trees: list[Any]) -> Any:
    """Concatenates the arrays of trees along the first axis.

    Raises:
        DataError: their samples have different shapes.
    """
    first = trees[0]
    if first is None:
        return None
    if isinstance(first, Mapping):
        return {key: join_trees([tree[key] for tree in trees]) for key in first}
    if isinstance(first, (tuple, list)):
        return _like(first, [join_trees([tree[index] for tree in trees]) for index in range(len(first))])
    shapes = sorted({tuple(array.shape[1:]) for array in trees}) if isinstance(first, np.ndarray) else []
    if len(shapes) > 1:
        raise DataError(
            f"Received batches whose samples have different shapes: {shapes[0]} in one, {shapes[-1]} in another.",
            "samples of one shape, because a search makes batches of other sizes from them.",
            "pad them to one length: padded_batch(32, padded_shapes=...), keras.utils.pad_sequences(..., maxlen=...).",
        )
    return joined(trees)


def map_tree(function: Callable[[Any], Any], tree: Any) -> Any:
    """Returns the tree with the function applied to each array; None stays None."""
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {key: map_tree(function, value) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        return _like(tree, [map_tree(function, value) for value in tree])
    return function(tree)


def leaves(tree: Any) -> list[Any]:
    """Returns the arrays of a tree, in order."""
    found: list[Any] = []
    map_tree(found.append, tree)
    return found


def number_of_rows(tree: Any) -> int:
    """Returns the number of samples that all arrays have.

    Raises:
        DataError: they differ in it, have none, or are not arrays.
    """
    rows = set()
    for leaf in leaves(tree):
        shape = getattr(leaf, "shape", None)
        if not shape:
            raise DataError(
                f"Received data of type {type(leaf).__module__}.{type(leaf).__qualname__}.",
                "arrays (also dicts and tuples of arrays), a keras.utils.PyDataset, or a function without arguments "
                "that returns these or a tf.data.Dataset.",
                "convert it with np.asarray, or pass a function that makes it."
                if not hasattr(leaf, "__next__")
                else "make a tf.data.Dataset.from_generator(...), or a keras.utils.PyDataset, of it.",
            )
        rows.add(int(shape[0]))
    if len(rows) != 1 or 0 in rows:
        raise DataError(
            f"Received arrays with {sorted(rows) or 'no'} samples.",
            "arrays with the same number of samples, at least 1.",
            "look at the shapes of x, y and sample_weight: the first axis counts the samples.",
        )
    return rows.pop()


def _like(sequence: Any, items: list[Any]) -> Any:
    """Returns the items as the same kind of list, tuple or named tuple."""
    return type(sequence)(*items) if hasattr(sequence, "_fields") else type(sequence)(items)
