"""Describes what an object computes, as plain data that are equal for equal objects in different processes.

There are no addresses in it. Functions are described by their code and by what they close over, objects by their class,
their configuration and their plain attributes. Of a real number that belongs to Keras, or has a name such as `epsilon`,
only whether it is zero counts: its value does not change any memory.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from accumtune.accumulation.batch_pair import BATCH_HYPERPARAMETERS

# How many levels of objects within objects are described.
_DEPTH = 4
_KNOWN_PACKAGES = {"keras", "keras_hub", "tensorflow", "jax", "torch", "numpy", "builtins"}
_HARMLESS_NAMES = (
    "dropout", "drop_rate", "droprate", "epsilon", "momentum", "decay", "stddev", "slope", "temperature", "smoothing",
    "learning_rate", "l1", "l2",
)  # fmt: skip
# Values that differ between trials of one model and do not change its memory.
_BATCH_AND_RATE = {*BATCH_HYPERPARAMETERS, "learning_rate"}


def describe(value: Any, *, is_known: bool = False, depth: int = _DEPTH) -> Any:
    """Returns plain data for any object.

    Args:
        value: the object.
        is_known: whether it belongs to Keras or a framework, so that only zero or not counts of its real numbers.
        depth: how many levels of objects are described; below, an object is its type. Lists and dicts do not count.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value != 0.0 if is_known else value
    if isinstance(value, type):
        return _name_of(value)
    if isinstance(value, types.ModuleType):
        return value.__name__
    inner = functools.partial(describe, is_known=is_known, depth=depth)
    if isinstance(value, Mapping):
        return _described_mapping(value, is_known, depth)
    if isinstance(value, (list, tuple)):
        return [inner(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(repr(inner(item)) for item in value)
    if depth <= 0:
        return _name_of(type(value))
    inner = functools.partial(describe, is_known=is_known, depth=depth - 1)
    if isinstance(value, np.generic):
        return describe(value.item(), is_known=is_known)
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return [[str(size) for size in value.shape or ()], str(value.dtype)]
    if isinstance(value, functools.partial):
        return ["partial", inner(value.func), inner(value.args), inner(value.keywords)]
    if inspect.ismethod(value):
        return ["method", inner(value.__func__), inner(value.__self__)]
    if inspect.isfunction(value):
        return _described_function(value, depth)
    return _described_object(value, depth)


def plain_attributes(value: Any, depth: int = _DEPTH) -> dict[str, Any]:
    """Describes the numbers, flags, texts and functions among an object's attributes, without seeds and names."""
    is_known = _is_known(type(value))
    attributes = {
        name: describe(attribute, is_known=is_known or _is_harmless(name), depth=depth)
        for name, attribute in sorted(getattr(value, "__dict__", {}).items())
        if _is_plain(attribute) and "seed" not in name and name not in ("name", "_name")
    }
    return attributes if is_known else {**attributes, "code": code_of_class(type(value))}


def code_of_class(kind: type) -> dict[str, Any]:
    """Describes the methods of a user's class and of those of its bases that are the user's too."""
    bases = [base for base in kind.__mro__ if not _is_known(base)]
    return {
        f"{base.__qualname__}.{name}": _described_code(method.__code__)
        for base in bases
        for name, method in sorted(vars(base).items())
        if inspect.isfunction(method)
    }


def _described_mapping(value: Mapping[Any, Any], is_known: bool, depth: int) -> Any:
    if "class_name" in value and isinstance(value.get("module"), str):  # an object as Keras serializes it
        is_known = value["module"].split(".")[0] in _KNOWN_PACKAGES
    return {
        str(key): describe(item, is_known=is_known or _is_harmless(str(key)), depth=depth)
        for key, item in value.items()
        if key not in _BATCH_AND_RATE and item is not value
    }


def _described_function(function: types.FunctionType, depth: int) -> Any:
    if _is_known(function):
        return f"{function.__module__}.{function.__qualname__}"
    inner = functools.partial(describe, depth=depth - 1)
    cells = [cell.cell_contents for cell in function.__closure__ or () if _is_filled(cell)]
    used = {name: function.__globals__[name] for name in function.__code__.co_names if name in function.__globals__}
    return {
        "function": function.__qualname__,
        "code": _described_code(function.__code__),
        "defaults": inner([function.__defaults__, function.__kwdefaults__]),
        "closure": [inner(cell) for cell in cells if cell is not function],
        "globals": {name: inner(item) for name, item in sorted(used.items()) if item is not function},
    }


def _described_code(code: types.CodeType) -> list[Any]:
    constants = [
        _described_code(item) if isinstance(item, types.CodeType) else repr(item)
        for item in code.co_consts
        if not isinstance(item, frozenset)
    ]
    return [code.co_code.hex(), list(code.co_names), constants]


def _described_object(value: Any, depth: int) -> Any:
    kind = type(value)
    if _name_of(kind).startswith("keras_tuner."):
        return describe(dict(getattr(value, "values", None) or {}))
    described: dict[str, Any] = {"class": _name_of(kind), **plain_attributes(value, depth - 1)}
    try:
        config = {name: item for name, item in value.get_config().items() if name != "name"}
    except Exception:  # no get_config, or whatever a user's raises: its attributes describe it
        return described
    return {**described, "config": describe(config, is_known=_is_known(kind), depth=depth - 1)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(item) for item in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str, np.generic)) or inspect.isfunction(value)


def _is_filled(cell: types.CellType) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a name that is not bound yet
        return False


def _is_known(value: Any) -> bool:
    return (getattr(value, "__module__", None) or "builtins").split(".")[0] in _KNOWN_PACKAGES


def _is_harmless(name: str) -> bool:
    return name == "rate" or any(part in name for part in _HARMLESS_NAMES)


def _name_of(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
