"""Finds the search that a command is about, and reads its directory."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from accumtune.errors import SearchDirectoryError

if TYPE_CHECKING:
    from accumtune.config import TrainingConfig
    from accumtune.search.results.selection import Candidate
    from accumtune.tracking.mlflow.tracker import Tracker
    from accumtune.tracking.records import SearchRecord

SEARCHES = "mlruns/searches"


def all_searches(folder: str = SEARCHES) -> list[Path]:
    """The directories of the searches in a folder, the newest first."""
    journals = Path(folder).glob("*/search.jsonl")
    return [file.parent for file in sorted(journals, key=os.path.getmtime, reverse=True)]


def find_search(search: str | None, searches: str = SEARCHES) -> Path:
    """Returns the directory of a search, given that directory or its project's name; None: the newest in `searches`.

    Raises:
        SearchDirectoryError: there is no such search.
    """
    known = all_searches(searches)
    if search is None:
        found = known[:1]
    else:
        found = [Path(search)] if is_search(search) else [folder for folder in known if folder.name == search]
    if found:
        return found[0]
    names = ", ".join(folder.name for folder in known[:5])
    raise SearchDirectoryError(
        f"Received {search or searches!r}, which is no search.",
        "the project_name of a search in mlruns/searches, or a directory with a search.jsonl.",
        f"give one of: {names}." if names else "run a search first, or give its directory.",
    )


def is_search(path: str) -> bool:
    return (Path(path) / "search.jsonl").exists()


def read_candidates(folder: Path) -> tuple[SearchRecord, list[Candidate]]:
    """Reads a search's record and its candidates from its directory."""
    from accumtune.search.results import search_results as results
    from accumtune.tracking.journal import read_search
    from accumtune.worker.transport.task_directory import SearchDirectory

    files = SearchDirectory(folder)
    record = read_search(files.path)
    return record, results.candidates(record, files.profiles_folder)


def choose(folder: Path, options: argparse.Namespace) -> tuple[SearchRecord, list[Candidate], TrainingConfig]:
    """Returns a search, its candidates, and the configuration of the candidate that `--policy` chooses.

    Raises:
        NoResultError: there is no candidate.
    """
    from accumtune.search.results import search_results as results
    from accumtune.search.results.selection import select
    from accumtune.search.results.winner_verification import predicted_choice

    record, found = read_candidates(folder)
    choice = select(
        found, options.policy, options.tolerance, record.objective_direction, objective_name=record.objective_name
    )
    return record, found, results.training_config(record, predicted_choice(choice))


def tracker_of(options: argparse.Namespace) -> Tracker:
    """Returns the tracker of a search, for `--tracking-uri` or the caller's default tracking URI.

    Raises:
        SearchDirectoryError: without `--tracking-uri`, the search was tracked elsewhere. The address in its folder is
            not used: anybody could have written it there, and MLflow would send the caller's token to it.
    """
    from accumtune.tracking.mlflow.tracker import Tracker, read_cache
    from accumtune.tracking.tracking_uri import absolute_uri, default_tracking_uri, sqlite_path, without_credentials

    folder = find_search(options.search)
    named = str(read_cache(folder).get("tracking_uri") or "")
    database = sqlite_path(named)
    is_gone = database is not None and not database.exists()  # for example, the project was moved
    own = absolute_uri(default_tracking_uri())
    if options.tracking_uri is None and named not in ("", without_credentials(own)) and not is_gone:
        raise SearchDirectoryError(
            f"The search in {folder} was tracked in {named}, and yours is {without_credentials(own)}.",
            "a tracking URI given by you: the one in the folder is not contacted, because MLflow would send it your "
            "token.",
            f"if you trust it: --tracking-uri {shlex.quote(named)} (with user and password, where it needs them); "
            "or set MLFLOW_TRACKING_URI.",
        )
    return Tracker(folder, options.tracking_uri or own)


def end_abandoned(folder: Path) -> None:
    """Journals the end of a search whose process was killed. The same script can still resume it."""
    from accumtune.tracking.journal import SEARCH_JOURNAL, Journal, read_search_journal
    from accumtune.tracking.lock import abandoned

    with abandoned(folder) as was_killed:
        if was_killed and not read_search_journal(folder).is_ended:
            reason = "its process was killed; run the same script again to resume it"
            Journal(folder / SEARCH_JOURNAL).append("search_ended", status="interrupted", reason=reason)
