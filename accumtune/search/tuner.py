"""A Keras Tuner tuner under a memory budget, with any oracle: the space, the search, and what it found."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import keras_tuner

from accumtune.config import TrainingConfig
from accumtune.config.production import installed_versions
from accumtune.errors import AccumtuneError
from accumtune.memory.budget import format_bytes, parse_budget
from accumtune.memory.device import memory_limit_environment
from accumtune.search import carried, results, state
from accumtune.search.advice import advice
from accumtune.search.checks import check_choice, refuse_batch_size, refuse_missing_validation
from accumtune.search.chronicle import Best, Chronicle
from accumtune.search.display import Display
from accumtune.search.edited import edited_model_warning
from accumtune.search.feasibility import effective_batch_sizes
from accumtune.search.hypermodel import (
    DEFAULT_ACCUMULATION_STEPS,
    DEFAULT_MICRO_BATCH_SIZES,
    AccumulationHyperModel,
)
from accumtune.search.processes import SearchProcesses
from accumtune.search.pruning import Pruning
from accumtune.search.registering import save_model_for_registry
from accumtune.search.runner import SearchSettings, TrialRunner
from accumtune.search.selection import Candidate, Policy
from accumtune.search.session import SearchSession, StoppedAtOnce
from accumtune.search.workers import command_to_resume, plan, refuse_chief_and_workers, resolve_pool
from accumtune.tracking.lock import only_search, refuse_held
from accumtune.tracking.records import SearchRecord
from accumtune.trials.builder import ModelBuilder
from accumtune.trials.devices import Places
from accumtune.trials.directory import SearchDirectory, check_writable, clear_disk_errors
from accumtune.trials.profiling import Profiler, check_sizes, current_backend

SearchOver = Literal["auto", "effective_batch_size", "pairs"]


class Tuner(keras_tuner.Tuner):
    """A search for effective batch and hyperparameters under a memory budget, with any Keras Tuner oracle.

    The oracle searches the effective batch (every product of the two lists) beside the user's own hyperparameters;
    the pair that realises it is the fastest whose micro-batch fits the budget. Each trial trains in a process of
    its own whose allocator is limited to the budget.

    Args:
        oracle: a `keras_tuner.Oracle`.
        hypermodel: a Keras Tuner build function or `keras_tuner.HyperModel`.
        memory_budget: what a trial's peak memory must not exceed: `"2GiB"` or bytes; None for no limit.
        micro_batch_sizes: samples in one forward and backward pass.
        accumulation_steps: micro-batches per update. More are used where memory demands it.
        search_over: `"effective_batch_size"`, `"pairs"` (the micro-batch size too), or `"auto"`: pairs where the
            model has layers whose result depends on which samples share a micro-batch.
        learning_rate_scaling: None, `"linear"` or `"sqrt"`: how the learning rate grows with the effective batch.
        base_effective_batch_size: the effective batch for which the learning rate is meant as it is written; default
            the smallest.
        trial_timeout_seconds: a trial that takes longer is stopped and counts as failed.
        workers: trials at once.
        devices: what they run on, on this machine. `"auto"`: each worker gets a GPU of its own; more workers than
            GPUs share them, if the device holds `memory_budget` for each; without GPUs workers divide the cores.
            `"cpu"`, or a list of GPUs such as `[0, 1]`.
        executor: where trials run: None for this machine, `"ray"` or the address of a Ray cluster, or any object
            with `submit(function, *arguments) -> Future`, such as Dask's `client.get_executor()`.
        tracking_uri: MLflow's; None for `sqlite:///mlruns/mlflow.db`, False for no tracking.
        register_as: a name in MLflow's model registry for the best model, under the alias `best`.
        directory, project_name: where the search keeps its state; the same script run again goes on.
        overwrite: begin anew.
        executions_per_trial: trainings per trial, whose objectives are averaged.
        optimizer, loss, metrics: override what the build function compiles with.
        **kwargs: other arguments of `keras_tuner.Tuner`.

    Raises:
        BudgetError: the budget cannot be read.
        BatchSizeError: sizes below 1, or an unknown `search_over`.
        BuildError: the build function raised or returned something else than a compiled model.
        SearchDirectoryError: the directory holds a search that cannot be read.
    """

    def __init__(
        self,
        oracle: Any,
        hypermodel: Any = None,
        *,
        memory_budget: int | float | str | None = None,
        micro_batch_sizes: Sequence[int] = DEFAULT_MICRO_BATCH_SIZES,
        accumulation_steps: Sequence[int] = DEFAULT_ACCUMULATION_STEPS,
        search_over: SearchOver = "auto",
        learning_rate_scaling: str | None = None,
        base_effective_batch_size: int | None = None,
        trial_timeout_seconds: float | None = None,
        workers: int = 1,
        devices: str | Sequence[str | int] = "auto",
        executor: Any = None,
        tracking_uri: str | None | Literal[False] = None,
        register_as: str | None = None,
        directory: str | os.PathLike[str] = "mlruns/searches",
        project_name: str = "untitled_search",
        overwrite: bool = False,
        executions_per_trial: int = 1,
        optimizer: Any = None,
        loss: Any = None,
        metrics: Any = None,
        **kwargs: Any,
    ) -> None:
        check_choice("search_over", search_over, ("auto", "effective_batch_size", "pairs"))
        check_choice("learning_rate_scaling", learning_rate_scaling, (None, "linear", "sqrt"))
        self.memory_budget_bytes = None if memory_budget is None else parse_budget(memory_budget)
        self.micro_batch_sizes = check_sizes("micro_batch_sizes", micro_batch_sizes)
        self.accumulation_steps = check_sizes("accumulation_steps", accumulation_steps)
        self.effective_batch_sizes = effective_batch_sizes(self.micro_batch_sizes, self.accumulation_steps)
        self.learning_rate_scaling = learning_rate_scaling
        base = [self.effective_batch_sizes[0] if base_effective_batch_size is None else base_effective_batch_size]
        (self.base_effective_batch_size,) = check_sizes("base_effective_batch_size", base)
        self.trial_timeout_seconds = trial_timeout_seconds
        (self.workers,) = check_sizes("workers", [workers])
        refuse_chief_and_workers()
        pool = resolve_pool(executor)
        self._backend = current_backend()
        self._places = plan(self.workers, devices, pool, self.memory_budget_bytes)
        self.tracking_uri = tracking_uri
        self.register_as = register_as
        self.batch_coupled_layers: list[str] = []
        self.search_over = search_over
        self._compiled_with = {"optimizer": optimizer, "loss": loss, "metrics": metrics}
        memory_limit_environment(self._backend, self.memory_budget_bytes)  # refuses what no allocator can keep to
        self._fit_arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        folder = Path(directory) / project_name
        self._files = SearchDirectory(folder)
        self._processes = SearchProcesses(
            self._files,
            pool,
            self._backend,
            memory_budget_bytes=self.memory_budget_bytes,
            micro_batch_sizes=self.micro_batch_sizes,
        )
        self._chronicle = Chronicle(self._files, oracle.objective, tracking_uri)
        self._mended: list[str] = []
        if overwrite:
            refuse_held(folder)
        else:
            self._mended = state.repair_state_files(folder)
        builder = ModelBuilder(
            hypermodel,
            optimizer=optimizer,
            loss=loss,
            metrics=metrics,
            learning_rate_scaling=learning_rate_scaling,
            base_effective_batch_size=self.base_effective_batch_size,
        )
        model = AccumulationHyperModel(
            hypermodel,
            memory_budget=self.memory_budget_bytes,
            micro_batch_sizes=self.micro_batch_sizes,
            accumulation_steps=self.accumulation_steps,
            builder=builder,
        )
        check_writable(folder)
        try:
            super().__init__(
                state.with_whole_state(oracle),
                model,
                directory=str(directory),
                project_name=project_name,
                overwrite=overwrite,
                executions_per_trial=executions_per_trial,
                **kwargs,
            )
        except BaseException:
            self._processes.close()
            raise

    # The space, discovered in a child

    def _populate_initial_space(self) -> None:
        discovered = self._processes.discover(self.hypermodel, self.oracle.hyperparameters.copy())
        self.batch_coupled_layers = discovered["batch_coupled_layers"]
        if self.search_over == "auto":
            self.search_over = "pairs" if self.batch_coupled_layers else "effective_batch_size"
        found = keras_tuner.HyperParameters.from_config(discovered["hyperparameters"])
        self._declare_batch_hyperparameters()
        self.oracle.update_space(found)

    def _declare_batch_hyperparameters(self) -> None:
        """Ordered choices: Bayesian optimisation sees their rank, which for powers of two is the logarithm."""
        space = self.oracle.hyperparameters
        space.Choice("effective_batch_size", list(self.effective_batch_sizes), ordered=True)
        if self.search_over == "pairs":
            space.Choice("micro_batch_size", list(self.micro_batch_sizes), ordered=True)

    # Searching

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
        refuse_missing_validation(self.oracle.objective.name, self.hypermodel.hypermodel, fit_kwargs)
        verbose = fit_kwargs.pop("verbose", 1)
        self.oracle.verbose = 0  # accumtune prints its own lines
        objective = self.oracle.objective
        display = Display(
            objective.name, self.oracle.max_trials, 1 if verbose == "auto" else int(verbose),
            direction=objective.direction, workers=self.workers,
        )  # fmt: skip
        self._fit_arguments = (fit_args, fit_kwargs)
        folder = self._files.path
        with clear_disk_errors(folder), only_search(folder), self._processes.sharing(self._payload()):
            self.save()  # Keras Tuner itself saves after the first trial: too late for a kill during that one
            is_first = self._begin(display)
            status, reason, best, is_hurried = "failed", "", None, False
            try:
                with display:
                    profiler = self._processes.profiler(display.probe)
                    if not is_first:
                        self._warn_of_an_edited_model(display, profiler)
                    self._session(display, profiler).run()
                best = self._chronicle.try_best(self._runs)
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
                self._end(display, status, reason, best, is_hurried)

    def _session(self, display: Display, profiler: Profiler) -> SearchSession:
        settings = SearchSettings(
            memory_budget_bytes=self.memory_budget_bytes,
            micro_batch_sizes=self.micro_batch_sizes,
            searches_pairs=self.search_over == "pairs",
            is_batch_coupled=bool(self.batch_coupled_layers),
            executions_per_trial=self.executions_per_trial,
            seed=self.oracle.seed,
            objective_name=self.oracle.objective.name,
            trial_timeout_seconds=self.trial_timeout_seconds,
        )
        runner = TrialRunner(
            settings, self._files, self._processes.executor(), profiler, display.trial_started,
            places=Places(self._places), pruning=self._pruning(),
        )  # fmt: skip
        return SearchSession(
            self.oracle,
            runner,
            self._files,
            display,
            workers=self.workers,
            memory_budget_bytes=self.memory_budget_bytes,
        )

    def _payload(self) -> dict[str, Any]:
        """What the processes of trials and probes get."""
        fit_args, fit_kwargs = self._fit_arguments or ((), {})
        return {
            "hypermodel": self.hypermodel,
            "objective": self.oracle.objective,
            "fit_args": tuple(fit_args),
            "fit_kwargs": fit_kwargs,
        }

    def _pruning(self) -> Pruning | None:
        """What stops hopeless trials; `OptunaSearch` has it."""
        return None

    def _begin(self, display: Display) -> bool:
        """Writes down and tells what begins; whether it is the search's first session."""
        is_first = self._chronicle.begin(self._description)
        for text in self._mended:
            display.line(text)
        budget = "no memory budget" if self.memory_budget_bytes is None else format_bytes(self.memory_budget_bytes)
        display.line(
            f'Search "{self.project_name}": {type(self).__name__}, {budget}, effective batches '
            f"{', '.join(map(str, self.effective_batch_sizes))}"
        )
        if self.workers > 1:
            places = ", ".join(dict.fromkeys(place.description for place in self._places if place.description))
            display.line(f"{self.workers} trials at once" + (f": {places}" if places else ""))
        texts = advice(
            hyperparameters=[hp.name for hp in self.oracle.hyperparameters.space],
            effective_batch_sizes=self.effective_batch_sizes,
            learning_rate_scaling=self.learning_rate_scaling,
            batch_coupled_layers=self.batch_coupled_layers,
            searches_pairs=self.search_over == "pairs",
        )
        self._chronicle.advise(texts, display.line)
        self._chronicle.start_tracking()
        return is_first

    def _warn_of_an_edited_model(self, display: Display, profiler: Profiler) -> None:
        if not self._processes.is_local:  # another machine has another device
            return
        # After a kill the journals may know a trial that the oracle does not.
        known = [trial for trial in self.record().trials if trial.trial_id in self.oracle.trials]
        text = edited_model_warning(known, self._space_of, profiler.inspect)
        self._chronicle.advise([] if text is None else [text], display.line)

    def _space_of(self, trial_id: str) -> dict[str, Any]:
        return dict(self.oracle.get_trial(trial_id).hyperparameters.get_config())

    def _description(self) -> dict[str, Any]:
        objective = self.oracle.objective
        fit_args, fit_kwargs = self._fit_arguments or ((), {})
        return {
            "name": self.project_name,
            "objective": {"name": objective.name, "direction": objective.direction},
            "memory_budget_bytes": self.memory_budget_bytes,
            "micro_batch_sizes": self.micro_batch_sizes,
            "accumulation_steps": self.accumulation_steps,
            "search_over": self.search_over,
            "batch_coupled_layers": self.batch_coupled_layers,
            "learning_rate_scaling": self.learning_rate_scaling,
            "base_effective_batch_size": self.base_effective_batch_size,
            "tuner": type(self).__name__,
            "max_trials": self.oracle.max_trials,
            "backend": self._backend,
            "versions": installed_versions(),
            "fit": carried.describe_fit(fit_kwargs, self.hypermodel.hypermodel, self._compiled_with),
            "data": {"name": self.project_name, **results.describe_data(fit_args, fit_kwargs)},
        }

    def _end(self, display: Display, status: str, reason: str, best: Best | None, is_hurried: bool) -> None:
        try:
            self._chronicle.end(status, reason)
            self.save()
            if is_hurried:
                self._chronicle.tracker = None  # what MLflow lacks comes with the next session, or `accumtune sync`
                return
            self._chronicle.write_report(best)
        finally:
            message = self._chronicle.stop_tracking()
            if message:
                display.line(message)
        if self.ui_address:
            command = f"\n  once this runs: {self.ui_command}" if self.ui_command else ""
            display.line(f"Browse it: {self.ui_address}{command}")

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

    # Keras Tuner's state

    def save(self) -> None:
        """As Keras Tuner saves, but whole."""
        self.oracle.save()
        state.save_tuner(Path(self._get_tuner_fname()), self.get_state())

    def get_state(self) -> dict[str, Any]:
        return {"search_over": self.search_over, "batch_coupled_layers": self.batch_coupled_layers}

    def set_state(self, saved: dict[str, Any]) -> None:
        self.search_over = saved.get("search_over", self.search_over)
        self.batch_coupled_layers = saved.get("batch_coupled_layers", [])

    # Results

    def record(self) -> SearchRecord:
        """The search as its journals tell it, trials included."""
        return self._chronicle.record()

    def candidates(self) -> list[Candidate]:
        """Every trained configuration within the budget, and the other micro-batches of its effective batch.

        Those are marked `is_trained=False`: same training, with predicted memory and speed.
        """
        return self._chronicle.candidates()

    def pareto_front(self) -> list[Candidate]:
        """The candidates that no other beats in objective, peak memory and throughput, best objective first."""
        return self._chronicle.pareto_front()

    def get_best_config(self, policy: Policy = "quality", tolerance: float = 0.01) -> TrainingConfig:
        """The configuration to train with.

        One that was not trained in its own micro-batch is run for a few updates under the budget first, once; where it
        does not hold, the next best is taken. That needs the data of a `search()` in this process.

        Args:
            policy: `"quality"` (best objective within the tolerance, then fastest, then smallest), `"memory"`,
                `"throughput"`, `"balanced"`, or a function from candidates to one of them.
            tolerance: differences of the objective below this share are taken for noise.

        Returns:
            A `TrainingConfig`; its `reason` says in one sentence why it won.

        Raises:
            NoResultError: no trial has completed within the budget.
        """
        runs = None if self._fit_arguments is None else self._runs
        return self._chronicle.config(self._chronicle.choose(policy, tolerance, runs))

    def _runs(self, candidate: Candidate) -> bool:
        signature = next(it.signature for it in self.record().trials if it.trial_id == candidate.trial_id) or ""
        return self._processes.runs(candidate, self._space_of(candidate.trial_id), signature, self._payload())

    def results_summary(self, num_trials: int = 10) -> None:
        """Prints the candidates, best first; the Pareto front is marked."""
        print(self._chronicle.summary(num_trials))

    def get_best_hyperparameters(self, num_trials: int = 1) -> list[Any]:
        """Keras Tuner's, without its padding by failed trials."""
        return [trial.hyperparameters for trial in self._best_trials(num_trials)]

    def get_best_models(self, num_models: int = 1) -> list[Any]:
        """Models with the weights of their best epoch, accumulating as they were trained."""
        return [self.load_model(trial) for trial in self._best_trials(num_models)]

    def _best_trials(self, count: int) -> list[Any]:
        completed = [t for t in self.oracle.trials.values() if t.status == "COMPLETED"]
        reused = {trial.trial_id for trial in self.record().with_status("reused")}
        trained = [trial for trial in completed if trial.trial_id not in reused]
        direction = self.oracle.objective.direction
        return sorted(trained, key=lambda trial: trial.score, reverse=direction == "max")[:count]

    @property
    def ui_command(self) -> str:
        """The command that opens this search in the MLflow UI."""
        return "" if self._chronicle.tracker is None else self._chronicle.tracker.ui_command()

    @property
    def ui_address(self) -> str:
        """Where the UI shows this search, once the command runs."""
        return "" if self._chronicle.tracker is None else self._chronicle.tracker.ui_address()
