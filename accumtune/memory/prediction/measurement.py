"""One point of a profile: what was measured, where, and under which limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """What one micro-batch size and number of accumulation steps cost, in one process.

    Args:
        micro_batch_size: samples per micro-step.
        accumulation_steps: micro-steps per update.
        peak_memory_bytes: the most the device held; `None` where it ran out of memory.
        seconds_per_update: wall time of an update after the first; `None` where it was not timed.
        memory_source: who counted the bytes.
        memory_limit_bytes: the limit it ran under; `None` for none.
        compile_peak_memory_bytes: the most the device held while programs were compiled and algorithms chosen, where
            that is not in the peak; `None` where nothing is taken for it, or nobody could tell.
    """

    micro_batch_size: int
    accumulation_steps: int
    peak_memory_bytes: int | None
    seconds_per_update: float | None
    memory_source: str
    memory_limit_bytes: int | None = None
    compile_peak_memory_bytes: int | None = None

    @property
    def is_feasible(self) -> bool:
        """Whether it ran; otherwise it ran out of memory."""
        return self.peak_memory_bytes is not None

    def has_run_within(self, budget_bytes: int) -> bool:
        """Whether it ran where no more than the budget was to be had (or, without limits, was taken)."""
        if self.peak_memory_bytes is None or self.memory_limit_bytes is None:
            return False
        return max(self.peak_memory_bytes, self.memory_limit_bytes) <= budget_bytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        return cls(**values)
