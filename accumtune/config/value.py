"""`TrainingConfig`: the winner of a search as a value that another machine, on another day, can train with."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accumtune.config import validation
from accumtune.memory.budget import format_bytes
from accumtune.tracking.uris import without_credentials

if TYPE_CHECKING:
    from accumtune.config.production import Verification

# A predicted peak has fractions of a byte.
_BYTES = ("memory_budget_bytes", "peak_memory_bytes")


@dataclass(frozen=True, repr=False, kw_only=True)
class TrainingConfig:
    """How to train a model with exact gradient accumulation, what it was measured to cost, and where that is from.

    The attributes are named as the keys of its JSON (`to_json`, `save`, `load_config`), described by
    `training_config.schema.json` beside this file.

    Args:
        micro_batch_size: samples in one forward and backward pass.
        accumulation_steps: micro-batches per update.
        effective_batch_size: samples per update; `fit`'s `batch_size`.
        hyperparameters: every value that the build function asks for, by name.
        memory_budget_bytes: what the search had to keep within; None for no limit.
        peak_memory_bytes: the highest allocated bytes during training.
        memory_source: who measured that peak.
        throughput_samples_per_second: after warm-up and compilation.
        objective: `{"name": "val_loss", "direction": "min", "value": 0.05}`.
        learning_rate_scaling: None, `"linear"` or `"sqrt"`, ...
        base_effective_batch_size: ... relative to this effective batch.
        epochs: how many the winning trial trained.
        precision_policy, backend, versions, device, data_shapes: what it was measured with.
        policy, reason: how it was chosen among the candidates, and why it won.
        source: `experiment`, `run_id`, `search_id`, `trial_id` and `tracking_uri` it came from; a password in the
            URI is left out.
        schema_version: of the JSON.

    Raises:
        ConfigError: the values make no configuration.

    Example:

    >>> config = accumtune.load_config("best_config.json")
    >>> model = config.build(build_model)
    >>> model.fit(x, y, **config.fit_arguments())
    """

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
    epochs: int | None = None
    precision_policy: str | None = None
    backend: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    device: str | None = None
    data_shapes: Any = field(default=None, hash=False)
    policy: str | None = None
    reason: str | None = None
    source: Mapping[str, str | None] = field(default_factory=dict, hash=False)
    schema_version: int = validation.SCHEMA_VERSION

    def __post_init__(self) -> None:
        values = {item.name: _plain(getattr(self, item.name)) for item in fields(self)}
        for name in _BYTES:
            if isinstance(values[name], float) and math.isfinite(values[name]):
                values[name] = int(values[name])
        validation.validated(values, "The TrainingConfig")
        if values["source"].get("tracking_uri"):
            values["source"]["tracking_uri"] = without_credentials(values["source"]["tracking_uri"])
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def from_json(cls, text: str | bytes, origin: str = "The text") -> TrainingConfig:
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
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(self.to_json())
            # mkstemp's files are private; a configuration is as readable as any file of its folder.
            os.chmod(temporary, 0o644)
            os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise

    def build(self, build_model: Any) -> Any:
        """A compiled model with the best hyperparameters that accumulates over `micro_batch_size`.

        Args:
            build_model: the build function or `keras_tuner.HyperModel` that was searched.

        Raises:
            BuildError: it did not return a compiled Keras model.
        """
        from accumtune.config import production

        return production.build(self, build_model)

    def accumulate(self, model: Any) -> Any:
        """The same for a compiled model that production builds in its own way."""
        from accumtune.accumulation import accumulate

        return accumulate(model, micro_batch_size=self.micro_batch_size)

    def fit_arguments(self, **overrides: Any) -> dict[str, Any]:
        """Arguments for `model.fit`: `batch_size`, and `epochs` where the number is known.

        Args:
            overrides: what you want otherwise, for example `epochs=100`, or more of `fit`'s arguments.
        """
        arguments = {"batch_size": self.effective_batch_size, "epochs": self.epochs}
        return {name: value for name, value in arguments.items() if value is not None} | overrides

    def for_budget(self, budget: int | float | str, build_model: Any, x: Any, y: Any = None) -> TrainingConfig:
        """The same training (effective batch, hyperparameters) within another budget, as measured on this machine.

        Args:
            budget: `"1GiB"` or bytes.
            build_model: the build function or `keras_tuner.HyperModel`.
            x, y: training data, as for `accumtune.profile`.

        Returns:
            A configuration with the micro-batch, a divisor of the effective batch, that is the fastest within it.

        Raises:
            BudgetTooSmallError: not even micro-batch 1 fits.
            BuildError: the model could not be built or trained.
        """
        from accumtune.config import production

        return production.for_budget(self, budget, build_model, x, y)

    def verify(self, build_model: Any, x: Any, y: Any = None, *, peak_tolerance: float = 0.1) -> Verification:
        """Runs a few updates here, in a process of its own and under the budget, and compares with the promise.

        Args:
            build_model: the build function or `keras_tuner.HyperModel`.
            x, y: training data, as for `accumtune.profile`.
            peak_tolerance: the share of the promised peak by which the measured one may exceed it.

        Returns:
            What was measured and promised, and what differs between this machine and the search's.

        Raises:
            VerificationError: it does not fit the budget on this machine, or needs more memory than promised.
        """
        from accumtune.config import production

        return production.verify(self, build_model, x, y, peak_tolerance)

    def __repr__(self) -> str:
        batch = f"{self.effective_batch_size} = {self.micro_batch_size} × {self.accumulation_steps}"
        own = {k: v for k, v in self.hyperparameters.items() if k not in validation.BATCH_HYPERPARAMETERS}
        parts = [f"effective batch {batch}"] + [f"{name}={value!r}" for name, value in own.items()]
        if self.peak_memory_bytes is not None:
            budget = "" if self.memory_budget_bytes is None else f" of {format_bytes(self.memory_budget_bytes)}"
            parts.append(f"peak {format_bytes(self.peak_memory_bytes)}{budget}")
        if self.throughput_samples_per_second is not None:
            parts.append(f"{self.throughput_samples_per_second:,.0f} samples/s")
        if self.objective.get("value") is not None:
            parts.append(f"{self.objective.get('name', 'objective')} {self.objective['value']:.4g}")
        return f"TrainingConfig({', '.join(parts)})"


def _plain(value: Any) -> Any:
    """Copies, with NumPy's scalars and arrays as Python's and tuples as lists: what JSON would give back."""
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    convert = getattr(value, "tolist", None) or getattr(value, "item", None)
    return convert() if callable(convert) else value
