"""Ends a search that has failed: nothing fits the budget, or too many trials in a row fail."""

from __future__ import annotations

from typing import Any

import keras
from keras_tuner.engine.trial import TrialStatus

from accumtune.errors import BudgetTooSmallError, SearchFailedError
from accumtune.memory.budget import format_bytes
from accumtune.memory.machine import budget_hint
from accumtune.oracles import keras_tuner_adapter
from accumtune.tracking.journal import read_trial
from accumtune.worker.transport.task_directory import SearchDirectory


class FailureLimits:
    """Counts infeasible and failed trials, and raises once there are too many.

    Args:
        oracle: Keras Tuner's.
        directory: of the search.
        memory_budget_bytes: for messages.
    """

    def __init__(self, oracle: Any, directory: SearchDirectory, memory_budget_bytes: int | None) -> None:
        self._oracle = oracle
        self._directory = directory
        self._memory_budget_bytes = memory_budget_bytes
        # Proposals that did not fit since the last one that trained.
        self.infeasible_in_a_row = 0

    def may_replace_infeasible(self) -> bool:
        """Returns whether a trial that does not fit gets other values, instead of ending as infeasible."""
        return self._draws() and self.infeasible_in_a_row < keras_tuner_adapter.MAX_DRAWS

    def nothing_else_fits(self) -> bool:
        """Returns whether the rest of the space is assumed not to fit."""
        return self._draws() and self.infeasible_in_a_row >= 2 * keras_tuner_adapter.MAX_DRAWS

    def check(self) -> None:
        """Checks, after each trial, whether the search has failed.

        Raises:
            SearchFailedError: `max_consecutive_failed_trials` trials failed one after another.
            BudgetTooSmallError: none of many proposals fits in the budget at any micro-batch size.
        """
        # A grid starts in one corner, which says nothing about the others, so it runs to its end.
        if self._draws() and self.infeasible_in_a_row >= keras_tuner_adapter.MAX_DRAWS:
            self._refuse_where_nothing_fits()
        failed = keras_tuner_adapter.consecutive_failures(self._oracle)
        counted = [trial for trial in failed if self._status(trial) == "failed"]
        if len(counted) >= self._oracle.max_consecutive_failed_trials:
            counted = counted[-self._oracle.max_consecutive_failed_trials :]
            raise _too_many_failures(counted, f"{len(counted)} trials in a row")

    def check_end(self) -> None:
        """Raises the errors of `check` for a search that has ended without a result, however few trials it had."""
        self._refuse_where_nothing_fits()
        ended = [self._oracle.trials[trial_id] for trial_id in self._oracle.end_order]
        failed = [trial for trial in ended if self._status(trial) == "failed"]
        if failed and not self._any_completed():
            raise _too_many_failures(failed, "The only trial" if len(failed) == 1 else f"All {len(failed)} trials")

    def _draws(self) -> bool:
        return keras_tuner_adapter.can_redraw(self._oracle)

    def _refuse_where_nothing_fits(self) -> None:
        if self.infeasible_in_a_row and not self._any_completed():
            failed = keras_tuner_adapter.consecutive_failures(self._oracle)
            raise self._too_small(failed[-1].message if failed else "")

    def _any_completed(self) -> bool:
        return any(trial.status == TrialStatus.COMPLETED for trial in self._oracle.trials.values())

    def _status(self, trial: Any) -> str:
        return str(read_trial(self._directory.trial(trial.trial_id).path).status)

    def _too_small(self, reason: str) -> SearchFailedError | BudgetTooSmallError:
        if self._memory_budget_bytes is None:
            return SearchFailedError(
                f"None of {self.infeasible_in_a_row} proposals may be trained: {reason}.",
                "a build function that also makes smaller models.",
                "raise max_model_size.",
            )
        return BudgetTooSmallError(
            f"Received memory_budget={format_bytes(self._memory_budget_bytes)}, in which none of "
            f"{self.infeasible_in_a_row} proposals fits: {reason or 'not even micro-batch 1 fits'}.",
            "a budget that holds the parameters, the optimizer's slots and one sample's activations.",
            "raise memory_budget, or let the build function make smaller models."
            + budget_hint(keras.config.backend()),
        )


def _too_many_failures(trials: list[Any], which: str) -> SearchFailedError:
    reasons = "\n".join(f"  trial {trial.trial_id}: {(trial.message or '').splitlines()[0]}" for trial in trials)
    return SearchFailedError(
        f"{which} failed:\n{reasons}\n\nThe last one in full:\n{trials[-1].message}",
        "a build function whose models train.",
        "correct what the reasons name and run the same script again: completed trials are kept if the script still "
        "builds their models. To allow more failures in a row, raise max_consecutive_failed_trials.",
    )
