"""Persists a dict as a snapshot plus an append-only log of changes, so that a save writes only what is new.

    oracle.json              the whole state, as Keras Tuner writes it, and the number of the last change that is in it
    oracle.changes.jsonl     every change since the search began, one line each; the first one starts from nothing

Keras Tuner writes the whole state of its oracle twice for each trial, so trials become slower as a search grows. Here
the file is written at the beginning and the end of a search, and each save in between appends a line. If the file is
damaged, the lines restore the last state from an older file, or from none.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from accumtune.tracking.journal import Journal

_NUMBER = "accumtune_change"
# Lists that Keras Tuner makes from sets, in arbitrary order.
_SETS = {"tried_so_far"}
_SCALARS = {str, int, float, bool, type(None)}


class IncrementalState:
    """Saves one dict.

    Args:
        path: of the file; the log of changes is beside it.
        write: writes a whole state.
    """

    def __init__(self, path: Path, write: Callable[[Path, Mapping[str, Any]], None]) -> None:
        self._path = path
        self._write = write
        self._journal = Journal(changes_file(path))
        self._number = 0
        self._last: dict[str, Any] | None = None

    def save_changes(self, state: Mapping[str, Any]) -> None:
        """Appends a line with the changes since the last save, if there are any."""
        if self._last is None:
            earlier = with_changes(None, self._path)
            self._number = earlier.pop(_NUMBER)
            self._last = _remembered_state(earlier)
        changes = _update(self._last, state)
        if changes:
            self._number += 1
            self._journal.append("changed", number=self._number, changes=changes)

    def save_whole(self, state: Mapping[str, Any]) -> None:
        """Appends the changes and writes the whole state to the file."""
        self.save_changes(state)
        self._write(self._path, {**state, _NUMBER: self._number})


def changes_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}.changes.jsonl")


def with_changes(state: Mapping[str, Any] | None, path: Path) -> dict[str, Any]:
    """Returns the last saved state.

    Args:
        state: the content of the file or of an older copy; None for nothing. If another program wrote it, it has no
            number and counts as complete.
        path: of the file.

    Returns:
        The state and the number of the last change in it.
    """
    complete: dict[str, Any] = {_NUMBER: 0} if state is None else copy.deepcopy(dict(state))
    if _NUMBER not in complete:
        return complete
    for name in _SETS & complete.keys():
        complete[name] = dict.fromkeys(complete[name])
    for event in Journal(changes_file(path)).events():
        if event["number"] == complete[_NUMBER] + 1:
            _apply(complete, event["changes"])
            complete[_NUMBER] += 1
    for name in _SETS & complete.keys():
        complete[name] = list(complete[name])
    return complete


def _apply(state: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for name, (how, *values) in changes.items():
        if how == "remove":
            del state[name]
        elif how == "extend":
            state[name] += values[0]
        elif how == "update":
            news, gone = values
            state[name] |= news
            for key in gone:
                del state[name][key]
        else:
            state[name] = dict.fromkeys(values[0]) if name in _SETS else values[0]


def _remembered_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a copy of a state that later changes do not affect."""
    return {name: _remembered(name, value) for name, value in state.items()}


def _update(last: dict[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Updates the remembered state to a new one.

    Returns:
        The changes by key, for `_apply`.
    """
    changes: dict[str, Any] = {name: ["remove"] for name in last.keys() - state.keys()}
    for name in changes:
        del last[name]
    for name, value in state.items():
        change = _grow(last.get(name), value)
        if change is None:
            now = _remembered(name, value)
            if name in last and type(now) is type(last[name]) and now == last[name]:
                continue
            last[name], change = now, ["set", value]
        if change not in (["extend", []], ["update", {}, []]):
            changes[name] = change
    return changes


def _grow(before: Any, value: Any) -> list[Any] | None:
    """Adds new entries to a copy and returns them as a change; None if a value has not just grown, or is not flat.

    For speed, the thousands of old entries are compared without a Python loop.
    """
    if isinstance(before, list) and isinstance(value, list) and before == value[: len(before)]:
        tail = value[len(before) :]
        if _is_flat(tail):
            before += tail
            return ["extend", tail]
    elif isinstance(before, set):
        now = set(value)
        change = ["update", dict.fromkeys(now - before), list(before - now)]
        before.clear()
        before.update(now)
        return change
    elif isinstance(before, dict) and isinstance(value, dict) and _begins_with(value, before):
        news = dict(itertools.islice(value.items(), len(before), None))
        if _is_flat(news.values()):
            before |= news
            return ["update", news, []]
    return None


def _begins_with(value: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
    count = len(before)
    return list(itertools.islice(value, count)) == list(before) and (
        list(itertools.islice(value.values(), count)) == list(before.values())
    )


def _is_flat(values: Iterable[Any]) -> bool:
    return set(map(type, values)) <= _SCALARS


class _Text(str):
    """JSON of a value that may change inside."""


def _remembered(name: str, value: Any) -> Any:
    if name in _SETS:
        return set(value)
    if isinstance(value, list) and _is_flat(value):
        return list(value)
    if isinstance(value, dict) and _is_flat(value.values()):
        return dict(value)
    return value if type(value) in _SCALARS else _Text(json.dumps(value))
