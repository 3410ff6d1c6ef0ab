"""Measured points -> peak memory and throughput of every other micro-batch size. Pure arithmetic.

Peak memory of a step is the larger of two moments: the update (parameters, slots, gradients: the same for every
micro-batch) and the end of a forward pass (parameters, slots and the activations of one micro-batch: a line), so
`peak = max(update floor, static + slope * micro-batch)`, which is convex. With more than one micro-step per
update the accumulators come on top, so that one and several micro-steps have a curve each; they differ by no more
than that constant, and lend each other their slope. The data of the whole window comes on top of the curve while
the window runs, and is there twice for a moment when it is cut into micro-batches.

Between measured sizes the curve is the chord, which is above a convex curve; beyond the last one it goes on at one
slope through all points off the floor. Measured peaks are reproduced, but for those near their limit (`CROWDED`),
which are no more than a bound.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from accumtune.errors import BudgetError, BudgetTooSmallError
from accumtune.memory.budget import format_bytes, parse_budget
from accumtune.memory.curve import Curve, curves_of, curves_with_room
from accumtune.memory.measurement import Measurement
from accumtune.memory.seconds import fit_seconds

__all__ = ["Measurement", "Profile"]

MIB = 2**20

# How far above the predicted peak a limit has to be, where nothing has run under it: TensorFlow 2.21 on a CPU, one
# region: the same step's peak differs by up to 4 % from process to process, and a nearly full allocator needs a few
# percent more than it hands out when it has room. Beyond the largest measured size the slope's error counts as well.
MARGIN = 0.06
MARGIN_PER_DOUBLING = 0.03
# Above this share of a limit a peak says little of what was asked for: TensorFlow's allocator gives a free chunk of
# less than twice the size whole, and counts all of it (a model with a large embedding: 114 MiB of 117 for every
# micro-batch from 102 to 123).
CROWDED = 0.9
# What is run to confirm that it fits runs under a limit lower by this share, so that it runs the next time too.
HEADROOM = 0.02
# No promise is made further than this beyond the largest measured size: a floor can hide a slope.
LARGEST_EXTRAPOLATION = 4
# Where the slope shows, the next probe may be this many times as large.
LARGEST_PROBE_STEP = 8
# A size closer than this to one that was measured teaches too little for the price of tracing it.
SMALLEST_PROBE_STEP = 1.2


@dataclass(frozen=True)
class Profile:
    """What a model's training step costs, from a few measured points.

    Args:
        measurements: the points.
        device: its name.
        memory_source: who counted the bytes.
        signature: what the memory depends on; profiles are cached by it.
        memory_budget_bytes: the limit the probes ran under, if any.
        sample_bytes: the bytes of one sample's data (inputs, targets and weight) where the data of a whole window is
            on the device at once, as batches of a pipeline are; 0 where each micro-step takes its rows from arrays.
    """

    measurements: tuple[Measurement, ...]
    device: str
    memory_source: str
    signature: str = ""
    memory_budget_bytes: int | None = None
    sample_bytes: int = 0
    # What a step takes as it was measured, under a limit or not, and where there is room.
    _taken: dict[int, Curve] = field(init=False, repr=False, compare=False, default_factory=dict)
    _curves: dict[int, Curve] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "measurements", tuple(self.measurements))
        peaks: dict[int, dict[int, float]] = {}
        statics: dict[int, float] = {}
        crowded: dict[int, set[int]] = {}
        for point in self.measurements:
            if point.peak_memory_bytes is not None:
                size, group = point.micro_batch_size, _group(point.accumulation_steps)
                window = self._window_bytes(size, point.accumulation_steps)
                above = peaks.setdefault(group, {})
                above[size] = max(above.get(size, 0.0), float(point.peak_memory_bytes - window))
                if point.memory_limit_bytes and point.peak_memory_bytes > CROWDED * point.memory_limit_bytes:
                    crowded.setdefault(group, set()).add(size)
                statics[group] = min(statics.get(group, np.inf), float(point.peak_memory_bytes - 2 * window))
        object.__setattr__(self, "_taken", curves_of(peaks, statics))
        object.__setattr__(self, "_curves", curves_with_room(peaks, crowded, statics))

    def __repr__(self) -> str:
        sizes = ", ".join(str(size) for size in self._measured_sizes()) or "nothing"
        budget = "none" if self.memory_budget_bytes is None else format_bytes(self.memory_budget_bytes)
        return (
            f"Profile(device={self.device!r}, memory_source={self.memory_source!r}, memory_budget={budget}, "
            f"measured_micro_batch_sizes=({sizes}))"
        )

    # Memory

    def predict_peak_memory(self, micro_batch_size: int, accumulation_steps: int = 1) -> int:
        """The expected peak in bytes where memory is to spare, without a margin.

        When hardly any is left of a limit, TensorFlow's allocator counts more, up to the limit.

        Raises:
            BudgetTooSmallError: nothing has been measured that fits.
        """
        return self._peak(self._curves, micro_batch_size, accumulation_steps)

    def _peak(self, known: Mapping[int, Curve], micro_batch_size: int, accumulation_steps: int) -> int:
        if not known:
            raise BudgetTooSmallError(
                "Received a profile in which every probe ran out of memory.",
                "at least one micro-batch size that ran.",
                "probe a smaller micro-batch, or under a larger budget.",
            )
        window = self._window_bytes(micro_batch_size, accumulation_steps)
        # Several micro-steps never need less than one, whatever the noise of their measurements.
        curves = [known[group] for group in known if group <= _group(accumulation_steps)]
        curves = curves or [known[min(known)]]
        running = max(curve.at(micro_batch_size) for curve in curves) + window
        return int(np.ceil(max(running, curves[-1].static + 2 * window)))

    def _needed(self, micro_batch_size: int, accumulation_steps: int) -> int:
        """What a limit has to leave: also what was taken only because it was there, for nobody knows how much of it."""
        return max(self._peak(known, micro_batch_size, accumulation_steps) for known in (self._curves, self._taken))

    def margin_bytes(self, micro_batch_size: int, accumulation_steps: int = 1) -> int:
        """How far above the predicted peak a limit has to be for the step to run under it.

        6 %, and 1 MiB because limits are whole MiB; what was taken beyond the prediction under a limit. Beyond the
        largest measured size, 3 % for each doubling, and what a slope could add that has only begun to show there.
        """
        predicted = self.predict_peak_memory(micro_batch_size, accumulation_steps)
        needed = self._needed(micro_batch_size, accumulation_steps)
        largest = self._measured_sizes()[-1]
        doublings = max(0.0, float(np.log2(micro_batch_size / largest)))
        doubt = max(curve.doubt for curve in self._curves.values()) * max(0, micro_batch_size - largest)
        return int(MIB + needed - predicted + needed * (MARGIN + MARGIN_PER_DOUBLING * doublings) + doubt)

    def fits(self, micro_batch_size: int, accumulation_steps: int, budget_bytes: int) -> bool:
        """Whether a step runs under a limit of `budget_bytes`: what was measured, else prediction and margin."""
        _, failed = self.bracket(accumulation_steps, budget_bytes)
        # Where it failed although it was predicted to fit, nothing is believed above what has run.
        if failed is not None:
            largest_that_ran = self._largest_that_ran(_group(accumulation_steps))
            if micro_batch_size > min(largest_that_ran, failed - 1):
                return False
        # Without a window of data on the device, every further micro-step is like the second.
        steps = accumulation_steps if self.sample_bytes else _group(accumulation_steps)
        for point in self.measurements:
            is_larger = point.micro_batch_size >= micro_batch_size and point.accumulation_steps >= steps
            if is_larger and point.has_run_within(budget_bytes):
                return True
        if not self._curves or micro_batch_size > LARGEST_EXTRAPOLATION * self._measured_sizes()[-1]:
            return False
        predicted = self.predict_peak_memory(micro_batch_size, accumulation_steps)
        return predicted + self.margin_bytes(micro_batch_size, accumulation_steps) <= budget_bytes

    def largest_micro_batch_size(
        self, budget: int | float | str | None = None, accumulation_steps: int = 1
    ) -> int | None:
        """The largest micro-batch size, any integer, that runs under a limit of `budget`.

        Args:
            budget: `"2GiB"` or bytes; by default the one the profile was measured under.
            accumulation_steps: micro-steps per update.

        Returns:
            At most four times the largest size that was measured; `None` where not even 1 fits.

        Raises:
            BudgetError: there is no budget, or it cannot be read.
        """
        budget_bytes = parse_budget(budget) if budget is not None else self.memory_budget_bytes
        if budget_bytes is None:
            raise BudgetError(
                "Received budget=None, and the profile was measured without one.",
                'a budget such as "2GiB"',
                'largest_micro_batch_size("2GiB")',
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
        """Whether a size is outside those that were measured."""
        sizes = self._measured_sizes()
        return not sizes or not sizes[0] <= micro_batch_size <= sizes[-1]

    def bracket(self, accumulation_steps: int, budget_bytes: int) -> tuple[int, int | None]:
        """The largest size that has run under the budget, 0 where none has, and the smallest that ran out of it."""
        group, ran, failed = _group(accumulation_steps), 0, None
        for point in self.measurements:
            limit = point.memory_limit_bytes
            if point.is_feasible:
                if _group(point.accumulation_steps) >= group and point.has_run_within(budget_bytes):
                    ran = max(ran, point.micro_batch_size)
            elif _group(point.accumulation_steps) <= group:
                # A failure under a slightly lower limit counts too: there is too little room above it.
                if limit is None or limit >= (1 - HEADROOM) * budget_bytes - MIB:
                    failed = min(failed or point.micro_batch_size, point.micro_batch_size)
        return ran, failed

    def _window_bytes(self, micro_batch_size: int, accumulation_steps: int) -> int:
        return self.sample_bytes * micro_batch_size * accumulation_steps

    def _largest_that_ran(self, group: int) -> int:
        """Of the sizes measured with as many accumulators, or more."""
        ran = [m for m in self.measurements if m.is_feasible and _group(m.accumulation_steps) >= group]
        return max((measurement.micro_batch_size for measurement in ran), default=0)

    def _measured_sizes(self) -> list[int]:
        return sorted({m.micro_batch_size for m in self.measurements if m.is_feasible})

    # Speed

    def predict_throughput(self, micro_batch_size: int, accumulation_steps: int = 1) -> float:
        """Samples per second: an update takes `accumulation_steps * s(micro_batch_size) + u` seconds."""
        seconds_per_update, micro_step = fit_seconds(self.measurements)
        seconds = accumulation_steps * micro_step.at(micro_batch_size) + seconds_per_update
        return micro_batch_size * accumulation_steps / max(seconds, 1e-9)

    # Growing

    def with_measurement(self, measurement: Measurement) -> Profile:
        """The profile refined by one more point. Measured again, a point keeps its higher peak."""
        kept = []
        for known in self.measurements:
            if _key(known) != _key(measurement):
                kept.append(known)
            elif known.peak_memory_bytes is not None and measurement.peak_memory_bytes is not None:
                peak = max(known.peak_memory_bytes, measurement.peak_memory_bytes)
                seconds = measurement.seconds_per_update or known.seconds_per_update
                measurement = replace(measurement, peak_memory_bytes=peak, seconds_per_update=seconds)
        return replace(self, measurements=(*kept, measurement))

    def next_probe_size(self, budget_bytes: int | None, micro_batch_sizes: Sequence[int]) -> int | None:
        """The size to probe next, or `None` when enough is known.

        The smallest first; then up, at most eightfold, to the largest that should fit, until that one is measured.
        Without a budget, until most of the peak grows with the micro-batch, and at most four sizes.

        Args:
            budget_bytes: the limit the probes run under.
            micro_batch_sizes: the sizes to choose from.
        """
        measured = self._measured_sizes()
        failed = min((m.micro_batch_size for m in self.measurements if not m.is_feasible), default=None)
        candidates = [size for size in sorted(set(micro_batch_sizes)) if failed is None or size < failed]
        if not measured:
            # One after the other failed: halve the way, down to the smallest.
            return candidates[0 if failed is None else (len(candidates) - 1) // 2] if candidates else None
        larger = [size for size in candidates if size > measured[-1]]
        if larger and budget_bytes is not None and len(measured) == 1:
            # Twice the size teaches the slope where no listed size is certain enough.
            larger = [size for size in larger if self._is_open(size, budget_bytes)]
            double = 2 * measured[0]
            if not larger and (failed is None or double < failed) and self._is_open(double, budget_bytes):
                return double
        if budget_bytes is None:
            if len(measured) >= 4 or (len(measured) > 1 and self._grows_at(measured[-1])):
                return None
        else:
            larger = [size for size in larger if self._is_open(size, budget_bytes)]
        if failed is not None:
            # The prediction was wrong: halve the way between what ran and what did not.
            halfway = [size for size in larger if size * size <= measured[-1] * failed] or larger[:1]
            return halfway[-1] if halfway else None
        is_certain = len(measured) > 1 and all(curve.doubt == 0 for curve in self._curves.values())
        reach = measured[-1] * (LARGEST_PROBE_STEP if is_certain else LARGEST_EXTRAPOLATION)
        within_reach = [size for size in larger if size <= reach] or larger[:1]
        return within_reach[-1] if within_reach else None

    def _is_open(self, size: int, budget_bytes: int | None) -> bool:
        """Whether a size could fit. With one size measured, nothing is known of the slope: half of the peak grows."""
        if budget_bytes is None:
            return True
        measured = self._measured_sizes()
        if size < SMALLEST_PROBE_STEP * measured[-1]:
            return False
        if len(measured) == 1:
            peak = min(m.peak_memory_bytes for m in self.measurements if m.peak_memory_bytes is not None)
            # The next doubling is worth a try wherever there is any room.
            growth = (1 + size / measured[0]) / 2 if size > 2 * measured[0] else 1 + MARGIN
            return peak * growth + MIB <= budget_bytes
        steps = max(m.accumulation_steps for m in self.measurements)
        return self._needed(size, steps) * (1 + MARGIN) + MIB <= budget_bytes

    def _grows_at(self, size: int) -> bool:
        """Whether most of the peak is there because of the micro-batch."""
        curve = next(iter(self._curves.values()))
        return curve.slope * size > 0.5 * curve.at(size)

    # Files

    def to_dict(self) -> dict[str, Any]:
        return {
            "measurements": [m.to_dict() for m in self.measurements],
            **{f.name: getattr(self, f.name) for f in fields(self) if f.init and f.name != "measurements"},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Profile:
        rest = {key: value for key, value in values.items() if key != "measurements"}
        return cls(measurements=tuple(Measurement.from_dict(m) for m in values["measurements"]), **rest)


def _key(measurement: Measurement) -> tuple[int, int, bool]:
    return measurement.micro_batch_size, measurement.accumulation_steps, measurement.is_feasible


def _group(accumulation_steps: int) -> int:
    """1 has no accumulators; with more, every further micro-step is like the second."""
    return min(accumulation_steps, 2)
