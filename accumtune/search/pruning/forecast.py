"""Forecasts the final objective of a running training, from trainings that ran to their end. Pure functions.

Trainings start at different values, and slow ones (small learning rates, large batches) have more to gain than quick
ones, so neither the value at an epoch nor the rank at it predicts the winner. What the trainings of one search share is
the shape of the curve: which share of the gain after the first epoch is still to come after the second, the third, …
The best value so far after n epochs is modelled as

    value(n) = end + share(n) · gain + noise.

`share` is that of the finished trainings (1 after the first epoch, 0 at the end). `gain` has a normal prior from
theirs, `end` a flat one. The model is linear in `end` and `gain`, so their posterior is a 2 × 2 system. If all values
are positive, their logarithms are used: halving a loss then counts the same at any value.

The constants were chosen on synthetic tasks, not on those of the benchmark (`experiments/DECISIONS.md`), such that none
of the three best points of a task was stopped in 12 draws of 1, 2, 3, 5 and 8 finished trainings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Standard deviation of a gain, over the mean gain of the finished trainings; with n of them, divided by sqrt(n).
_VARIATION = 1.0
# Standard deviation of a training's shape from theirs, over the gain that is still to come.
_MISFIT = 0.5
# Noise of a value, and the least standard deviation of a gain: shares of the mean gain and of the scale.
_NOISE = (0.03, 0.01)
_LEAST_DEVIATION = (0.05, 0.02)
# A training is hopeless if a result so many standard deviations better than expected would still not be the best.
_DOUBT = 2.5


@dataclass(frozen=True)
class Forecast:
    """The forecast final objective of a training.

    Args:
        expected: in the objective's own units.
        is_hopeless: whether it will almost certainly be worse than the best finished training.
    """

    expected: float
    is_hopeless: bool


def forecast(values: Sequence[float], finished: Sequence[Sequence[float]], direction: str = "min") -> Forecast | None:
    """Forecasts the final objective of a training.

    Args:
        values: its objective after each epoch so far. NaN is skipped.
        finished: the objectives of trainings that ran to their end.
        direction: `"min"` or `"max"`.

    Returns:
        None without a basis: no finished training, no finite value, no epoch left, or all values equal.
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
        values: its best value so far after each epoch.
        gains: how much each finished training still gained after each epoch.
        scale: of the values.
    """
    first = gains[:, 0]
    mean = max(float(first.mean()), 1e-9 * scale)
    share = gains.sum(axis=0)[: len(values)] / (len(gains) * mean)
    variance = (_VARIATION * mean) ** 2 / len(gains) + float(first.var())
    deviation = math.sqrt(variance) + _LEAST_DEVIATION[0] * mean + _LEAST_DEVIATION[1] * scale
    noise = _MISFIT * share * max(mean, deviation) + _NOISE[0] * mean + _NOISE[1] * scale
    # The posterior of (end, gain): a flat prior for the end, a normal one for the gain.
    design = np.stack([np.ones_like(share), share], axis=1)
    precision = design.T @ (design / noise[:, None] ** 2) + np.diag([0.0, deviation**-2])
    covariance = np.linalg.inv(precision)
    end, _ = covariance @ (design.T @ (values / noise**2) + np.array([0.0, mean / deviation**2]))
    return min(float(end), float(values[-1])), math.sqrt(covariance[0, 0])
