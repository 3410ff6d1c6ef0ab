"""Chooses the pair that a proposal is run with: the fastest of its effective batch that fits. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from accumtune.accumulation.batch_pair import BatchPair, ghost_batch_of

# The budget of a search without one: only pairs that have run out of memory do not fit.
_NO_LIMIT = 2**62

# Predicted throughputs within this share count as equal; of equal pairs the smaller micro-batch needs less memory.
_SAME_SPEED = 0.02


class CostModel(Protocol):
    """The part of a profile that is needed here."""

    def fits(self, micro_batch_size: int, accumulation_steps: int, budget_bytes: int) -> bool: ...

    def predict_throughput(self, micro_batch_size: int, accumulation_steps: int = 1) -> float: ...


def effective_batch_sizes(micro_batch_sizes: Iterable[int], accumulation_steps: Iterable[int]) -> tuple[int, ...]:
    """Returns every product of the two lists, in ascending order."""
    steps = tuple(accumulation_steps)
    return tuple(sorted({micro * count for micro in micro_batch_sizes for count in steps}))


def feasible_pairs(
    profile: CostModel,
    effective_batch_size: int,
    micro_batch_sizes: Sequence[int],
    budget_bytes: int | None,
    ghost_batch_size: int | None = None,
) -> list[BatchPair]:
    """Returns the pairs of one effective batch that fit the budget, smallest micro-batch first.

    Other divisors of the effective batch are used only if none of the listed sizes fits. With a ghost batch,
    micro-batches are multiples of it; a smaller effective batch is one micro-batch, and one group.
    """
    step = ghost_batch_of(effective_batch_size, ghost_batch_size) or 1
    divisors = [size for size in range(step, effective_batch_size + 1, step) if effective_batch_size % size == 0]
    for sizes in ([size for size in divisors if size in set(micro_batch_sizes)], divisors):
        pairs = [BatchPair(size, effective_batch_size // size) for size in sizes]
        limit = _NO_LIMIT if budget_bytes is None else budget_bytes
        fitting = [pair for pair in pairs if profile.fits(pair.micro_batch_size, pair.accumulation_steps, limit)]
        if fitting:
            return fitting
    return []


def fastest(profile: CostModel, pairs: Sequence[BatchPair]) -> BatchPair | None:
    """Returns the pair with the highest predicted throughput, of equal ones the smallest; None without pairs."""
    if not pairs:
        return None
    speed = {pair: profile.predict_throughput(pair.micro_batch_size, pair.accumulation_steps) for pair in pairs}
    limit = max(speed.values()) * (1 - _SAME_SPEED)
    return min(pair for pair in pairs if speed[pair] >= limit)


def pair_for_proposal(
    profile: CostModel,
    effective_batch_size: int,
    micro_batch_sizes: Sequence[int],
    budget_bytes: int | None,
    proposed_micro_batch_size: int | None = None,
    ghost_batch_size: int | None = None,
) -> BatchPair | None:
    """Chooses the fastest pair within the budget for a proposal; None if none fits.

    Args:
        profile: predicts peak memory and throughput.
        effective_batch_size: micro_batch_size × accumulation_steps of the result.
        micro_batch_sizes: the listed sizes.
        budget_bytes: None for no limit.
        proposed_micro_batch_size: given if the micro-batch is searched too. The result has this size, or if it does
            not fit the largest listed one that does.
        ghost_batch_size: micro-batches are multiples of it; None for no ghost batch.
    """
    pairs = feasible_pairs(profile, effective_batch_size, micro_batch_sizes, budget_bytes, ghost_batch_size)
    if proposed_micro_batch_size is None:
        return fastest(profile, pairs)
    pairs = [pair for pair in pairs if pair.micro_batch_size in micro_batch_sizes]
    smaller = [pair for pair in pairs if pair.micro_batch_size <= proposed_micro_batch_size]
    return max(smaller) if smaller else (min(pairs) if pairs else None)


def next_smaller_pair(
    pair: BatchPair,
    micro_batch_sizes: Sequence[int],
    only_listed: bool = False,
    ghost_batch_size: int | None = None,
) -> BatchPair | None:
    """Returns the pair of the same effective batch with the next smaller micro-batch; None if there is none."""
    effective = pair.effective_batch_size
    step = ghost_batch_of(effective, ghost_batch_size) or 1
    divisors = [size for size in range(step, pair.micro_batch_size, step) if effective % size == 0]
    listed = [size for size in divisors if size in set(micro_batch_sizes)]
    size = max(listed if listed or only_listed else divisors, default=None)
    return None if size is None else BatchPair(size, effective // size)


def training_key(values: Mapping[str, Any], is_batch_coupled: bool) -> str:
    """Returns a key that is equal for all hyperparameters that train a model to the same weights.

    With exact accumulation only the pair's product matters; if the model couples the samples of a micro-batch, the
    micro-batch size matters too.
    """
    ignored = {"accumulation_steps"} | (set() if is_batch_coupled else {"micro_batch_size"})
    # Of Hyperband's entries, the bracket and the round do not change a training.
    ignored |= {"tuner/bracket", "tuner/round"}
    kept = {name: value for name, value in values.items() if name not in ignored}
    return json.dumps(kept, sort_keys=True, default=repr)
