"""A configuration tried out on the machine at hand: what it costs here beside what it promised."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from accumtune.config.production import builder_of, replayed_values
from accumtune.config.value import ConfigValue
from accumtune.config.versions import installed_versions
from accumtune.errors import VerificationError
from accumtune.memory.budget import format_bytes


@dataclass(frozen=True)
class Verification:
    """What a configuration costs on this machine beside what it promised.

    Args:
        peak_memory_bytes, promised_peak_memory_bytes: the highest allocated bytes during training.
        throughput_samples_per_second, promised_throughput_samples_per_second: after warm-up.
        memory_budget_bytes: the limit it ran under.
        device: of this machine.
        differences: between this machine and the search's, each in one sentence.
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


def verify(config: ConfigValue, build_model: Any, x: Any, y: Any, peak_tolerance: float) -> Verification:
    """See `TrainingConfig.verify`."""
    import keras_tuner

    from accumtune.execution.device_query import current_backend
    from accumtune.execution.standalone_training import FirstUpdates, train_isolated
    from accumtune.execution.timeouts import DEFAULT_SECONDS
    from accumtune.worker.transport.outcome import finished

    micro = config.micro_batch_size
    outcome = train_isolated(
        FirstUpdates(builder_of(config, build_model), micro, config.effective_batch_size // config.replicas),
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
    config: ConfigValue, measured: Mapping[str, Any] | None, backend: str, peak_tolerance: float
) -> Verification:
    """What a configuration promised beside what it took here.

    Args:
        config: the promise.
        measured: `peak_memory_bytes`, `throughput_samples_per_second` and `device`; None where memory ran out.
        backend: here.
        peak_tolerance: see `TrainingConfig.verify`.

    Raises:
        VerificationError: it does not fit the budget, or its peak is not the promised one.
    """
    budget_bytes, promised = config.memory_budget_bytes, config.peak_memory_bytes
    device = None if measured is None else str(measured["device"])
    differences = tuple(_differences(config, device, backend))
    what = f"Micro-batch {config.micro_batch_size} × {config.accumulation_steps}"
    here = f" on {device}" if device else ""
    told = f" What differs from the search: {'; '.join(differences)}." if differences else ""
    fix = f"config.for_budget({_budget_text(config)}, build_model, x, y) finds the micro-batch that does, here."
    peak = None if measured is None else int(measured["peak_memory_bytes"])
    if measured is None or peak is None or (budget_bytes is not None and peak > budget_bytes):
        within = "in its memory" if budget_bytes is None else f"in {format_bytes(budget_bytes)}"
        before = "unknown size" if promised is None else format_bytes(promised)
        raise VerificationError(
            f"{what} does not fit {within}{here}.{told}", f"a peak of {before}, as the search measured", fix
        )
    # Written so that a tolerance of NaN accepts nothing.
    if promised is not None and not abs(peak - promised) <= promised * peak_tolerance:
        share = f"{100 * peak_tolerance:.0f} %"
        if peak < promised:
            fix = "look whether model and data are those of the search; what is smaller by design needs a new search."
        raise VerificationError(
            f"{what} needs {format_bytes(peak)}{here}, {100 * abs(peak / promised - 1):.0f} % "
            f"{'more' if peak > promised else 'less'} than promised.{told}",
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


def _differences(config: ConfigValue, device: str | None, backend: str) -> list[str]:
    import keras

    policy = keras.config.dtype_policy().name
    here: dict[str, str | None] = {"backend": backend, "device": device, "precision policy": policy}
    there = {"backend": config.backend, "device": config.device, "precision policy": config.precision_policy}
    versions = installed_versions()
    for name, version in config.versions.items():
        # Only what both know: a package that is missing here matters only where it is the backend, named above.
        if name in versions:
            here[name], there[name] = versions[name], version
    differing = [name for name in here if None not in (there[name], here[name]) and there[name] != here[name]]
    return [f"{name}: {there[name]} in the search, {here[name]} here" for name in differing]


def _budget_text(config: ConfigValue) -> str:
    budget = config.memory_budget_bytes or config.peak_memory_bytes
    return repr(format_bytes(budget)) if budget else '"<budget>"'


def _against(measured: float, promised: float | None, write: Any) -> str:
    if not promised:
        return f"{write(measured)} (nothing was promised)"
    return f"{write(measured)}, promised {write(promised)} ({100 * (measured / promised - 1):+.1f} %)"
