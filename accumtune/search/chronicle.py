"""What a search writes down of itself, and where: its journal, its report, MLflow."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from accumtune.config import TrainingConfig
from accumtune.errors import NoResultError
from accumtune.search.results import search_results as results
from accumtune.search.results.selection import Candidate, Choice, Policy, pareto_front, select
from accumtune.search.results.verifying import predicted_choice, verified_choice
from accumtune.tracking.journal import Journal, read_search, read_search_journal
from accumtune.tracking.mlflow.tracker import Tracker
from accumtune.tracking.records import SearchRecord
from accumtune.worker.transport.task_directory import SearchDirectory

Best = tuple[Choice, TrainingConfig]


class Chronicle:
    """Keeps a search's story, and answers from it.

    Args:
        files: the search's.
        objective: Keras Tuner's.
        tracking_uri: MLflow's; None for the default, False for no tracking.
    """

    def __init__(self, files: SearchDirectory, objective: Any, tracking_uri: str | Literal[False] | None) -> None:
        self._files = files
        self._objective = objective
        self._tracking_uri = tracking_uri
        self._journal = Journal(files.journal_file)
        self.tracker: Tracker | None = None

    # Writing

    def begin(self, description: Callable[[], Mapping[str, Any]]) -> bool:
        """A session begins; whether it is the search's first."""
        if any(event["event"] == "search_started" for event in self._journal.events()):
            self._journal.append("search_resumed", **description())
            return False
        self._journal.append("search_started", search_id=uuid.uuid4().hex, **description())
        return True

    def position(self) -> int:
        """How far the journal has come: it grows with every session."""
        try:
            return self._files.journal_file.stat().st_size
        except FileNotFoundError:
            return 0

    def advise(self, texts: Sequence[str], display_line: Callable[[str], None]) -> None:
        """Tells the user what matters, once: a resumed search does not say it again."""
        given = read_search_journal(self._files.path).advice
        for text in (text for text in texts if text not in given):
            self._journal.append("advice", text=text)
            display_line(text)

    def start_tracking(self) -> None:
        if self._tracking_uri is not False:
            self.tracker = Tracker(self._files.path, self._tracking_uri)
            self.tracker.start()

    def end(self, status: str, reason: str) -> None:
        self._journal.append("search_ended", status=status, reason=reason)

    def write_report(self, best: Best | None, status: str, reason: str) -> None:
        record = replace(self.record(), status=status, reason=reason)
        results.write_report(self._files, record, best or self.try_best(None))

    def stop_tracking(self) -> str:
        """Sends the rest; what to tell the user, "" where everything has arrived."""
        return "" if self.tracker is None else self.tracker.stop()

    @property
    def ui_command(self) -> str:
        """The command that opens the search in the MLflow UI."""
        return "" if self.tracker is None else self.tracker.ui_command()

    @property
    def ui_address(self) -> str:
        """Where the UI shows it, once the command runs."""
        return "" if self.tracker is None else self.tracker.ui_address()

    # Answering

    def record(self) -> SearchRecord:
        return read_search(self._files.path)

    def candidates(self) -> list[Candidate]:
        return results.candidates(self.record(), self._files.profiles_folder)

    def pareto_front(self) -> list[Candidate]:
        return pareto_front(self.candidates(), self._objective.direction)

    def summary(self, limit: int) -> str:
        return results.summary(self.record(), self.candidates(), limit)

    def choose(self, policy: Policy, tolerance: float, runs: Callable[[Candidate], bool] | None) -> Choice:
        """The candidate to train with.

        Args:
            policy, tolerance: as in `Tuner.get_best_config`.
            runs: trains a candidate for a few updates under the budget; None where nothing can be run.

        Raises:
            NoResultError: no trial has completed within the budget.
        """

        def choose(found: Sequence[Candidate]) -> Choice:
            return select(found, policy, tolerance, self._objective.direction, objective_name=self._objective.name)

        if runs is None:
            return predicted_choice(choose(self.candidates()))
        return verified_choice(self.candidates, choose, runs)

    def config(self, choice: Choice) -> TrainingConfig:
        return results.training_config(self.record(), choice)

    def try_best(self, runs: Callable[[Candidate], bool] | None) -> Best | None:
        """The best and its configuration, None where there is nothing to choose from."""
        try:
            choice = self.choose("quality", 0.01, runs)
        except NoResultError:
            return None
        return choice, self.config(choice)
