"""A Keras Tuner tuner under a memory budget, with any oracle: what a user asks for, its space and its state."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import keras_tuner

from accumtune.errors import SearchDirectoryError
from accumtune.execution.device_query import current_backend
from accumtune.execution.platform_support import require_linux
from accumtune.execution.profiling import check_sizes
from accumtune.execution.timeouts import preparation_seconds
from accumtune.hypermodel import (
    DEFAULT_ACCUMULATION_STEPS,
    DEFAULT_MICRO_BATCH_SIZES,
    AccumulationHyperModel,
)
from accumtune.memory.budget import parse_budget
from accumtune.memory.device import memory_limit_environment
from accumtune.oracles import keras_tuner_adapter as oracles
from accumtune.oracles import persistence as state
from accumtune.search import identity, ownership
from accumtune.search.checks import check_choice, refuse_no_oracle, refuse_strategy, refuse_unknown_arguments
from accumtune.search.chronicle import Chronicle
from accumtune.search.feasibility import effective_batch_sizes
from accumtune.search.processes import SearchProcesses
from accumtune.search.searching import Searching, SearchOver
from accumtune.search.subclassing.overrides import refuse_missing_hypermodel, refuse_overridden
from accumtune.search.workers import plan, refuse_chief_and_workers, resolve_pool
from accumtune.tracking.lock import held, running_already
from accumtune.worker.builder import ModelBuilder
from accumtune.worker.transport.hyperparameters import hyperparameters_from
from accumtune.worker.transport.task_directory import SearchDirectory, check_writable


class Tuner(Searching):
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
        trial_timeout_seconds: a trial that takes longer is stopped and counts as failed; so is building or probing
            its model, for which there is a minute at least. None: 30 minutes for those, any time for training.
        workers: trials at once.
        devices: what they run on, on this machine. `"auto"`: each worker gets a GPU of its own; more workers than
            GPUs share them, if the device holds `memory_budget` for each; without GPUs workers divide the cores.
            `"cpu"`, or a list of GPUs such as `[0, 1]`.
        executor: where trials run: None for this machine, `"ray"` or the address of a Ray cluster, or any object
            with `submit(function, *arguments) -> Future`, such as Dask's `client.get_executor()`.
        tracking_uri: MLflow's; None for `MLFLOW_TRACKING_URI`, else `sqlite:///mlruns/mlflow.db`; False for none.
        register_as: a name in MLflow's model registry for the best model, under the alias `best`.
        directory, project_name: where the search keeps its state; the same script run again goes on.
        overwrite: begin anew.
        executions_per_trial: trainings per trial, whose objectives are averaged.
        optimizer, loss, metrics: override what the build function compiles with.
        **kwargs: other arguments of `keras_tuner.Tuner`; a model with more parameters than `max_model_size` is
            infeasible.

    A subclass may override `run_trial` (called in this process, around `super().run_trial`, which trains in a process
    of its own), `on_trial_begin`, `on_trial_end`, `on_search_begin`, `on_search_end`, `load_model`, `get_state`,
    `set_state` and what answers; other methods of Keras Tuner's are refused, because nothing would call them.

    Raises:
        BudgetError: the budget cannot be read.
        BatchSizeError: sizes below 1, or an unknown `search_over`.
        SearchError: an argument that no tuner takes, or a subclass whose methods would be passed over.
        BuildError: the build function raised or returned something else than a compiled model.
        SearchDirectoryError: the directory holds a search that cannot be read.
    """

    _is_discovered = False

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
        require_linux("A search")
        refuse_unknown_arguments(kwargs, Tuner.__init__)
        refuse_strategy(kwargs.get("distribution_strategy"))
        refuse_no_oracle(oracle)
        refuse_missing_hypermodel(hypermodel)
        refuse_overridden(type(self), type(oracle))
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
        self.whole_batch_loss = False
        self._wants_data = False
        self.search_over = self._asked_search_over = search_over
        self._compiled_with = {"optimizer": optimizer, "loss": loss, "metrics": metrics}
        memory_limit_environment(self._backend, self.memory_budget_bytes)  # refuses what no allocator can keep to
        self._fit_arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        ownership.check_project_name(project_name)
        folder = Path(directory) / project_name
        self._files = SearchDirectory(folder)
        self._processes = SearchProcesses(
            self._files,
            pool,
            self._backend,
            memory_budget_bytes=self.memory_budget_bytes,
            micro_batch_sizes=self.micro_batch_sizes,
            timeout_seconds=preparation_seconds(trial_timeout_seconds),
        )
        self._chronicle = Chronicle(self._files, oracle.objective, tracking_uri)
        self._mended: list[str] = []
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
        # As they are asked for now: Keras Tuner reads those of the session before with its state.
        self._asked_rounds = {name: vars(oracle)[name] for name in ("max_epochs", "factor") if name in vars(oracle)}
        self._initial_space = oracle.hyperparameters.copy()
        self._sampler_settings = oracles.sampler_settings(oracle)
        check_writable(folder)
        ownership.claim(folder)
        try:
            with held(folder) as is_held:
                self._prepare_folder(is_held, overwrite)
                super().__init__(
                    state.with_whole_state(oracle, is_looking=not is_held),
                    model,
                    directory=directory,
                    project_name=project_name,
                    overwrite=False,  # Keras Tuner would delete all that is in the folder
                    executions_per_trial=executions_per_trial,
                    **kwargs,
                )
                # Not by Keras Tuner's constructor: it would compile with them again what the hypermodel has built.
                self.optimizer, self.loss, self.metrics = optimizer, loss, metrics
                self._seen = self._chronicle.position()
        except BaseException:
            self._processes.close()
            raise

    def _prepare_folder(self, is_held: bool, overwrite: bool) -> None:
        """Deletes or mends the state of an earlier search; one that runs is only looked at.

        Raises:
            SearchDirectoryError: a search runs there, and there is nothing to look at or it would be deleted.
        """
        folder = self._files.path
        if not is_held:
            if overwrite or not (folder / "tuner0.json").exists():
                raise running_already(folder)
        elif overwrite:
            ownership.clear(folder)
        else:
            self._mended = state.repair_state_files(folder)

    def _take_up(self) -> None:
        """Reads the state anew, where another process has searched since this tuner read it."""
        if self._chronicle.position() == self._seen and not state.is_looking(self.oracle):
            return
        self._mended = state.repair_state_files(self._files.path)
        state.read_anew(self.oracle)
        self.reload()

    def reload(self) -> None:
        """Keras Tuner's.

        Raises:
            SearchDirectoryError: another kind of tuner has searched here.
        """
        try:
            super().reload()
        except RuntimeError as error:
            other = self.record().tuner or "another tuner"
            raise SearchDirectoryError(
                f"Received {type(self).__name__} for the search in {self._files.path}, which {other} has begun.",
                "a tuner that can go on with its proposals.",
                f"go on with {other}, give another project_name, or overwrite=True to begin anew.",
            ) from error
        vars(self.oracle).update(self._sampler_settings)
        # A subclass's set_state need not call this one.
        Tuner.set_state(self, json.loads(Path(self._get_tuner_fname()).read_text()))

    # The space, discovered in a child

    def _renew_space(self, trained: int) -> None:
        if self._is_discovered:  # by this tuner: nothing can have changed
            return
        self._is_discovered = True
        before = self.oracle.hyperparameters.get_config()["space"]
        discovered = self._processes.discover(self.hypermodel, self._initial_space.copy())
        space = keras_tuner.HyperParameters()
        self._declare_batch_hyperparameters(space)
        now = [*space.get_config()["space"], *discovered["hyperparameters"]["space"]]
        identity.refuse_changes(self._files.path, identity.grown_space(before, now) if trained else [], trained)
        oracles.replace_space(self.oracle, identity.with_space(before, now) if trained else now)

    def _populate_initial_space(self) -> None:
        self._is_discovered = True
        discovered = self._processes.discover(self.hypermodel, self.oracle.get_space())
        self.batch_coupled_layers = discovered["batch_coupled_layers"]
        self.whole_batch_loss = discovered["whole_batch_loss"]
        self._wants_data = discovered["wants_data"]
        if self.search_over == "auto" and not self._wants_data:
            self._choose_what_to_search_over()
        found = hyperparameters_from(discovered["hyperparameters"])
        self._declare_batch_hyperparameters(self.oracle.hyperparameters)
        self.oracle.update_space(found)

    def _try_with_data(self) -> None:
        """What a model's own code does with the data decides what is searched over; kept by a search that goes on."""
        if self._wants_data and not self.oracle.trials:
            discovered = self._processes.discover(self.hypermodel, self.oracle.hyperparameters.copy())
            self.batch_coupled_layers = discovered["batch_coupled_layers"]
            self.whole_batch_loss = discovered["whole_batch_loss"]
            self._wants_data = False
        if self.search_over == "auto":
            self._choose_what_to_search_over()
            self._declare_batch_hyperparameters(self.oracle.hyperparameters)

    def _choose_what_to_search_over(self) -> None:
        self.search_over = "pairs" if self.batch_coupled_layers else "effective_batch_size"

    def _declare_batch_hyperparameters(self, space: Any) -> None:
        """Ordered choices: Bayesian optimisation sees their rank, which for powers of two is the logarithm."""
        space.Choice("effective_batch_size", list(self.effective_batch_sizes), ordered=True)
        if self.search_over == "pairs":
            space.Choice("micro_batch_size", list(self.micro_batch_sizes), ordered=True)

    # Keras Tuner's state

    def save(self) -> None:
        """As Keras Tuner saves, but whole; a subclass's `get_state` and `set_state` need not know of the search's."""
        self.oracle.save()
        state.save_tuner(Path(self._get_tuner_fname()), {**Tuner.get_state(self), **self.get_state()})

    def get_state(self) -> dict[str, Any]:
        names = ("search_over", "batch_coupled_layers", "whole_batch_loss")
        return {name: getattr(self, name) for name in names}

    def set_state(self, saved: dict[str, Any]) -> None:
        self.search_over = saved.get("search_over", self.search_over)
        self.batch_coupled_layers = saved.get("batch_coupled_layers", [])
        self.whole_batch_loss = saved.get("whole_batch_loss", False)
