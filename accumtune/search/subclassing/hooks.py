"""The methods that a subclass of a tuner may override, as a search calls them around its trials."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accumtune.search.trial.trial_result import TrialResult

# Trains a trial: trial, what of `fit` differs as plain values, and the file of its data where it has data of its own.
Train = Callable[[Any, Mapping[str, Any], Path | None], TrialResult]


@dataclass(frozen=True)
class Hooks:
    """Keras Tuner's, by their names there.

    Args:
        pre_create_trial: before a proposal.
        on_trial_begin: with the proposal, before it runs.
        on_trial_end: with a trial that has ended, its score and status known.
        run_trial: runs a trial, given what Hyperband overrides and what trains it in a process of its own; None where
            no subclass has one.
        after_trial: when the trials that have ended are told.
    """

    pre_create_trial: Callable[[], None] = lambda: None
    on_trial_begin: Callable[[Any], None] = lambda trial: None
    on_trial_end: Callable[[Any], None] = lambda trial: None
    run_trial: Callable[[Any, Mapping[str, Any], Train], TrialResult] | None = None
    after_trial: Callable[[], None] = lambda: None
