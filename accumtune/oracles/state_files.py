"""Writes Keras Tuner's files of a search atomically, and repairs damaged ones.

    oracle.json, tuner0.json, trial_<id>/trial.json     under Keras Tuner's own names
    oracle.changes.jsonl                                changes of the oracle since (`incremental_state`)
    .<name>.previous                                    the same file, one save earlier
    <name>.broken                                       a file that could not be read, kept for inspection
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from keras_tuner.engine.trial import Trial, TrialStatus

from accumtune.errors import SearchDirectoryError
from accumtune.oracles.incremental_state import with_changes
from accumtune.tracking.journal import read_search_journal, read_trial
from accumtune.tracking.small_files import write_atomically
from accumtune.worker.transport.hyperparameters import hyperparameters_from
from accumtune.worker.transport.task_directory import TaskDirectory


def repair_state_files(folder: Path) -> list[str]:
    """Repairs the files of a search that are not valid JSON, from its journals and from one save earlier.

    Args:
        folder: the search's.

    Returns:
        A line for each repaired file.

    Raises:
        SearchDirectoryError: names a file that cannot be repaired. Journals and trained weights are not touched.
    """
    repaired = []
    oracle = folder / "oracle.json"
    trials = sorted(folder.glob("trial_*/trial.json"))
    has_begun = bool(trials) or (folder / "tuner0.json").exists()
    # The oracle first, because a trial's space may be restored from it.
    if _is_broken(oracle) or (has_begun and not oracle.exists()):
        complete = with_changes(read_state(_previous(oracle)), oracle)
        is_whole = "hyperparameters" in complete
        repaired.append(_repair(folder, oracle, complete if is_whole else None, "one save earlier"))
    space = (read_state(oracle) or {}).get("hyperparameters")
    for file in [*folder.glob("tuner*.json")]:
        if _is_broken(file):
            repaired.append(_repair(folder, file, _tuner_state(folder, file), "the search's journal"))
    for file in trials:
        if _is_broken(file):
            repaired.append(_repair(folder, file, _trial_state(file, space), "the trial's journal"))
    return repaired


def _repair(folder: Path, file: Path, state: Mapping[str, Any] | None, source: str) -> str:
    name = file.relative_to(folder)
    if state is None:
        raise SearchDirectoryError(
            f"Received the search directory {folder}, in which {name} cannot be read, nor repaired from {source}.",
            "the complete files of an earlier search.",
            "give another project_name for a new search beside it (its trials' results stay in their journal.jsonl), "
            "or overwrite=True to delete it.",
        )
    if file.exists():
        os.replace(file, file.with_name(f"{file.name}.broken"))
    write_atomically(file, json.dumps(state))
    return f"{name} was damaged: repaired from {source}."


def _tuner_state(folder: Path, file: Path) -> dict[str, Any] | None:
    search = read_search_journal(folder)
    if search.search_id and search.search_over:
        return {
            "search_over": search.search_over,
            "batch_coupled_layers": list(search.batch_coupled_layers),
            "whole_batch_loss": search.whole_batch_loss,
            "own_train_step": search.own_train_step,
            "has_own_test_step": "validation_batch_size" in search.identity,
            "ghost_batch_size": search.ghost_batch_size,
        }
    return read_state(_previous(file))


def _trial_state(file: Path, space: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Restores a trial from its journal, and its space from one save earlier, its task, or the oracle."""
    previous = read_state(_previous(file)) or {}
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
        # The oracle knows whether the trial had ended; a completed training is in its journal.
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


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a state atomically, and keeps the one before."""
    content = json.dumps(state)
    if path.exists():
        temporary = path.with_name(f".{path.name}.{os.getpid()}.link")
        temporary.unlink(missing_ok=True)
        # A hard link costs nothing; on file systems without links, there is no earlier copy.
        with contextlib.suppress(OSError):
            os.link(path, temporary)
            os.replace(temporary, _previous(path))
    write_atomically(path, content)


def _previous(path: Path) -> Path:
    return path.with_name(f".{path.name}.previous")


def _is_broken(path: Path) -> bool:
    return path.exists() and read_state(path) is None


def read_state(path: Path) -> dict[str, Any] | None:
    """Reads a state; None if it is missing or damaged."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None
