"""Describes everything that decides the result of a training, in short texts that are equal in any process, on any day.

Unlike in `object_description`, which is about memory, real numbers and the content of arrays count here. Code is
described by its source if that is requested and known, and otherwise by its bytecode, which differs between versions of
Python. Texts that depend on code begin with `code:`.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import inspect
import json
import re
import sys
import sysconfig
import textwrap
import types
from collections.abc import Mapping
from typing import Any

import numpy as np

from accumtune.accumulation.batch_pair import BATCH_HYPERPARAMETERS
from accumtune.worker.identity.data_identity import content_digest

_DEPTH = 5
_CODE = "code:"
# Longer texts are replaced by a digest.
_READABLE_LENGTH = 80


def text_of(value: Any, *, by_source: bool = False) -> str:
    """Returns a text for any object: readable if it is short, otherwise a digest."""
    described = exact(value, by_source=by_source)
    text = json.dumps(described, sort_keys=True)
    if '"code"' in text:
        return _CODE + hashlib.sha256(text.encode()).hexdigest()[:16]
    return text if len(text) <= _READABLE_LENGTH else hashlib.sha256(text.encode()).hexdigest()[:16]


def is_code(text: Any) -> bool:
    """Returns whether a text of `text_of` depends on code."""
    return isinstance(text, str) and text.startswith(_CODE)


def exact(value: Any, *, by_source: bool = False, depth: int = _DEPTH) -> Any:
    """Returns plain data for any object; objects that train differently have different data.

    Args:
        value: the object.
        by_source: whether code is described by its source.
        depth: how many levels of objects are described; below, an object is its type.
    """
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, np.generic):
        return exact(value.item())
    if isinstance(value, types.ModuleType):
        return value.__name__
    inner = functools.partial(exact, by_source=by_source, depth=depth)
    if isinstance(value, Mapping):
        return {str(key): inner(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [inner(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(inner(item), sort_keys=True) for item in value)
    if depth <= 0:
        return _name_of(type(value))
    inner = functools.partial(exact, by_source=by_source, depth=depth - 1)
    if hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__array__"):
        return ["array", content_digest(value, is_ordered=True)]
    if isinstance(value, functools.partial):
        return [inner(value.func), inner(value.args), inner(value.keywords)]
    if inspect.ismethod(value):
        return [inner(value.__func__), inner(value.__self__)]
    if inspect.isfunction(value):
        return _function(value, by_source, depth)
    if isinstance(value, type):
        return _class(value, by_source)
    return _object(value, inner, by_source)


def _function(function: types.FunctionType, by_source: bool, depth: int) -> Any:
    if not _is_of_user(function):
        return f"{function.__module__}.{function.__qualname__}"
    used = {name: function.__globals__[name] for name in _names(function.__code__) if name in function.__globals__}
    closed = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
    cells = {}
    for name, cell in closed.items():
        with contextlib.suppress(ValueError):  # a name that is not bound yet
            cells[name] = cell.cell_contents
    around = {**used, **cells}
    return {
        "code": (_source(function) if by_source else None) or _bytecode(function.__code__),
        "defaults": exact([function.__defaults__, function.__kwdefaults__], depth=depth - 1),
        "uses": {
            name: exact(item, by_source=by_source, depth=depth - 1)
            for name, item in sorted(around.items())
            if item is not function and _is_lasting(item)
        },
    }


def _class(kind: type, by_source: bool) -> Any:
    """Describes a class by its name and, if it is the user's, by the code of its methods."""
    methods = {
        f"{base.__qualname__}.{name}": (_source(method) if by_source else None) or _bytecode(method.__code__)
        for base in kind.__mro__
        if _is_of_user(base)
        for name, method in sorted(vars(base).items())
        if inspect.isfunction(method)
    }
    return {"class": _name_of(kind), "code": methods} if methods else _name_of(kind)


def _object(value: Any, inner: Any, by_source: bool) -> Any:
    described: dict[str, Any] = {"class": _class(type(value), by_source)}
    lasting = {name: item for name, item in sorted(getattr(value, "__dict__", {}).items()) if _is_lasting(item)}
    try:
        described["config"] = _without_names(inner(value.get_config()))
    except Exception:  # no get_config, or whatever a user's raises: its attributes describe it
        return {**described, "attributes": inner(lasting)}
    is_layer = hasattr(value, "_flatten_layers")  # whose get_config has the arguments of a user's layer too
    if is_layer or not _is_of_user(type(value)) or _is_of_user(type(value).get_config):
        return described
    # Keras's get_config of a loss or metric does not know what the user's class adds.
    own = {name: item for name, item in lasting.items() if not name.startswith("_") and name != "built"}
    return {**described, "attributes": _without_names(inner(own))}


def _is_lasting(value: Any) -> bool:
    """Returns whether a value will be the same in the next session: not a time, not a path, not a live object."""
    if isinstance(value, float):
        return abs(value) < 1e8
    if isinstance(value, str):
        return re.fullmatch(r"[A-Za-z_ .-]*", value) is not None
    if isinstance(value, (list, tuple)):
        return all(map(_is_lasting, value))
    if isinstance(value, dict):
        return all(map(_is_lasting, value.values()))
    if isinstance(value, np.ndarray):
        return True
    return value is None or isinstance(value, (bool, int, np.generic)) or inspect.isfunction(value)


def _without_names(config: Any) -> Any:
    """Removes the counters that Keras adds to names: `dense_3` may be `dense` in another process."""
    if isinstance(config, dict):
        return {key: _without_names(item) for key, item in config.items()}
    if isinstance(config, list):
        return [_without_names(item) for item in config]
    return re.sub(r"_\d+$", "", config) if isinstance(config, str) else config


def _names(code: types.CodeType) -> set[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _names(constant)
    return names


def _bytecode(code: types.CodeType) -> list[Any]:
    constants = [
        _bytecode(item) if isinstance(item, types.CodeType)
        else sorted(map(repr, item)) if isinstance(item, frozenset) else repr(item)
        for item in code.co_consts
        if item != code.co_consts[0] or not isinstance(item, str)  # not the docstring
    ]  # fmt: skip
    return [code.co_code.hex(), list(code.co_names), constants]


def _source(function: Any) -> str | None:
    """Returns the source without comments and without hyperparameters' ranges, to which values may be added."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):  # no source, or a lambda within a line
        return None
    return ast.unparse(_WithoutRanges().visit(tree))


class _WithoutRanges(ast.NodeTransformer):
    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr in ("Choice", "Int", "Float", "Boolean", "Fixed"):
            names = [word.value for word in node.keywords if word.arg == "name"]
            node.args, node.keywords = (node.args[:1] or names), []
        return node


@functools.cache
def _library_folders() -> tuple[str, ...]:
    return tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


def _is_of_user(value: Any) -> bool:
    name = getattr(value, "__module__", None) or "__main__"  # made by exec
    file = getattr(sys.modules.get(name), "__file__", None)
    if name == "__main__":
        return True
    if name.split(".")[0] in ("builtins", "accumtune") or (file is None and name in sys.modules):
        return False
    return file is None or not str(file).startswith(_library_folders())


def _name_of(kind: type) -> str:
    return kind.__qualname__ if kind.__module__ == "__main__" else f"{kind.__module__}.{kind.__qualname__}"


def describe_training(model: Any, hyperparameters: Mapping[str, Any]) -> dict[str, str]:
    """Describes what a compiled model's training depends on beside the data, under names that the user knows."""
    optimizer = model.optimizer
    compiled = getattr(getattr(model, "_compile_config", None), "config", {})
    layers = list(model._flatten_layers(include_self=True))
    try:
        config = _without_names(exact(model.get_config()))
    except Exception:  # whatever a user's get_config raises
        config = [_without_names(exact(layer)) for layer in layers if layer is not model]
    kinds = {_name_of(type(layer)): exact(type(layer)) for layer in layers}
    code = text_of([kind for _, kind in sorted(kinds.items())])
    return {
        "layers": text_of([config, [[list(v.shape), str(v.dtype), bool(v.trainable)] for v in model.variables]]),
        "code of its layers": code,
        "optimizer": _name_of(type(optimizer)),
        **{
            f"optimizer's {name}": text_of(item)
            for name, item in optimizer.get_config().items()
            if name not in ("name", "is_legacy_optimizer")
        },
        **{name: text_of(item) for name, item in compiled.items() if name in ("loss", "loss_weights", "metrics")},
        "batch": json.dumps({name: hyperparameters[name] for name in BATCH_HYPERPARAMETERS if name in hyperparameters}),
    }
