"""Finds the hyperparameters that the build function declares, and declares those of the batch beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras_tuner

from accumtune.accumulation.batch_pair import BATCH_HYPERPARAMETERS
from accumtune.accumulation.ghost_batch import refusal
from accumtune.errors import BuildError
from accumtune.oracles import keras_tuner_adapter
from accumtune.search import ghost_batches
from accumtune.search.feasibility import effective_batch_sizes
from accumtune.search.processes import SearchProcesses
from accumtune.worker.transport.hyperparameters import hyperparameters_from

SearchOver = Literal["auto", "effective_batch_size", "pairs"]


class SearchSpace:
    """The space of one search, which its oracle holds.

    Args:
        oracle: Keras Tuner's, with the hyperparameters that the user gave it.
        hypermodel: builds the models.
        processes: builds the model once in a process of its own.
        search_over: as the user gave it; `"auto"` becomes one of the others.
        micro_batch_sizes, accumulation_steps: the values to search.
        ghost_batch_size: as the user gave it, see `ghost_batches.check`.
        memory_budget_bytes: in which a ghost batch must fit; None for no limit.
        whole_batch_loss: as the user asked.
    """

    def __init__(
        self,
        oracle: Any,
        hypermodel: Any,
        processes: SearchProcesses,
        search_over: SearchOver,
        micro_batch_sizes: Sequence[int],
        accumulation_steps: Sequence[int],
        ghost_batch_size: int | str | None,
        memory_budget_bytes: int | None,
        whole_batch_loss: bool | str = "auto",
    ) -> None:
        self._oracle = oracle
        self._hypermodel = hypermodel
        self._processes = processes
        self.listed_micro_batch_sizes = tuple(micro_batch_sizes)
        self._accumulation_steps = tuple(accumulation_steps)
        self.asked_ghost_batch_size = ghost_batch_size
        self._memory_budget_bytes = memory_budget_bytes
        self.ghost_batch_size: int | None = None
        self._initial_space = oracle.hyperparameters.copy()
        self.search_over = search_over
        self.batch_coupled_layers: list[str] = []
        self.asked_whole_batch_loss = whole_batch_loss
        self.whole_batch_loss: bool | None = None
        self.own_train_step: str | None = None
        self.has_own_test_step = False
        self._is_discovered = False
        self._wants_data = False

    @property
    def micro_batch_sizes(self) -> tuple[int, ...]:
        """The user's sizes; with a ghost batch, those that are multiples of it."""
        return ghost_batches.multiples(self.listed_micro_batch_sizes, self.ghost_batch_size)

    @property
    def test_step_batch_size(self) -> int | None:
        """The batch size of the models' own `test_step`, in all trials; None if they have none."""
        return min(self.listed_micro_batch_sizes) if self.has_own_test_step else None

    @property
    def listed_effective_batch_sizes(self) -> tuple[int, ...]:
        """The effective batches of both lists: every product."""
        return effective_batch_sizes(self.listed_micro_batch_sizes, self._accumulation_steps)

    @property
    def effective_batch_sizes(self) -> tuple[int, ...]:
        """Those that are searched: with a ghost batch, what it realises."""
        if self.search_over == "pairs":
            return effective_batch_sizes(self.micro_batch_sizes, self._accumulation_steps)
        return ghost_batches.realised(self.listed_effective_batch_sizes, self.ghost_batch_size)

    def discover(self) -> None:
        """Builds the model once, to find its hyperparameters and what couples its samples."""
        self._is_discovered = True
        discovered = self._discover(self._oracle.get_space())
        ghost_batches.refuse_own(entry["config"]["name"] for entry in discovered["hyperparameters"]["space"])
        self._wants_data = discovered["wants_data"]
        if self.search_over == "auto" and not self._wants_data:
            self._choose_what_to_search_over()
        found = hyperparameters_from(discovered["hyperparameters"])
        self._declare_batch(self._oracle.hyperparameters)
        self._oracle.update_space(found)

    def discover_with_data(self) -> None:
        """Tests the model's own code on the data, and decides what to search over.

        A resumed search keeps its earlier decision.
        """
        if self._wants_data and not self._oracle.trials:
            self._discover(self._oracle.hyperparameters.copy())
            self._wants_data = False
            if self.ghost_batch_size is not None:
                self._replace_batch()
        if not self._oracle.trials:
            self._fit_ghost_batch()
        if self.search_over == "auto":
            self._choose_what_to_search_over()
            self._declare_batch(self._oracle.hyperparameters)

    def renew(self, *, keeps_trials: bool) -> list[str]:
        """Replaces the space of an earlier session by the one that is declared now.

        Args:
            keeps_trials: whether trials have trained; then the space may only have grown.

        Returns:
            A line for each change that is not allowed; if there is one, the space is not replaced.
        """
        if self._is_discovered:  # by this tuner, so nothing has changed since
            return []
        self._is_discovered = True
        before = self._oracle.hyperparameters.get_config()["space"]
        discovered = self._processes.discover(self._hypermodel, self._initial_space.copy())
        declared = keras_tuner.HyperParameters()
        self._declare_batch(declared)
        now = [*declared.get_config()["space"], *discovered["hyperparameters"]["space"]]
        changed = grown_space(before, now) if keeps_trials else []
        if not changed:
            keras_tuner_adapter.replace_space(self._oracle, with_space(before, now) if keeps_trials else now)
        return changed

    def get_state(self) -> dict[str, Any]:
        names = ("search_over", "batch_coupled_layers", "whole_batch_loss", "own_train_step", "has_own_test_step",
                 ghost_batches.NAME)  # fmt: skip
        return {name: getattr(self, name) for name in names}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.search_over = state.get("search_over", self.search_over)
        self.batch_coupled_layers = state.get("batch_coupled_layers", [])
        self.whole_batch_loss = state.get("whole_batch_loss")
        self.own_train_step = state.get("own_train_step")
        self.has_own_test_step = state.get("has_own_test_step", False)
        self.ghost_batch_size = ghost_batches.resolved(self.asked_ghost_batch_size, state.get(ghost_batches.NAME))

    def _discover(self, space: Any) -> dict[str, Any]:
        discovered = self._processes.discover(self._hypermodel, space)
        self.batch_coupled_layers = discovered["batch_coupled_layers"]
        is_mean = self.asked_whole_batch_loss is not False
        self.whole_batch_loss = True if discovered["whole_batch_loss"] else None if is_mean else False
        self.own_train_step = discovered["own_train_step"]
        self.has_own_test_step = discovered["has_own_test_step"]
        asked, left = self.asked_ghost_batch_size, discovered["coupled_with_ghost_batches"]
        if isinstance(asked, int) and discovered["against_ghost_batches"]:
            raise refusal(discovered["against_ghost_batches"][0])
        is_in_vain = not self.batch_coupled_layers or left or self.search_over == "pairs"
        if asked is not None and not (asked == "auto" and is_in_vain):
            self.batch_coupled_layers = left
            best = ghost_batches.choices(self.listed_micro_batch_sizes, self.listed_effective_batch_sizes)[0]
            self.ghost_batch_size = ghost_batches.resolved(asked, best)
        return discovered

    def _fit_ghost_batch(self) -> None:
        """Chooses a smaller ghost batch for the search if one does not fit with the initial hyperparameters."""
        if self.asked_ghost_batch_size != "auto" or self.ghost_batch_size is None or self._memory_budget_bytes is None:
            return
        profiler, budget_bytes = self._processes.profiler(), self._memory_budget_bytes
        config = self._oracle.hyperparameters.get_config()

        def fits(size: int) -> bool:
            profile = profiler.profile({**config, "values": {**config["values"], ghost_batches.NAME: size}})
            return profile.fits(size, 1, budget_bytes)

        try:
            listed = self.listed_micro_batch_sizes, self.listed_effective_batch_sizes
            chosen = ghost_batches.chosen(*listed, fits)
        except BuildError:  # the trials will fail with a better message
            return
        if chosen != self.ghost_batch_size:
            self.ghost_batch_size = chosen
            self._replace_batch()

    def _replace_batch(self) -> None:
        """Declares the batch sizes again once the ghost batch is known, in a search without trials."""
        space = keras_tuner.HyperParameters()
        self._declare_batch(space)
        names = {ghost_batches.NAME, *BATCH_HYPERPARAMETERS}
        declared = self._oracle.hyperparameters.get_config()["space"]
        others = [entry for entry in declared if entry["config"]["name"] not in names]
        for name in names:
            self._oracle.hyperparameters.values.pop(name, None)
        keras_tuner_adapter.replace_space(self._oracle, [*space.get_config()["space"], *others])

    def _choose_what_to_search_over(self) -> None:
        self.search_over = "pairs" if self.batch_coupled_layers else "effective_batch_size"

    def _declare_batch(self, space: Any) -> None:
        """Declares ordered choices: Bayesian optimization sees their rank, which for powers of two is the logarithm."""
        space.Choice("effective_batch_size", list(self.effective_batch_sizes), ordered=True)
        if self.search_over == "pairs":
            space.Choice("micro_batch_size", list(self.micro_batch_sizes), ordered=True)
        if self.ghost_batch_size is not None:
            space.Fixed(ghost_batches.NAME, self.ghost_batch_size)


def grown_space(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line for each hyperparameter that has changed in another way than gaining values.

    Args:
        before, now: Keras Tuner's configurations of hyperparameters. Those that only one of the two has are ignored.
    """
    known = {_key_of(entry): entry["config"] for entry in before}
    lines = []
    for entry in now:
        old, new = known.get(_key_of(entry)), entry["config"]
        if old is not None and not _is_grown(old, new):
            lines.append(f"hyperparameter {new['name']}: {_range_of(old)} → {_range_of(new)}")
        elif old is None and (same := [it["config"] for it in before if it["config"]["name"] == new["name"]]):
            if any(it["class_name"] != entry["class_name"] for it in before if it["config"]["name"] == new["name"]):
                lines.append(f"hyperparameter {new['name']}: {_range_of(same[0])} → {_range_of(new)}")
    return lines


def with_space(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Returns the present space, and those hyperparameters of the earlier one that only some models declare."""
    new = {_key_of(entry): entry for entry in now}
    kept = [new.pop(_key_of(entry), entry) for entry in before]
    return [*kept, *new.values()]


def _key_of(entry: Mapping[str, Any]) -> str:
    return repr((entry["class_name"], entry["config"]["name"], entry["config"].get("conditions")))


def _is_grown(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    if "values" in old:
        return all(value in new["values"] for value in old["values"])
    if "min_value" in old:
        same = all(old.get(name) == new.get(name) for name in ("step", "sampling"))
        return same and new["min_value"] <= old["min_value"] and new["max_value"] >= old["max_value"]
    return old.get("value") == new.get("value")


def _range_of(config: Mapping[str, Any]) -> str:
    if "values" in config:
        return str(list(config["values"]))
    if "min_value" in config:
        return f"{config['min_value']} to {config['max_value']}, step {config.get('step')}, {config.get('sampling')}"
    return str(config.get("value", config.get("default")))
