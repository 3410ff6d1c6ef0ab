"""A hypermodel in which micro-batch size and accumulation steps are hyperparameters."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import keras
import keras_tuner

from accumtune.accumulation import accumulate
from accumtune.accumulation.batch_pair import BatchPair, ghost_batch_of, without_batch
from accumtune.errors import BudgetTooSmallError
from accumtune.execution.platform_support import require_linux
from accumtune.execution.profiling import check_sizes
from accumtune.execution.standalone_profile import profile
from accumtune.memory.budget import format_bytes, parse_budget
from accumtune.memory.machine import budget_hint
from accumtune.search.feasibility import pair_for_proposal
from accumtune.worker.builder import ModelBuilder
from accumtune.worker.data.user_data import feed_by_batches, fit_by_default

DEFAULT_MICRO_BATCH_SIZES = (8, 16, 32, 64, 128)
DEFAULT_ACCUMULATION_STEPS = (1, 2, 4, 8, 16)


class AccumulationHyperModel(keras_tuner.HyperModel):
    """Makes micro-batch size and accumulation steps tunable beside the hyperparameters of another hypermodel.

    In a stock Keras Tuner tuner it declares `micro_batch_size` and `accumulation_steps`, builds the accumulating
    model and fits it with the effective batch. accumtune's own tuners use it too, but choose the pair themselves.

    Args:
        hypermodel: a Keras Tuner build function or `keras_tuner.HyperModel`.
        memory_budget: `"2GiB"` or bytes. Before a model trains, a few probes, each in its own process, measure whether
            its micro-batch fits. If it does not, the fastest micro-batch that fits is used with more steps: the same
            effective batch, the same training. None: no check.
        micro_batch_sizes: samples in one forward and backward pass.
        accumulation_steps: micro-batches per update.
        learning_rate_scaling: None, `"linear"` or `"sqrt"`: how the learning rate grows with the effective batch.
        base_effective_batch_size: the effective batch at which the learning rate is used as the build function sets
            it; default: the smallest.

    Example:

    >>> hypermodel = accumtune.AccumulationHyperModel(build_model, memory_budget="2GiB")  # doctest: +SKIP
    >>> tuner = keras_tuner.RandomSearch(hypermodel, objective="val_loss", max_trials=10)  # doctest: +SKIP
    """

    def __init__(
        self,
        hypermodel: Any,
        *,
        memory_budget: int | float | str | None = None,
        micro_batch_sizes: Sequence[int] = DEFAULT_MICRO_BATCH_SIZES,
        accumulation_steps: Sequence[int] = DEFAULT_ACCUMULATION_STEPS,
        learning_rate_scaling: str | None = None,
        base_effective_batch_size: int | None = None,
        name: str | None = None,
        tunable: bool = True,
        builder: ModelBuilder | None = None,
    ) -> None:
        super().__init__(name=name, tunable=tunable)
        self.hypermodel = hypermodel
        self.memory_budget_bytes = None if memory_budget is None else parse_budget(memory_budget)
        if memory_budget is not None:
            require_linux("AccumulationHyperModel with a memory_budget")
        self.micro_batch_sizes = check_sizes("micro_batch_sizes", micro_batch_sizes)
        self.accumulation_steps = check_sizes("accumulation_steps", accumulation_steps)
        self.builder = builder or ModelBuilder(
            hypermodel,
            learning_rate_scaling=learning_rate_scaling,
            base_effective_batch_size=base_effective_batch_size
            or self.micro_batch_sizes[0] * self.accumulation_steps[0],
        )
        self._profiles: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        """Looks up all other attributes and methods on the user's hypermodel."""
        if name.startswith("__") or name == "hypermodel":  # copying asks for these before `hypermodel` is set
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.hypermodel, name)

    def declare_hyperparameters(self, hp: Any) -> None:
        self.builder.declare_hyperparameters(hp)

    def build_plain(self, hp: Any) -> Any:
        """Builds the user's model, compiled, without accumulation."""
        return self.builder.build_plain(hp)

    def build(self, hp: Any) -> Any:
        """Builds the user's model with accumulation; its `fit` uses the effective batch unless given a batch size."""
        pair = self._pair(hp)
        # Only accumtune's own tuners choose a ghost batch; they set the effective batch too.
        ghost = hp.values.get("ghost_batch_size") if "effective_batch_size" in hp.values else None
        ghost = ghost_batch_of(pair.effective_batch_size, ghost)
        model = accumulate(self.build_plain(hp), pair.micro_batch_size, ghost_batch_size=ghost)
        return fit_by_default(model, pair.effective_batch_size)

    def fit(self, hp: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Trains with the effective batch, validates at the micro-batch.

        Raises:
            BudgetTooSmallError: in a stock tuner with a budget, where not even micro-batch 1 fits.
        """
        pair = self._pair(hp)
        if self.memory_budget_bytes is not None and "effective_batch_size" not in hp.values:
            pair = self._within_budget(hp, pair, *args, **kwargs)
            model = accumulate(model, pair.micro_batch_size)
            if pair.micro_batch_size in self.micro_batch_sizes and pair.accumulation_steps in self.accumulation_steps:
                # The oracle learns from the pair that runs, unless its lists do not have it.
                hp.values.update(micro_batch_size=pair.micro_batch_size, accumulation_steps=pair.accumulation_steps)
        feed_by_batches(model, pair.effective_batch_size, pair.micro_batch_size, min(self.micro_batch_sizes))
        fit = getattr(self.hypermodel, "fit", None)
        return model.fit(*args, **kwargs) if fit is None else fit(hp, model, *args, **kwargs)

    def _pair(self, hp: Any) -> BatchPair:
        chosen = BatchPair.of_values(hp.values)
        if chosen is not None:  # by accumtune's tuner
            return chosen
        micro = hp.Choice("micro_batch_size", list(self.micro_batch_sizes), ordered=True)
        steps = hp.Choice("accumulation_steps", list(self.accumulation_steps), ordered=True)
        return BatchPair(micro, steps)

    def _within_budget(self, hp: Any, pair: BatchPair, *args: Any, **kwargs: Any) -> BatchPair:
        named = dict(zip(("x", "y"), args, strict=False))
        x, y = named.get("x", kwargs.get("x")), named.get("y", kwargs.get("y"))
        own = without_batch(hp.values)
        key = json.dumps(own, sort_keys=True, default=repr)
        if key not in self._profiles:
            self._profiles[key] = profile(
                self.builder, x, y, sample_weight=kwargs.get("sample_weight"), hyperparameters=own,
                micro_batch_sizes=self.micro_batch_sizes, memory_budget=self.memory_budget_bytes,
            )  # fmt: skip
        costs = self._profiles[key]
        if costs.fits(pair.micro_batch_size, pair.accumulation_steps, self.memory_budget_bytes):
            return pair
        fitting = pair_for_proposal(costs, pair.effective_batch_size, self.micro_batch_sizes, self.memory_budget_bytes)
        if fitting is None:
            raise BudgetTooSmallError(
                f"Received memory_budget={format_bytes(self.memory_budget_bytes or 0)}, in which not even micro-batch "
                "1 of this model fits.",
                "a budget that holds the parameters, the optimizer's slots and one sample's activations.",
                "raise memory_budget, or let the build function make a smaller model."
                + budget_hint(keras.config.backend()),
            )
        return fitting
