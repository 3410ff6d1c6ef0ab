"""Measured points -> peak memory and throughput of every other micro-batch size. Pure arithmetic.

Peak memory of a step is the larger of two moments: the update (parameters, slots, gradients: the same for every
micro-batch) and the end of a forward pass (parameters, slots and the activations of one micro-batch: a line), so
`peak = max(update floor, static + slope * micro-batch)`, which is convex. With more than one micro-step per
update the accumulator is added to both, and the data of the whole window is there while it runs. Between measured
sizes the curve is the chord, which is above a convex curve; beyond the last one it goes on at the last slope.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from scipy.optimize import nnls

from accumtune.memory.budget import format_bytes, parse_budget

MAXIMUM_MICRO_BATCH_SIZE = 2**20
MIB = 2**20


@dataclass(frozen=True)
class Measurement:
    """What one micro-batch size and number of accumulation steps cost, in one process.

    Args:
        micro_batch_size: samples per micro-step.
        accumulation_steps: micro-steps per update.
        peak_memory_bytes: the most the device held; `None` where it ran out of memory.
        seconds_per_update: wall time of an update after the first; `None` where it was not timed.
        memory_source: who counted the bytes.
        memory_limit_bytes: the limit it ran under; `None` for none.
    """

    micro_batch_size: int
    accumulation_steps: int
    peak_memory_bytes: int | None
    seconds_per_update: float | None
    memory_source: str
    memory_limit_bytes: int | None = None

    @property
    def is_feasible(self) -> bool:
        """Whether it ran; otherwise it ran out of memory."""
        return self.peak_memory_bytes is not None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Measurement:
        return cls(**values)


@dataclass(frozen=True)
class Profile:
    """What a model's training step costs, from a few measured points.

    Args:
        measurements: the points.
        device: its name.
        memory_source: who counted the bytes.
        signature: what the memory depends on; profiles are cached by it.
        memory_budget_bytes: the limit the probes ran under, if any.
        sample_bytes: the bytes of one sample's data (inputs, targets and weight).
    """

    measurements: tuple[Measurement, ...]
    device: str
    memory_source: str
    signature: str = ""
    memory_budget_bytes: int | None = None
    sample_bytes: int = 0
    _curves: dict[int, _Curve] = field(init=False, repr=False, compare=False, default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "measurements", tuple(self.measurements))
        groups: dict[int, dict[int, float]] = {}
        for point in self.measurements:
            if point.peak_memory_bytes is not None:
                peaks = groups.setdefault(_group(point.accumulation_steps), {})
                size = point.micro_batch_size
                above_window = point.peak_memory_bytes - self._window_bytes(size, point.accumulation_steps)
                peaks[size] = max(peaks.get(size, 0.0), float(above_window))
        object.__setattr__(self, "_curves", {group: _Curve(peaks) for group, peaks in groups.items()})

    def __repr__(self) -> str:
        feasible = [m for m in self.measurements if m.is_feasible]
        sizes = ", ".join(str(size) for size in sorted({m.micro_batch_size for m in feasible}))
        budget = "no budget" if self.memory_budget_bytes is None else format_bytes(self.memory_budget_bytes)
        return f"Profile(device={self.device!r}, memory_source={self.memory_source!r}, {budget}, measured at {sizes})"

    # Memory

    def predict_peak_memory(self, micro_batch_size: int, accumulation_steps: int = 1) -> int:
        """The expected peak in bytes, without a margin."""
        peak = max(
            self._curve(group).at(micro_batch_size)
            for group in {_group(steps) for steps in (1, 2, 3) if steps <= accumulation_steps}
        )
        return int(np.ceil(peak + self._window_bytes(micro_batch_size, accumulation_steps)))

    def margin_bytes(self, micro_batch_size: int, accumulation_steps: int = 1) -> int:
        """How far the limit has to be above the predicted peak for the step to run under it.

        1 MiB because limits are whole MiB, 2 % because a full allocator cannot use every gap, and 1 % more for
        each doubling beyond the largest measured size.
        """
        predicted = self.predict_peak_memory(micro_batch_size, accumulation_steps)
        beyond = max(0.0, float(np.log2(micro_batch_size / self._largest_measured())))
        return int(MIB + predicted * (0.02 + 0.01 * beyond))

    def fits(self, micro_batch_size: int, accumulation_steps: int, budget_bytes: int) -> bool:
        """Whether a step runs under a limit of `budget_bytes`: what was measured, else prediction and margin."""
        for point in self.measurements:
            smaller = (
                point.micro_batch_size <= micro_batch_size and point.accumulation_steps <= accumulation_steps
            )
            larger = point.micro_batch_size >= micro_batch_size and point.accumulation_steps >= accumulation_steps
            limit = point.memory_limit_bytes
            if point.is_feasible and larger and limit is not None and limit <= budget_bytes:
                return True
            if not point.is_feasible and smaller and (limit is None or limit >= budget_bytes):
                return False
        if not self._curves:
            return False
        predicted = self.predict_peak_memory(micro_batch_size, accumulation_steps)
        return predicted + self.margin_bytes(micro_batch_size, accumulation_steps) <= budget_bytes

    def largest_micro_batch_size(
        self, budget: int | float | str | None = None, accumulation_steps: int = 1
    ) -> int | None:
        """The largest micro-batch size, any integer, that runs under a limit of `budget`; `None` if not even 1."""
        budget_bytes = self.memory_budget_bytes if budget is None else parse_budget(budget)
        if budget_bytes is None:
            raise ValueError("Received budget=None, and the profile was measured without one. Pass a budget.")
        fitting, failing = 0, 1
        while failing <= MAXIMUM_MICRO_BATCH_SIZE and self.fits(failing, accumulation_steps, budget_bytes):
            fitting, failing = failing, failing * 2
        if failing > MAXIMUM_MICRO_BATCH_SIZE:
            return MAXIMUM_MICRO_BATCH_SIZE
        while failing - fitting > 1:
            middle = (fitting + failing) // 2
            if self.fits(middle, accumulation_steps, budget_bytes):
                fitting = middle
            else:
                failing = middle
        return fitting or None

    def is_extrapolated(self, micro_batch_size: int) -> bool:
        """Whether a size is outside those that were measured."""
        sizes = [m.micro_batch_size for m in self.measurements if m.is_feasible]
        return not sizes or not min(sizes) <= micro_batch_size <= max(sizes)

    def _window_bytes(self, micro_batch_size: int, accumulation_steps: int) -> int:
        return self.sample_bytes * micro_batch_size * accumulation_steps

    def _largest_measured(self) -> int:
        return max((m.micro_batch_size for m in self.measurements if m.is_feasible), default=1)

    def _curve(self, group: int) -> _Curve:
        """The curve of a group of accumulation steps, or of the nearest one that was measured."""
        if not self._curves:
            raise ValueError("Received a profile in which nothing was measured to fit. Probe a smaller micro-batch.")
        larger = [known for known in self._curves if known >= group]
        return self._curves[min(larger) if larger else max(self._curves)]

    # Speed

    def predict_throughput(self, micro_batch_size: int, accumulation_steps: int = 1) -> float:
        """Samples per second: an update takes `accumulation_steps * s(micro_batch_size) + u` seconds."""
        seconds_per_update, micro_step = _fit_seconds(self.measurements)
        seconds = accumulation_steps * micro_step.at(micro_batch_size) + seconds_per_update
        return micro_batch_size * accumulation_steps / max(seconds, 1e-9)

    # Growing

    def with_measurement(self, measurement: Measurement) -> Profile:
        """The profile refined by one more point; a point measured again replaces the earlier one."""
        key = (measurement.micro_batch_size, measurement.accumulation_steps)
        kept = [m for m in self.measurements if (m.micro_batch_size, m.accumulation_steps) != key]
        return replace(self, measurements=(*kept, measurement))

    def next_probe_size(self, budget_bytes: int | None, micro_batch_sizes: Sequence[int]) -> int | None:
        """The size to probe next, or `None` when enough is known.

        The smallest first, then a few times as large; then the largest that is predicted to fit, at most eight
        times what is known to, until that one is measured.
        """
        sizes = sorted(set(micro_batch_sizes))
        ran = sorted({m.micro_batch_size for m in self.measurements if m.is_feasible})
        failed = [m.micro_batch_size for m in self.measurements if not m.is_feasible]
        open_sizes = [s for s in sizes if s not in ran and (not failed or s < min(failed))]
        if not ran:
            return open_sizes[0] if open_sizes else None
        larger = [s for s in open_sizes if s > ran[-1]]
        if budget_bytes is not None:
            larger = [s for s in larger if self.fits(s, 1, budget_bytes)]
        if len(ran) == 1:
            larger = [s for s in larger if s <= 4 * ran[0]] or larger[:1]
        larger = [s for s in larger if s <= 8 * ran[-1]] or larger[:1]
        return larger[-1] if larger else None

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

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2)


def _group(accumulation_steps: int) -> int:
    """1: no accumulator; 2: a first and a last micro-step; 3 and more: one in the middle as well."""
    return min(accumulation_steps, 3)


class _Curve:
    """A function through points, never falling: chords between them, the last slope beyond, flat before."""

    def __init__(self, points: Mapping[int, float]) -> None:
        self._x = np.array(sorted(points), dtype=float)
        self._y = np.maximum.accumulate(np.array([points[int(x)] for x in self._x]))
        self._slope = 0.0
        if len(self._x) > 1:
            self._slope = float((self._y[-1] - self._y[-2]) / (self._x[-1] - self._x[-2]))

    def at(self, size: float) -> float:
        beyond = max(0.0, size - self._x[-1])
        return float(np.interp(size, self._x, self._y)) + self._slope * beyond


def _fit_seconds(measurements: Sequence[Measurement]) -> tuple[float, _Curve]:
    """Least squares in relative error: one time per measured micro-batch size, and one for the update."""
    points = [
        (m.micro_batch_size, m.accumulation_steps, m.seconds_per_update)
        for m in measurements
        if m.seconds_per_update is not None
    ]
    if not points:
        raise ValueError("Received a profile without timings. Probe at least one micro-batch size.")
    sizes = sorted({size for size, _, _ in points})
    rows = np.zeros((len(points), len(sizes) + 1))
    for row, (size, steps, seconds) in zip(rows, points, strict=True):
        row[sizes.index(size)] = steps / seconds
        row[-1] = 1.0 / seconds
    solution, _ = nnls(rows, np.ones(len(points)))
    return float(solution[-1]), _Curve(dict(zip(sizes, solution[:-1], strict=True)))
