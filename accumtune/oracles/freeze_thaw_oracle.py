"""Pauses trainings after some epochs, and goes on with the most promising one or begins another.

After each part of a training, a model of all learning curves (`learning_curves`) says by how much each paused training,
and each point that was not tried, is expected to become better than the best so far. What promises most per epoch that
is left continues, up to its next pause: after 1, 2, 3, 4, 6, 9, 13, … epochs.

For Keras Tuner a paused trial has completed, with the best epoch that it has reached, so a search may end, or be
killed, at any time. Going on with it takes the way of Keras Tuner's retries. There is no state beside the trials and
their journals, so a resumed search decides as one without interruption.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from keras_tuner.engine.trial import TrialStatus

from accumtune.accumulation.batch_pair import BATCH_HYPERPARAMETERS
from accumtune.oracles import keras_tuner_adapter, optuna_space
from accumtune.oracles.learning_curves import Coordinates, LearningCurves, Observations, expected_improvement
from accumtune.oracles.optuna_oracle import OptunaOracle

# How many trials, spread evenly over the space, train one epoch before the model is fitted: at least so many, and as
# many as there are dimensions.
_FEWEST_STARTUP_TRIALS = 3
# Points that may be tried: spread evenly over the space, and near each of the best trials.
_CANDIDATES, _BEST, _NEAR = 1024, 3, 32
# The model's cost grows with the cube of this; the curves of worse trials are left out.
_MOST_OBSERVATIONS = 250
# Values this much above the best at the same epoch count with their logarithm: a diverged training is just bad.
_FAR = 0.7
# How far a trial that failed, does not fit or runs now keeps others away.
_NEARNESS = 0.15
# The least spread of the values that the model's priors are meant for, and that of values without a natural scale.
_LEAST_SPREAD, _SPREAD = 0.1, 0.3
# More trials than any search has; it decides how many digits their names have.
_MOST_TRIALS = 9999


@dataclass(frozen=True)
class Curve:
    """The objective after each epoch of a trial so far.

    Args:
        is_paused: whether the trial can go on.
        trained: how many of the epochs it has trained itself: none, where it reuses another one's result.
    """

    values: Sequence[float] = ()
    is_paused: bool = False
    trained: int = 0


@dataclass(frozen=True)
class _Candidate:
    values: dict[str, Any]
    point: list[float]


def next_pause(epochs: int) -> int:
    """Returns after how many epochs a training pauses that has trained so many."""
    return epochs + max(1, epochs // 2)


class FreezeThawOracle(OptunaOracle):
    """An oracle that pauses trials and goes on with them; `max_trials` is a number of whole trainings.

    Attributes:
        epochs: of a whole training.
        curve_of: gives the curve of a trial so far.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.epochs = 1
        self.curve_of: Callable[[str], Curve] = lambda trial_id: Curve()
        self._chosen: dict[str, Any] | None = None
        # The spread candidates by their hash, and how many hyperparameters there were.
        self._candidates: dict[str, _Candidate] = {}
        self._candidates_of = -1

    def pause_after(self, trial_id: str) -> int | None:
        """Returns after how many epochs a trial pauses next; None: it trains to its end."""
        pause = next_pause(len(self.curve_of(trial_id).values))
        return pause if pause < self.epochs else None

    def create_trial(self, tuner_id: str) -> Any:
        """Returns a paused trial to go on with, or a new one."""
        curves = {trial_id: self.curve_of(trial_id) for trial_id in self.trials}
        is_spent = self._spent(curves) >= (keras_tuner_adapter.asked_trials(self) or math.inf) * self.epochs
        if not (is_spent or self._retry_queue or tuner_id in self.ongoing_trials):
            thawed, self._chosen = self._choose(curves)
            if thawed is not None:
                self.end_order.remove(thawed)
                self._retry_queue.append(thawed)
        oracle: Any = self
        limit, oracle.max_trials = oracle.max_trials, len(self.trials) if is_spent else _MOST_TRIALS
        try:
            return super().create_trial(tuner_id)
        finally:
            oracle.max_trials = limit

    def _spent(self, curves: dict[str, Curve]) -> int:
        """Returns how many epochs the search has trained; a trial that failed counts as a whole one."""
        failed = {trial.trial_id for trial in self.trials.values() if trial.status == TrialStatus.FAILED}
        failed -= set(self._infeasible_trials)
        return sum(self.epochs if name in failed else curve.trained for name, curve in curves.items())

    def _propose(self, trial_id: str) -> dict[str, Any] | None:
        values, self._chosen = self._chosen, None
        if values is None:
            curves = {name: self.curve_of(name) for name in self.trials}
            values = self._choose(curves, is_new=True)[1]
        return values if values is not None else self._spread_values()

    # What to train next

    def _choose(
        self, curves: dict[str, Curve], is_new: bool = False
    ) -> tuple[str, None] | tuple[None, dict[str, Any] | None]:
        """Returns the paused trial to go on with, or the values to try; None and None: any that were not tried."""
        completed = [name for name in self.end_order if self.trials[name].status == TrialStatus.COMPLETED]
        heights = self._heights({name: curves[name] for name in completed})
        searched = sum(optuna_space.dimension(hp) is not None for hp in self.hyperparameters.space)
        paused = [name for name in heights if curves[name].is_paused] if not is_new else []
        ranked = sorted(heights, key=lambda name: heights[name][1][-1])
        new = self._untried(ranked[:_BEST], len(completed))
        is_starting = len(heights) < max(searched, _FEWEST_STARTUP_TRIALS)
        if not searched or not heights or (is_starting and new) or not (paused or new):
            return None, None
        generator = np.random.default_rng([self.seed, sum(map(len, (values for _, values in heights.values())))])
        observed = self._observed(ranked, heights)
        model = LearningCurves(self._coordinates(), self.epochs, observed, generator)
        points = [self._point(self.trials[name].hyperparameters.values) for name in paused]
        means, deviations = model.ends(np.array([*points, *(it.point for it in new)]))
        best = min(height for _, curve in heights.values() for height in curve)
        left = [self.epochs - len(curves[name].values) for name in paused] + [self.epochs] * len(new)
        promise = expected_improvement(means, deviations, best) / left
        promise[len(paused) :] *= self._chances([it.point for it in new], completed)
        choice = int(np.argmax(promise))
        return (paused[choice], None) if choice < len(paused) else (None, new[choice - len(paused)].values)

    def _chances(self, points: Sequence[Sequence[float]], completed: Sequence[str]) -> np.ndarray:
        """Returns the chance that points train: those near failed, infeasible or running ones have little."""
        if not points:
            return np.zeros(0)
        failed = [trial for trial in self.trials.values() if trial.status == TrialStatus.FAILED]
        others = [trial.hyperparameters.values for trial in (*failed, *self.ongoing_trials.values())] + self._infeasible
        good = self._nearness(points, [self.trials[name].hyperparameters.values for name in completed])
        return np.asarray((1 + good) / (1 + good + self._nearness(points, others)))

    def _nearness(self, points: Sequence[Sequence[float]], values: Sequence[dict[str, Any]]) -> np.ndarray:
        """Returns how many of the values are near each point; those further away count less."""
        if not values:
            return np.zeros(len(points))
        apart = np.array(points)[:, None, :] - np.array([self._point(it) for it in values])
        return np.asarray(np.exp(-0.5 * (np.minimum(np.abs(apart), 1.0) ** 2).sum(axis=2) / _NEARNESS**2).sum(axis=1))

    def _untried(self, best: Sequence[str], seed: int) -> list[_Candidate]:
        """Returns points that were not tried: spread over the space, and near the best trials."""
        space = self.hyperparameters.space
        if self._candidates_of != len(space):
            self._candidates_of, self._candidates = len(space), {}
            self._candidates = self._with(optuna_space.spread(space, self.seed, 0, _CANDIDATES))
        near = (
            values
            for number, name in enumerate(best)
            for values in optuna_space.near(space, self.trials[name].hyperparameters.values, [seed, number], _NEAR)
        )
        known = {self._compute_values_hash(values) for values in self._infeasible} | self._tried_so_far
        return [candidate for digest, candidate in self._with(near).items() if digest not in known]

    def _with(self, values: Iterable[dict[str, Any]]) -> dict[str, _Candidate]:
        """Returns the candidates and these values."""
        found = dict(self._candidates)
        for it in values:
            digest = self._compute_values_hash(it)
            if digest not in found:
                found[digest] = _Candidate(it, self._point(it))
        return found

    # What the model learns from

    def _heights(self, curves: dict[str, Curve]) -> dict[str, tuple[list[int], list[float]]]:
        """Returns epochs and values for the model, by trial: the best so far at each pause, less being better.

        All positive values are taken by their logarithms. The best is 0.
        """
        sign = -1.0 if self.objective.direction == "max" else 1.0
        known = {name: [float(it) for it in curve.values] for name, curve in curves.items()}
        finite = [it for values in known.values() for it in values if math.isfinite(it)]
        if not finite:
            return {}
        is_logarithmic = min(finite) > 0
        found: dict[str, tuple[list[int], list[float]]] = {}
        for name, values in known.items():
            heights = [math.log(it) if is_logarithmic and math.isfinite(it) else it for it in values]
            lowest = np.minimum.accumulate([sign * it if math.isfinite(it) else math.inf for it in heights])
            epochs = self._epochs_of(curves[name])
            seen = [(epoch, float(lowest[min(epoch, len(lowest)) - 1])) for epoch in epochs]
            seen = [(epoch, height) for epoch, height in seen if math.isfinite(height)]
            if seen:
                found[name] = ([epoch for epoch, _ in seen], [height for _, height in seen])
        return _scaled(found, is_logarithmic)

    def _epochs_of(self, curve: Curve) -> list[int]:
        """Returns after how many epochs a curve is looked at; one that has ended, at its end too."""
        epochs, pause = [], 1
        while pause <= min(len(curve.values), self.epochs - 1):
            epochs.append(pause)
            pause = next_pause(pause)
        return epochs if curve.is_paused or not curve.values else [*epochs, self.epochs]

    def _observed(
        self, ranked: Sequence[str], heights: dict[str, tuple[list[int], list[float]]]
    ) -> Observations:
        """Returns what the model is fitted to."""
        rows = []
        for name in ranked[:_MOST_OBSERVATIONS]:
            point = self._point(self.trials[name].hyperparameters.values)
            rows += [(point, name, epoch, height) for epoch, height in zip(*heights[name], strict=True)]
        rows = rows[:_MOST_OBSERVATIONS]
        points, names, epochs, seen = zip(*rows, strict=True)
        _, numbers = np.unique(names, return_inverse=True)
        return Observations(np.array(points), np.array(epochs), numbers, np.array(seen))

    def _dimensions(self) -> list[tuple[Any, optuna_space.Dimension]]:
        found = ((hp, optuna_space.dimension(hp, name)) for hp, name in optuna_space.named(self.hyperparameters.space))
        return [(hp, dimension) for hp, dimension in found if dimension is not None]

    def _coordinates(self) -> Coordinates:
        dimensions = self._dimensions()
        spans = [_decades(hp) for hp, _ in dimensions]
        names = [hp.name for hp, _ in dimensions]
        batch = names.index(BATCH_HYPERPARAMETERS[0]) if BATCH_HYPERPARAMETERS[0] in names else None
        rates = () if batch is None else tuple(
            (index, spans[batch] / spans[index])
            for index, name in enumerate(names)
            if spans[index] and ("learning_rate" in name or name == "lr")
        )  # fmt: skip
        return Coordinates([hasattr(it.distribution, "choices") for _, it in dimensions], batch, rates)

    def _point(self, values: dict[str, Any]) -> list[float]:
        """Returns the coordinates of values: from 0 to 1, or a category's number; 0.5 where one is inactive."""
        params, distributions = optuna_space.encoded(self.hyperparameters.space, values)
        return [
            _place(distributions[it.name], params[it.name]) if it.name in params else 0.5
            for _, it in self._dimensions()
        ]


def _place(distribution: Any, value: Any) -> float:
    if hasattr(distribution, "choices"):
        return float(distribution.choices.index(value))
    low, high = distribution.low, distribution.high
    if getattr(distribution, "log", False):
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low) if high > low else 0.5


def _decades(hp: Any) -> float:
    """Returns over how many powers of ten a hyperparameter's values go; 0 if that is not how they are spaced."""
    if getattr(hp, "sampling", None) == "log":
        return math.log10(hp.max_value / hp.min_value)
    values = [it for it in getattr(hp, "values", ()) if isinstance(it, (int, float)) and it > 0]
    return math.log10(max(values) / min(values)) if getattr(hp, "ordered", False) and len(values) > 1 else 0.0


def _scaled(
    found: dict[str, tuple[list[int], list[float]]], is_logarithmic: bool
) -> dict[str, tuple[list[int], list[float]]]:
    heights = [height for _, values in found.values() for height in values]
    lowest, spread = min(heights), float(np.std(heights))
    scale = 1.0 if is_logarithmic and spread >= _LEAST_SPREAD else (_LEAST_SPREAD if is_logarithmic else _SPREAD)
    factor = scale / spread if scale != 1.0 and spread > 0 else 1.0
    best: dict[int, float] = {}
    for epochs, values in found.values():
        for epoch, height in zip(epochs, values, strict=True):
            best[epoch] = min(best.get(epoch, math.inf), height)

    def shown(epoch: int, height: float) -> float:
        above = (height - best[epoch]) * factor
        above = above if above <= _FAR else _FAR * (1 + math.log(above / _FAR))
        return (best[epoch] - lowest) * factor + above

    return {
        name: (epochs, [shown(*it) for it in zip(epochs, values, strict=True)])
        for name, (epochs, values) in found.items()
    }
