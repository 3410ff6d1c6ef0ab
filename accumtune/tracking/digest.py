"""A name for the content of a data set: equal data have equal digests, on any machine."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

# More than this is read in evenly spaced pieces: a digest must not take longer than the first trial.
_WHOLE_BYTES = 2**26
_PIECES = 1024


def data_digest(*trees: Any) -> str | None:
    """The digest of arrays (also dicts and tuples of them): 16 hexadecimal digits.

    Shapes, types and values count. Of an array above 64 MiB, 1024 evenly spaced pieces of 64 KiB stand for the
    values. None where there is no array: the content of a function or a pipeline is only known by running it.
    """
    digest = hashlib.sha256()
    arrays = 0
    for tree in trees:
        arrays += _add(digest, tree)
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
    if not hasattr(tree, "shape") or not hasattr(tree, "dtype") or hasattr(tree, "element_spec"):
        return 0
    array = np.asarray(tree)
    digest.update(f"{array.shape}{array.dtype.str}".encode())
    if array.dtype == object:
        digest.update(repr(array.tolist()).encode())
    elif array.nbytes <= _WHOLE_BYTES:
        digest.update(array.tobytes())
    else:
        rows = array.reshape(len(array), -1) if array.ndim > 1 else array[:, None]
        each = max(1, _WHOLE_BYTES // _PIECES // max(1, rows[:1].nbytes))
        for start in np.linspace(0, len(rows) - each, _PIECES).astype(int):
            digest.update(rows[start : start + each].tobytes())
    return 1


def file_digest(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
