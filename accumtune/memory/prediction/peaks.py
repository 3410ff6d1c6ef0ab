"""Interpolates measured peaks and goes beyond them: a curve for one micro-step per update, one for several."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from accumtune.errors import BudgetTooSmallError
from accumtune.memory.prediction.measurement import Measurement
from accumtune.memory.prediction.monotone_curve import Curve, curves_of, curves_with_room

# Above this share of a limit a peak says little of what was asked for: TensorFlow's allocator gives a free chunk of
# less than twice the size whole, and counts all of it (a model with a large embedding: 114 MiB of 117 for every
# micro-batch from 102 to 123).
CROWDED = 0.9


def group_of(accumulation_steps: int) -> int:
    """1 has no accumulators; with more, every further micro-step is like the second."""
    return min(accumulation_steps, 2)


class MeasuredPeaks:
    """The curves through measured peaks.

    Args:
        measurements: the points.
        window_bytes: the data of a whole window, by micro-batch size and accumulation steps.

    Attributes:
        points: the peak in bytes by (micro-batch size, group), without the window's data, where there was room.
    """

    def __init__(self, measurements: Sequence[Measurement], window_bytes: Callable[[int, int], int]) -> None:
        self._window_bytes = window_bytes
        peaks: dict[int, dict[int, float]] = {}
        statics: dict[int, float] = {}
        crowded: dict[int, set[int]] = {}
        for point in measurements:
            if point.peak_memory_bytes is not None:
                size, group = point.micro_batch_size, group_of(point.accumulation_steps)
                window = window_bytes(size, point.accumulation_steps)
                above = peaks.setdefault(group, {})
                above[size] = max(above.get(size, 0.0), float(point.peak_memory_bytes - window))
                if point.memory_limit_bytes and point.peak_memory_bytes > CROWDED * point.memory_limit_bytes:
                    crowded.setdefault(group, set()).add(size)
                statics[group] = min(statics.get(group, np.inf), float(point.peak_memory_bytes - 2 * window))
        self.points = {
            (size, group): peak
            for group, sizes in peaks.items()
            for size, peak in sizes.items()
            if size not in crowded.get(group, ())
        }
        # What a step takes as it was measured, under a limit or not, and where there is room.
        self._taken = curves_of(peaks, statics)
        self._curves = curves_with_room(peaks, crowded, statics)

    def __bool__(self) -> bool:
        """Whether anything has run."""
        return bool(self._curves)

    def static(self, accumulation_steps: int) -> float:
        """What there is without any sample, in bytes."""
        return self._known(self._curves, accumulation_steps)[-1].static

    @property
    def doubt(self) -> float:
        """Bytes per sample by which a curve may be steeper beyond its last point."""
        return max((curve.doubt for curve in self._curves.values()), default=0.0)

    def with_room(self, micro_batch_size: int, accumulation_steps: int) -> int:
        """The peak where memory is to spare.

        Raises:
            BudgetTooSmallError: nothing has been measured that fits.
        """
        return self._at(self._curves, micro_batch_size, accumulation_steps)

    def needed(self, micro_batch_size: int, accumulation_steps: int) -> int:
        """What a limit has to leave: also what was taken only because it was there, for nobody knows how much of it."""
        return max(self._at(known, micro_batch_size, accumulation_steps) for known in (self._curves, self._taken))

    def _at(self, known: Mapping[int, Curve], micro_batch_size: int, accumulation_steps: int) -> int:
        if not known:
            raise BudgetTooSmallError(
                "Received a profile in which every probe ran out of memory.",
                "at least one micro-batch size that ran.",
                "probe a smaller micro-batch, or under a larger budget.",
            )
        window = self._window_bytes(micro_batch_size, accumulation_steps)
        curves = self._known(known, accumulation_steps)
        running = max(curve.at(micro_batch_size) for curve in curves) + window
        return int(np.ceil(max(running, curves[-1].static + 2 * window)))

    def _known(self, known: Mapping[int, Curve], accumulation_steps: int) -> list[Curve]:
        """Several micro-steps never need less than one, whatever the noise of their measurements."""
        curves = [known[group] for group in known if group <= group_of(accumulation_steps)]
        return curves or [known[min(known)]]
