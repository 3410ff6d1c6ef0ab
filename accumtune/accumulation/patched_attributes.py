"""Attributes that objects of the user carry for a while, and what these objects carried before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any


def put(target: Any, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Gives an object attributes of its own, past Keras's and torch's tracking; returns those it had."""
    before = {name: vars(target)[name] for name in attributes if name in vars(target)}
    for name, value in attributes.items():
        object.__setattr__(target, name, value)
    return before


def put_back(target: Any, names: Any, before: Mapping[str, Any]) -> None:
    """Undoes `put`: what the object had is back, and what its class gives shows through again."""
    for name in names:
        if name in before:
            object.__setattr__(target, name, before[name])
        elif name in vars(target):
            object.__delattr__(target, name)


@contextlib.contextmanager
def replaced(target: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """While open, `target` has these attributes of its own."""
    before = put(target, attributes)
    try:
        yield
    finally:
        put_back(target, attributes, before)
