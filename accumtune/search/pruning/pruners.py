"""Who says that a trial is hopeless: a forecast of what it will end with, or one of Optuna's pruners."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from accumtune.oracles.optuna_study import new_study
from accumtune.search.pruning.forecast import forecast


class Judge(Protocol):
    """Is told of epochs and of ends, and says who is hopeless."""

    def report(self, trial_id: str, epoch: int, value: float) -> None: ...

    def is_hopeless(self, trial_id: str, curve: Sequence[float], finished: Sequence[Sequence[float]]) -> bool: ...

    def end(self, trial_id: str, curve: Sequence[float], status: str) -> None: ...


def open_judge(pruner: Any, direction: str) -> Judge:
    """`"forecast"` or an `optuna.pruners.BasePruner`, as a judge of objectives that go in this direction."""
    return ForecastJudge(direction) if pruner == "forecast" else OptunaJudge(pruner, direction)


class ForecastJudge:
    """A trial is hopeless where its forecast is."""

    def __init__(self, direction: str) -> None:
        self._direction = direction

    def report(self, trial_id: str, epoch: int, value: float) -> None:
        pass

    def is_hopeless(self, trial_id: str, curve: Sequence[float], finished: Sequence[Sequence[float]]) -> bool:
        found = forecast(curve, finished, self._direction)
        return found is not None and found.is_hopeless

    def end(self, trial_id: str, curve: Sequence[float], status: str) -> None:
        pass


class OptunaJudge:
    """A trial is hopeless where one of Optuna's pruners says so."""

    def __init__(self, pruner: Any, direction: str) -> None:
        self._study = new_study(direction, pruner=pruner)
        self._trials: dict[str, Any] = {}

    def report(self, trial_id: str, epoch: int, value: float) -> None:
        if trial_id not in self._trials:
            self._trials[trial_id] = self._study.ask()
        self._trials[trial_id].report(value, step=epoch)

    def is_hopeless(self, trial_id: str, curve: Sequence[float], finished: Sequence[Sequence[float]]) -> bool:
        return bool(self._trials[trial_id].should_prune())

    def end(self, trial_id: str, curve: Sequence[float], status: str) -> None:
        from optuna.trial import TrialState

        trial = self._trials.pop(trial_id)
        if status == "completed" and curve[-1] == curve[-1]:
            self._study.tell(trial, curve[-1])
        else:
            self._study.tell(trial, state=TrialState.PRUNED if status == "pruned" else TrialState.FAIL)
