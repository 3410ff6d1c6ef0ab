"""Reads the metrics of the best epoch from what a `fit` returned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras_tuner import errors as tuner_errors
from keras_tuner.src.engine import tuner_utils  # how Keras Tuner reads what fit() returns; it has no public name
from keras_tuner.src.engine.objective import DefaultObjective

from accumtune.errors import SearchError


def result_of(
    returned: Any, objective: Any, is_scored_later: bool = False, is_paused: bool = False
) -> tuple[dict[str, Any], int]:
    """Returns the metrics and the number of the best epoch, from the value that `fit` returned.

    Keras Tuner pairs the values of a History by their positions; with `validation_freq`, those are of other epochs.

    Args:
        returned: what `fit` returned.
        objective: Keras Tuner's.
        is_scored_later: whether the objective may be missing.
        is_paused: whether the training will go on after its last epoch.

    Raises:
        SearchError: it is not a result for Keras Tuner. This would happen in every trial.
    """
    if isinstance(returned, keras.callbacks.History) and returned.history:
        rows = rows_of(returned)
        scored = [epoch for epoch in rows if objective.has_value(epoch[1])]
        if is_paused and (not scored or scored[-1] is not rows[-1]):
            raise SearchError(
                f'Received pruner="freeze-thaw", and epochs without {objective.name!r}.',
                "the objective in every epoch, because trials pause after any of them.",
                "leave out validation_freq, or take another pruner.",
            )
        if scored:
            return best_of(scored, objective)
        if is_scored_later:
            return rows[-1][1], rows[-1][0]
        if isinstance(objective, DefaultObjective):
            raise SearchError(
                f"Received no objective, and a training that reports {', '.join(returned.history)}.",
                "one of these as the objective, or a HyperModel.fit that returns a number to minimize.",
                'give the tuner objective="val_loss", for example.',
            )
        raise SearchError(
            f"Received the objective {objective.name!r}, and a training that reports {', '.join(returned.history)}.",
            "an objective that the training reports.",
            "compile the model with that metric, give search() validation_data (and, with validation_freq, enough "
            "epochs for one validation), or choose another objective.",
        )
    try:
        tuner_utils.validate_trial_results(returned, objective, "HyperModel.fit()")
    except tuner_errors.FatalError as error:
        raise SearchError(
            f"Received {returned!r} of type {type(returned).__name__} from HyperModel.fit. {error}",
            f"what model.fit returned, a number, or a dict with {objective.name!r}.",
            "end HyperModel.fit with `return model.fit(*args, **kwargs)`.",
        ) from error
    # In a list, as Keras Tuner has one result for each execution.
    return tuner_utils.convert_to_metrics_dict([returned], objective), 0


def rows_of(history: Any) -> list[tuple[int, dict[str, Any]]]:
    """Returns the number and the logs of each epoch of a History."""
    rows: Sequence[Any] = getattr(history, "rows", None) or [
        (epoch, {name: values[at] for name, values in history.history.items() if at < len(values)})
        for at, epoch in enumerate(history.epoch)
    ]
    return [(int(epoch), dict(row)) for epoch, row in rows]


def best_of(scored: Sequence[tuple[int, Mapping[str, Any]]], objective: Any) -> tuple[dict[str, Any], int]:
    """Returns the metrics and the number of the first epoch with the best objective."""
    values = [objective.get_value(row) for _, row in scored]
    best = 0
    for at, value in enumerate(values):
        if objective.better_than(value, values[best]):
            best = at
    epoch, row = scored[best]
    return {**row, objective.name: values[best]}, epoch
