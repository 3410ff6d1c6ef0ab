"""Holds micro-batch size and accumulation steps, the pair that makes an effective batch (no framework)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The names that the three numbers have as hyperparameters, in configurations, in journals and in MLflow.
BATCH_HYPERPARAMETERS = ("effective_batch_size", "micro_batch_size", "accumulation_steps")


@dataclass(frozen=True, order=True)
class BatchPair:
    """A micro-batch size and accumulation steps; their product is the effective batch."""

    micro_batch_size: int
    accumulation_steps: int

    @classmethod
    def of_values(cls, values: Mapping[str, Any]) -> BatchPair | None:
        """Returns the pair in a trial's hyperparameters; None if it is not chosen yet."""
        micro, effective = values.get("micro_batch_size"), values.get("effective_batch_size")
        if micro is None or effective is None:
            return None
        return cls(int(micro), int(effective) // int(micro))

    @property
    def effective_batch_size(self) -> int:
        return self.micro_batch_size * self.accumulation_steps

    def as_hyperparameters(self) -> dict[str, int]:
        """Returns all three numbers by name."""
        return {name: getattr(self, name) for name in BATCH_HYPERPARAMETERS}

    def __str__(self) -> str:
        return f"{self.effective_batch_size} = {self.micro_batch_size} × {self.accumulation_steps}"


def ghost_batch_of(effective_batch_size: int, ghost_batch_size: int | None) -> int | None:
    """The ghost batch of a training in a search: a smaller effective batch is one group."""
    return None if ghost_batch_size is None else min(ghost_batch_size, effective_batch_size)


def without_batch(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the hyperparameters without the batch sizes."""
    return {name: value for name, value in values.items() if name not in BATCH_HYPERPARAMETERS}
