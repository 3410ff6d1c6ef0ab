"""Holds the settings that all trials of a search share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TrialSettings:
    """The settings that all trials of a search share.

    Args:
        identity: of the session, see `search_identity`.
        has_own_run_trial: whether a subclass overrides `run_trial`; equal hyperparameters may then train differently.
    """

    memory_budget_bytes: int | None
    micro_batch_sizes: tuple[int, ...]
    searches_pairs: bool
    is_batch_coupled: bool
    executions_per_trial: int
    seed: int
    objective_name: str
    trial_timeout_seconds: float | None
    identity: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    has_own_run_trial: bool = False
    max_model_size: int | None = None
    ghost_batch_size: int | None = None
