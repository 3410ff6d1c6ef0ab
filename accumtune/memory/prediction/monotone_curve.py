"""Fits curves that never fall through a few measured points."""

from __future__ import annotations

from collections.abc import Mapping, Set

import numpy as np

# A point this far above its group's lowest has left the floor: an eighth, above the noise of a floor.
RISEN = 1.125
# Points further back than this share of the last one say little of how the peak grows beyond it.
LONGEST_REACH = 8


def curves_of(peaks: Mapping[int, Mapping[int, float]], statics: Mapping[int, float]) -> dict[int, Curve]:
    """A curve per group of accumulation steps. They differ by a constant, so that they go on at one slope."""
    slope = common_slope(peaks)
    return {group: Curve(points, slope, statics[group]) for group, points in sorted(peaks.items())}


def common_slope(peaks: Mapping[int, Mapping[int, float]]) -> float | None:
    """By least squares through the points of all groups that have left the floor, each group with its own constant.

    A chord between two points would carry their noise, and one that begins at the floor is too flat. Where no group has
    two points beyond the floor, the steepest of such chords; None where no group has two points.
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
    """The same for what is asked for, where some peaks were measured with hardly any memory left.

    There the allocator counts more than it was asked for, so that such a peak is no more than a bound: the other points
    go on at their slope, up to it.
    """
    free = {
        group: {size: peak for size, peak in points.items() if size not in crowded.get(group, ())}
        for group, points in peaks.items()
    }
    free = {group: points or dict(peaks[group]) for group, points in free.items()}
    if all(len(points) < 2 for points in free.values()):
        return curves_of(peaks, statics)  # no slope is known without them
    curves = curves_of(free, statics)
    bounded = {}
    for group, points in peaks.items():
        certain = max(free[group])
        beyond = {size: min(peak, curves[group].at(size)) for size, peak in points.items() if size > certain}
        bounded[group] = Curve({**free[group], **beyond}, curves[group].slope, statics[group])
    return bounded


def last_slope(points: Mapping[int, float]) -> float:
    """From the last point back to one at half its x or less: a shorter chord is mostly noise."""
    xs = sorted(points)
    last = xs[-1]
    before = max((x for x in xs if 2 * x <= last), default=xs[-2])
    return max(0.0, (points[last] - points[before]) / (last - before))


class Curve:
    """A function through points that never falls: chords between them, one slope beyond, flat before.

    Args:
        points: y by x.
        slope: beyond the last point. `None` where it is not known: then the most it can be, in proportion to x.
        most_static: a bound on `static`.

    Attributes:
        static: what there is without any sample: the smallest point, less what its samples take.
        doubt: how much steeper the curve may be beyond the last point. When the last chord begins at the update
            floor, the curve leaves the floor somewhere along it; the line it then follows has, at x = 0, at least
            half of the floor below it (parameters and slots, without gradients).
    """

    def __init__(
        self, points: Mapping[int, float], slope: float | None = None, most_static: float = np.inf
    ) -> None:
        self._x = np.array(sorted(points), dtype=float)
        self._y = np.maximum.accumulate(np.array([points[int(x)] for x in self._x]))
        self.slope = max(0.0, float(self._y[-1] / self._x[-1])) if slope is None else slope
        self.static = min(float(self._y[0] - self.slope * self._x[0]), most_static)
        steepest = (self._y[-1] - 0.5 * self._y[0]) / self._x[-1]
        self.doubt = 0.0 if _is_straight(self._x, self._y) else max(0.0, float(steepest) - self.slope)

    def at(self, x: float) -> float:
        beyond = max(0.0, x - float(self._x[-1]))
        return float(np.interp(x, self._x, self._y)) + self.slope * beyond


def _is_straight(x: np.ndarray, y: np.ndarray) -> bool:
    """Whether the last two chords agree and rise, so that the last point lies well beyond the floor."""
    slopes = np.diff(y[-3:]) / np.diff(x[-3:])
    return len(slopes) == 2 and bool(slopes[1] <= 1.25 * slopes[0]) and bool(slopes[1] * x[-1] >= 0.25 * y[-1])
