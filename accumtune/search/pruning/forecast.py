"""What a training that has run for some epochs will end with, from those that ran to their end. Pure functions.

Trainings begin at different heights, and slow ones (small learning rates, large batches) have more to gain than quick
ones, so neither the value at an epoch nor a rank at it says who wins. What trainings of one search share is the shape:
which share of the gain after the first epoch is still to come after the second, the third, … Of the best value so far
after n epochs this makes

    value(n) = end + share(n) · gain + noise,

with `share` the finished trainings' (1 after the first epoch, 0 at the end), `gain` as large as theirs were, give or
take, and nothing known of `end`. That is linear in `end` and `gain`: two unknowns whose posterior is a 2 × 2 system.
Values that are all positive are taken as logarithms, as a loss that halves says the same at any height.

The constants were chosen on made tasks that are not those of the benchmark (`experiments/DECISIONS.md`), such that of
the three best points of each none was stopped in 12 draws of 1, 2, 3, 5 and 8 finished trainings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# How far a gain may be from the finished trainings', over their mean gain, for one of them (for more: less).
_VARIATION = 1.0
# How far a training's shape may be from theirs, over what is still to come.
_MISFIT = 0.5
# Of the mean gain, and of the scale: what values move by without meaning.
_NOISE = (0.03, 0.01)
_LEAST_DOUBT = (0.05, 0.02)
# A training is hopeless where even this many standard deviations better than expected is worse than the best.
_DOUBT = 2.5


@dataclass(frozen=True)
class Forecast:
    """The value that a training will end with.

    Args:
        expected: in the objective's own units.
        is_hopeless: whether it will be worse than the best finished training, beyond doubt.
    """

    expected: float
    is_hopeless: bool


def forecast(values: Sequence[float], finished: Sequence[Sequence[float]], direction: str = "min") -> Forecast | None:
    """Forecasts what a training will end with.

    Args:
        values: its objective after each epoch so far. NaN is passed over.
        finished: the same of trainings that ran to their end.
        direction: `"min"` or `"max"`.

    Returns:
        None where nothing can be said: no finished training, no value that is a number, no epoch left, or no value
        that differs from another.
    """
    curves = [curve for curve in finished if any(map(math.isfinite, curve))]
    epochs = max(map(len, curves), default=0)
    if len(values) >= epochs or not any(map(math.isfinite, values)):
        return None
    is_logarithmic = all(value > 0 for curve in (values, *curves) for value in curve if math.isfinite(value))
    sign = -1.0 if direction == "max" else 1.0

    def best_so_far(curve: Sequence[float], length: int) -> np.ndarray:
        heights = [math.log(value) if is_logarithmic and value > 0 else value for value in curve]
        known = [sign * height if math.isfinite(height) else math.inf for height in heights]
        lowest = np.minimum.accumulate([*known, *[math.inf] * (length - len(known))])
        return np.where(np.isfinite(lowest), lowest, lowest[np.isfinite(lowest)].max())

    own, lowest = best_so_far(values, len(values)), np.stack([best_so_far(curve, epochs) for curve in curves])
    scale = 1.0 if is_logarithmic else float(max(own.max(), lowest.max()) - min(own.min(), lowest.min()))
    if scale == 0:
        return None
    end, doubt = _end(own, lowest - lowest[:, -1:], scale)
    expected = math.exp(sign * end) if is_logarithmic else sign * end
    return Forecast(expected, bool(end - _DOUBT * doubt > lowest[:, -1].min()))


def _end(values: np.ndarray, gains: np.ndarray, scale: float) -> tuple[float, float]:
    """Returns the expected end of a training and its standard deviation, smaller values being better.

    Args:
        values: its best so far after each epoch.
        gains: of each finished training, what was still to be gained after each epoch.
        scale: of the values.
    """
    first = gains[:, 0]
    mean = max(float(first.mean()), 1e-9 * scale)
    share = gains.sum(axis=0)[: len(values)] / (len(gains) * mean)
    variance = (_VARIATION * mean) ** 2 / len(gains) + float(first.var())
    deviation = math.sqrt(variance) + _LEAST_DOUBT[0] * mean + _LEAST_DOUBT[1] * scale
    noise = _MISFIT * share * max(mean, deviation) + _NOISE[0] * mean + _NOISE[1] * scale
    # The posterior of (end, gain): a flat prior for the end, a normal one for the gain.
    design = np.stack([np.ones_like(share), share], axis=1)
    precision = design.T @ (design / noise[:, None] ** 2) + np.diag([0.0, deviation**-2])
    covariance = np.linalg.inv(precision)
    end, _ = covariance @ (design.T @ (values / noise**2) + np.array([0.0, mean / deviation**2]))
    return min(float(end), float(values[-1])), math.sqrt(covariance[0, 0])
