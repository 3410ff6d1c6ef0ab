"""Keras Tuner's tuners under a memory budget: same names, same arguments, plus the budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import keras_tuner

from accumtune.errors import SearchError
from accumtune.oracles.metric_direction import with_direction
from accumtune.search.subclassing.overrides import is_overridden
from accumtune.search.tuner import Tuner

if TYPE_CHECKING:
    from accumtune.search.pruning.pruner import PruningMonitor

_ORACLE_ARGUMENTS = (
    "seed", "hyperparameters", "tune_new_entries", "allow_new_entries", "max_retries_per_trial",
    "max_consecutive_failed_trials",
)  # fmt: skip
# Replaces seed=0: Keras Tuner takes 0 for no seed and draws one from 1 to 10,000, so two searches would differ.
_SEED_FOR_ZERO = 10_001
_FREEZE_THAW = "freeze-thaw"


class RandomSearch(Tuner):
    """`keras_tuner.RandomSearch` under a memory budget; the other arguments are those of `accumtune.Tuner`."""

    def __init__(self, hypermodel: Any = None, objective: Any = None, max_trials: int = 10, **kwargs: Any) -> None:
        make = keras_tuner.oracles.RandomSearchOracle
        super().__init__(_oracle(self, make, objective, kwargs, max_trials=max_trials), hypermodel, **kwargs)


class BayesianOptimization(Tuner):
    """`keras_tuner.BayesianOptimization` under a memory budget, over the ordered effective batch.

    Takes `num_initial_points`, `alpha` and `beta` as Keras Tuner's does; the other arguments are those of
    `accumtune.Tuner`.
    """

    def __init__(self, hypermodel: Any = None, objective: Any = None, max_trials: int = 10, **kwargs: Any) -> None:
        own = {name: kwargs.pop(name) for name in ("num_initial_points", "alpha", "beta") if name in kwargs}
        make = keras_tuner.oracles.BayesianOptimizationOracle
        oracle = _oracle(self, make, objective, kwargs, max_trials=max_trials, **own)
        super().__init__(oracle, hypermodel, **kwargs)


class GridSearch(Tuner):
    """`keras_tuner.GridSearch` under a memory budget; the other arguments are those of `accumtune.Tuner`."""

    def __init__(
        self, hypermodel: Any = None, objective: Any = None, max_trials: int | None = None, **kwargs: Any
    ) -> None:
        make = keras_tuner.oracles.GridSearchOracle
        super().__init__(_oracle(self, make, objective, kwargs, max_trials=max_trials), hypermodel, **kwargs)


class Hyperband(Tuner):
    """`keras_tuner.Hyperband` under a memory budget: a promoted trial continues from its earlier weights.

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
        oracle = _oracle(
            self, keras_tuner.oracles.HyperbandOracle, objective, kwargs,
            max_epochs=max_epochs, factor=factor, hyperband_iterations=hyperband_iterations,
        )  # fmt: skip
        super().__init__(oracle, hypermodel, **kwargs)


class OptunaSearch(Tuner):
    """A search whose proposals come from Optuna, and whose hopeless trials can be stopped.

    `pip install 'accumtune[optuna]'`. Conditional hyperparameters, several `workers`, resuming and everything else of
    `accumtune.Tuner` work as with Keras Tuner's own oracles.

    `pruner="freeze-thaw"` replaces Optuna's proposals: a model of all learning curves decides after each part of a
    training (1, 2, 3, 4, 6, 9, … epochs) which paused trial goes on, or which new one begins. `max_trials` is then a
    number of whole trainings, among which more trials share their epochs. The result of a trial that was not continued
    is its best epoch, and its reason says after which epoch it was paused.

    A pruned trial counts as trained: its status is completed, its result is the best epoch that it reached, and its
    reason (`accumtune.reason` in MLflow) says after which epoch it was pruned. The sampler learns the objective that
    was forecast for it. With several `executions_per_trial` the first one decides.

    Args:
        hypermodel: a Keras Tuner build function or `keras_tuner.HyperModel`.
        objective: as in Keras Tuner.
        max_trials: how many trials train.
        sampler: an `optuna.samplers.BaseSampler`; None for a few trials spread evenly over the space and then
            `GPSampler` where torch is installed, multivariate `TPESampler` otherwise.
        pruner: decides after each epoch, from the objective so far, whether to stop the trial. `"forecast"` estimates
            from the trials that ran to their end whether this one can still become the best; `"freeze-thaw"` pauses
            trials and goes on with the most promising ones; an `optuna.pruners.BasePruner` decides in its way; None
            trains all trials to their end.
        **kwargs: arguments of `accumtune.Tuner` and of `keras_tuner.Oracle`.

    Raises:
        SearchError: Optuna is not installed, `pruner` is something else, or `"freeze-thaw"` is given a sampler or
            several `executions_per_trial`.
    """

    def __init__(
        self,
        hypermodel: Any = None,
        objective: Any = None,
        max_trials: int = 10,
        *,
        sampler: Any = None,
        pruner: Any = None,
        **kwargs: Any,
    ) -> None:
        from accumtune.oracles.freeze_thaw_oracle import FreezeThawOracle
        from accumtune.oracles.optuna_oracle import OptunaOracle, require_optuna

        require_optuna()
        _check_pruner(pruner)
        self._pruner = pruner
        if pruner == _FREEZE_THAW:
            _check_freeze_thaw(type(self), sampler, kwargs.get("executions_per_trial", 1))
            oracle = _oracle(self, FreezeThawOracle, objective, kwargs, max_trials=max_trials)
        else:
            oracle = _oracle(self, OptunaOracle, objective, kwargs, max_trials=max_trials, sampler=sampler)
        super().__init__(oracle, hypermodel, **kwargs)

    def _pruning(self) -> PruningMonitor | None:
        if self._pruner is None:
            return None
        if self._pruner == _FREEZE_THAW:
            self._prepare_freezing()
            return None
        from accumtune.search.pruning.pruner import PruningMonitor

        pruning = PruningMonitor(self._pruner, self.oracle.objective)
        pruning.remember(self.record().trials)
        self.oracle.forecast = pruning.forecast
        return pruning

    def _prepare_freezing(self) -> None:
        from accumtune.search.pruning.trial_curves import trial_curves

        epochs = 1 if self._session is None else self._session.epochs
        if epochs < 2:
            raise SearchError(
                f'Received search(epochs={epochs}) and pruner="freeze-thaw".',
                "two epochs or more: trials are paused between them.",
                "give search() the epochs of a whole training, also where a HyperModel's fit has its own.",
            )
        self.oracle.epochs = epochs
        self.oracle.curve_of = trial_curves(self._files, self.oracle.objective)


def _check_freeze_thaw(tuner: type[Tuner], sampler: Any, executions: int) -> None:
    why = 'which pruner="freeze-thaw" cannot have.'
    if sampler is not None:
        raise SearchError(f"Received {sampler=}, {why}", "None: it proposes by itself.", "leave sampler out.")
    if executions > 1:
        raise SearchError(f"Received executions_per_trial={executions}, {why}", "1.", "leave it out.")
    if is_overridden("run_trial", tuner):
        raise SearchError(
            f"Received {tuner.__name__}.run_trial, {why}",
            "a tuner whose trials are paused and continued: its own run_trial would begin anew each time.",
            "move what it does into callbacks or a HyperModel's fit, or take another pruner.",
        )


def _check_pruner(pruner: Any) -> None:
    from optuna.pruners import BasePruner

    if pruner not in (None, "forecast", _FREEZE_THAW) and not isinstance(pruner, BasePruner):
        raise SearchError(
            f"Received {pruner=}.",
            'None, "forecast", "freeze-thaw", or one of optuna.pruners.',
            'take pruner="forecast" to stop trials that can no longer become the best.',
        )


def _oracle(
    tuner: Tuner, make: Callable[..., Any], objective: Any, kwargs: dict[str, Any], **arguments: Any
) -> Any:
    """Makes a tuner's oracle.

    Args:
        tuner: keeps the seed that the user gave.
        make: the class of the oracle.
        objective: as in Keras Tuner.
        kwargs: the tuner's arguments; those of the oracle are removed from them.
        **arguments: what only this class of oracle takes.
    """
    arguments |= {name: kwargs.pop(name) for name in _ORACLE_ARGUMENTS if name in kwargs}
    if arguments.get("seed") == 0:
        arguments["seed"] = _SEED_FOR_ZERO
    tuner._asked_seed = arguments.get("seed")
    return make(objective=with_direction(objective), **arguments)
