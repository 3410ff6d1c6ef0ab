"""Calls a subclass's `run_trial` in the search's process, and trains its trial in a process of its own."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from accumtune.errors import AccumtuneError, SearchError
from accumtune.search.argument_checks import refuse_batch_size
from accumtune.search.subclassing.hooks import Train
from accumtune.search.trial.trial_result import TrialResult
from accumtune.tracking.journal import read_trial
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import SearchDirectory

FitArguments = tuple[tuple[Any, ...], dict[str, Any]]


class NotCompleted(Exception):
    """Raised through a `run_trial` whose trial has failed, does not fit the budget or was stopped."""


@dataclass
class _Run:
    overrides: Mapping[str, Any]
    train: Train
    result: TrialResult | None = None
    histories: list[Any] = field(default_factory=list)


class OwnRunTrial:
    """Calls a subclass's `run_trial`; may be used from several threads at once.

    Args:
        run_trial: the subclass's, whose `super().run_trial(...)` calls `train`.
        payload: what `search` sends to the processes of its trials, the arguments of `fit` included.
        objective: Keras Tuner's.
        files: the search's directory.
    """

    def __init__(
        self,
        run_trial: Callable[..., Any],
        payload: Mapping[str, Any],
        objective: Any,
        files: SearchDirectory,
    ) -> None:
        self._run_trial = run_trial
        self._payload = payload
        self._fit_arguments: FitArguments = (tuple(payload["fit_args"]), dict(payload["fit_kwargs"]))
        self._objective = objective
        self._files = files
        self._runs: dict[str, _Run] = {}

    def __call__(self, trial: Any, overrides: Mapping[str, Any], train: Train) -> TrialResult:
        """Runs a trial.

        Args:
            trial: Keras Tuner's.
            overrides: Hyperband's arguments of `fit`.
            train: trains it in a process of its own.

        Raises:
            SearchError: `run_trial` trains nothing, or does not return a result.
        """
        run = self._runs[trial.trial_id] = _Run(overrides, train)
        args, kwargs = self._fit_arguments
        try:
            returned = self._run_trial(trial, *args, **kwargs)
        except NotCompleted:
            returned = None
        except AccumtuneError:
            raise
        except Exception as error:
            reason = f"run_trial raised {type(error).__name__}: {error}".splitlines()[0]
            text = "".join(traceback.format_exception(error))
            return TrialResult("failed", dict(trial.hyperparameters.values), reason=reason, traceback=text)
        finally:
            del self._runs[trial.trial_id]
        if run.result is None:
            raise SearchError(
                "Received a run_trial that returned without training the trial.",
                "a run_trial that calls `super().run_trial(trial, *args, **kwargs)`, which trains in a process of its "
                "own, under the budget.",
                "call it; or move how the model is trained into the `fit` of a keras_tuner.HyperModel, and leave "
                "run_trial out.",
            )
        result = replace(run.result, values={**trial.hyperparameters.values, **run.result.values})
        if result.status != "completed":
            return result
        if returned is not None and returned is not run.histories:
            result = replace(result, metrics={**result.metrics, **self._metrics(returned)})
        if not self._objective.has_value(result.metrics):
            raise SearchError(
                f"Received a run_trial without the objective {self._objective.name!r}: the training reports "
                f"{', '.join(result.metrics)}.",
                "a run_trial that returns the objective, or a model that is compiled with it.",
                f"return {{{self._objective.name!r}: value}}.",
            )
        return result

    def train(self, trial: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Trains a trial for `super().run_trial`, and returns a History of each execution.

        Raises:
            SearchError: called outside of a search, or twice for a trial; or with a batch size.
            NotCompleted: the training did not come to its end.
        """
        run = self._runs.get(trial.trial_id)
        if run is None or run.result is not None:
            raise SearchError(
                f"Received {'a second call of run_trial for one trial' if run else 'run_trial outside of search'}.",
                "one training for each trial.",
                "to train several times and average the objectives, use executions_per_trial=, or the `fit` of a "
                "keras_tuner.HyperModel.",
            )
        refuse_batch_size(kwargs)
        plain, other = self._differences(tuple(args), {k: v for k, v in kwargs.items() if k != "verbose"})
        payload_file = None if other is None else self._write_payload(trial.trial_id, other)
        run.result = run.train(trial, {**plain, **run.overrides}, payload_file)
        if run.result.status != "completed":
            raise NotCompleted(run.result.reason)
        run.histories = _histories(self._files.trial(trial.trial_id).path)
        return run.histories

    def _write_payload(self, trial_id: str, other: FitArguments) -> Path:
        # Beside the search's own payload: the two share the arrays that they have in common.
        payload_file = self._files.payload_file.with_name(f"trial_{trial_id}.pkl")
        dump_payload({**self._payload, "fit_args": other[0], "fit_kwargs": other[1]}, payload_file)
        return payload_file

    def _differences(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Any], FitArguments | None]:
        """Returns the arguments that differ from those of `search`: plain values by name, or all if others differ."""
        given_args, given = self._fit_arguments
        changed = {name: value for name, value in kwargs.items() if name not in given or given[name] is not value}
        same_data = len(args) == len(given_args) and all(map(_is, args, given_args))
        if same_data and set(given) <= set(kwargs) and all(type(value) in _PLAIN for value in changed.values()):
            return changed, None
        return {}, (args, kwargs)

    def _metrics(self, returned: Any) -> dict[str, float]:
        from keras_tuner.src.engine import tuner_utils  # it has no public name

        try:
            tuner_utils.validate_trial_results(returned, self._objective, "run_trial()")
        except Exception as error:
            raise SearchError(
                f"Received {returned!r} of type {type(returned).__name__} from run_trial: {error}",
                "what super().run_trial returned, a number, or a dict with the objective.",
                "return super().run_trial(trial, *args, **kwargs).",
            ) from error
        metrics = tuner_utils.convert_to_metrics_dict(returned, self._objective)
        return {name: float(value) for name, value in metrics.items()}


_PLAIN = (int, float, str, bool, type(None))


def _is(one: Any, other: Any) -> bool:
    return one is other


def _histories(folder: Path) -> list[Any]:
    """Returns a trial's curves as Keras's History objects, one for each execution."""
    import keras

    histories: dict[int, Any] = {}
    for epoch in read_trial(folder).epochs:
        history = histories.setdefault(epoch.execution, keras.callbacks.History())
        history.history = getattr(history, "history", {})
        history.epoch = [*getattr(history, "epoch", []), epoch.epoch]
        for name, value in epoch.logs.items():
            history.history.setdefault(name, []).append(value)
    return [histories[execution] for execution in sorted(histories)]
