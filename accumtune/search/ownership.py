"""Protects the other files in a search's folder: a search replaces and deletes only what searches make."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

from accumtune.errors import SearchDirectoryError
from accumtune.oracles.state_files import repair_state_files
from accumtune.tracking.journal import SEARCH_JOURNAL, read_search_journal
from accumtune.tracking.lock import LOCK_FILE, running_already
from accumtune.tracking.small_files import write_atomically

MARKER = ".accumtune"
_OWN = (
    "oracle.json", "oracle.changes.jsonl", "tuner*.json", ".oracle.json.*", ".tuner*.json.*", "oracle.json.broken",
    "tuner*.json.broken", "trial_*", "infeasible_*", SEARCH_JOURNAL, LOCK_FILE, "tracking.*", ".tracking.*",
    "profiles", "report", "scratch", "payload", "model", "model.json",
)  # fmt: skip


def check_project_name(name: object) -> None:
    """Refuses a project name that is not the name of a folder.

    Raises:
        SearchDirectoryError: it is not.
    """
    if isinstance(name, str) and name.strip() not in ("", ".", "..") and not set(name) & set("/\\\0"):
        return
    raise SearchDirectoryError(
        f"Received project_name={name!r}.",
        "the name of a folder inside directory=, without separators.",
        'give a name such as project_name="digits", and the folders above it as directory=.',
    )


def claim(folder: Path) -> None:
    """Marks a folder as a search's. Other files may be in it, but none with a name that searches use.

    Raises:
        SearchDirectoryError: there is such a file, and no search has made it.
    """
    if (folder / MARKER).exists():
        return
    theirs = _own_entries(folder)
    if theirs and not _is_unmarked_search(folder):
        raise SearchDirectoryError(
            f"Received the search directory {folder}, which holds {theirs[0].name}, and no search of accumtune made "
            "it.",
            "a new folder, that of an earlier search, or one without files whose names a search uses.",
            "give another project_name, or move these files away.",
        )
    write_atomically(folder / MARKER, json.dumps({"kind": "search", "format": 1}))


def prepare(folder: Path, *, is_held: bool, overwrite: bool) -> list[str]:
    """Deletes or repairs the state of an earlier search; that of a running one is only read.

    Args:
        folder: the search's.
        is_held: whether this process holds the lock, so no search runs there.
        overwrite: whether to delete.

    Returns:
        A line for each repair.

    Raises:
        SearchDirectoryError: a search runs there, and it has no state to read yet or `overwrite` would delete it.
    """
    if not is_held:
        if overwrite or not (folder / "tuner0.json").exists():
            raise running_already(folder)
        return []
    if overwrite:
        clear(folder)
        return []
    return repair_state_files(folder)


def clear(folder: Path) -> None:
    """Deletes what the search has made in its folder, except for its marker and its lock."""
    for entry in _own_entries(folder):
        if entry.name == LOCK_FILE:
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink(missing_ok=True)


def _own_entries(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [entry for entry in entries if any(fnmatch.fnmatchcase(entry.name, pattern) for pattern in _OWN)]


def _is_unmarked_search(folder: Path) -> bool:
    """Returns whether an older accumtune, which did not mark folders, has searched here."""
    return bool(read_search_journal(folder).search_id) or (folder / "data" / "payload.pkl").exists()
