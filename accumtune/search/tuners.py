"""Keras Tuner's tuners under a memory budget: same names, same arguments, plus the budget."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras_tuner

from accumtune.search.tuner import Tuner

_ORACLE_ARGUMENTS = (
    "objective", "max_trials", "seed", "hyperparameters", "tune_new_entries", "allow_new_entries",
    "max_retries_per_trial", "max_consecutive_failed_trials",
)  # fmt: skip


class RandomSearch(Tuner):
    """`keras_tuner.RandomSearch` under a memory budget; the other arguments are those of `accumtune.Tuner`."""

    def __init__(self, hypermodel: Any = None, objective: Any = None, max_trials: int = 10, **kwargs: Any) -> None:
        own = _take(kwargs, _ORACLE_ARGUMENTS)
        oracle = keras_tuner.oracles.RandomSearchOracle(objective=objective, max_trials=max_trials, **own)
        super().__init__(oracle, hypermodel, **kwargs)


class BayesianOptimization(Tuner):
    """`keras_tuner.BayesianOptimization` under a memory budget, over the ordered effective batch.

    Takes `num_initial_points`, `alpha` and `beta` as Keras Tuner's does; the other arguments are those of
    `accumtune.Tuner`.
    """

    def __init__(self, hypermodel: Any = None, objective: Any = None, max_trials: int = 10, **kwargs: Any) -> None:
        own = _take(kwargs, (*_ORACLE_ARGUMENTS, "num_initial_points", "alpha", "beta"))
        oracle = keras_tuner.oracles.BayesianOptimizationOracle(objective=objective, max_trials=max_trials, **own)
        super().__init__(oracle, hypermodel, **kwargs)


class GridSearch(Tuner):
    """`keras_tuner.GridSearch` under a memory budget; the other arguments are those of `accumtune.Tuner`."""

    def __init__(
        self, hypermodel: Any = None, objective: Any = None, max_trials: int | None = None, **kwargs: Any
    ) -> None:
        own = _take(kwargs, _ORACLE_ARGUMENTS)
        oracle = keras_tuner.oracles.GridSearchOracle(objective=objective, max_trials=max_trials, **own)
        super().__init__(oracle, hypermodel, **kwargs)


class Hyperband(Tuner):
    """`keras_tuner.Hyperband` under a memory budget: a promoted trial goes on from its earlier weights.

    Takes `max_epochs`, `factor` and `hyperband_iterations` as Keras Tuner's does; the other arguments are those of
    `accumtune.Tuner`.
    """

    def __init__(
        self,
        hypermodel: Any = None,
        objective: Any = None,
        max_epochs: int = 100,
        factor: int = 3,
        hyperband_iterations: int = 1,
        **kwargs: Any,
    ) -> None:
        own = _take(kwargs, tuple(name for name in _ORACLE_ARGUMENTS if name != "max_trials"))
        oracle = keras_tuner.oracles.HyperbandOracle(
            objective=objective,
            max_epochs=max_epochs,
            factor=factor,
            hyperband_iterations=hyperband_iterations,
            **own,
        )
        super().__init__(oracle, hypermodel, **kwargs)


def _take(kwargs: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: kwargs.pop(name) for name in list(kwargs) if name in names}
