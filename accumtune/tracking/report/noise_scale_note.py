"""Explains, in one line, what the measured gradient noise scale means for the effective batch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import median
from typing import Any

from accumtune.tracking.records import SearchRecord, TrialRecord

# What `accumtune.accumulation.callbacks.GradientNoiseScale` logs.
NOISE_SCALE = "gradient_noise_scale"
# The scale is an order of magnitude: only a best batch that differs by more than this factor contradicts it.
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
        """Returns what the noise scale means for the effective batch, or why the best candidate contradicts it.

        Training at an effective batch B takes 1 + noise scale / B times the fewest updates (McCandlish et al. 2018).
        """
        measured = f"The gradient noise scale was about {self} samples (trial {self.trial_id}, median of its epochs)"
        effective = getattr(best, "effective_batch_size", None)
        if effective and effective < self.samples / _AGREEMENT:
            return (
                f"{measured}, but the best effective batch was {effective}. Trust the search: with the number of "
                "epochs fixed, small batches make more updates."
            )
        if effective and effective > self.samples * _AGREEMENT:
            return (
                f"{measured}, but the best effective batch was {effective}. Trust the search: the noise scale is an "
                "estimate from one training, and does not take the learning rate into account."
            )
        return (
            f"{measured}. Larger effective batches gain little: doubling them saves at most a quarter of the updates."
        )


def noise_scale_of(record: SearchRecord, best: Any | None) -> NoiseScale | None:
    """Returns the noise scale of the best candidate's trial, or else of the best trial that has one; or None."""
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
