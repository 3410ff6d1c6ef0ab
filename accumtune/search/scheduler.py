"""Runs the trials of one call of `tuner.search`: asks the oracle, starts trials, and reports how they ended."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import keras
from keras_tuner.engine.trial import TrialStatus

from accumtune.accumulation.batch_pair import BATCH_HYPERPARAMETERS
from accumtune.memory.machine import budget_hint
from accumtune.oracles import keras_tuner_adapter
from accumtune.search.failure_limits import FailureLimits
from accumtune.search.pruning.pruner import is_paused
from accumtune.search.session.console import Console
from accumtune.search.subclassing.hooks import Hooks
from accumtune.search.trial.trial_result import TrialResult, completed_result, write_result
from accumtune.search.trial.trial_runner import TrialRunner
from accumtune.tracking.journal import read_search
from accumtune.worker.transport.task_directory import SearchDirectory, TaskDirectory

# After so many reused proposals in a row, random values replace the oracle's.
_MAX_REUSED_IN_A_ROW = 3
# From Ctrl-C until trials are killed. A user should not wait for more than 10 s, and ending processes takes time.
_STOPPING_SECONDS = 7.0


class StoppedAtOnce(KeyboardInterrupt):
    """Ctrl-C came twice: the search ends without waiting for its trials."""


class Scheduler:
    """Runs trials until the oracle has no more.

    Args:
        oracle: Keras Tuner's.
        runner: runs one trial.
        directory: of the search.
        console: prints for the user.
        workers: trials at once.
        memory_budget_bytes: for messages.
        advise: prints advice, once in a search.
        hooks: the methods that a subclass of the tuner overrides.
    """

    def __init__(
        self,
        oracle: Any,
        runner: TrialRunner,
        directory: SearchDirectory,
        console: Console,
        *,
        workers: int = 1,
        memory_budget_bytes: int | None = None,
        advise: Callable[[Sequence[str]], None] = lambda texts: None,
        hooks: Hooks | None = None,
    ) -> None:
        self._oracle = oracle
        self._runner = runner
        self._directory = directory
        self._console = console
        self._workers = workers
        self._memory_budget_bytes = memory_budget_bytes
        self._advise = advise
        self._hooks = hooks or Hooks()
        self._limits = FailureLimits(oracle, directory, memory_budget_bytes)
        self._reused_in_a_row = 0
        self._is_exhausted = False

    def run(self) -> None:
        """Runs trials until the search has finished.

        Raises:
            SearchFailedError: `max_consecutive_failed_trials` trials failed one after another.
            BudgetTooSmallError: no proposal fits in the budget at any micro-batch size.
            KeyboardInterrupt: Ctrl-C, after the trials have saved their state and ended; `StoppedAtOnce` after a
                second one.
        """
        self._recover()
        running: dict[Future[TrialResult], tuple[str, Any]] = {}
        with ThreadPoolExecutor(self._workers, thread_name_prefix="accumtune-trial") as threads:
            with self._stopping(running):
                self._loop(threads, running)
        for trial_id in self._oracle.end_order:
            self._directory.trial(trial_id).checkpoint_file.unlink(missing_ok=True)  # paused ones end with the search
        self._limits.check_end()

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
        """Returns the oracle's proposal, or random values after too many reused ones; None if nothing new is left."""
        self._hooks.pre_create_trial()
        if self._reused_in_a_row < _MAX_REUSED_IN_A_ROW or not keras_tuner_adapter.can_redraw(self._oracle):
            return self._oracle.create_trial(tuner_id)
        if keras_tuner_adapter.has_nothing_new(self._oracle):
            self._is_exhausted = True
            return None
        trial = self._oracle.create_trial(tuner_id)
        if trial.status == TrialStatus.RUNNING:
            keras_tuner_adapter.redraw(self._oracle, trial)
        return trial

    @contextlib.contextmanager
    def _stopping(self, running: Mapping[Future[TrialResult], tuple[str, Any]]) -> Iterator[None]:
        """Ends the running trials if an exception ends the search."""
        try:
            yield
        except KeyboardInterrupt:
            try:
                self._stop_politely(running)
            except KeyboardInterrupt:
                self._runner.processes.stop()
                raise StoppedAtOnce from None
            raise
        except BaseException:
            self._runner.processes.stop()
            raise

    def _stop_politely(self, running: Mapping[Future[TrialResult], tuple[str, Any]]) -> None:
        """Lets trials save their state and end, and kills those that take too long; one that completes counts."""
        self._console.line("Stopping: running trials save their state and end. Ctrl-C again stops them at once.")
        self._runner.processes.ask_to_stop(_STOPPING_SECONDS)
        self._runner.processes.stop()
        done, _ = wait(running, timeout=_STOPPING_SECONDS)
        for future in done:
            if future.exception() is None and future.result().status in ("completed", "reused"):
                self._end_trial(running[future][1], future.result())

    def _run_trial(self, trial: Any) -> TrialResult:
        values = trial.hyperparameters.values
        overrides = {}
        if "tuner/epochs" in values:  # Hyperband
            overrides = {"epochs": values["tuner/epochs"], "initial_epoch": values["tuner/initial_epoch"]}
        if self._hooks.run_trial is None:
            return self._train(trial, overrides, None)
        return self._hooks.run_trial(trial, overrides, self._train)

    def _train(self, trial: Any, fit_overrides: Mapping[str, Any], payload_file: Path | None) -> TrialResult:
        """Trains a trial in a process of its own; `payload_file` holds its data if they are not the search's."""
        space = trial.hyperparameters.get_config()
        if payload_file is not None:
            space["payload"] = str(payload_file.resolve())
        is_pausing = keras_tuner_adapter.pauses_trials(self._oracle)
        pause = self._oracle.pause_after(trial.trial_id) if is_pausing else None
        return self._runner.run(trial.trial_id, self._number(trial), space, fit_overrides, pause)

    def _number(self, trial: Any) -> int:
        return int(self._oracle.start_order.index(trial.trial_id)) + 1

    def _end_trial(self, trial: Any, result: TrialResult) -> bool:
        """Reports a trial's end to journal, oracle and user; returns False if it must run again with other values."""
        number = self._number(trial)
        if result.space or self._hooks.run_trial is not None:
            keras_tuner_adapter.learn_space(self._oracle, trial, result.space, result.values)
        if result.status == "infeasible":
            self._console.trial_ended(number, result)
            if self._replace_infeasible(trial, result):
                return False
        self._write_end(trial, number, result)
        self._tell_oracle(trial, result)
        self._hooks.on_trial_end(self._oracle.trials[trial.trial_id])
        if result.status != "infeasible":
            self._console.trial_ended(number, result)
        self._count_reused(result)
        self._is_exhausted = self._is_exhausted or self._limits.nothing_else_fits()
        self._limits.check()
        return True

    def _replace_infeasible(self, trial: Any, result: TrialResult) -> bool:
        """Gives an infeasible trial other values and journals its proposal; returns False if there are none."""
        limits = self._limits
        limits.infeasible_in_a_row += 1
        if limits.infeasible_in_a_row == 1 and self._memory_budget_bytes is not None:
            # At the first infeasible trial, not after twenty of them.
            self._advise([hint] if (hint := budget_hint(keras.config.backend()).strip()) else [])
        if not limits.may_replace_infeasible() or keras_tuner_adapter.replace_infeasible(self._oracle, trial) is None:
            return False
        number = len(list(self._directory.path.glob("infeasible_*")))
        directory = TaskDirectory(self._directory.path / f"infeasible_{number:04d}")
        write_result(directory, directory.path.name, number, result, self._oracle.objective.name)
        return True

    def _write_end(self, trial: Any, number: int, result: TrialResult) -> None:
        directory = self._directory.trial(trial.trial_id)
        write_result(directory, trial.trial_id, number, result, self._oracle.objective.name)
        if not result.is_paused:
            directory.checkpoint_file.unlink(missing_ok=True)  # last, so that a killed search can resume the trial

    def _tell_oracle(self, trial: Any, result: TrialResult) -> None:
        oracle = self._oracle
        batch = {name: result.values[name] for name in BATCH_HYPERPARAMETERS if name in result.values}
        keras_tuner_adapter.learn_micro_batch(oracle, trial, batch)
        if result.status in ("completed", "reused"):
            self._limits.infeasible_in_a_row = 0
            keras_tuner_adapter.end_completed(oracle, trial, dict(result.metrics), result.best_epoch)
        elif result.status == "infeasible":
            keras_tuner_adapter.end_without_counting(oracle, trial, result.reason)
        else:
            keras_tuner_adapter.end_failed(oracle, trial, f"{result.reason}\n{result.traceback}".strip())
        keras_tuner_adapter.write_pair_that_ran(oracle, trial.trial_id, batch)

    def _count_reused(self, result: TrialResult) -> None:
        if result.status == "reused":
            keras_tuner_adapter.grant_another_trial(self._oracle)
            self._reused_in_a_row += 1
        else:
            self._reused_in_a_row = 0

    def _recover(self) -> None:
        """Reads an earlier session's trials: completed ones may be reused, untrained ones do not count."""
        record = read_search(self._directory.path)
        keras_tuner_adapter.take_back_grants(self._oracle)
        ended = set(self._oracle.end_order)
        for trial in record.trials:
            if trial.status == "completed":
                # Also one whose search was killed before the oracle had its result.
                self._runner.remember(trial.trial_id, completed_result(trial))
            if trial.trial_id not in ended:
                continue
            paused = trial.number if is_paused(trial.reason) else None
            self._console.remember(trial.status, trial.objective_value, trial.hyperparameters, paused)
            if trial.status in ("reused", "infeasible"):
                keras_tuner_adapter.grant_another_trial(self._oracle)
