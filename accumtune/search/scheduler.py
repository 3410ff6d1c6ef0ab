"""One call of `tuner.search`: proposals from the oracle, trials in processes, everything in the journal."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import keras
from keras_tuner.engine.trial import TrialStatus

from accumtune.errors import BudgetTooSmallError, SearchFailedError
from accumtune.memory.budget import format_bytes
from accumtune.memory.machine import budget_hint
from accumtune.oracles import keras_tuner_adapter as oracles
from accumtune.search.console.display import Display
from accumtune.search.feasibility import BATCH_HYPERPARAMETERS
from accumtune.search.subclassing.hooks import Hooks
from accumtune.search.trial.trial_result import TrialResult, completed_result
from accumtune.search.trial.trial_runner import TrialRunner
from accumtune.tracking.journal import Journal, read_search, read_trial
from accumtune.worker.transport.task_directory import SearchDirectory, TaskDirectory

# An oracle that keeps proposing what was trained already is given other values after so many in a row.
_MAX_REUSED_IN_A_ROW = 3
# From Ctrl-C to the end of all trials; a person waits 10 s at most, and ending processes takes a moment.
_STOPPING_SECONDS = 7.0


class StoppedAtOnce(KeyboardInterrupt):
    """A second Ctrl-C: nobody wants to wait."""


class SearchSession:
    """Runs trials until the oracle has no more.

    Args:
        oracle: Keras Tuner's.
        runner: runs one trial.
        directory: of the search.
        display: what the user sees.
        workers: trials at once.
        memory_budget_bytes: for messages.
        advise: tells the user, once in a search, what may help.
        hooks: what a subclass of the tuner has of its own.
    """

    def __init__(
        self,
        oracle: Any,
        runner: TrialRunner,
        directory: SearchDirectory,
        display: Display,
        *,
        workers: int = 1,
        memory_budget_bytes: int | None = None,
        advise: Callable[[Sequence[str]], None] = lambda texts: None,
        hooks: Hooks | None = None,
    ) -> None:
        self._oracle = oracle
        self._runner = runner
        self._directory = directory
        self._display = display
        self._workers = workers
        self._memory_budget_bytes = memory_budget_bytes
        self._advise = advise
        self._hooks = hooks or Hooks()
        self._reused_in_a_row = 0
        self._infeasible_in_a_row = 0
        self._is_exhausted = False

    def run(self) -> None:
        """Returns when the search has finished.

        Raises:
            SearchFailedError: `max_consecutive_failed_trials` trials failed one after another.
            BudgetTooSmallError: no proposal fits in the budget at any micro-batch size.
            KeyboardInterrupt: Ctrl-C, after the trials have saved their state and ended; `StoppedAtOnce` where it
                came twice.
        """
        self._recover()
        running: dict[Future[TrialResult], tuple[str, Any]] = {}
        with ThreadPoolExecutor(self._workers, thread_name_prefix="accumtune-trial") as threads:
            with self._stopping(running):
                self._loop(threads, running)
        self._refuse_where_nothing_fits(oracles.consecutive_failures(self._oracle))
        self._refuse_where_all_failed()

    def _loop(self, threads: ThreadPoolExecutor, running: dict[Future[TrialResult], tuple[str, Any]]) -> None:
        idle = [f"tuner{index}" for index in range(self._workers)]
        while True:
            waits_for_others = False
            while idle and not waits_for_others and not self._is_exhausted:
                trial = self._next_trial(idle[-1])
                if trial is not None and trial.status == TrialStatus.RUNNING:
                    self._hooks.on_trial_begin(trial)
                    running[threads.submit(self._run_trial, trial)] = (idle.pop(), trial)
                else:  # STOPPED, or IDLE: waiting for the outcome of another trial
                    waits_for_others = True
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                tuner_id, trial = running.pop(future)
                if self._end_trial(trial, future.result()):
                    idle.append(tuner_id)
                else:  # the same trial once more, with other values
                    running[threads.submit(self._run_trial, trial)] = (tuner_id, trial)
            self._hooks.after_trial()

    def _next_trial(self, tuner_id: str) -> Any:
        """The oracle's proposal; random values instead of one more that was trained already, None without any left."""
        self._hooks.pre_create_trial()
        if self._reused_in_a_row < _MAX_REUSED_IN_A_ROW or not oracles.can_redraw(self._oracle):
            return self._oracle.create_trial(tuner_id)
        if oracles.has_nothing_new(self._oracle):
            self._is_exhausted = True
            return None
        trial = self._oracle.create_trial(tuner_id)
        if trial.status == TrialStatus.RUNNING:
            oracles.redraw(self._oracle, trial)
        return trial

    @contextlib.contextmanager
    def _stopping(self, running: Mapping[Future[TrialResult], tuple[str, Any]]) -> Iterator[None]:
        """Whatever ends the search ends its trials too: nobody would wait for them."""
        try:
            yield
        except KeyboardInterrupt:
            try:
                self._stop_politely(running)
            except KeyboardInterrupt:
                self._runner.stop()
                raise StoppedAtOnce from None
            raise
        except BaseException:
            self._runner.stop()
            raise

    def _stop_politely(self, running: Mapping[Future[TrialResult], tuple[str, Any]]) -> None:
        """Trials end with their epoch and their state saved, or are killed; one that completes counts."""
        self._display.line("Stopping: trials that run save their state and end. Ctrl-C once more stops them at once.")
        self._runner.ask_to_stop(_STOPPING_SECONDS)
        self._runner.stop()
        done, _ = wait(running, timeout=_STOPPING_SECONDS)
        for future in done:
            if future.exception() is None and future.result().status in ("completed", "reused"):
                self._end_trial(running[future][1], future.result())

    def _run_trial(self, trial: Any) -> TrialResult:
        values = trial.hyperparameters.values
        overrides = {}
        if "tuner/epochs" in values:  # Hyperband
            overrides = {"epochs": values["tuner/epochs"], "initial_epoch": values["tuner/initial_epoch"]}
        return (self._hooks.run_trial or self.train)(trial, overrides)

    def train(self, trial: Any, fit_overrides: Mapping[str, Any], payload_file: Path | None = None) -> TrialResult:
        """Trains a trial in a process of its own; `payload_file` for one that has data of its own."""
        space = trial.hyperparameters.get_config()
        if payload_file is not None:
            space["payload"] = str(payload_file.resolve())
        return self._runner.run(trial.trial_id, self._number(trial), space, fit_overrides)

    def _number(self, trial: Any) -> int:
        return int(self._oracle.start_order.index(trial.trial_id)) + 1

    def _end_trial(self, trial: Any, result: TrialResult) -> bool:
        """Tells journal, oracle and user; False where the trial is to run again with other values."""
        number = self._number(trial)
        if result.space or self._hooks.run_trial is not None:
            oracles.learn_space(self._oracle, trial, result.space, result.values)
        if result.status == "infeasible":
            self._infeasible_in_a_row += 1
            self._display.trial_ended(number, result)
            if self._infeasible_in_a_row == 1 and self._memory_budget_bytes is not None:
                # With the first that does not fit: nobody waits for twenty to hear of a setting.
                self._advise([hint] if (hint := budget_hint(keras.config.backend()).strip()) else [])
            if self._may_redraw() and oracles.replace_infeasible(self._oracle, trial) is not None:
                self._record_proposal(result)
                return False
        directory = self._directory.trial(trial.trial_id)
        self._write(directory, trial.trial_id, number, result)
        directory.checkpoint_file.unlink(missing_ok=True)  # after its end is written: killed in between, it goes on
        batch = {name: result.values[name] for name in BATCH_HYPERPARAMETERS if name in result.values}
        oracles.tell_batch(self._oracle, trial, batch)
        if result.status in ("completed", "reused"):
            self._infeasible_in_a_row = 0
            oracles.end_completed(self._oracle, trial, dict(result.metrics), result.best_epoch)
        elif result.status == "infeasible":
            oracles.end_without_counting(self._oracle, trial, result.reason)
        else:
            oracles.end_failed(self._oracle, trial, f"{result.reason}\n{result.traceback}".strip())
        oracles.note_batch(self._oracle, trial.trial_id, batch)
        self._hooks.on_trial_end(self._oracle.trials[trial.trial_id])
        if result.status != "infeasible":
            self._display.trial_ended(number, result)
        self._count_reused(result)
        self._check_limits()
        return True

    def _may_redraw(self) -> bool:
        return oracles.can_redraw(self._oracle) and self._infeasible_in_a_row < oracles.MAX_DRAWS

    def _count_reused(self, result: TrialResult) -> None:
        if result.status == "reused":
            oracles.grant_another_trial(self._oracle)
            self._reused_in_a_row += 1
        else:
            self._reused_in_a_row = 0

    def _check_limits(self) -> None:
        failed = oracles.consecutive_failures(self._oracle)
        if oracles.can_redraw(self._oracle) and self._infeasible_in_a_row >= 2 * oracles.MAX_DRAWS:
            self._is_exhausted = True  # what is left of the space does not fit
        # A grid begins in one corner, which says nothing of the others: it is walked through to its end.
        if oracles.can_redraw(self._oracle) and self._infeasible_in_a_row >= oracles.MAX_DRAWS:
            self._refuse_where_nothing_fits(failed)
        counted = [trial for trial in failed if self._status(trial) == "failed"]
        if len(counted) >= self._oracle.max_consecutive_failed_trials:
            counted = counted[-self._oracle.max_consecutive_failed_trials :]
            raise _too_many_failures(counted, f"{len(counted)} trials in a row")

    def _refuse_where_nothing_fits(self, failed: list[Any]) -> None:
        if self._infeasible_in_a_row and not self._any_completed():
            raise self._too_small(failed[-1].message if failed else "")

    def _refuse_where_all_failed(self) -> None:
        """A search of fewer trials than may fail in a row has come to nothing too."""
        ended = [self._oracle.trials[trial_id] for trial_id in self._oracle.end_order]
        failed = [trial for trial in ended if self._status(trial) == "failed"]
        if failed and not self._any_completed():
            raise _too_many_failures(failed, "The only trial" if len(failed) == 1 else f"All {len(failed)} trials")

    def _any_completed(self) -> bool:
        return any(trial.status == TrialStatus.COMPLETED for trial in self._oracle.trials.values())

    def _status(self, trial: Any) -> str:
        return str(read_trial(self._directory.trial(trial.trial_id).path).status)

    def _too_small(self, reason: str) -> SearchFailedError | BudgetTooSmallError:
        if self._memory_budget_bytes is None:
            return SearchFailedError(
                f"None of {self._infeasible_in_a_row} proposals may be trained: {reason}.",
                "a build function that also makes smaller models.",
                "raise max_model_size.",
            )
        return BudgetTooSmallError(
            f"Received memory_budget={format_bytes(self._memory_budget_bytes or 0)}, in which none of "
            f"{self._infeasible_in_a_row} proposals fits: {reason or 'not even micro-batch 1 fits'}.",
            "a budget that holds the parameters, the optimizer's slots and one sample's activations.",
            "raise memory_budget, or let the build function make smaller models."
            + budget_hint(keras.config.backend()),
        )

    def _write(self, directory: TaskDirectory, trial_id: str, number: int, result: TrialResult) -> None:
        journal = Journal(directory.journal_file)
        if not any(event["event"] == "proposed" for event in journal.events()):  # it has not come to training
            journal.append(
                "proposed", trial_id=trial_id, number=number, hyperparameters=dict(result.values),
                predicted_peak_memory_bytes=result.predicted_peak_memory_bytes,
            )  # fmt: skip
        report = {
            name: result.report.get(name)
            for name in (
                "peak_memory_bytes", "memory_source", "device", "throughput_samples_per_second", "updates",
                "training_seconds", "precision_policy",
            )
        }  # fmt: skip
        journal.append(
            "ended", status=result.status, reason=result.reason, traceback=result.traceback,
            objective_value=result.metrics.get(self._oracle.objective.name), best_epoch=result.best_epoch,
            reused_from=result.reused_from, metrics=dict(result.metrics), **report,
        )  # fmt: skip

    def _record_proposal(self, result: TrialResult) -> None:
        """A proposal that fits at no micro-batch size: on record, though it never became a trial."""
        number = len(list(self._directory.path.glob("infeasible_*")))
        directory = TaskDirectory(self._directory.path / f"infeasible_{number:04d}")
        self._write(directory, directory.path.name, number, result)

    def _recover(self) -> None:
        """What an earlier session has done: its trainings are known, its trials that never trained do not count."""
        record = read_search(self._directory.path)
        oracles.take_back_grants(self._oracle)
        ended = set(self._oracle.end_order)
        for trial in record.trials:
            if trial.status == "completed":
                # Also where the search was gone before its oracle was told.
                self._runner.remember(trial.trial_id, completed_result(trial))
            if trial.trial_id not in ended:
                continue
            self._display.remember(trial.status, trial.objective_value, trial.hyperparameters)
            if trial.status in ("reused", "infeasible"):
                oracles.grant_another_trial(self._oracle)


def _too_many_failures(trials: list[Any], which: str) -> SearchFailedError:
    reasons = "\n".join(f"  trial {trial.trial_id}: {(trial.message or '').splitlines()[0]}" for trial in trials)
    return SearchFailedError(
        f"{which} failed:\n{reasons}\n\nThe last one in full:\n{trials[-1].message}",
        "a build function whose models train.",
        "mend what the reasons say and run the same script again: completed trials are kept, where the mended script "
        "still makes their models. More patience: "
        "max_consecutive_failed_trials=.",
    )


@contextlib.contextmanager
def shared_data(directory: SearchDirectory) -> Any:
    """The data that trials map into memory exist while the search runs."""
    try:
        yield directory.payload_file
    finally:
        shutil.rmtree(directory.payload_file.parent, ignore_errors=True)
