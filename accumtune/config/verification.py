"""Trains a configuration on this machine, a few updates or the whole trial, and compares with the search's results.

"Promised" are the values in the configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from accumtune.config.production import batch_values, builder_of, installed_versions, replayed_values
from accumtune.errors import ConfigError, VerificationError
from accumtune.memory.budget import format_bytes

if TYPE_CHECKING:
    from accumtune.config.training_config import TrainingConfig


@dataclass(frozen=True)
class Verification:
    """The cost of a configuration on this machine, and the promised cost: that in the configuration.

    Args:
        peak_memory_bytes, promised_peak_memory_bytes: the highest allocated bytes during training.
        throughput_samples_per_second, promised_throughput_samples_per_second: after warm-up.
        memory_budget_bytes: the limit that it ran under.
        device: of this machine.
        differences: between this machine and the search's, a text for each.
    """

    peak_memory_bytes: int
    promised_peak_memory_bytes: int | None
    throughput_samples_per_second: float | None
    promised_throughput_samples_per_second: float | None
    memory_budget_bytes: int | None
    device: str
    differences: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"peak memory {_against(self.peak_memory_bytes, self.promised_peak_memory_bytes, format_bytes)}"]
        if self.throughput_samples_per_second is not None:
            speed = self.throughput_samples_per_second, self.promised_throughput_samples_per_second
            lines.append(f"throughput {_against(*speed, lambda value: f'{value:,.0f} samples/s')}")
        if self.memory_budget_bytes is not None:
            lines.append(f"memory budget {format_bytes(self.memory_budget_bytes)}: kept")
        return "\n".join([*lines, *self.differences])


def verify(config: TrainingConfig, build_model: Any, x: Any, y: Any, peak_tolerance: float) -> Verification:
    """See `TrainingConfig.verify`."""
    import keras_tuner

    from accumtune.execution.device_query import current_backend
    from accumtune.execution.standalone_training import FirstUpdates, train_isolated
    from accumtune.execution.timeouts import DEFAULT_SECONDS
    from accumtune.worker.transport.outcome import finished

    micro = config.micro_batch_size
    outcome = train_isolated(
        FirstUpdates(
            builder_of(config, build_model),
            micro,
            config.effective_batch_size // config.replicas,
            config.ghost_batch_size,
        ),
        {"x": x, "y": y},
        hyperparameters=replayed_values(config, micro),
        objective=keras_tuner.Objective("loss", "min"),
        seed=config.seed or 0,
        memory_budget_bytes=config.memory_budget_bytes,
        timeout_seconds=DEFAULT_SECONDS,
    )
    if outcome.ran_out_of_memory:
        return compared(config, None, current_backend(), peak_tolerance)
    return compared(config, finished(outcome, "Training a few updates").result, current_backend(), peak_tolerance)


def compared(
    config: TrainingConfig, measured: Mapping[str, Any] | None, backend: str, peak_tolerance: float
) -> Verification:
    """Compares a configuration's cost with the measured one.

    Args:
        config: the configuration.
        measured: `peak_memory_bytes`, `throughput_samples_per_second` and `device`; None if memory ran out.
        backend: of this process.
        peak_tolerance: see `TrainingConfig.verify`.

    Raises:
        VerificationError: it does not fit the budget, or its peak differs by more than the tolerance.
    """
    budget_bytes, promised = config.memory_budget_bytes, config.peak_memory_bytes
    device = None if measured is None else str(measured["device"])
    differences = tuple(_differences(config, device, backend))
    what = f"Micro-batch {config.micro_batch_size} × {config.accumulation_steps}"
    here = f" on {device}" if device else ""
    changes = f" Differences from the search: {'; '.join(differences)}." if differences else ""
    fix = f"config.for_budget({_budget_text(config)}, build_model, x, y) finds the micro-batch that fits here."
    peak = None if measured is None else int(measured["peak_memory_bytes"])
    if measured is None or peak is None or (budget_bytes is not None and peak > budget_bytes):
        within = "in its memory" if budget_bytes is None else f"in {format_bytes(budget_bytes)}"
        before = "unknown size" if promised is None else format_bytes(promised)
        raise VerificationError(
            f"{what} does not fit {within}{here}.{changes}", f"a peak of {before}, as in the search", fix
        )
    # Written so that a tolerance of NaN accepts nothing.
    if promised is not None and not abs(peak - promised) <= promised * peak_tolerance:
        share = f"{100 * peak_tolerance:.0f} %"
        if peak < promised:
            fix = "check that model and data are those of the search; a smaller model needs a new search."
        raise VerificationError(
            f"{what} needs {format_bytes(peak)}{here}, {100 * abs(peak / promised - 1):.0f} % "
            f"{'more' if peak > promised else 'less'} than promised.{changes}",
            f"at most {share} more or less than the {format_bytes(promised)} that the search "
            f"{'predicted' if 'profile' in (config.memory_source or '') else 'measured'}",
            f"{fix} Or accept it: config.verify(..., peak_tolerance={abs(peak / promised - 1) + 0.01:.2f}).",
        )
    return Verification(
        peak_memory_bytes=peak,
        promised_peak_memory_bytes=promised,
        throughput_samples_per_second=measured.get("throughput_samples_per_second"),
        promised_throughput_samples_per_second=config.throughput_samples_per_second,
        memory_budget_bytes=budget_bytes,
        device=device or "",
        differences=differences,
    )


def _differences(config: TrainingConfig, device: str | None, backend: str) -> list[str]:
    import keras

    policy = keras.config.dtype_policy().name
    here: dict[str, str | None] = {"backend": backend, "device": device, "precision policy": policy}
    there = {"backend": config.backend, "device": config.device, "precision policy": config.precision_policy}
    versions = installed_versions()
    for name, version in config.versions.items():
        # Only packages of both: a missing one matters only if it is the backend, which is compared above.
        if name in versions:
            here[name], there[name] = versions[name], version
    differing = [name for name in here if None not in (there[name], here[name]) and there[name] != here[name]]
    return [f"{name}: {there[name]} in the search, {here[name]} here" for name in differing]


def _budget_text(config: TrainingConfig) -> str:
    budget = config.memory_budget_bytes or config.peak_memory_bytes
    return repr(format_bytes(budget)) if budget else '"<budget>"'


def _against(measured: float, promised: float | None, write: Any) -> str:
    if not promised:
        return f"{write(measured)} (nothing was promised)"
    return f"{write(measured)}, promised {write(promised)} ({100 * (measured / promised - 1):+.1f} %)"


@dataclass(frozen=True)
class Reproduction:
    """The results of the winning trial here, and the promised ones: those in the configuration.

    Args:
        objective: the objective's name.
        value, promised_value: of the best epoch.
        peak_memory_bytes, promised_peak_memory_bytes: the highest allocated bytes of the whole training.
        metrics: all of the best epoch, by name.
        not_carried: what else the trial's result depends on, which a configuration does not hold.
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
        """The absolute difference of the objective's two values."""
        return abs(self.value - self.promised_value)

    def holds(self, objective_tolerance: float = 1e-6, peak_tolerance: float = 0.1) -> bool:
        """Returns whether the objective differs by at most an absolute number, and the peak by at most a share."""
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
    config: TrainingConfig, build_model: Any, x: Any, y: Any, validation_data: Any, fit_arguments: Mapping[str, Any]
) -> Reproduction:
    """See `TrainingConfig.reproduce`."""
    from accumtune.execution.standalone_training import FixedHyperModel, train_isolated
    from accumtune.oracles.metric_direction import objective_from
    from accumtune.worker.transport.outcome import finished

    missing = [name for name, value in (("seed", config.seed), ("epochs", config.epochs)) if value is None]
    if missing or config.objective.get("value") is None:
        raise ConfigError(
            f"The configuration has no {' and no '.join(missing or ['value of the objective'])}.",
            "a configuration that a search wrote, with seed, epochs, and the objective's value.",
            "export it again from its search: accumtune export SEARCH.",
        )
    # The trial's own micro-batch, because another one trains the same only up to rounding.
    micro = int(config.trial.get("micro_batch_size", config.micro_batch_size))
    name = config.objective["name"]
    options = {**config.fit_arguments(), **fit_arguments}
    del options["batch_size"]
    outcome = train_isolated(
        FixedHyperModel(builder_of(config, build_model), micro, config.effective_batch_size, config.ghost_batch_size),
        {"x": x, "y": y, "validation_data": validation_data, **options},
        hyperparameters={**replayed_values(config, micro), **batch_values(micro, config.effective_batch_size)},
        objective=objective_from(config.objective),
        seed=config.seed or 0,
        executions=int(config.trial.get("executions", 1)),
        memory_budget_bytes=config.memory_budget_bytes,
    )
    if outcome.ran_out_of_memory:
        raise VerificationError(
            f"The trial's micro-batch {micro} ran out of memory here.",
            "a trial that fits as it did in the search",
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
