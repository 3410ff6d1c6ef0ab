"""A configuration as a value: its fields, and the JSON that another machine, on another day, reads."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self, TypeVar

from accumtune.config import validation
from accumtune.config.migrations import SCHEMA_VERSION
from accumtune.config.plain import plain
from accumtune.tracking.small_files import write_whole
from accumtune.tracking.tracking_uri import without_credentials

# A predicted peak has fractions of a byte.
_BYTES = ("memory_budget_bytes", "peak_memory_bytes")

AnyConfig = TypeVar("AnyConfig", bound="ConfigValue")


@dataclass(frozen=True, repr=False, kw_only=True)
class ConfigValue:
    """What a `TrainingConfig` holds, which says what each field means; what can be done with it is there too."""

    micro_batch_size: int
    accumulation_steps: int
    effective_batch_size: int
    hyperparameters: Mapping[str, Any] = field(hash=False)
    memory_budget_bytes: int | None = None
    peak_memory_bytes: int | None = None
    memory_source: str | None = None
    throughput_samples_per_second: float | None = None
    objective: Mapping[str, Any] = field(default_factory=dict, hash=False)
    learning_rate_scaling: str | None = None
    base_effective_batch_size: int | None = None
    replicas: int = 1
    epochs: int | None = None
    seed: int | None = None
    fit_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    trial: Mapping[str, Any] = field(default_factory=dict, hash=False)
    precision_policy: str | None = None
    backend: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    device: str | None = None
    data_shapes: Any = field(default=None, hash=False)
    batch_coupled_layers: Sequence[str] = field(default=(), hash=False)
    policy: str | None = None
    reason: str | None = None
    source: Mapping[str, str | None] = field(default_factory=dict, hash=False)
    schema_version: int = SCHEMA_VERSION

    def __post_init__(self) -> None:
        values = {item.name: plain(getattr(self, item.name)) for item in fields(self)}
        for name in _BYTES:
            if isinstance(values[name], float) and math.isfinite(values[name]):
                values[name] = int(values[name])
        validation.validated(values, "The TrainingConfig")
        if values["source"].get("tracking_uri"):
            values["source"]["tracking_uri"] = without_credentials(values["source"]["tracking_uri"])
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_json(cls, text: str | bytes, origin: str = "The text") -> Self:
        """Reads what `to_json` wrote.

        Raises:
            ConfigError: it is something else, broken, or from a newer accumtune.
        """
        return cls(**validation.parse(text, origin))

    def to_json(self) -> str:
        """JSON for people and programs; `schema_version` comes first."""
        values = asdict(self)
        return json.dumps({"schema_version": values.pop("schema_version"), **values}, indent=2) + "\n"

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON file in one move: a reader sees the old file or the new one, never half of it."""
        write_whole(path, self.to_json())

    def fit_arguments(self, **overrides: Any) -> dict[str, Any]:
        """Arguments for `model.fit`: `batch_size`, `epochs` where the number is known, and the search's `fit_options`.

        With `dataset(ds)` too: Keras passes over `batch_size` where the data come as batches.

        Args:
            overrides: what you want otherwise, for example `epochs=100`, or more of `fit`'s arguments.
        """
        arguments: dict[str, Any] = {"batch_size": self.effective_batch_size, "epochs": self.epochs, **self.fit_options}
        if "class_weight" in arguments:  # the keys of JSON are text
            arguments["class_weight"] = {int(key): value for key, value in arguments["class_weight"].items()}
        return {name: value for name, value in arguments.items() if value is not None} | overrides

    @property
    def own_hyperparameters(self) -> dict[str, Any]:
        """The hyperparameters without the batch sizes."""
        return {k: v for k, v in self.hyperparameters.items() if k not in validation.BATCH_HYPERPARAMETERS}
