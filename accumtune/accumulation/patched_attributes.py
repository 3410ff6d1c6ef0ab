"""Sets attributes on objects of the user for a while, and restores those of before."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any


def put(target: Any, attributes: Mapping[str, Any]) -> dict[str, Any]:
    """Sets attributes on an instance, without Keras's and torch's tracking; returns those that it had."""
    before = {name: vars(target)[name] for name in attributes if name in vars(target)}
    for name, value in attributes.items():
        object.__setattr__(target, name, value)
    return before


def put_back(target: Any, names: Any, before: Mapping[str, Any]) -> None:
    """Undoes `put`: restores the instance's attributes of before, and removes the others."""
    for name in names:
        if name in before:
            object.__setattr__(target, name, before[name])
        elif name in vars(target):
            object.__delattr__(target, name)


@contextlib.contextmanager
def replaced(target: Any, attributes: Mapping[str, Any]) -> Iterator[None]:
    """Sets these attributes on `target`, until the context ends."""
    before = put(target, attributes)
    try:
        yield
    finally:
        put_back(target, attributes, before)
