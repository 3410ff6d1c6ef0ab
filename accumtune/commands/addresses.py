"""`MODULE:name` on a command line -> the object, and the shapes in which people's functions return data."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from accumtune.errors import DataError
from accumtune.trials.notes import without_notes


def load_object(address: str) -> Any:
    """What `MODULE:name` means; the working directory is searched for modules too.

    Raises:
        DataError: there is no such module or name.
    """
    module_name, _, name = address.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        with without_notes():
            value: Any = importlib.import_module(module_name)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError, ValueError) as error:
        raise DataError(
            f"Received {address!r}: {error}",
            "MODULE:NAME, a name in a module that can be imported from here.",
            "for a file train.py with a function build_model: train:build_model.",
        ) from error
    return value


def load_data(address: str) -> tuple[Any, Any]:
    """Training data, `(x, y)`; where it is a data set, the function itself and None: a data set cannot be sent.

    Raises:
        DataError: the function returned something else.
    """
    data = _loaded(address)
    if not isinstance(data, tuple):
        return load_object(address), None
    if len(data) == 4:
        return data[0], data[2]
    if len(data) != 2:
        raise DataError(
            f"Received {len(data)} values from {address}.",
            "(x, y), (x, x_val, y, y_val), ((x, y), (x_test, y_test)), or a data set.",
            "return (x, y).",
        )
    return data[0] if is_keras_dataset(data) else data


def load_validation_data(address: str) -> tuple[Any, Any] | None:
    """The other half of what the function returned, None where it returned training data alone."""
    data = _loaded(address)
    if not isinstance(data, tuple):
        return None
    if is_keras_dataset(data):
        return tuple(data[1])
    return (data[1], data[3]) if len(data) == 4 else None


def is_keras_dataset(data: Any) -> bool:
    """Whether data are `((x, y), (x_test, y_test))`, as `keras.datasets` has them.

    A model with two inputs and two outputs has a pair of pairs too, but all four are then equally long.
    """
    pairs = (tuple, list)
    if not (isinstance(data, pairs) and len(data) == 2 and all(isinstance(it, pairs) and len(it) == 2 for it in data)):
        return False
    try:
        (x, y), (x_test, y_test) = ((len(a), len(b)) for a, b in data)
    except TypeError:  # numbers, tensors without a length: rows, no arrays
        return False
    return x == y != x_test == y_test


def _loaded(address: str) -> Any:
    data = load_object(address)()
    # scikit-learn's train_test_split returns (x, x_val, y, y_val) as a list.
    return tuple(data) if isinstance(data, list) and len(data) == 4 else data
