"""The winning trial once more, on this machine, from nothing but its configuration and the user's code."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accumtune.config.production import batch_values, builder_of, replayed_values
from accumtune.config.value import ConfigValue
from accumtune.errors import ConfigError, VerificationError
from accumtune.memory.budget import format_bytes


@dataclass(frozen=True)
class Reproduction:
    """What the winning trial came to here, beside what it came to in the search.

    Args:
        objective: the objective's name.
        value, promised_value: of the best epoch.
        peak_memory_bytes, promised_peak_memory_bytes: the highest allocated bytes of the whole training.
        metrics: all of the best epoch, by name.
        not_carried: what else the trial's result depends on, that a configuration does not hold.
    """

    objective: str
    value: float
    promised_value: float
    peak_memory_bytes: int
    promised_peak_memory_bytes: int | None
    metrics: Mapping[str, float]
    not_carried: tuple[str, ...] = ()

    @property
    def difference(self) -> float:
        """Of the objective's two values, as an absolute number."""
        return abs(self.value - self.promised_value)

    def holds(self, objective_tolerance: float = 1e-6, peak_tolerance: float = 0.1) -> bool:
        """Whether the objective is off by no more than an absolute number, and the peak by no more than a share."""
        promised = self.promised_peak_memory_bytes
        is_near = promised is None or abs(self.peak_memory_bytes - promised) <= peak_tolerance * promised
        return self.difference <= objective_tolerance and is_near

    def __str__(self) -> str:
        peak = f"peak memory {format_bytes(self.peak_memory_bytes)}"
        if self.promised_peak_memory_bytes:
            share = 100 * (self.peak_memory_bytes / self.promised_peak_memory_bytes - 1)
            peak += f", promised {format_bytes(self.promised_peak_memory_bytes)} ({share:+.1f} %)"
        value = f"{self.objective} {self.value:.8g}, promised {self.promised_value:.8g} (off by {self.difference:.1e})"
        return "\n".join([value, peak, *(f"not carried: {item}" for item in self.not_carried)])


def reproduce(
    config: ConfigValue, build_model: Any, x: Any, y: Any, validation_data: Any, fit_arguments: Mapping[str, Any]
) -> Reproduction:
    """See `TrainingConfig.reproduce`."""
    import keras_tuner

    from accumtune.execution.standalone_training import FixedHyperModel, train_isolated
    from accumtune.worker.transport.outcome import finished

    missing = [name for name, value in (("seed", config.seed), ("epochs", config.epochs)) if value is None]
    if missing or config.objective.get("value") is None:
        raise ConfigError(
            f"The configuration has no {' and no '.join(missing or ['value of the objective'])}.",
            "what a search of accumtune wrote: seed, epochs, and the objective's value.",
            "export it again from its search: accumtune export SEARCH.",
        )
    # The trial's own micro-batch: another one of the same effective batch trains the same up to rounding.
    micro = int(config.trial.get("micro_batch_size", config.micro_batch_size))
    name, direction = config.objective["name"], config.objective.get("direction", "min")
    options = {**config.fit_arguments(), **fit_arguments}
    del options["batch_size"]
    outcome = train_isolated(
        FixedHyperModel(builder_of(config, build_model), micro, config.effective_batch_size),
        {"x": x, "y": y, "validation_data": validation_data, **options},
        hyperparameters={**replayed_values(config, micro), **batch_values(micro, config.effective_batch_size)},
        objective=keras_tuner.Objective(name, direction),
        seed=config.seed or 0,
        executions=int(config.trial.get("executions", 1)),
        memory_budget_bytes=config.memory_budget_bytes,
    )
    if outcome.ran_out_of_memory:
        raise VerificationError(
            f"The trial's micro-batch {micro} ran out of memory here.",
            "to fit as it did in the search",
            "config.for_budget(...) finds the micro-batch that fits here.",
        )
    result = finished(outcome, "The training").result
    promised_peak = config.trial.get("peak_memory_bytes")
    return Reproduction(
        objective=name,
        value=result["metrics"][name],
        promised_value=config.objective["value"],
        peak_memory_bytes=result["peak_memory_bytes"],
        promised_peak_memory_bytes=config.peak_memory_bytes if promised_peak is None else promised_peak,
        metrics=result["metrics"],
        not_carried=tuple(config.trial.get("not_carried", ())),
    )
