"""Makes Optuna's samplers a Keras Tuner oracle: they propose values, Keras Tuner keeps the trials.

The Optuna study is made from Keras Tuner's trials, so a resumed search has the same knowledge. A trial is reported as:

    completed, reused    its objective
    pruned               the final objective that was forecast from its epochs
    failed               the worst objective so far, so that such values are avoided
    infeasible           the median objective, since its quality is unknown, and a violated constraint
"""

from __future__ import annotations

import importlib.util
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import keras_tuner
from keras_tuner.engine.trial import TrialStatus

from accumtune.errors import SearchError
from accumtune.oracles import optuna_space
from accumtune.oracles.keras_tuner_adapter import MAX_DRAWS
from accumtune.oracles.optuna_study import Study

# The number of completed trials, spread evenly over the space, before a model is fitted. A Gaussian process can use
# very few (as many as there are dimensions; `experiments/DECISIONS.md` compares other numbers), TPE cannot.
_FEWEST_STARTUP_TRIALS = 3
_STARTUP_TRIALS_OF_TPE = 10
# The cost of a Gaussian process grows with the cube of the number of trials; beyond this many, TPE is used.
_MOST_GAUSSIAN_TRIALS = 200
# After so many proposals in a row that were tried already, random values are used.
_MAX_DUPLICATES = 4


class OptunaOracle(keras_tuner.Oracle):
    """A Keras Tuner oracle whose proposals come from an Optuna sampler.

    Args:
        sampler: an `optuna.samplers.BaseSampler`; None for a few trials spread evenly over the space and then
            `GPSampler` if torch is installed, multivariate `TPESampler` otherwise. The default depends on nothing but
            the seed and the trials, so a resumed search proposes the same as one without interruption; your own
            sampler has a random state of its own.
        **kwargs: arguments of `keras_tuner.Oracle`: `objective`, `max_trials`, `seed`, …

    Raises:
        SearchError: Optuna is not installed.
    """

    def __init__(self, sampler: Any = None, **kwargs: Any) -> None:
        require_optuna()
        super().__init__(**kwargs)
        self.sampler = sampler
        # Values that did not fit, including those of proposals that were replaced.
        self._infeasible: list[dict[str, Any]] = []
        self._infeasible_trials: list[str] = []
        # The forecast objective of a pruned trial, by its id; None for all others.
        self.forecast: Callable[[str], float | None] = lambda trial_id: None
        self._study: Study | None = None
        self._study_key: tuple[int, bool] | None = None
        self._told = self._told_infeasible = 0
        self._scores: list[float] = []
        self._failed: list[Any] = []

    # Keras Tuner's interface

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        """Returns the sampler's next proposal, as Keras Tuner expects it."""
        values = self._propose(trial_id)
        if values is None:
            return {"status": TrialStatus.STOPPED}
        return {"status": TrialStatus.RUNNING, "values": values}

    def get_state(self) -> dict[str, Any]:
        return {
            **super().get_state(),
            "infeasible": self._infeasible,
            "infeasible_trials": self._infeasible_trials,
        }

    def set_state(self, state: dict[str, Any]) -> None:
        super().set_state(state)
        self._infeasible = state.get("infeasible", [])
        self._infeasible_trials = state.get("infeasible_trials", [])
        self._study = None

    # accumtune's additions

    def note_infeasible(self, trial: Any) -> None:
        """Notes that a trial's values need more memory than there is."""
        if trial.trial_id in self._infeasible_trials:
            return
        known = {hp.name for hp in self.hyperparameters.space}
        self._infeasible.append({k: v for k, v in trial.hyperparameters.values.items() if k in known})
        self._infeasible_trials.append(trial.trial_id)

    def forget_infeasible(self) -> None:
        """Forgets infeasible values, after the budget has grown."""
        self._infeasible, self._study = [], None

    def other_values(self, trial: Any) -> dict[str, Any] | None:
        """Returns another proposal for a trial whose values did not fit; None if nothing new is left."""
        values = self._propose(trial.trial_id)
        if values is not None:
            self._infeasible_trials.remove(trial.trial_id)  # the trial now has values that may fit
        return values

    # Proposing

    def _propose(self, trial_id: str) -> dict[str, Any] | None:
        study = self._informed_study()
        if self.sampler is None and len(self._scores) < self._startup_trials():
            return self._spread_values()
        for _ in range(_MAX_DUPLICATES):
            self._seed_state += 1
            values = study.ask(trial_id, self.sampler or self._default_sampler())
            if values in self._infeasible:
                study.drop(trial_id)
            elif not self._duplicate(values):
                return values
            else:
                # Report the known outcome again, so that the sampler becomes certain there and looks elsewhere.
                score = self._score_of(values)
                if score is not None:
                    study.tell(trial_id, values, score)
        study.drop(trial_id)
        random_values: dict[str, Any] | None = self._random_values()
        return random_values

    def _startup_trials(self) -> int:
        if not self._is_gaussian():
            return _STARTUP_TRIALS_OF_TPE
        searched = sum(optuna_space.dimension(hp) is not None for hp in self.hyperparameters.space)
        return max(searched, _FEWEST_STARTUP_TRIALS)

    def _spread_values(self) -> dict[str, Any] | None:
        """Returns the next point of a sequence that fills the space evenly, else random values; None without any."""
        first = len(self.start_order) + len(self._infeasible)
        for values in optuna_space.spread(self.hyperparameters.space, self.seed, first, MAX_DRAWS):
            if values not in self._infeasible and not self._duplicate(values):
                return values
        random_values: dict[str, Any] | None = self._random_values()
        return random_values

    def _is_gaussian(self) -> bool:
        return importlib.util.find_spec("torch") is not None and len(self.end_order) <= _MOST_GAUSSIAN_TRIALS

    def _default_sampler(self) -> Any:
        """Makes a new sampler each time, so that proposals depend only on the trials and the seed."""
        from optuna.samplers import GPSampler, RandomSampler, TPESampler

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the arguments are experimental in Optuna
            tpe = TPESampler(n_startup_trials=0, multivariate=True, group=True, seed=self._seed_state)
        if not self._is_gaussian():
            return tpe
        # The Gaussian process handles hyperparameters that all trials have; conditional ones are left to TPE.
        is_conditional = optuna_space.has_conditions(self.hyperparameters.space)
        return GPSampler(
            seed=self._seed_state,
            n_startup_trials=0,
            independent_sampler=tpe if is_conditional else RandomSampler(seed=self._seed_state),
            warn_independent_sampling=False,
        )

    def _score_of(self, values: dict[str, Any]) -> float | None:
        digest = self._compute_values_hash(values)
        same = (trial for trial_id, trial in self.trials.items() if self._id_to_hash[trial_id] == digest)
        return next((self._value_of(trial) for trial in same if trial.status == TrialStatus.COMPLETED), None)

    def _value_of(self, trial: Any) -> float:
        forecast = self.forecast(trial.trial_id)
        return float(trial.score if forecast is None else forecast)

    # Optuna's study

    def _informed_study(self) -> Study:
        """Returns the study, after telling it all trials that have ended since the last call."""
        key = (len(self.hyperparameters.space), bool(self._infeasible))
        if self._study is None or self._study_key != key:
            self._study = Study(self.hyperparameters.space, self.objective.direction, is_constrained=key[1])
            self._study_key = key
            self._told = self._told_infeasible = 0
            self._scores, self._failed = [], []
        for trial_id in self.end_order[self._told :]:
            trial = self.trials[trial_id]
            if trial.status == TrialStatus.COMPLETED:
                self._scores.append(self._value_of(trial))
                self._study.tell(trial_id, trial.hyperparameters.values, self._scores[-1])
            elif trial_id not in self._infeasible_trials:
                self._failed.append(trial)
        self._told = len(self.end_order)
        if self._scores:
            self._tell_trials_without_score(self._study)
        return self._study

    def _tell_trials_without_score(self, study: Study) -> None:
        worst = (max if self.objective.direction == "min" else min)(self._scores)
        for trial in self._failed:
            study.tell(trial.trial_id, trial.hyperparameters.values, worst)
        self._failed = []
        for number, values in enumerate(self._infeasible[self._told_infeasible :]):
            study.tell(f"infeasible {number}", values, statistics.median(self._scores), is_feasible=False)
        self._told_infeasible = len(self._infeasible)


def require_optuna() -> None:
    """Raises an error that says how to install Optuna, if it is missing.

    Raises:
        SearchError: Optuna is missing, or too old to support constraints.
    """
    try:
        import optuna
    except ImportError as error:
        found = "no module optuna"
        cause: ImportError | None = error
    else:
        if int(optuna.__version__.split(".")[0]) >= 5:
            return
        found, cause = f"optuna {optuna.__version__}", None
    raise SearchError(
        f"OptunaSearch found {found}.",
        "Optuna 5 or later.",
        "pip install 'accumtune[optuna]' (or: pip install 'optuna>=5'; with torch beside it for Gaussian processes).",
    ) from cause
