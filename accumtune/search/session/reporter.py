"""Reports a search, while it runs and when it ends, to its journal, its report, MLflow and the terminal."""

from __future__ import annotations

import os
import shlex
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from accumtune.execution.placement import Place
from accumtune.memory.budget import format_bytes
from accumtune.search.results.search_results import Best, SearchResults
from accumtune.tracking.journal import Journal, read_search_journal
from accumtune.tracking.mlflow.tracker import Tracker
from accumtune.worker.transport.task_directory import SearchDirectory


class Reporter:
    """Reports the sessions of one search.

    Args:
        files: the search's directory.
        results: what the search has found.
        tracking_uri: MLflow's tracking URI; None: the default; False: no tracking.
    """

    def __init__(
        self, files: SearchDirectory, results: SearchResults, tracking_uri: str | Literal[False] | None
    ) -> None:
        self._files = files
        self._results = results
        self._tracking_uri = tracking_uri
        self._journal = Journal(files.journal_file)
        self._tracker: Tracker | None = None
        self._print_line: Callable[[str], None] = print

    def begin(
        self,
        description: Callable[[], Mapping[str, Any]],
        lines: Sequence[str],
        advice: Sequence[str],
        print_line: Callable[[str], None],
    ) -> None:
        """Journals that a session begins, prints its first lines and starts tracking.

        Args:
            description: of the search, for its journal.
            lines: printed in every session.
            advice: printed once in a search.
            print_line: prints a line for the user, in this session.
        """
        self._print_line = print_line
        if any(event["event"] == "search_started" for event in self._journal.events()):
            self._journal.append("search_resumed", **description())
        else:
            self._journal.append("search_started", search_id=uuid.uuid4().hex, **description())
        for line in lines:
            print_line(line)
        self.advise(advice)
        if self._tracking_uri is not False:
            self._tracker = Tracker(self._files.path, self._tracking_uri)
            self._tracker.start()

    def advise(self, texts: Sequence[str]) -> None:
        """Prints the advice that this search has not given yet, in this session or an earlier one."""
        given = read_search_journal(self._files.path).advice
        for text in (text for text in texts if text not in given):
            self._journal.append("advice", text=text)
            self._print_line(text)

    def end(self, status: str, reason: str, best: Best | None, save: Callable[[], None], *, is_hurried: bool) -> None:
        """Writes the report, journals the end, completes MLflow's runs, and prints how to browse the search.

        Args:
            status, reason: how the search ended.
            best: the best candidate; None: the report looks for it.
            save: saves Keras Tuner's state.
            is_hurried: skips the report and MLflow, after a second Ctrl-C. The next session or `accumtune sync` updates
                MLflow.
        """
        try:
            save()
            if not is_hurried:
                self._results.write_report(best, status, reason)
        finally:
            # After the report, so that MLflow has it before the search's run ends.
            self._journal.append("search_ended", status=status, reason=reason)
            if is_hurried:
                self._tracker = None
            message = "" if self._tracker is None else self._tracker.stop()
            if message:
                self._print_line(message)
        address, command = self.ui_address, self.ui_command
        if address:
            self._print_line(f"Browse it: {command}\n  then open {address}" if command else f"Browse it: {address}")

    def position(self) -> int:
        """Returns the journal's size in bytes. It grows with every session."""
        try:
            return self._files.journal_file.stat().st_size
        except FileNotFoundError:
            return 0

    @property
    def ui_command(self) -> str:
        """The command that opens the search in the MLflow UI."""
        return "" if self._tracker is None else self._tracker.ui_command()

    @property
    def ui_address(self) -> str:
        """The search's address in the MLflow UI; where there is a `ui_command`, it answers once that runs."""
        return "" if self._tracker is None else self._tracker.ui_address()


def greeting(
    project_name: str,
    tuner_name: str,
    memory_budget_bytes: int | None,
    effective_batch_sizes: Sequence[int],
    places: Sequence[Place],
) -> list[str]:
    """Returns the first lines of a session: the tuner, the budget, the effective batches and the devices."""
    budget = "no memory budget" if memory_budget_bytes is None else format_bytes(memory_budget_bytes)
    sizes = ", ".join(map(str, effective_batch_sizes))
    lines = [f'Search "{project_name}": {tuner_name}, {budget}, effective batches {sizes}']
    if len(places) > 1:
        on = ", ".join(dict.fromkeys(place.description for place in places if place.description))
        lines.append(f"{len(places)} trials at once" + (f": {on}" if on else ""))
    return lines


def setup_advice(
    *,
    hyperparameters: Sequence[str],
    effective_batch_sizes: Sequence[int],
    learning_rate_scaling: str | None,
    batch_coupled_layers: Sequence[str],
    searches_pairs: bool,
    whole_batch_loss: bool = False,
    own_train_step: str | None = None,
    test_step_batch_size: int | None = None,
    samples: int | None = None,
) -> list[str]:
    """Returns one text for each part of the set-up that changes what the results mean.

    Args:
        hyperparameters: the names of all hyperparameters.
        effective_batch_sizes: those that are searched.
        learning_rate_scaling: as given to the tuner.
        batch_coupled_layers: of the models that the build function makes.
        searches_pairs: whether the micro-batch size is searched too.
        whole_batch_loss: whether the loss is computed over the whole effective batch, in two passes.
        own_train_step: `"mean"` or `"sum"`, over samples: what the gradients of the models' own `train_step` are;
            None without one.
        test_step_batch_size: the batch size of the models' own `test_step`; None if they have none.
        samples: in the training data; None if unknown.
    """
    texts = []
    if batch_coupled_layers:
        consequence = (
            "so micro-batch sizes are searched too"
            if searches_pairs
            else "so two pairs of one effective batch train differently (search_over='pairs' compares them)"
        )
        layers = "; ".join(batch_coupled_layers[:5])
        texts.append(f"The model's results depend on which samples share a micro-batch, {consequence}: {layers}")
    if own_train_step:
        texts.append(
            "The models' own train_step was tested on the training data and can be accumulated: its gradients are "
            f"{own_train_step.replace('mean', 'means').replace('sum', 'sums')} over samples."
        )
    if test_step_batch_size is not None:
        texts.append(
            f"The models' own test_step gets {test_step_batch_size} samples at a time in all trials, whatever their "
            "micro-batch, so that its results can be compared (search(validation_batch_size=...) sets another number)."
        )
    if whole_batch_loss:
        can = "; val_loss can, since all trials compute it over validation_batch_size samples, 32 by default"
        texts.append(
            "The loss couples the samples of a batch, so it is computed over the whole effective batch, in two passes: "
            "every micro-batch size trains the same. Training losses of different effective batches cannot be "
            f"compared{can if test_step_batch_size is None else ''}."
        )
    if len(effective_batch_sizes) > 1 and learning_rate_scaling is None and not any(map(_is_rate, hyperparameters)):
        texts.append(
            "The effective batch varies, but the learning rate is neither tuned nor scaled with it: large batches "
            "will look worse than they are. Give learning_rate_scaling='sqrt', or tune hp.Float('learning_rate', ...)."
        )
    whole = [size for size in effective_batch_sizes if samples is not None and size >= samples]
    if len(whole) > 1:
        texts.append(
            f"The training data have {samples} samples, so effective batches {', '.join(map(str, whole))} are all the "
            "same: one update per epoch, with all samples. Give fewer accumulation_steps to leave them out."
        )
    return texts


def _is_rate(name: str) -> bool:
    words = name.lower().replace("-", "_").split("_")
    return "learning" in words or "lr" in words


def command_to_resume() -> str:
    """Returns the command that resumes this search."""
    if "ipykernel" in sys.modules or not getattr(sys, "orig_argv", None):
        return "the same cells"
    return shlex.join([os.path.basename(sys.orig_argv[0]), *sys.orig_argv[1:]])
