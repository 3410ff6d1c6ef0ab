"""Compares, in one line, the best configuration with the best one that needs no accumulation."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from accumtune.tracking.report.candidate_tables import CandidateLike, number, ordered, size, speed


def accumulation_gain(candidates: Iterable[CandidateLike], best: CandidateLike, name: str, direction: str) -> str:
    """Returns a line that compares both in objective, memory and speed.

    Args:
        candidates: all within the budget, trained and untrained.
        best: the one to train with.
        name, direction: of the objective.
    """
    in_one_pass = [item for item in candidates if item.accumulation_steps == 1 and _is_number(item.objective)]
    other = next(iter(ordered(in_one_pass, direction)), None)
    if best.accumulation_steps == 1 or any(_is_same_training(item, best) for item in in_one_pass):
        return f"Accumulation is not needed: the best effective batch, {best.effective_batch_size}, fits in one pass."
    if other is None:
        return "Nothing to compare accumulation with: no effective batch that was trained fits in one pass."
    gain = f"{name} {number(best.objective)} with {_described(best)}"
    rest = f"{number(other.objective)} with {_described(other)}"
    if not _is_better(best, other, direction):
        return f"Accumulation won nothing in {name}: {rest}, without it; {gain}."
    return f"What accumulation won: {gain}; the best without it: {rest}."


def _described(item: CandidateLike) -> str:
    costs = f"{size(item.peak_memory_bytes)}, {speed(item.throughput_samples_per_second)} samples/s"
    return f"{item.effective_batch_size} = {item.micro_batch_size} × {item.accumulation_steps} ({costs})"


def _is_same_training(item: CandidateLike, best: CandidateLike) -> bool:
    return (item.trial_id, item.effective_batch_size) == (best.trial_id, best.effective_batch_size)


def _is_better(one: CandidateLike, other: CandidateLike, direction: str) -> bool:
    first, second = float(one.objective or 0.0), float(other.objective or 0.0)
    return first > second if direction == "max" else first < second


def _is_number(value: Any) -> bool:
    return value is not None and math.isfinite(value)
