"""A configuration as a person reads it."""

from __future__ import annotations

from typing import Any

from accumtune.config.value import ConfigValue
from accumtune.memory.budget import format_bytes


def described(config: ConfigValue) -> list[str]:
    """What a person wants to know of a configuration first, in parts of a line."""
    batch = f"{config.effective_batch_size} = {config.micro_batch_size} × {config.accumulation_steps}"
    if config.replicas > 1:
        batch += f" × {config.replicas} replicas"
    parts = [f"effective batch {batch}"]
    parts += [f"{name}={_short(value)}" for name, value in config.own_hyperparameters.items()]
    if config.peak_memory_bytes is not None:
        budget = "" if config.memory_budget_bytes is None else f" of {format_bytes(config.memory_budget_bytes)}"
        parts.append(f"peak {format_bytes(config.peak_memory_bytes)}{budget}")
    if config.throughput_samples_per_second is not None:
        parts.append(f"{config.throughput_samples_per_second:,.0f} samples/s")
    if config.objective.get("value") is not None:
        parts.append(f"{config.objective.get('name', 'objective')} {config.objective['value']:.4g}")
    if config.device is not None:
        parts.append(f"on {config.device}")
    return parts


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else repr(value)
