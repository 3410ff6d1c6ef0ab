"""A configuration as JSON would give it back, and as a person reads it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from accumtune.memory.budget import format_bytes

if TYPE_CHECKING:
    from accumtune.config.value import TrainingConfig


def plain(value: Any) -> Any:
    """Copies, with NumPy's scalars and arrays as Python's and tuples as lists: what JSON would give back."""
    if isinstance(value, Mapping):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    convert = getattr(value, "tolist", None) or getattr(value, "item", None)
    return convert() if callable(convert) else value


def described(config: TrainingConfig) -> list[str]:
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
