"""Resumes the search of an earlier session, if everything that decides its results is unchanged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from accumtune.accumulation.batch_pair import without_batch
from accumtune.errors import BuildError, SearchDirectoryError
from accumtune.execution.profiling import ModelFacts
from accumtune.oracles import keras_tuner_adapter
from accumtune.search.processes import SearchProcesses
from accumtune.search.search_space import SearchSpace
from accumtune.search.session.search_identity import NOTED, differences, known_identity
from accumtune.tracking.records import SearchRecord, TrialRecord

_SEEDS = (
    " Data that are split or drawn without a seed differ from run to run; give one: "
    "train_test_split(..., random_state=1), numpy.random.default_rng(1)."
)


def resume_search(
    record: SearchRecord,
    identity: Mapping[str, str],
    oracle: Any,
    space: SearchSpace,
    processes: SearchProcesses,
    memory_budget_bytes: int | None,
) -> list[str]:
    """Compares this session with the earlier ones, and takes over new values of the space and a larger budget.

    Args:
        record: the search before this session.
        identity: of this session.
        oracle: with the state of the search.
        space: as the build function declares it now.
        processes: build models to compare them.
        memory_budget_bytes: of this session.

    Returns:
        Lines for the user about what has changed.

    Raises:
        SearchDirectoryError: something that decides the results of trained trials has changed.
    """
    before = known_identity(record)
    trained = [trial for trial in record.trials if trial.status in ("completed", "reused")]
    notes: list[str] = []
    if trained:
        refuse_changes(record.folder, differences(before, identity), len(trained))  # before processes start
    refuse_changes(record.folder, space.renew(keeps_trials=bool(trained)), len(trained))
    if trained:
        known = [trial for trial in record.trials if trial.trial_id in oracle.trials]

        def space_of(trial_id: str) -> Mapping[str, Any]:
            return dict(oracle.get_trial(trial_id).hyperparameters.get_config())

        inspect_anew = processes.profiler().inspect_anew
        changed = changed_model(known, record.objective_direction, space_of, inspect_anew, notes.extend)
        refuse_changes(record.folder, changed, len(trained))
    if _is_larger(memory_budget_bytes, record.memory_budget_bytes):
        infeasible = [trial.trial_id for trial in record.with_status("infeasible")]
        keras_tuner_adapter.allow_again(oracle, infeasible)
    return [*dict.fromkeys([*notes, *changed_notes(before, identity)])] if trained else []


def _is_larger(budget_bytes: int | None, before_bytes: int | None) -> bool:
    return before_bytes is not None and (budget_bytes is None or budget_bytes > before_bytes)


def changed_notes(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns lines for the user about changes that leave trials comparable."""
    changed = [f"{name}: {before[name]} → {now[name]}" for name in NOTED if name in before and name in now
               and before[name] != now[name]]  # fmt: skip
    if not changed:
        return []
    return [
        f"Changed since the earlier session: {'; '.join(changed)}. Peak memory and throughput of earlier trials were "
        "measured before."
    ]


def changed_model(
    trials: Iterable[TrialRecord],
    direction: str,
    space_of: Callable[[str], Mapping[str, Any]],
    inspect_anew: Callable[[Mapping[str, Any]], ModelFacts],
    note: Callable[[Sequence[str]], None] = lambda lines: None,
) -> list[str]:
    """Rebuilds the models of the newest and the best trained trial, and returns how they differ from then.

    Only building shows whether an edit of the build function matters: a new value of a hyperparameter, or a line that
    prints, changes no model.

    Args:
        trials: of earlier sessions.
        direction: of the objective.
        space_of: Keras Tuner's configuration of a trial's hyperparameters.
        inspect_anew: builds a model in a process of its own and describes it.
        note: receives lines about changes that leave trials comparable.
    """
    trained = [trial for trial in trials if trial.status == "completed" and trial.identity]
    if not trained:
        return []
    sign = -1 if direction == "max" else 1
    newest = max(trained, key=lambda trial: trial.ended_at or 0.0)
    best = min(trained, key=lambda trial: sign * (trial.objective_value or 0.0))
    for trial in {trial.trial_id: trial for trial in (newest, best)}.values():
        space = _space_as_inspected(trial, space_of(trial.trial_id))
        try:
            now = inspect_anew(space).identity
            lines = differences(trial.identity, now)
            note(changed_notes(trial.identity, now))
            if lines and inspect_anew(space).identity != now:
                continue  # the build function makes a different model every time
        except BuildError as error:
            return [f"the model of trial {trial.trial_id} can no longer be built ({str(error).splitlines()[0]})"]
        if lines:
            return [f"the model of trial {trial.trial_id}, {line}" for line in lines]
    return []


def _space_as_inspected(trial: TrialRecord, space: Mapping[str, Any]) -> dict[str, Any]:
    batch = json.loads(trial.identity.get("batch") or "{}")
    return {**space, "values": {**without_batch(trial.hyperparameters), **batch}}


def refuse_changes(folder: Any, changed: Sequence[str], trained: int) -> None:
    """Refuses changes that make new results incomparable with those of trained trials.

    Raises:
        SearchDirectoryError: `changed` is not empty.
    """
    if changed:
        raise SearchDirectoryError(
            f"Received another search than the one in {folder}, which has {trained} trained trials:\n  "
            + "\n  ".join(changed),
            "what these trials were trained with; otherwise their results and new ones cannot be compared.",
            "undo the change, give another project_name to search beside it, or overwrite=True to start over."
            + (_SEEDS if any(line.startswith(("data: ", "validation data: ")) for line in changed) else ""),
        )
