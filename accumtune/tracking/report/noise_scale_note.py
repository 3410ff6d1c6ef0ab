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
# The scale is an order of magnitude: only what is further off contradicts it.
_AGREEMENT = 4.0


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

    def advice(self, best: Any | None = None) -> str:
        """What it says about the effective batch; where the best candidate contradicts it, which of both to believe.

        Training at an effective batch B takes 1 + noise scale / B times the fewest updates (McCandlish 2018).
        """
        measured = f"The gradient noise scale was about {self} samples (trial {self.trial_id}, median of its epochs)"
        effective = getattr(best, "effective_batch_size", None)
        if effective and effective < self.samples / _AGREEMENT:
            return (
                f"{measured}, but the best effective batch was {effective}. Believe the search: the number of epochs "
                "is fixed, and small batches make more updates in it."
            )
        if effective and effective > self.samples * _AGREEMENT:
            return (
                f"{measured}, but the best effective batch was {effective}. Believe the search: the scale is an "
                "estimate from one training, and knows nothing of the learning rate."
            )
        return (
            f"{measured}: beyond an effective batch of that size more accumulation buys little, twice the batch saving "
            "less than a quarter of the updates."
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
