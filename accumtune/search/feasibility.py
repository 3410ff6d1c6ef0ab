"""An effective batch -> the pair that is run; and what counts as the same training. Pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

BATCH_HYPERPARAMETERS = ("effective_batch_size", "micro_batch_size", "accumulation_steps")

# Without a budget only what has run out of memory does not fit.
_NO_LIMIT = 2**62

# Predicted throughputs closer than this are the same to anyone: then the smaller micro-batch, which needs less memory.
_SAME_SPEED = 0.02


class CostModel(Protocol):
    """What is asked of a profile."""

    def fits(self, micro_batch_size: int, accumulation_steps: int, budget_bytes: int) -> bool: ...

    def predict_throughput(self, micro_batch_size: int, accumulation_steps: int = 1) -> float: ...


@dataclass(frozen=True, order=True)
class Pair:
    """A micro-batch size and the accumulation steps that make an effective batch of it."""

    micro_batch_size: int
    accumulation_steps: int

    @property
    def effective_batch_size(self) -> int:
        return self.micro_batch_size * self.accumulation_steps

    def as_hyperparameters(self) -> dict[str, int]:
        """All three values under the names they have everywhere."""
        return {name: getattr(self, name) for name in BATCH_HYPERPARAMETERS}

    def __str__(self) -> str:
        return f"{self.effective_batch_size} = {self.micro_batch_size} × {self.accumulation_steps}"


def effective_batch_sizes(micro_batch_sizes: Iterable[int], accumulation_steps: Iterable[int]) -> tuple[int, ...]:
    """Every product of the two lists, in order: the one dimension that quality depends on."""
    steps = tuple(accumulation_steps)
    return tuple(sorted({micro * count for micro in micro_batch_sizes for count in steps}))


def feasible_pairs(
    profile: CostModel, effective_batch_size: int, micro_batch_sizes: Sequence[int], budget_bytes: int | None
) -> list[Pair]:
    """The pairs of one effective batch whose micro-batch fits the budget, smallest micro-batch first.

    Listed sizes come first; only where none of them fits (or divides the effective batch) are other divisors used.
    """
    divisors = [size for size in range(1, effective_batch_size + 1) if effective_batch_size % size == 0]
    for sizes in ([size for size in divisors if size in set(micro_batch_sizes)], divisors):
        pairs = [Pair(size, effective_batch_size // size) for size in sizes]
        limit = _NO_LIMIT if budget_bytes is None else budget_bytes
        fitting = [pair for pair in pairs if profile.fits(pair.micro_batch_size, pair.accumulation_steps, limit)]
        if fitting:
            return fitting
    return []


def fastest(profile: CostModel, pairs: Sequence[Pair]) -> Pair | None:
    """The pair with the highest predicted throughput; among equals the smallest micro-batch. None without pairs."""
    if not pairs:
        return None
    speed = {pair: profile.predict_throughput(pair.micro_batch_size, pair.accumulation_steps) for pair in pairs}
    limit = max(speed.values()) * (1 - _SAME_SPEED)
    return min(pair for pair in pairs if speed[pair] >= limit)


def realise(
    profile: CostModel,
    effective_batch_size: int,
    micro_batch_sizes: Sequence[int],
    budget_bytes: int | None,
    largest_micro_batch_size: int | None = None,
) -> Pair | None:
    """The fastest pair within the budget for an effective batch; None where not even micro-batch 1 fits.

    Args:
        profile: predicts peak memory and throughput.
        effective_batch_size: micro_batch_size × accumulation_steps of the result.
        micro_batch_sizes: the listed sizes.
        budget_bytes: None for no limit.
        largest_micro_batch_size: not larger than this, for models whose training depends on the micro-batch.
    """
    pairs = feasible_pairs(profile, effective_batch_size, micro_batch_sizes, budget_bytes)
    if largest_micro_batch_size is None:
        return fastest(profile, pairs)
    # The micro-batch is searched: the proposal itself, or where it does not fit the largest listed one that does.
    pairs = [pair for pair in pairs if pair.micro_batch_size in micro_batch_sizes]
    smaller = [pair for pair in pairs if pair.micro_batch_size <= largest_micro_batch_size]
    return max(smaller) if smaller else (min(pairs) if pairs else None)


def next_smaller(pair: Pair, micro_batch_sizes: Sequence[int], only_listed: bool = False) -> Pair | None:
    """The same effective batch with the next smaller micro-batch, after a surprise; None where there is none."""
    effective = pair.effective_batch_size
    divisors = [size for size in range(1, pair.micro_batch_size) if effective % size == 0]
    listed = [size for size in divisors if size in set(micro_batch_sizes)]
    size = max(listed if listed or only_listed else divisors, default=None)
    return None if size is None else Pair(size, effective // size)


def training_key(values: Mapping[str, Any], is_batch_coupled: bool) -> str:
    """Two sets of hyperparameters with one key train the same model to the same weights.

    With exact accumulation the pair does not matter, only its product; where layers couple the samples of a
    micro-batch, the micro-batch size matters too.
    """
    ignored = {"accumulation_steps"} | (set() if is_batch_coupled else {"micro_batch_size"})
    # Hyperband's bookkeeping: the bracket and round change nothing, the epochs and the weights to start from do.
    ignored |= {"tuner/bracket", "tuner/round"}
    kept = {name: value for name, value in values.items() if name not in ignored}
    return json.dumps(kept, sort_keys=True, default=repr)
