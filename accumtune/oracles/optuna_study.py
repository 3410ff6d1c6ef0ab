"""Wraps an Optuna study for Keras Tuner's hyperparameters: ask for values, tell their results."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from accumtune.oracles import optuna_space

_CONSTRAINT = "memory"


class Study:
    """An Optuna study of a search.

    Args:
        space: Keras Tuner's hyperparameters.
        direction: of the objective, `"min"` or `"max"`.
        is_constrained: whether some values did not fit; each trial is then told with a constraint.
    """

    def __init__(self, space: Sequence[Any], direction: str, is_constrained: bool) -> None:
        self._space = list(space)
        self._is_constrained = is_constrained
        self._study = new_study(direction)
        # Optuna's running trials by Keras Tuner's names.
        self._running: dict[str, Any] = {}

    def ask(self, trial_id: str, sampler: Any) -> dict[str, Any]:
        """Returns a sampler's proposal for a trial, which counts as running from now on."""
        self.drop(trial_id)
        self._study.sampler = sampler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self._running[trial_id] = self._study.ask()
            return optuna_space.suggest(self._space, self._running[trial_id])

    def tell(self, trial_id: str, values: Mapping[str, Any], value: float, is_feasible: bool = True) -> None:
        """Tells Optuna the result of values, whether it has proposed them or not."""
        params, distributions = optuna_space.encoded(self._space, values)
        constraints = {_CONSTRAINT: -1.0 if is_feasible else 1.0} if self._is_constrained else {}
        asked = self._running.get(trial_id)
        if asked is not None and asked.params == params:
            # The trial that was asked for, with which some samplers keep a state.
            for name, amount in constraints.items():
                asked.set_constraint(name, amount)
            self._study.tell(self._running.pop(trial_id), value)
        else:
            from optuna.trial import create_trial

            self.drop(trial_id)
            self._study.add_trial(
                create_trial(params=params, distributions=distributions, value=value, constraints=constraints)
            )

    def drop(self, trial_id: str) -> None:
        """Ends the trial that was asked for under this name without a result; Optuna ignores it."""
        from optuna.trial import TrialState

        asked = self._running.pop(trial_id, None)
        if asked is not None:
            self._study.tell(asked, state=TrialState.FAIL)


def new_study(direction: str, **arguments: Any) -> Any:
    """Makes an `optuna.Study` in memory, without printing anything."""
    import optuna

    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(direction="maximize" if direction == "max" else "minimize", **arguments)
    finally:
        optuna.logging.set_verbosity(verbosity)
