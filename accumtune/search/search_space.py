"""Finds the hyperparameters that the build function asks for, and declares those of the batch beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras_tuner

from accumtune.oracles import keras_tuner_adapter
from accumtune.search.processes import SearchProcesses
from accumtune.worker.transport.hyperparameters import hyperparameters_from

SearchOver = Literal["auto", "effective_batch_size", "pairs"]


class SearchSpace:
    """The space of one search, which its oracle holds.

    Args:
        oracle: Keras Tuner's, with the hyperparameters that the user gave it.
        hypermodel: what processes build.
        processes: builds the model once in a process of its own.
        search_over: as the user asked; `"auto"` becomes one of the others.
        effective_batch_sizes, micro_batch_sizes: what is proposed.
    """

    def __init__(
        self,
        oracle: Any,
        hypermodel: Any,
        processes: SearchProcesses,
        search_over: SearchOver,
        effective_batch_sizes: Sequence[int],
        micro_batch_sizes: Sequence[int],
    ) -> None:
        self._oracle = oracle
        self._hypermodel = hypermodel
        self._processes = processes
        self._effective_batch_sizes = list(effective_batch_sizes)
        self._micro_batch_sizes = list(micro_batch_sizes)
        self._initial_space = oracle.hyperparameters.copy()
        self.search_over = search_over
        self.batch_coupled_layers: list[str] = []
        self.whole_batch_loss = False
        self._is_discovered = False
        self._wants_data = False

    def discover(self) -> None:
        """Builds the model once: which hyperparameters it asks for, and what couples its samples."""
        self._is_discovered = True
        discovered = self._discover(self._oracle.get_space())
        self._wants_data = discovered["wants_data"]
        if self.search_over == "auto" and not self._wants_data:
            self._choose_what_to_search_over()
        found = hyperparameters_from(discovered["hyperparameters"])
        self._declare_batch(self._oracle.hyperparameters)
        self._oracle.update_space(found)

    def discover_with_data(self) -> None:
        """Tries a model's own code with the data, which decides what is searched over.

        A search that goes on keeps what was decided.
        """
        if self._wants_data and not self._oracle.trials:
            self._discover(self._oracle.hyperparameters.copy())
            self._wants_data = False
        if self.search_over == "auto":
            self._choose_what_to_search_over()
            self._declare_batch(self._oracle.hyperparameters)

    def renew(self, *, keeps_trials: bool) -> list[str]:
        """Searches the hyperparameters as they are declared now.

        Args:
            keeps_trials: trials have trained, so the space may only have grown.

        Returns:
            What has changed otherwise; then the space stays as it was.
        """
        if self._is_discovered:  # by this tuner: nothing can have changed
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
        names = ("search_over", "batch_coupled_layers", "whole_batch_loss")
        return {name: getattr(self, name) for name in names}

    def set_state(self, state: Mapping[str, Any]) -> None:
        self.search_over = state.get("search_over", self.search_over)
        self.batch_coupled_layers = state.get("batch_coupled_layers", [])
        self.whole_batch_loss = state.get("whole_batch_loss", False)

    def _discover(self, space: Any) -> dict[str, Any]:
        discovered = self._processes.discover(self._hypermodel, space)
        self.batch_coupled_layers = discovered["batch_coupled_layers"]
        self.whole_batch_loss = discovered["whole_batch_loss"]
        return discovered

    def _choose_what_to_search_over(self) -> None:
        self.search_over = "pairs" if self.batch_coupled_layers else "effective_batch_size"

    def _declare_batch(self, space: Any) -> None:
        """Declares ordered choices: Bayesian optimisation sees their rank, for powers of two the logarithm."""
        space.Choice("effective_batch_size", self._effective_batch_sizes, ordered=True)
        if self.search_over == "pairs":
            space.Choice("micro_batch_size", self._micro_batch_sizes, ordered=True)


def grown_space(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns what of a space was not only added to, a line each.

    Args:
        before, now: Keras Tuner's configurations of hyperparameters, which are looked at where both have them.
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
    """Returns a space as it is now; what only some models have asked for stays."""
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
