"""Imports what `MODULE:name` on the command line means, and unpacks the training data that such a function returns."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from pathlib import Path
from typing import Any

from accumtune.errors import DataError
from accumtune.worker.quiet_imports import without_notes

# The formats that matplotlib writes without another program.
_PICTURES = (".png", ".svg", ".pdf", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".eps", ".ps")


def load_object(address: str) -> Any:
    """Imports the object that `MODULE:name` means; modules of the working directory are found too.

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
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a module may raise anything, and a script that is imported may end the process
        raise DataError(
            f"Received {address!r}: {exception_line(error)}",
            "MODULE:NAME, a name in a module that can be imported from here.",
            "for a file train.py with a function build_model: train:build_model.",
        ) from error
    return value


def exception_line(error: BaseException) -> str:
    """Returns an exception of the user's code in one line, with the file and line number that raised it."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    if isinstance(error, SyntaxError):  # it names the line itself
        return text
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if os.sep + "accumtune" + os.sep not in frame.filename and frame.line]
    return f"{text} ({own[-1].filename}, line {own[-1].lineno})" if own else text


def refuse_unwritable(path: str) -> None:
    """Refuses a file that cannot be written, before probes take minutes.

    Raises:
        DataError: the ending is not that of a picture, or the folder cannot be written to.
    """
    folder, ending = Path(path).parent, Path(path).suffix.lower()
    if ending not in _PICTURES:
        raise DataError(f"Received {path!r}.", f"a name that ends with {', '.join(_PICTURES)}", "such as probe.png.")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise DataError(
            f"The folder {str(folder)!r} cannot be written to.", "an existing folder", "create it, or give another one."
        )


def load_data(address: str) -> tuple[Any, Any]:
    """Returns training data as `(x, y)`.

    For a data set that is the function itself and None, because a data set cannot be sent to another process.

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
    """Returns the validation data that the function returned with the training data; None if there are none."""
    data = _loaded(address)
    if not isinstance(data, tuple):
        return None
    if is_keras_dataset(data):
        return tuple(data[1])
    return (data[1], data[3]) if len(data) == 4 else None


def is_keras_dataset(data: Any) -> bool:
    """Returns whether data are `((x, y), (x_test, y_test))`, as `keras.datasets` returns them.

    The data of a model with two inputs and two outputs are a pair of pairs too, but all four have the same length.
    """
    pairs = (tuple, list)
    if not (isinstance(data, pairs) and len(data) == 2 and all(isinstance(it, pairs) and len(it) == 2 for it in data)):
        return False
    try:
        (x, y), (x_test, y_test) = ((len(a), len(b)) for a, b in data)
    except TypeError:  # numbers, or tensors without a length: not arrays
        return False
    return x == y != x_test == y_test


def _loaded(address: str) -> Any:
    load = load_object(address)
    try:
        data = load()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise DataError(
            f"{address} was called and raised {exception_line(error)}",
            "a function without arguments that returns training data",
            f'try it alone: python -c "import {address.partition(":")[0]} as it; it.{address.partition(":")[2]}()"',
        ) from error
    # scikit-learn's train_test_split returns (x, x_val, y, y_val) as a list.
    return tuple(data) if isinstance(data, list) and len(data) == 4 else data
