"""Predicts peak memory and throughput of every micro-batch size from measured points. Pure arithmetic.

The peak memory of a step is the larger of two moments: the update (parameters, slots and gradients: the same for every
micro-batch) and the end of a forward pass (parameters, slots and the activations of one micro-batch: a line). So
`peak = max(update floor, static + slope * micro-batch)`, which is convex. With more than one micro-step per update the
accumulators are added, so one and several micro-steps have a curve each; these differ by a constant and share their
slope. The data of the whole window are added to the curve while the window runs, and twice while they are split into
micro-batches.

Between measured sizes the curve is a chord, which is above a convex curve. Beyond the last size it continues at one
slope, fitted to all points off the floor. Measured peaks are reproduced, except for those near their limit
(`peaks.CROWDED`), which are only upper bounds.

If the probes have recorded their requests to the allocator (TensorFlow on a CPU), no curve is needed: the step is
rehearsed in the simulated allocator (`accumtune.memory.cpu_simulation`, `simulated_peaks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np

from accumtune.errors import BudgetError
from accumtune.memory.budget import format_bytes, parse_budget
from accumtune.memory.cpu_simulation import ORDERS, Rehearsal, Trace
from accumtune.memory.prediction.measurement import Measurement
from accumtune.memory.prediction.peaks import MeasuredPeaks, group_of
from accumtune.memory.prediction.simulated_peaks import RehearsedPeaks
from accumtune.memory.prediction.step_time import fit_seconds
from accumtune.memory.prediction.window_bytes import NO_LOSS, WindowBytes

__all__ = ["Measurement", "Profile"]

MIB = 2**20

# How far a limit must be above the predicted peak if nothing has run under it. (TensorFlow 2.21 on a CPU, one region:
# a step's peak differs by up to 4 % from process to process, and a nearly full allocator needs a few percent more than
# one with room.) Beyond the largest measured size, the slope's error is added.
MARGIN = 0.06
MARGIN_PER_DOUBLING = 0.03
# The same for a rehearsed step, whose operations may run in another order and whose Python frees at other moments.
REHEARSED_MARGIN = 0.045
REHEARSED_PER_DOUBLING = 0.01
# A size is confirmed under a limit that is lower by this share, so that it runs the next time too.
HEADROOM = 0.02
# No size beyond this multiple of the largest measured one is predicted to fit: a floor can hide a slope.
LARGEST_EXTRAPOLATION = 4
_LISTS: dict[str, Any] = {"measurements": Measurement, "traces": Trace, "estimates": Measurement}


@dataclass(frozen=True)
class Profile:
    """Predicts the cost of a model's training step from a few measured points.

    Args:
        measurements: the points.
        device: its name.
        memory_source: what measured the bytes.
        signature: identifies the model's memory use; profiles are cached by it.
        memory_budget_bytes: the limit that the probes ran under, if any.
        sample_bytes: the bytes of one sample's data (inputs, targets and weight) if the data of a whole window are on
            the device at once, as a pipeline's batches are; 0 if each micro-step takes its samples from arrays.
        loss_bytes: the bytes per sample, per pair and per triple of samples that a loss over the whole effective batch
            needs between the two passes, outputs and targets included; zeros for other losses.
        validation_bytes: what such a loss of validation's samples needs, their data included.
        traces: the probes' requests to the allocator, a trace per micro-batch size, where they were recorded.
        estimates: points below the smallest measured size that were not measured (`similar_profile`).
    """

    measurements: tuple[Measurement, ...]
    device: str
    memory_source: str
    signature: str = ""
    memory_budget_bytes: int | None = None
    sample_bytes: int = 0
    loss_bytes: tuple[float, ...] = NO_LOSS
    validation_bytes: int = 0
    traces: tuple[Trace, ...] = ()
    estimates: tuple[Measurement, ...] = ()
    _peaks: MeasuredPeaks = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in (*_LISTS, "loss_bytes"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        object.__setattr__(self, "_peaks", MeasuredPeaks(self._points, self.window))

    @cached_property
    def window(self) -> WindowBytes:
        """What a whole window takes beside its micro-batches."""
        return WindowBytes(self.sample_bytes, self.loss_bytes, self.validation_bytes)

    @cached_property
    def _rehearsal(self) -> Rehearsal | None:
        return Rehearsal(self.traces) if self.is_rehearsed else None

    @cached_property
    def _rehearsed(self) -> RehearsedPeaks | None:
        if self._rehearsal is None:
            return None
        traced_sizes = {trace.micro_batch_size for trace in self.traces}
        return RehearsedPeaks(self._rehearsal, traced_sizes, self._peaks, self.window)

    def __repr__(self) -> str:
        sizes = ", ".join(str(size) for size in self.measured_sizes()) or "nothing"
        budget = "none" if self.memory_budget_bytes is None else format_bytes(self.memory_budget_bytes)
        return (
            f"Profile(device={self.device!r}, memory_source={self.memory_source!r}, memory_budget={budget}, "
            f"measured_micro_batch_sizes=({sizes}))"
        )

    # Memory

    def predict_peak_memory(
        self, micro_batch_size: int, accumulation_steps: int = 1, memory_budget: int | float | str | None = None
    ) -> int:
        """Returns the expected peak in bytes, without a margin.

        Args:
            micro_batch_size: any size.
            accumulation_steps: micro-steps per update.
            memory_budget: the limit of the training, `"2GiB"` or bytes: near it, TensorFlow's allocator counts more
                than was asked for. None: with memory to spare.

        Raises:
            BudgetTooSmallError: every probe ran out of memory.
        """
        limit = None if memory_budget is None else parse_budget(memory_budget)
        within = None if limit is None else self._peak_within(micro_batch_size, accumulation_steps, limit)
        return within or self._peak_with_room(micro_batch_size, accumulation_steps)

    def _peak_within(self, micro_batch_size: int, accumulation_steps: int, limit_bytes: int) -> int | None:
        """Returns the peak as measured under that limit, or else as rehearsed under it; None if neither is known."""
        group = group_of(accumulation_steps)
        window = self.window.beside(micro_batch_size, accumulation_steps)
        measured = {
            point.accumulation_steps:
                point.peak_memory_bytes + window - self.window.beside(micro_batch_size, point.accumulation_steps)
            for point in self.measurements
            if (point.micro_batch_size, group_of(point.accumulation_steps)) == (micro_batch_size, group)
            and point.memory_limit_bytes == limit_bytes and point.peak_memory_bytes is not None
        }  # fmt: skip
        if accumulation_steps in measured or not self.window.has_loss:
            known = max(measured.values(), default=None)
        else:
            small = [peak for steps, peak in measured.items() if not self.is_peak_of_the_loss(micro_batch_size, steps)]
            known = max([*small, self._moment_peak(micro_batch_size, accumulation_steps)]) if small else None
        if known is not None or self._rehearsed is None:
            return known
        within = self._rehearsed.within(micro_batch_size, accumulation_steps, limit_bytes)
        return within and max(within, self._moment_peak(micro_batch_size, accumulation_steps))

    def _peak_with_room(self, micro_batch_size: int, accumulation_steps: int) -> int:
        if self._rehearsed is None or not self._peaks:
            return self._peaks.with_room(micro_batch_size, accumulation_steps)
        running = self._peaks.points.get((micro_batch_size, group_of(accumulation_steps)))
        if running is None:
            running = self._rehearsed.with_room(micro_batch_size, accumulation_steps)
        window = self.window.beside(micro_batch_size, accumulation_steps)
        return max(int(np.ceil(running + window)), self._moment_peak(micro_batch_size, accumulation_steps))

    def largest_rehearsed(self, accumulation_steps: int, limit_bytes: float, highest: int) -> int:
        """Returns the largest size up to `highest` expected to run under a limit, without a margin; 0 for none."""
        assert self._rehearsed is not None
        smallest = min(highest, max(1, self.bracket(accumulation_steps, int(limit_bytes))[0]))
        return self._rehearsed.largest(accumulation_steps, limit_bytes, smallest, highest)

    @property
    def is_rehearsed(self) -> bool:
        """Whether peaks are predicted by the simulated allocator instead of curves."""
        return len(self.traces) > 1

    @property
    def shows_slope(self) -> bool:
        """Whether two sizes are known, measured or estimated."""
        return len(self.measured_sizes()) > 1 or bool(self.estimates)

    @property
    def is_straight(self) -> bool:
        """Whether the measured points show the slope at which the peak grows."""
        return len(self.measured_sizes()) > 1 and self._peaks.doubt == 0

    def needed_bytes(self, micro_batch_size: int, accumulation_steps: int) -> int:
        """Returns the bytes that a limit must leave, without a margin."""
        if self.is_rehearsed:
            return self.predict_peak_memory(micro_batch_size, accumulation_steps)
        return self._peaks.needed(micro_batch_size, accumulation_steps)

    def margin_bytes(self, micro_batch_size: int, accumulation_steps: int = 1) -> int:
        """Returns how many bytes a limit must be above the predicted peak for the step to run under it.

        That is 6 %, plus 1 MiB because limits are whole MiB, plus what a step took beyond its prediction under a limit.
        Beyond the largest measured size it is 3 % more for each doubling, plus what a slope could add that the points
        do not show yet. For a rehearsed step it is 4.5 %, and 1 % for each doubling.
        """
        predicted = self.predict_peak_memory(micro_batch_size, accumulation_steps)
        needed = self.needed_bytes(micro_batch_size, accumulation_steps)
        largest = self.measured_sizes()[-1]
        doublings = max(0.0, float(np.log2(micro_batch_size / largest)))
        if self.is_rehearsed:
            return int(MIB + predicted * (REHEARSED_MARGIN + REHEARSED_PER_DOUBLING * doublings))
        doubt = self._peaks.doubt * max(0, micro_batch_size - largest)
        return int(MIB + needed - predicted + needed * (MARGIN + MARGIN_PER_DOUBLING * doublings) + doubt)

    def fits(self, micro_batch_size: int, accumulation_steps: int, budget_bytes: int) -> bool:
        """Returns whether a step runs under a limit of `budget_bytes`, as measured, or as predicted with a margin."""
        samples = micro_batch_size * accumulation_steps
        if any(
            self.is_peak_of_the_loss(point.micro_batch_size, point.accumulation_steps)
            and (_samples_of(point) <= samples or self.window.is_most_in_validation(_samples_of(point)))
            for point in self._failures(budget_bytes)
        ):
            return False  # a smaller micro-batch would not help
        _, failed = self.bracket(accumulation_steps, budget_bytes, samples)
        # After a failure, predictions above the largest size that has run are not trusted.
        if failed is not None:
            largest_that_ran = self._largest_that_ran(group_of(accumulation_steps))
            if micro_batch_size > min(largest_that_ran, failed - 1):
                return False
        # Without the window's data on the device, or if validation takes more, all steps from the second on are alike.
        is_window = self.window.is_kept and not self.is_peak_of_validation(micro_batch_size, accumulation_steps)
        steps = accumulation_steps if is_window else group_of(accumulation_steps)
        for point in self.measurements:
            is_larger = point.micro_batch_size >= micro_batch_size and point.accumulation_steps >= steps
            if is_larger and point.has_run_within(budget_bytes):
                return True
        if not self._peaks or micro_batch_size > LARGEST_EXTRAPOLATION * self.measured_sizes()[-1]:
            return False
        predicted = self.predict_peak_memory(micro_batch_size, accumulation_steps)
        if predicted + self.margin_bytes(micro_batch_size, accumulation_steps) > budget_bytes:
            return False
        # Free memory may be fragmented: ask the simulated allocator.
        limit = (1 - REHEARSED_MARGIN) * budget_bytes
        if not self.is_rehearsed:
            return True
        return self.largest_rehearsed(accumulation_steps, limit, micro_batch_size) == micro_batch_size

    def largest_micro_batch_size(
        self, budget: int | float | str | None = None, accumulation_steps: int = 1
    ) -> int | None:
        """Returns the largest micro-batch size, any integer, that runs under a limit of `budget`.

        Args:
            budget: `"2GiB"` or bytes; default: the one that the profile was measured under.
            accumulation_steps: micro-steps per update.

        Returns:
            At most four times the largest measured size; `None` if not even 1 fits.

        Raises:
            BudgetError: there is no budget, or it cannot be read.
        """
        budget_bytes = parse_budget(budget) if budget is not None else self.memory_budget_bytes
        if budget_bytes is None:
            raise BudgetError(
                "Received budget=None, and the profile was measured without one.",
                'a budget such as "2GiB"',
                'call largest_micro_batch_size("2GiB").',
            )
        fitting, failing = 0, 1
        while self.fits(failing, accumulation_steps, budget_bytes):
            fitting, failing = failing, failing * 2
        while failing - fitting > 1:
            middle = (fitting + failing) // 2
            if self.fits(middle, accumulation_steps, budget_bytes):
                fitting = middle
            else:
                failing = middle
        return fitting or None

    def is_extrapolated(self, micro_batch_size: int) -> bool:
        """Returns whether a size is outside the range of the measured ones."""
        sizes = self.measured_sizes()
        return not sizes or not sizes[0] <= micro_batch_size <= sizes[-1]

    def bracket(
        self, accumulation_steps: int, budget_bytes: int, samples: int | None = None
    ) -> tuple[int, int | None]:
        """Returns the largest size that has run under the budget (0: none) and the smallest that has failed.

        Args:
            samples: the effective batch in question. A failure with more samples does not count if the window was too
                large, and not its micro-batch. None: each size's own, with so many steps.
        """
        group, ran, failed = group_of(accumulation_steps), 0, None
        for point in self.measurements:
            if point.is_feasible and group_of(point.accumulation_steps) >= group and point.has_run_within(budget_bytes):
                ran = max(ran, point.micro_batch_size)
        for point in self._failures(budget_bytes):
            is_larger = _samples_of(point) > (samples or point.micro_batch_size * accumulation_steps)
            if group_of(point.accumulation_steps) <= group and not (is_larger and self._is_of_the_window(point)):
                failed = min(failed or point.micro_batch_size, point.micro_batch_size)
        return ran, failed

    def _failures(self, budget_bytes: int) -> list[Measurement]:
        """Returns what ran out of the budget, or of a slightly lower limit."""
        least = (1 - HEADROOM) * budget_bytes - MIB
        limits = [(point, point.memory_limit_bytes) for point in self.measurements if not point.is_feasible]
        return [point for point, limit in limits if limit is None or limit >= least]

    def is_peak_of_the_loss(self, micro_batch_size: int, accumulation_steps: int) -> bool:
        """Returns whether the peak is that of a loss over the whole window, which is the same for any micro-batch."""
        if not self.window.has_loss or not self._peaks:
            return False
        at_once = self._moment_peak(micro_batch_size, accumulation_steps)
        return self._peak_with_room(micro_batch_size, accumulation_steps) <= at_once

    def is_peak_of_validation(self, micro_batch_size: int, accumulation_steps: int) -> bool:
        """Returns whether the peak is that of a loss over a batch of validation, which is the same for any pair."""
        if not self.window.is_most_in_validation(micro_batch_size * accumulation_steps) or not self._peaks:
            return False
        at_once = self._moment_peak(micro_batch_size, accumulation_steps)
        return self._peak_with_room(micro_batch_size, accumulation_steps) <= (1 + MARGIN) * at_once

    def is_failure_of_the_loss(self, failed: Measurement) -> bool:
        """Returns whether a pair ran out of memory for its loss over the whole window, whatever its micro-batch."""
        pair = failed.micro_batch_size, failed.accumulation_steps
        is_most = 2 * self.window.of_the_loss(_samples_of(failed)) > self.predict_peak_memory(*pair)
        return self.is_peak_of_the_loss(*pair) or is_most and self._is_of_the_window(failed)

    def _is_of_the_window(self, failed: Measurement) -> bool:
        """Returns whether the micro-batch of a failure has run, or would run, in a smaller window."""
        if not self.window.is_kept:
            return False
        group = group_of(failed.accumulation_steps)
        return self.is_peak_of_the_loss(failed.micro_batch_size, failed.accumulation_steps) or any(
            point.micro_batch_size >= failed.micro_batch_size
            and group_of(point.accumulation_steps) >= group
            and _samples_of(point) < _samples_of(failed)
            and failed.memory_limit_bytes is not None
            and point.has_run_within(failed.memory_limit_bytes)
            for point in self.measurements
        )

    def _moment_peak(self, micro_batch_size: int, accumulation_steps: int) -> int:
        at_once = self.window.at_once(micro_batch_size * accumulation_steps)
        return int(np.ceil(self._peaks.static(accumulation_steps) + at_once))

    def _largest_that_ran(self, group: int) -> int:
        """Returns the largest size that ran with as many accumulators, or more."""
        ran = [m for m in self.measurements if m.is_feasible and group_of(m.accumulation_steps) >= group]
        return max((measurement.micro_batch_size for measurement in ran), default=0)

    def measured_sizes(self) -> list[int]:
        """Returns the micro-batch sizes that ran, in ascending order."""
        return sorted({m.micro_batch_size for m in self.measurements if m.is_feasible})

    def static_bytes(self, accumulation_steps: int) -> float:
        """Returns the memory without any sample."""
        return self._peaks.static(accumulation_steps)

    @property
    def _points(self) -> list[Measurement]:
        """The measurements, and the estimates below them."""
        smallest = min(self.measured_sizes(), default=0)
        return [*self.measurements, *(e for e in self.estimates if e.micro_batch_size < smallest)]

    # Speed

    def predict_throughput(self, micro_batch_size: int, accumulation_steps: int = 1) -> float:
        """Returns samples per second.

        An update takes `accumulation_steps * s(micro_batch_size) + u` seconds: s for a micro-step, u for the update.
        """
        seconds_per_update, micro_step = fit_seconds(self._points)
        seconds = accumulation_steps * micro_step.at(micro_batch_size) + seconds_per_update
        return micro_batch_size * accumulation_steps / max(seconds, 1e-9)

    # Growing

    def with_measurement(self, measurement: Measurement) -> Profile:
        """Returns the profile with one more point. A point that is measured again keeps its higher peak."""
        kept = []
        for known in self.measurements:
            if _key(known) != _key(measurement):
                kept.append(known)
            elif known.peak_memory_bytes is not None and measurement.peak_memory_bytes is not None:
                peak = max(known.peak_memory_bytes, measurement.peak_memory_bytes)
                seconds = measurement.seconds_per_update or known.seconds_per_update
                measurement = replace(measurement, peak_memory_bytes=peak, seconds_per_update=seconds)
        grown = replace(self, measurements=(*kept, measurement))
        if "_rehearsal" in self.__dict__:  # of the same traces
            grown.__dict__["_rehearsal"] = self._rehearsal
        return grown

    def with_trace(self, trace: Trace) -> Profile:
        """Returns the profile with one more trace, without those of smaller sizes that are no longer needed."""
        others = (known for known in self.traces if known.micro_batch_size != trace.micro_batch_size)
        known = sorted([*others, trace], key=lambda each: each.micro_batch_size)
        return replace(self, traces=tuple(known[-ORDERS - 1 :]))

    # Files

    def to_dict(self) -> dict[str, Any]:
        return {
            **{name: [each.to_dict() for each in getattr(self, name)] for name in _LISTS},
            **{f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name not in _LISTS},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Profile:
        rest = {key: value for key, value in values.items() if key not in _LISTS}
        lists = {name: tuple(map(kind.from_dict, values.get(name, ()))) for name, kind in _LISTS.items()}
        return cls(**{**rest, **lists})


def _key(measurement: Measurement) -> tuple[int, int, bool]:
    return measurement.micro_batch_size, measurement.accumulation_steps, measurement.is_feasible


def _samples_of(measurement: Measurement) -> int:
    return measurement.micro_batch_size * measurement.accumulation_steps
