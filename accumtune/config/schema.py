"""Reads and checks the values of a configuration. Nothing in a file is ever executed or unpickled."""

from __future__ import annotations

import functools
import importlib.resources
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from accumtune.accumulation.batch_pair import BATCH_HYPERPARAMETERS, ghost_batch_of
from accumtune.errors import ConfigError

SCHEMA_VERSION = 1

# An older version -> the function that turns its values into those of the next version. It takes and returns plain
# values of JSON, and may raise LookupError, TypeError or ValueError for a malformed file. New optional keys need no
# function, because they have defaults.
MIGRATIONS: Mapping[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}
# A configuration has about 2 KiB; a much larger file is something else.
MAXIMUM_BYTES = 2**20
_EXPECTED = "a training configuration that accumtune wrote (best_config.json)"
_FIX = "export it again: tuner.get_best_config().save(path), or take best_config.json from the search's MLflow run."


def parse(text: str | bytes, origin: str) -> dict[str, Any]:
    """Reads the JSON text of a configuration.

    Args:
        text: the content of the file.
        origin: where it came from, for the error.

    Raises:
        ConfigError: it is not JSON, not a configuration, or one of a newer accumtune.
    """
    if len(text) > MAXIMUM_BYTES:
        raise ConfigError(
            f"{origin} holds more than {MAXIMUM_BYTES:,} bytes, too many for a configuration.", _EXPECTED, _FIX
        )
    try:
        text = text.decode() if isinstance(text, bytes) else text
        values = json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{origin} cannot be read as JSON: {_first_line(error)}.", _EXPECTED, _FIX) from None
    return validated(_current(values, origin), origin)


def _migrated(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values in the current schema; those of a newer version stay as they are."""
    version = values.get("schema_version")
    while isinstance(version, int) and not isinstance(version, bool) and version in MIGRATIONS:
        values = {**MIGRATIONS[version](values), "schema_version": version + 1}
        version += 1
    return values


def _current(values: Any, origin: str) -> Any:
    """Returns the values in the current schema; those without a readable version are left to `validated`."""
    try:
        return _migrated(values) if isinstance(values, dict) else values
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError) as error:
        version = _shortened(repr(values.get("schema_version")))
        what = f"cannot be converted to schema_version {SCHEMA_VERSION}: {type(error).__name__}: {_first_line(error)}"
        raise ConfigError(f"{origin} has schema_version {version} and {what}.", _EXPECTED, _FIX) from None


def plain(value: Any) -> Any:
    """Copies a value, with NumPy's scalars and arrays as Python's and tuples as lists, as JSON would."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    convert = getattr(value, "tolist", None) or getattr(value, "item", None)
    return convert() if callable(convert) else value


def validated(values: Any, origin: str) -> dict[str, Any]:
    """Checks the values against the schema and against each other, and returns them.

    Raises:
        ConfigError: names the first fault.
    """
    version = values.get("schema_version") if isinstance(values, Mapping) else None
    if isinstance(version, (int, float)) and not isinstance(version, bool) and version > SCHEMA_VERSION:
        raise ConfigError(
            f"{origin} has schema_version {version}.",
            f"schema_version {SCHEMA_VERSION}, which this version of accumtune reads",
            "update accumtune: a newer version wrote this file.",
        )
    try:
        fault = _schema_fault(values) or _inconsistency(values)
    except RecursionError:
        fault = "it is nested too deeply"
    except ValueError:  # a whole number of more digits than Python writes
        fault = "it holds a number of too many digits"
    if fault:
        raise ConfigError(f"{origin} is not a valid configuration: {fault}.", _EXPECTED, _FIX)
    return dict(values)


@functools.cache
def _validator() -> Any:
    import jsonschema

    resource = importlib.resources.files("accumtune.config").joinpath("training_config.schema.json")
    schema = json.loads(resource.read_text())
    return jsonschema.Draft202012Validator(schema)


def _schema_fault(values: Any) -> str | None:
    import jsonschema.exceptions

    error = jsonschema.exceptions.best_match(_validator().iter_errors(values))
    if error is None:
        return None
    where = ".".join(str(part) for part in error.absolute_path)
    return _shortened(f"{where}: {error.message}" if where else error.message)


def _inconsistency(values: Mapping[str, Any]) -> str | None:
    for name in (*BATCH_HYPERPARAMETERS, "replicas", "epochs", "seed", "base_effective_batch_size", "ghost_batch_size"):
        # To JSON Schema 8.0 is an integer; to Keras it is not.
        if isinstance(values.get(name), float):
            return f"{name} is {values[name]!r}, not a whole number"
    effective, micro, steps = (values[name] for name in BATCH_HYPERPARAMETERS)
    replicas = values.get("replicas", 1)
    # The last micro-batch of a window may be smaller, but there is one for every accumulation step.
    if effective % replicas or not micro * (steps - 1) < effective // replicas <= micro * steps:
        times = f" times replicas {replicas}" if replicas > 1 else ""
        return (
            f"effective_batch_size {effective} is not micro_batch_size {micro} times accumulation_steps {steps}{times}"
        )
    for name in BATCH_HYPERPARAMETERS:
        if values["hyperparameters"].get(name, values[name]) != values[name]:
            return f"{name} is {values[name]}, but {values['hyperparameters'][name]!r} among the hyperparameters"
    ghost = ghost_batch_of(effective, values.get("ghost_batch_size"))
    if ghost and micro % ghost:
        return f"micro_batch_size {micro} is not a multiple of ghost_batch_size {values['ghost_batch_size']}"
    if values.get("learning_rate_scaling") and not values.get("base_effective_batch_size"):
        return "learning_rate_scaling needs base_effective_batch_size, to which it is relative"
    return "it holds a number that is not finite" if not _is_finite(values) else None


def _is_finite(value: Any) -> bool:
    if isinstance(value, (int, float)):
        return abs(value) <= sys.float_info.max  # a whole number may be larger than any float
    if isinstance(value, Mapping):
        return all(_is_finite(item) for item in value.values())
    return all(_is_finite(item) for item in value) if isinstance(value, (list, tuple)) else True


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key appears twice")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _first_line(error: Exception) -> str:
    return _shortened((str(error) or type(error).__name__).splitlines()[0])


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else text[:300] + "…"
