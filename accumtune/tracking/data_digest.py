"""Computes digests of data sets: equal data have equal digests, on any machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Larger arrays are sampled in evenly spaced pieces, so that a digest takes less time than a trial.
_WHOLE_BYTES = 2**26
_PIECES = 1024
_WHOLE_OBJECTS = 2**20
# The attributes that hold the content of SciPy's sparse arrays in rows, and of TensorFlow's ragged and sparse tensors.
_ROWS = ("data", "indices", "indptr")
_PARTS = (("flat_values", "nested_row_splits"), ("indices", "values", "dense_shape"))


class _Unknown(Exception):
    """A value whose content has no digest."""


def data_digest(*trees: Any) -> str | None:
    """Returns the digest of arrays (also dicts and tuples of them): 16 hexadecimal digits.

    It depends on shapes, types and values, also on those of objects in an array. Arrays above 64 MiB are sampled in
    1024 evenly spaced pieces of 64 KiB, arrays above a million objects at a million of them. None if there is no array,
    or an array holds an object of unknown content, such as a function.
    """
    digest = hashlib.sha256()
    try:
        arrays = sum(_add(digest, tree) for tree in trees)
    except _Unknown:
        return None
    return digest.hexdigest()[:16] if arrays else None


def _add(digest: Any, tree: Any) -> int:
    if tree is None:
        digest.update(b"-")
        return 0
    if isinstance(tree, Mapping):
        digest.update(b"{%d" % len(tree))
        count = 0
        for key in sorted(tree, key=str):
            digest.update(str(key).encode() + b":")
            count += _add(digest, tree[key])
        return count
    if isinstance(tree, (tuple, list)):
        digest.update(b"(%d" % len(tree))
        return sum(_add(digest, item) for item in tree)
    if hasattr(tree, "columns") and hasattr(tree, "dtypes"):  # a pandas frame
        return _add(digest, {str(name): tree[name] for name in tree.columns})
    if not hasattr(tree, "shape") or not hasattr(tree, "dtype") or hasattr(tree, "element_spec"):
        return 0
    if hasattr(tree, "tocsr"):  # SciPy's sparse arrays, of which NumPy makes one object
        rows = tree.tocsr().copy()
        rows.sum_duplicates()
        digest.update(f"sparse{rows.shape}".encode())
        return sum(_add(digest, getattr(rows, name)) for name in _ROWS)
    for names in _PARTS:
        if all(hasattr(tree, name) for name in names):
            return sum(_add(digest, getattr(tree, name)) for name in names)
    if isinstance(tree, np.ma.MaskedArray):
        digest.update(b"masked")
        _add_array(digest, np.ma.getmaskarray(tree))
        tree = tree.filled(0) if tree.dtype.kind in "biufc" else tree.data
    _add_array(digest, np.asarray(tree))
    return 1


def _add_array(digest: Any, array: Any) -> None:
    digest.update(f"{array.shape}{array.dtype.str}".encode())
    if array.dtype.hasobject or array.dtype.kind == "T":  # their memory holds addresses
        flat = array.reshape(-1)
        for index in np.unique(np.linspace(0, max(0, len(flat) - 1), min(len(flat), _WHOLE_OBJECTS)).astype(int)):
            _add_object(digest, flat[index])
    elif array.nbytes <= _WHOLE_BYTES:
        digest.update(array.tobytes())
    else:
        rows = array.reshape(len(array), -1) if array.ndim > 1 else array[:, None]
        each = max(1, _WHOLE_BYTES // _PIECES // max(1, rows[:1].nbytes))
        for start in np.linspace(0, len(rows) - each, _PIECES).astype(int):
            digest.update(rows[start : start + each].tobytes())


def _add_object(digest: Any, value: Any) -> None:
    """Adds an element of an array of objects.

    Raises:
        _Unknown: the element is neither a plain value nor made of plain values.
    """
    if value is None or isinstance(value, (str, bytes, bool, int, float, complex)):
        text = repr(value)
        digest.update(f"{type(value).__name__}{len(text)}:{text}".encode(errors="surrogatepass"))
    elif isinstance(value, (Mapping, tuple, list)):
        items = sorted(value.items(), key=lambda item: str(item[0])) if isinstance(value, Mapping) else value
        digest.update(f"{'mapping' if isinstance(value, Mapping) else 'sequence'}{len(value)}:".encode())
        for item in items:
            _add_object(digest, item)
    elif isinstance(value, np.void):  # a row of a structured array
        _add_object(digest, value.item())
    elif isinstance(value, (np.ndarray, np.generic)):
        _add_array(digest, np.asarray(value))
    else:
        raise _Unknown


def file_digest(path: Path) -> str:
    """Returns the SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
