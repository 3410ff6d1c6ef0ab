"""Keras Tuner's files of a search: written whole, put in order after a kill, and repaired where they are damaged.

    oracle.json, tuner0.json, trial_<id>/trial.json     under Keras Tuner's own names
    oracle.changes.jsonl                                what the oracle came to know since (`incremental_state`)
    .<name>.previous                                    the same file, one save earlier
    <name>.broken                                       what could not be read, kept for whoever wants to look

Keras Tuner saves a trial and its oracle one after the other, and an ended trial before it is off the list of those
that run. A search that is killed in between would lose a trial, or count one twice.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from keras_tuner.engine.trial import Trial, TrialStatus

from accumtune.errors import SearchDirectoryError
from accumtune.oracles.incremental_state import ChangingState, with_changes
from accumtune.tracking.journal import read_search_journal, read_trial
from accumtune.tracking.small_files import write_atomically
from accumtune.worker.transport.hyperparameters import hyperparameters_from
from accumtune.worker.transport.task_directory import TaskDirectory


class _WholeState:
    """Mixed into an oracle's class: the same files and contents as Keras Tuner writes, but whole and consistent."""

    _file: ChangingState | None = None
    _is_in_step = _is_updating = False
    # Another process searches: what it has written is read, and nothing is.
    _is_looking = False

    def save(self: Any) -> None:
        if self._file is None:  # its folder is told to it after it was made
            self._file = ChangingState(Path(self._get_oracle_fname()), _save)
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
        if self.max_consecutive_failed_trials != math.inf:  # accumtune counts them: no walk through all trials
            super()._check_consecutive_failures()  # type: ignore[misc]

    def _save_trial(self: Any, trial: Any) -> None:
        if not self._is_updating:  # it ends with the next call, and is saved then; the journal has its metrics
            _save(Path(self._get_trial_dir(trial.trial_id)) / "trial.json", trial.get_state())

    def reload(self: Any) -> None:
        path = Path(self._get_oracle_fname())
        state = _load(path)
        complete = with_changes(state, path)
        if self._is_looking:
            self._read_only(complete)
        else:
            if complete != state and "hyperparameters" in complete:  # without, there is neither file nor changes
                _save(path, complete)
            super().reload()  # type: ignore[misc]
        # The oracle is saved while a trial that has just ended is still among those that run.
        ended = set(self.end_order)
        self._retry_queue = [trial_id for trial_id in dict.fromkeys(self._retry_queue) if trial_id not in ended]
        self.end_order = list(dict.fromkeys(self.end_order))
        # A new trial is saved before the oracle that knows it.
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
        """As Keras Tuner reloads, from a state that is not in its file yet."""
        for file in Path(self._project_dir).glob("trial_*/trial.json"):
            trial = Trial.load(str(file))
            self.trials[trial.trial_id] = trial
        known = set(self.trials)
        complete["ongoing_trials"] = {}
        complete["start_order"] = [trial_id for trial_id in complete["start_order"] if trial_id in known]
        self.set_state(complete)


class _WholeGridState(_WholeState):
    """A grid walks from each trial's values to the next: for that, it must see what it proposed, not what ran.

    Keras Tuner does not save where a grid stands: resumed, it would end early or fail with a KeyError.
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
        # From each trial to the next; what was tried already is passed over.
        self._populate_next = list(self.start_order)


def _in_order(linked: Any) -> list[str]:
    """The content of Keras Tuner's linked list, whose index None is its beginning."""
    ids, index = [], linked._next_index[None]
    while index is not None:
        ids.append(linked._memory[index])
        index = linked._next_index[index]
    return ids


def with_whole_state(oracle: Any, *, is_looking: bool = False) -> Any:
    """The same oracle, writing its files whole; its class is a subclass of what it was.

    Args:
        oracle: Keras Tuner's.
        is_looking: another process searches in the folder: nothing is written when the state is read.
    """
    kind = type(oracle)
    if not issubclass(kind, _WholeState):
        mixin = _WholeGridState if is_grid(oracle) else _WholeState
        oracle.__class__ = type(kind.__name__, (mixin, kind), {"__module__": kind.__module__})
        if mixin is _WholeGridState:
            oracle.replaced_proposals = {}
    oracle._is_looking = is_looking
    return oracle


def is_looking(oracle: Any) -> bool:
    """Whether the oracle's state was read while another process searched."""
    return bool(oracle._is_looking)


def read_anew(oracle: Any) -> None:
    """Prepares an oracle for `reload`: what it knew is forgotten."""
    oracle._is_looking, oracle._file = False, None
    oracle.trials = {}


def is_grid(oracle: Any) -> bool:
    """Whether an oracle walks through all values in their order."""
    import keras_tuner

    return isinstance(oracle, keras_tuner.oracles.GridSearchOracle)


def save_tuner(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a tuner's own state whole."""
    _save(path, state)


def repair_state_files(folder: Path) -> list[str]:
    """Mends the files of a search that are not JSON, from its journals and from one save earlier.

    Args:
        folder: the search's.

    Returns:
        What was mended, a line each.

    Raises:
        SearchDirectoryError: names the file that cannot be mended. Journals and trained weights are not touched.
    """
    mended = []
    oracle = folder / "oracle.json"
    trials = sorted(folder.glob("trial_*/trial.json"))
    has_begun = bool(trials) or (folder / "tuner0.json").exists()
    # The oracle first: a trial's space may have to come from it.
    if _is_broken(oracle) or (has_begun and not oracle.exists()):
        complete = with_changes(_load(_previous(oracle)), oracle)
        is_whole = "hyperparameters" in complete
        mended.append(_mend(folder, oracle, complete if is_whole else None, "one save earlier"))
    space = (_load(oracle) or {}).get("hyperparameters")
    for file in [*folder.glob("tuner*.json")]:
        if _is_broken(file):
            mended.append(_mend(folder, file, _tuner_state(folder, file), "the search's journal"))
    for file in trials:
        if _is_broken(file):
            mended.append(_mend(folder, file, _trial_state(file, space), "the trial's journal"))
    return mended


def _mend(folder: Path, file: Path, state: Mapping[str, Any] | None, source: str) -> str:
    name = file.relative_to(folder)
    if state is None:
        raise SearchDirectoryError(
            f"Received the search directory {folder}, in which {name} cannot be read, nor repaired from {source}.",
            "the files of an earlier search, complete.",
            "give another project_name to begin anew beside it (what its trials reported stays in their "
            "journal.jsonl), or overwrite=True to delete it.",
        )
    if file.exists():
        os.replace(file, file.with_name(f"{file.name}.broken"))
    write_atomically(file, json.dumps(state))
    return f"{name} was damaged: repaired from {source}."


def _tuner_state(folder: Path, file: Path) -> dict[str, Any] | None:
    search = read_search_journal(folder)
    if search.search_id and search.search_over:
        return {"search_over": search.search_over, "batch_coupled_layers": list(search.batch_coupled_layers)}
    return _load(_previous(file))


def _trial_state(file: Path, space: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A trial from what its journal says of it; its space from one save earlier, its task, or the oracle."""

    previous = _load(_previous(file)) or {}
    record = read_trial(file.parent)
    config = previous.get("hyperparameters") or _space_of_task(file.parent) or space
    values = dict(record.hyperparameters) or (config or {}).get("values")
    if config is None or not values:
        return None
    trial = Trial(
        hyperparameters=hyperparameters_from({**config, "values": values}),
        trial_id=file.parent.name.removeprefix("trial_"),
        status=TrialStatus.RUNNING,
    )
    if previous:
        # Whether it had ended is the oracle's to know; a completed training is found in its journal.
        trial.set_state({**previous, "hyperparameters": trial.hyperparameters.get_config()})
    if record.status in ("completed", "reused") and record.objective_value is not None:
        for name, value in record.metrics.items():
            if not trial.metrics.exists(name):
                with contextlib.suppress(ValueError):  # a metric whose direction Keras Tuner does not know
                    trial.metrics.register(name)
            if trial.metrics.exists(name):
                trial.metrics.update(name, value, step=record.best_epoch or 0)
        trial.status = TrialStatus.COMPLETED
        trial.score, trial.best_step = record.objective_value, record.best_epoch or 0
    elif record.status in ("failed", "infeasible"):
        trial.status, trial.message = TrialStatus.FAILED, record.reason
    return dict(trial.get_state())


def _space_of_task(folder: Path) -> Mapping[str, Any] | None:
    try:
        space: Mapping[str, Any] = TaskDirectory(folder).read_task()[1]["hyperparameters"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return space


@contextlib.contextmanager
def _set(oracle: Any, name: str) -> Iterator[None]:
    setattr(oracle, name, True)
    try:
        yield
    finally:
        setattr(oracle, name, False)


def _save(path: Path, state: Mapping[str, Any]) -> None:
    content = json.dumps(state)
    if path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.link")
        temporary.unlink(missing_ok=True)
        # A second name for what is there costs nothing; some file systems have none, and no repair then.
        with contextlib.suppress(OSError):
            os.link(path, temporary)
            os.replace(temporary, _previous(path))
    write_atomically(path, content)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _is_broken(path: Path) -> bool:
    return path.exists() and _load(path) is None


def _load(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
