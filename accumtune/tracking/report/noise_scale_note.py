"""Says in one line what the measured gradient noise scale means for the effective batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from accumtune.tracking.records import SearchRecord, TrialRecord

# What `accumtune.accumulation.callbacks.GradientNoiseScale` logs.
NOISE_SCALE = "gradient_noise_scale"


@dataclass(frozen=True)
class NoiseScale:
    """The gradient noise scale of one trial.

    Args:
        samples: the median over its epochs; it grows while a model trains.
        trial_id: which trial.
    """

    samples: float
    trial_id: str

    def __str__(self) -> str:
        return f"{self.samples:,.0f}" if self.samples >= 10 else f"{self.samples:.2g}"

    def advice(self) -> str:
        """Training at an effective batch B takes 1 + noise scale / B times the fewest updates (McCandlish 2018)."""
        return (
            f"The gradient noise scale was about {self} samples (trial {self.trial_id}, median of its epochs): beyond "
            "an effective batch of that size more accumulation buys little, twice the batch saving less than a quarter "
            "of the updates."
        )


def noise_scale_of(record: SearchRecord, best: Any | None) -> NoiseScale | None:
    """That of the best candidate's trial, or of the best trial that could measure it; None without any."""
    sign = -1 if record.objective_direction == "max" else 1

    def order(trial: TrialRecord) -> tuple[bool, float]:
        is_best = best is not None and trial.trial_id == best.trial_id
        return not is_best, math.inf if trial.objective_value is None else sign * trial.objective_value

    for trial in sorted(record.with_status("completed"), key=order):
        known = list(_finite(epoch.logs.get(NOISE_SCALE) for epoch in trial.epochs))
        if known:
            return NoiseScale(median(known), trial.trial_id)
    return None


def _finite(values: Iterable[float | None]) -> Iterable[float]:
    return (value for value in values if value is not None and math.isfinite(value) and value > 0)
