"""Makes Keras Tuner's oracles write their state atomically, and read it consistently after a kill.

Keras Tuner saves a trial and its oracle one after the other, and an ended trial while it is still on the list of
running ones. A search that is killed in between would lose a trial, or count one twice.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras_tuner
from keras_tuner.engine.trial import Trial

from accumtune.oracles.incremental_state import IncrementalState, with_changes
from accumtune.oracles.state_files import read_state, write_state
from accumtune.tracking.journal import read_trial


class PersistentOracle:
    """A mixin for an oracle's class: writes Keras Tuner's files atomically and consistently."""

    _file: IncrementalState | None = None
    # How much `max_trials` was raised above the user's, for trials that did not train.
    granted_trials = 0
    _is_in_step = _is_updating = False
    # Whether another process searches in the folder: its files are then only read.
    _is_looking = False

    def save(self: Any) -> None:
        if self._file is None:  # Keras Tuner sets the folder after it has created the oracle
            self._file = IncrementalState(Path(self._get_oracle_fname()), write_state)
        if self._is_in_step:
            self._file.save_changes(self.get_state())
        else:
            self._file.save_whole(self.get_state())

    def create_trial(self: Any, tuner_id: str) -> Any:
        with _set(self, "_is_in_step"):
            return super().create_trial(tuner_id)  # type: ignore[misc]

    def update_trial(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _set(self, "_is_updating"):
            return super().update_trial(*args, **kwargs)  # type: ignore[misc]

    def end_trial(self: Any, *args: Any, **kwargs: Any) -> None:
        with _set(self, "_is_in_step"):
            super().end_trial(*args, **kwargs)  # type: ignore[misc]

    def _check_consecutive_failures(self: Any) -> None:
        if self.max_consecutive_failed_trials != math.inf:  # else accumtune counts them itself
            super()._check_consecutive_failures()  # type: ignore[misc]

    def _save_trial(self: Any, trial: Any) -> None:
        if not self._is_updating:  # the next call ends the trial and saves it
            write_state(Path(self._get_trial_dir(trial.trial_id)) / "trial.json", trial.get_state())

    def reload(self: Any) -> None:
        path = Path(self._get_oracle_fname())
        state = read_state(path)
        complete = with_changes(state, path)
        if self._is_looking:
            self._read_only(complete)
        else:
            if complete != state and "hyperparameters" in complete:  # otherwise there is neither file nor changes
                write_state(path, complete)
            super().reload()  # type: ignore[misc]
        # Keras Tuner saves the oracle while a trial that has just ended is still among the running ones.
        ended = set(self.end_order)
        self._retry_queue = [trial_id for trial_id in dict.fromkeys(self._retry_queue) if trial_id not in ended]
        self.end_order = list(dict.fromkeys(self.end_order))
        # Keras Tuner saves a new trial before the oracle.
        for trial_id in sorted(set(self.trials) - set(self.start_order)):
            folder = Path(self._get_trial_dir(trial_id))
            if self._is_looking:
                del self.trials[trial_id]
            elif read_trial(folder).proposed_at is None or is_grid(self):
                del self.trials[trial_id]  # proposed again, under the same name
                (folder / "trial.json").unlink(missing_ok=True)
            else:
                self.start_order.append(trial_id)
                self._retry_queue.append(trial_id)
                self._record_values(self.trials[trial_id])

    def _read_only(self: Any, complete: dict[str, Any]) -> None:
        """Reloads like Keras Tuner, but from a state that is not in its file yet."""
        for file in Path(self._project_dir).glob("trial_*/trial.json"):
            trial = Trial.load(str(file))
            self.trials[trial.trial_id] = trial
        known = set(self.trials)
        complete["ongoing_trials"] = {}
        complete["start_order"] = [trial_id for trial_id in complete["start_order"] if trial_id in known]
        self.set_state(complete)


class PersistentGridOracle(PersistentOracle):
    """A mixin for a grid: makes it continue from the values that it proposed, instead of those that ran.

    It also saves the grid's position. Keras Tuner does not: a resumed grid would end early or fail with a KeyError.
    """

    def populate_space(self: Any, trial_id: str) -> Any:
        self._swap_proposals()
        try:
            return super().populate_space(trial_id)  # type: ignore[misc]
        finally:
            self._swap_proposals()

    def _swap_proposals(self: Any) -> None:
        for trial_id, values in list(self.replaced_proposals.items()):
            hyperparameters = self.trials[trial_id].hyperparameters
            self.replaced_proposals[trial_id], hyperparameters.values = hyperparameters.values, values

    def get_state(self: Any) -> dict[str, Any]:
        own = {"replaced_proposals": self.replaced_proposals, "ordered_ids": _in_order(self._ordered_ids)}
        return {**super().get_state(), **own}  # type: ignore[misc]

    def set_state(self: Any, state: dict[str, Any]) -> None:
        super().set_state(state)  # type: ignore[misc]
        self.replaced_proposals = state.get("replaced_proposals", {})
        self._ordered_ids = type(self._ordered_ids)()
        for trial_id in state.get("ordered_ids", self.start_order):
            if trial_id in self.start_order:
                self._ordered_ids.insert(trial_id)
        # The grid continues from each trial to the next, and skips values that were tried already.
        self._populate_next = list(self.start_order)


def _in_order(linked: Any) -> list[str]:
    """Returns the content of Keras Tuner's linked list, which begins at index None."""
    ids, index = [], linked._next_index[None]
    while index is not None:
        ids.append(linked._memory[index])
        index = linked._next_index[index]
    return ids


def make_persistent(oracle: Any, *, is_looking: bool = False) -> Any:
    """Makes an oracle write its files atomically.

    Keras Tuner's oracles call their own `save`, so a subclass is needed. Since the user may have created the oracle and
    still hold it, its class is replaced in place.

    Args:
        oracle: Keras Tuner's.
        is_looking: whether another process searches in the folder; the state is then read without writing.
    """
    kind = type(oracle)
    if not issubclass(kind, PersistentOracle):
        mixin = PersistentGridOracle if is_grid(oracle) else PersistentOracle
        oracle.__class__ = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})
        if mixin is PersistentGridOracle:
            oracle.replaced_proposals = {}
    oracle._is_looking = is_looking
    return oracle


def is_looking(oracle: Any) -> bool:
    """Returns whether the oracle's state was read while another process was searching."""
    return bool(oracle._is_looking)


def read_anew(oracle: Any) -> None:
    """Clears an oracle's trials, before `reload`."""
    oracle._is_looking, oracle._file = False, None
    oracle.trials = {}


def is_grid(oracle: Any) -> bool:
    """Returns whether an oracle proposes all values in order."""
    return isinstance(oracle, keras_tuner.oracles.GridSearchOracle)


@contextlib.contextmanager
def _set(oracle: Any, name: str) -> Iterator[None]:
    setattr(oracle, name, True)
    try:
        yield
    finally:
        setattr(oracle, name, False)
