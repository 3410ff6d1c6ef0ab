"""Describes the data of a training in short texts, which are equal for equal data, in any process and on any day."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

_CHUNK_BYTES = 2**24


def content_digest(tree: Any, *, is_ordered: bool) -> str:
    """Returns a digest of the shapes, types and values of arrays.

    Args:
        tree: an array, or dicts and tuples of them. The first axis counts samples.
        is_ordered: whether the digest depends on the order of the samples; if not, it ignores a shuffle.
    """
    leaves = [np.asarray(leaf) for leaf in _leaves(tree)]
    rows = {len(leaf) if leaf.ndim else -1 for leaf in leaves}
    shapes = repr([(leaf.shape, leaf.dtype.str) for leaf in leaves])
    if not rows or len(rows) > 1 or rows == {-1}:
        texts = (leaf.tobytes().hex() if leaf.dtype != object else _text_of(leaf.tolist()) for leaf in leaves)
        return hashlib.sha256("".join([shapes, *texts]).encode()).hexdigest()[:16]
    total = np.zeros(rows.pop(), np.uint64)
    for leaf in leaves:
        total = _mixed(total * np.uint64(0x9E3779B97F4A7C15) + _row_hashes(leaf))
    if is_ordered:
        total = _mixed(total + np.arange(len(total), dtype=np.uint64))
    sums = f"{int(total.sum(dtype=np.uint64))}{int(_mixed(total).sum(dtype=np.uint64))}"
    return hashlib.sha256((shapes + sums).encode()).hexdigest()[:16]


def _row_hashes(array: np.ndarray) -> np.ndarray:
    if array.dtype.hasobject:
        digests = (hashlib.blake2b(_text_of(row).encode(), digest_size=8).digest() for row in array.tolist())
        return np.array([int.from_bytes(digest, "little") for digest in digests], np.uint64)
    hashes = np.zeros(len(array), np.uint64)
    row_bytes = array[:1].nbytes
    if not row_bytes:
        return hashes
    words = -(-row_bytes // 8)
    weights = np.random.Generator(np.random.PCG64(0)).integers(0, 2**63, words, np.uint64) * np.uint64(2) + np.uint64(1)
    step = max(1, _CHUNK_BYTES // row_bytes)
    for start in range(0, len(array), step):
        part = np.ascontiguousarray(array[start : start + step])
        padded = np.zeros((len(part), words * 8), np.uint8)
        padded[:, :row_bytes] = part.reshape(len(part), -1).view(np.uint8).reshape(len(part), row_bytes)
        hashes[start : start + step] = (_mixed(padded.view(np.uint64)) * weights).sum(axis=1, dtype=np.uint64)
    return hashes


def _text_of(value: Any) -> str:
    """Returns the text of an element of an array of objects: all of its content, and no memory addresses."""
    if isinstance(value, np.ndarray):
        return content_digest(value, is_ordered=True)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text_of, value))}]"
    text = repr(value)
    return type(value).__qualname__ if " at 0x" in text else text


def _mixed(values: np.ndarray) -> np.ndarray:
    """Mixes bits, with the finalizer of splitmix64: sums of unmixed products would not change with a swap."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


def describe_arrays(tree: Any, *, is_ordered: bool) -> dict[str, str]:
    """Returns shapes, types and content of arrays; for other data, their type and length."""
    leaves = [part for leaf in _leaves(tree) for part in _parts(leaf)]
    if leaves and all(_is_array(leaf) for leaf in leaves):
        shapes = ", ".join(f"{tuple(np.shape(leaf))} {leaf.dtype}" for leaf in leaves)
        return {"shapes": shapes, "content": content_digest(leaves, is_ordered=is_ordered)}
    return {"shapes": ", ".join(map(_kind_of, leaves))}


def describe_pipeline(pipeline: Any) -> dict[str, str]:
    """Returns a pipeline's length and shapes, and the content of its first batch."""
    with contextlib.suppress(Exception):  # ragged batches, or whatever the user's pipeline raises
        first = next(iter(pipeline)) if hasattr(pipeline, "element_spec") else pipeline[0]
        return {"shapes": _kind_of(pipeline), "content": content_digest(first, is_ordered=True)}
    return {"shapes": _kind_of(pipeline)}


def _parts(leaf: Any) -> tuple[Any, ...]:
    """Returns the arrays that a table, a sparse matrix or a ragged tensor consists of."""
    if hasattr(leaf, "tocsr"):
        rows = leaf.tocsr()
        return np.array(rows.shape), rows.data, rows.indices, rows.indptr
    if hasattr(leaf, "nested_row_splits"):
        return leaf.flat_values, *leaf.nested_row_splits
    return (leaf.to_numpy(),) if hasattr(leaf, "to_numpy") else (leaf,)


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, np.ndarray) or (hasattr(leaf, "__array__") and hasattr(leaf, "dtype"))


def _kind_of(leaf: Any) -> str:
    """Returns the type, length and shapes of data that are not arrays."""
    kind = type(leaf).__name__
    if hasattr(leaf, "element_spec"):
        count = leaf.cardinality() if hasattr(leaf, "cardinality") else None
        return f"{kind} of {'' if count is None else int(count)} {leaf.element_spec}"
    for name in ("num_batches", "shape"):
        with contextlib.suppress(Exception):  # whatever the user's class raises
            return f"{kind} of {getattr(leaf, name)}"
    return kind


def _leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, Mapping):
        for key in sorted(tree, key=str):
            yield from _leaves(tree[key])
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            yield from _leaves(item)
    elif tree is not None:
        yield tree
