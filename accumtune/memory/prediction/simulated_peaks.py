"""Predicts peaks with the simulated allocator, corrected by measured ones."""

from __future__ import annotations

from collections.abc import Set
from functools import cached_property

import numpy as np

from accumtune.memory.cpu_simulation import Rehearsal, largest_before_failure
from accumtune.memory.prediction.peaks import MeasuredPeaks, group_of
from accumtune.memory.prediction.window_bytes import WindowBytes

# What TensorFlow's allocator takes before anything trains.
SMALLEST_LIMIT_BYTES = 4 * 2**20
# A peak up to this share of a limit fits however fragmented memory is, and is not simulated.
AMPLE_SHARE = 0.25


class RehearsedPeaks:
    """Predicts peaks like `MeasuredPeaks`, from traces.

    Args:
        rehearsal: runs a step through the simulated allocator.
        traced_sizes: the micro-batch sizes of its traces.
        measured: the points.
        window: what a whole window takes beside its micro-batches.
    """

    def __init__(
        self,
        rehearsal: Rehearsal,
        traced_sizes: Set[int],
        measured: MeasuredPeaks,
        window: WindowBytes,
    ) -> None:
        self._rehearsal = rehearsal
        self._traced_sizes = traced_sizes
        self._measured = measured
        self._window = window

    def with_room(self, micro_batch_size: int, accumulation_steps: int) -> float:
        """Returns the peak in bytes with memory to spare, without the window's data."""
        group = group_of(accumulation_steps)
        return self._moved(micro_batch_size, group) + self._excess_bytes - self._window.beside(micro_batch_size, group)

    def within(self, micro_batch_size: int, accumulation_steps: int, limit_bytes: int) -> int | None:
        """Returns the peak in bytes under a limit, the window's data included; None if memory runs out."""
        group = group_of(accumulation_steps)
        beside = self._beside(micro_batch_size, accumulation_steps)
        if limit_bytes - beside <= SMALLEST_LIMIT_BYTES:
            return None
        rehearsed = self._rehearsal.peak_bytes(micro_batch_size, group, limit_bytes - beside)
        return None if rehearsed is None else rehearsed + beside

    def largest(self, accumulation_steps: int, limit_bytes: float, smallest: int, highest: int) -> int:
        """Returns the largest size from `smallest` to `highest` that is expected to run under a limit; 0 for none."""
        window = self._window.beside(highest, accumulation_steps)
        if self.with_room(highest, accumulation_steps) + window <= AMPLE_SHARE * limit_bytes:
            return highest

        def runs(size: int) -> bool:
            return self.within(size, accumulation_steps, int(limit_bytes)) is not None

        return largest_before_failure(runs, smallest, highest)

    def _beside(self, micro_batch_size: int, accumulation_steps: int) -> int:
        """Returns the bytes beside the rehearsed ones: data of further micro-steps, and the excess of real trials."""
        window = self._window.beside(micro_batch_size, accumulation_steps)
        return window - self._window.beside(micro_batch_size, group_of(accumulation_steps)) + self._excess_bytes

    def _moved(self, micro_batch_size: int, group: int) -> float:
        """Returns the rehearsed peak, corrected by the errors at the traced sizes, where the order was another."""
        traced, off = self._errors.get(group, ([1], [0.0]))
        rehearsed = self._rehearsal.peak_bytes(micro_batch_size, group) or 0
        return rehearsed + float(np.interp(micro_batch_size, traced, off))

    @cached_property
    def _errors(self) -> dict[int, tuple[list[int], list[float]]]:
        """Traced sizes, and measured minus rehearsed peaks at them, by group of accumulation steps."""
        errors: dict[int, tuple[list[int], list[float]]] = {}
        for size, group in sorted(self._measured.points):
            if size in self._traced_sizes:
                sizes, off = errors.setdefault(group, ([], []))
                sizes.append(size)
                measured = self._measured.points[size, group] + self._window.beside(size, group)
                off.append(measured - (self._rehearsal.peak_bytes(size, group) or 0))
        return errors

    @cached_property
    def _excess_bytes(self) -> int:
        """What real trials took beyond the rehearsed step, for example a callback's own variables."""
        excess = [0.0]
        for (size, group), peak in self._measured.points.items():
            # Not smaller sizes: their traces were dropped, and may have had another order.
            if size > min(self._traced_sizes) and size not in self._traced_sizes:
                excess.append(peak + self._window.beside(size, group) - self._moved(size, group))
        return int(max(excess))
