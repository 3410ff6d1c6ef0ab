"""Describes everything that decides the result of a training, in short texts that are equal in any process, on any day.

Unlike in `object_description`, which is about memory, real numbers and the content of arrays count here. Code is
described by its source if that is requested and known, and otherwise by its bytecode, which differs between versions of
Python. Texts that depend on code begin with `code:`.
"""

from __future__ import annotations

import ast
import codecs
import contextlib
import functools
import hashlib
import inspect
import json
import marshal
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
    return _text(exact(value, by_source=by_source))


def text_of_method(value: Any, name: str) -> str:
    """Returns the same for a method, by its source, with the attributes and methods of its object that it uses."""
    return _text(_Description(by_source=True).method(value, name))


def _text(described: Any) -> str:
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
    return _Description(by_source).of(value, depth)


class _Description:
    """Describes objects and all code of the user's that they use, each function, class and object once."""

    def __init__(self, by_source: bool = False) -> None:
        self._by_source = by_source
        self._known: dict[int, Any] = {}  # the objects too: another one may get the identity of one that is gone

    def of(self, value: Any, depth: int) -> Any:
        if value is None or isinstance(value, (bool, int, str)):
            return value
        if isinstance(value, float):
            return repr(value)
        if isinstance(value, np.generic):
            return self.of(value.item(), depth)
        if isinstance(value, types.ModuleType):
            return value.__name__
        if isinstance(value, Mapping):
            return {str(key): self.of(item, depth) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.of(item, depth) for item in value]
        if isinstance(value, (set, frozenset)):
            return sorted(json.dumps(self.of(item, depth), sort_keys=True) for item in value)
        if depth <= 0:
            return _name_of(type(value))
        if hasattr(value, "shape") and hasattr(value, "dtype") and hasattr(value, "__array__"):
            return ["array", content_digest(value, is_ordered=True)]
        if isinstance(value, functools.partial):
            return [self.of(part, depth - 1) for part in (value.func, value.args, value.keywords)]
        if inspect.ismethod(value):
            return [self.of(value.__func__, depth - 1), self.of(value.__self__, depth - 1)]
        if inspect.isfunction(value):
            return self._function(value, depth)
        if isinstance(value, type):
            return self._class(value, depth)
        return self._object(value, depth)

    def _function(self, function: types.FunctionType, depth: int) -> Any:
        if not _is_of_user(function):
            return f"{function.__module__}.{function.__qualname__}"
        if id(function) in self._known:
            return function.__qualname__
        self._known[id(function)] = function
        names = _names(function.__code__)
        used = {name: function.__globals__[name] for name in names if name in function.__globals__}
        closed = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=False))
        for name, cell in closed.items():
            with contextlib.suppress(ValueError):  # a name that is not bound yet
                used[name] = cell.cell_contents
        return {
            "code": (_source(function) if self._by_source else None) or _bytecode(function.__code__),
            "defaults": self.of([function.__defaults__, function.__kwdefaults__], depth),
            "uses": {
                name: self._used(item, names, depth)
                for name, item in sorted(used.items())
                if item is not function and name != "__class__" and _decides(item)
            },
        }

    def _used(self, item: Any, names: set[str], depth: int) -> Any:
        """Describes a global or an enclosing function's variable; of a module of the user's, what is used of it."""
        if not isinstance(item, types.ModuleType):
            return self.of(item, depth)
        parts = {name: vars(item)[name] for name in sorted(names & vars(item).keys())}
        return {name: self.of(part, depth) for name, part in parts.items() if _decides(part)}

    def _class(self, kind: type, depth: int) -> Any:
        """Describes a class by its name and, if it is the user's, by its methods and attributes."""
        if id(kind) in self._known:
            return _name_of(kind)
        self._known[id(kind)] = kind
        found = {}
        for base in kind.__mro__:
            for name, item in sorted(vars(base).items()) if _is_of_user(base) else ():
                is_plain = not name.startswith("__") and _is_lasting(item)
                parts = _functions_of(item) or ([item] if is_plain else [])
                if parts:
                    found[f"{base.__qualname__}.{name}"] = [self.of(part, depth) for part in parts]
        return {"class": _name_of(kind), "code": found} if found else _name_of(kind)

    def _object(self, value: Any, depth: int) -> Any:
        if id(value) in self._known:
            return _name_of(type(value))
        self._known[id(value)] = value
        described: dict[str, Any] = {"class": self._class(type(value), depth)}
        attributes = getattr(value, "__dict__", {})
        lasting = {name: item for name, item in sorted(attributes.items()) if _decides(item)}
        try:
            described["config"] = _without_names(self.of(value.get_config(), depth - 1))
        except Exception:  # no get_config, or whatever a user's raises: its attributes describe it
            return {**described, "attributes": self.of(lasting, depth - 1)}
        is_layer = hasattr(value, "_flatten_layers")  # whose get_config has the arguments of a user's layer too
        if is_layer or not _is_of_user(type(value)) or _is_of_user(type(value).get_config):
            code = self.code_within(value, depth)
            return {**described, "code": code} if code else described
        # Keras's get_config of a loss or metric does not know what the user's class adds.
        own = {name: item for name, item in lasting.items() if not name.startswith("_") and name != "built"}
        return {**described, "attributes": _without_names(self.of(own, depth - 1))}

    def code_within(self, value: Any, depth: int = _DEPTH) -> dict[str, Any]:
        """Describes the functions and objects of the user's that an object of Keras holds: an activation, a schedule.

        Its `get_config` has their names only.
        """
        attributes = sorted(getattr(value, "__dict__", {}).items())
        return {name: self.of(item, depth - 1) for name, item in attributes if _is_code_of_user(item)}

    def method(self, value: Any, name: str) -> Any:
        """Describes a method with the attributes and other methods of its object that it uses."""
        names, unread = {name}, [name]
        while unread:
            for function in _functions_of(inspect.getattr_static(type(value), unread.pop(), None)):
                found = _names(function.__code__) - names if _is_of_user(function) else set()
                names |= found
                unread += sorted(found)
        kind = type(value)
        members = {each: inspect.getattr_static(kind, each, None) for each in sorted(names)}
        used = {each: _functions_of(item) or item for each, item in members.items() if not each.startswith("__")}
        of_class = {each: item for each, item in used.items() if isinstance(item, list) or _is_lasting(item)}
        own = {each: item for each, item in sorted(vars(value).items()) if each in names and _decides(item)}
        return [self.of(of_class, _DEPTH), self.of(own, _DEPTH)]


def _functions_of(member: Any) -> list[Any]:
    """Returns the functions that a member of a class consists of: a method, or the parts of a property."""
    if inspect.isfunction(member):
        return [member]
    if isinstance(member, (staticmethod, classmethod)):
        return [member.__func__] if inspect.isfunction(member.__func__) else []
    if isinstance(member, (property, functools.cached_property)):
        parts = [getattr(member, name, None) for name in ("fget", "fset", "func")]
        return [part for part in parts if inspect.isfunction(part)]
    return []


def _decides(value: Any) -> bool:
    """Returns whether something that code uses is described: a lasting value, or what holds code or a configuration."""
    if isinstance(value, types.ModuleType):
        return not str(getattr(value, "__file__", None) or _library_folders()[0]).startswith(_library_folders())
    if isinstance(value, type):
        return _is_of_user(value)
    if isinstance(value, functools.partial) or inspect.ismethod(value):
        return True
    return _is_lasting(value) or _is_of_user(type(value)) or _is_keras_configured(value)


def _is_keras_configured(value: Any) -> bool:
    """Returns whether it is a loss, a schedule, a regularizer, ... of Keras; not a layer or a model, which train."""
    module = type(value).__module__.split(".")[0]
    return module == "keras" and hasattr(value, "get_config") and not hasattr(value, "_flatten_layers")


def _is_code_of_user(value: Any) -> bool:
    """Returns whether it is a function, or an object (a regularizer, a schedule, ...), of the user's."""
    if isinstance(value, functools.partial):
        return _is_code_of_user(value.func)
    if inspect.isfunction(value):
        return _is_of_user(value)
    return not isinstance(value, type) and _is_of_user(type(value)) and not hasattr(value, "_flatten_layers")


def _is_lasting(value: Any) -> bool:
    """Returns whether a value will be the same in the next session: not a time, not a path, not a live object."""
    if isinstance(value, float):
        return abs(value) < 1e8
    if isinstance(value, str):
        return re.fullmatch(r"[\w .-]*", value) is not None and sum(map(str.isdigit, value)) <= 2
    if isinstance(value, (list, tuple, set, frozenset)):
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
    return _without_lines(config) if isinstance(config, str) else config


def _without_lines(text: str) -> Any:
    """Returns a text of Keras's config; if it is a lambda's marshalled code, that code without its line numbers."""
    if text.endswith("\n") and text.startswith(("4w", "Yw")):  # how marshalled code begins, in base64
        with contextlib.suppress(Exception):  # it only looks like code
            code = marshal.loads(codecs.decode(text.encode("ascii"), "base64"))
            if isinstance(code, types.CodeType):
                return {"code": _bytecode(code)}
    return re.sub(r"_\d+$", "", text)


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
    description = _Description()
    kinds = {_name_of(type(layer)): type(layer) for layer in layers}
    code: list[Any] = [description.of(kind, _DEPTH) for _, kind in sorted(kinds.items())]
    held = [description.code_within(layer) for layer in layers]
    # What the model was compiled with is described by itself.
    code += [part for each in held if (part := {name: item for name, item in each.items() if name not in compiled})]
    own = [description.of(type(optimizer), _DEPTH), description.code_within(optimizer)]
    return {
        "layers": text_of([config, [[list(v.shape), str(v.dtype), bool(v.trainable)] for v in model.variables]]),
        "code of its layers": _text(code),
        "optimizer": _name_of(type(optimizer)),
        **({"code of its optimizer": _text(own)} if own != [_name_of(type(optimizer)), {}] else {}),
        **{
            f"optimizer's {name}": text_of(item)
            for name, item in optimizer.get_config().items()
            if name not in ("name", "is_legacy_optimizer")
        },
        **{name: text_of(item) for name, item in compiled.items() if name in ("loss", "loss_weights", "metrics")},
        **{name: text_of(item) for name, item in compiled.items() if name == "weighted_metrics" and item is not None},
        "batch": json.dumps({name: hyperparameters[name] for name in BATCH_HYPERPARAMETERS if name in hyperparameters}),
    }
