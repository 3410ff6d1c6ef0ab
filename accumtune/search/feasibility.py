"""From a proposal to the pair that is run: the fastest of its effective batch that fits. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from accumtune.accumulation.batch_pair import BatchPair

# Without a budget only what has run out of memory does not fit.
_NO_LIMIT = 2**62

# Predicted throughputs closer than this are the same to anyone: then the smaller micro-batch, which needs less memory.
_SAME_SPEED = 0.02


class CostModel(Protocol):
    """What is asked of a profile."""

    def fits(self, micro_batch_size: int, accumulation_steps: int, budget_bytes: int) -> bool: ...

    def predict_throughput(self, micro_batch_size: int, accumulation_steps: int = 1) -> float: ...


def effective_batch_sizes(micro_batch_sizes: Iterable[int], accumulation_steps: Iterable[int]) -> tuple[int, ...]:
    """Returns every product of the two lists, in order: the one dimension that quality depends on."""
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

    With a ghost batch, micro-batches are multiples of it.

    Listed sizes come first; only where none of them fits (or divides the effective batch) are other divisors used.
    """
    step = ghost_batch_size or 1
    divisors = [size for size in range(step, effective_batch_size + 1, step) if effective_batch_size % size == 0]
    for sizes in ([size for size in divisors if size in set(micro_batch_sizes)], divisors):
        pairs = [BatchPair(size, effective_batch_size // size) for size in sizes]
        limit = _NO_LIMIT if budget_bytes is None else budget_bytes
        fitting = [pair for pair in pairs if profile.fits(pair.micro_batch_size, pair.accumulation_steps, limit)]
        if fitting:
            return fitting
    return []


def fastest(profile: CostModel, pairs: Sequence[BatchPair]) -> BatchPair | None:
    """Returns the pair with the highest predicted throughput, among equals the smallest; None without pairs."""
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
    """Chooses the fastest pair within the budget for a proposal; None where not even micro-batch 1 fits.

    Args:
        profile: predicts peak memory and throughput.
        effective_batch_size: micro_batch_size × accumulation_steps of the result.
        micro_batch_sizes: the listed sizes.
        budget_bytes: None for no limit.
        proposed_micro_batch_size: where the micro-batch is searched too. It is taken, or where it does not fit the
            largest listed one that does.
        ghost_batch_size: of which micro-batches are multiples; None where there is none.
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
    """Returns the same effective batch with the next smaller micro-batch, or None where there is none."""
    effective, step = pair.effective_batch_size, ghost_batch_size or 1
    divisors = [size for size in range(step, pair.micro_batch_size, step) if effective % size == 0]
    listed = [size for size in divisors if size in set(micro_batch_sizes)]
    size = max(listed if listed or only_listed else divisors, default=None)
    return None if size is None else BatchPair(size, effective // size)


def training_key(values: Mapping[str, Any], is_batch_coupled: bool) -> str:
    """Returns one key for all hyperparameters that train the same model to the same weights.

    With exact accumulation the pair does not matter, only its product; where layers couple the samples of a
    micro-batch, the micro-batch size matters too.
    """
    ignored = {"accumulation_steps"} | (set() if is_batch_coupled else {"micro_batch_size"})
    # Hyperband's bookkeeping: the bracket and round change nothing, the epochs and the weights to start from do.
    ignored |= {"tuner/bracket", "tuner/round"}
    kept = {name: value for name, value in values.items() if name not in ignored}
    return json.dumps(kept, sort_keys=True, default=repr)
