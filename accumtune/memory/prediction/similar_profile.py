"""Estimates what a model takes from the profile of another architecture of the same search. Pure arithmetic.

Where each trial of a search has another width or depth, one probe of a model can be enough: at the largest micro-batch
that should fit. What it takes without any sample (parameters, slots, gradients) is in proportion to its parameters, as
for the other model; the rest of the measured peak grows with the micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from accumtune.memory.prediction.exploration import CLEAR_ROOM
from accumtune.memory.prediction.measurement import Measurement
from accumtune.memory.prediction.profile import MARGIN, MIB, Profile


@dataclass(frozen=True)
class SimilarProfile:
    """A profile of another architecture.

    Args:
        profile: with at least two measured sizes.
        growth: bytes of this model's parameters to those of the other's.
        activation_growth: the same of all layers' outputs; None or 0 if unknown.
    """

    profile: Profile
    growth: float
    activation_growth: float | None = None

    def distance(self) -> float:
        """Returns how far apart the models are in size."""
        return sum(abs(math.log(ratio)) for ratio in (self.growth, self.activation_growth) if ratio)

    def first_probe_size(self, budget_bytes: int, micro_batch_sizes: Sequence[int]) -> int:
        """Returns the largest size that should fit and has not failed for the other model, or the smallest of all."""
        steps = max(point.accumulation_steps for point in self.profile.measurements)
        static = self.profile.static_bytes(steps)
        _, failed = self.profile.bracket(steps, budget_bytes)
        slope_growth, room = self.activation_growth, 1 + MARGIN
        if not slope_growth:  # activations seldom grow faster than the parameters
            slope_growth, room = max(1.0, self.growth), CLEAR_ROOM

        def fits(size: int) -> bool:
            samples = self.profile.needed_bytes(size, steps) - static
            if failed is not None and size >= failed:
                return False
            return room * (self.growth * static + slope_growth * samples) + MIB <= budget_bytes

        return max(filter(fits, micro_batch_sizes), default=min(micro_batch_sizes))

    def estimates(self, profile: Profile, micro_batch_size: int) -> tuple[Measurement, ...]:
        """Returns what a size below the only measured one should take, for each number of steps.

        Empty if that size has run, or the measured peak contradicts the assumption.
        """
        points = [point for point in profile.measurements if point.is_feasible]
        is_smaller = micro_batch_size < points[0].micro_batch_size
        if not is_smaller or any((point.peak_memory_bytes or 0) < self._static(point) for point in points):
            return ()
        return tuple(
            replace(
                point,
                micro_batch_size=micro_batch_size,
                peak_memory_bytes=int(self._peak_at(micro_batch_size, point)),
                seconds_per_update=self._seconds_at(micro_batch_size, point),
                memory_source="estimate",
                memory_limit_bytes=None,
            )
            for point in points
        )

    def _static(self, point: Measurement) -> float:
        return self.growth * self.profile.static_bytes(point.accumulation_steps)

    def _peak_at(self, size: int, point: Measurement) -> float:
        """Returns the peak on the line from the memory without samples through a measured point."""
        static = self._static(point)
        return static + ((point.peak_memory_bytes or 0) - static) * size / point.micro_batch_size

    def _seconds_at(self, size: int, point: Measurement) -> float | None:
        """Returns the measured seconds of an update, scaled as the other model's from size to size."""
        if point.seconds_per_update is None:
            return None

        def seconds(at: int) -> float:
            return at / self.profile.predict_throughput(at, point.accumulation_steps)

        return point.seconds_per_update * seconds(size) / seconds(point.micro_batch_size)
