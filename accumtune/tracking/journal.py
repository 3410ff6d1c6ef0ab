"""Records the events of a search, as they happen, in append-only files of JSON lines.

MLflow's runs, the pictures and the tables are made from these files and can be made again:

    <search folder>/search.jsonl                    the search itself
    <search folder>/trial_<id>/journal.jsonl        one trial
    <search folder>/infeasible_<n>/journal.jsonl    a proposal that fits at no micro-batch size

Each line is written by one `write`, so a killed process leaves at most one incomplete line, the last. Readers ignore
it, and the next append ends it with a line break first.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from accumtune.tracking.records import EpochRecord, SearchRecord, TrialRecord

SEARCH_JOURNAL = "search.jsonl"
TRIAL_JOURNAL = "journal.jsonl"


class Journal:
    """An append-only file of events.

    Args:
        path: the file; it and its folder are made by the first `append`.

    Example:

    >>> journal = Journal(folder / "journal.jsonl")
    >>> journal.append("epoch", epoch=0, logs={"loss": 0.5})
    >>> journal.events()[0]["logs"]
    {'loss': 0.5}
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, event: str, **fields: Any) -> None:
        """Adds one event with the present time (`"time"`, in Unix seconds).

        NaN, infinities and NumPy scalars and arrays keep their values; other types that JSON lacks are stored as text.

        Raises:
            OSError: the line could not be written (a full disk, a read-only folder). Earlier events stay readable.
        """
        entry = {"event": event, "time": time.time(), **fields}
        line = json.dumps(entry, default=_to_json, skipkeys=True).encode() + b"\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            if _ends_incomplete(descriptor):
                line = b"\n" + line
            _write(descriptor, line)
        finally:
            os.close(descriptor)

    def events(self) -> list[dict[str, Any]]:
        """Returns all complete events, oldest first; `[]` if there is no file."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return []
        parsed = (_parse(line) for line in content.split(b"\n"))
        return [event for event in parsed if event is not None]

    def __repr__(self) -> str:
        return f"Journal({str(self.path)!r})"


def _ends_incomplete(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    return size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"


def _write(descriptor: int, line: bytes) -> None:
    # Almost always one call; a full disk may write a part, and then raises OSError for the rest.
    while line:
        line = line[os.write(descriptor, line) :]


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _to_json(value: Any) -> Any:
    """Turns scalars and arrays of NumPy and the frameworks into numbers and lists, anything else into text."""
    for method in ("tolist", "item"):
        convert = getattr(value, method, None)
        if callable(convert):
            return convert()
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=repr)
    if hasattr(value, "__array__"):
        return value.__array__().tolist()
    return str(value)


def read_trial(folder: Path) -> TrialRecord:
    """Reads one trial's folder. Without a journal, the result is a running trial with default values."""
    folder = Path(folder)
    values: dict[str, Any] = {"trial_id": folder.name.removeprefix("trial_")}
    epochs: dict[tuple[int, int], EpochRecord] = {}
    late: dict[str, Any] = {}
    late_space: list[Any] = []
    for event in Journal(folder / TRIAL_JOURNAL).events():
        kind = event["event"]
        if kind == "proposed":
            _forget_outcome(values)
            values |= _known(TrialRecord, event) | {"proposed_at": event.get("time")}
        elif kind == "started":
            _forget_outcome(values)
            values |= _known(TrialRecord, event) | {"started_at": event.get("time")}
            epochs.clear()
            late, late_space = {}, []
        elif kind == "appeared":
            space, found = event.get("space"), event.get("values")
            if isinstance(space, list) and isinstance(found, Mapping):  # each execution journals them
                late_space += [item for item in space if item not in late_space]
                late |= found
        elif kind == "epoch":
            record = _epoch(event)
            # A process of an earlier attempt that is no longer waited for may still write epochs.
            if record is not None and event.get("attempt", values.get("attempt")) == values.get("attempt"):
                epochs[record.execution, record.epoch] = record
        elif kind == "ended":
            known = {name: value for name, value in _known(TrialRecord, event).items() if value is not None}
            values |= known | {"ended_at": event.get("time"), "status": event.get("status") or "failed"}
    values["hyperparameters"] = {**late, **values.get("hyperparameters", {})}
    values |= {"folder": folder, "epochs": tuple(epochs.values()), "appeared_space": tuple(late_space)}
    return TrialRecord(**values)


def read_search(folder: Path) -> SearchRecord:
    """Reads a search's folder with all its trials. Missing values keep their defaults."""
    trials = sorted(map(read_trial, trial_folders(folder)), key=lambda trial: (trial.number, trial.trial_id))
    return replace(read_search_journal(folder), trials=tuple(trials))


def read_search_journal(folder: Path) -> SearchRecord:
    """Reads a search's own journal, without its trials."""
    folder = Path(folder)
    values: dict[str, Any] = {}
    advice: list[str] = []
    resumed: list[float] = []
    for event in Journal(folder / SEARCH_JOURNAL).events():
        kind = event["event"]
        if kind == "search_started":
            values = _known(SearchRecord, event) | {"started_at": event.get("time"), "status": "running"}
        elif kind == "search_resumed":
            resumed.append(event.get("time", 0.0))
            values |= _known(SearchRecord, event) | {"status": "running", "reason": "", "ended_at": None}
        elif kind == "advice":
            # A resumed search may give the same advice again.
            if event.get("text") and event["text"] not in advice:
                advice.append(str(event["text"]))
        elif kind == "search_ended":
            ended = {"status": event.get("status") or "finished", "reason": event.get("reason") or ""}
            values |= ended | {"ended_at": event.get("time")}
    for name in ("micro_batch_sizes", "accumulation_steps", "batch_coupled_layers"):
        values[name] = tuple(values.get(name) or ())
    values |= {"advice": tuple(advice), "resumed_at": tuple(resumed), "folder": folder}
    return SearchRecord(**values)


def trial_folders(folder: Path) -> list[Path]:
    """Returns the folders of a search's trials and infeasible proposals, in order."""
    try:
        entries = list(Path(folder).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted(entry for entry in entries if re.match(r"(trial|infeasible)_", entry.name) and entry.is_dir())


_OUTCOME = (
    "status", "reason", "traceback", "objective_value", "best_epoch", "peak_memory_bytes",
    "throughput_samples_per_second", "updates", "training_seconds", "reused_from", "reused_logs", "ended_at",
)  # fmt: skip


def _forget_outcome(values: dict[str, Any]) -> None:
    """Removes the outcome of an earlier attempt."""
    for name in _OUTCOME:
        values.pop(name, None)


def _known(record: type, event: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of an event that a record has; others, of a later version, are ignored."""
    names = {item.name for item in fields(record)} - {"folder", "epochs", "trials", "status", "advice"}
    known = {name: value for name, value in event.items() if name in names}
    for name in ("reason", "traceback", "description"):
        if name in known and not isinstance(known[name], str):
            known[name] = "" if known[name] is None else str(known[name])
    for name in ("hyperparameters", "versions", "data", "fit", "identity", "objective", "metrics", "reused_logs"):
        if name in known and not isinstance(known[name], Mapping):
            del known[name]
    return known


def _epoch(event: Mapping[str, Any]) -> EpochRecord | None:
    logs, epoch = event.get("logs"), event.get("epoch")
    if not isinstance(logs, Mapping) or not isinstance(epoch, int):
        return None
    numbers = {str(name): float(value) for name, value in logs.items() if isinstance(value, (int, float))}
    return EpochRecord(epoch, numbers, event.get("execution") or 0, event.get("time") or 0.0)
