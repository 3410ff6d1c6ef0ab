"""One search from its first line to its last: the trials between, and an end that is told whatever happens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

from accumtune.config.production import installed_versions
from accumtune.errors import AccumtuneError, SearchError
from accumtune.execution.placement import Place, Places
from accumtune.execution.profiling import Profiler
from accumtune.oracles import keras_tuner_adapter as oracles
from accumtune.search import identity as identities
from accumtune.search.answers import Answers
from accumtune.search.checks import (
    refuse_batch_size,
    refuse_missing_data,
    refuse_missing_validation,
    refuse_third_argument,
)
from accumtune.search.chronicle import Best
from accumtune.search.console.advice import advice
from accumtune.search.console.display import Display
from accumtune.search.console.telling import Telling, greeting
from accumtune.search.processes import SearchProcesses
from accumtune.search.pruning.pruning import Pruning
from accumtune.search.results import carried
from accumtune.search.results import search_results as results
from accumtune.search.results.registering import save_model_for_registry
from accumtune.search.results.selection import Candidate
from accumtune.search.scheduler import SearchSession, StoppedAtOnce
from accumtune.search.subclassing.hooks import Hooks
from accumtune.search.subclassing.overrides import is_overridden
from accumtune.search.subclassing.own_run_trial import FitArguments, OwnRunTrial
from accumtune.search.trial.settings import SearchSettings
from accumtune.search.trial.trial_result import TrialResult
from accumtune.search.trial.trial_runner import TrialRunner
from accumtune.search.workers import command_to_resume
from accumtune.tracking.lock import only_search
from accumtune.worker.transport.payload import dump_payload
from accumtune.worker.transport.task_directory import SearchDirectory, clear_disk_errors

SearchOver = Literal["auto", "effective_batch_size", "pairs"]


class Searching(Answers):
    """A tuner that searches: what `Tuner` was asked for, in processes of their own, with everything written down."""

    memory_budget_bytes: int | None
    max_model_size: int | None
    micro_batch_sizes: tuple[int, ...]
    accumulation_steps: tuple[int, ...]
    effective_batch_sizes: tuple[int, ...]
    learning_rate_scaling: str | None
    base_effective_batch_size: int
    search_over: SearchOver
    batch_coupled_layers: list[str]
    whole_batch_loss: bool
    trial_timeout_seconds: float | None
    workers: int
    register_as: str | None
    tracking_uri: str | None | Literal[False]
    _backend: str
    _compiled_with: dict[str, Any]
    _files: SearchDirectory
    _mended: list[str]
    _places: list[Place]
    _processes: SearchProcesses
    _identity: dict[str, str]
    _asked_search_over: str
    _asked_rounds: dict[str, Any]
    _asked_seed: int | None = None
    # How far the journal had come when the state was read or written last.
    _seen: int
    _train: Callable[[Any, Mapping[str, Any], Path | None], TrialResult]
    _own_run_trial: OwnRunTrial | None = None
    # Of the last call of `search`.
    _fit_arguments: tuple[tuple[Any, ...], dict[str, Any]] | None

    def search(self, *fit_args: Any, **fit_kwargs: Any) -> None:
        """Runs trials until `max_trials` have trained, each in a process of its own.

        The same script run again after an interruption goes on where it was: completed trials are kept.

        Args:
            *fit_args, **fit_kwargs: what `model.fit` takes, without `batch_size`: `x`, `y`, `validation_data`,
                `epochs`, `callbacks`, … Data are arrays (also dicts and tuples of arrays), a
                `keras.utils.PyDataset`, or functions without arguments that return one of these or a
                `tf.data.Dataset`. `verbose=0` prints nothing.

        Raises:
            UnsendableDataError: data or callbacks that cannot be sent to another process.
            BudgetTooSmallError: no proposal fits the budget, not even with micro-batch 1.
            SearchFailedError: `max_consecutive_failed_trials` trials failed one after another.
            SearchDirectoryError: another process searches in this directory, or it cannot be written to.
        """
        refuse_batch_size(fit_kwargs)
        if not self._has_own("run_trial"):
            refuse_third_argument(self.hypermodel.hypermodel, fit_args)
            refuse_missing_data(self.hypermodel.hypermodel, fit_args, fit_kwargs)
            refuse_missing_validation(self.oracle.objective.name, self.hypermodel.hypermodel, fit_kwargs)
        verbose = fit_kwargs.pop("verbose", 1)
        self.oracle.verbose = 0  # accumtune prints its own lines
        objective = self.oracle.objective
        display = Display(
            objective.name, oracles.asked_trials(self.oracle), 1 if verbose == "auto" else int(verbose),
            direction=objective.direction, workers=self.workers,
        )  # fmt: skip
        self._fit_arguments = (fit_args, fit_kwargs)
        telling = Telling(self._chronicle, display)
        lines = greeting(
            self.project_name, type(self).__name__, self.memory_budget_bytes, self.effective_batch_sizes, self._places
        )
        folder = self._files.path
        with clear_disk_errors(folder), only_search(folder), self._processes.sharing(self._payload()):
            notes = self._take_up_search()
            self.save()  # Keras Tuner itself saves after the first trial: too late for a kill during that one
            telling.begin(self._description, [*self._mended, *lines], [*self._advice(), *notes])
            status, reason, best, is_hurried = "failed", "", None, False
            try:
                with display:
                    profiler = self._processes.profiler(display.probe)
                    self.on_search_begin()
                    self._session(display, profiler, telling).run()
                    self.on_search_end()
                best = self._chronicle.try_best(self._trial_run())
                self._save_model(display, best)
                status = "finished"
            except KeyboardInterrupt as error:
                is_hurried = isinstance(error, StoppedAtOnce)
                status, reason = "interrupted", "stopped by the user (Ctrl-C)"
                display.line(f"Interrupted; nothing is lost, run the same script again to go on: {command_to_resume()}")
                raise
            except Exception as error:
                reason = str(error)
                raise
            finally:
                self._processes.close()
                telling.end(status, reason, best, self.save, is_hurried=is_hurried)
                self._seen = self._chronicle.position()

    def _try_with_data(self) -> None:
        """Decides what is searched over, where that depends on the data."""
        raise NotImplementedError

    def _session(self, display: Display, profiler: Profiler, telling: Telling) -> SearchSession:
        settings = SearchSettings(
            memory_budget_bytes=self.memory_budget_bytes,
            micro_batch_sizes=self.micro_batch_sizes,
            searches_pairs=self.search_over == "pairs",
            is_batch_coupled=bool(self.batch_coupled_layers),
            executions_per_trial=self.executions_per_trial,
            seed=self.oracle.seed,
            objective_name=self.oracle.objective.name,
            trial_timeout_seconds=self.trial_timeout_seconds,
            identity={name: text for name, text in self._identity.items() if name not in ("versions", "tuner")},
            versions=installed_versions(),
            has_own_run_trial=self._has_own("run_trial"),
            max_model_size=self.max_model_size,
        )
        runner = TrialRunner(
            settings, self._files, self._processes.executor(), profiler, display.trial_started,
            places=Places(self._places), pruning=self._pruning(),
        )  # fmt: skip
        session = SearchSession(
            self.oracle,
            runner,
            self._files,
            display,
            workers=self.workers,
            memory_budget_bytes=self.memory_budget_bytes,
            advise=telling.advise,
            hooks=self._hooks(),
        )
        self._train = session.train
        return session

    # What a subclass may override

    def run_trial(self, trial: Any, *fit_args: Any, **fit_kwargs: Any) -> list[Any]:
        """Trains a trial in a process of its own, within the budget.

        A subclass may override it, ask `trial.hyperparameters` for more, and call this with other arguments of `fit`;
        it runs in the process of the search.

        Returns:
            A `keras.callbacks.History` of each execution, with its curves.
        """
        own = self._own_run_trial
        if own is None:
            raise SearchError(
                "Received run_trial outside of a search.",
                "run_trial overridden in a subclass, and called by search().",
                "train the best with get_best_config().build(build_model) and model.fit.",
            )
        return own.train(trial, fit_args, fit_kwargs)

    def on_trial_end(self, trial: Any) -> None:
        """Called when a trial has ended; the oracle knows it by then."""

    def _has_own(self, *methods: str) -> bool:
        return any(is_overridden(method, type(self)) for method in methods)

    def _hooks(self) -> Hooks:
        if self._has_own("run_trial"):
            self._own_run_trial = OwnRunTrial(
                self.run_trial,
                self._train_otherwise,
                self._fit_arguments or ((), {}),
                self.oracle.objective,
                lambda trial_id: self._files.trial(trial_id).path,
            )
        return Hooks(
            self.pre_create_trial,
            self.on_trial_begin,
            self.on_trial_end,
            self._own_run_trial,
            self.save if self._has_own("save", "get_state") else lambda: None,
        )

    def _train_otherwise(self, trial: Any, overrides: Mapping[str, Any], other: FitArguments | None) -> TrialResult:
        if other is None:
            return self._train(trial, overrides, None)
        # Beside the search's own: they share what arrays they have in common.
        payload_file = self._files.payload_file.with_name(f"trial_{trial.trial_id}.pkl")
        dump_payload({**self._payload(), "fit_args": other[0], "fit_kwargs": other[1]}, payload_file)
        return self._train(trial, overrides, payload_file)

    def _take_up_search(self) -> list[str]:
        """Goes on with an earlier session's search, where there is one and it is the same.

        Returns:
            What the user is told of it.

        Raises:
            SearchDirectoryError: what decides its trials' results has changed.
        """
        try:
            notes: list[str] = []
            self._take_up()
            self._try_with_data()
            record = self.record()
            before = identities.known_identity(record)
            trained = identities.trained_trials(record)
            self._identity = self._identified(before)
            if not record.search_id:
                return []
            changed = identities.differences(before, self._identity) if trained else []
            identities.refuse_changes(self._files.path, changed, len(trained))  # before processes start
            self._renew_space(len(trained))
            if trained:
                known = [trial for trial in record.trials if trial.trial_id in self.oracle.trials]
                changed = identities.changed_model(
                    known, record.objective_direction, self._space_of, self._processes.profiler().inspect_anew,
                    notes.extend,
                )  # fmt: skip
                identities.refuse_changes(self._files.path, changed, len(trained))
            if _is_larger(self.memory_budget_bytes, record.memory_budget_bytes):
                oracles.allow_again(self.oracle, [trial.trial_id for trial in record.with_status("infeasible")])
            return [*dict.fromkeys([*notes, *identities.changed_notes(before, self._identity)])] if trained else []
        except BaseException:
            self._processes.close()
            raise

    def _identified(self, before: Mapping[str, str]) -> dict[str, str]:
        """What decides this session's results; data that a function draws anew each time are not compared."""
        fit_args, fit_kwargs = self._fit_arguments or ((), {})
        own = identities.session_identity(self._decisive(), fit_args, fit_kwargs, self.hypermodel.hypermodel)
        if not identities.has_data_functions(fit_args, fit_kwargs):
            return own
        profiler, is_ordered = self._processes.profiler(), bool(fit_kwargs.get("validation_split"))
        try:
            described = profiler.describe_data(1, is_ordered)
            if any(before.get(name, text) != text for name, text in described.items()):
                again = profiler.describe_data(2, is_ordered)
                described = {name: before.get(name, text) if again.get(name) != text else text
                             for name, text in described.items()}  # fmt: skip
        except AccumtuneError:  # the trials say it better
            return own
        return {**own, **described}

    def _decisive(self) -> dict[str, Any]:
        """The tuner's settings that decide what a trial comes to."""
        objective = self.oracle.objective
        return {
            "objective": f"{objective.name} ({objective.direction})",
            "executions_per_trial": self.executions_per_trial,
            "learning_rate_scaling": self.learning_rate_scaling,
            "base_effective_batch_size": self.base_effective_batch_size if self.learning_rate_scaling else None,
            "ghost_batch_size": getattr(self, "ghost_batch_size", None),
            "seed": self.oracle.seed if self._asked_seed is None else self._asked_seed,
            "search_over": self.search_over if self._asked_search_over == "auto" else self._asked_search_over,
            "backend": self._backend,
            "tuner": type(self).__name__,
            "versions": ", ".join(f"{name} {version}" for name, version in installed_versions().items()),
            **{f"tuner's {name}": value for name, value in self._compiled_with.items()},
            **self._asked_rounds,
        }

    def _take_up(self) -> None:
        """Reads the state anew, where another process has searched since; `Tuner` knows how."""

    def _renew_space(self, trained: int) -> None:
        """Searches the hyperparameters as they are declared now; `Tuner` knows how."""

    def _payload(self) -> dict[str, Any]:
        """What the processes of trials and probes get."""
        fit_args, fit_kwargs = self._fit_arguments or ((), {})
        return {
            "hypermodel": self.hypermodel,
            "objective": self.oracle.objective,
            "fit_args": tuple(fit_args),
            "fit_kwargs": fit_kwargs,
            "is_scored_later": self._has_own("run_trial"),
            "max_model_size": self.max_model_size,
        }

    def _pruning(self) -> Pruning | None:
        """What stops hopeless trials; `OptunaSearch` has it."""
        return None

    def _advice(self) -> list[str]:
        fit_args, fit_kwargs = self._fit_arguments or ((), {})
        return advice(
            hyperparameters=[hp.name for hp in self.oracle.hyperparameters.space],
            effective_batch_sizes=self.effective_batch_sizes,
            learning_rate_scaling=self.learning_rate_scaling,
            batch_coupled_layers=self.batch_coupled_layers,
            whole_batch_loss=self.whole_batch_loss,
            searches_pairs=self.search_over == "pairs",
            samples=results.count_samples(fit_args, fit_kwargs),
        )

    def _space_of(self, trial_id: str) -> dict[str, Any]:
        return dict(self.oracle.get_trial(trial_id).hyperparameters.get_config())

    def _description(self) -> dict[str, Any]:
        objective = self.oracle.objective
        fit_args, fit_kwargs = self._fit_arguments or ((), {})
        fit = carried.describe_fit(fit_kwargs, self.hypermodel.hypermodel, self._compiled_with)
        if self._has_own("run_trial"):
            fit["not_carried"].append(f"{type(self).__name__}.run_trial, which may give fit other arguments")
        return {
            "name": self.project_name,
            "objective": {"name": objective.name, "direction": objective.direction},
            "memory_budget_bytes": self.memory_budget_bytes,
            "micro_batch_sizes": self.micro_batch_sizes,
            "accumulation_steps": self.accumulation_steps,
            "search_over": self.search_over,
            "batch_coupled_layers": self.batch_coupled_layers,
            "whole_batch_loss": self.whole_batch_loss,
            "learning_rate_scaling": self.learning_rate_scaling,
            "base_effective_batch_size": self.base_effective_batch_size,
            "tuner": type(self).__name__,
            "max_trials": oracles.asked_trials(self.oracle),
            "backend": self._backend,
            "versions": installed_versions(),
            "identity": self._identity,
            "fit": fit,
            "data": {"name": self.project_name, **results.describe_data(fit_args, fit_kwargs)},
        }

    def _save_model(self, display: Display, best: Best | None) -> None:
        if best is None or not self.register_as or self.tracking_uri is False:
            return
        trial_id = best[0].candidate.trial_id
        try:
            save_model_for_registry(
                self._files, self._processes.executor(), self._payload(), trial_id, self.register_as
            )
        except AccumtuneError as error:  # what the search has found does not depend on it
            display.line(f"The best model is not registered as {self.register_as!r}: {error}")

    def _trial_run(self) -> Callable[[Candidate], bool] | None:
        return None if self._fit_arguments is None else self._runs

    def _runs(self, candidate: Candidate) -> bool:
        signature = next(it.signature for it in self.record().trials if it.trial_id == candidate.trial_id) or ""
        return self._processes.runs(candidate, self._space_of(candidate.trial_id), signature, self._payload())


def _is_larger(budget_bytes: int | None, before_bytes: int | None) -> bool:
    return before_bytes is not None and (budget_bytes is None or budget_bytes > before_bytes)
