"""Holds what the journals say about a search and its trials, as plain, frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class EpochRecord:
    """The logs of one epoch."""

    epoch: int
    logs: Mapping[str, float]
    execution: int = 0
    time: float = 0.0


@dataclass(frozen=True)
class TrialRecord:
    """One trial so far; `status` is `"running"` until it has ended.

    `epochs` are those of the latest attempt: a new attempt (after running out of memory, or after the search was
    killed) replaces the one before.
    """

    folder: Path
    trial_id: str
    number: int = 0
    status: str = "running"
    reason: str = ""
    traceback: str = ""
    description: str = ""
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    # Keras Tuner's configuration of the hyperparameters that were first declared while the model trained.
    appeared_space: tuple[Mapping[str, Any], ...] = ()
    predicted_peak_memory_bytes: float | None = None
    predicted_throughput_samples_per_second: float | None = None
    attempt: int = 0
    pid: int | None = None
    device: str | None = None
    memory_source: str | None = None
    epochs: tuple[EpochRecord, ...] = ()
    objective_value: float | None = None
    best_epoch: int | None = None
    peak_memory_bytes: float | None = None
    throughput_samples_per_second: float | None = None
    updates: int | None = None
    training_seconds: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    signature: str | None = None
    identity: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    sample_shapes: Any = None
    precision_policy: str | None = None
    reused_from: str | None = None
    reused_logs: Mapping[str, float] | None = None
    proposed_at: float | None = None
    started_at: float | None = None
    ended_at: float | None = None

    @property
    def is_ended(self) -> bool:
        return self.status != "running"

    @property
    def micro_batch_size(self) -> int | None:
        return self.hyperparameters.get("micro_batch_size")

    @property
    def accumulation_steps(self) -> int | None:
        return self.hyperparameters.get("accumulation_steps")

    @property
    def effective_batch_size(self) -> int | None:
        return self.hyperparameters.get("effective_batch_size")


@dataclass(frozen=True)
class SearchRecord:
    """A search and its trials, by number; `status` is `"running"` until it has ended."""

    folder: Path
    search_id: str = ""
    name: str = ""
    status: str = "running"
    reason: str = ""
    objective: Mapping[str, str] = field(default_factory=lambda: {"name": "val_loss", "direction": "min"})
    memory_budget_bytes: int | None = None
    micro_batch_sizes: tuple[int, ...] = ()
    accumulation_steps: tuple[int, ...] = ()
    search_over: str | None = None
    batch_coupled_layers: tuple[str, ...] = ()
    whole_batch_loss: bool | None = None
    own_train_step: str | None = None
    learning_rate_scaling: str | None = None
    base_effective_batch_size: int | None = None
    ghost_batch_size: int | None = None
    tuner: str | None = None
    max_trials: int | None = None
    backend: str | None = None
    device: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    fit: Mapping[str, Any] = field(default_factory=dict)
    identity: Mapping[str, str] = field(default_factory=dict)
    advice: tuple[str, ...] = ()
    trials: tuple[TrialRecord, ...] = ()
    started_at: float | None = None
    resumed_at: tuple[float, ...] = ()
    ended_at: float | None = None

    @property
    def is_ended(self) -> bool:
        return self.status != "running"

    @property
    def objective_name(self) -> str:
        return self.objective.get("name", "val_loss")

    @property
    def objective_direction(self) -> str:
        return self.objective.get("direction", "min")

    def with_status(self, status: str) -> tuple[TrialRecord, ...]:
        """Returns the trials of a status: `"completed"`, `"reused"`, `"infeasible"`, `"failed"` or `"running"`."""
        return tuple(trial for trial in self.trials if trial.status == status)
