"""A state that grows with a search, saved at the price of what is new.

    oracle.json              the whole state, as Keras Tuner writes it, and the number of the last change that is in it
    oracle.changes.jsonl     a line for each change since the search began

Keras Tuner writes all that its oracle knows twice for each trial; the two thousandth trial would pay for those before
it. Here the file is written whole when somebody asks for it (at the beginning and the end of a search), and when the
lines since the last time have become as long as it is. Lines stay: from an older file and the lines after it comes the
same state, should the newer file be damaged.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accumtune.tracking.journal import Journal

_NUMBER = "accumtune_change"
# Below this it costs next to nothing to write the file whole.
_SMALL_BYTES = 64 * 2**10
_SCALARS = {str, int, float, bool, type(None)}


class ChangingState:
    """The file of one state.

    Args:
        path: of the file; that of the changes lies beside it.
        write: writes a state whole and returns its size in bytes.
    """

    def __init__(self, path: Path, write: Callable[[Path, Mapping[str, Any]], int]) -> None:
        self._path = path
        self._write = write
        self._journal = Journal(changes_file(path))
        self._number: int | None = None
        self._last: dict[str, Any] | None = None
        self._bytes_since = self._whole_bytes = 0

    def save_whole(self, state: Mapping[str, Any]) -> None:
        """Writes the file; nothing that was saved before is needed any more."""
        if self._number is None:
            self._number = max((event["number"] for event in self._journal.events()), default=0)
        self._whole_bytes = self._write(self._path, {**state, _NUMBER: self._number})
        self._bytes_since = 0
        self._last = _remembered(state)

    def save_changes(self, state: Mapping[str, Any]) -> None:
        """Adds a line with what is not as it was at the last save, if anything is not."""
        if self._last is None or self._number is None or self._bytes_since >= max(_SMALL_BYTES, self._whole_bytes):
            self.save_whole(state)
            return
        now = _remembered(state)
        changes = differences(self._last, now)
        if not changes:
            return
        self._number += 1
        self._journal.append("changed", number=self._number, changes=changes)
        self._bytes_since += len(json.dumps(changes))
        self._last = now


def changes_file(path: Path) -> Path:
    return path.with_name(f"{path.stem}.changes.jsonl")


def with_changes(state: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A state as it was saved last: one that was read from `path` (or from an older copy) and the changes since then.

    Returns:
        The state, with the number of the last change in it. One that another program wrote has no number; it is taken
        to be complete.
    """
    complete = dict(state)
    number = complete.get(_NUMBER)
    if number is None:
        return complete
    for event in Journal(changes_file(path)).events():
        if event["number"] == number + 1:
            number = complete[_NUMBER] = event["number"]
            apply_differences(complete, event["changes"])
    return complete


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """What turns `old` into `new`, by key; small where a list has grown or a few entries of a dictionary are new."""
    changes: dict[str, Any] = {name: ["remove"] for name in old.keys() - new.keys()}
    for name, value in new.items():
        before = old.get(name)
        if name in old and type(before) is type(value) and before == value:
            continue
        if isinstance(value, list) and isinstance(before, list) and before == value[: len(before)]:
            changes[name] = ["extend", value[len(before) :]]
        elif isinstance(value, dict) and isinstance(before, dict):
            news = {key: item for key, item in value.items() if key not in before or before[key] != item}
            changes[name] = ["update", news, list(before.keys() - value.keys())]
        else:
            changes[name] = ["set", value if not isinstance(value, _Text) else json.loads(value)]
    return changes


def apply_differences(state: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Makes the new state of the old one."""
    for name, (how, *values) in changes.items():
        if how == "remove":
            state.pop(name, None)
        elif how == "extend":
            state[name] = [*state[name], *values[0]]
        elif how == "update":
            news, gone = values
            if isinstance(state[name], list):  # a set, see `_remembered`
                state[name] = list({**dict.fromkeys(state[name]), **news}.keys() - set(gone))
            else:
                state[name] = {key: value for key, value in state[name].items() if key not in gone} | news
        else:
            state[name] = values[0]


class _Text(str):
    """JSON of a value that may change inside."""


def _remembered(state: Mapping[str, Any]) -> dict[str, Any]:
    """A copy that later changes do not reach: flat lists and dictionaries as such, anything else as its JSON."""
    kept: dict[str, Any] = {}
    for name, value in state.items():
        if name == "tried_so_far":  # Keras Tuner's set, in an order of the moment
            kept[name] = dict.fromkeys(value)
        elif isinstance(value, list) and set(map(type, value)) <= _SCALARS:
            kept[name] = list(value)
        elif isinstance(value, dict) and set(map(type, value.values())) <= _SCALARS:
            kept[name] = dict(value)
        elif type(value) in _SCALARS:
            kept[name] = value
        else:
            kept[name] = _Text(json.dumps(value))
    return kept
