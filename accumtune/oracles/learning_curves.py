"""A Gaussian process over learning curves: what will a training end with, given some epochs of some trainings?

The value of a training with hyperparameters x after t of T epochs, best so far, is modelled as

    value(x, t) = end(x) + share(t) · gain(x) + noise,

in the spirit of Swersky, Snoek and Adams, "Freeze-Thaw Bayesian Optimization" (2014). `end` and `gain` are smooth in x;
`share` falls from 1 after the first epoch to 0 after the last, with an exponent that is learned: (T^-a - t^-a) /
(T^-a - 1) is linear for a = -1, logarithmic near 0, quick for large a. Small smooth deviations of the shape are allowed
for all trainings together and for each. The best learning rate grows with a power of the batch: in the kernel the
rate's coordinate is sheared by it, and the power is learned.

The model's parameters have log-normal priors; a few draws from their posterior (differential evolution Monte Carlo) are
averaged. The constants are those of the trials in `experiments/DECISIONS.md`, on values that are logarithms of losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtr

_DRAWS, _FIRST_DRAWS, _MOVES = 8, 96, 30
# Mean and deviation of the priors: logarithms of the lengths, then the powers of the batch, then the others.
_LENGTH = (math.log(0.9), 0.6)
_POWERS = ((0.5, 0.3), (0.3, 0.3))  # of the end and of the gain
_SCALES = (
    (math.log(0.3), 0.8),  # deviation of the end
    (math.log(1.5), 0.4),  # how much longer the gain's lengths are
    (math.log(0.2), 0.8),  # deviation of the gain
    (math.log(0.05), 0.8),  # deviation of one training's shape
    (math.log(0.004), 0.7),  # noise
    (0.5, 0.8),  # the exponent of the share
)
_END, _LONGER, _GAIN, _SHAPE, _NOISE, _EXPONENT = range(len(_SCALES))
_COMMON_GAIN, _COMMON_SHAPE = 0.25, 0.04  # variances
_SHAPE_LENGTH = 0.35  # of deviations of the shape, over log(t) / log(T)


@dataclass(frozen=True)
class Coordinates:
    """What the dimensions of the points are.

    Args:
        is_categorical: by dimension. The others are numbers from 0 to 1.
        batch: the effective batch's dimension; None if it is not searched.
        rates: dimensions of learning rates, with the span of the batch's logarithm over that of the rate's.
    """

    is_categorical: Sequence[bool]
    batch: int | None = None
    rates: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Observations:
    """Values of trainings: of the training `rows[i]`, at `points[i]`, after `epochs[i]` epochs, `values[i]`."""

    points: np.ndarray
    epochs: np.ndarray
    rows: np.ndarray
    values: np.ndarray


class LearningCurves:
    """The model, fitted to what was observed.

    Args:
        coordinates: of the points.
        last_epoch: the number of epochs of a whole training.
        observed: at least one value. Their smallest should be near 0.
        generator: draws the parameters.
    """

    def __init__(
        self, coordinates: Coordinates, last_epoch: int, observed: Observations, generator: np.random.Generator
    ) -> None:
        self._coordinates, self._last_epoch = coordinates, last_epoch
        self._observed, self._generator = observed, generator
        self._dimensions = len(coordinates.is_categorical)
        priors = np.array([_LENGTH] * self._dimensions + [*_POWERS, *_SCALES])
        self._mean, self._deviation = priors.T
        self._parameters = self._posterior()

    def ends(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns means and standard deviations of the ends at points, one row for each draw of the parameters."""
        draws, observed = self._parameters, self._observed
        factor = np.linalg.cholesky(self._covariance(draws))
        near, _ = self._closeness(draws, points, observed.points)
        variance = self._square(draws, _END)
        explained = np.linalg.solve(factor, (1.0 + variance * near).transpose(0, 2, 1))
        weights = np.linalg.solve(factor, np.broadcast_to(observed.values[:, None], (len(draws), near.shape[2], 1)))
        left = 1.0 + variance[:, :, 0] - (explained**2).sum(axis=1)
        return (explained * weights).sum(axis=1), np.sqrt(np.maximum(left, 1e-10))

    # The parameters

    def _posterior(self) -> np.ndarray:
        generator = self._generator
        first = self._mean + self._deviation * generator.standard_normal((_FIRST_DRAWS, len(self._mean)))
        likelihood = self._likelihood(first)
        weights = np.exp(likelihood - likelihood.max())
        draws = first[generator.choice(len(first), _DRAWS, p=weights / weights.sum())]
        density = self._likelihood(draws) + self._prior(draws)
        for move in range(_MOVES):
            proposed = self._moved(draws, is_along_others=move % 2 == 1)
            new = self._likelihood(proposed) + self._prior(proposed)
            is_taken = np.log(generator.random(_DRAWS)) < new - density
            draws = np.where(is_taken[:, None], proposed, draws)
            density = np.where(is_taken, new, density)
        return np.asarray(draws)

    def _moved(self, draws: np.ndarray, is_along_others: bool) -> np.ndarray:
        generator = self._generator
        steps = self._deviation * generator.standard_normal(draws.shape)
        if is_along_others:
            pairs = np.array([generator.choice(_DRAWS, 2, replace=False) for _ in range(_DRAWS)])
            return np.asarray(draws + 0.5 * (draws[pairs[:, 0]] - draws[pairs[:, 1]]) + 0.03 * steps)
        is_moved = generator.random(draws.shape) < 0.35
        return np.asarray(draws + is_moved * generator.choice([0.15, 0.5]) * steps)

    def _prior(self, parameters: np.ndarray) -> np.ndarray:
        return np.asarray(-0.5 * (((parameters - self._mean) / self._deviation) ** 2).sum(axis=1))

    def _likelihood(self, parameters: np.ndarray) -> np.ndarray:
        try:
            factor = np.linalg.cholesky(self._covariance(parameters))
        except np.linalg.LinAlgError:
            return np.full(len(parameters), -1e9)
        count = len(self._observed.values)
        values = np.broadcast_to(self._observed.values[:, None], (len(parameters), count, 1))
        scaled = np.linalg.solve(factor, values)[..., 0]
        logarithms = np.log(np.diagonal(factor, axis1=1, axis2=2)).sum(axis=1)
        return np.asarray(-0.5 * (scaled**2).sum(axis=1) - logarithms)

    # The kernel

    def _of(self, parameters: np.ndarray, scale: int) -> np.ndarray:
        return parameters[:, self._dimensions + len(_POWERS) + scale, None, None]

    def _square(self, parameters: np.ndarray, scale: int) -> np.ndarray:
        return np.asarray(np.exp(2 * self._of(parameters, scale)))

    def _covariance(self, parameters: np.ndarray) -> np.ndarray:
        """Returns the covariance of the observations, their noise included."""
        observed, count = self._observed, len(self._observed.values)
        ends, gains = self._closeness(parameters, observed.points, observed.points)
        share = self._share(parameters, observed.epochs)
        places = np.log(observed.epochs) / math.log(max(self._last_epoch, 2))
        alike = np.exp(-0.5 * ((places[:, None] - places) / _SHAPE_LENGTH) ** 2)
        own = (observed.rows[:, None] == observed.rows) * alike
        shape = _COMMON_GAIN + _COMMON_SHAPE * alike
        shape = shape + self._square(parameters, _GAIN) * gains * (0.7 + 0.3 * alike)
        shape = shape + self._square(parameters, _SHAPE) * own
        covariance = 1.0 + self._square(parameters, _END) * ends + share[:, :, None] * share[:, None, :] * shape
        covariance[:, range(count), range(count)] += self._square(parameters, _NOISE)[:, :, 0] + 1e-8
        return np.asarray(covariance)

    def _share(self, parameters: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        if self._last_epoch == 1:
            return np.zeros((len(parameters), len(epochs)))
        exponent = self._of(parameters, _EXPONENT)[:, :, 0]
        exponent = np.where(np.abs(exponent) < 1e-3, 1e-3, exponent)
        end = float(self._last_epoch) ** -exponent
        return np.asarray((end - epochs.astype(float) ** -exponent) / (end - 1))

    def _closeness(
        self, parameters: np.ndarray, points: np.ndarray, others: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the correlation of ends, and of gains, between two sets of points."""
        apart = points[:, None, :] - others[None, :, :]
        inverse = np.exp(-2 * parameters[:, : self._dimensions])
        found = []
        for which in range(len(_POWERS)):
            power = parameters[:, self._dimensions + which, None, None]
            squares = np.zeros((len(parameters), len(points), len(others)))
            for index, is_categorical in enumerate(self._coordinates.is_categorical):
                one = (apart[None, :, :, index] != 0).astype(float) if is_categorical else apart[None, :, :, index]
                for rate, ratio in self._coordinates.rates if self._coordinates.batch is not None else ():
                    if index == rate:
                        one = one - power * ratio * apart[None, :, :, self._coordinates.batch]
                squares += one**2 * inverse[:, index, None, None]
            found.append(squares)
        return np.exp(-0.5 * found[0]), np.exp(-0.5 * found[1] / self._square(parameters, _LONGER))


def expected_improvement(means: np.ndarray, deviations: np.ndarray, best: float) -> np.ndarray:
    """Returns by how much each point is expected to be below the best, in the mean over the rows."""
    scaled = (best - means) / deviations
    density = np.exp(-0.5 * scaled**2) / math.sqrt(2 * math.pi)
    return np.asarray((deviations * (scaled * ndtr(scaled) + density)).mean(axis=0))
