"""Interpolates and extrapolates measured peaks: one curve for one micro-step per update, one for several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from accumtune.errors import BudgetTooSmallError
from accumtune.memory.prediction.measurement import Measurement
from accumtune.memory.prediction.monotone_curve import Curve, curves_of, curves_with_room
from accumtune.memory.prediction.window_bytes import WindowBytes

# Above this share of a limit a peak says little about what was asked for: TensorFlow's allocator does not split a free
# chunk of less than twice the requested size, and counts all of it (a model with a large embedding: 114 MiB of 117 for
# every micro-batch from 102 to 123).
CROWDED = 0.9
# A peak of which a loss over the whole window takes a larger share says little of what is beside it.
_OF_THE_LOSS = 0.5


def group_of(accumulation_steps: int) -> int:
    """Returns the group with equal peaks: 1 step has no accumulators; from 2 on, all steps are alike."""
    return min(accumulation_steps, 2)


class MeasuredPeaks:
    """The curves through measured peaks.

    Args:
        measurements: the points.
        window: what a whole window takes beside its micro-batches.

    Attributes:
        points: the peaks in bytes by (micro-batch size, group), without the window's data and without crowded ones.
    """

    def __init__(self, measurements: Sequence[Measurement], window: WindowBytes) -> None:
        self._window = window
        peaks: dict[int, dict[int, float]] = {}
        statics: dict[int, float] = {}
        uncertain: dict[int, float] = {}
        crowded: dict[int, set[int]] = {}
        for point in measurements:
            if point.peak_memory_bytes is not None:
                size, group = point.micro_batch_size, group_of(point.accumulation_steps)
                beside = window.beside(size, point.accumulation_steps)
                at_once = window.at_once(size * point.accumulation_steps)
                is_of_the_loss = at_once > max(2 * beside, _OF_THE_LOSS * point.peak_memory_bytes)
                if is_of_the_loss and point.accumulation_steps > group:
                    continue  # with fewer samples at once, such a micro-batch needs less
                above = peaks.setdefault(group, {})
                above[size] = max(above.get(size, 0.0), float(point.peak_memory_bytes - beside))
                if point.memory_limit_bytes and point.peak_memory_bytes > CROWDED * point.memory_limit_bytes:
                    crowded.setdefault(group, set()).add(size)
                static = float(point.peak_memory_bytes - at_once)
                if not is_of_the_loss:
                    statics[group] = min(statics.get(group, np.inf), static)
                uncertain[group] = max(uncertain.get(group, 0.0), static)
        statics = {group: statics.get(group, uncertain[group]) for group in peaks}
        self.points = {
            (size, group): peak
            for group, sizes in peaks.items()
            for size, peak in sizes.items()
            if size not in crowded.get(group, ())
        }
        # Peaks as measured, crowded or not; and peaks with memory to spare.
        self._taken = curves_of(peaks, statics)
        self._curves = curves_with_room(peaks, crowded, statics)

    def __bool__(self) -> bool:
        """Whether anything has run."""
        return bool(self._curves)

    def static(self, accumulation_steps: int) -> float:
        """Returns the memory without any sample, in bytes."""
        return self._known(self._curves, accumulation_steps)[-1].static

    @property
    def doubt(self) -> float:
        """Bytes per sample by which a curve may be steeper beyond its last point."""
        return max((curve.doubt for curve in self._curves.values()), default=0.0)

    def with_room(self, micro_batch_size: int, accumulation_steps: int) -> int:
        """Returns the peak in bytes with memory to spare.

        Raises:
            BudgetTooSmallError: nothing has been measured that fits.
        """
        return self._at(self._curves, micro_batch_size, accumulation_steps)

    def needed(self, micro_batch_size: int, accumulation_steps: int) -> int:
        """Returns the bytes that a limit must leave, including what a crowded allocator counted too much."""
        return max(self._at(known, micro_batch_size, accumulation_steps) for known in (self._curves, self._taken))

    def _at(self, known: Mapping[int, Curve], micro_batch_size: int, accumulation_steps: int) -> int:
        if not known:
            raise BudgetTooSmallError(
                "Received a profile in which every probe ran out of memory.",
                "at least one micro-batch size that ran.",
                "probe a smaller micro-batch, or under a larger budget.",
            )
        curves = self._known(known, accumulation_steps)
        beside = self._window.beside(micro_batch_size, accumulation_steps)
        at_once = self._window.at_once(micro_batch_size * accumulation_steps)
        running = max(curve.at(micro_batch_size) for curve in curves) + beside
        return int(np.ceil(max(running, curves[-1].static + at_once)))

    def _known(self, known: Mapping[int, Curve], accumulation_steps: int) -> list[Curve]:
        """Returns the curves whose maximum is the peak: several micro-steps never need less than one."""
        curves = [known[group] for group in known if group <= group_of(accumulation_steps)]
        return curves or [known[min(known)]]
