"""Runs one call of `tuner.search`: resumes an earlier session, runs the trials and reports the end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accumtune.config.production import installed_versions
from accumtune.errors import AccumtuneError
from accumtune.execution.placement import Place, Places
from accumtune.oracles import keras_tuner_adapter
from accumtune.oracles.keras_tuner_adapter import pauses_trials
from accumtune.oracles.metric_direction import described
from accumtune.search import ghost_batches
from accumtune.search.processes import SearchProcesses
from accumtune.search.results.best_model_export import export_best_model
from accumtune.search.results.search_results import Best, SearchResults
from accumtune.search.results.selection import Candidate
from accumtune.search.results.training_dependencies import count_samples, describe_data, describe_fit
from accumtune.search.scheduler import Scheduler, StoppedAtOnce
from accumtune.search.search_space import SearchSpace
from accumtune.search.session.console import Console
from accumtune.search.session.reporter import Reporter, command_to_resume, greeting, setup_advice
from accumtune.search.session.resume import resume_search
from accumtune.search.session.search_identity import identify_session, known_identity
from accumtune.search.subclassing.hooks import Hooks
from accumtune.search.subclassing.overrides import is_overridden
from accumtune.search.subclassing.own_run_trial import OwnRunTrial
from accumtune.search.trial.trial_runner import TrialRunner
from accumtune.search.trial.trial_settings import TrialSettings
from accumtune.worker.transport.task_directory import SearchDirectory

if TYPE_CHECKING:
    from accumtune.search.tuner import Tuner


@dataclass(frozen=True)
class SearchParts:
    """The parts that a tuner shares among its sessions.

    Args:
        places: where trials run, one for each trial at once.
        compiled_with: the `optimizer`, `loss` and `metrics` that override those of the build function.
        asked: settings that the user gives in this session; the saved state may have others.
    """

    files: SearchDirectory
    processes: SearchProcesses
    space: SearchSpace
    results: SearchResults
    reporter: Reporter
    places: Sequence[Place]
    compiled_with: Mapping[str, Any]
    asked: Mapping[str, Any]


class SearchSession:
    """Runs one session of a search, and journals it.

    Args:
        tuner: its hooks are called.
        parts: of the tuner.
        fit_args, fit_kwargs: of `search`.
    """

    def __init__(
        self, tuner: Tuner, parts: SearchParts, fit_args: tuple[Any, ...], fit_kwargs: Mapping[str, Any]
    ) -> None:
        self._tuner = tuner
        self._parts = parts
        self._fit_args = fit_args
        self._fit_kwargs = {name: value for name, value in fit_kwargs.items() if name != "verbose"}
        verbose = fit_kwargs.get("verbose", 1)
        objective = tuner.oracle.objective
        self._console = Console(
            # Whole trainings, where trials are paused: no number of trials.
            objective.name, None if pauses_trials(tuner.oracle) else keras_tuner_adapter.asked_trials(tuner.oracle),
            1 if verbose == "auto" else int(verbose),
            direction=objective.direction, workers=tuner.workers,
        )  # fmt: skip
        self._identity: dict[str, str] = {}
        self.own_run_trial: OwnRunTrial | None = None
        if self._overrides("run_trial"):
            self.own_run_trial = OwnRunTrial(tuner.run_trial, self.payload(), objective, parts.files)

    @property
    def epochs(self) -> int:
        """What a whole trial trains, as `search` was told."""
        return int(self._fit_kwargs.get("epochs") or 1)

    def payload(self) -> dict[str, Any]:
        """Returns what is sent to the processes of trials and probes."""
        return {
            "hypermodel": self._tuner.hypermodel,
            "objective": self._tuner.oracle.objective,
            "fit_args": self._fit_args,
            "fit_kwargs": self._fit_kwargs,
            "is_scored_later": self._overrides("run_trial"),
            "max_model_size": self._tuner.max_model_size,
        }

    def resume(self) -> list[str]:
        """Resumes the search of an earlier session, if there is one.

        Returns:
            Lines for the user about what has changed.

        Raises:
            SearchDirectoryError: something that decides the results of its trials has changed.
        """
        parts, tuner = self._parts, self._tuner
        parts.space.discover_with_data()
        record = parts.results.record()
        self._identity = identify_session(
            self._decisive_settings(), self._fit_args, self._fit_kwargs, tuner.hypermodel.hypermodel,
            known_identity(record), parts.processes.profiler,
        )  # fmt: skip
        if not record.search_id:
            return []
        return resume_search(
            record, self._identity, tuner.oracle, parts.space, parts.processes, tuner.memory_budget_bytes
        )

    def run(self, repairs: Sequence[str], notes: Sequence[str]) -> None:
        """Runs all trials; the end is reported whatever happens.

        Args:
            repairs: lines for the user about repaired files of an earlier session.
            notes: lines for the user, printed once in a search.
        """
        tuner, reporter, console = self._tuner, self._parts.reporter, self._console
        lines = greeting(
            tuner.project_name, type(tuner).__name__, tuner.memory_budget_bytes, tuner.effective_batch_sizes,
            self._parts.places,
        )  # fmt: skip
        reporter.begin(self._description, [*repairs, *lines], [*self._advice(), *notes], console.line)
        status, reason, best, is_hurried = "failed", "", None, False
        try:
            with console:
                tuner.on_search_begin()
                self._scheduler().run()
                tuner.on_search_end()
            best = self._parts.results.try_best(self.runs)
            self._export_best_model(best)
            status = "finished"
        except KeyboardInterrupt as error:
            is_hurried = isinstance(error, StoppedAtOnce)
            status, reason = "interrupted", "stopped by the user (Ctrl-C)"
            console.line(f"Interrupted. Nothing is lost; to resume, run the same script again: {command_to_resume()}")
            raise
        except Exception as error:
            reason = str(error)
            raise
        finally:
            self._parts.processes.close()
            reporter.end(status, reason, best, tuner.save, is_hurried=is_hurried)

    def runs(self, candidate: Candidate) -> bool:
        """Runs a candidate for a few updates, and returns whether that stays within the budget."""
        trials = self._parts.results.record().trials
        signature = next(trial.signature for trial in trials if trial.trial_id == candidate.trial_id) or ""
        space = dict(self._tuner.oracle.get_trial(candidate.trial_id).hyperparameters.get_config())
        return self._parts.processes.runs(candidate, space, signature, self.payload())

    def _scheduler(self) -> Scheduler:
        tuner, parts, console = self._tuner, self._parts, self._console
        settings = TrialSettings(
            memory_budget_bytes=tuner.memory_budget_bytes,
            micro_batch_sizes=tuner.micro_batch_sizes,
            searches_pairs=tuner.search_over == "pairs",
            is_batch_coupled=bool(tuner.batch_coupled_layers),
            executions_per_trial=tuner.executions_per_trial,
            seed=tuner.oracle.seed,
            objective_name=tuner.oracle.objective.name,
            trial_timeout_seconds=tuner.trial_timeout_seconds,
            identity={name: text for name, text in self._identity.items() if name not in ("versions", "tuner")},
            versions=installed_versions(),
            has_own_run_trial=self._overrides("run_trial"),
            max_model_size=tuner.max_model_size,
            ghost_batch_size=tuner.ghost_batch_size,
        )
        runner = TrialRunner(
            settings, parts.files, parts.processes.executor(), parts.processes.profiler(console.probe),
            console.trial_started, places=Places(parts.places), pruning=tuner._pruning(),
        )  # fmt: skip
        hooks = Hooks(
            tuner.pre_create_trial,
            tuner.on_trial_begin,
            tuner.on_trial_end,
            self.own_run_trial,
            tuner.save if self._overrides("save", "get_state") else lambda: None,
        )
        return Scheduler(
            tuner.oracle, runner, parts.files, console, workers=tuner.workers,
            memory_budget_bytes=tuner.memory_budget_bytes, advise=parts.reporter.advise, hooks=hooks,
        )  # fmt: skip

    def _overrides(self, *methods: str) -> bool:
        return any(is_overridden(method, type(self._tuner)) for method in methods)

    def _export_best_model(self, best: Best | None) -> None:
        name, parts = self._tuner.register_as, self._parts
        if best is None or not name or self._tuner.tracking_uri is False:
            return
        try:
            export_best_model(parts.files, parts.processes.executor(), self.payload(), best[0].candidate.trial_id, name)
        except AccumtuneError as error:  # the search's results stand without it
            self._console.line(f"The best model is not registered as {name!r}: {error}")

    # What the journal gets, and what the user reads

    def _decisive_settings(self) -> dict[str, Any]:
        """Returns the settings that decide the results of trials; None stands for "not set"."""
        tuner = self._tuner
        objective, asked = tuner.oracle.objective, self._parts.space.asked_whole_batch_loss
        return {
            "objective": f"{objective.name} ({objective.direction})",
            "objective's terms": described(objective).get("terms"),
            "executions_per_trial": tuner.executions_per_trial,
            "learning_rate_scaling": tuner.learning_rate_scaling,
            "base_effective_batch_size": tuner.base_effective_batch_size if tuner.learning_rate_scaling else None,
            "ghost_batch_size": tuner.ghost_batch_size,
            "whole_batch_loss": None if asked == "auto" else str(asked),
            "validation_batch_size": self._test_step_batch_size(),
            "seed": tuner.oracle.seed,
            "search_over": tuner.search_over,
            "backend": self._parts.processes.backend,
            "tuner": type(tuner).__name__,
            "versions": ", ".join(f"{name} {version}" for name, version in installed_versions().items()),
            **{f"tuner's {name}": value for name, value in self._parts.compiled_with.items()},
            **self._parts.asked,
        }

    def _test_step_batch_size(self) -> int | None:
        """Returns the batch size of the models' own `test_step`; None if they have none."""
        size = self._parts.space.test_step_batch_size
        return None if size is None else self._fit_kwargs.get("validation_batch_size") or size

    def _description(self) -> dict[str, Any]:
        tuner = self._tuner
        fit = describe_fit(
            self._fit_kwargs, tuner.hypermodel.hypermodel, self._parts.compiled_with, self._test_step_batch_size()
        )
        if self._overrides("run_trial"):
            fit["not_carried"].append(f"{type(tuner).__name__}.run_trial, which may give fit other arguments")
        return {
            "name": tuner.project_name,
            "objective": described(tuner.oracle.objective),
            "memory_budget_bytes": tuner.memory_budget_bytes,
            "micro_batch_sizes": tuner.micro_batch_sizes,
            "accumulation_steps": tuner.accumulation_steps,
            "search_over": tuner.search_over,
            "batch_coupled_layers": tuner.batch_coupled_layers,
            "whole_batch_loss": tuner.whole_batch_loss,
            "own_train_step": self._parts.space.own_train_step,
            "ghost_batch_size": tuner.ghost_batch_size,
            "learning_rate_scaling": tuner.learning_rate_scaling,
            "base_effective_batch_size": tuner.base_effective_batch_size,
            "tuner": type(tuner).__name__,
            "max_trials": keras_tuner_adapter.asked_trials(tuner.oracle),
            "backend": self._parts.processes.backend,
            "versions": installed_versions(),
            "identity": self._identity,
            "fit": fit,
            "data": {"name": tuner.project_name, **describe_data(self._fit_args, self._fit_kwargs)},
        }

    def _advice(self) -> list[str]:
        tuner = self._tuner
        space = self._parts.space
        listed = space.listed_effective_batch_sizes
        said = ghost_batches.line(tuner.ghost_batch_size, space.asked_ghost_batch_size, listed)
        return said + setup_advice(
            hyperparameters=[hp.name for hp in tuner.oracle.hyperparameters.space],
            effective_batch_sizes=tuner.effective_batch_sizes,
            learning_rate_scaling=tuner.learning_rate_scaling,
            batch_coupled_layers=tuner.batch_coupled_layers,
            whole_batch_loss=bool(tuner.whole_batch_loss),
            own_train_step=self._parts.space.own_train_step,
            test_step_batch_size=self._test_step_batch_size(),
            searches_pairs=tuner.search_over == "pairs",
            samples=count_samples(self._fit_args, self._fit_kwargs),
        )
