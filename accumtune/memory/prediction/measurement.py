"""Holds one measured point of a profile."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """The measured cost of one micro-batch size and number of accumulation steps, in one process.

    Args:
        micro_batch_size: samples per micro-step.
        accumulation_steps: micro-steps per update.
        peak_memory_bytes: the most that the device held; `None` if it ran out of memory.
        seconds_per_update: wall time of an update after the first; `None` if it was not timed.
        memory_source: what measured the bytes.
        memory_limit_bytes: the limit that it ran under; `None` for none.
        compile_peak_memory_bytes: the most that the device held while programs were compiled and algorithms chosen,
            which is not in the peak; `None` if nothing was needed for it, or that is unknown.
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
        """Returns whether it ran under a limit of at most the budget, and took no more than the budget."""
        if self.peak_memory_bytes is None or self.memory_limit_bytes is None:
            return False
        return max(self.peak_memory_bytes, self.memory_limit_bytes) <= budget_bytes

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        return cls(**values)
