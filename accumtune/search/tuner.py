"""A Keras Tuner tuner under a memory budget, with any oracle."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import keras_tuner

from accumtune.config import TrainingConfig
from accumtune.errors import SearchDirectoryError, SearchError
from accumtune.execution.device_query import current_backend
from accumtune.execution.platform_support import require_linux
from accumtune.execution.profiling import check_sizes
from accumtune.execution.timeouts import preparation_seconds
from accumtune.hypermodel import DEFAULT_ACCUMULATION_STEPS, DEFAULT_MICRO_BATCH_SIZES, AccumulationHyperModel
from accumtune.memory.budget import parse_budget
from accumtune.memory.device import memory_limit_environment
from accumtune.oracles import keras_tuner_adapter, persistent_oracle, state_files
from accumtune.search import ghost_batches, ownership
from accumtune.search.argument_checks import check_choice, check_search_arguments, check_tuner_arguments
from accumtune.search.feasibility import effective_batch_sizes
from accumtune.search.parallelism import places_for_workers, refuse_chief_and_workers, resolve_pool
from accumtune.search.processes import SearchProcesses
from accumtune.search.pruning.pruner import PruningMonitor
from accumtune.search.results.search_results import SearchResults
from accumtune.search.results.selection import Candidate, Policy
from accumtune.search.search_space import SearchOver, SearchSpace
from accumtune.search.session.reporter import Reporter
from accumtune.search.session.search_session import SearchParts, SearchSession
from accumtune.search.subclassing.overrides import is_overridden
from accumtune.tracking.lock import held, only_search
from accumtune.tracking.records import SearchRecord
from accumtune.worker.builder import ModelBuilder
from accumtune.worker.transport.task_directory import SearchDirectory, check_writable, clear_disk_errors
from accumtune.worker.trial_weights import build_as_trained, load_weights


class Tuner(keras_tuner.Tuner):
    """Searches for effective batch and hyperparameters under a memory budget, with any Keras Tuner oracle.

    The oracle searches the effective batch (every product of a micro-batch size and a number of accumulation steps)
    beside the user's own hyperparameters. A trial trains it with the fastest pair whose micro-batch fits the budget, in
    a process of its own whose allocator is limited to the budget.

    Args:
        oracle: a `keras_tuner.Oracle`.
        hypermodel: a Keras Tuner build function or `keras_tuner.HyperModel`.
        memory_budget: what a trial's peak memory must not exceed: `"2GiB"` or bytes; None for no limit.
        micro_batch_sizes: samples in one forward and backward pass.
        accumulation_steps: micro-batches per update. More are used where memory demands it.
        search_over: `"effective_batch_size"`, `"pairs"` (the micro-batch size too), or `"auto"`: pairs where the
            model has layers whose result depends on which samples share a micro-batch.
        ghost_batch_size: the samples that BatchNormalization normalizes together, the same number in all trials.
            Training is then the same in every micro-batch that is a multiple of it; other sizes are left out of
            `micro_batch_sizes`. A smaller effective batch is one group. `"auto"`: if nothing else couples samples, the
            largest, up to 32 and to the largest micro-batch, that fits and keeps all effective batches (where none of
            8 or more does, it keeps the most). None: each micro-batch is normalized by itself.
        whole_batch_loss: as in `accumtune.accumulate`. `"auto"` computes losses that couple samples over the whole
            effective batch, in two passes. False takes a mean of the losses of micro-batches, and searches their size.
        learning_rate_scaling: None, `"linear"` or `"sqrt"`: how the learning rate grows with the effective batch.
        base_effective_batch_size: the effective batch at which the learning rate is used as the build function sets
            it; default: the smallest.
        trial_timeout_seconds: a trial that trains longer is stopped and counts as failed. Building and probing its
            model have the same limit, but at least a minute. None: no limit on training, 30 minutes for the others.
        workers: trials at once.
        devices: where trials run on this machine. `"auto"`: each worker gets a GPU of its own; more workers than
            GPUs share them, if the device holds `memory_budget` for each; without GPUs workers divide the cores.
            `"cpu"`, or a list of GPUs such as `[0, 1]`.
        executor: where trials run: None for this machine, `"ray"` or the address of a Ray cluster, or any object
            with `submit(function, *arguments) -> Future`, such as Dask's `client.get_executor()`.
        tracking_uri: MLflow's tracking URI. None: `MLFLOW_TRACKING_URI`, else `sqlite:///mlruns/mlflow.db`. False: no
            tracking.
        register_as: a name in MLflow's model registry for the best model, under the alias `best`.
        directory, project_name: where the search keeps its state; the same script, run again, resumes it.
        overwrite: delete an earlier search in this directory and start over.
        executions_per_trial: how often each trial trains; its objective is the mean.
        optimizer, loss, metrics: override what the build function compiles with.
        **kwargs: other arguments of `keras_tuner.Tuner`; a model with more parameters than `max_model_size` is
            infeasible.

    A subclass may override `run_trial` (called in this process, around `super().run_trial`, which trains in a process
    of its own), `on_trial_begin`, `on_trial_end`, `on_search_begin`, `on_search_end`, `load_model`, `get_state`,
    `set_state` and the methods that return results. Other overridden methods are refused, because nothing would call
    them.

    Raises:
        BudgetError: the budget cannot be read.
        BatchSizeError: a size below 1, an unknown `search_over`, or a ghost batch that divides no micro-batch size.
        SearchError: an argument that no tuner takes, or a subclass with methods that nothing would call.
        BuildError: the build function raised or returned something other than a compiled model.
        SearchDirectoryError: the directory holds a search that cannot be read.
    """

    oracle: Any
    _asked_seed: int | None = None
    # The last call of `search`.
    _session: SearchSession | None = None

    def __init__(
        self,
        oracle: Any,
        hypermodel: Any = None,
        *,
        memory_budget: int | float | str | None = None,
        micro_batch_sizes: Sequence[int] = DEFAULT_MICRO_BATCH_SIZES,
        accumulation_steps: Sequence[int] = DEFAULT_ACCUMULATION_STEPS,
        search_over: SearchOver = "auto",
        ghost_batch_size: int | Literal["auto"] | None = "auto",
        whole_batch_loss: bool | Literal["auto"] = "auto",
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
        require_linux("A search")
        check_tuner_arguments(kwargs, Tuner.__init__, type(self), oracle, hypermodel)
        check_choice("search_over", search_over, ("auto", "effective_batch_size", "pairs"))
        check_choice("whole_batch_loss", whole_batch_loss, ("auto", True, False))
        check_choice("learning_rate_scaling", learning_rate_scaling, (None, "linear", "sqrt"))
        self.memory_budget_bytes = None if memory_budget is None else parse_budget(memory_budget)
        listed = check_sizes("micro_batch_sizes", micro_batch_sizes)
        self.accumulation_steps = check_sizes("accumulation_steps", accumulation_steps)
        asked_ghost_batch_size = ghost_batches.check(ghost_batch_size, listed)
        self.learning_rate_scaling = learning_rate_scaling
        if base_effective_batch_size is None:
            base_effective_batch_size = effective_batch_sizes(listed, self.accumulation_steps)[0]
        (self.base_effective_batch_size,) = check_sizes("base_effective_batch_size", [base_effective_batch_size])
        self.trial_timeout_seconds = trial_timeout_seconds
        self.tracking_uri = tracking_uri
        self.register_as = register_as
        (self.workers,) = check_sizes("workers", [workers])
        refuse_chief_and_workers()
        backend, pool = current_backend(), resolve_pool(executor)
        places = places_for_workers(self.workers, devices, pool, self.memory_budget_bytes)
        memory_limit_environment(backend, self.memory_budget_bytes)  # refuses a budget that no allocator can enforce
        ownership.check_project_name(project_name)
        self._files = SearchDirectory(Path(directory) / project_name)
        self._processes = SearchProcesses(
            self._files,
            pool,
            backend,
            memory_budget_bytes=self.memory_budget_bytes,
            micro_batch_sizes=listed,
            timeout_seconds=preparation_seconds(trial_timeout_seconds),
        )
        compiled_with = {"optimizer": optimizer, "loss": loss, "metrics": metrics}
        model = AccumulationHyperModel(
            hypermodel,
            memory_budget=self.memory_budget_bytes,
            micro_batch_sizes=listed,
            accumulation_steps=self.accumulation_steps,
            builder=ModelBuilder(
                hypermodel,
                learning_rate_scaling=learning_rate_scaling,
                base_effective_batch_size=self.base_effective_batch_size,
                whole_batch_loss=whole_batch_loss,
                **compiled_with,
            ),
        )
        self._space = SearchSpace(
            oracle, model, self._processes, search_over, listed, self.accumulation_steps, asked_ghost_batch_size,
            self.memory_budget_bytes, whole_batch_loss,
        )  # fmt: skip
        self._results = SearchResults(self._files, oracle.objective)
        self._reporter = Reporter(self._files, self._results, tracking_uri)
        # This session's settings: with the saved state, Keras Tuner reads those of the session before.
        self._sampler_settings = keras_tuner_adapter.sampler_settings(oracle)
        asked = {name: vars(oracle)[name] for name in ("max_epochs", "factor") if name in vars(oracle)}
        if self._asked_seed is not None:
            asked["seed"] = self._asked_seed
        if search_over != "auto":
            asked["search_over"] = search_over
        self._parts = SearchParts(
            self._files, self._processes, self._space, self._results, self._reporter, places, compiled_with, asked
        )
        check_writable(self._files.path)
        ownership.claim(self._files.path)
        try:
            with held(self._files.path) as is_held:
                self._repairs = ownership.prepare(self._files.path, is_held=is_held, overwrite=overwrite)
                super().__init__(
                    persistent_oracle.make_persistent(oracle, is_looking=not is_held),
                    model,
                    directory=directory,
                    project_name=project_name,
                    overwrite=False,  # Keras Tuner would delete all that is in the folder
                    executions_per_trial=executions_per_trial,
                    **kwargs,
                )
                # Not through Keras Tuner's constructor, which would compile the hypermodel's models again with them.
                self.optimizer, self.loss, self.metrics = optimizer, loss, metrics
                # The journal's size when the state was last read or written.
                self._position = self._reporter.position()
        except BaseException:
            self._processes.close()
            raise

    @property
    def search_over(self) -> SearchOver:
        """What the oracle proposes: `"effective_batch_size"` or `"pairs"`; `"auto"` until a model was inspected."""
        return self._space.search_over

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """The sizes that are searched; with a ghost batch, only multiples of it."""
        return self._space.micro_batch_sizes

    @property
    def effective_batch_sizes(self) -> tuple[int, ...]:
        """The products of `micro_batch_sizes` and `accumulation_steps`."""
        return self._space.effective_batch_sizes

    @property
    def ghost_batch_size(self) -> int | None:
        """The samples that BatchNormalization normalizes together, in all trials; None: each micro-batch by itself."""
        return self._space.ghost_batch_size

    @property
    def batch_coupled_layers(self) -> list[str]:
        """What keeps accumulation from being exact in the models of this search; [] is good."""
        return self._space.batch_coupled_layers

    @property
    def whole_batch_loss(self) -> bool | None:
        """Whether the loss is computed over the whole effective batch, in two passes; None: it is a mean of samples."""
        return self._space.whole_batch_loss

    def search(self, *fit_args: Any, **fit_kwargs: Any) -> None:
        """Runs trials until `max_trials` have trained, each in a process of its own.

        After an interruption, the same script run again resumes the search: completed trials are kept.

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
        own_run_trial = is_overridden("run_trial", type(self))
        check_search_arguments(fit_args, fit_kwargs, self.hypermodel.hypermodel, self.oracle.objective, own_run_trial)
        self.oracle.verbose = 0  # accumtune prints its own lines
        session = self._session = SearchSession(self, self._parts, fit_args, fit_kwargs)
        folder = self._files.path
        with clear_disk_errors(folder), only_search(folder), self._processes.sharing(session.payload()):
            try:
                self._read_newer_state()
                notes = session.resume()
            except BaseException:
                self._processes.close()
                raise
            self.save()  # Keras Tuner itself saves after the first trial: too late for a kill during that one
            try:
                session.run(self._repairs, notes)
            finally:
                self._position = self._reporter.position()

    def _pruning(self) -> PruningMonitor | None:
        """Returns what prunes trials; only `OptunaSearch` has it."""
        return None

    # What a subclass may override

    def run_trial(self, trial: Any, *fit_args: Any, **fit_kwargs: Any) -> list[Any]:
        """Trains a trial in a process of its own, within the budget.

        A subclass may override it, declare more hyperparameters on `trial.hyperparameters`, and call this method with
        other arguments of `fit`. The override itself runs in the search's process.

        Returns:
            A `keras.callbacks.History` of each execution, with its curves.
        """
        own = None if self._session is None else self._session.own_run_trial
        if own is None:
            raise SearchError(
                "Received run_trial outside of a search.",
                "a call by search(), in a subclass that overrides run_trial.",
                "to train the best configuration: get_best_config().build(build_model), then model.fit.",
            )
        return own.train(trial, fit_args, fit_kwargs)

    def on_trial_end(self, trial: Any) -> None:
        """Called when a trial has ended, after the oracle has its result."""

    # The state of an earlier session, and this one's

    def _read_newer_state(self) -> None:
        """Reads the state again if another process has searched since this tuner read it."""
        if self._reporter.position() == self._position and not persistent_oracle.is_looking(self.oracle):
            return
        self._repairs = state_files.repair_state_files(self._files.path)
        persistent_oracle.read_anew(self.oracle)
        self.reload()

    def reload(self) -> None:
        """Reads Keras Tuner's state.

        Raises:
            SearchDirectoryError: another kind of tuner has searched here.
        """
        try:
            super().reload()
        except RuntimeError as error:
            other = self.record().tuner or "another tuner"
            raise SearchDirectoryError(
                f"Received {type(self).__name__} for the search in {self._files.path}, which {other} has started.",
                "a tuner that can resume it.",
                f"resume it with {other}, give another project_name, or overwrite=True to start over.",
            ) from error
        vars(self.oracle).update(self._sampler_settings)
        # A subclass's set_state need not call this one.
        Tuner.set_state(self, json.loads(Path(self._get_tuner_fname()).read_text()))

    def save(self) -> None:
        """Saves Keras Tuner's state atomically; accumtune's is saved even if a subclass's `get_state` leaves it out."""
        self.oracle.save()
        state_files.write_state(Path(self._get_tuner_fname()), {**Tuner.get_state(self), **self.get_state()})

    def get_state(self) -> dict[str, Any]:
        return self._space.get_state()

    def set_state(self, saved: dict[str, Any]) -> None:
        self._space.set_state(saved)

    def _populate_initial_space(self) -> None:
        self._space.discover()

    # Results: while the search runs, when it has ended, and on another day

    def record(self) -> SearchRecord:
        """Returns what the search's journals hold, trials included."""
        return self._results.record()

    def candidates(self) -> list[Candidate]:
        """Returns every trained configuration within the budget, and the other micro-batches of its effective batch.

        The latter are marked `is_trained=False`: their training is the same; memory and throughput are predicted.
        """
        return self._results.candidates()

    def pareto_front(self) -> list[Candidate]:
        """Returns the candidates that no other beats in objective, peak memory and throughput; best objective first."""
        return self._results.pareto_front()

    def get_best_config(self, policy: Policy = "quality", tolerance: float = 0.01) -> TrainingConfig:
        """Returns the configuration to train with.

        One that was not trained in its own micro-batch is run for a few updates under the budget first, once; where it
        does not hold, the next best is taken. That needs the data of a `search()` in this process.

        Args:
            policy: `"quality"` (best objective within the tolerance, then fastest, then smallest), `"memory"`,
                `"throughput"`, `"balanced"`, or a function from candidates to one of them.
            tolerance: relative difference of objectives that counts as noise.

        Returns:
            A `TrainingConfig`; its `reason` says in one sentence why it won.

        Raises:
            NoResultError: no trial has completed within the budget.
        """
        runs = None if self._session is None else self._session.runs
        return self._results.config(self._results.choose(policy, tolerance, runs))

    def results_summary(self, num_trials: int = 10) -> None:
        """Prints the candidates, best first; the Pareto front is marked."""
        print(self._results.summary(num_trials))

    def get_best_hyperparameters(self, num_trials: int = 1) -> list[Any]:
        """Returns the hyperparameters of the best trials; unlike Keras Tuner, never those of failed ones."""
        return [trial.hyperparameters for trial in self._best_trials(num_trials)]

    def get_best_models(self, num_models: int = 1) -> list[Any]:
        """Returns models with the weights of their best epoch and new optimizers, accumulating as they were trained."""
        return [self.load_model(trial) for trial in self._best_trials(num_models)]

    def load_model(self, trial: Any) -> Any:
        """Builds a trial's model with the weights of its best epoch.

        Raises:
            ValueError: the weights do not fit the model.
        """
        model = self.hypermodel.build(trial.hyperparameters)
        weights_file = Path(self._get_checkpoint_fname(trial.trial_id))
        build_as_trained(model, weights_file)
        load_weights(model, weights_file)
        return model

    def _best_trials(self, count: int) -> list[Any]:
        completed = [t for t in self.oracle.trials.values() if t.status == "COMPLETED"]
        reused = {trial.trial_id for trial in self.record().with_status("reused")}
        trained = [trial for trial in completed if trial.trial_id not in reused]
        direction = self.oracle.objective.direction
        return sorted(trained, key=lambda trial: trial.score, reverse=direction == "max")[:count]

    @property
    def ui_command(self) -> str:
        """The command that opens this search in the MLflow UI."""
        return self._reporter.ui_command

    @property
    def ui_address(self) -> str:
        """The search's address in the MLflow UI; where there is a `ui_command`, it answers once that runs."""
        return self._reporter.ui_address
