"""What is the same for all trials of a search."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SearchSettings:
    """What is the same for all trials of a search."""

    memory_budget_bytes: int | None
    micro_batch_sizes: tuple[int, ...]
    searches_pairs: bool
    is_batch_coupled: bool
    executions_per_trial: int
    seed: int
    objective_name: str
    trial_timeout_seconds: float | None
