"""Fits non-decreasing curves through a few measured points."""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np

# A point this factor above its group's lowest is off the floor: more than the noise of the floor.
RISEN = 1.125
# Points smaller than the last by more than this factor say little about the growth beyond it.
LONGEST_REACH = 8


def curves_of(peaks: Mapping[int, Mapping[int, float]], statics: Mapping[int, float]) -> dict[int, Curve]:
    """Returns a curve for each group of accumulation steps. They differ by a constant, so they share one slope."""
    slope = common_slope(peaks)
    return {group: Curve(points, slope, statics[group]) for group, points in sorted(peaks.items())}


def common_slope(peaks: Mapping[int, Mapping[int, float]]) -> float | None:
    """Fits one slope to the points of all groups that are off the floor, by least squares with a constant per group.

    A chord between two points would carry their noise, and a chord that begins at the floor is too flat. If no group
    has two points off the floor, returns the steepest of such chords; None if no group has two points.
    """
    products = squares = 0.0
    for points in peaks.values():
        floor, last = min(points.values()), max(points)
        risen = [(x, y) for x, y in points.items() if y >= RISEN * floor and x >= last / LONGEST_REACH]
        if len(risen) > 1:
            x, y = np.array(risen, dtype=float).T
            products += float(((x - x.mean()) * (y - y.mean())).sum())
            squares += float(((x - x.mean()) ** 2).sum())
    if squares > 0:
        return max(0.0, products / squares)
    return max((last_slope(points) for points in peaks.values() if len(points) > 1), default=None)


def curves_with_room(
    peaks: Mapping[int, Mapping[int, float]], crowded: Mapping[int, Set[int]], statics: Mapping[int, float]
) -> dict[int, Curve]:
    """Returns curves as `curves_of`, if some peaks were measured with hardly any memory left (`crowded`).

    There the allocator counts more than it was asked for, so such a peak is only an upper bound: the curve continues
    from the other points at their slope, up to that bound.
    """
    free = {
        group: {size: peak for size, peak in points.items() if size not in crowded.get(group, ())}
        for group, points in peaks.items()
    }
    free = {group: points or dict(peaks[group]) for group, points in free.items()}
    if all(len(points) < 2 for points in free.values()):
        return curves_of(peaks, statics)  # without the crowded points there is no slope
    curves = curves_of(free, statics)
    bounded = {}
    for group, points in peaks.items():
        certain = max(free[group])
        beyond = {size: min(peak, curves[group].at(size)) for size, peak in points.items() if size > certain}
        bounded[group] = Curve({**free[group], **beyond}, curves[group].slope, statics[group])
    return bounded


def last_slope(points: Mapping[int, float]) -> float:
    """Returns the slope from the last point back to one at half its x or less; a shorter chord is mostly noise."""
    xs = sorted(points)
    last = xs[-1]
    before = max((x for x in xs if 2 * x <= last), default=xs[-2])
    return max(0.0, (points[last] - points[before]) / (last - before))


class Curve:
    """A non-decreasing function through points: chords between them, one slope beyond the last, flat before the first.

    Args:
        points: y by x.
        slope: beyond the last point. `None` if unknown: then the steepest possible, proportional to x.
        most_static: an upper bound of `static`.

    Attributes:
        static: the value without any sample: the smallest point, less what its samples take if the slope is known.
        doubt: how much steeper the curve may be beyond the last point. If the last chord begins at the update floor,
            the curve leaves the floor somewhere along it. The line that it then follows starts, at x = 0, from at
            least half of the floor (parameters and slots, without gradients).
    """

    def __init__(
        self, points: Mapping[int, float], slope: float | None = None, most_static: float = np.inf
    ) -> None:
        self._x = np.array(sorted(points), dtype=float)
        self._y = np.maximum.accumulate(np.array([points[int(x)] for x in self._x]))
        self.slope = max(0.0, float(self._y[-1] / self._x[-1])) if slope is None else slope
        taken = 0.0 if slope is None else self.slope * float(self._x[0])
        self.static = min(float(self._y[0]) - taken, most_static)
        steepest = (self._y[-1] - 0.5 * self._y[0]) / self._x[-1]
        self.doubt = 0.0 if _is_straight(self._x, self._y) else max(0.0, float(steepest) - self.slope)

    def at(self, x: float) -> float:
        beyond = max(0.0, x - float(self._x[-1]))
        return float(np.interp(x, self._x, self._y)) + self.slope * beyond


def _is_straight(x: np.ndarray, y: np.ndarray) -> bool:
    """Returns whether the last two chords agree and rise, so that the last point is well off the floor."""
    slopes = np.diff(y[-3:]) / np.diff(x[-3:])
    return len(slopes) == 2 and bool(slopes[1] <= 1.25 * slopes[0]) and bool(slopes[1] * x[-1] >= 0.25 * y[-1])
