"""Configurations of older schema versions, brought to the current one step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

SCHEMA_VERSION = 1

# An older version -> what turns its values into those of the next one. A step takes and returns plain values of JSON;
# it may raise LookupError, TypeError or ValueError where a file is not what it says. Keys that only became possible
# need no step: what is optional has a default.
MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}


def migrated(values: dict[str, Any]) -> dict[str, Any]:
    """The values as the current schema has them, as far as there are steps; a newer version stays as it is."""
    version = values.get("schema_version")
    while isinstance(version, int) and not isinstance(version, bool) and version in MIGRATIONS:
        values = {**MIGRATIONS[version](values), "schema_version": version + 1}
        version += 1
    return values
