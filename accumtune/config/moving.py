"""Adapts a configuration to another budget, another device, or several replicas."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from accumtune.accumulation.batch_pair import ghost_batch_of
from accumtune.config.production import batch_values, installed_versions
from accumtune.errors import BatchSizeError, BudgetTooSmallError
from accumtune.memory.budget import format_bytes, parse_budget
from accumtune.memory.machine import budget_hint

if TYPE_CHECKING:
    from accumtune.config.training_config import TrainingConfig
    from accumtune.memory.prediction.profile import Profile

# Predicted throughputs within this share count as equal; the smaller micro-batch then needs less memory.
_SAME_SPEED = 0.02
# The share of a device's free memory that is used; the rest is for other processes, the context and fragmentation.
FREE_MEMORY_SHARE = 0.9


def for_budget(config: TrainingConfig, budget: int | float | str, build_model: Any, x: Any, y: Any) -> TrainingConfig:
    """See `TrainingConfig.for_budget`."""
    from accumtune.execution import standalone_profile
    from accumtune.execution.device_query import current_backend

    budget_bytes = parse_budget(budget)
    profile = standalone_profile.profile(
        build_model, x, y,
        micro_batch_sizes=_micro_batch_sizes(config), memory_budget=budget_bytes,
        hyperparameters=config.hyperparameters,
        # Not needed: no micro-batch is larger than the effective batch, and the largest that fits is probed.
        confirm_largest=False,
    )  # fmt: skip
    moved = fitted(config, profile, budget_bytes, current_backend())
    _warn_where_coupled(config, moved)
    return moved


def for_device(config: TrainingConfig, build_model: Any, x: Any, y: Any) -> TrainingConfig:
    """See `TrainingConfig.for_device`."""
    from accumtune.execution.device_query import free_device_memory_bytes

    return for_budget(config, int(FREE_MEMORY_SHARE * free_device_memory_bytes()), build_model, x, y)


def for_replicas(config: TrainingConfig, replicas: int) -> TrainingConfig:
    """See `TrainingConfig.for_replicas`."""
    effective = config.effective_batch_size
    is_count = isinstance(replicas, int) and not isinstance(replicas, bool) and replicas >= 1
    if not is_count:
        raise BatchSizeError(f"Received {replicas=}.", "a whole number of at least 1.", "give the number of devices.")
    if effective % replicas:
        near = [size for size in (effective - effective % replicas, effective + -effective % replicas) if size]
        raise BatchSizeError(
            f"Received replicas={replicas!r}, which does not divide the effective batch {effective}.",
            f"one of {', '.join(map(str, divisors(effective)))}.",
            f"use one of these numbers of devices, or an effective batch of {' or '.join(map(str, near))}.",
        )
    share = effective // replicas
    ghost = ghost_batch_of(effective, config.ghost_batch_size) or 1
    micro = max((size for size in divisors(share) if size <= config.micro_batch_size and size % ghost == 0), default=0)
    if not micro:
        raise BatchSizeError(
            f"Received {replicas=}, which leaves {share} samples of the effective batch {effective} to each.",
            f"a multiple of the ghost batch of {ghost} samples for each replica.",
            "use fewer devices, since ghost batches are never split.",
        )
    batch = batch_values(micro, effective, replicas)
    # One replica needs no more than before, but its peak and the joint throughput were not measured.
    unknown: dict[str, Any] = dict.fromkeys(("peak_memory_bytes", "memory_source", "throughput_samples_per_second"))
    moved = replace(
        config,
        **batch,
        replicas=replicas,
        hyperparameters={**config.hyperparameters, **batch},
        **(unknown if replicas != config.replicas else {}),
        reason=f"Effective batch {effective} over {replicas} replicas: {micro} × {share // micro} on each.",
    )
    _warn_where_coupled(config, moved)
    return moved


def _warn_where_coupled(config: TrainingConfig, moved: TrainingConfig) -> None:
    if moved.micro_batch_size != config.micro_batch_size and config.batch_coupled_layers:
        warnings.warn(
            f"With micro-batches of {moved.micro_batch_size} instead of {config.micro_batch_size} the training "
            f"differs, because samples of a micro-batch are coupled by {', '.join(config.batch_coupled_layers)}.",
            stacklevel=4,
        )


def fitted(config: TrainingConfig, profile: Profile, budget_bytes: int, backend: str) -> TrainingConfig:
    """Returns the configuration with the fastest micro-batch that fits according to a profile.

    Raises:
        BudgetTooSmallError: none fits.
    """
    share, ghost = _share(config), ghost_batch_of(config.effective_batch_size, config.ghost_batch_size)
    fitting = [size for size in _micro_batch_sizes(config) if profile.fits(size, share // size, budget_bytes)]
    if not fitting:
        least = ghost or 1
        takes = ""
        if profile.measured_sizes():
            predicted = profile.predict_peak_memory(least, share // least)
            takes = f" (predicted {format_bytes(predicted)}{profile.window.share_of(predicted, share)})"
        raise BudgetTooSmallError(
            f"Not even micro-batch {least} fits in {format_bytes(budget_bytes)} on {profile.device}{takes}.",
            f"a memory budget in which {'one sample' if ghost is None else f'{ghost} samples'} can be trained",
            f"raise the budget, or search a smaller model.{budget_hint(backend)}",
        )
    speed = {size: profile.predict_throughput(size, share // size) for size in fitting}
    micro = min(size for size in fitting if speed[size] >= max(speed.values()) * (1 - _SAME_SPEED))
    batch = batch_values(micro, config.effective_batch_size, config.replicas)
    return replace(
        config,
        **batch,
        hyperparameters={**config.hyperparameters, **batch},
        memory_budget_bytes=budget_bytes,
        peak_memory_bytes=profile.predict_peak_memory(micro, share // micro, budget_bytes),
        memory_source=f"predicted from {profile.memory_source}",
        throughput_samples_per_second=speed[micro] if config.replicas == 1 else None,
        device=profile.device,
        backend=backend,
        versions=installed_versions(),
        reason=f"The fastest micro-batch for effective batch {config.effective_batch_size} within "
        f"{format_bytes(budget_bytes)} on {profile.device}.",
    )


def _micro_batch_sizes(config: TrainingConfig) -> list[int]:
    """Returns the micro-batch sizes that train the same."""
    share, ghost = _share(config), ghost_batch_of(config.effective_batch_size, config.ghost_batch_size) or 1
    return [size for size in divisors(share) if size % ghost == 0] or [ghost]


def divisors(number: int) -> list[int]:
    """Returns the divisors of a positive whole number, in ascending order."""
    return [size for size in range(1, number + 1) if number % size == 0]


def _share(config: TrainingConfig) -> int:
    """Returns one replica's share of the effective batch."""
    return config.effective_batch_size // config.replicas
