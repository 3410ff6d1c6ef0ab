"""Writes plain values and arrays to a file that runs no code when it is read: an `.npz` without pickles.

Its entry `state` is JSON. Values that JSON lacks are dicts with one special key: `{"~tuple": […]}`, `{"~array": 3}`.
Functions are stored by name; reading returns one only if its module is imported already, or belongs to Keras or NumPy.
"""

from __future__ import annotations

import base64
import importlib
import json
import sys
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_STATE = "state"
_IMPORTABLE = ("keras", "numpy", "builtins", "math", "operator")


def write_state(file: BinaryIO, state: Any) -> None:
    """Writes values (numbers, texts, bytes, lists, tuples, sets, dicts, arrays, functions by their name).

    Raises:
        TypeError: there is a value of another type.
    """
    arrays: list[np.ndarray] = []
    text = json.dumps(_encoded(state, arrays))
    named = {str(index): _portable(array) for index, array in enumerate(arrays)}
    np.savez(file, **{_STATE: np.frombuffer(text.encode(), np.uint8), **named})  # type: ignore[arg-type]


def read_state(path: Path) -> Any:
    """Reads what `write_state` wrote.

    Raises:
        OSError, ValueError, KeyError, TypeError: it is not such a file, or it is damaged.
    """
    with np.load(path, allow_pickle=False) as content:
        return _decoded(json.loads(content[_STATE].tobytes()), content)


def _encoded(value: Any, arrays: list[np.ndarray]) -> Any:
    if isinstance(value, (np.ndarray, np.generic)):
        arrays.append(np.asarray(value))
        kind = "~array" if isinstance(value, np.ndarray) else "~scalar"
        return {kind: len(arrays) - 1, "dtype": arrays[-1].dtype.name}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, list):
        return [_encoded(item, arrays) for item in value]
    if isinstance(value, (tuple, set)):
        return {f"~{type(value).__name__}": [_encoded(item, arrays) for item in value]}
    if isinstance(value, dict):
        if all(isinstance(key, str) and not key.startswith("~") for key in value):
            return {key: _encoded(item, arrays) for key, item in value.items()}
        return {"~dict": [[_encoded(key, arrays), _encoded(item, arrays)] for key, item in value.items()]}
    if isinstance(value, bytes):
        return {"~bytes": base64.b64encode(value).decode()}
    if isinstance(value, complex):
        return {"~complex": [value.real, value.imag]}
    if callable(value) and hasattr(value, "__qualname__"):
        return {"~function": [value.__module__, value.__qualname__]}
    raise TypeError(f"{type(value).__name__} cannot be written into a state")


def _decoded(value: Any, arrays: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item, arrays) for item in value]
    if not isinstance(value, dict):
        return value
    kind = next((key for key in value if key.startswith("~")), None)
    if kind is None:
        return {key: _decoded(item, arrays) for key, item in value.items()}
    given = value[kind]
    if kind in ("~array", "~scalar"):
        array = arrays[str(given)]
        array = array if array.dtype.name == value["dtype"] else array.view(np.dtype(value["dtype"]))
        return array if kind == "~array" else array[()]
    if kind == "~bytes":
        return base64.b64decode(given)
    if kind == "~complex":
        return complex(*given)
    if kind == "~function":
        return _function(*given)
    if kind == "~dict":
        return {_decoded(key, arrays): _decoded(item, arrays) for key, item in given}
    return {"~tuple": tuple, "~set": set}[kind](_decoded(given, arrays))


def _portable(array: np.ndarray) -> np.ndarray:
    """Returns an array that `.npy` can store: for bfloat16 and float8, which it lacks, an array of their bits."""
    if array.dtype.hasobject:
        raise TypeError("an array of objects cannot be written into a state")
    return array if array.dtype.isbuiltin == 1 or array.dtype.kind in "USM" else array.view(f"u{array.dtype.itemsize}")


def _function(module: str, name: str) -> Any:
    if module not in sys.modules and module.split(".")[0] not in _IMPORTABLE:
        raise ValueError(f"{module}.{name} is not imported here")
    found: Any = sys.modules.get(module) or importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
