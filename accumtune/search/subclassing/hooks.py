"""Holds the methods of a tuner that a subclass may override and a search calls around its trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accumtune.search.trial.trial_result import TrialResult

# Trains a trial, given the trial, the plain arguments of `fit` that differ from the search's, and the file of its data
# if they are not the search's.
Train = Callable[[Any, Mapping[str, Any], Path | None], TrialResult]


@dataclass(frozen=True)
class Hooks:
    """Keras Tuner's methods, under their names there.

    Args:
        pre_create_trial: called before the oracle is asked for a trial.
        on_trial_begin: called with the trial before it runs.
        on_trial_end: called with a trial that has ended, its score and status set.
        run_trial: runs a trial, given Hyperband's arguments of `fit` and the function that trains it in a process of
            its own; None if no subclass overrides it.
        after_trial: called after the ends of trials have been reported.
    """

    pre_create_trial: Callable[[], None] = lambda: None
    on_trial_begin: Callable[[Any], None] = lambda trial: None
    on_trial_end: Callable[[Any], None] = lambda trial: None
    run_trial: Callable[[Any, Mapping[str, Any], Train], TrialResult] | None = None
    after_trial: Callable[[], None] = lambda: None
