"""A resumed search whose model is no longer the one that its trials trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from accumtune.errors import BuildError
from accumtune.tracking.records import TrialRecord
from accumtune.trials.profiling import ModelFacts


def edited_model_warning(
    trials: Sequence[TrialRecord],
    space_of: Callable[[str], Mapping[str, Any]],
    inspect: Callable[[Mapping[str, Any]], ModelFacts],
) -> str | None:
    """What to tell the user, where the newest trained trial's hyperparameters now make another model.

    A build function is code, so whether it was edited is found out by calling it: layers, loss, optimizer, the shapes
    of the data and the versions of the framework are in a model's signature. Numbers such as a dropout rate are not.

    Args:
        trials: of the sessions before.
        space_of: Keras Tuner's configuration of the hyperparameters of a trial, by its number.
        inspect: builds a model and describes it.
    """
    trained = [trial for trial in trials if trial.status == "completed" and trial.signature]
    if not trained:
        return None
    newest = max(trained, key=lambda trial: trial.ended_at or 0.0)
    try:
        facts = inspect({**space_of(newest.trial_id), "values": dict(newest.hyperparameters)})
    except BuildError:  # the next trial says it better
        return None
    if facts.signature == newest.signature:
        return None
    return (
        f"This is not the model that trial {newest.trial_id} trained with the same hyperparameters (or its data, the "
        "device or the framework have changed), and the search goes on with both: take another project_name, or "
        "overwrite=True, to compare like with like."
    )
